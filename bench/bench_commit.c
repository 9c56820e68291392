/* SPDX-License-Identifier: MIT */
/*
 * bench commit: what makes an epoch durable, apart from the writing of its pages.
 *
 * A guest of 256 MiB, 10 000 of its pages changed at random.  They are put, and the
 * clock starts when the disk has them: the time of epoch_commit() is the manifest,
 * the records, three flushes one after another (segment, index, the index's meta
 * page), and bringing the live map and the table of duplicates up to date.  Beside
 * it, in the same round, three small writes, each made durable: what the disk takes of
 * it, and with what scatter.  The figure is the CPU time of the commit, all system calls
 * included, against a goal in milliseconds: the rest is the disk's.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "bench/bench.h"
#include "bench/store_run.h"
#include "snapd/util/cleanup.h"

#define GUEST_PAGES 65536u
#define ROUNDS	    21
#define SETTLE_US   60000 /* until 40 MB are on the disk */
#define GOAL_MS	    0.8

struct sample {
	double put, commit, whole, cpu, syncs; /* ms */
};

static double ms_since(uint64_t start)
{
	return (double)(bench_now_ns() - start) / 1e6;
}

static double cpu_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
	return (double)ts.tv_sec * 1e3 + (double)ts.tv_nsec / 1e6;
}

static void change_pages(uint8_t *ram, const uint32_t *index, uint32_t nr, uint64_t *seed)
{
	for (uint32_t i = 0; i < nr; i++)
		*(uint64_t *)(ram + (size_t)index[i] * RUN_PAGE) = bench_rand(seed);
}

/* Three small writes, each made durable. */
static double run_syncs(int fd, const uint8_t *block)
{
	uint64_t start = bench_now_ns();

	for (int i = 0; i < 3; i++)
		if (pwrite(fd, block, RUN_PAGE, (off_t)i * RUN_PAGE) != RUN_PAGE || fdatasync(fd))
			bench_die("%s", strerror(errno));
	return ms_since(start);
}

static struct sample run_round(struct store_run *s, uint8_t *ram, uint32_t nr, uint32_t round,
			       int fd)
{
	uint32_t *index = bench_scattered(nr, GUEST_PAGES, round + 1);
	uint64_t seed = (uint64_t)nr << 32 | round, start;
	struct epoch *ep;
	struct sample x;
	double cpu;

	change_pages(ram, index, nr, &seed);
	start = bench_now_ns();
	ep = run_begin(s);
	run_put(s, ep, ram, index, nr);
	x.put = ms_since(start);
	usleep(SETTLE_US);
	start = bench_now_ns();
	cpu = cpu_ms();
	run_commit(ep, NULL);
	x.commit = ms_since(start);
	x.cpu = cpu_ms() - cpu;
	x.syncs = run_syncs(fd, ram);
	change_pages(ram, index, nr, &seed);
	x.whole = 1e3 * run_epoch(s, ram, index, nr, &(struct epoch_stats){0});
	free(index);
	return x;
}

/* Median of one field over the rounds. */
static double median(const struct sample *x, size_t offset)
{
	double v[ROUNDS];

	for (int i = 0; i < ROUNDS; i++)
		v[i] = *(const double *)((const char *)&x[i] + offset);
	return bench_median(v, ROUNDS);
}

/* Median of the commit's CPU time, ms. */
static double measure(struct store_run *s, uint8_t *ram, uint32_t nr, int fd)
{
	struct sample x[ROUNDS];

	for (uint32_t i = 0; i < ROUNDS; i++)
		x[i] = run_round(s, ram, nr, i, fd);
#define MEDIAN(field) median(x, offsetof(struct sample, field))
	bench_note("%5u pages: put %.2f ms, commit %.2f ms (CPU %.2f; three syncs %.2f); all at "
		   "once, with the writing of %.1f MB: %.2f ms",
		   nr, MEDIAN(put), MEDIAN(commit), MEDIAN(cpu), MEDIAN(syncs),
		   nr * (double)RUN_PAGE / 1e6, MEDIAN(whole));
	return MEDIAN(cpu);
#undef MEDIAN
}

int main(void)
{
	char path[4128], sync[4128];
	const char *dir = run_dir("commit");
	uint8_t *ram = bench_guest_ram((size_t)GUEST_PAGES * RUN_PAGE, 3);
	struct epoch_stats stats;
	struct store_run s;
	double cpu;
	int fd;

	snprintf(path, sizeof(path), "%s/store", dir);
	snprintf(sync, sizeof(sync), "%s/sync", dir);
	fd = open(sync, O_RDWR | O_CREAT | O_DIRECT | O_CLOEXEC, 0600);
	if (fd < 0 || fallocate(fd, 0, 0, 3 * RUN_PAGE) || fsync(fd))
		bench_skip("commit", "%s: %s", sync, strerror(errno));
	store_run_init(&s, &(struct store_config){.dir = path, .compression = "none"});
	run_epoch(&s, ram, NULL, GUEST_PAGES, &stats);
	measure(&s, ram, 10, fd);
	cpu = measure(&s, ram, 10000, fd);
	bench_ratio("commit", cpu / GOAL_MS, BENCH_AT_MOST, 1);
	store_run_deinit(&s);
	close(fd);
	return 0;
}
