/* SPDX-License-Identifier: MIT */
/* The face of object stores: urls, keys, limits, counters; see objstore.h. */
#include "snapd/backup/objstore_impl.h"

#include <assert.h>
#include <sodium.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/util/cleanup.h"

#define NS_PER_S     1000000000ull
#define SLEEP_MAX_NS (100 * 1000000ull) /* how late a cancelled sleeper may notice */

const char *const objstore_failure_names[] = {
	[OBJSTORE_FAILED_CONNECT] = "connect", [OBJSTORE_FAILED_TIMEOUT] = "timeout",
	[OBJSTORE_FAILED_BROKEN] = "broken",   [OBJSTORE_FAILED_THROTTLE] = "throttle",
	[OBJSTORE_FAILED_SERVER] = "server",   [OBJSTORE_FAILED_DENIED] = "denied",
	[OBJSTORE_FAILED_REFUSED] = "refused", [OBJSTORE_FAILED_ANSWER] = "answer",
};
static_assert(ARRAY_SIZE(objstore_failure_names) == NR_OBJSTORE_FAILURES, "a name each");

/* ---- keys ---- */

/* Bytes of the UTF-8 character at s, 0 when there is none; overlong forms and
 * surrogates are none, since servers differ about them. */
static size_t utf8_char(const unsigned char *s)
{
	static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
	size_t n = *s < 0x80   ? 1
		   : *s < 0xc2 ? 0
		   : *s < 0xe0 ? 2
		   : *s < 0xf0 ? 3
		   : *s < 0xf5 ? 4
			       : 0;
	uint32_t c;

	if (n < 2)
		return n;
	c = *s & (0x7fu >> n);
	for (size_t i = 1; i < n; i++) {
		if ((s[i] & 0xc0) != 0x80)
			return 0;
		c = c << 6 | (s[i] & 0x3f);
	}
	return c < least[n] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000) || c < 0xa0 ? 0 : n;
}

/* Bytes of the character at s, 0 for what XML 1.0 cannot carry or a file name cannot be. */
static size_t key_char(const char *s)
{
	size_t n = utf8_char((const unsigned char *)s);

	if ((unsigned char)*s < ' ' || *s == '\x7f' || *s == '\\')
		return 0;
	if (n == 3 && (!memcmp(s, "\xef\xbf\xbe", 3) || !memcmp(s, "\xef\xbf\xbf", 3)))
		return 0;
	return n;
}

static bool part_ok(const char *part, size_t len)
{
	size_t n;

	if (!len || len > OBJSTORE_PART_MAX || part[0] == '.')
		return false;
	for (const char *end = part + len; part < end; part += n) {
		n = key_char(part);
		if (!n)
			return false;
	}
	return true;
}

/* May it be the beginning of a key? */
static bool text_ok(const char *s)
{
	size_t n;

	if (strnlen(s, OBJSTORE_KEY_MAX + 1) > OBJSTORE_KEY_MAX)
		return false;
	while (*s && (n = key_char(s)))
		s += n;
	return !*s;
}

bool objstore_key_ok(const char *key)
{
	if (strnlen(key, OBJSTORE_KEY_MAX + 1) > OBJSTORE_KEY_MAX)
		return false;
	for (;;) {
		size_t len = strcspn(key, "/");

		if (!part_ok(key, len))
			return false;
		if (!key[len])
			return true;
		key += len + 1;
	}
}

static int check_key(const struct objstore *s, const char *key, struct err *e)
{
	return objstore_key_ok(key)
		       ? 0
		       : err_set(e, EINVAL, "%s: no object can be named '%.64s'", s->url, key);
}

/* ---- time and rate ---- */

uint64_t objstore_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * NS_PER_S + (uint64_t)ts.tv_nsec;
}

bool objstore_cancelled(const struct objstore *s)
{
	return s->opts.cancelled && s->opts.cancelled(s->opts.cancelled_arg);
}

int objstore_cancelled_err(const struct objstore *s, struct err *e)
{
	return err_set(e, ECANCELED, "%s: cancelled", s->url);
}

void objstore_sleep_until(const struct objstore *s, uint64_t until_ns)
{
	uint64_t now;

	while ((now = objstore_now_ns()) < until_ns && !objstore_cancelled(s)) {
		uint64_t step = MIN(until_ns - now, (uint64_t)SLEEP_MAX_NS);

		nanosleep(&(struct timespec){.tv_nsec = (long)step}, NULL);
	}
}

/* Half a second's worth that was not used may be made up for, no more. */
uint64_t objstore_limit(struct objstore *s, struct objstore_limiter *l, size_t bytes)
{
	const uint64_t rate = s->opts.rate_limit;
	uint64_t begin, until;

	if (!rate)
		return 0;
	begin = objstore_now_ns();
	pthread_mutex_lock(&l->lock);
	until = MAX(l->next_ns, begin - NS_PER_S / 2);
	l->next_ns = until + (uint64_t)((double)bytes * (double)NS_PER_S / (double)rate);
	pthread_mutex_unlock(&l->lock);
	objstore_sleep_until(s, until);
	return objstore_now_ns() - begin;
}

/* ---- open and close ---- */

static void set_defaults(struct objstore_opts *o)
{
	o->connect_timeout_ms = o->connect_timeout_ms ?: 10000;
	o->stall_timeout_ms = o->stall_timeout_ms ?: 30000;
	o->deadline_ms = o->deadline_ms ?: 300000;
	o->max_tries = o->max_tries ?: 10;
	o->backoff_min_ms = o->backoff_min_ms ?: 200;
	o->backoff_max_ms = MAX(o->backoff_max_ms ?: 20000, o->backoff_min_ms);
}

static int open_kind(struct objstore *s, const char *url, struct err *e)
{
	if (!strncmp(url, "s3://", 5))
		return s3_objstore_open(s, url + 5, e);
	if (!strncmp(url, "file:///", 8))
		return file_objstore_open(s, url + 7, e);
	return err_set(e, EINVAL,
		       "'%.128s' names no object store: s3://BUCKET/PREFIX or file:///PATH", url);
}

int objstore_open(struct objstore **ret, const char *url, const struct objstore_opts *opts,
		  struct err *e)
{
	struct objstore *s = calloc(1, sizeof(*s));
	int r;

	*ret = NULL;
	if (!s)
		return err_errno(e, ENOMEM, "%s", url);
	if (sodium_init() < 0) {
		free(s);
		return err_set(e, EIO, "libsodium cannot start");
	}
	if (opts)
		s->opts = *opts;
	set_defaults(&s->opts);
	pthread_mutex_init(&s->up.lock, NULL);
	pthread_mutex_init(&s->down.lock, NULL);
	s->url = strdup(url);
	r = s->url ? open_kind(s, url, e) : err_errno(e, ENOMEM, "%s", url);
	if (r) {
		objstore_close(s);
		return r;
	}
	*ret = s;
	return 0;
}

void objstore_close(struct objstore *s)
{
	if (!s)
		return;
	if (s->ops)
		s->ops->close(s);
	pthread_mutex_destroy(&s->up.lock);
	pthread_mutex_destroy(&s->down.lock);
	free(s->url);
	free(s);
}

const char *objstore_url(const struct objstore *s)
{
	return s->url;
}

/* ---- calls ---- */

size_t objstore_iov_bytes(const struct iovec *iov, int nr_iov)
{
	size_t sum = 0;

	for (int i = 0; i < nr_iov; i++)
		if (__builtin_add_overflow(sum, iov[i].iov_len, &sum))
			return SIZE_MAX;
	return sum;
}

int objstore_put(struct objstore *s, const char *key, const struct iovec *iov, int nr_iov,
		 unsigned int flags, struct err *e)
{
	int r = check_key(s, key, e);

	assert(!(flags & ~OBJSTORE_ONLY_IF_ABSENT));
	if (r)
		return r;
	if (objstore_iov_bytes(iov, nr_iov) > OBJSTORE_OBJECT_MAX)
		return err_set(e, EINVAL, "%s/%s: an object has at most %u MiB", s->url, key,
			       OBJSTORE_OBJECT_MAX >> 20);
	return s->ops->put(s, key, iov, nr_iov, flags, e);
}

int objstore_get(struct objstore *s, const char *key, uint64_t offset, void *buf, size_t len,
		 size_t *ret_len, struct err *e)
{
	int r = check_key(s, key, e);

	*ret_len = 0;
	if (!r && (len > OBJSTORE_OBJECT_MAX || offset > INT64_MAX - len))
		r = err_set(e, EINVAL, "%s/%s: %zu bytes at %llu cannot be read", s->url, key, len,
			    (unsigned long long)offset);
	return r || !len ? r : s->ops->get(s, key, offset, buf, len, ret_len, e);
}

int objstore_head(struct objstore *s, const char *key, struct objstore_info *ret, struct err *e)
{
	int r = check_key(s, key, e);

	return r ? r : s->ops->head(s, key, ret, e);
}

int objstore_delete(struct objstore *s, const char *key, struct err *e)
{
	int r = check_key(s, key, e);

	return r ? r : s->ops->delete (s, key, e);
}

int objstore_list(struct objstore *s, const char *prefix, const char *start_after,
		  objstore_list_fn fn, void *arg, struct err *e)
{
	if (!text_ok(prefix ?: "") || !text_ok(start_after ?: ""))
		return err_set(e, EINVAL, "%s: no object's name begins so", s->url);
	return s->ops->list(s, prefix ?: "", start_after ?: "", fn, arg, e);
}

int64_t objstore_clock(const struct objstore *s)
{
	struct timespec ts;

	/* Not time(): that is the last tick, behind the time stamps of files. */
	clock_gettime(CLOCK_REALTIME, &ts);
	return ts.tv_sec + atomic_load(&s->clock_ahead_s);
}

void objstore_counters(const struct objstore *s, struct objstore_counters *ret)
{
	*ret = (struct objstore_counters){
		.bytes_sent = atomic_load(&s->bytes_sent),
		.bytes_received = atomic_load(&s->bytes_received),
		.requests = atomic_load(&s->requests),
		.retries = atomic_load(&s->retries),
	};
	for (int i = 0; i < NR_OBJSTORE_FAILURES; i++)
		ret->failures[i] = atomic_load(&s->failures[i]);
}
