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

#include "snapd/io_uring_writer.h"
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

int main(void)
{
	test_plain();
	return 0;
}
