/* SPDX-License-Identifier: MIT */
/*
 * Goal: a pagemap is what an array of (loc, fp) would be, for any sequence of
 * calls; clones are independent; diff and iteration are exact and ascending.
 * Method: random calls against that array, over frames crowded around chunk
 * borders and far apart; everything compared after each few calls.
 */
#include <errno.h>
#include <string.h>

#include "snapd/store/manifest.h"
#include "snapd/store/pagemap.h"
#include "tests/lib/rand.h"

#define WINDOWS 4
#define WINDOW	1600u /* frames: three chunks and a bit */
#define FRAMES	(WINDOWS * WINDOW)

struct model {
	loc_t loc[FRAMES];
	uint16_t fp[FRAMES];
};

static const uint64_t bases[WINDOWS] = {0, 0x100000 - 700, 1ull << 40, ~0ull - WINDOW + 1};

static uint64_t gfn_at(uint32_t i)
{
	return bases[i / WINDOW] + i % WINDOW;
}

static loc_t random_loc(struct rand *r)
{
	switch (rand_below(r, 5)) {
	case 0:
		return 0;
	case 1:
		return LOC_ZERO_PAGE;
	default:
		return loc_make((uint32_t)rand_below(r, 3), 1 + (uint32_t)rand_below(r, 9),
				(uint32_t)rand_below(r, 200));
	}
}

static void set_one(struct rand *r, struct pagemap *m, struct model *x)
{
	uint32_t i = (uint32_t)rand_below(r, FRAMES);
	loc_t loc = random_loc(r);
	uint16_t fp = (uint16_t)rand_next(r);

	CHECK(pagemap_set(m, gfn_at(i), loc, fp) == 0);
	x->loc[i] = loc;
	x->fp[i] = loc ? fp : 0;
}

static void set_run(struct rand *r, struct pagemap *m, struct model *x)
{
	uint32_t i = (uint32_t)rand_below(r, FRAMES);
	uint32_t n = (uint32_t)rand_below(r, WINDOW - i % WINDOW + 1);
	loc_t loc = random_loc(r);
	bool gone = loc == 0 && rand_below(r, 2);

	CHECK(pagemap_set_run(m, gfn_at(i), n, gone ? MANIFEST_GONE : loc) == 0);
	for (uint32_t k = 0; k < n; k++) {
		x->loc[i + k] = loc_kind(loc) == LOC_PAGE ? loc + k : loc;
		x->fp[i + k] = 0;
	}
}

static void check_same(const struct pagemap *m, const struct model *x, bool with_fp)
{
	struct pagemap_iter it;
	uint64_t nr = 0, nr_pages = 0, gfn;
	loc_t loc;

	for (uint32_t i = 0; i < FRAMES; i++) {
		CHECK(pagemap_get(m, gfn_at(i)) == x->loc[i]);
		CHECK(pagemap_fp(m, gfn_at(i)) == (with_fp ? x->fp[i] : 0));
		nr += x->loc[i] != 0;
		nr_pages += loc_kind(x->loc[i]) == LOC_PAGE;
	}
	CHECK(pagemap_nr(m) == nr && pagemap_nr_pages(m) == nr_pages);
	CHECK(pagemap_iter_init(&it, m) == 0);
	for (uint32_t i = 0; i < FRAMES; i++) {
		if (!x->loc[i])
			continue;
		CHECK(pagemap_iter_next(&it, &gfn, &loc));
		CHECK(gfn == gfn_at(i) && loc == x->loc[i]);
	}
	CHECK(!pagemap_iter_next(&it, &gfn, &loc));
	pagemap_iter_deinit(&it);
}

static void check_diff(const struct pagemap *a, const struct model *x, const struct pagemap *b,
		       const struct model *y)
{
	uint64_t *gfns;
	size_t nr, at = 0;

	CHECK(pagemap_diff(a, b, &gfns, &nr) == 0);
	for (uint32_t i = 0; i < FRAMES; i++)
		if (x->loc[i] != y->loc[i])
			CHECK(at < nr && gfns[at++] == gfn_at(i));
	CHECK(at == nr);
	free(gfns);
}

static void run_round(struct rand *r, bool with_fp)
{
	static struct model x, y;
	struct pagemap *a, *b;

	memset(&x, 0, sizeof(x));
	CHECK(pagemap_create(with_fp, &a) == 0);
	for (int step = 0; step < 12; step++) {
		for (uint64_t n = rand_below(r, 200); n; n--)
			set_one(r, a, &x);
		for (uint64_t n = rand_below(r, 4); n; n--)
			set_run(r, a, &x);
		check_same(a, &x, with_fp);
		y = x;
		CHECK(pagemap_clone(a, &b) == 0);
		check_diff(a, &x, b, &y);
		set_one(r, b, &y);
		set_run(r, b, &y);
		check_same(a, &x, with_fp);
		check_same(b, &y, with_fp);
		check_diff(a, &x, b, &y);
		pagemap_destroy(b);
	}
	pagemap_destroy(a);
}

/* A hole of any size costs what is there; wrapping runs are refused; empty chunks
 * do not pile up. */
static void test_edges(void)
{
	struct pagemap *m;

	CHECK(pagemap_create(false, &m) == 0);
	CHECK(pagemap_set_run(m, ~0ull, 2, LOC_ZERO_PAGE) == -EINVAL);
	CHECK(pagemap_set_run(m, ~0ull, 0, LOC_ZERO_PAGE) == 0);
	for (uint64_t i = 0; i < 10000; i++) {
		CHECK(pagemap_set(m, i << 20, LOC_ZERO_PAGE, 0) == 0);
		CHECK(pagemap_set_run(m, 0, ~0ull, i % 3 ? 0 : MANIFEST_GONE) == 0);
		CHECK(pagemap_nr(m) == 0);
	}
	CHECK(pagemap_set(m, 77, LOC_ZERO_PAGE, 0) == 0 && pagemap_nr(m) == 1);
	pagemap_destroy(m);
	pagemap_destroy(NULL);
}

int main(void)
{
	struct rand r = rand_of(rand_seed());

	test_edges();
	for (int round = 0; round < 40; round++)
		run_round(&r, round % 2);
	printf("pagemap: 40 rounds of 12 steps\n");
	return 0;
}
