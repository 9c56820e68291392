/* SPDX-License-Identifier: MIT */
/*
 * Goal: the table of duplicates forgets nothing below its limit, never needs more
 * memory than its limit, never says anything but the latest loc of a key, and at the
 * limit still knows what came lately and a sample of the rest (dedup.h).
 * Method: random keys put, put again, filtered, beside an array of their locs.
 */
#include <string.h>

#include "snapd/store/dedup.h"
#include "tests/lib/rand.h"

#define LIMIT	 (256u << 10)
#define CAPACITY (LIMIT / sizeof(struct dedup_slot))

static uint64_t base;

static uint64_t key_at(uint64_t i)
{
	struct rand r = rand_of(base + i);

	return dedup_key(rand_next(&r), 7, 12);
}

/* The table's own choice, from its description: one key in sixteen. */
static bool is_sampled(uint64_t key)
{
	return (key >> 40) % DEDUP_SAMPLE == 0;
}

static void test_below(struct rand *r)
{
	uint64_t n = rand_below(r, CAPACITY / 2);
	loc_t *locs = calloc(n + 1, sizeof(*locs));
	struct dedup d;

	dedup_init(&d, LIMIT);
	for (uint64_t i = 0; i < 2 * n; i++) {
		uint64_t k = i < n ? i : rand_below(r, n);

		locs[k] = loc_make((uint32_t)rand_below(r, 1000), 1 + (uint32_t)k, 5);
		dedup_prefetch(&d, key_at(k));
		dedup_put(&d, key_at(k), locs[k]);
		dedup_add(&d, key_at(k), 1);
	}
	for (uint64_t k = 0; k < n; k++)
		CHECK(dedup_get(&d, key_at(k)) == locs[k]);
	CHECK(!dedup_get(&d, key_at(n)));
	CHECK(dedup_nr(&d) == n && !dedup_evicts(&d));
	CHECK(dedup_bytes(&d) <= LIMIT && dedup_bytes(&d) >= n * sizeof(struct dedup_slot));
	dedup_deinit(&d);
	free(locs);
}

static bool keep_even(void *opaque, loc_t loc)
{
	return loc_segment(loc) % 2 == 0;
}

static void test_filter(struct rand *r)
{
	uint64_t n = 1 + rand_below(r, CAPACITY / 2);
	struct dedup d;

	dedup_init(&d, LIMIT);
	for (uint64_t k = 0; k < n; k++)
		dedup_put(&d, key_at(k), loc_make((uint32_t)k, 1, 0));
	dedup_filter(&d, keep_even, NULL);
	for (uint64_t k = 0; k < n; k++)
		CHECK(dedup_get(&d, key_at(k)) == (k % 2 ? 0 : loc_make((uint32_t)k, 1, 0)));
	CHECK(dedup_nr(&d) == (n + 1) / 2);
	for (uint64_t k = 0; k < n; k++)
		dedup_add(&d, key_at(k), loc_make((uint32_t)k, 2, 0));
	for (uint64_t k = 0; k < n; k++)
		CHECK(loc_block(dedup_get(&d, key_at(k))) == 1 + k % 2);
	dedup_deinit(&d);
}

/* How many of keys [from, to) that are sampled or not are known. */
static double known(struct dedup *d, uint64_t from, uint64_t to, bool sampled)
{
	uint64_t nr = 0, of = 0;

	for (uint64_t k = from; k < to; k++) {
		loc_t loc;

		if (is_sampled(key_at(k)) != sampled)
			continue;
		loc = dedup_get(d, key_at(k));
		CHECK(!loc || loc == loc_make((uint32_t)k, 3, 0));
		nr += loc != 0;
		of++;
	}
	return (double)nr / (double)of;
}

static void test_at_limit(void)
{
	const uint64_t n = 4 * CAPACITY;
	struct dedup d;

	dedup_init(&d, LIMIT);
	for (uint64_t k = 0; k < n; k++)
		dedup_put(&d, key_at(k), loc_make((uint32_t)k, 3, 0));
	CHECK(dedup_evicts(&d) && dedup_bytes(&d) <= LIMIT && dedup_nr(&d) <= CAPACITY);
	/* A quarter of the table back; and the first half of what ever came. */
	CHECK(known(&d, n - CAPACITY / 4, n, false) > 0.9);
	CHECK(known(&d, n - CAPACITY / 4, n, true) > 0.9);
	CHECK(known(&d, 0, n / 2, true) > 0.7);
	CHECK(known(&d, 0, n / 2, false) < 0.1);
	dedup_deinit(&d);
}

/* No keys of two domains or page sizes are the same. */
static void test_keys(void)
{
	for (uint64_t id = 0; id < 1000; id++)
		for (uint64_t domain = 0; domain < 8; domain++)
			CHECK(dedup_key(id, domain, 12) != dedup_key(id, domain + 1, 12) &&
			      dedup_key(id, domain, 12) != dedup_key(id, domain, 14));
}

int main(int argc, char **argv)
{
	int rounds = argc > 1 ? atoi(argv[1]) : 8;
	struct rand r = rand_of(rand_seed());

	for (int i = 0; i < rounds; i++) {
		base = rand_next(&r);
		test_below(&r);
		test_filter(&r);
		test_at_limit();
	}
	test_keys();
	printf("%d rounds\n", rounds);
	return 0;
}
