/* SPDX-License-Identifier: MIT */
/*
 * s3: an S3 bucket as an object store, for objstore.h.  In: calls; out: requests of
 * s3_http, tried again until they succeed, cannot, or the time is over.
 *
 *   - A try that the server, or the way to it, failed is repeated after a random time up
 *     to a bound that doubles (full jitter), and not before Retry-After.
 *   - A conditional put that is repeated may meet what its own earlier try left, since the
 *     answer may have been all that was lost: then 412 is settled by what is there (its
 *     MD5, else its bytes), not by the status.
 *   - A read is checked against Content-Range and Content-Length before it is believed.
 *   - Lists go on after the last key rather than by the server's token: each page must
 *     begin after it and be in order, so no server can keep us in a circle.
 *
 * Threads: any; each call takes a connection of its own from those that are idle.
 */
#include <ctype.h>
#include <openssl/evp.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "snapd/backup/s3_errors.h"
#include "snapd/util/cleanup.h"

#define NS_PER_MS     1000000ull
#define MIN_RATE      (64u << 10) /* bytes a second, beyond the deadline */
#define COMPARE_BYTES (1u << 20)
#define EMPTY_SHA256  "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

static struct s3 *impl(const struct objstore *s)
{
	return s->impl;
}

/* ---- connections ---- */

static int take_conn(struct s3 *x, struct s3_conn **ret)
{
	pthread_mutex_lock(&x->lock);
	*ret = s3_conn_pop(&x->idle);
	pthread_mutex_unlock(&x->lock);
	return *ret ? 0 : s3_conn_create(ret);
}

static void give_conn(struct s3 *x, struct s3_conn *c)
{
	pthread_mutex_lock(&x->lock);
	s3_conn_push(&x->idle, c);
	pthread_mutex_unlock(&x->lock);
}

/* ---- tries ---- */

static void answer_free(struct s3_answer *a)
{
	free(a->xml);
	a->xml = NULL;
}

/* One try, as a whole: 0 for an answer that is a success. */
static int attempt(struct objstore *s, struct s3_conn *c, struct s3_request *q, struct s3_answer *a,
		   struct err *e)
{
	int r = s3_http(s, c, q, a, e);

	if (r)
		return r;
	if (a->date_s >= 0)
		atomic_store(&s->clock_ahead_s, a->date_s - (int64_t)time(NULL));
	return a->status >= 200 && a->status < 300 ? 0 : s3_explain(s, q, a, e);
}

static bool is_failure(int r)
{
	return r && r != -ENOENT && r != -EEXIST && r != -ECANCELED;
}

/* When to try again after `tries` of them. */
static uint64_t next_try_ns(const struct objstore *s, uint32_t tries, const struct s3_answer *a)
{
	const struct objstore_opts *o = &s->opts;
	uint64_t bound = o->backoff_max_ms, wait;

	if (tries <= 16)
		bound = MIN(bound, (uint64_t)o->backoff_min_ms << (tries - 1));
	wait = randombytes_uniform((uint32_t)bound + 1);
	return objstore_now_ns() + MAX(wait, a->retry_after_ms) * NS_PER_MS;
}

static int give_up(const struct objstore *s, int r, uint32_t tries, const struct err *why,
		   struct err *e)
{
	if (tries == 1)
		return err_set(e, -r, "%s", why->text);
	return err_set(e, -r, "%.440s; tried %u times", why->text, tries);
}

static uint64_t deadline(const struct objstore *s, size_t bytes)
{
	return objstore_now_ns() +
	       (s->opts.deadline_ms + (uint64_t)bytes * 1000 / MIN_RATE) * NS_PER_MS;
}

/* Until it succeeds, cannot, or there is no more time; *tries tells how often. */
static int request(struct objstore *s, struct s3_request *q, struct s3_answer *a, uint32_t *tries,
		   struct err *e)
{
	struct s3_conn *c;
	int r = take_conn(impl(s), &c);

	*a = (struct s3_answer){0};
	*tries = 0;
	if (r)
		return err_errno(e, -r, "%s", s->url);
	q->deadline_ns = deadline(s, q->body_len + q->len);
	for (*tries = 1;; ++*tries) {
		struct err why = {0};
		uint64_t again_ns;

		answer_free(a);
		r = attempt(s, c, q, a, &why);
		if (is_failure(r))
			atomic_fetch_add(&s->failures[a->failure], 1);
		again_ns = r && a->again ? next_try_ns(s, *tries, a) : 0;
		if (!r || !a->again || *tries >= s->opts.max_tries || again_ns >= q->deadline_ns) {
			r = r ? give_up(s, r, *tries, &why, e) : 0;
			break;
		}
		objstore_sleep_until(s, again_ns);
		if (objstore_cancelled(s)) {
			r = objstore_cancelled_err(s, e);
			break;
		}
		atomic_fetch_add(&s->retries, 1);
	}
	give_conn(impl(s), c);
	return r;
}

static int nonsense(struct objstore *s, const char *key, const char *what, struct err *e)
{
	atomic_fetch_add(&s->failures[OBJSTORE_FAILED_ANSWER], 1);
	return err_set(e, EPROTO, "%s/%s: the server's answer makes no sense: %s", s->url, key,
		       what);
}

/* ---- get and head ---- */

static int check_range(struct objstore *s, const struct s3_request *q, const struct s3_answer *a,
		       struct err *e)
{
	if (a->status == 206) {
		if (!a->has_range || a->range_first != q->offset)
			return nonsense(s, q->key, "another range than was asked for", e);
		if (a->got != MIN((uint64_t)q->len, a->range_total - q->offset))
			return nonsense(s, q->key, "less than was asked for", e);
		return 0;
	}
	if (q->offset)
		return nonsense(s, q->key, "no range", e);
	if (a->content_length != (int64_t)a->got)
		return nonsense(s, q->key, "a length that is not told", e);
	return 0;
}

static int s3_get(struct objstore *s, const char *key, uint64_t offset, void *buf, size_t len,
		  size_t *ret_len, struct err *e)
{
	struct s3_request q = {.method = S3_GET,
			       .key = key,
			       .query = "",
			       .offset = offset,
			       .buf = buf,
			       .len = len,
			       .payload_sha256 = EMPTY_SHA256};
	_cleanup_(answer_free) struct s3_answer a = {0};
	struct err why = {0};
	uint32_t tries;
	int r = request(s, &q, &a, &tries, &why);

	if (r && a.status == 416) /* at or past its end, as in an empty object */
		return 0;
	if (r)
		return err_set(e, -r, "%s", why.text);
	r = check_range(s, &q, &a, e);
	if (!r)
		*ret_len = a.got;
	return r;
}

static int head(struct objstore *s, const char *key, struct s3_answer *a, struct err *e)
{
	struct s3_request q = {
		.method = S3_HEAD, .key = key, .query = "", .payload_sha256 = EMPTY_SHA256};
	uint32_t tries;
	int r = request(s, &q, a, &tries, e);

	if (!r && a->content_length < 0)
		r = nonsense(s, key, "no length", e);
	return r;
}

static int s3_head(struct objstore *s, const char *key, struct objstore_info *ret, struct err *e)
{
	_cleanup_(answer_free) struct s3_answer a = {0};
	int r = head(s, key, &a, e);

	if (r)
		return r;
	if (a.mtime_s < 0)
		return nonsense(s, key, "no time", e);
	*ret = (struct objstore_info){.size = (uint64_t)a.content_length, .mtime_s = a.mtime_s};
	return 0;
}

/* ---- put and delete ---- */

static int hash_iov(const EVP_MD *md, const struct iovec *iov, int nr_iov,
		    char hex[static S3_SHA256_HEX])
{
	unsigned char sum[EVP_MAX_MD_SIZE];
	EVP_MD_CTX *ctx = EVP_MD_CTX_new();
	unsigned int len = 0;
	bool ok = ctx && EVP_DigestInit_ex(ctx, md, NULL);

	for (int i = 0; ok && i < nr_iov; i++)
		ok = EVP_DigestUpdate(ctx, iov[i].iov_base, iov[i].iov_len);
	ok = ok && EVP_DigestFinal_ex(ctx, sum, &len);
	EVP_MD_CTX_free(ctx);
	if (ok)
		sodium_bin2hex(hex, S3_SHA256_HEX, sum, len);
	return ok ? 0 : -ENOMEM;
}

/* Is what lies at `offset` of the object what iov has there? */
static bool same_part(const struct iovec *iov, int nr_iov, size_t offset, const char *p, size_t len)
{
	for (int i = 0; i < nr_iov && len; i++) {
		size_t n;

		if (offset >= iov[i].iov_len) {
			offset -= iov[i].iov_len;
			continue;
		}
		n = MIN(len, iov[i].iov_len - offset);
		if (memcmp((const char *)iov[i].iov_base + offset, p, n) != 0)
			return false;
		p += n;
		len -= n;
		offset = 0;
	}
	return !len;
}

/* 1: the object has these bytes; 0: others. */
static int compare_bytes(struct objstore *s, const struct s3_request *put, struct err *e)
{
	_cleanup_free_ char *buf = malloc(COMPARE_BYTES);
	size_t got = 0;

	if (!buf)
		return err_errno(e, ENOMEM, "%s", s->url);
	for (size_t at = 0; at < put->body_len; at += got) {
		int r = s3_get(s, put->key, at, buf, MIN((size_t)COMPARE_BYTES, put->body_len - at),
			       &got, e);

		if (r)
			return r;
		if (!got || !same_part(put->iov, put->nr_iov, at, buf, got))
			return 0;
	}
	return 1;
}

static bool is_md5(const char *etag)
{
	size_t n = 0;

	while (isxdigit((unsigned char)etag[n]))
		n++;
	return n == 32 && !etag[n];
}

/*
 * A conditional put found an object where an earlier try of its own may have put it.
 * An ETag is the MD5 of the bytes unless the server encrypts; as one it is to be believed
 * only when it says that the bytes are ours.
 */
static int settle(struct objstore *s, const struct s3_request *put, struct err *e)
{
	_cleanup_(answer_free) struct s3_answer a = {0};
	char md5[S3_SHA256_HEX];
	int r = head(s, put->key, &a, e);

	if (r)
		return r;
	if ((uint64_t)a.content_length != put->body_len)
		return 0;
	if (is_md5(a.etag) && !hash_iov(EVP_md5(), put->iov, put->nr_iov, md5) &&
	    !strcasecmp(md5, a.etag))
		return 1;
	return compare_bytes(s, put, e);
}

static int s3_put(struct objstore *s, const char *key, const struct iovec *iov, int nr_iov,
		  unsigned int flags, struct err *e)
{
	char sha256[S3_SHA256_HEX];
	struct s3_request q = {.method = S3_PUT,
			       .key = key,
			       .query = "",
			       .iov = iov,
			       .nr_iov = nr_iov,
			       .body_len = objstore_iov_bytes(iov, nr_iov),
			       .only_if_absent = flags & OBJSTORE_ONLY_IF_ABSENT,
			       .payload_sha256 = sha256};
	_cleanup_(answer_free) struct s3_answer a = {0};
	struct err why = {0};
	uint32_t tries;
	int r;

	if (hash_iov(EVP_sha256(), iov, nr_iov, sha256))
		return err_errno(e, ENOMEM, "%s", s->url);
	r = request(s, &q, &a, &tries, &why);
	if (r == -EEXIST && tries > 1) {
		int ours = settle(s, &q, e);

		if (ours)
			return MIN(ours, 0);
	}
	return r ? err_set(e, -r, "%s", why.text) : 0;
}

static int s3_delete(struct objstore *s, const char *key, struct err *e)
{
	struct s3_request q = {
		.method = S3_DELETE, .key = key, .query = "", .payload_sha256 = EMPTY_SHA256};
	_cleanup_(answer_free) struct s3_answer a = {0};
	struct err why = {0};
	uint32_t tries;
	int r = request(s, &q, &a, &tries, &why);

	return r && r != -ENOENT ? err_set(e, -r, "%s", why.text) : 0;
}

/* ---- list ---- */

struct listing {
	struct objstore *s;
	char prefix[S3_KEY_MAX + 1];
	char last[S3_KEY_MAX + 1]; /* whole names; "" before the first */
	objstore_list_fn fn;
	void *arg;
};

static int get_page(struct listing *l, struct s3_page *page, struct err *e)
{
	char query[6 * S3_KEY_MAX + 128], prefix[3 * S3_KEY_MAX + 1], after[3 * S3_KEY_MAX + 1];
	struct s3_request q = {.method = S3_GET, .query = query, .payload_sha256 = EMPTY_SHA256};
	_cleanup_(answer_free) struct s3_answer a = {0};
	uint32_t tries;
	int r;

	s3_encode(prefix, l->prefix, false);
	s3_encode(after, l->last, false);
	snprintf(query, sizeof(query), "list-type=2&max-keys=%u&prefix=%s%s%s", S3_PAGE_OBJECTS,
		 prefix, *after ? "&start-after=" : "", after);
	r = request(l->s, &q, &a, &tries, e);
	if (r)
		return r;
	r = s3_parse_page(a.xml ?: "", a.xml_len, page);
	if (r == -EPROTO)
		return nonsense(l->s, "", "no list of objects", e);
	return r ? err_errno(e, -r, "%s", l->s->url) : 0;
}

static int hand_out(struct listing *l, const struct s3_page *page, struct err *e)
{
	const size_t skip = strlen(impl(l->s)->prefix);

	for (size_t i = 0; i < page->nr; i++) {
		const struct s3_object *o = &page->objects[i];
		int r;

		if (strcmp(o->key, l->last) <= 0)
			return nonsense(l->s, "", "a list that is not in order", e);
		if (strncmp(o->key, l->prefix, strlen(l->prefix)) != 0)
			return nonsense(l->s, "", "a list of other objects", e);
		memcpy(l->last, o->key, strlen(o->key) + 1); /* at most S3_KEY_MAX bytes */
		if (!objstore_key_ok(o->key + skip))
			continue;
		r = l->fn(l->arg, o->key + skip, &o->info);
		if (r)
			return r;
	}
	return page->truncated && !page->nr
		       ? nonsense(l->s, "", "a list that is empty and goes on", e)
		       : 0;
}

static int s3_list(struct objstore *s, const char *prefix, const char *start_after,
		   objstore_list_fn fn, void *arg, struct err *e)
{
	struct listing l = {.s = s, .fn = fn, .arg = arg};
	bool more;
	int r;

	snprintf(l.prefix, sizeof(l.prefix), "%s%s", impl(s)->prefix, prefix);
	if (*start_after)
		snprintf(l.last, sizeof(l.last), "%s%s", impl(s)->prefix, start_after);
	do {
		struct s3_page page;

		r = get_page(&l, &page, e);
		if (r)
			return r;
		r = hand_out(&l, &page, e);
		more = page.truncated;
		s3_page_free(&page);
	} while (!r && more);
	return r;
}

const struct objstore_ops s3_ops = {
	.put = s3_put,
	.get = s3_get,
	.head = s3_head,
	.delete = s3_delete,
	.list = s3_list,
	.close = s3_close,
};
