/* SPDX-License-Identifier: MIT */
/*
 * client: HTTP to the service over its Unix socket, by libcurl.  Every function
 * says what went wrong itself (fail()) and returns an exit code; 0 is success.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

struct args;

/* Percent-encode for a path segment or a query value; malloc()ed. */
char *url_escape(const char *text);

/* One request; `fmt` with %s builds the path from escaped values (at most two).
 * `body` is consumed, may be NULL.  *ret is a new object. */
int call(const struct args *a, const char *method, json_t *body_stolen, json_t **ret,
	 const char *fmt, const char *value1, const char *value2);

/* The same for a request that answers {"job"}: wait for its end with a progress
 * bar; Ctrl-C cancels it.  *ret: its result, a new object.  *job_error (may be
 * NULL): when the job failed, its {"code","text"} instead of a message. */
int run_job(const struct args *a, const char *method, json_t *body_stolen, json_t **ret,
	    const char *fmt, const char *value1, const char *value2);

/* GET a body of any length.  write: 0, or an exit code that ends it (the callback
 * says why).  `total` is 0 until the length is known. */
struct download {
	int (*write)(void *opaque, const void *data, size_t len);
	void *opaque;
	const char *what; /* for the progress bar */
};
int download(const struct args *a, const struct download *d, const char *fmt, const char *value);

/* POST a body of any length.  read: fills up to len, 0 at the end, negative exit
 * code to end it (the callback says why). */
struct upload {
	long (*read)(void *opaque, void *buf, size_t len);
	void *opaque;
	const char *what;
	const char *type;     /* Content-Type */
	uint64_t total_bytes; /* about; for the progress bar */
};
int upload(const struct args *a, const struct upload *u, const char *path, json_t **ret);
