/* SPDX-License-Identifier: MIT */
/*
 * harvest: see harvest.h for the ring's protocol and the slot generations.
 *
 * The ring is shared with the kernel and, where another process has the vCPU's
 * descriptor, with that; nothing read from it is trusted, each field is read
 * once, and no call looks at more than one ring's length of entries, since a full
 * ring has every flag set.
 */
#include "snapd/harvest.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <linux/kvm.h>

#include "snapd/util/ablation.h"

static_assert(sizeof(struct kvm_dirty_gfn) == 16, "kernel ABI");

int slot_table_init(struct slot_table *t, uint32_t nr_ids)
{
	memset(t, 0, sizeof(*t));
	assert(nr_ids > 0 && nr_ids <= 0x10000);
	for (int as = 0; as < SLOT_TABLE_SPACES; as++) {
		t->gens[as] = calloc(nr_ids, sizeof(*t->gens[as]));
		if (!t->gens[as]) {
			slot_table_deinit(t);
			return -ENOMEM;
		}
	}
	t->nr_ids = nr_ids;
	t->next_generation = 1;
	return 0;
}

static void gen_free(struct slot_gen *g)
{
	if (g->runs != &g->inline_run)
		free(g->runs);
	memset(g, 0, sizeof(*g));
}

void slot_table_deinit(struct slot_table *t)
{
	for (int as = 0; as < SLOT_TABLE_SPACES; as++) {
		for (uint32_t id = 0; t->gens[as] && id < t->nr_ids; id++)
			gen_free(&t->gens[as][id]);
		free(t->gens[as]);
		t->gens[as] = NULL;
	}
}

static int gen_fill(struct slot_table *t, struct slot_gen *g, uint64_t nr_pages,
		    const struct slot_run *runs, uint32_t nr_runs)
{
	memset(g, 0, sizeof(*g));
	if (nr_runs == 1) {
		g->inline_run = runs[0];
		g->runs = &g->inline_run;
	} else if (nr_runs) {
		g->runs = malloc(nr_runs * sizeof(*runs));
		if (!g->runs)
			return -ENOMEM;
		memcpy(g->runs, runs, nr_runs * sizeof(*runs));
	}
	g->nr_runs = nr_runs;
	g->nr_pages = nr_pages;
	g->generation = t->next_generation++;
	return 0;
}

static void assert_runs_cover(uint64_t nr_pages, const struct slot_run *runs, uint32_t nr_runs)
{
	uint64_t at = 0;

	for (uint32_t i = 0; i < nr_runs; i++) {
		assert(runs[i].offset == at && runs[i].nr_frames);
		at += runs[i].nr_frames;
	}
	assert(!nr_runs || at == nr_pages);
}

int slot_table_add(struct slot_table *t, uint32_t as_id, uint64_t nr_pages,
		   const struct slot_run *runs, uint32_t nr_runs)
{
	assert(as_id < SLOT_TABLE_SPACES);
	assert_runs_cover(nr_pages, runs, nr_runs);
	for (uint32_t i = 0; i < t->nr_ids; i++) {
		uint32_t id = (t->next_id[as_id] + i) % t->nr_ids;
		int r;

		if (t->gens[as_id][id].generation)
			continue;
		r = gen_fill(t, &t->gens[as_id][id], nr_pages, runs, nr_runs);
		if (r < 0)
			return r;
		t->next_id[as_id] = (id + 1) % t->nr_ids;
		return (int)id;
	}
	return -ENOSPC;
}

void slot_table_kill(struct slot_table *t, uint32_t as_id, uint32_t id)
{
	struct slot_gen *g;

	assert(as_id < SLOT_TABLE_SPACES && id < t->nr_ids);
	g = &t->gens[as_id][id];
	assert(g->generation && !g->dead);
	if (ABLATED(ID_REUSED_AT_ONCE)) {
		gen_free(g);
		t->next_id[as_id] = id;
		return;
	}
	g->dead = true;
	g->died_at = t->pass;
	g->next_dead = t->first_dead[as_id];
	t->first_dead[as_id] = id + 1;
}

void slot_table_cancel(struct slot_table *t, uint32_t as_id, uint32_t id)
{
	assert(as_id < SLOT_TABLE_SPACES && id < t->nr_ids);
	assert(t->gens[as_id][id].generation && !t->gens[as_id][id].dead);
	gen_free(&t->gens[as_id][id]);
}

#ifdef SNAPD_ABLATION_PUBLISH_BEFORE_DRAIN
int slot_table_overwrite(struct slot_table *t, uint32_t as_id, uint32_t id, uint64_t nr_pages,
			 const struct slot_run *runs, uint32_t nr_runs)
{
	assert(as_id < SLOT_TABLE_SPACES && id < t->nr_ids);
	gen_free(&t->gens[as_id][id]);
	return gen_fill(t, &t->gens[as_id][id], nr_pages, runs, nr_runs);
}
#endif

void slot_table_pass(struct slot_table *t)
{
	for (int as = 0; as < SLOT_TABLE_SPACES; as++) {
		uint32_t link = t->first_dead[as];

		while (link) {
			struct slot_gen *g = &t->gens[as][link - 1];

			link = g->next_dead;
			gen_free(g);
		}
		t->first_dead[as] = 0;
	}
	t->pass++;
}

/* Runs cover the slot, so the last one that begins at or before `offset` has it. */
static const struct slot_run *find_run(const struct slot_gen *g, uint64_t offset)
{
	uint32_t lo = 0, hi = g->nr_runs;

	while (hi - lo > 1) {
		uint32_t mid = lo + (hi - lo) / 2;

		if (g->runs[mid].offset <= offset)
			lo = mid;
		else
			hi = mid;
	}
	return &g->runs[lo];
}

enum slot_resolve slot_table_resolve(const struct slot_table *t, uint32_t slot, uint64_t offset,
				     uint64_t *frame)
{
	uint32_t as_id = slot >> 16, id = slot & 0xffff;
	const struct slot_gen *g;
	const struct slot_run *run;

	if (ABLATED(AS_ID_IGNORED))
		as_id = 0;
	if (as_id >= SLOT_TABLE_SPACES || id >= t->nr_ids)
		return SLOT_UNRESOLVED;
	g = &t->gens[as_id][id];
	if (!g->generation || offset >= g->nr_pages)
		return SLOT_UNRESOLVED;
	if (!g->nr_runs)
		return SLOT_UNTRACKED;
	run = g->nr_runs == 1 ? g->runs : find_run(g, offset);
	*frame = run->first_frame + (offset - run->offset);
	return SLOT_RESOLVED;
}

/* Collectable: published by the kernel, and not handed back by us already.  Acquire pairs
 * with KVM's write barrier between slot, offset and flags (kvm_dirty_ring_push()). */
static bool entry_is_dirty(const struct kvm_dirty_gfn *e)
{
	uint32_t flags = __atomic_load_n(&e->flags, __ATOMIC_ACQUIRE);

	return (flags & (KVM_DIRTY_GFN_F_DIRTY | KVM_DIRTY_GFN_F_RESET)) == KVM_DIRTY_GFN_F_DIRTY;
}

size_t harvest_ring(struct harvest_ring *ring, const struct slot_table *t, uint64_t *frames,
		    size_t max, struct harvest_result *res)
{
	uint32_t seen;
	size_t n = 0;

	assert(ring->nr && !(ring->nr & (ring->nr - 1)));
	for (seen = 0; seen < ring->nr && n < max; seen++) {
		struct kvm_dirty_gfn *e = &ring->gfns[ring->next & (ring->nr - 1)];
		enum slot_resolve how;

		if (!entry_is_dirty(e))
			break;
		how = slot_table_resolve(t, __atomic_load_n(&e->slot, __ATOMIC_RELAXED),
					 __atomic_load_n(&e->offset, __ATOMIC_RELAXED), &frames[n]);
		/* Release: KVM may fill the entry anew once it sees this, so slot and offset
		 * were read by then (its load-acquire: kvm_dirty_gfn_harvested()). */
		__atomic_store_n(&e->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
		ring->next++;
		n += how == SLOT_RESOLVED;
		res->unresolved += how == SLOT_UNRESOLVED;
	}
	res->collected += seen;
	res->resolved += n;
	return n;
}

static struct kvm_dirty_gfn *entry_at(const struct harvest_ring *ring, uint32_t index)
{
	return &ring->gfns[index & (ring->nr - 1)];
}

/* How many empty entries KVM has left behind `next`; `nr`: it has pushed none since.  It may be
 * pushing now, in order: so what is before the first that was found is looked at again. */
static uint32_t gap_length(const struct harvest_ring *ring)
{
	uint32_t gap = 0;

	while (gap < ring->nr && !entry_is_dirty(entry_at(ring, ring->next + gap)))
		gap++;
	while (gap < ring->nr && gap && entry_is_dirty(entry_at(ring, ring->next + gap - 1)))
		gap--;
	return gap;
}

void harvest_ahead(struct harvest_ring *ring)
{
	ring->ahead = true;
	ring->ahead_until = ring->next + ring->nr;
}

/* What KVM left empty is handed back, as if it had been collected. */
static void skip_gap(struct harvest_ring *ring, struct harvest_result *res)
{
	uint32_t gap = gap_length(ring);

	if (!gap || gap == ring->nr)
		return;
	for (uint32_t i = 0; i < gap; i++)
		__atomic_store_n(&entry_at(ring, ring->next + i)->flags, KVM_DIRTY_GFN_F_RESET,
				 __ATOMIC_RELEASE);
	ring->next += gap;
	res->collected += gap;
}

bool harvest_overrun(struct harvest_ring *ring, struct harvest_result *res)
{
	bool lost = entry_is_dirty(entry_at(ring, ring->next + ring->nr - 1));

	if (lost)
		harvest_ahead(ring);
	if (ring->ahead && !entry_is_dirty(entry_at(ring, ring->next)))
		skip_gap(ring, res);
	/* There may be a gap before the last one; and none, if it was just full. */
	if ((int32_t)(ring->next - ring->ahead_until) > 0)
		ring->ahead = false;
	return lost;
}

bool harvest_remark(struct harvest_ring *ring, uint32_t from)
{
	bool found = false;

	for (; from != ring->next; from++) {
		if (!entry_is_dirty(entry_at(ring, from)))
			continue;
		__atomic_store_n(&entry_at(ring, from)->flags, KVM_DIRTY_GFN_F_RESET,
				 __ATOMIC_RELEASE);
		found = true;
	}
	if (found)
		harvest_ahead(ring);
	return found;
}

/* The kernel fills entries in order, so the dirty ones are a prefix: a binary
 * search finds its end, and the common question "half full?" costs one load. */
uint32_t harvest_ready(const struct harvest_ring *ring, uint32_t max)
{
	uint32_t lo = 0, hi = max < ring->nr ? max : ring->nr;

	if (hi && entry_is_dirty(&ring->gfns[(ring->next + hi - 1) & (ring->nr - 1)]))
		return hi;
	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2;

		if (entry_is_dirty(&ring->gfns[(ring->next + mid) & (ring->nr - 1)]))
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}
