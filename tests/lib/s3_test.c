/* SPDX-License-Identifier: MIT */
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include "tests/lib/s3_test.h"

struct http_script server;
struct err e;
_Atomic bool cancelled;

static bool is_cancelled(void *arg)
{
	return atomic_load(&cancelled);
}

const struct objstore_opts quick = {
	.connect_timeout_ms = 2000,
	.stall_timeout_ms = 20000,
	.deadline_ms = 20000,
	.max_tries = 4,
	.backoff_min_ms = 1,
	.backoff_max_ms = 4,
	.cancelled = is_cancelled,
};

struct objstore *open_with(const struct objstore_opts *opts)
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

void cleanup_store(struct objstore **s)
{
	objstore_close(*s);
}

/* Under the lock: what was asked so far may be looked at then. */
int nr_requests(void)
{
	int nr;

	pthread_mutex_lock(&server.lock);
	nr = server.nr_requests;
	pthread_mutex_unlock(&server.lock);
	return nr;
}

struct objstore_counters count(const struct objstore *s)
{
	struct objstore_counters c;

	objstore_counters(s, &c);
	return c;
}

int put(struct objstore *s, const char *bytes, unsigned int flags)
{
	struct iovec iov[] = {{(void *)bytes, 1}, {(char *)bytes + 1, strlen(bytes) - 1}};

	return objstore_put(s, "key", iov, 2, flags, &e);
}

int get(struct objstore *s, uint64_t offset, size_t len, char *ret, size_t *ret_len)
{
	return objstore_get(s, "key", offset, ret, len, ret_len, &e);
}

bool asked(int nr, const char *what)
{
	check(nr < nr_requests(), "not asked so often");
	return strcasestr(server.requests[nr].head, what);
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

void s3_test_begin(void)
{
	signal(SIGPIPE, SIG_IGN);
	write_creds();
	http_script_start(&server, false);
}

void s3_test_end(void)
{
	http_script_stop(&server);
	unlink(creds);
	rmdir(dir);
}
