/* SPDX-License-Identifier: MIT */
/*
 * Goal: what goes into a manifest comes out, in few bytes; bytes that no writer
 * made are refused or decode to something in range, and never read past the end.
 * Method: random maps → writer → reader, compared; then cut at each length and
 * with bits flipped, in a buffer that ends at its last byte (ASan).
 */
#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "snapd/store/manifest.h"
#include "tests/lib/rand.h"

struct entry {
	uint64_t gfn;
	loc_t loc;
};

#define ENTRIES_MAX 4000

static loc_t next_page(loc_t loc)
{
	return loc_entry(loc) < 251 ? loc + 1 : loc_make(loc_segment(loc), loc_block(loc) + 254, 0);
}

/* Frames with gaps, locs mostly in order, at times zero, gone, or a duplicate's. */
static size_t random_entries(struct rand *r, struct entry *es)
{
	size_t nr = rand_below(r, ENTRIES_MAX + 1);
	uint64_t gfn = rand_below(r, 3) ? rand_below(r, 1u << 20) : 0;
	uint64_t spread = 1 + rand_below(r, 300);
	loc_t page = loc_make(7, 1, 0), loc = page;

	for (size_t i = 0; i < nr; i++) {
		if (rand_below(r, 8) == 0) {
			static const loc_t fixed[] = {LOC_ZERO_PAGE, MANIFEST_GONE};

			loc = fixed[rand_below(r, 2)];
			page = rand_below(r, 4) ? page
						: loc_make(3, (uint32_t)rand_below(r, 99), 4095);
		} else if (loc_kind(loc) == LOC_PAGE || rand_below(r, 3) == 0) {
			loc = page;
			page = next_page(page);
		}
		es[i] = (struct entry){gfn, loc};
		gfn += 1 + (rand_below(r, 2) ? 0 : rand_below(r, spread));
	}
	return nr;
}

static size_t encode(const struct entry *es, size_t nr, struct manifest_writer *w,
		     const uint8_t **bytes)
{
	size_t len;

	CHECK(manifest_writer_init(w) == 0);
	for (size_t i = 0; i < nr; i++)
		manifest_add(w, es[i].gfn, es[i].loc);
	CHECK(manifest_finish(w, bytes, &len) == 0);
	CHECK(w->nr_pages == nr);
	return len;
}

static void check_decoded(const uint8_t *bytes, size_t len, const struct entry *es, size_t nr)
{
	struct manifest_reader r;
	struct manifest_run run;
	size_t at = 0;
	struct err e = {0};
	int rc;

	manifest_reader_init(&r, bytes, len);
	while ((rc = manifest_next(&r, &run, &e)) == 1)
		for (uint64_t k = 0; k < run.len; k++, at++) {
			loc_t loc = loc_kind(run.loc) == LOC_PAGE ? run.loc + k : run.loc;

			CHECK(at < nr && es[at].gfn == run.gfn + k && es[at].loc == loc);
		}
	CHECK(rc == 0 && at == nr);
}

/* Decode anything: 0 or -EUCLEAN with a reason, runs ascending and in range. */
static int decode_hostile(const uint8_t *bytes, size_t len)
{
	struct manifest_reader r;
	struct manifest_run run;
	uint64_t end = 0;
	struct err e = {0};
	int rc;

	manifest_reader_init(&r, bytes, len);
	while ((rc = manifest_next(&r, &run, &e)) == 1) {
		CHECK(run.len && run.gfn >= end && run.gfn + run.len <= MANIFEST_GFN_MAX);
		if (loc_kind(run.loc) == LOC_PAGE)
			CHECK(loc_entry(run.loc) + run.len <= 4096);
		else
			CHECK(run.loc == LOC_ZERO_PAGE || run.loc == MANIFEST_GONE);
		end = run.gfn + run.len;
	}
	CHECK(rc == 0 || (rc == -EUCLEAN && e.text[0]));
	CHECK(rc != -EUCLEAN || manifest_next(&r, &run, NULL) == -EUCLEAN);
	return rc;
}

static void check_damaged(struct rand *r, const uint8_t *bytes, size_t len)
{
	for (int i = 0; i < 30 && len; i++) {
		size_t cut = rand_below(r, len);
		uint8_t *copy = malloc(cut ? cut : 1);

		memcpy(copy, bytes, cut);
		decode_hostile(copy, cut);
		for (int k = 0; k < 3 && cut; k++)
			copy[rand_below(r, cut)] ^= (uint8_t)(1u << rand_below(r, 8));
		decode_hostile(copy, cut);
		free(copy);
	}
}

/* Random single pages, stored one after another in batches of 252: at most 4
 * bytes each, and a whole zero guest next to nothing. */
static void test_size(struct rand *r)
{
	struct manifest_writer w = {};
	const uint8_t *bytes;
	size_t len;
	uint64_t gfn = 0;
	loc_t loc = loc_make(1, 1, 0);

	CHECK(manifest_writer_init(&w) == 0);
	for (int i = 0; i < 10000; i++, loc = next_page(loc)) {
		gfn += 1 + rand_below(r, 200);
		manifest_add(&w, gfn, loc);
	}
	CHECK(manifest_finish(&w, &bytes, &len) == 0);
	printf("random single pages: %.2f bytes each\n", (double)len / 10000);
	CHECK(len <= 4 * 10000);
	manifest_writer_deinit(&w);

	CHECK(manifest_writer_init(&w) == 0);
	manifest_add_run(&w, 0, 1u << 28, LOC_ZERO_PAGE);
	CHECK(manifest_finish(&w, &bytes, &len) == 0 && len < 8);
	manifest_writer_deinit(&w);
}

static void check_refused(uint64_t gfn, uint64_t n, loc_t loc)
{
	struct manifest_writer w = {};
	const uint8_t *bytes;
	size_t len;

	CHECK(manifest_writer_init(&w) == 0);
	manifest_add(&w, 10, LOC_ZERO_PAGE);
	manifest_add_run(&w, gfn, n, loc);
	manifest_add(&w, 1u << 30, LOC_ZERO_PAGE);
	CHECK(manifest_finish(&w, &bytes, &len) == -EINVAL);
	manifest_writer_deinit(&w);
}

static void test_refused(void)
{
	static const uint8_t broken[][12] = {
		/* length, bytes */
		{1, 0x80},				     /* cut inside a number */
		{2, 0x00, 0x01},			     /* empty run */
		{3, 0x80, 0x00, 0x05},			     /* a number longer than it need be */
		{2, 0x00, 0x04},			     /* continues, but from what? */
		{10, 0x00, 0x06, 1, 2, 3, 4, 5, 6, 7, 0x10}, /* loc is no page */
		{10, 0x00, 0x0a, 0xff, 0x0f, 0, 0, 0, 0, 0, 0x20}, /* leaves its batch */
		{9, 0x00, 0x06, 1, 2, 3, 4, 5, 6, 7},		   /* cut inside a loc */
	};

	check_refused(10, 1, LOC_ZERO_PAGE);
	check_refused(9, 1, LOC_ZERO_PAGE);
	check_refused(11, 1, 0);
	check_refused(11, 2, loc_make(1, 1, 4095));
	check_refused(MANIFEST_GFN_MAX, 1, LOC_ZERO_PAGE);
	check_refused(MANIFEST_GFN_MAX - 5, 6, LOC_ZERO_PAGE | 1);
	check_refused(11, ~0ull, LOC_ZERO_PAGE);
	for (size_t i = 0; i < sizeof(broken) / sizeof(broken[0]); i++) {
		uint8_t *copy = malloc(broken[i][0]);

		memcpy(copy, broken[i] + 1, broken[i][0]);
		CHECK(decode_hostile(copy, broken[i][0]) == -EUCLEAN);
		free(copy);
	}
}

/* The highest loc plus one has the bits of GONE: not a continuation. */
static void test_last_loc(void)
{
	const struct entry es[] = {
		{5, loc_make(0xfffffff, 0xfffff, 4095)},
		{6, MANIFEST_GONE},
	};
	struct manifest_writer w = {};
	const uint8_t *bytes;
	size_t len = encode(es, 2, &w, &bytes);

	check_decoded(bytes, len, es, 2);
	manifest_writer_deinit(&w);
}

int main(void)
{
	struct rand r = rand_of(rand_seed());
	static struct entry es[ENTRIES_MAX];

	test_size(&r);
	test_refused();
	test_last_loc();
	for (int round = 0; round < 500; round++) {
		struct manifest_writer w = {};
		const uint8_t *bytes;
		size_t nr = random_entries(&r, es);
		size_t len = encode(es, nr, &w, &bytes);

		check_decoded(bytes, len, es, nr);
		check_damaged(&r, bytes, len);
		manifest_writer_deinit(&w);
	}
	printf("manifest: 500 maps\n");
	return 0;
}
