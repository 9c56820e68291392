/* SPDX-License-Identifier: MIT */
/*
 * io_uring_ring: what the writer and the reader want of an io_uring, on the thread of
 * their caller.
 */
#pragma once

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>

#include <liburing.h>

#include "snapd/util/err.h"

#define IO_ALIGN    4096u
#define DEPTH_MAX   1024u
#define RETRIES_MAX 100u /* of one request without progress */

/* Where io_uring is forbidden: an error that says what to enable. */
int ring_init(struct io_uring *ring, uint32_t depth, struct err *e);

/*
 * Push what is queued to the kernel, which may take only a part, or be short of
 * memory for a moment.  0, or an error after which the ring is of no use: what
 * it still holds could go out at any later time.  Never -EINTR or -EAGAIN.
 */
int ring_submit(struct io_uring *ring);
int ring_wait(struct io_uring *ring, struct io_uring_cqe **ret);

static inline bool is_transient(int res)
{
	return res == -EINTR || res == -EAGAIN;
}
