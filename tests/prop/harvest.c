/* SPDX-License-Identifier: MIT */
/*
 * harvest against a model of the kernel's ring and of slot lives.
 *
 *   model     slots come and go under random kernel ids while a scripted kernel
 *             pushes entries, at times full, RESETs in part, wraps; each entry
 *             must give the frame that was meant when it was pushed, whatever
 *             happened to its slot since, and ids come back only after a pass
 *   overrun   a kernel that looks for room only now and then, and writes over entries, collected
 *             or not: that is always found out when it stands still; nothing is handed back
 *             that was not pushed; and kernel and harvest agree again with its next entry
 *   hostile   rings of random bytes: no entry is marked that was not DIRTY, none
 *             is looked at twice, the loop ends, frames stay within slots
 */
#include "snapd/harvest.h"

#include <errno.h>
#include <string.h>

#include <linux/kvm.h>

#include "tests/lib/rand.h"

#define RING  256u
#define IDS   24u
#define FETCH 64u

struct life {
	int id; /* -1: none */
	uint32_t as_id;
	uint64_t nr_pages;
	uint32_t nr_runs;
	struct slot_run runs[4];
};

struct kernel_ring {
	struct kvm_dirty_gfn gfns[RING];
	uint64_t meant[RING]; /* frame of the entry; ~0: untracked */
	uint32_t push, reset;
};

static struct life lives[IDS];

static void life_make(struct life *l, struct rand *r)
{
	static uint64_t next_frame;
	uint64_t at = 0;

	l->as_id = (uint32_t)rand_below(r, 2);
	l->nr_runs = (uint32_t)rand_below(r, 5);
	for (uint32_t i = 0; i < l->nr_runs; i++) {
		l->runs[i] = (struct slot_run){at, 1 + rand_below(r, 100), next_frame};
		at += l->runs[i].nr_frames;
		next_frame += l->runs[i].nr_frames + rand_below(r, 10);
	}
	l->nr_pages = l->nr_runs ? at : 1 + rand_below(r, 100);
}

static uint64_t life_frame(const struct life *l, uint64_t offset)
{
	for (uint32_t i = 0; i < l->nr_runs; i++)
		if (offset < l->runs[i].offset + l->runs[i].nr_frames)
			return l->runs[i].first_frame + offset - l->runs[i].offset;
	return ~0ull;
}

static void kernel_push(struct kernel_ring *k, struct rand *r)
{
	const struct life *l = &lives[rand_below(r, IDS)];
	uint32_t at = k->push % RING;
	uint64_t offset;

	if (l->id < 0 || k->push - k->reset == RING)
		return;
	offset = rand_below(r, l->nr_pages);
	k->gfns[at].slot = l->as_id << 16 | (uint32_t)l->id;
	k->gfns[at].offset = offset;
	k->meant[at] = life_frame(l, offset);
	CHECK(k->gfns[at].flags == 0);
	__atomic_store_n(&k->gfns[at].flags, KVM_DIRTY_GFN_F_DIRTY, __ATOMIC_RELEASE);
	k->push++;
}

/* As KVM_RESET_DIRTY_RINGS; gives back at most `max`, as if a signal came. */
static uint32_t kernel_reset(struct kernel_ring *k, uint32_t max)
{
	uint32_t n = 0;

	while (n < max && k->reset != k->push &&
	       k->gfns[k->reset % RING].flags & KVM_DIRTY_GFN_F_RESET) {
		k->gfns[k->reset++ % RING].flags = 0;
		n++;
	}
	return n;
}

static uint64_t harvest_and_check(struct kernel_ring *k, struct harvest_ring *ring,
				  const struct slot_table *t, size_t max)
{
	uint64_t frames[FETCH];
	struct harvest_result res = {0};
	uint32_t from = ring->next;
	size_t n = harvest_ring(ring, t, frames, max, &res), seen = 0;

	CHECK(n <= max && n == res.resolved && res.unresolved == 0);
	CHECK(ring->next - from == res.collected);
	for (; from != ring->next; from++)
		if (k->meant[from % RING] != ~0ull)
			CHECK(frames[seen++] == k->meant[from % RING]);
	CHECK(seen == n);
	return res.collected;
}

static void churn(struct slot_table *t, struct rand *r)
{
	struct life *l = &lives[rand_below(r, IDS)];

	if (l->id >= 0) {
		slot_table_kill(t, l->as_id, (uint32_t)l->id);
		l->id = -1;
		return;
	}
	life_make(l, r);
	l->id = slot_table_add(t, l->as_id, l->nr_pages, l->runs, l->nr_runs);
	CHECK(l->id >= 0 || l->id == -ENOSPC);
	if (l->id < 0) {
		l->id = -1;
	} else if (rand_below(r, 10) == 0) {
		slot_table_cancel(t, l->as_id, (uint32_t)l->id);
		l->id = -1;
	}
}

static void drain(struct kernel_ring *k, struct harvest_ring *ring, struct slot_table *t,
		  struct rand *r)
{
	while (ring->next != k->push)
		harvest_and_check(k, ring, t, FETCH);
	while (ring->next != k->reset)
		kernel_reset(k, 1 + (uint32_t)rand_below(r, RING));
	slot_table_pass(t);
}

static void test_model(struct rand *r)
{
	static struct kernel_ring k;
	struct harvest_ring ring = {.gfns = k.gfns, .nr = RING};
	struct slot_table t;

	/* start near the end of the free-running index */
	k.push = k.reset = ring.next = -(uint32_t)rand_below(r, 4 * RING);
	CHECK(!slot_table_init(&t, IDS));
	for (uint32_t i = 0; i < IDS; i++)
		lives[i].id = -1;
	for (int step = 0; step < 300000; step++) {
		CHECK(harvest_ready(&ring, RING) == k.push - ring.next);
		CHECK(harvest_ready(&ring, 7) == (k.push - ring.next < 7 ? k.push - ring.next : 7));
		switch (rand_below(r, 40)) {
		case 0:
			drain(&k, &ring, &t, r);
			break;
		case 1:
			churn(&t, r);
			break;
		case 2 ... 3:
			harvest_and_check(&k, &ring, &t, rand_below(r, FETCH + 1));
			break;
		case 4:
			kernel_reset(&k, (uint32_t)rand_below(r, RING));
			break;
		default:
			kernel_push(&k, r);
		}
	}
	slot_table_deinit(&t);
}

/* As KVM: no look at what it writes over, nor at how much it gives back. */
static void rude_push(struct kernel_ring *k, bool *lost)
{
	struct kvm_dirty_gfn *g = &k->gfns[k->push++ % RING];

	*lost |= (g->flags & 3) == KVM_DIRTY_GFN_F_DIRTY;
	g->flags = KVM_DIRTY_GFN_F_DIRTY;
}

static uint32_t rude_reset(struct kernel_ring *k)
{
	uint32_t n = 0;

	for (; k->gfns[k->reset % RING].flags & KVM_DIRTY_GFN_F_RESET; n++)
		k->gfns[k->reset++ % RING].flags = 0;
	CHECK((int32_t)(k->push - k->reset) >= 0);
	return n;
}

/* A round of the agent's; the kernel may push until its ring is full and somewhat beyond. */
static void overrun_round(struct kernel_ring *k, struct harvest_ring *ring,
			  const struct slot_table *t, struct rand *r, bool stopped, bool *lost,
			  bool *told)
{
	uint32_t from = ring->next, done = 0;
	struct harvest_result res = {0};
	uint64_t frames[RING];

	*told |= harvest_overrun(ring, &res);
	harvest_ring(ring, t, frames, 1 + rand_below(r, RING), &res);
	if (!stopped && k->push - k->reset < RING - 16)
		for (uint64_t i = rand_below(r, 100); i > 0; i--)
			rude_push(k, lost);
	for (int i = 0; done < res.collected; i++) {
		CHECK(i < 10);
		done += rude_reset(k);
		if (done < res.collected)
			*told |= harvest_remark(ring, from);
	}
}

static void test_overrun(struct rand *r)
{
	static struct kernel_ring k;
	struct harvest_ring ring = {.gfns = k.gfns, .nr = RING};
	const struct slot_run run = {0, 1, 0};
	struct slot_table t;
	uint64_t overruns = 0;

	CHECK(!slot_table_init(&t, IDS) && slot_table_add(&t, 0, 1, &run, 1) == 0);
	memset(&k, 0, sizeof(k));
	for (int life = 0; life < 3000; life++) {
		bool lost = false, told = false;

		for (uint64_t steps = rand_below(r, 20); steps > 0; steps--) {
			uint32_t used = k.push - k.reset;
			uint32_t room = used < RING - 16 ? RING - 16 - used + 80 : 0;

			for (uint64_t i = rand_below(r, room + 1); i > 0; i--)
				rude_push(&k, &lost);
			if (rand_below(r, 2))
				overrun_round(&k, &ring, &t, r, false, &lost, &told);
		}
		for (int i = 0; i < 300; i++)
			overrun_round(&k, &ring, &t, r, true, &lost, &told);
		CHECK(told || !lost);
		overruns += lost;
		rude_push(&k, &lost);
		for (int i = 0; i < 4; i++)
			overrun_round(&k, &ring, &t, r, true, &lost, &told);
		CHECK(ring.next == k.push && k.reset == k.push);
		for (uint32_t i = 0; i <= RING; i++) {
			rude_push(&k, &lost);
			overrun_round(&k, &ring, &t, r, true, &lost, &told);
		}
		CHECK(!ring.ahead);
	}
	CHECK(overruns > 100);
	slot_table_deinit(&t);
}

static void fill_hostile(struct kvm_dirty_gfn *g, uint32_t nr, struct rand *r, bool all_dirty)
{
	for (uint32_t i = 0; i < nr; i++) {
		g[i].flags = all_dirty ? KVM_DIRTY_GFN_F_DIRTY
			     : rand_below(r, 8)
				     ? KVM_DIRTY_GFN_F_DIRTY | (uint32_t)rand_next(r) << 2
				     : (uint32_t)rand_next(r);
		g[i].slot = rand_below(r, 2) ? (uint32_t)rand_below(r, IDS)
					     : (uint32_t)rand_next(r);
		g[i].offset = rand_below(r, 2) ? rand_below(r, 64) : rand_next(r);
	}
}

static void hostile_once(const struct slot_table *t, struct rand *r)
{
	struct kvm_dirty_gfn g[RING], was[RING];
	uint64_t frames[RING];
	struct harvest_ring ring = {.gfns = g, .nr = RING, .next = (uint32_t)rand_next(r)};
	struct harvest_result res = {0};
	uint32_t from = ring.next;
	size_t max = rand_below(r, 2) ? RING : rand_below(r, RING), n;
	const uint32_t both = KVM_DIRTY_GFN_F_DIRTY | KVM_DIRTY_GFN_F_RESET;

	fill_hostile(g, RING, r, rand_below(r, 4) == 0);
	memcpy(was, g, sizeof(g));
	CHECK(harvest_ready(&ring, RING) <= RING);
	n = harvest_ring(&ring, t, frames, max, &res);
	CHECK(n <= max && res.collected <= RING && res.resolved + res.unresolved <= res.collected);
	for (uint32_t i = 0; i < RING; i++) {
		uint32_t at = (from + i) % RING;
		bool taken = i < res.collected;

		CHECK(!taken || (was[at].flags & both) == KVM_DIRTY_GFN_F_DIRTY);
		CHECK(g[at].flags == (taken ? KVM_DIRTY_GFN_F_RESET : was[at].flags));
	}
	for (size_t i = 0; i < n; i++)
		CHECK(frames[i] >= 1000 && frames[i] < 1000 + 32);
	/* a second look finds at most what the first had no room for */
	n = harvest_ring(&ring, t, frames, RING, &res);
	CHECK(n <= RING && res.collected <= RING);
}

static void test_hostile(struct rand *r)
{
	const struct slot_run runs[] = {{0, 20, 1000}, {20, 12, 1020}};
	struct slot_table t;
	uint64_t frame;

	CHECK(!slot_table_init(&t, IDS));
	for (uint32_t i = 0; i < IDS / 2; i++)
		CHECK(slot_table_add(&t, 0, 32, runs, i % 2 ? 0 : 2) == (int)i);
	for (int i = 0; i < 3000; i++)
		hostile_once(&t, r);
	CHECK(slot_table_resolve(&t, 2 << 16, 0, &frame) == SLOT_UNRESOLVED);
	CHECK(slot_table_resolve(&t, 0xffffffff, 0, &frame) == SLOT_UNRESOLVED);
	CHECK(slot_table_resolve(&t, IDS, 0, &frame) == SLOT_UNRESOLVED);
	CHECK(slot_table_resolve(&t, 2, 32, &frame) == SLOT_UNRESOLVED);
	CHECK(slot_table_resolve(&t, 2, ~0ull, &frame) == SLOT_UNRESOLVED);
	CHECK(slot_table_resolve(&t, 2, 31, &frame) == SLOT_RESOLVED && frame == 1031);
	CHECK(slot_table_resolve(&t, 1, 31, &frame) == SLOT_UNTRACKED);
	slot_table_deinit(&t);
}

int main(void)
{
	struct rand r = rand_of(rand_seed());

	test_model(&r);
	test_overrun(&r);
	test_hostile(&r);
	printf("ok\n");
	return 0;
}
