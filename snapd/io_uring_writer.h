/* SPDX-License-Identifier: MIT */
/*
 * io_uring_writer: buffers → files, through one io_uring with registered buffers
 * and files, O_DIRECT.  One writer belongs to one thread at a time.
 *
 * Buffer ownership: writer_buf_get() hands a buffer to the caller; writer_submit()
 * hands it back, to the kernel first; it is free again after its completion was
 * reaped (inside get, submit, or barrier), unless the caller pinned it.
 *
 * Order: nothing is promised between writes.  writer_barrier() returns after
 * every write so far is complete and every file written since the last barrier
 * was fdatasync()ed.  A short write is continued; a failed write makes that
 * barrier, and every call until writer_reset(), fail with its error: what was
 * submitted since the last good barrier must be taken for not written.
 *
 * io_uring forbidden (kernel.io_uring_disabled, seccomp): writer_create() fails
 * with a reason that says what to enable.  RLIMIT_MEMLOCK too small to register
 * the buffers: logged once, and they are written unregistered.
 *
 * A thread must not end while writes of its own are in flight: the kernel cancels
 * them.  Barrier or reset first.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "snapd/util/err.h"

struct writer;

struct writer_config {
	uint32_t depth;	    /* writes in flight; 0: 8 */
	uint32_t nr_bufs;   /* 0: depth + 4 */
	uint32_t buf_bytes; /* 0: 1 MiB; a multiple of 4096 */
	/* Fault injection for tests: called before each write is queued; a negative
	 * return is taken as the write's result, a positive one shortens it.  Called
	 * with len 0 before each fdatasync; a negative return is its result. */
	int (*fault)(void *opaque, int fd, uint64_t offset, size_t len);
	void *fault_opaque;
};

struct wbuf {
	uint8_t *data; /* buf_bytes, page aligned */
	uint32_t index;
	uint32_t pins; /* > 0: keep after completion; see writer_pin() */
};

int writer_create(const struct writer_config *config, struct writer **ret, struct err *e);
void writer_destroy(struct writer *w); /* waits for what is in flight */

/* A free buffer; waits for a completion when there is none.  -EDEADLK when all
 * are pinned or in the caller's hands. */
int writer_buf_get(struct writer *w, struct wbuf **ret);
void writer_buf_put(struct writer *w, struct wbuf *buf); /* unused: give it back */
/* Keep the contents readable after the write (recent-page cache). */
void writer_buf_pin(struct writer *w, struct wbuf *buf);
void writer_buf_unpin(struct writer *w, struct wbuf *buf);

/* Write buf[0, len) at `offset` of `fd` (open with O_DIRECT; all multiples of
 * 4096).  fd must stay open until the next barrier.  Takes the buffer. */
int writer_submit(struct writer *w, struct wbuf *buf, int fd, uint64_t offset, size_t len);
/* Everything so far durable, or the first error since the last good barrier. */
int writer_barrier(struct writer *w, struct err *e);
/* Wait for what is in flight, forget errors (but not that the ring itself broke). */
void writer_reset(struct writer *w);

struct writer_stats {
	uint64_t writes, bytes, short_writes, syncs;
	uint64_t wait_ns; /* time in which the caller waited for a buffer or barrier */
};
void writer_get_stats(const struct writer *w, struct writer_stats *ret);
