/* SPDX-License-Identifier: MIT */
/*
 * bench codec: what compression and encryption cost and save.
 *
 * Pages look like a heap: pointers that share their upper bits, small numbers, text,
 * gaps of zero; one in ten is noise.  First each codec alone, a page at a time on one
 * core: ratio over all pages, those that stay raw included, and MB/s of plain pages in
 * and out.  Then stores of 256 MiB of such pages, one for each codec and one encrypted:
 * the first epoch from begin to durable, and the whole read back into memory with
 * O_DIRECT.  Rounds go through all stores one after another.
 *
 * The figure: restore with lz4 against restore of raw pages, of the same round.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench/bench.h"
#include "bench/store_run.h"
#include "snapd/store/codec.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/pool.h"

#define NR_PAGES 65536u
#define ALONE	 8192u /* pages of the first part */
#define ROUNDS	 5
#define GOAL	 1.0

static const char *const codecs[] = {"lz4", "zstd:-1", "zstd:1", "zstd:3", "zstd:9"};

static const struct side {
	const char *name, *compression;
	bool encrypted;
} sides[] = {
	{"raw", "none", false},		 {"lz4", "lz4", false},
	{"zstd:1", "zstd:1", false},	 {"raw, encrypted", "none", true},
	{"lz4, encrypted", "lz4", true},
};

/* ---- pages ---- */

static void fill_object(uint64_t *p, size_t words, uint64_t *seed)
{
	static const char text[] = "the name of a thing, a path/to/it and its value=";
	uint64_t kind = bench_rand(seed);

	for (size_t i = 0; i < words; i++) {
		uint64_t v = bench_rand(seed);

		switch ((kind >> 2 * (i % 8)) % 4) {
		case 0:
			p[i] = 0x00007f3a5c000000ull | (v & 0xfffff0);
			break;
		case 1:
			p[i] = v % 1000;
			break;
		case 2:
			memcpy(&p[i], text + v % (sizeof(text) - 8), 8);
			break;
		default:
			p[i] = v % 3 ? 0 : v;
		}
	}
}

static void fill_heap(uint8_t *ram, uint32_t nr_pages)
{
	uint64_t seed = 11;

	for (uint32_t i = 0; i < nr_pages; i++) {
		uint64_t *page = (uint64_t *)(ram + (size_t)i * RUN_PAGE);

		if (i % 10 == 9)
			for (size_t k = 0; k < RUN_PAGE / 8; k++)
				page[k] = bench_rand(&seed);
		else
			for (size_t k = 0; k < RUN_PAGE / 8; k += 32)
				fill_object(page + k, 32, &seed);
	}
}

/* ---- codecs alone ---- */

static double mb_per_s(uint64_t bytes, uint64_t start)
{
	return (double)bytes * 1e3 / (double)(bench_now_ns() - start);
}

static void measure_alone(const char *name, const uint8_t *ram)
{
	_cleanup_free_ uint8_t *packed = malloc((size_t)ALONE * RUN_PAGE);
	_cleanup_free_ uint32_t *lens = calloc(ALONE, sizeof(*lens));
	static uint8_t page[RUN_PAGE];
	uint64_t stored = 0, unpacked = 0, start;
	struct codec_policy policy;
	struct codec *c;
	struct err e = {0};
	double in;

	run_check(codec_parse(name, &policy, &e), &e);
	if (!packed || !lens || codec_create(&c))
		bench_die("no memory");
	memset(packed, 1, (size_t)ALONE * RUN_PAGE);
	start = bench_now_ns();
	for (uint32_t i = 0; i < ALONE; i++) {
		lens[i] = codec_pack(c, policy, packed + (size_t)i * RUN_PAGE,
				     ram + (size_t)i * RUN_PAGE, RUN_PAGE);
		stored += lens[i] ? lens[i] : RUN_PAGE;
	}
	in = mb_per_s((uint64_t)ALONE * RUN_PAGE, start);
	start = bench_now_ns();
	for (uint32_t i = 0; i < ALONE; i++) {
		if (!lens[i])
			continue;
		run_check(codec_unpack(c, policy.codec, page, RUN_PAGE,
				       packed + (size_t)i * RUN_PAGE, lens[i], &e),
			  &e);
		unpacked += RUN_PAGE;
	}
	bench_note("%-8s %.2f x, %.0f MB/s in, %.0f MB/s out, by page on one core", name,
		   (double)ALONE * RUN_PAGE / (double)stored, in, mb_per_s(unpacked, start));
	codec_destroy(c);
}

/* ---- stores ---- */

struct figures {
	double write[ROUNDS], restore[ROUNDS];
	uint64_t stored; /* bytes */
};

static const char *make_key(const char *dir)
{
	static char path[4200];
	_cleanup_fd_ int fd = -1;

	snprintf(path, sizeof(path), "%s/key", dir);
	fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || write(fd, path, 64) != 64)
		bench_die("%s", path);
	return path;
}

static void run_side(const struct side *side, const char *dir, const uint8_t *ram, uint8_t *got,
		     struct pool *pool, uint32_t round, struct figures *f)
{
	char store[4200];
	struct store_config config = {.dir = store, .compression = side->compression, .pool = pool};
	struct epoch_stats stats;
	struct store_run s;

	snprintf(store, sizeof(store), "%s/store", dir);
	config.key_file = side->encrypted ? make_key(dir) : NULL;
	store_run_init(&s, &config);
	run_epoch(&s, ram, NULL, 0, NULL); /* a running service has its rings and buffers */
	f->write[round] = run_epoch(&s, ram, NULL, NR_PAGES, &stats);
	f->stored = stats.bytes_written;
	f->restore[round] = run_restore(&s, (struct snapd_point){s.timeline, 2}, got, NR_PAGES);
	if (memcmp(ram, got, (size_t)NR_PAGES * RUN_PAGE) != 0)
		bench_die("%s: memory is not what it was", side->name);
	store_run_deinit(&s);
}

static void report(const struct side *side, struct figures *f)
{
	double mb = (double)NR_PAGES * RUN_PAGE / 1e6;

	bench_note("store, %-15s %.2f x, written at %.0f MB/s, restored at %.0f MB/s", side->name,
		   mb * 1e6 / (double)f->stored, mb / bench_median(f->write, ROUNDS),
		   mb / bench_median(f->restore, ROUNDS));
}

int main(void)
{
	static struct figures f[ARRAY_SIZE(sides)];
	const char *dir = run_dir("codec");
	uint8_t *ram = bench_guest_ram((size_t)NR_PAGES * RUN_PAGE, 1);
	uint8_t *got = bench_guest_ram((size_t)NR_PAGES * RUN_PAGE, 2);
	double ratio[ROUNDS];
	struct pool *pool;

	if (pool_create(0, &pool))
		bench_die("no threads");
	fill_heap(ram, NR_PAGES);
	for (size_t i = 0; i < ARRAY_SIZE(codecs); i++)
		measure_alone(codecs[i], ram);
	for (uint32_t round = 0; round < ROUNDS; round++) {
		for (size_t i = 0; i < ARRAY_SIZE(sides); i++)
			run_side(&sides[i], dir, ram, got, pool, round, &f[i]);
		ratio[round] = f[0].restore[round] / f[1].restore[round];
	}
	for (size_t i = 0; i < ARRAY_SIZE(sides); i++)
		report(&sides[i], &f[i]);
	bench_ratio("codec", bench_median(ratio, ROUNDS), BENCH_AT_LEAST, GOAL);
	pool_destroy(pool);
	return 0;
}
