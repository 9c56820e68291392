/* SPDX-License-Identifier: MIT */
/*
 * Object stores on a real S3 server, Ceph's RADOS gateway.  Goal: O1 to O4 of objstore.h
 * while the server is overloaded, over its quota, stopped, or killed; refusals that say
 * what to do.  Method: one server; each test causes a fault with the server's own means and
 * looks at what threads that put and get see.
 *
 *   s3_ceph S3-SERVER PROP-OBJSTORE
 */
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>

#include "snapd/backup/objstore.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"

#define BIG	   (1u << 20)
#define NR_RACERS  12
#define NR_PUTTERS 8
#define NR_PUTS	   2

static const char *server;
static char dir[] = "/tmp/snapd-ceph.XXXXXX";
static struct err e;

/* ---- the server ---- */

static int run(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

static int run(const char *fmt, ...)
{
	char command[1024];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(command, sizeof(command), fmt, ap);
	va_end(ap);
	return system(command);
}

static void stop(void)
{
	run("%s stop %s >%s/stop.log 2>&1", server, dir, dir);
	run("rm -rf %s", dir);
}

static void on_signal(int sig)
{
	exit(1);
}

static void start(void)
{
	check(!run("%s start %s >/dev/null", server, dir), "%s start %s", server, dir);
}

/* DIR/env: NAME=value lines of the server's. */
static void setting(const char *name, const char *as)
{
	char line[256];
	FILE *f;

	snprintf(line, sizeof(line), "%s/env", dir);
	f = fopen(line, "re");
	check(f, "%s", line);
	while (fgets(line, sizeof(line), f)) {
		line[strcspn(line, "\n")] = '\0';
		if (!strncmp(line, name, strlen(name)) && line[strlen(name)] == '=')
			setenv(as, line + strlen(name) + 1, 1);
	}
	fclose(f);
	check(getenv(as), "%s in %s/env", name, dir);
}

static pid_t pid_of(const char *daemon)
{
	char path[128];
	int pid = 0;
	FILE *f;

	snprintf(path, sizeof(path), "%s/run/%s.pid", dir, daemon);
	f = fopen(path, "re");
	check(f && fscanf(f, "%d", &pid) == 1 && pid > 1, "%s", path);
	fclose(f);
	return pid;
}

static void admin(const char *what)
{
	check(!run("radosgw-admin -c %s/ceph.conf %s >/dev/null 2>%s/admin.log", dir, what, dir),
	      "%s", what);
}

static void overload(const char *limit)
{
	check(!run("ceph --admin-daemon %s/run/client.rgw.asok config set "
		   "rgw_max_concurrent_requests %s >/dev/null 2>&1",
		   dir, limit),
	      "admin socket");
}

/* ---- calls ---- */

static struct objstore *open_with(const struct objstore_opts *opts)
{
	struct objstore *s;
	int r = objstore_open(&s, "s3://test-bucket/objects", opts, &e);

	check(!r, "%s", e.text);
	return s;
}

static int put(struct objstore *s, const char *key, char c, size_t len, unsigned int flags)
{
	_cleanup_free_ char *p = malloc(len);
	struct iovec iov = {p, len};

	check(p, "memory");
	memset(p, c, len);
	return objstore_put(s, key, &iov, 1, flags, NULL);
}

static void check_object(struct objstore *s, const char *key, char c, size_t len)
{
	_cleanup_free_ char *p = malloc(len + 1);
	size_t n;
	int r = objstore_get(s, key, 0, p, len + 1, &n, &e);

	check(!r && n == len, "%s: %zu bytes: %s", key, n, e.text);
	check(p[0] == c && !memcmp(p, p + 1, len - 1), "%s has %c, not %c", key, p[0], c);
}

struct worker {
	struct objstore *s;
	pthread_t thread;
	char c;
	int r;
};

static void *race(void *arg)
{
	struct worker *w = arg;

	w->r = put(w->s, "race", w->c, BIG, OBJSTORE_ONLY_IF_ABSENT);
	return NULL;
}

static void test_race(void)
{
	struct objstore *s = open_with(NULL);
	struct worker w[NR_RACERS];
	char winner = 0;

	for (int i = 0; i < NR_RACERS; i++) {
		w[i] = (struct worker){.s = s, .c = (char)('a' + i)};
		pthread_create(&w[i].thread, NULL, race, &w[i]);
	}
	for (int i = 0; i < NR_RACERS; i++) {
		pthread_join(w[i].thread, NULL);
		check(!w[i].r || w[i].r == -EEXIST, "racer %d: %d", i, w[i].r);
		check(w[i].r || !winner, "two winners");
		winner = w[i].r ? winner : w[i].c;
	}
	check_object(s, "race", winner, BIG);
	objstore_close(s);
}

static void *put_some(void *arg)
{
	struct worker *w = arg;

	for (int i = 0; i < NR_PUTS && !w->r; i++) {
		char key[32];

		snprintf(key, sizeof(key), "some/%c/%d", w->c, i);
		w->r = put(w->s, key, w->c, BIG, OBJSTORE_ONLY_IF_ABSENT);
	}
	return NULL;
}

/* Threads that put while fault() does its worst; all must succeed, whatever it takes. */
static void put_through(struct objstore *s, void (*fault)(void), char first)
{
	struct worker w[NR_PUTTERS];

	for (int i = 0; i < NR_PUTTERS; i++) {
		w[i] = (struct worker){.s = s, .c = (char)(first + i)};
		pthread_create(&w[i].thread, NULL, put_some, &w[i]);
	}
	fault();
	for (int i = 0; i < NR_PUTTERS; i++) {
		pthread_join(w[i].thread, NULL);
		check(!w[i].r, "putter %d: %d", i, w[i].r);
	}
	for (int i = 0; i < NR_PUTTERS * NR_PUTS; i++) {
		char key[32];

		snprintf(key, sizeof(key), "some/%c/%d", w[i / NR_PUTS].c, i % NR_PUTS);
		check_object(s, key, w[i / NR_PUTS].c, BIG);
	}
}

static void storm_over(void)
{
	usleep(500000);
	overload("1024");
}

static void test_storm(void)
{
	struct objstore_opts opts = {.max_tries = 100, .backoff_max_ms = 500};
	struct objstore *s = open_with(&opts);
	struct objstore_counters c;

	overload("1");
	put_through(s, storm_over, 'a');
	objstore_counters(s, &c);
	check(c.retries && c.failures[OBJSTORE_FAILED_THROTTLE], "there was no storm");
	objstore_close(s);
}

static void kill_gateway(void)
{
	usleep(20000);
	kill(pid_of("rgw"), SIGKILL);
	usleep(200000);
	start();
}

/* What was under way may or may not have arrived; it is the same in the end. */
static void test_killed(void)
{
	struct objstore_opts opts = {.max_tries = 100, .backoff_max_ms = 500};
	struct objstore *s = open_with(&opts);
	struct objstore_counters c;

	put_through(s, kill_gateway, 'k');
	objstore_counters(s, &c);
	check(c.failures[OBJSTORE_FAILED_BROKEN] + c.failures[OBJSTORE_FAILED_CONNECT],
	      "not killed");
	objstore_close(s);
}

static _Atomic bool cancelled;

static bool is_cancelled(void *arg)
{
	return atomic_load(&cancelled);
}

static void *cancel_soon(void *arg)
{
	usleep(300000);
	atomic_store(&cancelled, true);
	return NULL;
}

static void *go_on_soon(void *arg)
{
	usleep(3200000);
	kill(*(pid_t *)arg, SIGCONT);
	return NULL;
}

/* The disk hangs: an error in bounded time, or cancelled; then it goes on, and a put whose
 * first tries hung, and came through after all, is no conflict. */
static void test_hang(void)
{
	struct objstore_opts opts = {.stall_timeout_ms = 400, .max_tries = 2};
	struct objstore_opts waiting = {.cancelled = is_cancelled};
	/* Less than the disk hangs for, and more than a loaded machine needs for a try. */
	struct objstore_opts patient = {
		.stall_timeout_ms = 2500, .max_tries = 100, .backoff_max_ms = 100};
	struct objstore *s = open_with(&opts);
	pid_t osd = pid_of("osd");
	pthread_t thread;

	check(!kill(osd, SIGSTOP), "stop");
	check(put(s, "hang", 'h', BIG, 0) == -ETIMEDOUT, "not in time");
	objstore_close(s);

	s = open_with(&waiting);
	pthread_create(&thread, NULL, cancel_soon, NULL);
	check(put(s, "hang", 'h', BIG, 0) == -ECANCELED, "not cancelled");
	pthread_join(thread, NULL);
	objstore_close(s);

	s = open_with(&patient);
	pthread_create(&thread, NULL, go_on_soon, &osd);
	check(!put(s, "went-on", 'w', BIG, OBJSTORE_ONLY_IF_ABSENT), "not settled");
	pthread_join(thread, NULL);
	check_object(s, "went-on", 'w', BIG);
	check(put(s, "went-on", 'x', BIG, OBJSTORE_ONLY_IF_ABSENT) == -EEXIST, "no conflict");
	objstore_close(s);
}

/* ---- refusals ---- */

static void refused(struct objstore *s, int code, const char *says)
{
	struct iovec iov = {(void *)"x", 1};
	int r;

	err_clear(&e);
	r = objstore_put(s, "refused", &iov, 1, 0, &e);
	check(r == -code && strstr(e.text, says), "%d, not %d '%s': %s", r, -code, says, e.text);
}

static void refused_with(const char *variable, const char *value, const char *says)
{
	_cleanup_free_ char *right = strdup(getenv(variable));
	struct objstore *s;

	setenv(variable, value, 1);
	s = open_with(NULL);
	setenv(variable, right, 1);
	refused(s, EACCES, says);
	objstore_close(s);
}

static void test_refusals(void)
{
	struct objstore *s;
	size_t n;
	char c;

	refused_with("AWS_SECRET_ACCESS_KEY", "wrong", "secret key is wrong");
	refused_with("AWS_ACCESS_KEY_ID", "WRONG", "does not know the access key");
	check(!objstore_open(&s, "s3://no-such-bucket", NULL, &e), "%s", e.text);
	refused(s, ENXIO, "no such bucket");
	check(objstore_get(s, "x", 0, &c, 1, &n, NULL) == -ENXIO, "get");
	objstore_close(s);

	s = open_with(NULL);
	admin("quota set --quota-scope=user --uid=test --max-objects=1");
	admin("quota enable --quota-scope=user --uid=test");
	refused(s, EDQUOT, "quota is used up");
	admin("quota disable --quota-scope=user --uid=test");
	admin("user suspend --uid=test");
	refused(s, EACCES, "suspended");
	admin("user enable --uid=test");
	objstore_close(s);
}

/* The bucket as part of the host's name. */
static void test_virtual_host(void)
{
	struct objstore_opts opts = {.style = OBJSTORE_STYLE_VIRTUAL};
	char endpoint[64];
	struct objstore *s;

	snprintf(endpoint, sizeof(endpoint), "http://s3.localhost%s",
		 strrchr(getenv("AWS_ENDPOINT_URL"), ':'));
	opts.endpoint = endpoint;
	s = open_with(&opts);
	check(!put(s, "virtual host", 'v', BIG, OBJSTORE_ONLY_IF_ABSENT), "put");
	objstore_close(s);
	s = open_with(NULL);
	check_object(s, "virtual host", 'v', BIG);
	objstore_close(s);
}

int main(int argc, char **argv)
{
	check(argc == 3, "usage: s3_ceph S3-SERVER PROP-OBJSTORE");
	if (run("command -v radosgw ceph-osd ceph-mon ceph radosgw-admin >/dev/null"))
		skip("Ceph is not installed");
	server = argv[1];
	check(mkdtemp(dir), "%s", dir);
	signal(SIGTERM, on_signal);
	signal(SIGINT, on_signal);
	atexit(stop);
	start();
	setting("S3_ENDPOINT", "AWS_ENDPOINT_URL");
	setting("S3_ACCESS_KEY", "AWS_ACCESS_KEY_ID");
	setting("S3_SECRET_KEY", "AWS_SECRET_ACCESS_KEY");
	setting("S3_REGION", "AWS_REGION");
	test_race();
	test_virtual_host();
	check(!run("%s 40 's3://test-bucket/prop 1+%%&'", argv[2]), "the model");
	test_storm();
	test_hang();
	test_killed();
	test_refusals();
	return 0;
}
