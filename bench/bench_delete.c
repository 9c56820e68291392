/* SPDX-License-Identifier: MIT */
/*
 * bench delete: 1000 of 10 000 snapshots are deleted and their space taken back.
 *
 * Two guests in one store; one has 9000 snapshots that stay, one has 1000 that go, whose
 * pages nothing else needs.  Time and I/O (read + written, /proc/self/io) to delete them
 * and reclaim, against the same in a store that has the second guest alone: what others
 * hold should cost nothing.  gc ran before, as it does by the hour: what stays is counted.
 * Built in memory (/dev/shm) and moved to the disk.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench/bench.h"
#include "bench/store_run.h"
#include "snapd/util/cleanup.h"

#define NR_PAGES 16384u
#define CHANGED	 16u
#define STAY	 9000u
#define GO	 1000u

struct cost {
	double seconds;
	uint64_t io, freed;
};

static void take(struct store_run *s, uint8_t *ram, uint32_t nr, uint64_t *ids, uint64_t *seed)
{
	struct epoch_stats stats;

	run_epoch(s, ram, NULL, NR_PAGES, &stats);
	for (uint32_t i = 0; i < nr; i++)
		ids[i] = run_scattered(s, ram, CHANGED, NR_PAGES, seed);
}

static uint64_t io_bytes(void)
{
	unsigned long long bytes = 0;
	char line[128];
	FILE *f = fopen("/proc/self/io", "re");

	while (f && fgets(line, sizeof(line), f))
		if (!strncmp(line, "read_bytes:", 11) || !strncmp(line, "write_bytes:", 12))
			bytes += strtoull(strchr(line, ':') + 1, NULL, 10);
	if (f)
		fclose(f);
	return bytes;
}

static struct cost delete_all(struct store_run *s, const uint64_t *ids)
{
	uint64_t start = bench_now_ns(), reclaim, io = io_bytes();
	struct cost c = {0};
	struct err e = {0};

	for (uint32_t i = 0; i < GO; i++)
		run_check(store_snapshot_delete(s->store, ids[i], &e), &e);
	reclaim = bench_now_ns();
	run_check(store_gc(s->store, NULL, NULL, &c.freed, &e), &e);
	bench_note("deleted in %.2f s, reclaimed in %.3f s", (double)(reclaim - start) / 1e9,
		   (double)(bench_now_ns() - reclaim) / 1e9);
	c.seconds = (double)(bench_now_ns() - start) / 1e9;
	c.io = io_bytes() - io;
	return c;
}

/* What came since the last one: all of it. */
static void reclaim_before(struct store_run *s)
{
	uint64_t start = bench_now_ns(), freed;
	struct err e = {0};

	run_check(store_gc(s->store, NULL, NULL, &freed, &e), &e);
	bench_note("gc before: %.2f s", (double)(bench_now_ns() - start) / 1e9);
}

static struct cost run(const char *dir, uint8_t *ram, uint32_t stay)
{
	uint64_t *ids = calloc(STAY + GO, sizeof(*ids)), seed = 1;
	char path[4128], build[64];
	struct store_run s;
	struct cost c;

	snprintf(build, sizeof(build), "/dev/shm/snapd-delete-%d", (int)getpid());
	snprintf(path, sizeof(path), "%s/store", dir);
	if (!ids)
		bench_die("no memory");
	store_run_init(&s, &(struct store_config){.dir = build, .compression = "none"});
	if (stay)
		take(&s, ram, stay, ids, &seed);
	store_run_add_vm(&s, "goes");
	take(&s, ram, GO, ids, &seed);
	reclaim_before(&s);
	store_run_reopen(&s, &(struct store_config){.dir = path, .compression = "none"});
	c = delete_all(&s, ids);
	bench_note("beside %u snapshots: %.2f s, %.1f MB of I/O, %.1f MB free", stay, c.seconds,
		   (double)c.io / 1e6, (double)c.freed / 1e6);
	store_run_deinit(&s);
	free(ids);
	return c;
}

int main(void)
{
	const char *dir = run_dir("delete");
	uint8_t *ram = bench_guest_ram((size_t)NR_PAGES * RUN_PAGE, 3);
	struct cost alone = run(dir, ram, 0), beside = run(dir, ram, STAY);

	bench_ratio("delete, time", beside.seconds / alone.seconds, BENCH_AT_MOST, 2);
	bench_ratio("delete, I/O", (double)beside.io / (double)MAX(alone.io, (uint64_t)1),
		    BENCH_AT_MOST, 2);
	return 0;
}
