/* SPDX-License-Identifier: MIT */
/*
 * s3_http: one try of one request.  In: method, key, body; out: the answer, or how the try
 * failed.  Signing, TLS, time limits, cancelling, rate and counters are done here; whether
 * to try again is not.
 *
 * A connection (struct s3_conn) is a libcurl handle with its sockets, for one request at a
 * time; the caller keeps them for reuse.  A try is ended when it is cancelled, when it moves
 * less than 4 KiB in the stall timeout, and at the deadline; the time that the rate limit
 * takes comes on top of that.
 */
#pragma once

#include "snapd/backup/objstore_impl.h"
#include "snapd/backup/s3_creds.h"
#include "snapd/backup/s3_sign.h"
#include "snapd/backup/s3_xml.h"

#define S3_ANSWER_MAX (4u << 20) /* of XML: 1000 objects with keys of 1 KiB, escaped */

enum s3_method { S3_GET, S3_PUT, S3_HEAD, S3_DELETE };

struct s3 {
	char *scheme, *host; /* of the endpoint; host[:port] */
	char *host_header;   /* as requests have it: with the bucket in host style */
	char *bucket_path;   /* "" in host style, else "/BUCKET" */
	char *prefix;	     /* of keys: "" or ending with '/' */
	char *bucket, *ca_file;
	char region[33];
	bool loopback;
	const struct s3_creds *creds;
	pthread_mutex_t lock;
	struct s3_conn *idle; /* under lock */
};

extern const struct objstore_ops s3_ops;
void s3_close(struct objstore *s);

struct s3_request {
	enum s3_method method;
	const char *key;   /* NULL: the bucket */
	const char *query; /* encoded, "" without */
	bool only_if_absent;
	/* body of a put; payload_sha256 is always set */
	const struct iovec *iov;
	int nr_iov;
	size_t body_len;
	const char *payload_sha256;
	/* where a get's bytes go; NULL: they are XML and go to the answer */
	uint64_t offset;
	void *buf;
	size_t len;
	uint64_t deadline_ns; /* moved on by what the rate limit takes */
};

struct s3_answer {
	long status; /* 0: none came */
	size_t got;  /* bytes in buf */
	char *xml;   /* the caller's to free */
	size_t xml_len;
	int64_t content_length;	 /* -1: not told */
	int64_t mtime_s, date_s; /* -1: not told */
	uint64_t range_first, range_total;
	bool has_range;
	char etag[72]; /* without quotes */
	char bucket_region[40];
	uint64_t retry_after_ms;
	struct s3_error error;
	/* of a try that failed */
	enum objstore_failure failure;
	bool again; /* another one may do better */
};

void s3_conn_free(struct s3_conn *c); /* accepts NULL */
int s3_conn_create(struct s3_conn **ret);
/* A stack of idle ones; NULL from an empty one. */
void s3_conn_push(struct s3_conn **stack, struct s3_conn *c);
struct s3_conn *s3_conn_pop(struct s3_conn **stack);

/* 0 when there is an answer, of whatever status, that is whole; else -errno as in
 * objstore.h, with the reason in *e, ret->failure and ret->again. */
int s3_http(struct objstore *s, struct s3_conn *c, struct s3_request *q, struct s3_answer *ret,
	    struct err *e);
