/* SPDX-License-Identifier: MIT */
/*
 * An S3 client and what it says to a server.  Goal: requests are what they should be, by many
 * threads and at no more than the rate; a reason says what was wrong, and no reason, header or
 * core dump has a secret in it.  Method: a server by script; each test says what it answers, and
 * what must come of it.
 */
#include <stdlib.h>
#include <unistd.h>

#include "tests/lib/s3_test.h"

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

int main(void)
{
	s3_test_begin();
	test_no_copies();
	test_put();
	test_styles();
	test_bad_open();
	test_reasons();
	test_delete();
	test_clock();
	test_threads();
	test_rate();
	test_rate_and_deadline();
	test_tls();
	s3_test_end();
	return 0;
}
