/* SPDX-License-Identifier: MIT */
/*
 * bench write: unique pages from guest RAM to durable segments, against fio writing
 * as many bytes sequentially with O_DIRECT to the same disk.
 *
 * Ours, through the whole store: each page copied, tested for zero and hashed,
 * looked up for duplicates, put in a batch; segments made as needed; fdatasync,
 * manifest, index commit: all of it timed, from epoch_begin() to the end of
 * epoch_commit().  Beside it the writer alone: batches, and one barrier at the end.
 *
 * fio: 1 MiB blocks, depth 8, io_uring, one file, its own bandwidth figure.  Space
 * for it and for the writer alone is allocated and synced before the clock starts:
 * *fresh*, by fallocate only, or *recycled*, written before.  The store allocates
 * its own within the time, fresh.  Rounds alternate between the sides.  Both sides
 * remove their files after a round, so that neither writes to parts of the disk that
 * the host behind a virtual disk has yet to allocate, when the other does not.
 *
 * Then figures without a goal, on a guest of 256 MiB: the latency of small epochs
 * beside three fdatasync()s, as many as a commit has to wait for one after another;
 * and pages that turn out to be stored already: read back and compared.
 *
 * SNAPD_BENCH_DIR names a directory on the disk to measure; 4 GiB must be free.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jansson.h>

#include "bench/bench.h"
#include "bench/store_run.h"
#include "snapd/io_uring_writer.h"
#include "snapd/store/pageid.h"
#include "snapd/store/segment.h"
#include "snapd/util/cleanup.h"

#define PAGE	     4096u
#define RAM_BYTES    (1ul << 30)
#define NR_PAGES     (RAM_BYTES / PAGE)
#define PER_SEG	     ((SEG_BYTES_DEFAULT - FMT_BLOCK) / BATCH_BYTES_MAX) /* whole batches */
#define NR_BATCHES   DIV_ROUND_UP(NR_PAGES, BATCH_PAGES_MAX)
#define NR_SEGS	     DIV_ROUND_UP(NR_BATCHES, PER_SEG)
#define ROUNDS	     7
#define STORE_ROUNDS 5
#define GOAL	     0.85

static struct page_secret secret;
static const char *dir;

static const char *path_of(const char *name, unsigned int n)
{
	static char path[4128];

	snprintf(path, sizeof(path), "%s/%s%u", dir, name, n);
	return path;
}

/* ---- ours ---- */

struct segments {
	int fd[NR_SEGS];
};

/* An open file with its space allocated, and that on disk. */
static int prepare_file(const char *path, uint64_t bytes)
{
	int fd = open(path, O_RDWR | O_CREAT | O_DIRECT | O_CLOEXEC, 0600);

	if (fd < 0)
		bench_skip("write", "%s: %s", path, strerror(errno));
	errno = posix_fallocate(fd, 0, (off_t)bytes);
	if (errno)
		bench_skip("write", "%s: %s", path, strerror(errno));
	fsync(fd);
	return fd;
}

static void open_segments(struct segments *s)
{
	for (unsigned int i = 0; i < NR_SEGS; i++)
		s->fd[i] = prepare_file(path_of("seg", i), SEG_BYTES_DEFAULT);
}

static void close_segments(struct segments *s, bool forget)
{
	for (unsigned int i = 0; i < NR_SEGS; i++) {
		close(s->fd[i]);
		if (forget)
			unlink(path_of("seg", i));
	}
}

/* Pages [first, first + nr) of RAM as a batch at `buf`; its length in bytes. */
static size_t make_batch(uint8_t *buf, const uint8_t *ram, uint32_t first, uint32_t nr)
{
	uint32_t header_bytes = batch_header_bytes(nr);
	struct batch_header *h = (struct batch_header *)buf;
	struct batch_page *p = (struct batch_page *)(h + 1);

	memset(buf, 0, header_bytes);
	for (uint32_t i = 0; i < nr; i++) {
		const uint8_t *src = ram + (size_t)(first + i) * PAGE;
		struct pageid id = pageid_copy_ahead(&secret, buf + header_bytes + (size_t)i * PAGE,
						     src, src + PAGE, PAGE);

		p[i] = (struct batch_page){id.lo, id.hi, first + i, i * PAGE, PAGE << 8};
	}
	h->type = BATCH_PAGES;
	h->page_shift = 12;
	h->header_bytes = header_bytes;
	h->nr_entries = nr;
	h->payload_bytes = (uint64_t)nr * PAGE;
	batch_seal(h);
	return header_bytes + (size_t)nr * PAGE;
}

/* Seconds. */
static double run_writer(struct writer *w, const struct segments *s, const uint8_t *ram)
{
	uint64_t start = bench_now_ns();
	struct err e = {0};
	int r = 0;

	for (uint32_t b = 0; r == 0 && b < NR_BATCHES; b++) {
		uint32_t first = b * BATCH_PAGES_MAX;
		uint64_t offset = FMT_BLOCK + (uint64_t)(b % PER_SEG) * BATCH_BYTES_MAX;
		struct wbuf *buf;
		size_t len;

		r = writer_buf_get(w, &buf);
		if (r < 0)
			break;
		len = make_batch(buf->data, ram, first, MIN(BATCH_PAGES_MAX, NR_PAGES - first));
		r = writer_submit(w, buf, s->fd[b / PER_SEG], offset, len);
	}
	r = writer_barrier(w, &e);
	if (r < 0)
		bench_die("%s", e.text);
	return (double)(bench_now_ns() - start) / 1e9;
}

/* ---- fio ---- */

static double parse_fio(FILE *out)
{
	json_error_t je;
	json_t *root = json_loadf(out, JSON_DISABLE_EOF_CHECK, &je);
	json_t *job = json_array_get(json_object_get(root, "jobs"), 0);
	double bw = json_number_value(json_object_get(json_object_get(job, "write"), "bw_bytes"));

	json_decref(root);
	return bw;
}

/* Seconds for RAM_BYTES at fio's bandwidth. */
static double run_fio(bool recycled)
{
	char command[4608];
	FILE *out;
	double bw;

	snprintf(command, sizeof(command),
		 "fio --name=bench --filename='%s' --rw=write --bs=1M --iodepth=8 --direct=1 "
		 "--ioengine=io_uring --size=%lu --end_fsync=1 --fallocate=none "
		 "--output-format=json 2>/dev/null",
		 path_of("fio", 0), RAM_BYTES);
	if (!recycled)
		unlink(path_of("fio", 0));
	close(prepare_file(path_of("fio", 0), RAM_BYTES));
	out = popen(command, "r");
	bw = out ? parse_fio(out) : 0;
	if (!out || pclose(out) != 0 || bw <= 0)
		bench_skip("write", "fio does not run here");
	return (double)RAM_BYTES / bw;
}

static void report(const char *what, double *ours, double *fio, size_t nr, double ratio)
{
	bench_note("%-22s %5.0f MB/s, fio %5.0f MB/s, ratio %.2f", what,
		   RAM_BYTES / 1e6 / bench_median(ours, nr),
		   RAM_BYTES / 1e6 / bench_median(fio, nr), ratio);
}

/* ---- the store ---- */

/* A whole guest as the first epoch of a timeline, of contents never seen before. */
static double run_store(const uint8_t *ram)
{
	struct epoch_stats stats;
	struct store_run s;
	double seconds;

	store_run_init(&s,
		       &(struct store_config){.dir = path_of("store", 0), .compression = "none"});
	run_epoch(&s, ram, NULL, 0, &stats); /* a running service has its rings and buffers */
	seconds = run_epoch(&s, ram, NULL, NR_PAGES, &stats);
	if (stats.stored != NR_PAGES)
		bench_die("only %lu pages were unique", (unsigned long)stats.stored);
	store_run_deinit(&s);
	return seconds;
}

static double measure_store(const uint8_t *ram)
{
	double ours[STORE_ROUNDS], fio[STORE_ROUNDS], ratio[STORE_ROUNDS], r;

	for (unsigned int i = 0; i < STORE_ROUNDS; i++) {
		ours[i] = run_store(ram);
		fio[i] = run_fio(false);
		ratio[i] = fio[i] / ours[i];
	}
	r = bench_median(ratio, STORE_ROUNDS);
	report("fresh, store", ours, fio, STORE_ROUNDS, r);
	return r;
}

/* ---- epochs of a guest of 256 MiB ---- */

#define GUEST_PAGES 65536u
#define EPOCHS	    21

static void change_pages(uint8_t *ram, const uint32_t *index, uint32_t nr, uint64_t *seed)
{
	for (uint32_t i = 0; i < nr; i++)
		*(uint64_t *)(ram + (size_t)index[i] * PAGE) = bench_rand(seed);
}

/* Seconds of three small writes, each made durable. */
static double run_syncs(int fd, const uint8_t *block)
{
	uint64_t start = bench_now_ns();

	for (int i = 0; i < 3; i++)
		if (pwrite(fd, block, PAGE, (off_t)(i * PAGE)) != PAGE || fdatasync(fd))
			bench_die("%s", strerror(errno));
	return (double)(bench_now_ns() - start) / 1e9;
}

static void measure_latency(struct store_run *s, uint8_t *ram, uint32_t nr)
{
	double seconds[EPOCHS], syncs[EPOCHS], median;
	int fd = prepare_file(path_of("sync", 0), 3 * PAGE);
	struct epoch_stats stats;
	uint64_t seed = nr;

	for (uint32_t i = 0; i < EPOCHS; i++) {
		uint32_t *index = bench_scattered(nr, GUEST_PAGES, i + 1);

		change_pages(ram, index, nr, &seed);
		seconds[i] = run_epoch(s, ram, index, nr, &stats);
		syncs[i] = run_syncs(fd, ram);
		free(index);
	}
	close(fd);
	median = bench_median(seconds, EPOCHS);
	bench_note("epoch of %u changed pages: %.2f ms (best %.2f); three fdatasync %.2f ms", nr,
		   1e3 * median, 1e3 * seconds[0], 1e3 * bench_median(syncs, EPOCHS));
}

static void measure_same(struct store_run *s, const uint8_t *ram, const char *what,
			 const uint32_t *index, uint32_t nr)
{
	struct epoch_stats stats;
	double seconds = run_epoch(s, ram, index, nr, &stats);

	bench_note("epoch of %u pages, %s: %.2f us/page; %lu read back", nr, what,
		   1e6 * seconds / nr, (unsigned long)stats.read_back);
}

static void measure_epochs(uint8_t *ram)
{
	uint32_t *index = bench_scattered(50000, GUEST_PAGES, 5);
	struct epoch_stats stats;
	struct store_run s;

	store_run_init(&s,
		       &(struct store_config){.dir = path_of("store", 0), .compression = "none"});
	run_epoch(&s, ram, NULL, GUEST_PAGES, &stats);
	measure_same(&s, ram, "all unchanged", index, 50000);
	measure_latency(&s, ram, 10);
	measure_latency(&s, ram, 10000);
	memset(ram, 0, (size_t)GUEST_PAGES * PAGE);
	measure_same(&s, ram, "all zero now", index, 50000);
	measure_same(&s, ram, "all zero as before", index, 50000);
	free(index);
	store_run_deinit(&s);
}

static double measure_writer(struct writer *w, const uint8_t *ram, bool recycled)
{
	double ours[ROUNDS], fio[ROUNDS], ratio[ROUNDS], r;
	struct segments s;

	for (int i = 0; i < ROUNDS; i++) {
		open_segments(&s);
		if (recycled && i == 0) {
			run_writer(w, &s, ram);
			run_fio(true);
		}
		ours[i] = run_writer(w, &s, ram);
		close_segments(&s, !recycled);
		fio[i] = run_fio(recycled);
		ratio[i] = fio[i] / ours[i];
	}
	r = bench_median(ratio, ROUNDS);
	report(recycled ? "recycled, writer alone" : "fresh, writer alone", ours, fio, ROUNDS, r);
	return r;
}

int main(void)
{
	struct writer *w;
	struct err e = {0};
	uint8_t *ram;

	dir = run_dir("write");
	if (writer_create(&(struct writer_config){0}, &w, &e) < 0)
		bench_skip("write", "%s", e.text);
	for (size_t i = 0; i < sizeof(secret.b); i++)
		secret.b[i] = (uint8_t)bench_rand(&(uint64_t){i});
	ram = bench_guest_ram(RAM_BYTES, 3);
	measure_writer(w, ram, true);
	measure_writer(w, ram, false);
	writer_destroy(w);
	bench_ratio("write", measure_store(ram), BENCH_AT_LEAST, GOAL);
	measure_epochs(ram);
	return 0;
}
