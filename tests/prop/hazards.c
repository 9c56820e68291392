/* SPDX-License-Identifier: MIT */
/*
 * Every way a page gets dirty, in random order, against its content.
 *
 * A VM on the simulated KVM, with two address spaces, small rings and backup bitmaps;
 * one thread does everything, so that a seed replays a run exactly (checked by a hash
 * over all that was reported).  Steps: memslots come and go in both address spaces, as
 * aliases, at other GPAs, under reused ids; a DIMM is unplugged for good, or another
 * file takes its GPA; vCPUs write through either address space, into holes, or until
 * rings are full; KVM writes without a vCPU; the VMM writes, and marks by GPA or by
 * file; a device logs as vhost does; memory is discarded, or said to be; consumers come
 * and go; the service reconnects, copies early, takes epochs, rolls back.
 *
 * Oracle: what the service and each consumer copied because a set told so, by store
 * key, equals memory; no page has two keys and no key two pages; what is gone has no
 * bits.  How much was reported in vain is counted.
 *
 *   hazards [EPOCHS]      a campaign, and a short one twice: the same twice
 *   hazards --ablate      each guard taken away in turn has to be noticed
 */
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "snapd/util/ablation.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/rand.h"
#include "tests/lib/sim_vm.h"
#include "tests/prop/images.h"

#define PAGE	    FAKE_PAGE
#define LOG_PAGE    4096u /* of a device's log, whatever the host's is */
#define LOW_PAGES   16u
#define CHUNK_PAGES 32u
#define CHUNKS	    8u
#define MAIN_PAGES  (CHUNKS * CHUNK_PAGES)
#define SMRAM_PAGES 16u
#define DIMM_PAGES  32u
#define MAIN_GPA    0x100000ull /* chunk 0's is SMRAM's in address space 1 */
#define WINDOW	    0x10000000ull
#define DIMM_GPA    0x20000000ull
#define GPA_END	    0x30000000ull
#define RING	    (PAGE <= 4096 ? 256u : (uint32_t)(PAGE / 16)) /* entries: a page at least */
#define VCPUS	    2u
#define CONSUMERS   3u
#define MAX_SLOTS   40u
#define LOW_SLOT    100u /* and above: not in the lottery of ids */

enum mem_id { LOW, MAIN, SMRAM, DIMM0, DIMM1, NR_MEMS };

struct mem {
	int fd; /* -1: not there */
	uint8_t *hva;
	uint64_t pages;
	bool in_saved; /* was there at the saved snapshot */
};

struct consumer {
	struct snapd_consumer *c; /* NULL: none */
	struct image im;
};

struct campaign {
	struct sim_vm vm;
	struct fake_service s;
	struct rand r;
	struct mem mem[NR_MEMS];
	struct snapd_memslot slots[MAX_SLOTS];
	uint32_t nr_slots;
	struct snapd_devlog *log;
	struct snapd_devlog_mem log_mem;
	struct live_pieces live;
	struct image kept;
	struct consumer consumers[CONSUMERS];
	/* a snapshot to go back to */
	struct image saved;
	struct snapd_memslot saved_slots[MAX_SLOTS];
	uint32_t nr_saved_slots;
	int saved_state; /* -1: none */
	uint64_t saved_len;
	uint64_t counter; /* value of the last write */
	uint64_t hash;	  /* over all that was reported */
	uint64_t epochs, reported, changed, rollbacks, reconnects, discards, checks;
};

#ifdef SNAPD_ABLATIONS
enum ablation snapd_ablation;
#endif

static void trace(struct campaign *c, uint64_t v)
{
	c->hash = (c->hash ^ v) * 0x100000001b3ull;
}

static uint64_t below(struct campaign *c, uint64_t n)
{
	return rand_below(&c->r, n);
}

/* ---- memory and slots ---- */

static void mem_create(struct campaign *c, enum mem_id id, uint64_t pages)
{
	struct mem *m = &c->mem[id];

	*m = (struct mem){.fd = memfd_create("hazards", MFD_CLOEXEC), .pages = pages};
	check(m->fd >= 0 && !ftruncate(m->fd, (off_t)(pages * PAGE)), "memory");
	m->hva = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
	check(m->hva != MAP_FAILED, "memory");
}

static void mem_destroy(struct mem *m)
{
	if (m->fd < 0)
		return;
	munmap(m->hva, m->pages * PAGE);
	close(m->fd);
	m->fd = -1;
}

static enum mem_id mem_of(const struct campaign *c, const struct snapd_memslot *s)
{
	uintptr_t at = (uintptr_t)s->hva;

	for (enum mem_id i = 0; i < NR_MEMS; i++)
		if (c->mem[i].fd >= 0 && at - (uintptr_t)c->mem[i].hva < c->mem[i].pages * PAGE)
			return i;
	check(false, "a slot of no memory");
}

static bool slot_fits(const struct campaign *c, const struct snapd_memslot *n)
{
	for (uint32_t i = 0; i < c->nr_slots; i++) {
		const struct snapd_memslot *o = &c->slots[i];

		if (o->as_id == n->as_id &&
		    (o->slot == n->slot ||
		     (o->gpa < n->gpa + n->size_bytes && n->gpa < o->gpa + o->size_bytes)))
			return false;
	}
	return c->nr_slots < MAX_SLOTS;
}

/* Show [first, first + n) of a memory; nothing happens where something is in the way. */
static void slot_add(struct campaign *c, uint32_t id, uint32_t as_id, uint64_t gpa, enum mem_id mem,
		     uint64_t first, uint64_t n)
{
	const struct mem *m = &c->mem[mem];
	struct snapd_memslot s = {.slot = id,
				  .as_id = (uint16_t)as_id,
				  .gpa = gpa,
				  .size_bytes = n * PAGE,
				  .hva = m->hva + first * PAGE,
				  .fd = m->fd,
				  .fd_offset = first * PAGE};

	if (m->fd < 0 || !slot_fits(c, &s))
		return;
	check(!snapd_vm_memslot(c->vm.agent, &s), "%s", snapd_vm_error(NULL));
	c->slots[c->nr_slots++] = s;
}

static void slot_delete(struct campaign *c, uint32_t i, uint32_t flags)
{
	struct snapd_memslot s = {.slot = c->slots[i].slot,
				  .as_id = c->slots[i].as_id,
				  .flags = (uint16_t)flags,
				  .fd = -1};

	check(!snapd_vm_memslot(c->vm.agent, &s), "%s", snapd_vm_error(NULL));
	c->slots[i] = c->slots[--c->nr_slots];
}

static void op_slot_add(struct campaign *c)
{
	uint32_t as_id = (uint32_t)below(c, 2), id = (uint32_t)below(c, 12);
	uint64_t first = below(c, CHUNKS), n = 1 + below(c, CHUNKS - first);
	uint64_t gpa = MAIN_GPA + first * CHUNK_PAGES * PAGE + (below(c, 3) ? 0 : WINDOW);

	slot_add(c, id, as_id, gpa, MAIN, first * CHUNK_PAGES, n * CHUNK_PAGES);
}

static void op_slot_delete(struct campaign *c)
{
	uint32_t i = (uint32_t)below(c, c->nr_slots);

	if (c->slots[i].slot != LOW_SLOT)
		slot_delete(c, i, 0);
}

/* Only address space 1 has SMRAM, where the other may have something else. */
static void op_smram(struct campaign *c)
{
	slot_add(c, 20, 1, MAIN_GPA, SMRAM, 0, SMRAM_PAGES);
}

static void forget_saved(struct campaign *c)
{
	if (c->saved_state >= 0)
		close(c->saved_state);
	c->saved_state = -1;
}

/* All of it must be seen when it goes, or it would not be all of it. */
static void dimm_unplug(struct campaign *c, enum mem_id dimm)
{
	for (uint32_t i = 0; i < c->nr_slots;) {
		if (mem_of(c, &c->slots[i]) == dimm || c->slots[i].gpa == DIMM_GPA)
			slot_delete(c, i, 0);
		else
			i++;
	}
	slot_add(c, 30, 0, DIMM_GPA, dimm, 0, DIMM_PAGES);
	slot_delete(c, c->nr_slots - 1, SNAPD_SLOT_GONE);
	mem_destroy(&c->mem[dimm]);
	if (c->mem[dimm].in_saved)
		forget_saved(c);
}

/* Plug in, show through the other address space too, hide, unplug. */
static void op_dimm(struct campaign *c)
{
	enum mem_id dimm = below(c, 2) ? DIMM0 : DIMM1;

	if (c->mem[dimm].fd < 0)
		mem_create(c, dimm, DIMM_PAGES);
	else if (below(c, 4) == 0)
		dimm_unplug(c, dimm);
	slot_add(c, 30 + (uint32_t)dimm, (uint32_t)below(c, 2), DIMM_GPA, dimm, 0, DIMM_PAGES);
}

/* ---- writers ---- */

static const struct snapd_memslot *slot_seen(const struct campaign *c, uint32_t as_id, uint64_t gpa)
{
	for (uint32_t i = 0; i < c->nr_slots; i++)
		if (c->slots[i].as_id == as_id && gpa - c->slots[i].gpa < c->slots[i].size_bytes)
			return &c->slots[i];
	return NULL;
}

static uint64_t *word_at(const struct snapd_memslot *s, uint64_t gpa)
{
	return (uint64_t *)((uint8_t *)s->hva + (gpa - s->gpa));
}

/* A place to write at: mostly memory, at times a hole. */
static uint64_t any_gpa(struct campaign *c, uint32_t *as_id)
{
	const struct snapd_memslot *s = &c->slots[below(c, c->nr_slots)];

	*as_id = s->as_id;
	if (below(c, 10))
		return s->gpa + below(c, s->size_bytes / 8) * 8;
	*as_id = 0;
	return MAIN_GPA + (below(c, 2) ? WINDOW : 0) + below(c, MAIN_PAGES) * PAGE;
}

/* On the vCPU's thread, while everything else waits for it: the VMM does it. */
static void on_hole(struct sim_vm *vm, const struct sim_store *st)
{
	struct campaign *c = vm->config.opaque;
	uint64_t at = (st->gpa - MAIN_GPA) % WINDOW;

	if (st->as_id || at >= MAIN_PAGES * PAGE)
		return; /* there is nothing behind it */
	memcpy(c->mem[MAIN].hva + at, &st->value, 8);
	check(!snapd_vm_mark_file_dirty(vm->agent, c->mem[MAIN].fd, at, 8), "mark");
}

/* Both vCPUs, one after the other; at times more pages than a ring holds. */
static void op_vcpus(struct campaign *c)
{
	static struct sim_store stores[2 * RING];
	uint32_t i = (uint32_t)below(c, VCPUS), n = 1 + (uint32_t)below(c, 30);

	if (below(c, 60) == 0)
		n = ARRAY_SIZE(stores);
	for (uint32_t k = 0; k < n; k++) {
		stores[k].gpa = any_gpa(c, &stores[k].as_id);
		stores[k].value = ++c->counter;
	}
	sim_vm_run(&c->vm, i, stores, n);
}

/* KVM by itself, as for an interrupt controller's tables. */
static void op_no_vcpu(struct campaign *c)
{
	uint32_t as_id;
	uint64_t gpa = any_gpa(c, &as_id);

	if (slot_seen(c, as_id, gpa))
		check(!simkvm_write(c->vm.sim, as_id, gpa, ++c->counter), "write");
}

/* The VMM writes; what it marks by. */
static void host_write(struct campaign *c, bool by_file)
{
	uint32_t as_id;
	uint64_t gpa = any_gpa(c, &as_id);
	const struct snapd_memslot *s = slot_seen(c, as_id, gpa);

	if (!s)
		return;
	*word_at(s, gpa) = ++c->counter;
	if (by_file || s->as_id)
		check(!snapd_vm_mark_file_dirty(c->vm.agent, s->fd, s->fd_offset + gpa - s->gpa, 8),
		      "mark");
	else
		check(!snapd_vm_mark_dirty(c->vm.agent, gpa, 8), "mark");
}

static void op_mark(struct campaign *c)
{
	host_write(c, below(c, 2));
}

/* What a vhost worker does: data, then the bit. */
static void device_write(struct campaign *c)
{
	uint32_t as_id;
	uint64_t gpa = any_gpa(c, &as_id);
	const struct snapd_memslot *s = slot_seen(c, 0, gpa);

	if (!s)
		return;
	*word_at(s, gpa) = ++c->counter;
	__atomic_fetch_or((uint8_t *)c->log_mem.base + gpa / LOG_PAGE / 8,
			  (uint8_t)(1u << gpa / LOG_PAGE % 8), __ATOMIC_SEQ_CST);
}

static void op_device(struct campaign *c)
{
	for (uint64_t n = 1 + below(c, 4); n; n--)
		device_write(c);
}

static void op_discard(struct campaign *c)
{
	enum mem_id id = below(c, NR_MEMS);
	const struct mem *m = &c->mem[id];
	uint64_t first, n;

	if (m->fd < 0)
		return;
	first = below(c, m->pages);
	n = 1 + below(c, MIN(m->pages - first, 8ull));
	switch (below(c, 3)) {
	case 0:
		check(!fallocate(m->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				 (off_t)(first * PAGE), (off_t)(n * PAGE)),
		      "fallocate");
		break;
	case 1:
		check(!madvise(m->hva + first * PAGE, n * PAGE, MADV_REMOVE), "MADV_REMOVE");
		break;
	case 2: /* frees nothing of a shared file: the bytes stay */
		check(!madvise(m->hva + first * PAGE, n * PAGE, MADV_DONTNEED), "MADV_DONTNEED");
		break;
	}
	check(!snapd_vm_discarded(c->vm.agent, m->fd, first * PAGE, n * PAGE), "discard");
	c->discards++;
}

/* ---- the service ---- */

/* Copy what is dirty, at most `max` frames. */
static void copy_dirty(struct campaign *c, uint64_t max)
{
	uint64_t frames[64], cursor = 0;
	size_t n;

	image_fit(&c->kept, &c->live);
	while (max && (n = gpaset_take(&c->s.dirty, NULL, c->s.shm->nr_frames, &cursor, frames,
				       MIN(max, ARRAY_SIZE(frames))))) {
		for (size_t i = 0; i < n; i++) {
			const struct live_piece *p = live_by_frame(&c->live, frames[i]);
			uint64_t skip;

			if (!p)
				missed("a bit of no piece");
			skip = frames[i] - p->p.first_frame;
			c->changed +=
				image_copy(&c->kept, p->p.home_gfn + skip, p->map + skip * PAGE);
			trace(c, p->p.home_gfn + skip);
		}
		c->reported += n;
		max -= n;
	}
}

static void op_early(struct campaign *c)
{
	fake_sync(&c->s);
	live_update(&c->live, &c->s);
	copy_dirty(c, 1 + below(c, 100));
}

/* A device finishes what it had begun. */
static int on_quiesce(void *opaque)
{
	device_write(opaque);
	return 0;
}

/* And saving its state writes memory, by itself and through KVM. */
static int on_save(void *opaque, struct snapd_state_writer *w)
{
	op_no_vcpu(opaque);
	host_write(opaque, true);
	return 0;
}

static int on_load(void *opaque, const struct snapd_state_reader *r)
{
	op_no_vcpu(opaque);
	return 0;
}

static void on_layout(void *opaque, const struct snapd_memslot *slots, size_t nr)
{
	struct campaign *c = opaque;

	check(nr <= MAX_SLOTS, "%zu slots", nr);
	c->nr_slots = (uint32_t)nr;
	for (size_t i = 0; i < nr; i++) {
		c->slots[i] = slots[i];
		c->slots[i].fd = c->mem[mem_of(c, &slots[i])].fd;
	}
}

static void save(struct campaign *c, int state, uint64_t len)
{
	forget_saved(c);
	c->saved_state = state;
	c->saved_len = len;
	image_clone(&c->saved, &c->kept);
	memcpy(c->saved_slots, c->slots, sizeof(c->slots));
	c->nr_saved_slots = c->nr_slots;
	for (enum mem_id i = 0; i < NR_MEMS; i++)
		c->mem[i].in_saved = c->mem[i].fd >= 0;
}

static void op_epoch(struct campaign *c)
{
	int state = fake_pause(&c->s, 0);
	uint64_t len = c->s.in.paused.state_bytes;

	live_update(&c->live, &c->s);
	copy_dirty(c, UINT64_MAX);
	image_check(&c->kept, &c->live, "snapshot");
	if (below(c, 8) == 0)
		save(c, state, len);
	else
		close(state);
	fake_resume(&c->s);
	c->epochs++;
	trace(c, c->reported);
}

static bool saved_is_whole(const struct campaign *c)
{
	for (uint32_t i = 0; i < c->saved.nr; i++)
		if (!live_page(&c->live, c->saved.part[i].home_gfn))
			return false;
	return c->saved_state >= 0;
}

static void check_slots(const struct campaign *c)
{
	uint32_t found = 0;

	for (uint32_t i = 0; i < c->nr_saved_slots; i++) {
		const struct snapd_memslot *s =
			slot_seen(c, c->saved_slots[i].as_id, c->saved_slots[i].gpa);

		found += s && s->slot == c->saved_slots[i].slot &&
			 s->size_bytes == c->saved_slots[i].size_bytes &&
			 s->hva == c->saved_slots[i].hva;
	}
	if (found != c->nr_slots || c->nr_slots != c->nr_saved_slots)
		missed("a rollback brought other memslots");
}

static void op_rollback(struct campaign *c)
{
	fake_sync(&c->s);
	live_update(&c->live, &c->s);
	if (!saved_is_whole(c))
		return;
	fake_pause(&c->s, SNAPD_PAUSE_NO_STATE);
	live_update(&c->live, &c->s);
	fake_rewrite(&c->s, (struct snapd_point){1, 1});
	image_write(&c->saved, &c->live);
	gpaset_clear(&c->s.dirty, c->s.shm->nr_frames);
	fake_load(&c->s, c->saved_state, c->saved_len);
	live_update(&c->live, &c->s);
	image_clone(&c->kept, &c->saved);
	for (enum mem_id i = DIMM0; i <= DIMM1; i++) /* plugged since: given up */
		if (!c->mem[i].in_saved)
			mem_destroy(&c->mem[i]);
	check_slots(c);
	fake_resume(&c->s);
	c->rollbacks++;
}

/* The sets and what was copied survive; who is told what does not. */
static void op_reconnect(struct campaign *c)
{
	fake_close(&c->s);
	fake_open_on(c->vm.listen_fd, &c->s);
	live_reconnected(&c->live);
	live_update(&c->live, &c->s);
	live_settle(&c->live);
	c->reconnects++;
}

/* ---- consumers ---- */

static void consumer_check(struct campaign *c, struct consumer *k)
{
	uint64_t gfns[64];
	int again = 0;
	long n;

	/* Whatever the agent has, the service is told: so the pieces are known. */
	fake_sync(&c->s);
	live_update(&c->live, &c->s);
	image_fit(&k->im, &c->live);
	/* The backup bitmaps are read in a pause only; the service's set keeps its bits. */
	close(fake_pause(&c->s, 0));
	while ((n = snapd_consumer_take(k->c, gfns, ARRAY_SIZE(gfns), again)) > 0) {
		again = 1;
		for (long i = 0; i < n; i++)
			if (live_page(&c->live, gfns[i]))
				image_copy(&k->im, gfns[i], live_page(&c->live, gfns[i]));
	}
	check(n == 0, "take: %ld", n);
	image_check(&k->im, &c->live, "consumer");
	fake_resume(&c->s);
	c->checks++;
}

static void op_consumer(struct campaign *c)
{
	struct consumer *k = &c->consumers[below(c, CONSUMERS)];

	if (!k->c) {
		check(!snapd_consumer_create(c->vm.agent, "one", &k->c), "%s",
		      snapd_vm_error(NULL));
	} else if (below(c, 4) == 0) {
		snapd_consumer_destroy(k->c);
		image_deinit(&k->im);
		k->c = NULL;
		return;
	}
	consumer_check(c, k);
}

/* ---- the campaign ---- */

static const struct {
	void (*fn)(struct campaign *c);
	uint32_t weight;
} ops[] = {
	{op_slot_add, 30}, {op_slot_delete, 18}, {op_smram, 4},	 {op_dimm, 10},
	{op_vcpus, 30},	   {op_no_vcpu, 15},	 {op_mark, 15},	 {op_device, 20},
	{op_discard, 12},  {op_early, 8},	 {op_epoch, 30}, {op_rollback, 3},
	{op_reconnect, 1}, {op_consumer, 6},
};

static void step(struct campaign *c)
{
	uint32_t total = 0, i;
	uint64_t at;

	for (i = 0; i < ARRAY_SIZE(ops); i++)
		total += ops[i].weight;
	at = below(c, total);
	for (i = 0; at >= ops[i].weight; i++)
		at -= ops[i].weight;
	trace(c, i);
	ops[i].fn(c);
}

static const struct snapd_vm_callbacks callbacks = {
	.quiesce = on_quiesce, .save = on_save, .load = on_load, .layout = on_layout};

static void campaign_open(struct campaign *c, uint64_t seed)
{
	const struct sim_vm_config config = {
		.nr_vcpus = VCPUS,
		.ring_entries = RING,
		.harvest_us = 60000000, /* the harvest thread sleeps: who needs it, does it */
		.backup_bitmap = true,
		.callbacks = &callbacks,
		.opaque = c,
		.mmio = on_hole,
	};

	memset(c, 0, sizeof(*c));
	c->r = rand_of(seed);
	c->saved_state = c->mem[DIMM0].fd = c->mem[DIMM1].fd = -1;
	sim_vm_create(&c->vm, &config);
	mem_create(c, LOW, LOW_PAGES);
	mem_create(c, MAIN, MAIN_PAGES);
	mem_create(c, SMRAM, SMRAM_PAGES);
	slot_add(c, LOW_SLOT, 0, 0, LOW, 0, LOW_PAGES);
	slot_add(c, LOW_SLOT, 1, 0, LOW, 0, LOW_PAGES);
	if (below(c, 2)) /* one piece for all, or one a slot */
		slot_add(c, 0, (uint32_t)below(c, 2), MAIN_GPA, MAIN, 0, MAIN_PAGES);
	check(!snapd_devlog_create(c->vm.agent, GPA_END, &c->log, &c->log_mem), "%s",
	      snapd_vm_error(NULL));
	fake_open_on(c->vm.listen_fd, &c->s);
	live_update(&c->live, &c->s);
}

static void campaign_close(struct campaign *c)
{
	struct snapd_vm_stats st;

	snapd_vm_get_stats(c->vm.agent, &st);
	check(!st.unresolved, "%llu unresolved", (unsigned long long)st.unresolved);
	snapd_devlog_destroy(c->log);
	fake_close(&c->s);
	sim_vm_destroy(&c->vm);
	live_deinit(&c->live);
	image_deinit(&c->kept);
	image_deinit(&c->saved);
	for (uint32_t i = 0; i < CONSUMERS; i++)
		image_deinit(&c->consumers[i].im);
	for (enum mem_id i = 0; i < NR_MEMS; i++)
		mem_destroy(&c->mem[i]);
	forget_saved(c);
}

/* The hash. */
static uint64_t run(uint64_t seed, uint64_t epochs, bool quiet)
{
	static struct campaign c;

	campaign_open(&c, seed);
	while (c.epochs < epochs)
		step(&c);
	if (!quiet) {
		struct snapd_vm_stats st;

		snapd_vm_get_stats(c.vm.agent, &st);
		printf("%llu epochs, %llu rollbacks, %llu reconnects, %llu slot changes, %llu "
		       "discards, %llu consumer checks, %llu rings full\n",
		       (unsigned long long)c.epochs, (unsigned long long)c.rollbacks,
		       (unsigned long long)c.reconnects, (unsigned long long)st.slot_changes,
		       (unsigned long long)c.discards, (unsigned long long)c.checks,
		       (unsigned long long)st.ring_full);
		printf("missed 0; reported %llu, changed %llu: over-reported by %.3f\n",
		       (unsigned long long)c.reported, (unsigned long long)c.changed,
		       (double)c.reported / (double)MAX(c.changed, 1ull));
		check(epochs < 1000 || (st.ring_full && c.rollbacks && c.reconnects && c.checks),
		      "the campaign did not get everywhere");
	}
	campaign_close(&c);
	return c.hash;
}

#ifdef SNAPD_ABLATIONS
static int ablate(uint64_t seed)
{
	/* LOG_NOT_EXCHANGED needs threads: tests/unit/devlog.c. */
	static const enum ablation which[] = {
		ABLATION_AS_ID_IGNORED,		ABLATION_ID_REUSED_AT_ONCE,
		ABLATION_ALIAS_IS_ANOTHER_PAGE, ABLATION_GONE_KEEPS_BITS,
		ABLATION_BACKUP_BEFORE_STATE,	ABLATION_BACKUP_GOES_WITH_SLOT,
		ABLATION_LOG_BEFORE_QUIESCE,	ABLATION_LOG_AFTER_SLOT_CHANGE,
		ABLATION_CONSUMERS_SHARE,	ABLATION_NEWCOMER_CLEAN,
		ABLATION_DISCARD_UNTOLD,
	};
	int unseen = 0, status;

	for (size_t i = 0; i < ARRAY_SIZE(which); i++) {
		pid_t pid;

		printf("guard %d away: ", which[i]);
		fflush(stdout);
		pid = fork();
		if (!pid) {
			snapd_ablation = which[i];
			run(seed, 30000, true);
			printf("not noticed\n");
			exit(0);
		}
		check(pid > 0 && waitpid(pid, &status, 0) == pid, "fork");
		unseen += !WIFEXITED(status) || WEXITSTATUS(status) != EXIT_MISSED;
	}
	return unseen ? 1 : 0;
}
#endif

int main(int argc, char **argv)
{
	uint64_t seed = rand_seed(), epochs = argc > 1 ? strtoull(argv[1], NULL, 0) : 3000;
	uint64_t first;

#ifdef SNAPD_ABLATIONS
	return ablate(seed);
#endif
	first = run(seed ^ 1, 100, true);
	check(run(seed ^ 1, 100, true) == first, "a seed does not replay a run");
	run(seed, epochs, false);
	printf("ok\n");
	return 0;
}
