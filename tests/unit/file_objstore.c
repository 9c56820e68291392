/* SPDX-License-Identifier: MIT */
/*
 * Objects as files.  Goal: O1 to O3 of objstore.h for directories.  Method: writers that
 * race and that are killed in the middle, readers that look meanwhile; what is left over is
 * swept, what is being written is not.
 */
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "snapd/backup/objstore_impl.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"

#define NR_RACERS 12
#define BIG	  (3u << 20)

static char dir[] = "/tmp/snapd-objstore.XXXXXX", url[64];
static struct err e;

static struct objstore *open_store(const struct objstore_opts *opts)
{
	struct objstore *s;
	int r = objstore_open(&s, url, opts, &e);

	check(!r, "%s", e.text);
	return s;
}

static int put(struct objstore *s, const char *key, const void *p, size_t len, unsigned int flags)
{
	struct iovec iov[] = {{(void *)p, len / 3}, {(char *)p + len / 3, len - len / 3}};

	err_clear(&e);
	return objstore_put(s, key, iov, 2, flags, &e);
}

static int nr_leftovers(void)
{
	char path[80];
	struct dirent *de;
	DIR *d;
	int nr = 0;

	snprintf(path, sizeof(path), "%s/.put", dir);
	d = opendir(path);
	check(d, "%s", path);
	while ((de = readdir(d)))
		nr += de->d_name[0] != '.';
	closedir(d);
	return nr;
}

static void test_calls(void)
{
	struct objstore *s = open_store(NULL);
	struct objstore_counters c;
	struct objstore_info info;
	char buf[32];
	size_t n;

	check(!put(s, "a/b c+%&=\xc3\xa9", "hello", 5, 0), "%s", e.text);
	check(!put(s, "a/empty", "", 0, 0), "%s", e.text);
	check(put(s, "a/empty", "x", 1, OBJSTORE_ONLY_IF_ABSENT) == -EEXIST, "%s", e.text);
	check(!put(s, "a/empty", "xyz", 3, 0), "%s", e.text);
	check(!objstore_get(s, "a/empty", 1, buf, sizeof(buf), &n, &e) && n == 2 &&
		      !memcmp(buf, "yz", 2),
	      "%zu", n);
	check(!objstore_get(s, "a/empty", 3, buf, 1, &n, &e) && n == 0, "%zu", n);
	check(!objstore_head(s, "a/b c+%&=\xc3\xa9", &info, &e) && info.size == 5, "%s", e.text);
	check(info.mtime_s <= objstore_clock(s) && info.mtime_s > objstore_clock(s) - 60, "clock");
	check(objstore_get(s, "a/no", 0, buf, 1, &n, NULL) == -ENOENT, "absent");
	check(objstore_get(s, "a", 0, buf, 1, &n, NULL) == -ENOENT, "a directory is no object");
	check(objstore_get(s, "a/empty/x", 0, buf, 1, &n, NULL) == -ENOENT, "nor has a file parts");
	check(!objstore_delete(s, "a/empty", &e) && !objstore_delete(s, "a/empty", &e), "%s",
	      e.text);
	check(!objstore_delete(s, "a", &e), "%s", e.text);
	check(objstore_head(s, "a/empty", &info, NULL) == -ENOENT, "deleted");
	objstore_counters(s, &c);
	check(c.bytes_sent == 8 && c.bytes_received == 2, "%llu sent, %llu received",
	      (unsigned long long)c.bytes_sent, (unsigned long long)c.bytes_received);
	check(!nr_leftovers(), "left over");
	objstore_close(s);
}

static void test_keys(void)
{
	static const char *const bad[] = {
		"",	 "/",	   "a/",       "/a",	       "a//b",	   ".",
		"..",	 "a/../b", ".put/x",   "a/.b",	       "a\\b",	   "a\nb",
		"a\x7f", "a\xff",  "\xc0\xaf", "\xed\xa0\x80", "\xc2\x80", "\xef\xbf\xbf",
		"a\xc3",
	};
	struct objstore *s = open_store(NULL);
	char longest[OBJSTORE_KEY_MAX + 2];

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
		check(put(s, bad[i], "x", 1, 0) == -EINVAL, "bad key %zu", i);
	memset(longest, 'k', sizeof(longest));
	for (size_t i = OBJSTORE_PART_MAX; i < sizeof(longest); i += OBJSTORE_PART_MAX + 1)
		longest[i] = '/';
	longest[OBJSTORE_KEY_MAX + 1] = '\0';
	check(put(s, longest, "x", 1, 0) == -EINVAL, "one too long");
	longest[OBJSTORE_KEY_MAX] = '\0';
	check(!put(s, longest, "x", 1, 0), "%s", e.text);
	check(!objstore_delete(s, longest, &e), "%s", e.text);
	longest[OBJSTORE_PART_MAX] = 'k';
	check(put(s, longest, "x", 1, 0) == -EINVAL, "a part too long");
	check(objstore_list(s, "x/\xe2\x82", NULL, NULL, NULL, NULL) == -EINVAL,
	      "half a character");
	objstore_close(s);
	check(objstore_open(&s, "ftp://x/y", NULL, NULL) == -EINVAL, "no such kind");
	check(objstore_open(&s, "file:///tmp/there/is/none", NULL, NULL) == -ENOENT, "no such dir");
	objstore_close(s);
}

struct racer {
	struct objstore *s;
	pthread_t thread;
	int nr, r;
};

static void *race(void *arg)
{
	struct racer *me = arg;
	_cleanup_free_ char *p = malloc(BIG);
	struct iovec iov = {p, BIG};

	check(p, "memory");
	memset(p, me->nr, BIG);
	me->r = objstore_put(me->s, "race/x", &iov, 1, OBJSTORE_ONLY_IF_ABSENT, NULL);
	return NULL;
}

/* One wins, and what is there is the winner's. */
static void test_race(void)
{
	struct objstore *s = open_store(NULL);
	struct racer racers[NR_RACERS];
	int winner = -1;
	char last;
	size_t n;

	for (int i = 0; i < NR_RACERS; i++) {
		racers[i] = (struct racer){.s = s, .nr = i + 1};
		pthread_create(&racers[i].thread, NULL, race, &racers[i]);
	}
	for (int i = 0; i < NR_RACERS; i++) {
		pthread_join(racers[i].thread, NULL);
		check(!racers[i].r || racers[i].r == -EEXIST, "%d", racers[i].r);
		check(racers[i].r || winner < 0, "two winners");
		winner = racers[i].r ? winner : racers[i].nr;
	}
	check(!objstore_get(s, "race/x", BIG - 1, &last, 1, &n, &e) && n == 1, "%s", e.text);
	check(last == winner, "%d won, %d is there", winner, last);
	check(!nr_leftovers(), "left over");
	objstore_close(s);
}

/* Its file is made and locked by now. */
static bool stand_still(void *arg)
{
	check(write(*(int *)arg, "", 1) == 1, "pipe");
	for (;;)
		pause();
}

/* A writer that stands still in the middle, in a process of its own. */
static pid_t half_a_put(const char *key)
{
	int pipe_fd[2];
	char c;
	pid_t pid;

	check(!pipe2(pipe_fd, O_CLOEXEC), "pipe");
	pid = fork();
	check(pid >= 0, "fork");
	if (!pid) {
		struct objstore_opts opts = {.cancelled = stand_still,
					     .cancelled_arg = &pipe_fd[1]};

		put(open_store(&opts), key, "hello", 5, 0);
		_exit(1);
	}
	check(read(pipe_fd[0], &c, 1) == 1, "pipe");
	close(pipe_fd[0]);
	close(pipe_fd[1]);
	return pid;
}

static void test_killed(void)
{
	pid_t pid = half_a_put("killed/x");
	struct objstore_info info;
	struct objstore *s = open_store(NULL);

	check(nr_leftovers() == 1, "swept while it was written");
	check(objstore_head(s, "killed/x", &info, NULL) == -ENOENT, "a part is seen");
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	objstore_close(s);
	s = open_store(NULL);
	check(!nr_leftovers(), "not swept");
	check(objstore_head(s, "killed/x", &info, NULL) == -ENOENT, "a part is seen");
	objstore_close(s);
}

struct replacing {
	struct objstore *s;
	_Atomic bool stop;
};

static void *replace(void *arg)
{
	struct replacing *w = arg;
	static char p[1 << 16];

	for (char c = 'a'; !atomic_load(&w->stop); c = c == 'z' ? 'a' : (char)(c + 1)) {
		struct iovec iov = {p, sizeof(p)};

		memset(p, c, sizeof(p));
		check(!objstore_put(w->s, "replaced", &iov, 1, 0, NULL), "put");
	}
	return NULL;
}

/* A reader beside a writer sees one or the other, whole. */
static void test_replaced(void)
{
	static char p[1 << 17];
	struct replacing w = {.s = open_store(NULL)};
	pthread_t thread;
	size_t n;

	check(!put(w.s, "replaced", p, sizeof(p) / 2, 0), "%s", e.text);
	pthread_create(&thread, NULL, replace, &w);
	for (int i = 0; i < 300; i++) {
		check(!objstore_get(w.s, "replaced", 0, p, sizeof(p), &n, &e), "%s", e.text);
		check(n == sizeof(p) / 2 && !memcmp(p, p + 1, n - 1), "a mixture");
	}
	atomic_store(&w.stop, true);
	pthread_join(thread, NULL);
	objstore_close(w.s);
}

struct seen {
	char text[256];
	int left;
};

static int see(void *arg, const char *key, const struct objstore_info *info)
{
	struct seen *seen = arg;

	strcat(strcat(seen->text, key), " ");
	return --seen->left ? 0 : 7;
}

static const char *listed(struct objstore *s, const char *prefix, const char *after, int limit)
{
	static struct seen seen;
	int r;

	seen = (struct seen){.left = limit};
	r = objstore_list(s, prefix, after, see, &seen, &e);
	check(r == (seen.left ? 0 : 7), "%d: %s", r, e.text);
	return seen.text;
}

/* In the order of bytes of whole keys, where '-' comes before '/' and '0' after it. */
static void test_list(void)
{
	static const char *const keys[] = {"l/a/1", "l/a/2", "l/a-1", "l/a0", "l/b/c/d", "m"};
	struct objstore *s = open_store(NULL);

	for (size_t i = 0; i < ARRAY_SIZE(keys); i++)
		check(!put(s, keys[i], "x", 1, 0), "%s", e.text);
#define LISTED(prefix, after, limit, want)                                 \
	check(!strcmp(listed(s, prefix, after, limit), want), "listed %s", \
	      listed(s, prefix, after, limit))
	LISTED("l/", NULL, 99, "l/a-1 l/a/1 l/a/2 l/a0 l/b/c/d ");
	LISTED("l/a", NULL, 99, "l/a-1 l/a/1 l/a/2 l/a0 ");
	LISTED("l/a/", "l/a/1", 99, "l/a/2 ");
	LISTED("l/", "l/a/1", 2, "l/a/2 l/a0 ");
	LISTED("l/", "l/a.", 2, "l/a/1 l/a/2 ");
	LISTED(NULL, "l/b", 99, "l/b/c/d m race/x replaced ");
	LISTED("no/", NULL, 99, "");
	objstore_close(s);
}

static bool yes(void *arg)
{
	return true;
}

static void test_cancel_and_rate(void)
{
	struct objstore_opts opts = {.cancelled = yes};
	struct objstore *s = open_store(&opts);
	static char p[1 << 20];
	uint64_t begin;
	size_t n;

	check(put(s, "cancelled", "x", 1, 0) == -ECANCELED, "%s", e.text);
	check(objstore_get(s, "m", 0, p, 1, &n, NULL) == -ECANCELED, "get");
	check(!nr_leftovers(), "left over");
	objstore_close(s);

	/* Half a second of the rate is free; the second MiB comes after the first's time. */
	opts = (struct objstore_opts){.rate_limit = 4 << 20};
	s = open_store(&opts);
	begin = objstore_now_ns();
	for (int i = 0; i < 4; i++)
		check(!put(s, "slow", p, sizeof(p), 0), "%s", e.text);
	check(objstore_now_ns() - begin >= 240 * 1000000ull, "too fast");
	objstore_close(s);
}

int main(void)
{
	char command[80];

	check(mkdtemp(dir), "%s", dir);
	snprintf(url, sizeof(url), "file://%s", dir);
	test_calls();
	test_keys();
	test_race();
	test_killed();
	test_replaced();
	test_list();
	test_cancel_and_rate();
	snprintf(command, sizeof(command), "rm -rf %s", dir);
	return system(command) ? 1 : 0;
}
