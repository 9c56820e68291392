/* SPDX-License-Identifier: MIT */
/*
 * The dirty set of a VM → pages of an epoch.
 *
 * Why nothing is lost (I1).  The agent publishes a frame only after the ring
 * entry's RESET, when KVM has write-protected the page again (or will report its
 * next write in any case).  So for a frame taken from `dirty`:
 *   - bytes that are copied after the take hold every write reported so far;
 *   - a write that comes later, even in the middle of the copy, is reported again:
 *     the frame is in `dirty` again, and is copied again, later.  A torn early copy
 *     is therefore never the last one, because
 *   - the pause ends with a complete harvest, and all that is in `dirty` then is
 *     copied while nothing runs.
 * The store takes the later bytes of a frame given twice, and every copy is handed
 * to it in the order in which it was made.
 *
 * Two private sets say what this epoch did so far, both over the same frames:
 *   seen   copied early at least once
 *   late   dirty again after that: hot, left for the pause; at the pause, all of
 *          `dirty` is added to it, and it is what the pause copies
 *
 *   dirty ──take──► inflight (and) ──► not seen: copy ──► chunks ──► epoch_put
 *                                 └──► seen: late ──pause──► staging ──► chunks ──► …
 *
 * Chunks: a ring of 256-page buffers.  The pool copies and hashes them, this thread
 * hands them to the store in order; when nobody has begun the one that is next, it
 * works on it itself.
 *
 * Holes: memory that the guest never touched is a hole of the RAM file.  Reading it
 * through a mapping would allocate it, so long runs of dirty frames are looked up
 * with SEEK_DATA and holes are stored as zero pages unread; so are single frames that
 * the VMM once gave back (a balloon).  That it did so is a reason to look, no more: the
 * file says what is there, also when the guest has written the page since.
 *
 * Limits: 8 chunks and the staging memory (staging_max); a dirty set that does not
 * shrink below it makes the snapshot fail, with the VM as it was.
 */
#include "snapd/vm/capture_impl.h"

#include <assert.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "snapd/vm/selfcheck.h"
#define EARLY_ROUNDS	 6u
#define HOLE_RUN	 64u /* look for a hole where so many frames in a row are dirty */
#define STAGING_KEEP_MIN ((size_t)16 << 20)

static uint8_t zero_page[65536] __attribute__((aligned(4096))); /* only read */

/* ---- make and end ---- */

int capture_create(struct vm *vm, struct capture **ret, struct err *e)
{
	struct capture *c = calloc(1, sizeof(*c));
	size_t buf_bytes = (size_t)CHUNK_PAGES * vm->mem.page_size;

	if (!c)
		return err_set(e, ENOMEM, "out of memory");
	c->vm = vm;
	c->secret = store_secret(vm->d->store);
	c->page_size = vm->mem.page_size;
	c->set_bytes = gpaset_bytes(vm->shm.nr_frames);
	c->set_mem = mmap(NULL, 2 * c->set_bytes, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	c->chunks = calloc(NR_CHUNKS, sizeof(*c->chunks));
	c->chunk_mem = mmap(NULL, NR_CHUNKS * buf_bytes, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!vm->staging.mem && staging_init(&vm->staging, vm->d->config.staging_max_bytes))
		vm->staging.mem = NULL;
	c->staged = calloc(vm->staging.max_bytes / c->page_size + 1, sizeof(*c->staged));
	if (c->set_mem == MAP_FAILED || c->chunk_mem == MAP_FAILED || !c->chunks ||
	    !vm->staging.mem || !c->staged) {
		capture_destroy(c);
		return err_set(e, ENOMEM, "out of memory for capturing");
	}
	gpaset_init(&c->seen, c->set_mem, vm->shm.nr_frames);
	gpaset_init(&c->late, c->set_mem + c->set_bytes, vm->shm.nr_frames);
	for (uint32_t i = 0; i < NR_CHUNKS; i++) {
		c->chunks[i].c = c;
		c->chunks[i].task.fn = capture_chunk_task;
		c->chunks[i].buf = c->chunk_mem + i * buf_bytes;
	}
	*ret = c;
	return 0;
}

void capture_destroy(struct capture *c)
{
	if (!c)
		return;
	assert(!c->ep);
	if (c->set_mem && c->set_mem != MAP_FAILED)
		munmap(c->set_mem, 2 * c->set_bytes);
	if (c->chunk_mem && c->chunk_mem != MAP_FAILED)
		munmap(c->chunk_mem, (size_t)NR_CHUNKS * CHUNK_PAGES * c->page_size);
	free(c->chunks);
	free(c->staged);
	free(c);
}

void capture_begin(struct capture *c, struct epoch *ep, struct selfcheck *check)
{
	assert(!c->ep);
	c->ep = ep;
	c->check = check;
	c->filled = c->handed = 0;
	c->nr_staged = c->nr_late = 0;
	c->gone_told = 0;
	c->stats = (struct capture_stats){};
}

size_t capture_gone_told(const struct capture *c)
{
	return c->gone_told;
}

void capture_end(struct capture *c, struct capture_stats *ret)
{
	size_t used = (size_t)c->nr_staged * c->page_size;

	for (; c->handed < c->filled; c->handed++) {
		struct chunk *k = &c->chunks[c->handed % NR_CHUNKS];

		pool_cancel(c->vm->d->pool, &k->task);
		k->busy = false;
	}
	gpaset_clear(&c->seen, c->vm->mem.frames_end);
	gpaset_clear(&c->late, c->vm->mem.frames_end);
	c->ep = NULL;
	c->check = NULL;
	c->last_staged_bytes = used;
	staging_trim(&c->vm->staging, MAX(4 * used, STAGING_KEEP_MIN));
	if (ret)
		*ret = c->stats;
}

/* ---- early capture ---- */

int capture_tell_gone(struct capture *c, size_t end, struct err *e)
{
	int err = 0;

	for (; !err && c->gone_told < end; c->gone_told++) {
		const struct gfn_run *g = &c->vm->gone[c->gone_told];

		err = epoch_gone(c->ep, g->gfn, g->n, e);
	}
	return err;
}

static uint64_t hole_ends(const struct vm_piece *p, uint64_t off, uint64_t page_size)
{
	off_t data = lseek(p->block->fd, (off_t)off, SEEK_DATA);
	uint64_t end = (p->p.block_page + p->p.nr_frames) * page_size;

	if (data < 0)
		return errno == ENXIO ? end : off;
	return MIN((uint64_t)data, end);
}

/* Is this frame of a long run a hole?  Asked in ascending order; an answer covers
 * the frames after it up to `known_until`, of the same take only. */
static bool in_hole(struct capture *c, const struct vm_piece *p, uint64_t frame)
{
	uint64_t off, end;

	c->run_len = frame == c->run_end ? c->run_len + 1 : 1;
	c->run_end = frame + 1;
	if (!p->block->is_tmpfs || c->run_len < HOLE_RUN)
		return false;
	if (frame >= c->known_until) {
		off = (p->p.block_page + frame - p->p.first_frame) * c->page_size;
		end = hole_ends(p, off, c->page_size) / c->page_size * c->page_size;
		c->in_hole = end > off;
		c->known_until = frame + (c->in_hole ? (end - off) / c->page_size : HOLE_RUN);
	}
	return c->in_hole;
}

bool capture_still_hole(struct capture *c, const struct vm_piece *p, uint64_t frame)
{
	uint64_t off = (p->p.block_page + frame - p->p.first_frame) * c->page_size;

	return p->block->is_tmpfs && hole_ends(p, off, c->page_size) >= off + c->page_size;
}

/* One taken frame: into the chunk, or left for the pause. */
static void sort_frame(struct capture *c, struct chunk *k, const struct vm_piece **p,
		       uint64_t frame, bool again, bool hinted)
{
	if (!vm_piece_has_frame(*p, frame))
		*p = vm_mem_by_frame(&c->vm->mem, frame);
	if (!*p) /* unplugged: its bit means nothing any more */
		return;
	if (!again && gpaset_test(&c->seen, frame)) {
		c->nr_late += !gpaset_test(&c->late, frame);
		gpaset_add(&c->late, frame);
		return;
	}
	gpaset_add(&c->seen, frame);
	if (hinted && !capture_still_hole(c, *p, frame)) {
		vm_shm_clear_range(&c->vm->shm, &c->vm->shm.discarded, frame, 1);
		hinted = false;
	}
	if (hinted || in_hole(c, *p, frame))
		capture_chunk_add(c, k, (*p)->p.home_gfn + frame - (*p)->p.first_frame, NULL,
				  zero_page);
	else
		capture_chunk_add(c, k, (*p)->p.home_gfn + frame - (*p)->p.first_frame,
				  vm_piece_page(&c->vm->mem, *p, frame),
				  k->buf + (size_t)k->nr * c->page_size);
}

/* Take all that is dirty once; `again`: also pages that were copied before. */
static int sweep(struct capture *c, bool again, struct job *job, uint64_t *copied, struct err *e)
{
	uint64_t frames[CHUNK_PAGES], cursor = 0;
	const struct vm_piece *p = NULL;
	bool hints[CHUNK_PAGES];
	struct chunk *k;
	size_t n;
	int err;

	c->run_end = c->run_len = 0;
	*copied = 0;
	for (;;) {
		err = vm_interrupted(c->vm, job, e);
		if (!err)
			err = capture_next_chunk(c, &k, e);
		if (err)
			return err;
		if (vm_shm_take(&c->vm->shm, c->vm->mem.frames_end, &cursor, frames, CHUNK_PAGES,
				&n))
			return err_set(e, EFAULT, "the VM's shared memory is gone");
		if (!n)
			return capture_hand_on_all(c, e);
		/* A hole seen before the take may be a written page since. */
		c->known_until = 0;
		if (vm_shm_hints(&c->vm->shm, frames, n, hints))
			return err_set(e, EFAULT, "the VM's shared memory is gone");
		for (size_t i = 0; i < n; i++)
			sort_frame(c, k, &p, frames[i], again, hints[i]);
		*copied += k->nr;
		c->stats.early_pages += k->nr;
		if (job)
			job->done += k->nr;
		capture_submit_chunk(c, k, false);
	}
}

/* Pages that wait for the pause are dirty as far as this sweep is concerned. */
static int take_late_back(struct capture *c)
{
	uint64_t frames[CHUNK_PAGES], cursor = 0;
	size_t n;
	int err = 0;

	while (!err && (n = gpaset_take(&c->late, NULL, c->vm->mem.frames_end, &cursor, frames,
					CHUNK_PAGES)))
		err = vm_shm_add(&c->vm->shm, &c->vm->shm.dirty, frames, n);
	c->nr_late = 0;
	return err;
}

static int count_dirty(struct capture *c, uint64_t *ret, struct err *e)
{
	if (vm_shm_count(&c->vm->shm, c->vm->mem.frames_end, ret))
		return err_set(e, EFAULT, "the VM's shared memory is gone");
	return 0;
}

static int round_of(struct capture *c, bool again, struct job *job, uint64_t *copied, struct err *e)
{
	int err = vm_sync(c->vm, e);

	if (!err)
		err = capture_tell_gone(c, c->vm->nr_gone, e);
	c->stats.rounds++;
	return err ? err : sweep(c, again, job, copied, e);
}

/* Cold pages, until what is new in a round is little, or does not get less. */
static int cold_rounds(struct capture *c, struct job *job, struct err *e)
{
	uint64_t min = c->vm->d->config.early_min_frames, copied = 0, before = UINT64_MAX, dirty;
	int err = count_dirty(c, &dirty, e);

	while (!err && dirty > min && c->stats.rounds < EARLY_ROUNDS) {
		err = round_of(c, false, job, &copied, e);
		if (err || copied < min || copied > before - before / 4)
			break;
		before = copied;
		err = count_dirty(c, &dirty, e);
	}
	return err;
}

/* More waits than staging memory holds: copy it now, and hope that less comes back. */
static int shrink_rounds(struct capture *c, struct job *job, struct err *e)
{
	uint64_t max = c->vm->staging.max_bytes / c->page_size, dirty, copied;
	int err = count_dirty(c, &dirty, e);

	for (int i = 0; !err && dirty + c->nr_late > max && i < 4; i++) {
		if (take_late_back(c))
			return err_set(e, EFAULT, "the VM's shared memory is gone");
		err = round_of(c, true, job, &copied, e);
		if (!err)
			err = count_dirty(c, &dirty, e);
	}
	return err;
}

/* Half as much again as now, since the guest runs on until the pause. */
static int prepare_staging(struct capture *c, struct err *e)
{
	uint64_t dirty;
	int err = count_dirty(c, &dirty, e);

	if (!err)
		staging_prepare(&c->vm->staging,
				MAX((dirty + c->nr_late) * 3 / 2 * c->page_size,
				    c->last_staged_bytes + c->last_staged_bytes / 2));
	return err;
}

int capture_early(struct capture *c, struct job *job, struct err *e)
{
	uint64_t begun = now_ns(CLOCK_MONOTONIC);
	int err = capture_tell_gone(c, c->vm->nr_gone, e);

	if (!err)
		err = cold_rounds(c, job, e);
	if (!err)
		err = shrink_rounds(c, job, e);
	c->stats.hot_pages = c->nr_late;
	if (!err)
		err = prepare_staging(c, e);
	c->stats.early_ns = now_ns(CLOCK_MONOTONIC) - begun;
	return err;
}

/* ---- of a VM that is dead ---- */

int capture_dead(struct capture *c, struct err *e)
{
	uint64_t copied;
	int err = capture_tell_gone(c, c->vm->nr_gone, e);

	if (!err)
		err = sweep(c, true, NULL, &copied, e);
	if (!err)
		err = selfcheck_run(c->check, &c->late, UINT64_MAX, e);
	if (!err)
		err = vm_interrupted(c->vm, NULL, e);
	if (!err && take_late_back(c))
		err = err_set(e, EFAULT, "the VM's shared memory is gone");
	return err ? err : sweep(c, true, NULL, &copied, e);
}
