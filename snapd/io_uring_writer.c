/* SPDX-License-Identifier: MIT */
/*
 * io_uring_writer: caller's buffers → segment files, and batched reads back.
 * On the thread of its caller; a thread must not end with writes of its own in
 * flight (the kernel would cancel them): barrier or reset first.
 *
 * A buffer is in one of these states:
 *   FREE    on the free list
 *   CALLER  handed out by writer_buf_get()
 *   FLIGHT  with the kernel, until its write is complete or failed
 *   KEPT    written, and pinned by the caller
 *
 *   get FREE→CALLER   put CALLER→FREE   submit CALLER→FLIGHT
 *   completion FLIGHT→FREE, or →KEPT when pinned   last unpin KEPT→FREE
 *
 * W1  nr_flight counts the buffers in FLIGHT, is at most depth, and so bounds
 *     the ring's queues.
 * W2  A file is in `files` from its first write until it was fdatasync()ed after
 *     its last write, or the writer was reset.
 * W3  fdatasync is queued only when nothing is in flight: a write that fell short
 *     and was continued would otherwise come after the flush that was to cover it
 *     (IOSQE_IO_DRAIN cannot know of continuations).
 * W4  `error` is the first failure since the last good barrier; while it is set
 *     nothing new is queued.
 * W5  `broken` is set when the ring itself failed.  It is never cleared: requests
 *     that the ring still holds must not reach the disk after their buffers were
 *     given to someone else.
 *
 * Files are registered from their first write to the barrier, no longer: after
 * that the caller may close the descriptor and its number may mean another file.
 *
 * Where RLIMIT_MEMLOCK is too small to register the buffers, writes go out from
 * plain memory: it costs CPU (the pages are pinned for each write), no safety.
 */
#include "snapd/io_uring_writer.h"

#include <assert.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "snapd/io_uring_ring.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"

#define FILES_MAX      64u /* between two barriers; beyond, a barrier comes early */
#define FIXED_BUFS_MAX 16384u

enum buf_state { BUF_FREE, BUF_CALLER, BUF_FLIGHT, BUF_KEPT };

struct op {
	struct wbuf buf;
	enum buf_state state;
	uint32_t next_free; /* while FREE: index + 1 of the next, 0 at the end */
	/* While FLIGHT: */
	uint32_t file;
	uint32_t retries;
	uint64_t offset;
	size_t len, done;
};

struct file {
	int fd; /* borrowed until the barrier */
	bool fixed;
	bool synced;
};

struct writer {
	struct writer_config config;
	struct io_uring ring;
	uint8_t *memory; /* owned, nr_bufs × buf_bytes */
	struct op *ops;	 /* owned, nr_bufs */
	uint32_t free;	 /* index + 1 of the first, 0: none */
	uint32_t nr_flight;
	struct file files[FILES_MAX]; /* index = registered slot */
	uint32_t nr_files;
	bool fixed_bufs, fixed_files, ring_ready;
	int error, broken; /* -errno */
	struct writer_stats stats;
};

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* ---- buffers ---- */

static struct op *op_of(struct wbuf *buf)
{
	return (struct op *)((char *)buf - offsetof(struct op, buf));
}

static void free_buf(struct writer *w, struct op *op)
{
	op->state = BUF_FREE;
	op->next_free = w->free;
	w->free = op->buf.index + 1;
}

static void release_buf(struct writer *w, struct op *op)
{
	if (op->buf.pins)
		op->state = BUF_KEPT;
	else
		free_buf(w, op);
}

/* ---- writes ---- */

static void set_error(struct writer *w, int error)
{
	if (!w->error)
		w->error = error;
}

static void set_broken(struct writer *w, int error)
{
	w->broken = error;
	set_error(w, error);
}

static void finish_write(struct writer *w, struct op *op, int error)
{
	assert(op->state == BUF_FLIGHT && w->nr_flight);
	if (error)
		set_error(w, error);
	w->nr_flight--;
	release_buf(w, op);
}

static void prep_write(struct writer *w, struct op *op, size_t len)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&w->ring);
	const struct file *f = &w->files[op->file];
	int fd = f->fixed ? (int)op->file : f->fd;
	const uint8_t *data = op->buf.data + op->done;

	assert(sqe); /* W1 */
	if (w->fixed_bufs)
		io_uring_prep_write_fixed(sqe, fd, data, (unsigned int)len, op->offset + op->done,
					  (int)op->buf.index);
	else
		io_uring_prep_write(sqe, fd, data, (unsigned int)len, op->offset + op->done);
	if (f->fixed)
		sqe->flags |= IOSQE_FIXED_FILE;
	io_uring_sqe_set_data(sqe, op);
}

/*
 * Queue what is left of op's write.  1: queued; else its result is known: 0
 * nothing was written (an injected short write of less than a block), or -errno.
 */
static int queue_write(struct writer *w, struct op *op)
{
	size_t len = op->len - op->done;
	int cut = 0, r;

	if (w->config.fault)
		cut = w->config.fault(w->config.fault_opaque, w->files[op->file].fd,
				      op->offset + op->done, len);
	if (cut < 0)
		return cut;
	if (cut && (size_t)cut < len) {
		len = (size_t)cut / IO_ALIGN * IO_ALIGN;
		if (!len)
			return 0;
	}
	prep_write(w, op, len);
	r = ring_submit(&w->ring);
	if (r < 0)
		set_broken(w, r);
	return r < 0 ? r : 1;
}

/*
 * Take `res`, the result of a write; true when op needs another write for the
 * rest.  A part of a block counts as not written: O_DIRECT could not go on there.
 */
static bool advance_write(struct writer *w, struct op *op, int res)
{
	size_t done;

	if (res < 0 && !is_transient(res)) {
		finish_write(w, op, res);
		return false;
	}
	done = res > 0 ? (size_t)res : 0;
	if (op->done + done >= op->len) {
		w->stats.writes++;
		w->stats.bytes += op->len;
		finish_write(w, op, 0);
		return false;
	}
	if (res >= 0)
		w->stats.short_writes++;
	done = done / IO_ALIGN * IO_ALIGN;
	op->done += done;
	op->retries = done ? 0 : op->retries + 1;
	if (op->retries > RETRIES_MAX) {
		finish_write(w, op, res < 0 ? res : -EIO);
		return false;
	}
	return true;
}

/* Start or go on with op's write until the kernel has it or it ended. */
static void drive_write(struct writer *w, struct op *op)
{
	int r;

	do
		r = queue_write(w, op);
	while (r <= 0 && advance_write(w, op, r));
}

static void take_completion(struct writer *w, struct io_uring_cqe *cqe)
{
	struct op *op = io_uring_cqe_get_data(cqe);
	int res = cqe->res;

	io_uring_cqe_seen(&w->ring, cqe);
	assert(op >= w->ops && op < w->ops + w->config.nr_bufs);
	if (advance_write(w, op, res))
		drive_write(w, op);
}

static void reap_ready(struct writer *w)
{
	struct io_uring_cqe *cqe;

	while (w->nr_flight && io_uring_peek_cqe(&w->ring, &cqe) == 0)
		take_completion(w, cqe);
}

/* Wait for one completion; -errno only when the ring itself is broken. */
static int wait_one(struct writer *w)
{
	struct io_uring_cqe *cqe;
	uint64_t start = now_ns();
	int r;

	r = ring_wait(&w->ring, &cqe);
	w->stats.wait_ns += now_ns() - start;
	if (r < 0) {
		set_broken(w, r);
		return r;
	}
	take_completion(w, cqe);
	return 0;
}

static void wait_all(struct writer *w)
{
	while (w->nr_flight && !w->broken && wait_one(w) == 0)
		;
}

/* ---- files ---- */

static void register_file(struct writer *w, uint32_t slot)
{
	struct file *f = &w->files[slot];

	f->fixed = w->fixed_files && io_uring_register_files_update(&w->ring, slot, &f->fd, 1) == 1;
}

static void forget_files(struct writer *w)
{
	int none[FILES_MAX];

	if (w->fixed_files && w->nr_files) {
		memset(none, -1, sizeof(none));
		io_uring_register_files_update(&w->ring, 0, none, w->nr_files);
	}
	w->nr_files = 0;
}

static void prep_sync(struct writer *w, uint32_t slot)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&w->ring);
	const struct file *f = &w->files[slot];

	assert(sqe);
	io_uring_prep_fsync(sqe, f->fixed ? (int)slot : f->fd, IORING_FSYNC_DATASYNC);
	if (f->fixed)
		sqe->flags |= IOSQE_FIXED_FILE;
	io_uring_sqe_set_data64(sqe, slot);
}

/* Queue an fdatasync of each file from `slot` on that is not synced yet, as many
 * as fit; returns how many are under way, or -errno. */
static int queue_syncs(struct writer *w)
{
	int nr = 0, r;

	for (uint32_t i = 0; i < w->nr_files && (uint32_t)nr < w->config.depth; i++) {
		if (w->files[i].synced)
			continue;
		if (w->config.fault) {
			r = w->config.fault(w->config.fault_opaque, w->files[i].fd, 0, 0);
			if (r < 0) {
				set_error(w, r);
				break;
			}
		}
		prep_sync(w, i);
		nr++;
	}
	r = ring_submit(&w->ring);
	return r < 0 ? r : nr;
}

static void take_sync(struct writer *w, struct io_uring_cqe *cqe)
{
	struct file *f = &w->files[cqe->user_data];

	if (cqe->res >= 0) {
		f->synced = true;
		w->stats.syncs++;
	} else if (!is_transient(cqe->res)) {
		set_error(w, cqe->res);
	}
	io_uring_cqe_seen(&w->ring, cqe);
}

/* fdatasync every file written since the last good barrier (W3: nothing is in
 * flight). */
static void sync_files(struct writer *w)
{
	struct io_uring_cqe *cqe;
	int nr;

	assert(!w->nr_flight);
	while (!w->error && (nr = queue_syncs(w)) != 0) {
		int r = nr < 0 ? nr : 0;

		for (; nr > 0 && r == 0; nr--) {
			r = ring_wait(&w->ring, &cqe);
			if (r == 0)
				take_sync(w, cqe);
		}
		if (r < 0)
			set_broken(w, r);
	}
}

static int flush(struct writer *w)
{
	uint64_t start, waited;

	wait_all(w);
	start = now_ns();
	waited = w->stats.wait_ns;
	if (!w->error)
		sync_files(w);
	w->stats.wait_ns = waited + now_ns() - start;
	if (w->error)
		return w->error;
	forget_files(w);
	return 0;
}

/* The slot of fd in `files`, added if need be. */
static int obtain_file(struct writer *w, int fd, uint32_t *ret)
{
	int r;

	for (uint32_t i = 0; i < w->nr_files; i++)
		if (w->files[i].fd == fd) {
			*ret = i;
			return 0;
		}
	if (w->nr_files == FILES_MAX) {
		r = flush(w);
		if (r < 0)
			return r;
	}
	*ret = w->nr_files++;
	w->files[*ret] = (struct file){.fd = fd};
	register_file(w, *ret);
	return 0;
}

/* ---- the interface ---- */

static int check_config(struct writer_config *c, struct err *e)
{
	c->depth = c->depth ? c->depth : 8;
	c->nr_bufs = c->nr_bufs ? c->nr_bufs : c->depth + 4;
	c->buf_bytes = c->buf_bytes ? c->buf_bytes : 1u << 20;
	if (c->depth > DEPTH_MAX || c->nr_bufs > FIXED_BUFS_MAX || c->buf_bytes % IO_ALIGN ||
	    c->buf_bytes > 1u << 30)
		return err_set(e, EINVAL, "writer: depth %u, %u buffers of %u bytes: out of range",
			       c->depth, c->nr_bufs, c->buf_bytes);
	return 0;
}

static int alloc_bufs(struct writer *w, struct err *e)
{
	size_t bytes = (size_t)w->config.nr_bufs * w->config.buf_bytes;

	w->ops = calloc(w->config.nr_bufs, sizeof(*w->ops));
	if (!w->ops)
		return err_set(e, ENOMEM, "no memory for the writer");
	w->memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (w->memory == MAP_FAILED) {
		w->memory = NULL;
		return err_errno(e, errno, "writer buffers of %zu bytes", bytes);
	}
	madvise(w->memory, bytes, MADV_HUGEPAGE); /* fewer TLB misses while filling them */
	for (uint32_t i = w->config.nr_bufs; i--;) {
		w->ops[i].buf.data = w->memory + (size_t)i * w->config.buf_bytes;
		w->ops[i].buf.index = i;
		free_buf(w, &w->ops[i]);
	}
	return 0;
}

static void register_bufs(struct writer *w)
{
	struct iovec *iov = calloc(w->config.nr_bufs, sizeof(*iov));
	int r = -ENOMEM;

	if (iov) {
		for (uint32_t i = 0; i < w->config.nr_bufs; i++)
			iov[i] = (struct iovec){w->ops[i].buf.data, w->config.buf_bytes};
		r = io_uring_register_buffers(&w->ring, iov, w->config.nr_bufs);
		free(iov);
	}
	w->fixed_bufs = r == 0;
	if (r < 0)
		log_notice(
			"writing from unregistered buffers (%s): raise LimitMEMLOCK= of the unit "
			"(`ulimit -l`) above %u MiB to save CPU",
			strerror(-r),
			(uint32_t)((uint64_t)w->config.nr_bufs * w->config.buf_bytes >> 20));
}

int writer_create(const struct writer_config *config, struct writer **ret, struct err *e)
{
	struct writer *w = calloc(1, sizeof(*w));
	int r;

	if (!w)
		return err_set(e, ENOMEM, "no memory for the writer");
	w->config = *config;
	r = check_config(&w->config, e);
	if (r == 0)
		r = ring_init(&w->ring, w->config.depth, e);
	w->ring_ready = r == 0;
	if (r == 0)
		r = alloc_bufs(w, e);
	if (r < 0) {
		writer_destroy(w);
		return r;
	}
	register_bufs(w);
	w->fixed_files = io_uring_register_files_sparse(&w->ring, FILES_MAX) == 0;
	*ret = w;
	return 0;
}

void writer_destroy(struct writer *w)
{
	if (!w)
		return;
	if (w->ring_ready) {
		wait_all(w);
		io_uring_queue_exit(&w->ring);
	}
	if (w->memory)
		munmap(w->memory, (size_t)w->config.nr_bufs * w->config.buf_bytes);
	free(w->ops);
	free(w);
}

int writer_buf_get(struct writer *w, struct wbuf **ret)
{
	struct op *op;

	reap_ready(w);
	while (!w->error && !w->free) {
		if (!w->nr_flight)
			return -EDEADLK;
		wait_one(w);
	}
	if (w->error)
		return w->error;
	op = &w->ops[w->free - 1];
	w->free = op->next_free;
	op->state = BUF_CALLER;
	*ret = &op->buf;
	return 0;
}

void writer_buf_put(struct writer *w, struct wbuf *buf)
{
	struct op *op = op_of(buf);

	assert(op->state == BUF_CALLER);
	release_buf(w, op);
}

void writer_buf_pin(struct writer *w, struct wbuf *buf)
{
	assert(op_of(buf)->state != BUF_FREE);
	buf->pins++;
}

void writer_buf_unpin(struct writer *w, struct wbuf *buf)
{
	struct op *op = op_of(buf);

	assert(buf->pins);
	if (--buf->pins == 0 && op->state == BUF_KEPT)
		free_buf(w, op);
}

int writer_submit(struct writer *w, struct wbuf *buf, int fd, uint64_t offset, size_t len)
{
	struct op *op = op_of(buf);
	int r = 0;

	assert(op->state == BUF_CALLER);
	assert(len && len <= w->config.buf_bytes && !(len % IO_ALIGN) && !(offset % IO_ALIGN));
	reap_ready(w);
	while (!w->error && w->nr_flight >= w->config.depth)
		wait_one(w);
	if (!w->error)
		r = obtain_file(w, fd, &op->file);
	if (w->error || r < 0) {
		release_buf(w, op);
		return w->error ? w->error : r;
	}
	op->state = BUF_FLIGHT;
	op->offset = offset;
	op->len = len;
	op->done = 0;
	op->retries = 0;
	w->nr_flight++;
	drive_write(w, op);
	return w->error;
}

int writer_barrier(struct writer *w, struct err *e)
{
	int r = flush(w);

	if (r == -ENOSPC)
		return err_set(e, ENOSPC, "no space left on the store's disk");
	return r < 0 ? err_errno(e, -r, "writing to the store") : 0;
}

void writer_reset(struct writer *w)
{
	wait_all(w);
	forget_files(w);
	w->error = w->broken;
}

void writer_get_stats(const struct writer *w, struct writer_stats *ret)
{
	*ret = w->stats;
}
