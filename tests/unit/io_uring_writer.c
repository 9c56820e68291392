/* SPDX-License-Identifier: MIT */
/*
 * Goal: the writer's contract: what is submitted is in the file after a barrier;
 * for each n, a failure or a shortening of the n-th write or sync has exactly the
 * documented effect; buffers obey their states; reads give what is there.
 * Method: a scratch file in the working directory (O_DIRECT where it can),
 * compared with a model; faults by the config's hook.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "snapd/io_uring_reader.h"
#include "snapd/io_uring_writer.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/rand.h"

#define BUF_BYTES 16384u
#define FILE_BUFS 24u

struct fault {
	uint32_t at, seen; /* the at-th call of its kind, counted from 1 */
	bool syncs;	   /* count syncs, not writes */
	int result;
	uint32_t times;
};

static int inject(void *opaque, int fd, uint64_t offset, size_t len)
{
	struct fault *f = opaque;

	if ((len == 0) != f->syncs)
		return 0;
	f->seen++;
	return f->seen >= f->at && f->seen < f->at + f->times ? f->result : 0;
}

static int scratch_file(const char *name)
{
	int fd = open(name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_DIRECT, 0600);

	if (fd < 0 && errno == EINVAL)
		fd = open(name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	CHECK(fd >= 0);
	unlink(name);
	return fd;
}

static void fill(uint8_t *data, size_t len, uint64_t seed)
{
	struct rand r = rand_of(seed);

	for (size_t i = 0; i + 8 <= len; i += 8)
		memcpy(data + i, &(uint64_t){rand_next(&r)}, 8);
}

static struct writer *make_writer(struct fault *f, uint32_t depth, uint32_t nr_bufs)
{
	struct writer_config config = {.depth = depth, .nr_bufs = nr_bufs, .buf_bytes = BUF_BYTES};
	struct writer *w;
	struct err e = {0};
	int r;

	if (f) {
		config.fault = inject;
		config.fault_opaque = f;
	}
	r = writer_create(&config, &w, &e);
	if (r == -EPERM || r == -ENOSYS) {
		printf("skipped: %s\n", e.text);
		exit(77);
	}
	CHECK(r == 0);
	return w;
}

/* Write the whole file, one buffer each; the first error, or 0. */
static int write_file(struct writer *w, int fd)
{
	int r = 0;

	for (uint32_t i = 0; r == 0 && i < FILE_BUFS; i++) {
		struct wbuf *b;

		r = writer_buf_get(w, &b);
		if (r < 0)
			break;
		fill(b->data, BUF_BYTES, i + 1);
		r = writer_submit(w, b, fd, (uint64_t)i * BUF_BYTES, BUF_BYTES);
	}
	return r;
}

static void check_file(int fd)
{
	uint8_t *got, want[BUF_BYTES];
	struct read_req reqs[FILE_BUFS];
	struct reader *r;

	got = mmap(NULL, FILE_BUFS * BUF_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		   -1, 0);
	CHECK(got != MAP_FAILED);
	for (uint32_t i = 0; i < FILE_BUFS; i++)
		reqs[i] = (struct read_req){.fd = fd,
					    .offset = (uint64_t)i * BUF_BYTES,
					    .dst = got + (size_t)i * BUF_BYTES,
					    .len = BUF_BYTES};
	CHECK(reader_create(5, &r, NULL) == 0);
	CHECK(reader_run(r, reqs, FILE_BUFS) == 0);
	for (uint32_t i = 0; i < FILE_BUFS; i++) {
		CHECK(reqs[i].res == BUF_BYTES);
		fill(want, BUF_BYTES, i + 1);
		CHECK(memcmp(want, got + (size_t)i * BUF_BYTES, BUF_BYTES) == 0);
	}
	reader_destroy(r);
	munmap(got, FILE_BUFS * BUF_BYTES);
}

static void test_plain(void)
{
	struct writer *w = make_writer(NULL, 4, 6);
	struct writer_stats stats;
	int fd = scratch_file("writer-plain");

	for (int round = 0; round < 3; round++) {
		CHECK(write_file(w, fd) == 0);
		CHECK(writer_barrier(w, NULL) == 0);
		check_file(fd);
	}
	CHECK(writer_barrier(w, NULL) == 0);
	writer_get_stats(w, &stats);
	CHECK(stats.writes == 3 * FILE_BUFS && stats.bytes == 3ull * FILE_BUFS * BUF_BYTES);
	CHECK(stats.syncs == 3);
	writer_destroy(w);
	close(fd);
}

/* The n-th write or sync fails: the barrier says so, nothing goes on before a
 * reset, and after it all is as new. */
static void test_failed(bool syncs, uint32_t at, int error)
{
	struct fault f = {.at = at, .syncs = syncs, .result = error, .times = 1};
	struct writer *w = make_writer(&f, 3, 5);
	int fd = scratch_file("writer-failed");
	struct wbuf *b;
	struct err e = {0};
	int r;

	r = write_file(w, fd);
	CHECK(r == 0 || r == error);
	CHECK(writer_barrier(w, &e) == error && e.text[0]);
	CHECK(writer_buf_get(w, &b) == error);
	CHECK(writer_barrier(w, NULL) == error);
	writer_reset(w);
	CHECK(write_file(w, fd) == 0);
	CHECK(writer_barrier(w, NULL) == 0);
	check_file(fd);
	writer_destroy(w);
	close(fd);
}

/* Short, interrupted and refused-for-now writes are gone on with, to the end. */
static void test_continued(uint32_t at, int result, uint32_t times)
{
	struct fault f = {.at = at, .result = result, .times = times};
	struct writer *w = make_writer(&f, 3, 5);
	int fd = scratch_file("writer-continued");
	struct writer_stats stats;

	CHECK(write_file(w, fd) == 0);
	CHECK(writer_barrier(w, NULL) == 0);
	check_file(fd);
	writer_get_stats(w, &stats);
	CHECK(stats.writes == FILE_BUFS && (result < 0 || stats.short_writes >= times));
	CHECK(f.seen >= FILE_BUFS + times);
	writer_destroy(w);
	close(fd);
}

/* A write that never gets anywhere ends with an error, not with a hang. */
static void test_no_progress(int result, int want)
{
	struct fault f = {.at = 5, .result = result, .times = ~0u - 5};
	struct writer *w = make_writer(&f, 3, 5);
	int fd = scratch_file("writer-stuck");

	write_file(w, fd);
	CHECK(writer_barrier(w, NULL) == want);
	writer_destroy(w);
	close(fd);
}

static void test_faults(void)
{
	for (uint32_t n = 1; n <= FILE_BUFS; n++) {
		test_failed(false, n, -EIO);
		test_failed(false, n, -ENOSPC);
		test_continued(n, 4096, 1);
		test_continued(n, 12288, 1);
		test_continued(n, 5000, 2); /* ends inside a block */
		test_continued(n, 100, 3);  /* less than a block */
		test_continued(n, -EINTR, 2);
		test_continued(n, -EAGAIN, 5);
	}
	test_failed(true, 1, -EIO);
	test_no_progress(-EAGAIN, -EAGAIN);
	test_no_progress(1, -EIO);
}

/* The kernel's own errors, not injected ones. */
static void test_real_errors(void)
{
	struct writer *w = make_writer(NULL, 3, 5);
	int fd = open("/dev/full", O_RDWR | O_CLOEXEC);
	struct wbuf *b;
	struct err e = {0};

	CHECK(fd >= 0);
	CHECK(writer_buf_get(w, &b) == 0);
	writer_submit(w, b, fd, 0, BUF_BYTES);
	CHECK(writer_barrier(w, &e) == -ENOSPC && strstr(e.text, "no space"));
	writer_reset(w);
	CHECK(writer_buf_get(w, &b) == 0);
	writer_submit(w, b, -1, 0, BUF_BYTES);
	CHECK(writer_barrier(w, NULL) == -EBADF);
	writer_destroy(w);
	close(fd);
}

/* Between two barriers more files than can be registered; then their numbers are
 * given to other files, which must get what is written next. */
static void test_many_files(void)
{
	struct writer *w = make_writer(NULL, 4, 6);
	struct writer_stats stats;
	int fds[100];

	for (int round = 0; round < 3; round++) {
		for (int i = 0; i < 100; i++) {
			struct wbuf *b;

			fds[i] = scratch_file("writer-many");
			CHECK(writer_buf_get(w, &b) == 0);
			fill(b->data, BUF_BYTES, (uint64_t)round * 1000 + (uint64_t)i);
			CHECK(writer_submit(w, b, fds[i], 0, BUF_BYTES) == 0);
		}
		CHECK(writer_barrier(w, NULL) == 0);
		for (int i = 0; i < 100; i++) {
			_Alignas(4096) uint8_t got[BUF_BYTES];
			uint8_t want[BUF_BYTES];

			fill(want, BUF_BYTES, (uint64_t)round * 1000 + (uint64_t)i);
			CHECK(pread(fds[i], got, BUF_BYTES, 0) == BUF_BYTES);
			CHECK(memcmp(got, want, BUF_BYTES) == 0);
			close(fds[i]);
		}
	}
	writer_get_stats(w, &stats);
	CHECK(stats.syncs == 300);
	writer_destroy(w);
}

/* Pinned buffers keep their contents and are not handed out. */
static void test_pins(void)
{
	struct writer *w = make_writer(NULL, 2, 3);
	int fd = scratch_file("writer-pins");
	struct wbuf *kept, *b, *c;
	uint8_t want[BUF_BYTES];

	CHECK(writer_buf_get(w, &kept) == 0);
	fill(kept->data, BUF_BYTES, 99);
	writer_buf_pin(w, kept);
	writer_buf_pin(w, kept);
	CHECK(writer_submit(w, kept, fd, 0, BUF_BYTES) == 0);
	for (uint32_t i = 1; i < 20; i++) {
		CHECK(writer_buf_get(w, &b) == 0 && b != kept);
		fill(b->data, BUF_BYTES, i);
		CHECK(writer_submit(w, b, fd, (uint64_t)i * BUF_BYTES, BUF_BYTES) == 0);
	}
	CHECK(writer_barrier(w, NULL) == 0);
	fill(want, BUF_BYTES, 99);
	CHECK(memcmp(kept->data, want, BUF_BYTES) == 0);

	CHECK(writer_buf_get(w, &b) == 0 && writer_buf_get(w, &c) == 0);
	CHECK(writer_buf_get(w, &b) == -EDEADLK);
	writer_buf_unpin(w, kept);
	CHECK(writer_buf_get(w, &b) == -EDEADLK);
	writer_buf_unpin(w, kept);
	CHECK(writer_buf_get(w, &b) == 0 && b == kept);
	writer_buf_put(w, b);
	CHECK(writer_buf_get(w, &b) == 0 && b == kept);
	writer_destroy(w); /* with buffers in the caller's hands */
	close(fd);
}

/* A pin taken while the write is in flight, and dropped there again. */
static void test_pin_in_flight(void)
{
	struct writer *w = make_writer(NULL, 2, 2);
	int fd = scratch_file("writer-pin-flight");
	struct wbuf *b, *c;

	CHECK(writer_buf_get(w, &b) == 0);
	writer_buf_pin(w, b);
	CHECK(writer_submit(w, b, fd, 0, BUF_BYTES) == 0);
	writer_buf_unpin(w, b);
	CHECK(writer_barrier(w, NULL) == 0);
	CHECK(writer_buf_get(w, &b) == 0 && writer_buf_get(w, &c) == 0 && b != c);
	writer_destroy(w);
	close(fd);
}

/* ---- reads ---- */

#define GROUPS	    5u
#define GROUP_READS 16u

static uint8_t read_file[40000];
static _Alignas(4096) uint8_t read_dst[GROUPS * GROUP_READS][8192];

static void check_read(const struct read_req *q)
{
	size_t left = q->offset < sizeof(read_file) ? sizeof(read_file) - q->offset : 0;
	size_t want = q->len < left ? q->len : left;

	if (q->fd < 0 && q->len) {
		CHECK(q->res == -EBADF);
		return;
	}
	CHECK(q->res == (int)want);
	CHECK(!want || memcmp(q->dst, read_file + q->offset, want) == 0);
}

static void random_reads(struct rand *rnd, int fd, struct read_req *reqs, size_t nr, size_t first)
{
	for (size_t i = 0; i < nr; i++)
		reqs[i] = (struct read_req){.fd = rand_below(rnd, 9) ? fd : -1,
					    .res = -1,
					    .offset = rand_below(rnd, 50000),
					    .dst = read_dst[first + i],
					    .len = rand_below(rnd, 8193)};
}

/* At and over the end of a file, in any number, with bad requests between. */
static void one_group(struct rand *rnd, struct reader *r, int fd)
{
	struct read_req reqs[GROUPS * GROUP_READS];
	size_t nr = rand_below(rnd, ARRAY_SIZE(reqs) + 1);

	random_reads(rnd, fd, reqs, nr, 0);
	CHECK(reader_run(r, reqs, nr) == 0);
	for (size_t i = 0; i < nr; i++)
		check_read(&reqs[i]);
}

/* Several groups under way, of any size, waited for in any order; after each wait its group
 * has all its results. */
static void many_groups(struct rand *rnd, struct reader *r, int fd)
{
	struct read_req reqs[GROUPS][GROUP_READS];
	struct read_group groups[GROUPS];
	size_t nr[GROUPS], first = rand_below(rnd, GROUPS);

	for (size_t g = 0; g < GROUPS; g++) {
		nr[g] = rand_below(rnd, GROUP_READS + 1);
		random_reads(rnd, fd, reqs[g], nr[g], g * GROUP_READS);
		reader_queue(r, &groups[g], reqs[g], nr[g]);
	}
	for (size_t k = 0; k < GROUPS; k++) {
		size_t g = (first + k) % GROUPS;

		CHECK(reader_wait(r, &groups[g]) == 0 && !groups[g].left);
		for (size_t i = 0; i < nr[g]; i++)
			check_read(&reqs[g][i]);
		memset(&groups[g], 0xff, sizeof(groups[g])); /* the reader has no use for it */
	}
}

static void test_reads(struct rand *rnd)
{
	int fd = open("reader-file", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	struct reader *r;

	CHECK(fd >= 0);
	unlink("reader-file");
	fill(read_file, sizeof(read_file), 5);
	CHECK(pwrite(fd, read_file, sizeof(read_file), 0) == sizeof(read_file));
	CHECK(reader_create(7, &r, NULL) == 0);
	for (int round = 0; round < 50; round++) {
		one_group(rnd, r, fd);
		many_groups(rnd, r, fd);
	}
	reader_destroy(r);
	close(fd);
}

/* O_DIRECT over the end of a file whose size is no multiple of a block. */
static void test_direct_eof(void)
{
	static _Alignas(4096) uint8_t dst[16384];
	struct read_req req = {.dst = dst, .len = sizeof(dst), .offset = 4096};
	struct reader *r;

	req.fd = scratch_file("reader-eof");
	CHECK(ftruncate(req.fd, 4096 + 5000) == 0);
	CHECK(reader_create(0, &r, NULL) == 0);
	CHECK(reader_run(r, &req, 1) == 0 && req.res == 5000);
	req.offset = 1u << 20;
	CHECK(reader_run(r, &req, 1) == 0 && req.res == 0);
	reader_destroy(r);
	reader_destroy(NULL);
	close(req.fd);
}

static void test_config(void)
{
	static const struct writer_config bad[] = {
		{.depth = 100000},
		{.buf_bytes = 4097},
		{.buf_bytes = 2u << 30},
		{.nr_bufs = 1u << 30},
	};
	struct writer *w = NULL;

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		CHECK(writer_create(&bad[i], &w, NULL) == -EINVAL && !w);
	CHECK(writer_create(&(struct writer_config){0}, &w, NULL) == 0);
	writer_reset(w);
	writer_destroy(w);
	writer_destroy(NULL);
}

int main(void)
{
	struct rand r = rand_of(rand_seed());

	test_plain();
	test_faults();
	test_real_errors();
	test_many_files();
	test_pins();
	test_pin_in_flight();
	test_reads(&r);
	test_direct_eof();
	test_config();
	return 0;
}
