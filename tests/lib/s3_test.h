/* SPDX-License-Identifier: MIT */
/*
 * s3_test: what the tests of the S3 client share: a server by script, a store of that server that
 * gives up soon, and credentials in a file.
 */
#pragma once

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/stat.h>

#include "snapd/backup/objstore_impl.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/http_script.h"

#define SECRET "sEcReT/kEy+0123456789abcdefghijklmnopqrs"
#define ACCESS "AKIDACCESSKEY0123456"
#define TOKEN  "tOkEn/sEsSiOn/0123456789/0123456789/0123456789"

#define OK_EMPTY       "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
#define STATUS(status) "HTTP/1.1 " status "\r\nContent-Length: 0\r\n\r\n"
#define SLOW_DOWN                                                                               \
	"HTTP/1.1 503 Slow Down\r\nContent-Length: 50\r\n\r\n<Error><Code>SlowDown</Code>     " \
	"          </Error>"

extern struct http_script server;
extern struct err e;	       /* of the call before; SCRIPT clears it */
extern _Atomic bool cancelled; /* what the store is told */
/* Short enough that a test which waits for a limit costs little. */
extern const struct objstore_opts quick;

#define STORE _cleanup_(cleanup_store) struct objstore *s = open_with(&quick)
#define SCRIPT(...)                                            \
	static const struct http_step steps[] = {__VA_ARGS__}; \
	err_clear(&e);                                         \
	http_script_set(&server, steps, (int)ARRAY_SIZE(steps))
#define REQUESTS(n) check(nr_requests() == (n), "%d requests: %s", nr_requests(), e.text)

/* The server runs, credentials are in a file; and no more of either. */
void s3_test_begin(void);
void s3_test_end(void);
struct objstore *open_with(const struct objstore_opts *opts);
void cleanup_store(struct objstore **s);
int nr_requests(void);
struct objstore_counters count(const struct objstore *s);
/* In two pieces, as "key". */
int put(struct objstore *s, const char *bytes, unsigned int flags);
int get(struct objstore *s, uint64_t offset, size_t len, char *ret, size_t *ret_len);
/* The head of that request has these words. */
bool asked(int nr, const char *what);
