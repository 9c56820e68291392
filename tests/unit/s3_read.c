/* SPDX-License-Identifier: MIT */
/*
 * An S3 client against a server that lies.  Goal: no byte and no name of an object is taken for
 * what it is not: ranges, lengths and lists that are cut off, wrong or endless are read again or
 * refused.  Method: a server by script; each test says what it answers, and what must come of it.
 */
#include <stdlib.h>

#include "tests/lib/s3_test.h"

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

int main(void)
{
	s3_test_begin();
	test_get();
	test_cut_off();
	test_lies_of_ranges();
	test_no_length();
	test_not_http();
	test_list();
	test_lies_of_lists();
	test_endless_list();
	s3_test_end();
	return 0;
}
