/* SPDX-License-Identifier: MIT */
/*
 * bench dedup: the table of duplicates, and what duplicates cost a restore.
 *
 * Table: 10 M entries; then a stream of pages as epoch_put() has it, fetched 8 ahead:
 * each looked up, and put when it was not there; half of them were.  One thread, pages a
 * second.
 *
 * Restore: VM 0 stores 256 MiB; VM 1 stores pages of its own, and every n-th of its
 * pages is one of VM 0's at random: an extent of its own for whoever restores VM 1.  Its
 * restore against that of a VM without duplicates, for several n; the limit of
 * epoch.c is out of force except in the last row.  Uncompressed pages, so that the disk is
 * what counts.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/bench.h"
#include "bench/store_run.h"
#include "snapd/store/dedup.h"
#include "snapd/util/cleanup.h"

#define ENTRIES	  10000000u
#define STREAM	  4000000u
#define AHEAD	  8u
#define ROUNDS	  5
#define NR_PAGES  65536u
#define GOAL_RATE 1e6

/* ---- the table ---- */

/* A key is a hash: any number mixed. */
static uint64_t key_at(uint64_t i)
{
	uint64_t state = i * 0x9e3779b97f4a7c15u;

	return dedup_key(bench_rand(&state), 1000, 12);
}

/* Pages a second; every other page of the stream is in the table. */
static double run_stream(struct dedup *d, uint64_t *fresh)
{
	uint64_t *keys = malloc(STREAM * sizeof(*keys)), seed = *fresh, start, found = 0;

	if (!keys)
		bench_die("no memory");
	for (uint32_t i = 0; i < STREAM; i++)
		keys[i] = key_at(i % 2 ? (*fresh)++ : bench_rand(&seed) % ENTRIES);
	start = bench_now_ns();
	for (uint32_t i = 0; i < STREAM; i++) {
		if (i + AHEAD < STREAM)
			dedup_prefetch(d, keys[i + AHEAD]);
		if (dedup_get(d, keys[i]))
			found++;
		else
			dedup_put(d, keys[i], loc_make(1, 1, i % 4096));
	}
	start = bench_now_ns() - start;
	free(keys);
	if (found < STREAM / 4)
		bench_die("only %llu of %u pages were found", (unsigned long long)found, STREAM);
	return STREAM / ((double)start / 1e9);
}

static void measure_table(void)
{
	uint64_t fresh = ENTRIES;
	double rate[ROUNDS];
	struct dedup d;

	dedup_init(&d, (uint64_t)256 << 20);
	for (uint64_t i = 0; i < ENTRIES; i++)
		dedup_put(&d, key_at(i), loc_make(1, 1 + (uint32_t)(i >> 12) % 1000, i % 4096));
	bench_note("%llu entries, %.1f bytes each, %s", (unsigned long long)dedup_nr(&d),
		   (double)dedup_bytes(&d) / (double)dedup_nr(&d),
		   dedup_evicts(&d) ? "some forgotten" : "none forgotten");
	for (int i = 0; i < ROUNDS; i++)
		rate[i] = run_stream(&d, &fresh);
	bench_note("look-up and insert: %.2f M pages/s; %llu entries then%s",
		   bench_median(rate, ROUNDS) / 1e6, (unsigned long long)dedup_nr(&d),
		   dedup_evicts(&d) ? ", at the limit" : "");
	bench_ratio("dedup", bench_median(rate, ROUNDS) / GOAL_RATE, BENCH_AT_LEAST, 1);
	dedup_deinit(&d);
}

/* ---- restores ---- */

static double restore(struct store_run *s, uint8_t *to)
{
	struct store_timeline tl;
	struct err e = {0};

	run_check(store_timeline_get(s->store, s->timeline, &tl, &e), &e);
	return run_restore(s, (struct snapd_point){tl.id, tl.head}, to, NR_PAGES);
}

/* Another VM in the same store. */
static void add_vm(struct store_run *s, const char *name)
{
	struct err e = {0};

	snprintf(s->vm.name, sizeof(s->vm.name), "%s", name);
	run_check(store_vm_register(s->store, &s->vm, &e), &e);
	run_check(store_timeline_create(s->store, s->vm.id, (struct snapd_point){0}, &s->timeline,
					&e),
		  &e);
	pagemap_destroy(s->live);
	run_check(pagemap_create(true, &s->live), &e);
}

static void fill(uint8_t *ram, uint64_t seed)
{
	uint64_t *p = (uint64_t *)ram;

	for (size_t i = 0; i < (size_t)NR_PAGES * RUN_PAGE / 8; i++)
		p[i] = bench_rand(&seed);
}

/* Seconds of a restore when every n-th page (0: none) is one of `old`, which is VM 0's. */
static double run_shared(const char *dir, const uint8_t *old, uint8_t *ram, uint8_t *to, uint32_t n,
			 uint32_t pages_per_read, struct epoch_stats *stats)
{
	struct store_config config = {
		.dir = dir, .compression = "none", .dedup_pages_per_read = pages_per_read};
	uint64_t seed = n + 1;
	struct store_run s;
	double seconds;

	store_run_init(&s, &config);
	run_epoch(&s, old, NULL, NR_PAGES, stats);
	add_vm(&s, "second");
	fill(ram, n + 100);
	for (uint32_t i = 0; n && i < NR_PAGES; i += n)
		memcpy(ram + (size_t)i * RUN_PAGE, old + bench_rand(&seed) % NR_PAGES * RUN_PAGE,
		       RUN_PAGE);
	run_epoch(&s, ram, NULL, NR_PAGES, stats);
	seconds = restore(&s, to);
	seconds = MIN(seconds, restore(&s, to));
	if (memcmp(to, ram, (size_t)NR_PAGES * RUN_PAGE))
		bench_die("other bytes came back");
	store_run_deinit(&s);
	return seconds;
}

static void measure_restores(const char *dir)
{
	static const uint32_t every[] = {256, 64, 32, 16, 8, 4};
	size_t bytes = (size_t)NR_PAGES * RUN_PAGE;
	uint8_t *old = bench_guest_ram(bytes, 3), *ram = bench_guest_ram(bytes, 4);
	uint8_t *to = bench_guest_ram(bytes, 5);
	struct epoch_stats stats;
	double bare = run_shared(dir, old, ram, to, 0, 1, &stats), x;

	bench_note("restore of 256 MiB without duplicates: %.0f ms", 1e3 * bare);
	for (size_t i = 0; i < ARRAY_SIZE(every); i++) {
		x = run_shared(dir, old, ram, to, every[i], 1, &stats);
		bench_note("every %3uth page elsewhere: %.2f x as long, %.2f %% of the bytes saved",
			   every[i], x / bare, 100.0 * (double)stats.duplicate / NR_PAGES);
	}
	x = run_shared(dir, old, ram, to, 4, 0, &stats);
	bench_note("every   4th, with the limit: %.2f x as long, %.2f %% saved, %.2f %% declined",
		   x / bare, 100.0 * (double)stats.duplicate / NR_PAGES,
		   100.0 * (double)stats.declined / NR_PAGES);
}

int main(void)
{
	char path[4128];

	snprintf(path, sizeof(path), "%s/store", run_dir("dedup"));
	measure_table();
	measure_restores(path);
	return 0;
}
