/* SPDX-License-Identifier: MIT */
/* One try of one S3 request, by libcurl; see s3_http.h. */
#include "snapd/backup/s3_http.h"

#include <curl/curl.h>
#include <sodium.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "snapd/util/cleanup.h"

#define NS_PER_MS    1000000ull
#define POLL_MS	     50
#define STALL_BYTES  4096u
#define BUFFER_BYTES (256L << 10)
#define URL_MAX	     (3 * (S3_KEY_MAX + 1) + 512)

struct s3_conn {
	struct s3_conn *next; /* in s3.idle */
	CURL *easy;
	CURLM *multi; /* keeps the sockets */
	char why[CURL_ERROR_SIZE];
};

/* A try under way. */
struct
try {
	struct objstore *s;
	struct s3_conn *c;
	struct s3_request *q;
	struct s3_answer *a;
	struct curl_slist *headers;
	/* sending: the next byte is at `at` of iov[part] */
	int part;
	size_t at;
	uint64_t moved; /* bytes, both ways */
	uint64_t stall_from_ns, stall_moved;
	bool too_long; /* the answer has more than was asked for */
};

void s3_conn_free(struct s3_conn *c)
{
	if (!c)
		return;
	curl_easy_cleanup(c->easy);
	curl_multi_cleanup(c->multi);
	free(c);
}

int s3_conn_create(struct s3_conn **ret)
{
	struct s3_conn *c = calloc(1, sizeof(*c));

	*ret = NULL;
	if (!c)
		return -ENOMEM;
	c->easy = curl_easy_init();
	c->multi = curl_multi_init();
	if (!c->easy || !c->multi) {
		s3_conn_free(c);
		return -ENOMEM;
	}
	*ret = c;
	return 0;
}

void s3_conn_push(struct s3_conn **stack, struct s3_conn *c)
{
	c->next = *stack;
	*stack = c;
}

struct s3_conn *s3_conn_pop(struct s3_conn **stack)
{
	struct s3_conn *c = *stack;

	if (c)
		*stack = c->next;
	return c;
}

/* ---- bytes ---- */

static void account(struct try *t, struct objstore_limiter *l, _Atomic uint64_t *counter, size_t n)
{
	t->q->deadline_ns += objstore_limit(t->s, l, n);
	t->moved += n;
	atomic_fetch_add(counter, n);
}

static size_t on_send(char *dst, size_t size, size_t nr, void *arg)
{
	struct try *t = arg;
	const struct s3_request *q = t->q;
	size_t room = size * nr, n = 0;

	while (room && t->part < q->nr_iov) {
		size_t len = MIN(room, q->iov[t->part].iov_len - t->at);

		memcpy(dst + n, (const char *)q->iov[t->part].iov_base + t->at, len);
		n += len;
		room -= len;
		t->at += len;
		if (t->at == q->iov[t->part].iov_len) {
			t->part++;
			t->at = 0;
		}
	}
	account(t, &t->s->up, &t->s->bytes_sent, n);
	return objstore_cancelled(t->s) ? CURL_READFUNC_ABORT : n;
}

/* From the beginning again, when a kept connection turns out to be closed. */
static int on_seek(void *arg, curl_off_t offset, int origin)
{
	struct try *t = arg;

	if (offset || origin != SEEK_SET)
		return CURL_SEEKFUNC_CANTSEEK;
	t->part = 0;
	t->at = 0;
	return CURL_SEEKFUNC_OK;
}

static bool keep_xml(struct s3_answer *a, const char *p, size_t n)
{
	char *more;

	if (n > S3_ANSWER_MAX - a->xml_len)
		return false;
	more = realloc(a->xml, a->xml_len + n + 1);
	if (!more)
		return false;
	memcpy(more + a->xml_len, p, n);
	a->xml = more;
	a->xml_len += n;
	return true;
}

static size_t on_receive(char *p, size_t size, size_t nr, void *arg)
{
	struct try *t = arg;
	const size_t n = size * nr;
	long status = 0;

	account(t, &t->s->down, &t->s->bytes_received, n);
	curl_easy_getinfo(t->c->easy, CURLINFO_RESPONSE_CODE, &status);
	if (!t->q->buf || status < 200 || status >= 300) {
		t->too_long |= !keep_xml(t->a, p, n);
	} else if (n > t->q->len - t->a->got) {
		t->too_long = true;
	} else {
		memcpy((char *)t->q->buf + t->a->got, p, n);
		t->a->got += n;
	}
	return t->too_long || objstore_cancelled(t->s) ? 0 : n;
}

/* ---- the request ---- */

static const char *const method_names[] = {
	[S3_GET] = "GET", [S3_PUT] = "PUT", [S3_HEAD] = "HEAD", [S3_DELETE] = "DELETE"};

static int add_header(struct try *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

static int add_header(struct try *t, const char *fmt, ...)
{
	char line[S3_TOKEN_MAX + 64];
	struct curl_slist *more;
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	more = curl_slist_append(t->headers, line);
	sodium_memzero(line, sizeof(line));
	if (!more)
		return -ENOMEM;
	t->headers = more;
	return 0;
}

/* Also what is in them: a session token is a secret. */
static void free_headers(struct try *t)
{
	for (struct curl_slist *h = t->headers; h; h = h->next)
		sodium_memzero(h->data, strlen(h->data));
	curl_slist_free_all(t->headers);
}

static int make_headers(struct try *t, const char *path, const char *range)
{
	const struct s3 *x = t->s->impl;
	const struct s3_request *q = t->q;
	char date[S3_DATE_BYTES], auth[S3_AUTH_BYTES];
	const time_t now = time(NULL);
	struct tm tm;
	int r;

	strftime(date, sizeof(date), "%Y%m%dT%H%M%SZ", gmtime_r(&now, &tm));
	s3_sign(&(struct s3_to_sign){.method = method_names[q->method],
				     .path = path,
				     .query = q->query,
				     .host = x->host_header,
				     .payload_sha256 = q->payload_sha256,
				     .date = date,
				     .range = range,
				     .region = x->region},
		x->creds, auth);
	r = add_header(t, "Host: %s", x->host_header) ?:
	    add_header(t, "x-amz-content-sha256: %s", q->payload_sha256) ?:
	    add_header(t, "x-amz-date: %s", date) ?:
	    add_header(t, "Authorization: %s", auth);
	if (!r && *x->creds->token)
		r = add_header(t, "x-amz-security-token: %s", x->creds->token);
	if (!r && range)
		r = add_header(t, "Range: %s", range);
	if (!r && q->only_if_absent)
		r = add_header(t, "If-None-Match: *");
	if (!r && q->method == S3_PUT)
		r = add_header(t, "Content-Type: application/octet-stream");
	return r;
}

static void make_path(const struct s3 *x, const char *key, char *path, size_t size)
{
	char whole[S3_KEY_MAX + 1], encoded[3 * S3_KEY_MAX + 1];

	snprintf(whole, sizeof(whole), "%s%s", x->prefix, key ?: "");
	s3_encode(encoded, key ? whole : "", true);
	snprintf(path, size, "%s%s%s", x->bucket_path, key || !*x->bucket_path ? "/" : "", encoded);
}

static void set_options(struct try *t, const char *url)
{
	const struct s3 *x = t->s->impl;
	const struct s3_request *q = t->q;
	CURL *easy = t->c->easy;

	curl_easy_reset(easy);
	curl_easy_setopt(easy, CURLOPT_URL, url);
	curl_easy_setopt(easy, CURLOPT_PATH_AS_IS, 1L);
	curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, x->scheme);
	curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
	curl_easy_setopt(easy, CURLOPT_HTTPHEADER, t->headers);
	curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
	curl_easy_setopt(easy, CURLOPT_QUICK_EXIT, 1L); /* do not wait for a resolver that hangs */
	curl_easy_setopt(easy, CURLOPT_CONNECTTIMEOUT_MS, (long)t->s->opts.connect_timeout_ms);
	curl_easy_setopt(easy, CURLOPT_SSLVERSION, (long)CURL_SSLVERSION_TLSv1_2);
	curl_easy_setopt(easy, CURLOPT_ERRORBUFFER, t->c->why);
	curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, on_receive);
	curl_easy_setopt(easy, CURLOPT_WRITEDATA, t);
	curl_easy_setopt(easy, CURLOPT_BUFFERSIZE, BUFFER_BYTES);
	curl_easy_setopt(easy, CURLOPT_USERAGENT, "snapd/" SNAPD_VERSION);
	if (x->ca_file)
		curl_easy_setopt(easy, CURLOPT_CAINFO, x->ca_file);
	if (x->loopback)
		curl_easy_setopt(easy, CURLOPT_PROXY, "");
	if (q->method == S3_HEAD)
		curl_easy_setopt(easy, CURLOPT_NOBODY, 1L);
	if (q->method == S3_DELETE)
		curl_easy_setopt(easy, CURLOPT_CUSTOMREQUEST, "DELETE");
	if (q->method != S3_PUT)
		return;
	curl_easy_setopt(easy, CURLOPT_UPLOAD, 1L);
	curl_easy_setopt(easy, CURLOPT_INFILESIZE_LARGE, (curl_off_t)q->body_len);
	curl_easy_setopt(easy, CURLOPT_UPLOAD_BUFFERSIZE, BUFFER_BYTES);
	curl_easy_setopt(easy, CURLOPT_READFUNCTION, on_send);
	curl_easy_setopt(easy, CURLOPT_READDATA, t);
	curl_easy_setopt(easy, CURLOPT_SEEKFUNCTION, on_seek);
	curl_easy_setopt(easy, CURLOPT_SEEKDATA, t);
}

static int prepare(struct try *t)
{
	const struct s3 *x = t->s->impl;
	const struct s3_request *q = t->q;
	char path[URL_MAX], url[2 * URL_MAX + 512], range[64];
	int r;

	make_path(x, q->key, path, sizeof(path));
	snprintf(range, sizeof(range), "bytes=%llu-%llu", (unsigned long long)q->offset,
		 (unsigned long long)(q->offset + q->len - 1));
	r = make_headers(t, path, q->buf ? range : NULL);
	if (r)
		return r;
	snprintf(url, sizeof(url), "%s://%s%s%s%s", x->scheme, x->host_header, path,
		 *q->query ? "?" : "", q->query);
	set_options(t, url);
	return 0;
}

/* ---- on the wire ---- */

/* 0, or why it must end now. */
static int look(struct try *t)
{
	const uint64_t now = objstore_now_ns();

	if (objstore_cancelled(t->s))
		return -ECANCELED;
	if (now >= t->q->deadline_ns)
		return -ETIMEDOUT;
	if (t->moved - t->stall_moved >= STALL_BYTES) {
		t->stall_moved = t->moved;
		t->stall_from_ns = now;
	}
	return now >= t->stall_from_ns + t->s->opts.stall_timeout_ms * NS_PER_MS ? -ETIMEDOUT : 0;
}

/* Until it is done (*ret is curl's result), or must end. */
static int drive(struct try *t, CURLcode *ret)
{
	CURLM *multi = t->c->multi;
	int running = 1, left, r;

	t->stall_from_ns = objstore_now_ns();
	while (curl_multi_perform(multi, &running) == CURLM_OK) {
		const CURLMsg *msg = curl_multi_info_read(multi, &left);

		if (msg && msg->msg == CURLMSG_DONE) {
			*ret = msg->data.result;
			return 0;
		}
		r = look(t);
		if (r)
			return r;
		curl_multi_poll(multi, NULL, 0, POLL_MS, NULL);
	}
	return -ENOMEM;
}

/* ---- the answer ---- */

static const char *header(CURL *easy, const char *name)
{
	struct curl_header *h;

	return curl_easy_header(easy, name, 0, CURLH_HEADER, -1, &h) == CURLHE_OK ? h->value : NULL;
}

static void read_headers(struct try *t)
{
	CURL *easy = t->c->easy;
	struct s3_answer *a = t->a;
	curl_off_t n = -1, wait = 0;
	unsigned long long first, last, total;
	const char *p;
	long size;

	curl_easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &a->status);
	curl_easy_getinfo(easy, CURLINFO_CONTENT_LENGTH_DOWNLOAD_T, &n);
	a->content_length = n;
	curl_easy_getinfo(easy, CURLINFO_RETRY_AFTER, &wait);
	a->retry_after_ms = wait > 0 ? (uint64_t)MIN(wait, (curl_off_t)86400) * 1000 : 0;
	if ((p = header(easy, "ETag")))
		snprintf(a->etag, sizeof(a->etag), "%.*s", (int)strcspn(p + (*p == '"'), "\""),
			 p + (*p == '"'));
	a->mtime_s = (p = header(easy, "Last-Modified")) ? (int64_t)curl_getdate(p, NULL) : -1;
	a->date_s = (p = header(easy, "Date")) ? (int64_t)curl_getdate(p, NULL) : -1;
	if ((p = header(easy, "x-amz-bucket-region")))
		snprintf(a->bucket_region, sizeof(a->bucket_region), "%.36s", p);
	if ((p = header(easy, "Content-Range")) &&
	    sscanf(p, "bytes %20llu-%20llu/%20llu", &first, &last, &total) == 3 && first <= last &&
	    last < total) {
		a->has_range = last - first + 1 == a->got;
		a->range_first = first;
		a->range_total = total;
	}
	if (!curl_easy_getinfo(easy, CURLINFO_REQUEST_SIZE, &size))
		atomic_fetch_add(&t->s->bytes_sent, (uint64_t)size);
	if (!curl_easy_getinfo(easy, CURLINFO_HEADER_SIZE, &size))
		atomic_fetch_add(&t->s->bytes_received, (uint64_t)size);
	if (a->status >= 300 && a->xml)
		s3_parse_error(a->xml, a->xml_len, &a->error);
}

static int failed(struct try *t, enum objstore_failure kind, bool again, int code, const char *what,
		  struct err *e)
{
	const struct s3 *x = t->s->impl;

	t->a->failure = kind;
	t->a->again = again;
	return err_set(e, code, "%s: %s %s%s%s", t->s->url, x->host, what, *t->c->why ? ": " : "",
		       t->c->why);
}

static int explain(struct try *t, CURLcode code, struct err *e)
{
	switch (code) {
	case CURLE_COULDNT_RESOLVE_HOST:
	case CURLE_COULDNT_RESOLVE_PROXY:
		return failed(t, OBJSTORE_FAILED_CONNECT, true, EHOSTUNREACH,
			      "has no address; check the endpoint", e);
	case CURLE_COULDNT_CONNECT:
		return failed(t, OBJSTORE_FAILED_CONNECT, true, ECONNREFUSED,
			      "does not accept connections", e);
	case CURLE_OPERATION_TIMEDOUT: /* only connecting has a limit of curl's */
		return failed(t, OBJSTORE_FAILED_TIMEOUT, true, ETIMEDOUT, "cannot be reached", e);
	case CURLE_PEER_FAILED_VERIFICATION:
	case CURLE_SSL_ISSUER_ERROR:
		return failed(t, OBJSTORE_FAILED_CONNECT, false, EACCES,
			      "shows a certificate that is not trusted; check the CA file", e);
	case CURLE_SSL_CACERT_BADFILE:
		return failed(t, OBJSTORE_FAILED_CONNECT, false, EINVAL,
			      "cannot be trusted without a CA file that can be read", e);
	case CURLE_SSL_CONNECT_ERROR:
		return failed(t, OBJSTORE_FAILED_CONNECT, true, EPROTO, "speaks no TLS with us", e);
	case CURLE_WEIRD_SERVER_REPLY:
	case CURLE_UNSUPPORTED_PROTOCOL:
	case CURLE_BAD_CONTENT_ENCODING:
		return failed(t, OBJSTORE_FAILED_ANSWER, false, EPROTO,
			      "does not speak HTTP as it should", e);
	case CURLE_OUT_OF_MEMORY:
		return failed(t, OBJSTORE_FAILED_BROKEN, false, ENOMEM, "could not be asked", e);
	default:
		return failed(t, OBJSTORE_FAILED_BROKEN, true, ECONNRESET, "broke off", e);
	}
}

/* r: of drive(). */
static int conclude(struct try *t, int r, CURLcode code, struct err *e)
{
	if (r == -ECANCELED || objstore_cancelled(t->s)) {
		t->a->again = false;
		return objstore_cancelled_err(t->s, e);
	}
	if (r == -ETIMEDOUT)
		return failed(t, OBJSTORE_FAILED_TIMEOUT, true, ETIMEDOUT, "hangs", e);
	if (t->too_long)
		return failed(t, OBJSTORE_FAILED_ANSWER, false, EPROTO,
			      "answers more than was asked for", e);
	return explain(t, r ? CURLE_OUT_OF_MEMORY : code, e);
}

static int exchange(struct try *t, struct err *e)
{
	CURLcode code = CURLE_OK;
	int r = 0;

	*t->c->why = '\0';
	if (curl_multi_add_handle(t->c->multi, t->c->easy) != CURLM_OK)
		return failed(t, OBJSTORE_FAILED_BROKEN, false, ENOMEM, "could not be asked", e);
	atomic_fetch_add(&t->s->requests, 1);
	r = drive(t, &code);
	read_headers(t);
	curl_multi_remove_handle(t->c->multi, t->c->easy); /* one under way is cut off */
	return r || code != CURLE_OK ? conclude(t, r, code, e) : 0;
}

int s3_http(struct objstore *s, struct s3_conn *c, struct s3_request *q, struct s3_answer *ret,
	    struct err *e)
{
	struct try t = {.s = s, .c = c, .q = q, .a = ret};
	int r;

	*ret = (struct s3_answer){.content_length = -1, .mtime_s = -1, .date_s = -1};
	r = prepare(&t) ? err_errno(e, ENOMEM, "%s", s->url) : exchange(&t, e);
	curl_easy_setopt(c->easy, CURLOPT_HTTPHEADER, NULL);
	free_headers(&t);
	return r;
}
