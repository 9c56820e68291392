/* SPDX-License-Identifier: MIT */
/*
 * Goal: changes are what an array of the latest loc of each frame would be, in
 * whatever order frames come, and hold what changes.h says of their runs.
 * Method: random bursts (ascending, scattered, one frame again and again), ranges
 * forgotten, the array sorted in between, beside a model; C1 and C2 after each step.
 */
#include <string.h>

#include "snapd/store/changes.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/rand.h"

#define FRAMES 3000u

struct model {
	loc_t loc[FRAMES]; /* 0: none */
	uint64_t fp[FRAMES];
};

static void check_runs(const struct changes *c)
{
	for (uint32_t r = 0; r < c->nr_runs; r++) {
		size_t end = r + 1 < c->nr_runs ? c->starts[r + 1] : c->nr;
		size_t len = end - c->starts[r];

		CHECK(len > 0);
		for (size_t i = c->starts[r] + 1; i < end; i++)
			CHECK(c->v[i - 1].gfn < c->v[i].gfn);
		if (r + 2 < c->nr_runs)
			CHECK(len > 2 * (c->starts[r + 2] - c->starts[r + 1]) ||
			      r + 3 == c->nr_runs);
	}
}

static void check_same(const struct changes *c, const struct model *m)
{
	for (uint64_t gfn = 0; gfn < FRAMES; gfn++) {
		const struct change *x = changes_get(c, gfn);

		CHECK((x != NULL) == (m->loc[gfn] != 0));
		CHECK(!x || (x->gfn == gfn && x->loc == m->loc[gfn] && x->fp == m->fp[gfn]));
	}
}

static void put(struct rand *r, struct changes *c, struct model *m, uint64_t gfn)
{
	m->loc[gfn] = loc_make((uint32_t)rand_below(r, 1u << 20), 1, 0);
	m->fp[gfn] = rand_next(r);
	CHECK(changes_put(c, (struct change){gfn, m->loc[gfn], m->fp[gfn]}) == 0);
}

static void burst(struct rand *r, struct changes *c, struct model *m)
{
	uint64_t n = rand_below(r, 300), at = rand_below(r, FRAMES), style = rand_below(r, 3);

	for (uint64_t i = 0; i < n; i++) {
		if (style == 0)
			at = MIN(at + 1 + rand_below(r, 8), FRAMES - 1);
		else if (style == 1)
			at = rand_below(r, FRAMES);
		put(r, c, m, at);
	}
}

static void clear(struct rand *r, struct changes *c, struct model *m)
{
	uint64_t from = rand_below(r, FRAMES), n = rand_below(r, FRAMES / 4);

	CHECK(changes_clear(c, from, from + n) == 0);
	for (uint64_t gfn = from; gfn < MIN(from + n, (uint64_t)FRAMES); gfn++)
		m->loc[gfn] = 0;
}

static void check_sorted(struct changes *c, const struct model *m)
{
	size_t nr = 0;

	CHECK(changes_sort(c) == 0);
	CHECK(c->nr_runs <= 1);
	for (uint64_t gfn = 0; gfn < FRAMES; gfn++)
		if (m->loc[gfn]) {
			CHECK(nr < c->nr && c->v[nr].gfn == gfn && c->v[nr].loc == m->loc[gfn]);
			nr++;
		}
	CHECK(nr == c->nr);
}

static void run(struct rand *r)
{
	struct changes c = {0};
	struct model m = {0};

	for (int step = 0; step < 60; step++) {
		switch (rand_below(r, 12)) {
		case 0:
			clear(r, &c, &m);
			break;
		case 1:
			check_sorted(&c, &m);
			break;
		case 2:
			if (rand_below(r, 4))
				break;
			changes_reset(&c, rand_below(r, 2) ? 0 : SIZE_MAX);
			memset(&m, 0, sizeof(m));
			break;
		default:
			burst(r, &c, &m);
		}
		check_runs(&c);
		check_same(&c, &m);
	}
	check_sorted(&c, &m);
	changes_deinit(&c);
}

int main(int argc, char **argv)
{
	int rounds = argc > 1 ? atoi(argv[1]) : 50;
	struct rand r = rand_of(rand_seed());

	for (int i = 0; i < rounds; i++)
		run(&r);
	printf("%d rounds\n", rounds);
	return 0;
}
