/* SPDX-License-Identifier: MIT */
/*
 * wire: JSON objects, one a line, over a Unix stream socket, with a deadline on everything.
 * Bytes that QEMU wrote enter; objects leave.  One thread.
 *
 * The first failure other than a deadline without loss is final ("dead"): a line half
 * written, a hang-up, a line of more than QMP_LINE_MAX bytes, what is not a JSON object.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "snapd/util/err.h"

struct wire {
	int fd; /* owned; -1 once dead */
	char *buf;
	size_t len, cap;
	size_t searched;  /* no newline before this */
	struct err death; /* why it is dead */
};

/* Takes `fd` over. */
void wire_init(struct wire *w, int fd);
void wire_deinit(struct wire *w);

uint64_t wire_now_ns(void);

/* Hang up for good: `reason` is what every later call says, too.  Returns -code. */
int wire_kill(struct wire *w, int code, const char *reason, struct err *e);

/* Send `text` (whole lines), with a descriptor when passed_fd >= 0 (borrowed).  A timeout
 * before the first byte went out leaves the wire alive. */
int wire_send(struct wire *w, const char *text, size_t len, int passed_fd, uint64_t deadline_ns,
	      struct err *e);

/* The next object; the caller's.  Deadline 0: what has arrived.  -ETIMEDOUT: none in time. */
int wire_recv(struct wire *w, uint64_t deadline_ns, json_t **ret, struct err *e);
