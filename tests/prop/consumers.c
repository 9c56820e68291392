/* SPDX-License-Identifier: MIT */
/*
 * Many readers of one page's dirty bit.
 *
 * The naive tracker has one bitmap for all: a consumer reads it, works, and clears what
 * it read, as two owners of one KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG would.  The
 * classic loss: A and B read a bit; A clears it and copies the page; the guest writes;
 * B clears its stale bit; nobody tells A of the write.
 * Ours gives each consumer a set (gpaset.h), filled by the one owner.
 *
 * The same script and the same random interleavings run on both, consumers coming and
 * going: a consumer that has nothing left to look at must have every page as it is.
 * The naive one has to fail, or the test is too weak.
 */
#include <string.h>

#include "snapd/gpaset.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/rand.h"

#define PAGES	  32u
#define CONSUMERS 4u
#define FRAMES	  4096u

struct consumer {
	bool there;
	uint32_t read; /* what it read and has not cleared yet */
	uint64_t copy[PAGES];
	struct gpaset set; /* ours */
	_Alignas(64) uint8_t mem[12288];
};

struct tracker {
	bool naive;
	uint32_t shared; /* the naive bitmap */
	uint64_t page[PAGES];
	struct consumer c[CONSUMERS];
};

static void guest_write(struct tracker *t, uint32_t page)
{
	t->page[page]++;
	t->shared |= 1u << page;
	for (uint32_t i = 0; i < CONSUMERS; i++)
		if (t->c[i].there)
			gpaset_add(&t->c[i].set, page);
}

static void consumer_join(struct tracker *t, uint32_t i)
{
	struct consumer *c = &t->c[i];

	memset(c, 0, sizeof(*c));
	gpaset_init(&c->set, c->mem, FRAMES);
	c->there = true;
	gpaset_add_range(&c->set, 0, PAGES); /* it has seen nothing yet */
	if (t->naive)
		t->shared = ~0u;
}

static void consumer_read(struct tracker *t, uint32_t i)
{
	uint64_t frames[PAGES], cursor = 0;
	size_t n;

	if (t->naive) {
		t->c[i].read = t->shared;
		return;
	}
	n = gpaset_take(&t->c[i].set, NULL, PAGES, &cursor, frames, PAGES);
	while (n)
		t->c[i].read |= 1u << frames[--n];
}

/* Clear (ours did when it took), then copy: the right order, and not enough. */
static void consumer_clear_and_copy(struct tracker *t, uint32_t i)
{
	struct consumer *c = &t->c[i];

	if (t->naive)
		t->shared &= ~c->read;
	for (uint32_t p = 0; p < PAGES; p++)
		if (c->read >> p & 1)
			c->copy[p] = t->page[p];
	c->read = 0;
}

/* Pages that the consumer takes for clean and has not. */
static uint32_t lost(const struct tracker *t, uint32_t i)
{
	const struct consumer *c = &t->c[i];
	uint32_t n = 0;

	for (uint32_t p = 0; p < PAGES; p++) {
		bool dirty = t->naive ? t->shared >> p & 1 : gpaset_test(&c->set, p);

		n += !dirty && !(c->read >> p & 1) && c->copy[p] != t->page[p];
	}
	return n;
}

static uint32_t classic(bool naive)
{
	static struct tracker t;

	t = (struct tracker){.naive = naive};
	for (uint32_t i = 0; i < 2; i++) {
		consumer_join(&t, i);
		consumer_read(&t, i);
		consumer_clear_and_copy(&t, i);
	}
	guest_write(&t, 7);
	consumer_read(&t, 0);
	consumer_read(&t, 1);
	consumer_clear_and_copy(&t, 0);
	guest_write(&t, 7);
	consumer_clear_and_copy(&t, 1);
	return lost(&t, 0) + lost(&t, 1);
}

static uint32_t interleave(bool naive, uint64_t seed, uint32_t steps)
{
	struct rand r = rand_of(seed);
	static struct tracker t;
	uint32_t n = 0;

	t = (struct tracker){.naive = naive};
	for (uint32_t k = 0; k < steps; k++) {
		uint32_t i = (uint32_t)rand_below(&r, CONSUMERS);

		guest_write(&t, (uint32_t)rand_below(&r, PAGES));
		switch (rand_below(&r, 12)) {
		case 0:
			t.c[i].there = !t.c[i].there;
			if (t.c[i].there)
				consumer_join(&t, i);
			break;
		default:
			if (t.c[i].there && t.c[i].read)
				consumer_clear_and_copy(&t, i);
			else if (t.c[i].there)
				consumer_read(&t, i);
		}
		for (i = 0; i < CONSUMERS; i++)
			n += t.c[i].there ? lost(&t, i) : 0;
	}
	return n;
}

int main(void)
{
	uint64_t seed = rand_seed();

	check(classic(true) == 1, "the naive tracker does not lose: what is tested here?");
	check(classic(false) == 0, "lost by the script");
	check(interleave(true, seed, 20000) > 0, "the naive tracker loses nothing: too weak");
	check(interleave(false, seed, 200000) == 0, "lost in an interleaving");
	printf("ok\n");
	return 0;
}
