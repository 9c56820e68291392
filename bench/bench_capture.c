/* SPDX-License-Identifier: MIT */
/*
 * bench capture: copy + zero test + XXH3-128 of scattered guest pages in one pass
 * (pageid_copy_ahead, as capture calls it) against plain memcpy of the same pages to
 * the same places, on one core.
 *
 * Guest RAM is a memfd; the pages are random, ascending, one in sixteen; none is
 * zero, so each is hashed (a zero page costs less); they go to a staging ring of
 * 8 MiB, as in capture.  Every variant that this CPU runs is measured; beside it,
 * the same without fetching the next page ahead, and memcpy *with* that.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "bench/bench.h"
#include "snapd/store/pageid_ops.h"
#include "snapd/util/cleanup.h"

#define PAGE	      4096u
#define RAM_BYTES     (1ul << 30)
#define STAGING_BYTES (8ul << 20)
#define ROUNDS	      31
#define VARIANTS_MAX  4
#define GOAL	      0.75

static struct page_secret secret;
static uint64_t sink; /* keeps results alive */

struct pages {
	const uint8_t *ram;
	uint8_t *staging;
	const uint32_t *index; /* ascending */
	uint32_t nr;
};

static uint8_t *staging_at(const struct pages *p, uint32_t i)
{
	return p->staging + (size_t)i * PAGE % STAGING_BYTES;
}

static const uint8_t *page_at(const struct pages *p, uint32_t i)
{
	return p->ram + (size_t)p->index[i] * PAGE;
}

static double run_memcpy(const struct pages *p, bool ahead)
{
	uint64_t start = bench_now_ns();

	for (uint32_t i = 0; i < p->nr; i++) {
		memcpy(staging_at(p, i), page_at(p, i), PAGE);
		for (uint32_t k = 0; ahead && k < PAGE; k += 64)
			__builtin_prefetch(page_at(p, i + 1) + k, 0, 2);
	}
	return (double)(bench_now_ns() - start) / p->nr;
}

static double run_pageid(const struct pages *p, const struct pageid_ops *ops, bool ahead)
{
	uint64_t start = bench_now_ns();

	for (uint32_t i = 0; i < p->nr; i++)
		sink ^= ops->copy(&secret, staging_at(p, i), page_at(p, i),
				  ahead ? page_at(p, i + 1) : NULL, PAGE)
				.lo;
	return (double)(bench_now_ns() - start) / p->nr;
}

static double hash_only(const struct pages *p, const struct pageid_ops *ops)
{
	uint64_t start = bench_now_ns();

	for (uint32_t i = 0; i < p->nr; i++)
		sink ^= ops->of(&secret, p->staging, PAGE).lo;
	return (double)(bench_now_ns() - start) / p->nr;
}

/* One line of the table; the ratio with fetching ahead. */
static double measure(const struct pages *p, const struct pageid_ops *ops)
{
	double copy[ROUNDS], copy_ahead[ROUNDS], ahead[ROUNDS], alone[ROUNDS], hash[ROUNDS];
	double ratio[ROUNDS], r;

	for (int i = 0; i < ROUNDS; i++) {
		copy[i] = run_memcpy(p, false);
		ahead[i] = run_pageid(p, ops, true);
		ratio[i] = copy[i] / ahead[i];
		alone[i] = run_pageid(p, ops, false);
		copy_ahead[i] = run_memcpy(p, true);
		hash[i] = hash_only(p, ops);
	}
	r = bench_median(ratio, ROUNDS);
	bench_note("%-8s %4.0f ns/page (%4.0f not fetching ahead); memcpy %4.0f (%4.0f fetching "
		   "ahead); hash alone %3.0f; ratio %.2f",
		   ops->name, bench_median(ahead, ROUNDS), bench_median(alone, ROUNDS),
		   bench_median(copy, ROUNDS), bench_median(copy_ahead, ROUNDS),
		   bench_median(hash, ROUNDS), r);
	return r;
}

int main(void)
{
	struct pages p = {.nr = RAM_BYTES / PAGE / 16};
	const struct pageid_ops *ops;
	double best;

	bench_pin(0);
	for (size_t i = 0; i < sizeof(secret.b); i++)
		secret.b[i] = (uint8_t)bench_rand(&(uint64_t){i});
	p.ram = bench_guest_ram(RAM_BYTES, 1);
	p.index = bench_scattered(p.nr + 1, RAM_BYTES / PAGE, 2); /* one more to fetch ahead */
	p.staging = mmap(NULL, STAGING_BYTES, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (p.staging == MAP_FAILED)
		bench_die("no staging memory");
	best = measure(&p, pageid_ops_at(0));
	for (size_t i = 1; (ops = pageid_ops_at(i)) != NULL; i++)
		measure(&p, ops);
	bench_ratio("capture", best, BENCH_AT_LEAST, GOAL);
	return sink == 42;
}
