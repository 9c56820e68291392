/* SPDX-License-Identifier: MIT */
/*
 * bench depth: does the number of snapshots before it make a snapshot dearer (I9)?
 *
 * A guest of 256 MiB with a hot set of 2048 pages, scattered; each epoch changes 16 of
 * them, and is a snapshot that stays.  At depth 10 and at depth 10 000: the time to create
 * a snapshot; to open its map and read a page at random; to restore all of it.  Paired: a
 * store that has 10 snapshots and one that has 10 000 take turns.
 *
 * The deep store is built in memory (/dev/shm), where 10 000 commits take seconds, and
 * moved to the disk; everything is measured there.  Both begin with an epoch that changes
 * the whole hot set, so that both maps have as many runs.  Maps are opened at the same
 * distance from a checkpoint; the distance has a bound (commit.c), and what it costs is
 * shown apart.
 *
 * SNAPD_BENCH_DEPTH (10000): the depth; 3 GiB of memory must be free.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench/bench.h"
#include "bench/store_run.h"
#include "snapd/store/internal.h"

#define NR_PAGES 65536u
#define HOT	 2048u
#define CHANGED	 16u
#define SHALLOW	 10u
#define CREATED	 200
#define READ	 400
#define NEAR	 9
#define RESTORED 9

struct guest {
	struct store_run run;
	uint8_t *ram;
	uint32_t *hot;
	uint64_t seed;
	uint32_t depth;
};

static int compare_u32(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

/* Seconds of one more snapshot. */
static double snapshot(struct guest *g)
{
	uint32_t index[CHANGED], nr = 0;
	struct epoch_stats stats;

	for (uint32_t i = 0; i < CHANGED; i++)
		index[i] = g->hot[bench_rand(&g->seed) % HOT];
	qsort(index, CHANGED, sizeof(*index), compare_u32);
	for (uint32_t i = 0; i < CHANGED; i++) {
		if (i && index[i] == index[i - 1])
			continue;
		index[nr++] = index[i];
		*(uint64_t *)(g->ram + (size_t)index[i] * RUN_PAGE) = bench_rand(&g->seed);
	}
	g->depth++;
	return run_epoch(&g->run, g->ram, index, nr, &stats);
}

static void guest_init(struct guest *g, const char *dir, uint32_t depth)
{
	struct epoch_stats stats;
	char path[4128];

	*g = (struct guest){.seed = depth,
			    .ram = bench_guest_ram((size_t)NR_PAGES * RUN_PAGE, 3),
			    .hot = bench_scattered(HOT, NR_PAGES, 7)};
	snprintf(path, sizeof(path), "%s/depth-%u-%d", dir, depth, (int)getpid());
	store_run_init(&g->run, &(struct store_config){.dir = path, .compression = "none"});
	run_epoch(&g->run, g->ram, NULL, NR_PAGES, &stats);
	for (uint32_t i = 0; i < HOT; i++)
		*(uint64_t *)(g->ram + (size_t)g->hot[i] * RUN_PAGE) = bench_rand(&g->seed);
	run_epoch(&g->run, g->ram, g->hot, HOT, &stats);
	while (g->depth < depth)
		snapshot(g);
}

static void guest_deinit(struct guest *g)
{
	store_run_deinit(&g->run);
	bench_guest_free(g->ram, (size_t)NR_PAGES * RUN_PAGE);
	free(g->hot);
}

static struct snapd_point head(struct guest *g)
{
	struct store_timeline tl;
	struct err e = {0};

	run_check(store_timeline_get(g->run.store, g->run.timeline, &tl, &e), &e);
	return (struct snapd_point){tl.id, tl.head};
}

/* Seconds to open the map of the newest snapshot and read one of its pages. */
static double read_one(struct guest *g, struct store_reader *reader)
{
	_Alignas(RUN_PAGE) static uint8_t page[RUN_PAGE];
	struct page_read read = {.gfn = bench_rand(&g->seed) % NR_PAGES, .dst = page};
	struct snapd_point at = head(g);
	uint64_t start = bench_now_ns();
	struct pagemap *m;
	struct err e = {0};

	run_check(store_map_load(g->run.store, at, false, &m, &e), &e);
	read.loc = pagemap_get(m, read.gfn);
	run_check(store_read_pages(reader, &read, 1, &e), &e);
	pagemap_destroy(m);
	if (memcmp(page, g->ram + read.gfn * RUN_PAGE, RUN_PAGE))
		bench_die("page %llu has other bytes", (unsigned long long)read.gfn);
	return (double)(bench_now_ns() - start) / 1e9;
}

/* Median, us. */
static double read_some(struct guest *g, struct store_reader *reader)
{
	double v[NEAR];

	for (int i = 0; i < NEAR; i++)
		v[i] = 1e6 * read_one(g, reader);
	return bench_median(v, NEAR);
}

/* How much an opened snapshot's page costs at each distance from its checkpoint. */
static void show_distances(struct guest *g, struct store_reader *reader)
{
	double least = 1e9, most = 0;

	for (int i = 0; i < 70; i++) {
		double us = read_some(g, reader);

		least = MIN(least, us);
		most = MAX(most, us);
		snapshot(g);
	}
	bench_note("opening and reading a page, over 70 snapshots in a row: %.0f to %.0f us", least,
		   most);
}

/* Epochs between the newest one and its checkpoint. */
static uint32_t distance(struct guest *g)
{
	struct snapd_point at = head(g);
	struct rec_epoch rec;
	struct err e = {0};
	struct ix_txn t;

	run_check(index_begin(g->run.store->index, &t, &e), &e);
	run_check(store_epoch_record(&t, &at, &rec, &e), &e);
	index_end(&t);
	return rec.chain_epochs;
}

static double restore(struct guest *g, uint8_t *to)
{
	double seconds = run_restore(&g->run, head(g), to, NR_PAGES);

	if (memcmp(to, g->ram, (size_t)NR_PAGES * RUN_PAGE))
		bench_die("other bytes came back");
	return seconds;
}

static void judge(const char *what, double *deep, double *flat, size_t nr, double unit, double goal)
{
	double d = bench_median(deep, nr), f = bench_median(flat, nr);
	char name[64];

	snprintf(name, sizeof(name), "depth %s", what);
	bench_note("%s: %.1f us at depth %u, %.1f us deep", what, f * unit, SHALLOW, d * unit);
	bench_ratio(name, d / f, BENCH_AT_MOST, goal);
}

/* The shallow store is made anew when it has become too deep. */
static void measure_creation(struct guest *deep, const char *dir)
{
	double d[CREATED], f[CREATED];
	struct guest flat;
	int n = 0;

	while (n < CREATED) {
		guest_init(&flat, dir, SHALLOW);
		for (uint32_t i = 0; i < 5 * SHALLOW && n < CREATED; i++, n++) {
			d[n] = snapshot(deep);
			f[n] = snapshot(&flat);
		}
		guest_deinit(&flat);
	}
	judge("creation", d, f, CREATED, 1e6, 1.1);
}

static void measure_reading(struct guest *deep, struct guest *flat)
{
	uint8_t *to = bench_guest_ram((size_t)NR_PAGES * RUN_PAGE, 9);
	struct store_reader *rd, *rf;
	double d[READ], f[READ];
	struct err e = {0};

	run_check(store_reader_create(deep->run.store, RUN_PAGE, &rd, &e), &e);
	run_check(store_reader_create(flat->run.store, RUN_PAGE, &rf, &e), &e);
	while (distance(deep) != distance(flat))
		snapshot(deep);
	for (int i = 0; i < READ; i++) {
		d[i] = read_one(deep, rd);
		f[i] = read_one(flat, rf);
	}
	judge("page", d, f, READ, 1e6, 1.1);
	for (int i = 0; i < RESTORED; i++) {
		d[i] = restore(deep, to);
		f[i] = restore(flat, to);
	}
	judge("restore", d, f, RESTORED, 1e6, 1.2);
	show_distances(deep, rd);
	store_reader_destroy(rd);
	store_reader_destroy(rf);
}

int main(void)
{
	const char *env = getenv("SNAPD_BENCH_DEPTH");
	uint32_t depth = env ? (uint32_t)strtoul(env, NULL, 10) : 10000;
	struct guest deep, flat;
	const char *dir = run_dir("depth");
	char path[4128];

	guest_init(&deep, "/dev/shm", depth);
	snprintf(path, sizeof(path), "%s/deep", dir);
	store_run_reopen(&deep.run, &(struct store_config){.dir = path, .compression = "none"});
	measure_creation(&deep, dir);
	guest_init(&flat, dir, SHALLOW);
	bench_note("%u snapshots", deep.depth);
	measure_reading(&deep, &flat);
	guest_deinit(&flat);
	guest_deinit(&deep);
	return 0;
}
