/* SPDX-License-Identifier: MIT */
/* S3 error codes (docs.aws.amazon.com, "Error responses"; Ceph rgw_common.cc) as advice. */
#include "snapd/backup/s3_errors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LACKS "the server lacks what we need (conditional puts, lists of version 2)"

struct meaning {
	const char *code; /* "" : any that is not listed, by status */
	long status_min, status_max;
	int error;
	enum objstore_failure failure;
	bool again;
	const char *advice; /* NULL: the server's own message */
};

static const struct meaning meanings[] = {
	{"SlowDown", 0, 999, EAGAIN, OBJSTORE_FAILED_THROTTLE, true, "the server is overloaded"},
	{"ServiceUnavailable", 0, 999, EAGAIN, OBJSTORE_FAILED_THROTTLE, true,
	 "the server is overloaded"},
	{"RequestTimeout", 0, 999, ETIMEDOUT, OBJSTORE_FAILED_TIMEOUT, true,
	 "the server waited too long for us"},
	{"ConditionalRequestConflict", 0, 999, EAGAIN, OBJSTORE_FAILED_THROTTLE, true,
	 "others write the same object"},
	{"OperationAborted", 0, 999, EAGAIN, OBJSTORE_FAILED_THROTTLE, true,
	 "others write the same object"},
	{"BadDigest", 0, 999, ECONNRESET, OBJSTORE_FAILED_BROKEN, true,
	 "bytes were damaged on the way"},
	{"XAmzContentSHA256Mismatch", 0, 999, ECONNRESET, OBJSTORE_FAILED_BROKEN, true,
	 "bytes were damaged on the way"},
	{"IncompleteBody", 0, 999, ECONNRESET, OBJSTORE_FAILED_BROKEN, true,
	 "bytes were lost on the way"},
	{"NoSuchBucket", 0, 999, ENXIO, OBJSTORE_FAILED_REFUSED, false,
	 "there is no such bucket: create it, or correct the URL or the endpoint"},
	{"InvalidBucketName", 0, 999, EINVAL, OBJSTORE_FAILED_REFUSED, false,
	 "no bucket can be named so"},
	{"InvalidAccessKeyId", 0, 999, EACCES, OBJSTORE_FAILED_DENIED, false,
	 "the server does not know the access key: check credentials and endpoint"},
	{"SignatureDoesNotMatch", 0, 999, EACCES, OBJSTORE_FAILED_DENIED, false,
	 "the secret key is wrong"},
	{"AccessDenied", 0, 999, EACCES, OBJSTORE_FAILED_DENIED, false,
	 "the access key may not do this: it needs GetObject, PutObject, DeleteObject and "
	 "ListBucket on the bucket"},
	{"AllAccessDisabled", 0, 999, EACCES, OBJSTORE_FAILED_DENIED, false,
	 "access to the bucket is disabled"},
	{"AccountProblem", 0, 999, EACCES, OBJSTORE_FAILED_DENIED, false,
	 "the account is not in order: ask the provider"},
	{"UserSuspended", 0, 999, EACCES, OBJSTORE_FAILED_DENIED, false,
	 "the user is suspended: ask the server's administrator"},
	{"ExpiredToken", 0, 999, EACCES, OBJSTORE_FAILED_DENIED, false,
	 "the session token has expired: get new credentials"},
	{"TokenRefreshRequired", 0, 999, EACCES, OBJSTORE_FAILED_DENIED, false,
	 "the session token has expired: get new credentials"},
	{"InvalidToken", 0, 999, EACCES, OBJSTORE_FAILED_DENIED, false,
	 "the session token is wrong: get new credentials"},
	{"QuotaExceeded", 0, 999, EDQUOT, OBJSTORE_FAILED_REFUSED, false,
	 "the quota is used up: raise it, or forget snapshots and prune"},
	{"InsufficientStorage", 0, 999, ENOSPC, OBJSTORE_FAILED_REFUSED, false,
	 "the server is full"},
	{"EntityTooLarge", 0, 999, EFBIG, OBJSTORE_FAILED_REFUSED, false,
	 "the server takes no objects of this size"},
	{"NotImplemented", 0, 999, EOPNOTSUPP, OBJSTORE_FAILED_REFUSED, false, LACKS},
	{"ObjectLocked", 0, 999, EACCES, OBJSTORE_FAILED_DENIED, false,
	 "the object is locked by a retention rule of the bucket"},
	{"InvalidObjectState", 0, 999, EACCES, OBJSTORE_FAILED_REFUSED, false,
	 "the object is archived: have it restored first"},
	{"", 401, 401, EACCES, OBJSTORE_FAILED_DENIED, false, NULL},
	{"", 403, 403, EACCES, OBJSTORE_FAILED_DENIED, false, NULL},
	{"", 408, 408, ETIMEDOUT, OBJSTORE_FAILED_TIMEOUT, true,
	 "the server waited too long for us"},
	{"", 411, 411, EPROTO, OBJSTORE_FAILED_REFUSED, false, NULL},
	{"", 413, 413, EFBIG, OBJSTORE_FAILED_REFUSED, false,
	 "the server takes no objects of this size"},
	{"", 429, 429, EAGAIN, OBJSTORE_FAILED_THROTTLE, true, "the server is overloaded"},
	{"", 501, 501, EOPNOTSUPP, OBJSTORE_FAILED_REFUSED, false, LACKS},
	{"", 503, 503, EAGAIN, OBJSTORE_FAILED_THROTTLE, true, "the server is overloaded"},
	{"", 507, 507, ENOSPC, OBJSTORE_FAILED_REFUSED, false, "the server is full"},
	{"", 500, 599, EIO, OBJSTORE_FAILED_SERVER, true, NULL},
	{"", 400, 499, EPROTO, OBJSTORE_FAILED_REFUSED, false, NULL},
	{"", 0, 999, EPROTO, OBJSTORE_FAILED_ANSWER, false, "no answer that S3 knows"},
};

static const struct meaning *find(const struct s3_answer *a)
{
	for (const struct meaning *m = meanings;; m++)
		if (a->status >= m->status_min && a->status <= m->status_max &&
		    (!*m->code || !strcmp(m->code, a->error.code)))
			return m;
}

/* A server may quote what we sent; keys and tokens are not to be seen in logs.  Eight bytes
 * tell, since the rest may have been cut off. */
static bool quotes(const char *text, const char *secret)
{
	for (; *secret && *text; text++)
		if (!strncmp(text, secret, 8))
			return true;
	return false;
}

static void redact(char *text, const struct s3_creds *c)
{
	if (quotes(text, c->secret_key) || quotes(text, c->access_key) || quotes(text, c->token))
		memcpy(text, "?", 2);
}

static int wrong_place(const struct objstore *s, const struct s3_answer *a, struct err *e)
{
	const struct s3 *x = s->impl;
	const char *region = *a->bucket_region ? a->bucket_region : a->error.region;

	if (*region && strcmp(region, x->region) != 0)
		return err_set(e, EREMCHG, "%s: the bucket is in region %s, not %s: set the region",
			       s->url, region, x->region);
	if (*a->error.endpoint)
		return err_set(e, EREMCHG, "%s: the bucket is at %s: set the endpoint", s->url,
			       a->error.endpoint);
	return err_set(e, EREMCHG, "%s: %s sends us elsewhere (%ld %s): check endpoint and region",
		       s->url, x->host, a->status, a->error.code);
}

static int wrong_clock(const struct objstore *s, const struct s3_answer *a, struct err *e)
{
	long long ahead = a->date_s >= 0 ? (long long)(time(NULL) - a->date_s) : 0;

	if (!ahead)
		return err_set(e, EACCES, "%s: our clock and the server's differ too much", s->url);
	return err_set(e, EACCES, "%s: our clock is %lld s %s the server's: set the clock", s->url,
		       llabs(ahead), ahead > 0 ? "ahead of" : "behind");
}

static int by_table(const struct objstore *s, const struct s3_request *q, struct s3_answer *a,
		    struct err *e)
{
	const struct meaning *m = find(a);
	const char *what = m->advice ?: *a->error.message ? a->error.message : "no reason given";
	const char *code = *a->error.code ? a->error.code : "no code";

	a->failure = m->failure;
	a->again = m->again;
	return err_set(e, m->error, "%s%s%s: %s (%ld %s)", s->url, q->key ? "/" : "", q->key ?: "",
		       what, a->status, code);
}

int s3_explain(const struct objstore *s, const struct s3_request *q, struct s3_answer *a,
	       struct err *e)
{
	const struct s3 *x = s->impl;

	redact(a->error.code, x->creds);
	redact(a->error.message, x->creds);
	redact(a->error.region, x->creds);
	redact(a->error.endpoint, x->creds);
	if (a->status == 404 && q->key && strcmp(a->error.code, "NoSuchBucket") != 0)
		return err_set(e, ENOENT, "%s/%s is not there", s->url, q->key);
	if (a->status == 412 && q->only_if_absent)
		return err_set(e, EEXIST, "%s/%s is already there", s->url, q->key);
	a->failure = OBJSTORE_FAILED_REFUSED;
	a->again = false;
	if (a->status < 400 || !strcmp(a->error.code, "AuthorizationHeaderMalformed"))
		return wrong_place(s, a, e);
	if (!strcmp(a->error.code, "RequestTimeTooSkewed"))
		return wrong_clock(s, a, e);
	return by_table(s, q, a, e);
}
