/* SPDX-License-Identifier: MIT */
/*
 * All RAM against the store, in a pause; see selfcheck.h.
 *
 * What a page should be is known without reading it back: its record in the store has
 * its keyed 128-bit hash, and records stand 255 to a header, which are read before the
 * epoch begins, while the guest runs; pages that this epoch copies early are noted as they
 * are copied.  So the pause costs one pass over memory, on all cores and no disk, and an
 * unnoticed difference has a chance of 2^-128.  That the store's bytes are what the hash
 * says is the business of `verify`.
 *
 * Limits.  The pass ends after self_check_max and the next one goes on where it
 * ended (vm->check_next); holes of tmpfs files cost nothing and stay holes.
 * MISSED_SHOWN pages are told one by one, all are counted and healed.
 *
 * A page is
 *   skipped   in `late`: known to have changed, and copied in this pause anyway
 *   sound     its bytes have the identity that the store has for it
 *   missed    else: also when the store has no entry for it at all
 */
#include "snapd/vm/selfcheck.h"

#include <assert.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "snapd/util/pool.h"
#include "snapd/state.h"
#include "snapd/util/busguard.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/vm/priv.h"

#define MISSED_SHOWN	 64u
#define MISSED_LOGGED	 16u
#define SLICE_FRAMES	 65536u /* between looks at the clock */
#define PARALLEL_FRAMES	 1024u
#define READ_BATCH_PAGES 4096u

struct missed {
	uint64_t frame, home_gfn;
	/* where it was mapped, if anywhere */
	uint64_t gpa, generation;
	uint32_t slot, as_id;
	bool mapped;
};

struct selfcheck {
	struct vm *vm;
	/* By frame, as many as there can be, mapped: what each page should be.  {0,0}: the store
	 * has nothing; a zero page is zero_id, which no hash will be. */
	struct pageid *ids;
	size_t nr_ids;
	struct gpaset *late; /* borrowed, within selfcheck_run() */
	_Atomic uint64_t nr_checked, nr_missed;
	pthread_mutex_t lock; /* shown[], nr_shown, while the pool works */
	struct missed shown[MISSED_SHOWN];
	uint32_t nr_shown;
	uint64_t epoch, sound_at;
	uint64_t ns;
	bool complete;
};

static const struct pageid zero_id = {1, 0};

int selfcheck_create(struct vm *vm, struct selfcheck **ret, struct err *e)
{
	struct selfcheck *s = calloc(1, sizeof(*s));

	if (!s)
		return err_set(e, ENOMEM, "out of memory");
	s->nr_ids = vm->shm.nr_frames;
	s->ids = mmap(NULL, s->nr_ids * sizeof(*s->ids), PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (s->ids == MAP_FAILED) {
		free(s);
		return err_set(e, ENOMEM, "out of memory");
	}
	s->vm = vm;
	s->sound_at = vm->sound_at;
	pthread_mutex_init(&s->lock, NULL);
	*ret = s;
	return 0;
}

void selfcheck_destroy(struct selfcheck *s)
{
	if (!s)
		return;
	munmap(s->ids, s->nr_ids * sizeof(*s->ids));
	pthread_mutex_destroy(&s->lock);
	free(s);
}

uint64_t selfcheck_missed(const struct selfcheck *s)
{
	return s->nr_missed;
}

bool selfcheck_complete(const struct selfcheck *s)
{
	return s->complete;
}

/* ---- what the store has ---- */

static void should_be(struct selfcheck *s, uint64_t gfn, struct pageid id)
{
	const struct vm_piece *p = vm_mem_by_gfn(&s->vm->mem, gfn);
	uint64_t frame;

	if (!vm_piece_has_gfn(p, gfn))
		return; /* memory that went */
	frame = p->p.first_frame + gfn - p->p.home_gfn;
	assert(frame < s->nr_ids);
	s->ids[frame] = pageid_is_zero(id) ? zero_id : id;
}

static int identify(struct selfcheck *s, struct store_reader *reader, struct page_read *reqs,
		    size_t nr, struct err *e)
{
	int err = nr ? store_read_pages(reader, reqs, nr, e) : 0;

	for (size_t i = 0; !err && i < nr; i++)
		should_be(s, reqs[i].gfn, reqs[i].id);
	return err;
}

static int identify_all(struct selfcheck *s, struct store_reader *reader, struct job *job,
			struct err *e)
{
	_cleanup_free_ struct page_read *reqs = calloc(READ_BATCH_PAGES, sizeof(*reqs));
	struct pagemap_iter it;
	size_t nr = 0;
	uint64_t gfn;
	loc_t loc;
	int err;

	if (!reqs || pagemap_iter_init(&it, s->vm->live))
		return err_set(e, ENOMEM, "out of memory");
	err = 0;
	while (!err && pagemap_iter_next(&it, &gfn, &loc)) {
		reqs[nr++] = (struct page_read){.gfn = gfn, .loc = loc};
		if (nr < READ_BATCH_PAGES)
			continue;
		err = identify(s, reader, reqs, nr, e);
		nr = 0;
		if (!err)
			err = vm_interrupted(s->vm, job, e);
	}
	pagemap_iter_deinit(&it);
	return err ? err : identify(s, reader, reqs, nr, e);
}

int selfcheck_prepare(struct selfcheck *s, struct job *job, struct err *e)
{
	struct store_reader *reader;
	int err = store_reader_create(s->vm->d->store, s->vm->mem.page_size, &reader, e);

	if (err)
		return err;
	err = identify_all(s, reader, job, e);
	store_reader_destroy(reader);
	return err;
}

void selfcheck_copied(struct selfcheck *s, uint64_t gfn, struct pageid id)
{
	should_be(s, gfn, id);
}

/* ---- the pass ---- */

struct part {
	struct selfcheck *s;
	uint64_t first, end; /* frames */
	int err;
};

static bool is_sound(const struct selfcheck *s, uint64_t frame, const uint8_t *page)
{
	size_t page_size = s->vm->mem.page_size;
	struct pageid want = frame < s->nr_ids ? s->ids[frame] : (struct pageid){0, 0};

	if (!(want.lo | want.hi))
		return false;
	if (pageid_equal(want, zero_id))
		return !page || pageid_bytes_zero(page, page_size);
	return page &&
	       pageid_equal(pageid_of(store_secret(s->vm->d->store), page, page_size), want);
}

static void note_missed(struct selfcheck *s, uint64_t frame, uint64_t gfn)
{
	atomic_fetch_add(&s->nr_missed, 1);
	gpaset_add(s->late, frame);
	pthread_mutex_lock(&s->lock);
	if (s->nr_shown < MISSED_SHOWN)
		s->shown[s->nr_shown++] = (struct missed){.frame = frame, .home_gfn = gfn};
	pthread_mutex_unlock(&s->lock);
}

/* One frame; `hole`: the file has nothing there, and must not be made to. */
static void check_frame(struct selfcheck *s, const struct vm_piece *p, uint64_t frame, bool hole)
{
	uint64_t gfn = p->p.home_gfn + frame - p->p.first_frame;

	if (gpaset_test(s->late, frame))
		return;
	atomic_fetch_add_explicit(&s->nr_checked, 1, memory_order_relaxed);
	if (!is_sound(s, frame, hole ? NULL : vm_piece_page(&s->vm->mem, p, frame)))
		note_missed(s, frame, gfn);
}

/* First frame at or above `frame` of the piece whose page may hold data (SEEK_DATA) or
 * is a hole for certain (SEEK_HOLE). */
static uint64_t seek_frame(const struct vm_mem *m, const struct vm_piece *p, uint64_t frame,
			   int whence)
{
	uint64_t end = p->p.first_frame + p->p.nr_frames;
	off_t at, from = (off_t)((p->p.block_page + frame - p->p.first_frame) * m->page_size);

	at = lseek(p->block->fd, from, whence);
	if (at < 0)
		return whence == SEEK_DATA && errno == ENXIO ? end : frame;
	at -= (off_t)(p->p.block_page * m->page_size);
	at = whence == SEEK_DATA ? at / m->page_size : DIV_ROUND_UP(at, m->page_size);
	return MIN(p->p.first_frame + (uint64_t)at, end);
}

/* Frames [first, end) of one piece. */
static void check_run(struct selfcheck *s, const struct vm_piece *p, uint64_t first, uint64_t end)
{
	uint64_t data = first, hole = first;

	for (uint64_t f = first; f < end; f++) {
		if (f >= hole && p->block->is_tmpfs) {
			data = seek_frame(&s->vm->mem, p, f, SEEK_DATA);
			hole = MAX(seek_frame(&s->vm->mem, p, data, SEEK_HOLE), f + 1);
		}
		check_frame(s, p, f, f < data);
	}
}

static void check_part(void *arg)
{
	struct part *part = arg;
	const struct vm_mem *m = &part->s->vm->mem;

	for (uint32_t i = 0; i < m->nr_pieces; i++) {
		const struct vm_piece *p = &m->by_frame[i];
		uint64_t first = MAX(p->p.first_frame, part->first);
		uint64_t end = MIN(p->p.first_frame + p->p.nr_frames, part->end);

		if (first < end)
			check_run(part->s, p, first, end);
	}
}

/* Pool: relative to where the slice begins. */
struct slice {
	struct selfcheck *s;
	uint64_t first;
};

static int check_guarded(void *arg, uint64_t first, uint64_t n)
{
	const struct slice *slice = arg;
	struct part part = {.s = slice->s, .first = slice->first + first};

	part.end = part.first + n;
	return busguard_run(check_part, &part);
}

static int heal_later(struct selfcheck *s)
{
	uint64_t cursor = 0, frames[256];
	size_t n;
	int err = 0;

	/* `late` is inflight already, but for what was missed. */
	while (!err && s->nr_missed &&
	       (n = gpaset_peek(s->late, s->vm->mem.frames_end, &cursor, frames, 256)))
		err = vm_shm_add(&s->vm->shm, &s->vm->shm.inflight, frames, n);
	return err;
}

static int check_slices(struct selfcheck *s, uint64_t max_ns)
{
	struct vm *vm = s->vm;
	uint64_t all = vm->mem.frames_end, done = 0, n;
	uint64_t begun = now_ns(CLOCK_MONOTONIC);
	int err = 0;

	while (!err && done < all && now_ns(CLOCK_MONOTONIC) - begun < max_ns && !vm->stop) {
		struct slice slice = {s, vm->check_next < all ? vm->check_next : 0};

		n = MIN(all - slice.first, all - done);
		n = MIN(n, (uint64_t)SLICE_FRAMES);
		err = pool_ranges(vm->d->pool, n, PARALLEL_FRAMES, check_guarded, &slice);
		vm->check_next = slice.first + n;
		done += n;
	}
	s->complete = !err && done == all;
	return err;
}

int selfcheck_run(struct selfcheck *s, struct gpaset *late, uint64_t max_ns, struct err *e)
{
	uint64_t begun = now_ns(CLOCK_MONOTONIC);
	int err;

	s->late = late;
	err = check_slices(s, max_ns);
	if (!err)
		err = heal_later(s);
	s->late = NULL;
	s->ns = now_ns(CLOCK_MONOTONIC) - begun;
	return err ? err_set(e, EFAULT, "the VM's memory file shrank or cannot be read") : 0;
}

/* ---- the report ---- */

static void locate(struct missed *m, size_t page_size, const struct state_slot *slots,
		   size_t nr_slots, const struct state_slot_note *notes, size_t nr_notes)
{
	for (size_t i = 0; i < nr_slots && !m->mapped; i++) {
		uint64_t skip = m->home_gfn - slots[i].home_gfn;

		if (slots[i].home_gfn == UINT64_MAX || skip >= slots[i].nr_pages)
			continue;
		m->mapped = true;
		m->gpa = slots[i].gpa + skip * page_size;
		m->slot = slots[i].slot;
		m->as_id = slots[i].as_id;
		m->generation = i < nr_notes ? notes[i].generation : 0;
	}
}

static int compare_missed(const void *a, const void *b)
{
	const struct missed *x = a, *y = b;

	return x->home_gfn < y->home_gfn ? -1 : x->home_gfn > y->home_gfn;
}

static void log_missed(const struct selfcheck *s, const struct missed *m)
{
	log_event(LOG_MISSED_PAGES, LOG_LVL_ERR,
		  "%s: self-check: a write to GPA 0x%llx was missed (%s %u, address space %u, "
		  "generation %llu) before epoch %llu of timeline %llu; healed by it",
		  s->vm->name, (unsigned long long)m->gpa, m->mapped ? "slot" : "unmapped, slot",
		  m->slot, m->as_id, (unsigned long long)m->generation,
		  (unsigned long long)s->epoch, (unsigned long long)s->vm->point.timeline);
}

void selfcheck_locate(struct selfcheck *s, const void *state, size_t len, uint64_t epoch)
{
	const struct state_slot *slots = NULL;
	const struct state_slot_note *notes = NULL;
	size_t slots_len = 0, notes_len = 0;
	const void *data;
	size_t page_size = s->vm->mem.page_size;
	struct snapd_state_reader r;
	uint16_t version;

	s->epoch = epoch;
	if (!state_reader_init(&r, state, len, NULL)) {
		if (!state_get(&r, "layout", 0, &version, &data, &slots_len))
			slots = data;
		if (!state_get(&r, "note.slots", 0, &version, &data, &notes_len))
			notes = data;
	}
	qsort(s->shown, s->nr_shown, sizeof(s->shown[0]), compare_missed);
	for (uint32_t i = 0; i < s->nr_shown; i++) {
		struct missed *m = &s->shown[i];

		m->gpa = m->home_gfn * page_size;
		locate(m, page_size, slots, slots ? slots_len / sizeof(*slots) : 0, notes,
		       notes ? notes_len / sizeof(*notes) : 0);
		if (i < MISSED_LOGGED)
			log_missed(s, m);
	}
	if (s->nr_missed > MISSED_LOGGED)
		log_event(LOG_MISSED_PAGES, LOG_LVL_ERR, "%s: self-check: %llu pages were missed",
			  s->vm->name, (unsigned long long)s->nr_missed);
}

static json_t *missed_json(const struct selfcheck *s, const struct missed *m)
{
	return json_pack("{s:I,s:I,s:b,s:I,s:I,s:I,s:I,s:I}", "home_gfn", (json_int_t)m->home_gfn,
			 "gpa", (json_int_t)m->gpa, "mapped", m->mapped, "as_id",
			 (json_int_t)m->as_id, "slot", (json_int_t)m->slot, "generation",
			 (json_int_t)m->generation, "epoch", (json_int_t)s->epoch, "sound_at",
			 (json_int_t)s->sound_at);
}

json_t *selfcheck_json(const struct selfcheck *s)
{
	json_t *pages = json_array();

	for (uint32_t i = 0; i < s->nr_shown; i++)
		json_array_append_new(pages, missed_json(s, &s->shown[i]));
	return json_pack("{s:I,s:I,s:I,s:b,s:I,s:o}", "checked", (json_int_t)s->nr_checked, "total",
			 (json_int_t)s->vm->mem.ram_frames, "missed", (json_int_t)s->nr_missed,
			 "complete", s->complete, "ns", (json_int_t)s->ns, "pages", pages);
}
