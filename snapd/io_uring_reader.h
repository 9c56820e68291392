/* SPDX-License-Identifier: MIT */
/*
 * io_uring_reader: batched reads through one io_uring, with the writer's rules: one
 * thread at a time; up to `depth` at once, coalescing is the caller's.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "snapd/util/err.h"

/* Every request gets its result in `res` (bytes or -errno); a short read at the end of a
 * file is not an error here. */
struct read_req {
	int fd;
	int res;
	uint64_t offset;
	void *dst; /* page aligned when fd is O_DIRECT */
	size_t len;
};
struct reader;
int reader_create(uint32_t depth, struct reader **ret, struct err *e); /* depth 0: 32 */
/* No group may be under way, unless reader_wait() failed. */
void reader_destroy(struct reader *r);

/* Requests that are waited for together; several groups may be under way.  The reader's
 * from reader_queue() until reader_wait() returned, the requests and their memory, too. */
struct read_group {
	struct read_req *reqs;
	size_t nr;
	size_t next; /* to be started */
	size_t left; /* without a result */
	struct read_group *behind;
};
/* Started in the order in which groups were queued, as many as `depth` allows. */
void reader_queue(struct reader *r, struct read_group *g, struct read_req *reqs, size_t nr);
/* 0 when every request of the group has its result.  Else the ring is broken, and so is
 * every later call; what was under way may still write to its memory until the reader is
 * destroyed. */
int reader_wait(struct reader *r, struct read_group *g);
/* Both. */
int reader_run(struct reader *r, struct read_req *reqs, size_t nr);
