/* SPDX-License-Identifier: MIT */
/*
 * s3_open: from a url and options to a struct s3.  In: bucket, prefix, endpoint, region,
 * credentials; out: what each request needs, checked.
 */
#include <ctype.h>
#include <curl/curl.h>
#include <stdio.h>
#include <string.h>

#include "snapd/backup/s3_http.h"
#include "snapd/util/cleanup.h"

static struct s3 *impl(const struct objstore *s)
{
	return s->impl;
}

void s3_close(struct objstore *s)
{
	struct s3 *x = impl(s);

	for (struct s3_conn *c; (c = s3_conn_pop(&x->idle));)
		s3_conn_free(c);
	pthread_mutex_destroy(&x->lock);
	s3_creds_free(x->creds);
	free(x->scheme);
	free(x->host);
	free(x->host_header);
	free(x->bucket_path);
	free(x->prefix);
	free(x->bucket);
	free(x->ca_file);
	free(x);
}

static bool bucket_ok(const char *name)
{
	static const char of[] =
		"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
	size_t n = strlen(name);

	return n >= 3 && n <= 63 && strspn(name, of) == n && isalnum((unsigned char)*name) &&
	       !strstr(name, "..");
}

/* "BUCKET[/PREFIX][/]" */
static int set_bucket(struct objstore *s, const char *spec, struct err *e)
{
	struct s3 *x = impl(s);
	const char *slash = strchr(spec, '/');
	size_t len = slash ? strlen(slash + 1) : 0;

	if (len && slash[len] == '/')
		len--;
	x->bucket = strndup(spec, slash ? (size_t)(slash - spec) : strlen(spec));
	if (!x->bucket ||
	    asprintf(&x->prefix, "%.*s%s", (int)len, slash ? slash + 1 : "", len ? "/" : "") < 0) {
		x->prefix = NULL;
		return err_errno(e, ENOMEM, "%s", s->url);
	}
	if (!bucket_ok(x->bucket))
		return err_set(e, EINVAL, "%s: no bucket can be named '%s'", s->url, x->bucket);
	if (!len)
		return 0;
	x->prefix[len] = '\0';
	if (!objstore_key_ok(x->prefix))
		return err_set(e, EINVAL, "%s: no object can be named '%s/…'", s->url, x->prefix);
	x->prefix[len] = '/';
	return 0;
}

static int set_region(struct objstore *s, struct err *e)
{
	struct s3 *x = impl(s);
	const char *const from[] = {s->opts.region, getenv("AWS_REGION"),
				    getenv("AWS_DEFAULT_REGION"), x->creds->region, "us-east-1"};
	const char *region = NULL;

	for (size_t i = 0; !region; i++)
		region = from[i] && *from[i] ? from[i] : NULL;
	if (strlen(region) >= sizeof(x->region) ||
	    region[strspn(region, "abcdefghijklmnopqrstuvwxyz"
				  "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")])
		return err_set(e, EINVAL, "%s: no region is named '%.40s'", s->url, region);
	memcpy(x->region, region, strlen(region) + 1);
	return 0;
}

static bool is_loopback(const char *host)
{
	size_t n = strlen(host);

	return !strcmp(host, "localhost") || !strcmp(host, "[::1]") ||
	       (n > 10 && !strcmp(host + n - 10, ".localhost")) ||
	       (!strncmp(host, "127.", 4) && host[strspn(host, "0123456789.")] == '\0');
}

/* Its parts; anything more than scheme, host and port is refused. */
static int split_endpoint(struct objstore *s, const char *endpoint, struct err *e)
{
	struct s3 *x = impl(s);
	char *scheme = NULL, *host = NULL, *port = NULL, *path = NULL, *rest = NULL;
	CURLU *u = curl_url();
	bool ok;

	ok = u && !curl_url_set(u, CURLUPART_URL, endpoint, CURLU_NON_SUPPORT_SCHEME) &&
	     !curl_url_get(u, CURLUPART_SCHEME, &scheme, 0) &&
	     !curl_url_get(u, CURLUPART_HOST, &host, 0) &&
	     !curl_url_get(u, CURLUPART_PATH, &path, 0) && !strcmp(path, "/") &&
	     (!strcmp(scheme, "https") || !strcmp(scheme, "http")) &&
	     curl_url_get(u, CURLUPART_USER, &rest, 0) &&
	     curl_url_get(u, CURLUPART_QUERY, &rest, 0);
	if (ok) {
		curl_url_get(u, CURLUPART_PORT, &port, CURLU_NO_DEFAULT_PORT);
		x->loopback = is_loopback(host);
		x->scheme = strdup(scheme);
		if (asprintf(&x->host, "%s%s%s", host, port ? ":" : "", port ?: "") < 0)
			x->host = NULL;
	}
	curl_free(scheme);
	curl_free(host);
	curl_free(port);
	curl_free(path);
	curl_free(rest);
	curl_url_cleanup(u);
	if (!ok)
		return err_set(e, EINVAL, "%s: the endpoint '%.128s' is not https://HOST[:PORT]",
			       s->url, endpoint);
	return x->scheme && x->host ? 0 : err_errno(e, ENOMEM, "%s", s->url);
}

static int set_endpoint(struct objstore *s, struct err *e)
{
	struct s3 *x = impl(s);
	const char *endpoint = s->opts.endpoint ?: getenv("AWS_ENDPOINT_URL_S3") ?:
						   getenv("AWS_ENDPOINT_URL");
	bool aws = !endpoint || !*endpoint, virtual;
	char own[96];
	int r;

	snprintf(own, sizeof(own), "https://s3.%s.amazonaws.com", x->region);
	r = split_endpoint(s, aws ? own : endpoint, e);
	if (r)
		return r;
	if (!strcmp(x->scheme, "http") && !x->loopback && !s->opts.allow_http)
		return err_set(e, EPERM,
			       "%s: what goes to %s by http could be read and changed: use "
			       "https, or allow it",
			       s->url, x->host);
	virtual = s->opts.style == OBJSTORE_STYLE_VIRTUAL ||
		  /* no certificate covers a name with more dots */
		  (s->opts.style == OBJSTORE_STYLE_AUTO && aws && !strchr(x->bucket, '.'));
	if (asprintf(&x->host_header, "%s%s%s", virtual ? x->bucket : "", virtual ? "." : "",
		     x->host) < 0)
		x->host_header = NULL;
	if (asprintf(&x->bucket_path, "%s%s", virtual ? "" : "/", virtual ? "" : x->bucket) < 0)
		x->bucket_path = NULL;
	return x->host_header && x->bucket_path ? 0 : err_errno(e, ENOMEM, "%s", s->url);
}

static int set_ca_file(struct objstore *s, struct err *e)
{
	struct s3 *x = impl(s);

	if (!s->opts.ca_file)
		return 0;
	if (access(s->opts.ca_file, R_OK))
		return err_errno(e, errno, "CA file %s", s->opts.ca_file);
	x->ca_file = strdup(s->opts.ca_file);
	return x->ca_file ? 0 : err_errno(e, ENOMEM, "%s", s->url);
}

static void curl_start(void)
{
	curl_global_init(CURL_GLOBAL_DEFAULT);
}

int s3_objstore_open(struct objstore *s, const char *bucket_and_prefix, struct err *e)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct s3 *x = calloc(1, sizeof(*x));

	if (!x)
		return err_errno(e, ENOMEM, "%s", s->url);
	pthread_once(&once, curl_start);
	pthread_mutex_init(&x->lock, NULL);
	s->impl = x;
	s->ops = &s3_ops;
	return set_bucket(s, bucket_and_prefix, e) ?:
	       s3_creds_load(&s->opts, &x->creds, e) ?:
	       set_region(s, e) ?: set_endpoint(s, e) ?: set_ca_file(s, e);
}
