/* SPDX-License-Identifier: MIT */
/*
 * objstore: named, immutable-by-habit objects of bounded size, in a bucket or a directory.
 * In: keys and whole objects; out: the same bytes, or a reason that says what to do.
 *
 *   s3://BUCKET[/PREFIX]    any S3-compatible store, over HTTPS (HTTP to loopback)
 *   file:///PATH            a directory; several processes and hosts may use it at once
 *
 *   O1 An object is whole or not there: no reader, and no crash, sees part of one.
 *   O2 OBJSTORE_ONLY_IF_ABSENT lets one of several racing puts win; the others get -EEXIST.
 *      A put that was answered 0 or -EEXIST is durable.
 *   O3 A read is of one length: what a server cuts off, or adds, is an error or is fetched
 *      again, never handed out.
 *   O4 Every call ends: a server that hangs costs stall_timeout_ms a try, and all tries
 *      together deadline_ms; a call that is cancelled ends within a second.
 *
 * Objects are sent as one request each, so keep them at 8 to 64 MiB: below S3's 5 GiB limit
 * of a single put by far, large enough that a round trip costs little, and small enough
 * that one that was cut off is cheap to send again.  Multipart uploads would save nothing,
 * and with them a conditional put is not atomic everywhere.
 *
 * Threads: calls block, and any number of threads may make them; `cancelled` is called on
 * those threads.  Buffers are the caller's and are used during the call only.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "snapd/util/err.h"

struct objstore;

/* Bytes of a key: parts of at most OBJSTORE_PART_MAX, separated by '/', none empty or begun
 * with '.'; UTF-8 without control characters and without '\\'.  No key may be another's
 * beginning up to a '/': a file is no directory. */
#define OBJSTORE_KEY_MAX    512u
#define OBJSTORE_PART_MAX   200u
#define OBJSTORE_OBJECT_MAX (256u << 20)

enum objstore_style {
	OBJSTORE_STYLE_AUTO,	/* host style for AWS itself, else path style */
	OBJSTORE_STYLE_PATH,	/* https://endpoint/bucket/key */
	OBJSTORE_STYLE_VIRTUAL, /* https://bucket.endpoint/key */
};

/* All may be 0 or NULL, for the defaults in brackets.  Copied by objstore_open(). */
struct objstore_opts {
	const char *endpoint; /* "https://host[:port]" [$AWS_ENDPOINT_URL, else AWS's own] */
	const char *region;   /* [$AWS_REGION, the profile's, us-east-1] */
	const char *credentials_file; /* in the form of ~/.aws/credentials [the usual places] */
	const char *profile;	      /* section of it [$AWS_PROFILE, default] */
	const char *ca_file;	      /* PEM: whom to trust instead of the system's authorities */
	enum objstore_style style;
	bool allow_http;	      /* to hosts other than this one */
	bool create;		      /* file: make the directory when there is none */
	uint64_t rate_limit;	      /* bytes a second, each way, of all threads together [none] */
	uint32_t connect_timeout_ms;  /* [10 s] */
	uint32_t stall_timeout_ms;    /* a try that moves less than 4 KiB in it has failed [30 s] */
	uint32_t deadline_ms;	      /* of a call with all its tries, and 1 s per 64 KiB; without
					 what the rate limit takes [5 min] */
	uint32_t max_tries;	      /* [10] */
	uint32_t backoff_min_ms;      /* the first wait is random up to it, each next up to */
	uint32_t backoff_max_ms;      /* twice as much, to at most this [200 ms, 20 s] */
	bool (*cancelled)(void *arg); /* asked often, from every calling thread */
	void *cancelled_arg;	      /* valid until objstore_close() */
};

/* What went wrong with a try, for metrics. */
enum objstore_failure {
	OBJSTORE_FAILED_CONNECT,  /* no connection, no name, no TLS */
	OBJSTORE_FAILED_TIMEOUT,  /* hung */
	OBJSTORE_FAILED_BROKEN,	  /* cut off in the middle */
	OBJSTORE_FAILED_THROTTLE, /* SlowDown, 429 */
	OBJSTORE_FAILED_SERVER,	  /* other 5xx */
	OBJSTORE_FAILED_DENIED,	  /* 401, 403 */
	OBJSTORE_FAILED_REFUSED,  /* other 4xx that are no expected outcome */
	OBJSTORE_FAILED_ANSWER,	  /* nonsense */
	NR_OBJSTORE_FAILURES
};
extern const char *const objstore_failure_names[NR_OBJSTORE_FAILURES];

/* Since objstore_open(). */
struct objstore_counters {
	uint64_t bytes_sent,
		bytes_received; /* on the wire above TLS, headers too; grow during calls */
	uint64_t requests, retries;
	uint64_t failures[NR_OBJSTORE_FAILURES];
};

struct objstore_info {
	uint64_t size;
	int64_t mtime_s; /* Unix time, by the clock of objstore_clock() */
};

/*
 * Nothing is asked of a server yet: the first call tells whether it can be reached.
 * -EINVAL: url or option; -ENOKEY: no credentials; -EPERM: others may read them;
 * -ENOENT: no such directory.
 */
int objstore_open(struct objstore **ret, const char *url, const struct objstore_opts *opts,
		  struct err *e);
void objstore_close(struct objstore *s); /* no call may be under way; accepts NULL */
const char *objstore_url(const struct objstore *s);

/*
 * All return 0 or, with the reason in *e:
 *   -ENOENT       no such object            -EEXIST     ONLY_IF_ABSENT, and it is there
 *   -ENXIO        no such bucket            -EACCES     not allowed, or wrong credentials
 *   -EDQUOT, -ENOSPC  full                  -EINVAL     such a key or size cannot be
 *   -ETIMEDOUT    hung, or tried in vain    -ECANCELED  cancelled() said so
 *   -ECONNREFUSED, -EHOSTUNREACH            -EPROTO     the server's answers make no sense
 *   -ECONNRESET   broke off each time     -EIO        an error of the server's, or of a disk
 *   -EAGAIN       the server is overloaded, and stayed so
 *   -EFBIG        the server takes no object of this size
 *   -EOPNOTSUPP   the server lacks what is needed
 *   -EREMCHG      the bucket is in another region or behind another endpoint
 */
#define OBJSTORE_ONLY_IF_ABSENT 1u
int objstore_put(struct objstore *s, const char *key, const struct iovec *iov, int nr_iov,
		 unsigned int flags, struct err *e);
/* As pread(): *ret_len is below len only where the object ends, 0 past its end. */
int objstore_get(struct objstore *s, const char *key, uint64_t offset, void *buf, size_t len,
		 size_t *ret_len, struct err *e);
int objstore_head(struct objstore *s, const char *key, struct objstore_info *ret, struct err *e);
/* An object that is not there counts as deleted. */
int objstore_delete(struct objstore *s, const char *key, struct err *e);
/*
 * fn(arg, key, info) for each key that begins with `prefix` and is greater than start_after
 * (either may be NULL, and does not end within a character), in byte order; what is put or deleted
 * meanwhile may be missing. Not 0 from fn ends the list and is returned.  fn may make calls of its
 * own; key is valid during fn.  Names in the bucket that can be no key are passed over.
 */
typedef int (*objstore_list_fn)(void *arg, const char *key, const struct objstore_info *info);
int objstore_list(struct objstore *s, const char *prefix, const char *start_after,
		  objstore_list_fn fn, void *arg, struct err *e);

/* Now, by the clock that mtime_s is of: the server's, as of its latest answer. */
int64_t objstore_clock(const struct objstore *s);
void objstore_counters(const struct objstore *s, struct objstore_counters *ret);
