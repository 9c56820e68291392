/* SPDX-License-Identifier: MIT */
/*
 * An S3 client against a server that fails.  Goal: O1 to O4 of objstore.h when answers are late,
 * cut off or lost: what is tried again and what is not, when it gives up, that it can be stopped,
 * and that a conditional put whose answer was lost is told from one that another made.  Method: a
 * server by script; each test says what it answers, and what must come of it.
 */
#include <stdlib.h>
#include <unistd.h>

#include "tests/lib/s3_test.h"

/* ---- tries ---- */

/* For tests that wait for it. */
static struct objstore *open_impatient(void)
{
	struct objstore_opts o = quick;

	o.stall_timeout_ms = 100;
	return open_with(&o);
}

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

int main(void)
{
	s3_test_begin();
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
	s3_test_end();
	return 0;
}
