/* SPDX-License-Identifier: MIT */
/*
 * An S3 client against a server that fails in every way.  Goal: O1 to O4 of objstore.h
 * when answers are late, cut off, wrong or lies; what is tried again and what is not; no
 * secret in a reason.  Method: a server by script; each test says what it answers, and what
 * must come of it.
 */
#include <fcntl.h>

#include <pthread.h>
#include <signal.h>
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

static struct http_script server;
static struct err e;
static _Atomic bool cancelled;

static bool is_cancelled(void *arg)
{
	return atomic_load(&cancelled);
}

/* Short enough that a test which waits for a limit costs little. */
static const struct objstore_opts quick = {
	.connect_timeout_ms = 2000,
	.stall_timeout_ms = 20000,
	.deadline_ms = 20000,
	.max_tries = 4,
	.backoff_min_ms = 1,
	.backoff_max_ms = 4,
	.cancelled = is_cancelled,
};

static struct objstore *open_with(const struct objstore_opts *opts)
{
	struct objstore_opts o = *opts;
	struct objstore *s;
	char endpoint[64];
	int r;

	snprintf(endpoint, sizeof(endpoint), "http%s://127.0.0.1:%d", server.tls ? "s" : "",
		 server.port);
	if (!o.endpoint)
		o.endpoint = endpoint;
	r = objstore_open(&s, "s3://bucket/pre/fix", &o, &e);
	check(!r, "%s", e.text);
	return s;
}

static void cleanup_store(struct objstore **s)
{
	objstore_close(*s);
}

/* For tests that wait for it. */
static struct objstore *open_impatient(void)
{
	struct objstore_opts o = quick;

	o.stall_timeout_ms = 100;
	return open_with(&o);
}

#define STORE _cleanup_(cleanup_store) struct objstore *s = open_with(&quick)
#define SCRIPT(...)                                            \
	static const struct http_step steps[] = {__VA_ARGS__}; \
	err_clear(&e);                                         \
	http_script_set(&server, steps, (int)ARRAY_SIZE(steps))
#define REQUESTS(n) check(nr_requests() == (n), "%d requests: %s", nr_requests(), e.text)

/* Under the lock: what was asked so far may be looked at then. */
static int nr_requests(void)
{
	int nr;

	pthread_mutex_lock(&server.lock);
	nr = server.nr_requests;
	pthread_mutex_unlock(&server.lock);
	return nr;
}

static struct objstore_counters count(const struct objstore *s)
{
	struct objstore_counters c;

	objstore_counters(s, &c);
	return c;
}

static int put(struct objstore *s, const char *bytes, unsigned int flags)
{
	struct iovec iov[] = {{(void *)bytes, 1}, {(char *)bytes + 1, strlen(bytes) - 1}};

	return objstore_put(s, "key", iov, 2, flags, &e);
}

static int get(struct objstore *s, uint64_t offset, size_t len, char *ret, size_t *ret_len)
{
	return objstore_get(s, "key", offset, ret, len, ret_len, &e);
}

static bool asked(int nr, const char *what)
{
	check(nr < nr_requests(), "not asked so often");
	return strcasestr(server.requests[nr].head, what);
}

/* ---- what is asked ---- */

static void test_put(void)
{
	STORE;
	SCRIPT({OK_EMPTY}, {OK_EMPTY});

	check(!put(s, "hello", OBJSTORE_ONLY_IF_ABSENT), "%s", e.text);
	check(!put(s, "hello", 0), "%s", e.text);
	check(asked(0, "PUT /bucket/pre/fix/key HTTP/1.1\r\n"), "%s", server.requests[0].head);
	check(asked(0, "\r\nIf-None-Match: *\r\n") && !asked(1, "If-None-Match"), "condition");
	check(asked(0, "\r\nContent-Length: 5\r\n"), "%s", server.requests[0].head);
	check(asked(0, "\r\nx-amz-content-sha256: "
		       "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824\r\n"),
	      "hash: %s", server.requests[0].head);
	check(asked(0, "\r\nx-amz-security-token: " TOKEN "\r\n"), "token");
	check(asked(0, "Credential=" ACCESS "/") && !asked(0, SECRET), "credentials");
	check(server.requests[0].len == 5 && !memcmp(server.requests[0].body, "hello", 5), "body");
	check(count(s).requests == 2 && count(s).bytes_sent > 10, "counters");
	REQUESTS(2);
}

static void test_styles(void)
{
	struct objstore_opts o = quick;
	char endpoint[64];
	struct objstore *s;
	SCRIPT({OK_EMPTY});

	snprintf(endpoint, sizeof(endpoint), "http://s3.localhost:%d/", server.port);
	o.endpoint = endpoint;
	o.style = OBJSTORE_STYLE_VIRTUAL;
	s = open_with(&o);
	check(!put(s, "hello", 0), "%s", e.text);
	check(asked(0, "PUT /pre/fix/key HTTP/1.1\r\n"), "%s", server.requests[0].head);
	check(asked(0, "\r\nHost: bucket.s3.localhost:"), "%s", server.requests[0].head);
	objstore_close(s);
}

static void test_bad_open(void)
{
	static const char *const endpoints[] = {"ftp://127.0.0.1", "https://h/path", "https://u@h",
						"https://h?q", "nonsense"};
	struct objstore_opts o = quick;
	struct objstore *s;

	err_clear(&e);
	o.endpoint = "http://example.com";
	check(objstore_open(&s, "s3://bucket", &o, &e) == -EPERM, "%s", e.text);
	o.allow_http = true;
	check(!objstore_open(&s, "s3://bucket", &o, NULL), "allowed");
	objstore_close(s);
	for (size_t i = 0; i < ARRAY_SIZE(endpoints); i++) {
		o.endpoint = endpoints[i];
		check(objstore_open(&s, "s3://bucket", &o, NULL) == -EINVAL, "%s", endpoints[i]);
	}
	o.endpoint = NULL;
	check(objstore_open(&s, "s3://b", &o, NULL) == -EINVAL, "bucket");
	check(objstore_open(&s, "s3://bucket//x", &o, NULL) == -EINVAL, "prefix");
	check(objstore_open(&s, "s3://bucket/../x", &o, NULL) == -EINVAL, "prefix");
	o.region = "a b";
	check(objstore_open(&s, "s3://bucket", &o, NULL) == -EINVAL, "region");
	o.region = NULL;
	o.ca_file = "/no/such/file";
	check(objstore_open(&s, "s3://bucket", &o, NULL) == -ENOENT, "CA file");
}

/* ---- tries ---- */

static void test_again(void)
{
	STORE;
	SCRIPT({SLOW_DOWN}, {STATUS("429 Too Many")},
	       {"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 12\r\n\r\n<html>oops</"}, {OK_EMPTY});

	check(!put(s, "hello", 0), "%s", e.text);
	REQUESTS(4);
	check(server.requests[3].len == 5, "the body again");
	check(count(s).retries == 3, "retries");
	check(count(s).failures[OBJSTORE_FAILED_THROTTLE] == 2, "throttled");
	check(count(s).failures[OBJSTORE_FAILED_SERVER] == 1, "server");
}

static void test_in_vain(void)
{
	STORE;
	SCRIPT({SLOW_DOWN}, {SLOW_DOWN}, {SLOW_DOWN}, {SLOW_DOWN}, {OK_EMPTY});

	check(put(s, "hello", 0) == -EAGAIN, "%s", e.text);
	REQUESTS(4);
	check(strstr(e.text, "overloaded") && strstr(e.text, "tried 4 times"), "%s", e.text);
}

static void test_retry_after(void)
{
	STORE;
	uint64_t begin = objstore_now_ns();
	SCRIPT({"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"}, {OK_EMPTY});

	check(!put(s, "hello", 0), "%s", e.text);
	check(objstore_now_ns() - begin >= 1000000000, "not awaited");
}

/* Later than we would wait: there is no use in waiting. */
static void test_retry_too_late(void)
{
	STORE;
	SCRIPT({"HTTP/1.1 503 Busy\r\nRetry-After: 3600\r\nContent-Length: 0\r\n\r\n"}, {OK_EMPTY});

	check(put(s, "hello", 0) == -EAGAIN, "%s", e.text);
	REQUESTS(1);
}

static void test_broken(void)
{
	STORE;
	SCRIPT({NULL, 0, HTTP_RESET}, {NULL, 0, HTTP_CLOSE}, {NULL, 0, HTTP_RESET, true},
	       {OK_EMPTY});

	check(!put(s, "hello", 0), "%s", e.text);
	check(count(s).failures[OBJSTORE_FAILED_BROKEN] >= 1, "broken");
	check(server.requests[nr_requests() - 1].len == 5, "the body again");
}

/* A kept connection that the server has closed meanwhile is no failure. */
static void test_stale_connection(void)
{
	STORE;
	SCRIPT({OK_EMPTY, 0, HTTP_CLOSE}, {OK_EMPTY});

	check(!put(s, "hello", 0) && !put(s, "hello", 0), "%s", e.text);
	check(!count(s).retries, "retries");
	REQUESTS(2);
}

static void test_hang(void)
{
	_cleanup_(cleanup_store) struct objstore *s = open_impatient();
	SCRIPT({NULL, 0, HTTP_HANG}, {NULL, 0, HTTP_HANG, true},
	       {"HTTP/1.1 200 OK\r\nContent-", 0, HTTP_HANG}, {NULL, 0, HTTP_HANG});

	check(put(s, "hello", 0) == -ETIMEDOUT, "%s", e.text);
	check(strstr(e.text, "hangs"), "%s", e.text);
	check(count(s).failures[OBJSTORE_FAILED_TIMEOUT] == 4, "timeouts");
}

/* Bytes that come, but too few. */
static void test_dribble(void)
{
	static char reply[400] = "HTTP/1.1 206 OK\r\nContent-Length: 300\r\n"
				 "Content-Range: bytes 0-299/300\r\n\r\n";
	static struct http_step steps[] = {{reply, sizeof(reply), HTTP_DRIBBLE},
					   {reply, sizeof(reply), HTTP_DRIBBLE},
					   {reply, sizeof(reply), HTTP_DRIBBLE},
					   {reply, sizeof(reply), HTTP_DRIBBLE}};
	_cleanup_(cleanup_store) struct objstore *s = open_impatient();
	char buf[300];
	size_t n;

	err_clear(&e);
	http_script_set(&server, steps, 4);
	check(get(s, 0, 300, buf, &n) == -ETIMEDOUT && !n, "%s", e.text);
}

static void test_deadline(void)
{
	struct objstore_opts o = quick;
	_cleanup_(cleanup_store) struct objstore *s = NULL;
	SCRIPT({NULL, 0, HTTP_HANG});

	o.stall_timeout_ms = 60000;
	o.deadline_ms = 150;
	s = open_with(&o);
	check(put(s, "hello", 0) == -ETIMEDOUT, "%s", e.text);
	check(count(s).requests == 1, "once");
}

static void *cancel_soon(void *arg)
{
	usleep(100000);
	atomic_store(&cancelled, true);
	return NULL;
}

static void test_cancel(void)
{
	struct objstore_opts o = quick;
	_cleanup_(cleanup_store) struct objstore *s = NULL;
	pthread_t thread;
	SCRIPT({NULL, 0, HTTP_HANG},
	       {"HTTP/1.1 503 Busy\r\nRetry-After: 10\r\nContent-Length: 0\r\n\r\n"});

	o.stall_timeout_ms = 60000;
	s = open_with(&o);
	for (int i = 0; i < 2; i++) { /* in a try, between tries */
		uint64_t begin = objstore_now_ns();

		pthread_create(&thread, NULL, cancel_soon, NULL);
		check(put(s, "hello", 0) == -ECANCELED, "%s", e.text);
		check(objstore_now_ns() - begin < 5000000000, "as if it had not been");
		pthread_join(thread, NULL);
		atomic_store(&cancelled, false);
		err_clear(&e);
	}
	check(count(s).failures[OBJSTORE_FAILED_TIMEOUT] == 0, "no failure");
}

static void test_nobody(void)
{
	struct objstore_opts o = quick;
	_cleanup_(cleanup_store) struct objstore *s = NULL;

	err_clear(&e);
	o.endpoint = "http://127.0.0.1:1";
	s = open_with(&o);
	check(put(s, "hello", 0) == -ECONNREFUSED, "%s", e.text);
	check(count(s).failures[OBJSTORE_FAILED_CONNECT] == 4, "connect");
}

/* ---- conditional puts whose answer was lost ---- */

#define LOST                        \
	{                           \
		NULL, 0, HTTP_RESET \
	}
#define IS_THERE                                  \
	{                                         \
		STATUS("412 Precondition Failed") \
	}
#define HEAD_OF(size, etag)                                                    \
	{                                                                      \
		"HTTP/1.1 200 OK\r\nContent-Length: " size "\r\nETag: \"" etag \
		"\"\r\nLast-Modified: "                                        \
		"Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n"                        \
	}
#define MD5_HELLO "5d41402abc4b2a76b9719d911017c592"

static void test_there_at_once(void)
{
	STORE;
	SCRIPT(IS_THERE);

	check(put(s, "hello", OBJSTORE_ONLY_IF_ABSENT) == -EEXIST, "%s", e.text);
	REQUESTS(1);
}

static void test_there_and_ours(void)
{
	STORE;
	SCRIPT(LOST, IS_THERE, HEAD_OF("5", MD5_HELLO));

	check(!put(s, "hello", OBJSTORE_ONLY_IF_ABSENT), "%s", e.text);
	REQUESTS(3);
}

static void test_there_of_another_size(void)
{
	STORE;
	SCRIPT(LOST, IS_THERE, HEAD_OF("6", MD5_HELLO));

	check(put(s, "hello", OBJSTORE_ONLY_IF_ABSENT) == -EEXIST, "%s", e.text);
	REQUESTS(3);
}

static void test_there_encrypted(void)
{
	STORE;
	SCRIPT(LOST, IS_THERE, HEAD_OF("5", "00000000000000000000000000000000"),
	       {"HTTP/1.1 206 OK\r\nContent-Length: 5\r\nContent-Range: bytes 0-4/5\r\n\r\nhello"});

	check(!put(s, "hello", OBJSTORE_ONLY_IF_ABSENT), "%s", e.text);
	REQUESTS(4);
}

static void test_there_and_anothers(void)
{
	STORE;
	SCRIPT(LOST, IS_THERE, HEAD_OF("5", "x-1"),
	       {"HTTP/1.1 206 OK\r\nContent-Length: 5\r\nContent-Range: bytes 0-4/5\r\n\r\nhellO"});

	check(put(s, "hello", OBJSTORE_ONLY_IF_ABSENT) == -EEXIST, "%s", e.text);
	REQUESTS(4);
}

/* ---- reads ---- */

#define PART(range, length, bytes)                                                          \
	"HTTP/1.1 206 Partial\r\nContent-Range: bytes " range "\r\nContent-Length: " length \
	"\r\n\r\n" bytes

static void test_get(void)
{
	STORE;
	char buf[16];
	size_t n;
	SCRIPT({PART("3-7/99", "5", "abcde")}, {PART("3-4/5", "2", "de")},
	       {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcde"},
	       {STATUS("416 Range Not Satisfiable")}, {STATUS("404 Not Found")});

	check(!get(s, 3, 5, buf, &n) && n == 5 && !memcmp(buf, "abcde", 5), "%s", e.text);
	check(asked(0, "\r\nRange: bytes=3-7\r\n"), "%s", server.requests[0].head);
	check(!get(s, 3, 16, buf, &n) && n == 2, "at the end: %s", e.text);
	check(!get(s, 0, 16, buf, &n) && n == 5, "the whole: %s", e.text);
	check(!get(s, 99, 16, buf, &n) && n == 0, "past the end: %s", e.text);
	check(get(s, 0, 16, buf, &n) == -ENOENT, "%s", e.text);
	REQUESTS(5);
}

/* What is cut off is read again. */
static void test_cut_off(void)
{
	STORE;
	char buf[5];
	size_t n;
	SCRIPT({PART("0-4/5", "5", "abc"), 0, HTTP_CLOSE}, {PART("0-4/5", "5", ""), 0, HTTP_RESET},
	       {PART("0-4/5", "5", "abcde")});

	check(!get(s, 0, 5, buf, &n) && n == 5 && !memcmp(buf, "abcde", 5), "%s", e.text);
	check(count(s).failures[OBJSTORE_FAILED_BROKEN] == 2, "broken");
}

static void test_lies_of_ranges(void)
{
	static const char *const lies[] = {
		PART("0-4/99", "5", "abcde"),  /* another place */
		PART("3-5/99", "3", "abc"),    /* less than there is */
		PART("3-8/99", "6", "abcdef"), /* more */
		PART("3-7/99", "3", "abc"),    /* not what it says */
		PART("3-2/99", "0", ""),       /* no range */
		PART("3-7/4", "5", "abcde"),   /* of what is not there */
		PART("3-7/*", "5", "abcde"),   /* of what size? */
		PART("x", "5", "abcde"),
		"HTTP/1.1 206 Partial\r\nContent-Length: 5\r\n\r\nabcde",
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcde", /* the beginning */
		"HTTP/1.1 204 No Content\r\n\r\n",
		"HTTP/1.1 303 See Other\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
	};
	STORE;

	for (size_t i = 0; i < ARRAY_SIZE(lies); i++) {
		struct http_step step = {lies[i], 0, HTTP_KEEP, false};
		char buf[5];
		size_t n;
		int r;

		err_clear(&e);
		http_script_set(&server, &step, 1);
		r = get(s, 3, 5, buf, &n);
		check((r == -EPROTO || r == -EREMCHG) && !n, "lie %zu: %d: %s", i, r, e.text);
		http_script_set(&server, NULL, 0);
	}
}

/* Without a length the end could be anywhere. */
static void test_no_length(void)
{
	STORE;
	char buf[16];
	size_t n;
	SCRIPT({"HTTP/1.1 200 OK\r\n\r\nabc", 0, HTTP_CLOSE},
	       {"HTTP/1.1 200 OK\r\n\r\n", 0, HTTP_CLOSE});

	check(get(s, 0, 16, buf, &n) == -EPROTO && !n, "%s", e.text);
	err_clear(&e);
	check(objstore_head(s, "key", &(struct objstore_info){0}, &e) == -EPROTO, "%s", e.text);
}

static void test_not_http(void)
{
	STORE;
	SCRIPT({"SSH-2.0-OpenSSH_9.2\r\n", 0, HTTP_CLOSE});

	check(put(s, "hello", 0) == -EPROTO, "%s", e.text);
	REQUESTS(1);
}

/* ---- lists ---- */

#define OBJECT(key)                                                                        \
	"<Contents><Key>" key "</Key><Size>7</Size><LastModified>2026-01-01T00:00:00.000Z" \
	"</LastModified></Contents>"
#define LIST(truncated, objects)                                                            \
	"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n<?xml "                                \
	"version='1.0'?><ListBucketResult><IsTruncated>" truncated "</IsTruncated>" objects \
	"</ListBucketResult>",                                                              \
		0, HTTP_CLOSE

static char seen[256];

static int see(void *arg, const char *key, const struct objstore_info *info)
{
	check(info->size == 7 && info->mtime_s == 1767225600, "%s", key);
	strcat(strcat(seen, key), " ");
	return 0;
}

static int list(struct objstore *s)
{
	*seen = '\0';
	err_clear(&e);
	return objstore_list(s, "a", NULL, see, NULL, &e);
}

static void test_list(void)
{
	STORE;
	SCRIPT({LIST("true", OBJECT("pre/fix/a&amp;1") OBJECT("pre/fix/a/"))},
	       {LIST("true", OBJECT("pre/fix/a/.hidden") OBJECT("pre/fix/a/1"))},
	       {LIST("false", "")});

	check(!list(s) && !strcmp(seen, "a&1 a/1 "), "%s: %s", seen, e.text);
	REQUESTS(3);
	check(asked(0, "GET /bucket?list-type=2&max-keys=1000&prefix=pre%2Ffix%2Fa HTTP"), "%s",
	      server.requests[0].head);
	check(asked(2, "&start-after=pre%2Ffix%2Fa%2F1 HTTP"), "%s", server.requests[2].head);
}

static void test_lies_of_lists(void)
{
	static const struct http_step lies[] = {
		{LIST("true", "")},
		{LIST("false", OBJECT("pre/fix/a2") OBJECT("pre/fix/a1"))},
		{LIST("false", OBJECT("pre/fix/a2") OBJECT("pre/fix/a2"))},
		{LIST("false", OBJECT("pre/fix/b"))},
		{LIST("false", OBJECT("other"))},
		{LIST("perhaps", "")},
		{LIST("false", "<Contents><Key>pre/fix/a</Key></Contents>")},
		{LIST("false", "<Contents><Size>7</Size></Contents>")},
		{"HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n<html>Welcome!</html> "},
		{"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"},
		{"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n<!DOCTYPE x [<!ENTITY a \"a\">]>"
		 "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>",
		 0, HTTP_CLOSE},
	};
	STORE;

	for (size_t i = 0; i < ARRAY_SIZE(lies); i++) {
		http_script_set(&server, &lies[i], 1);
		check(list(s) == -EPROTO, "lie %zu: %s: %s", i, seen, e.text);
	}
}

static void test_endless_list(void)
{
	static char reply[6 << 20];
	struct http_step step = {reply, sizeof(reply), HTTP_CLOSE, false};
	STORE;

	memset(reply, 'x', sizeof(reply));
	memcpy(reply, "HTTP/1.1 200 OK\r\n\r\n<a>", 22);
	http_script_set(&server, &step, 1);
	check(list(s) == -EPROTO, "%s", e.text);
	check(strstr(e.text, "more than was asked"), "%s", e.text);
}

/* ---- what errors say ---- */

static void test_reasons(void)
{
	static const struct {
		const char *status, *headers, *body;
		int error;
		const char *says;
	} cases[] = {
		{"403 Forbidden", "", "<Error><Code>AccessDenied</Code></Error>", EACCES,
		 "needs GetObject"},
		{"403 Forbidden", "", "<Error><Code>SignatureDoesNotMatch</Code></Error>", EACCES,
		 "secret key is wrong"},
		{"403 Forbidden", "", "<Error><Code>InvalidAccessKeyId</Code></Error>", EACCES,
		 "does not know the access key"},
		{"403 Forbidden", "", "<Error><Code>QuotaExceeded</Code></Error>", EDQUOT, "quota"},
		{"403 Forbidden", "", "<Error><Code>UserSuspended</Code></Error>", EACCES,
		 "suspended"},
		{"403 Forbidden", "Date: Thu, 01 Jan 2026 00:00:00 GMT\r\n",
		 "<Error><Code>RequestTimeTooSkewed</Code></Error>", EACCES, "our clock is "},
		{"400 Bad", "", "<Error><Code>ExpiredToken</Code></Error>", EACCES, "has expired"},
		{"404 Not Found", "", "<Error><Code>NoSuchBucket</Code></Error>", ENXIO,
		 "no such bucket"},
		{"301 Moved", "x-amz-bucket-region: eu-west-7\r\n", "", EREMCHG,
		 "in region eu-west-7, not us-east-1"},
		{"400 Bad", "",
		 "<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-8</Region></"
		 "Error>",
		 EREMCHG, "eu-west-8"},
		{"307 Temporary", "",
		 "<Error><Code>TemporaryRedirect</Code><Endpoint>there.example</Endpoint></Error>",
		 EREMCHG, "there.example"},
		{"501 Not Implemented", "", "", EOPNOTSUPP, "conditional puts"},
		{"507 Full", "", "", ENOSPC, "full"},
		{"413 Too Large", "", "", EFBIG, "this size"},
		{"418 Teapot", "",
		 "<Error><Code>Teapot</Code><Message>short &amp; stout</Message></Error>", EPROTO,
		 "short & stout (418 Teapot)"},
		{"400 Bad", "",
		 "<Error><Code>X</Code><Message>your key is " ACCESS "</Message></Error>", EPROTO,
		 ": ? (400 X)"},
		{"400 Bad", "",
		 "<Error><Code>" TOKEN "</Code><Message>a" SECRET "</Message></Error>", EPROTO,
		 ": ? (400 ?)"},
	};
	static char replies[ARRAY_SIZE(cases)][512]; /* the server may still look at the last */
	STORE;

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		struct http_step step = {replies[i], 0, HTTP_KEEP, false};
		int r;

		snprintf(replies[i], sizeof(replies[i]),
			 "HTTP/1.1 %s\r\n%sContent-Length: %zu\r\n\r\n%s", cases[i].status,
			 cases[i].headers, strlen(cases[i].body), cases[i].body);
		err_clear(&e);
		http_script_set(&server, &step, 1);
		r = put(s, "hello", 0);
		check(r == -cases[i].error && strstr(e.text, cases[i].says), "case %zu: %d: %s", i,
		      r, e.text);
		check(!strstr(e.text, SECRET) && !strstr(e.text, ACCESS) && !strstr(e.text, TOKEN),
		      "a secret: %s", e.text);
		REQUESTS(1);
		http_script_set(&server, NULL, 0);
	}
}

static void test_delete(void)
{
	STORE;
	SCRIPT({STATUS("204 No Content")}, {STATUS("404 Not Found")}, {STATUS("403 Forbidden")});

	check(!objstore_delete(s, "key", &e) && !objstore_delete(s, "key", &e), "%s", e.text);
	check(asked(0, "DELETE /bucket/pre/fix/key"), "%s", server.requests[0].head);
	check(objstore_delete(s, "key", &e) == -EACCES, "%s", e.text);
}

static void test_clock(void)
{
	STORE;
	SCRIPT({"HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\nContent-Length: "
		"0\r\n\r\n"});

	check(!put(s, "hello", 0), "%s", e.text);
	check(llabs(objstore_clock(s) - 1767225600) < 30, "the server's clock");
}

/* ---- threads, rate ---- */

#define NR_THREADS 8

static void *put_some(void *s)
{
	for (int i = 0; i < 7; i++)
		check(!objstore_put(s, "key", &(struct iovec){(void *)"hello", 5}, 1, 0, NULL),
		      "put");
	return NULL;
}

static void test_threads(void)
{
	static struct http_step steps[NR_THREADS * 7];
	STORE;
	pthread_t threads[NR_THREADS];

	for (size_t i = 0; i < ARRAY_SIZE(steps); i++)
		steps[i] = (struct http_step){.reply = OK_EMPTY};
	http_script_set(&server, steps, (int)ARRAY_SIZE(steps));
	for (int i = 0; i < NR_THREADS; i++)
		pthread_create(&threads[i], NULL, put_some, s);
	for (int i = 0; i < NR_THREADS; i++)
		pthread_join(threads[i], NULL);
	REQUESTS(NR_THREADS * 7);
	check(count(s).requests == NR_THREADS * 7, "counted");
}

/* Waiting for one's turn is no hang. */
static void test_rate(void)
{
	struct objstore_opts o = quick;
	_cleanup_(cleanup_store) struct objstore *s = NULL;
	static char bytes[3 << 20];
	uint64_t begin = objstore_now_ns();
	SCRIPT({OK_EMPTY});

	o.rate_limit = 3 << 20;
	s = open_with(&o);
	check(!objstore_put(s, "key", &(struct iovec){bytes, sizeof(bytes)}, 1, 0, &e), "%s",
	      e.text);
	check(objstore_now_ns() - begin > 300000000, "too fast");
	check(!count(s).retries, "retries");
}

/* Nor does it count against the deadline. */
static void test_rate_and_deadline(void)
{
	struct objstore_opts o = quick;
	_cleanup_(cleanup_store) struct objstore *s = NULL;
	SCRIPT({OK_EMPTY});

	o.rate_limit = 1 << 20;
	o.deadline_ms = 2000;
	s = open_with(&o);
	objstore_limit(s, &s->up, 3 << 20); /* others were first: 2.5 s are left of their turn */
	check(!put(s, "hello", 0), "%s", e.text);
	check(!count(s).retries, "retries");
}

/* ---- secrets, TLS ---- */

/* Each byte of the needle is one less than what is looked for: so it does not find itself. */
static bool has_shifted(const char *p, size_t len, const char *needle)
{
	const size_t n = strlen(needle);

	for (const char *end = p + len; (p = memchr(p, needle[0] + 1, (size_t)(end - p))); p++) {
		size_t k = 0;

		while (k < n && k < (size_t)(end - p) && p[k] == needle[k] + 1)
			k++;
		if (k == n)
			return true;
	}
	return false;
}

/* The secret is in no memory that a core dump has: no buffer of a library keeps a copy. */
static void test_no_copies(void)
{
	static const char needle[] = "rDbQdS.jDx*/";
	_cleanup_(cleanup_store) struct objstore *s = open_with(&quick);
	_cleanup_fd_ int mem = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	FILE *f = fopen("/proc/self/smaps", "re");
	unsigned long from = 0, to = 0, n_from, n_to;
	char line[256], perms[8] = "", next[8];
	int found = 0;
	SCRIPT({OK_EMPTY});

	check(!put(s, "hello", 0), "%s", e.text);
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%lx-%lx %7s", &n_from, &n_to, next) == 3) {
			from = n_from;
			to = n_to;
			strcpy(perms, next);
		}
		/* "dd": left out of dumps.  What only a file gives is not ours. */
		if (strncmp(line, "VmFlags:", 8) != 0 || strstr(line, " dd") ||
		    strncmp(perms, "rw", 2) != 0 || to - from > 64 << 20)
			continue;
		{
			_cleanup_free_ char *copy = malloc(to - from);
			ssize_t n = pread(mem, copy, to - from, (off_t)from);

			found += n > 0 && has_shifted(copy, (size_t)n, needle);
		}
	}
	fclose(f);
	check(!found, "%d copies", found);
}

static void test_tls(void)
{
	struct objstore_opts o = quick;
	struct objstore *s;

	http_script_stop(&server);
	http_script_start(&server, true);
	{
		SCRIPT({OK_EMPTY});
		s = open_with(&o);
		check(put(s, "hello", 0) == -EACCES && strstr(e.text, "not trusted"), "%s", e.text);
		REQUESTS(0);
		objstore_close(s);
		o.ca_file = server.cert_file;
		s = open_with(&o);
		err_clear(&e);
		check(!put(s, "hello", 0), "%s", e.text);
		objstore_close(s);
	}
}

static char dir[] = "/tmp/snapd-s3.XXXXXX", creds[64];

static void write_creds(void)
{
	/* by no buffer that test_no_copies() would find */
	static const char text[] = "[default]\naws_access_key_id=" ACCESS "\n"
				   "aws_secret_access_key = " SECRET "\n"
				   "aws_session_token=" TOKEN "\n";
	static const char *const unset[] = {"AWS_ACCESS_KEY_ID",    "AWS_ENDPOINT_URL",
					    "AWS_ENDPOINT_URL_S3",  "AWS_REGION",
					    "AWS_DEFAULT_REGION",   "AWS_PROFILE",
					    "CREDENTIALS_DIRECTORY"};
	_cleanup_fd_ int fd = -1;

	check(mkdtemp(dir), "%s", dir);
	snprintf(creds, sizeof(creds), "%s/credentials", dir);
	fd = open(creds, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	check(write(fd, text, strlen(text)) == (ssize_t)strlen(text), "%s", creds);
	setenv("AWS_SHARED_CREDENTIALS_FILE", creds, 1);
	setenv("AWS_CONFIG_FILE", "/dev/null", 1);
	for (size_t i = 0; i < ARRAY_SIZE(unset); i++)
		unsetenv(unset[i]);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	write_creds();
	http_script_start(&server, false);
	test_no_copies();
	test_put();
	test_styles();
	test_bad_open();
	test_again();
	test_in_vain();
	test_retry_after();
	test_retry_too_late();
	test_broken();
	test_stale_connection();
	test_hang();
	test_dribble();
	test_deadline();
	test_cancel();
	test_nobody();
	test_there_at_once();
	test_there_and_ours();
	test_there_of_another_size();
	test_there_encrypted();
	test_there_and_anothers();
	test_get();
	test_cut_off();
	test_lies_of_ranges();
	test_no_length();
	test_not_http();
	test_list();
	test_lies_of_lists();
	test_endless_list();
	test_reasons();
	test_delete();
	test_clock();
	test_threads();
	test_rate();
	test_rate_and_deadline();
	test_tls();
	http_script_stop(&server);
	unlink(creds);
	rmdir(dir);
	return 0;
}
