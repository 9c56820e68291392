/* SPDX-License-Identifier: MIT */
/* objstore_impl: what the kinds of stores share, below objstore.h. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>

#include "snapd/backup/objstore.h"

struct objstore_ops {
	/* Keys, flags and sizes are checked already. */
	int (*put)(struct objstore *s, const char *key, const struct iovec *iov, int nr_iov,
		   unsigned int flags, struct err *e);
	int (*get)(struct objstore *s, const char *key, uint64_t offset, void *buf, size_t len,
		   size_t *ret_len, struct err *e);
	int (*head)(struct objstore *s, const char *key, struct objstore_info *ret, struct err *e);
	int (*delete)(struct objstore *s, const char *key, struct err *e);
	int (*list)(struct objstore *s, const char *prefix, const char *start_after,
		    objstore_list_fn fn, void *arg, struct err *e);
	void (*close)(struct objstore *s); /* what open made; not *s */
};

/* Bytes of all threads, one way, at a rate: each takes its turn in time. */
struct objstore_limiter {
	pthread_mutex_t lock;
	uint64_t next_ns; /* under lock: when the bytes let through so far are paid for */
};

struct objstore {
	const struct objstore_ops *ops;
	void *impl; /* the kind's own */
	char *url;
	struct objstore_opts opts; /* strings are the kind's to copy; numbers are never 0 */
	struct objstore_limiter up, down;
	_Atomic uint64_t bytes_sent, bytes_received, requests, retries;
	_Atomic uint64_t failures[NR_OBJSTORE_FAILURES];
	_Atomic int64_t clock_ahead_s; /* the server's clock less ours */
};

int file_objstore_open(struct objstore *s, const char *path, struct err *e);
int s3_objstore_open(struct objstore *s, const char *bucket_and_prefix, struct err *e);

bool objstore_key_ok(const char *key);
size_t objstore_iov_bytes(const struct iovec *iov, int nr_iov);
bool objstore_cancelled(const struct objstore *s);
/* -ECANCELED, with its line. */
int objstore_cancelled_err(const struct objstore *s, struct err *e);
uint64_t objstore_now_ns(void); /* CLOCK_MONOTONIC */
/* Sleep, and end early when cancelled. */
void objstore_sleep_until(const struct objstore *s, uint64_t until_ns);
/* Wait until `bytes` more may pass; returns the time it took in ns. */
uint64_t objstore_limit(struct objstore *s, struct objstore_limiter *l, size_t bytes);
