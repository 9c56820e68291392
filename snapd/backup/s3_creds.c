/* SPDX-License-Identifier: MIT */
/* The places where S3 credentials are; see s3_creds.h. */
#include "snapd/backup/s3_creds.h"

#include <sodium.h>
#include <stdio.h>
#include <string.h>

#include "snapd/util/cleanup.h"
#include "snapd/util/secretfile.h"

#define FILE_MAX (64u << 10)

struct text {
	const char *p;
	size_t len;
};

static void cleanup_sodium(void *p)
{
	sodium_free(*(void **)p); /* wipes */
}

static struct text trimmed(const char *p, size_t len)
{
	while (len && (*p == ' ' || *p == '\t')) {
		p++;
		len--;
	}
	while (len && strchr(" \t\r", p[len - 1]))
		len--;
	return (struct text){p, len};
}

static bool is(struct text t, const char *s)
{
	return t.len == strlen(s) && !memcmp(t.p, s, t.len);
}

/* "[NAME]", or "[profile NAME]" where `word` is set, except for the default profile. */
static bool is_section(struct text line, const char *profile, bool word)
{
	struct text name = trimmed(line.p + 1, line.len - 2);

	if (word && strcmp(profile, "default") != 0) {
		if (name.len < 8 || memcmp(name.p, "profile", 7) != 0 ||
		    (name.p[7] != ' ' && name.p[7] != '\t'))
			return false;
		name = trimmed(name.p + 7, name.len - 7);
	}
	return is(name, profile);
}

/* What may stand in a header: no spaces, nothing that ends a line. */
static int take(struct text value, char *dst, size_t size)
{
	if (!value.len || value.len >= size)
		return -EINVAL;
	for (size_t i = 0; i < value.len; i++)
		if (value.p[i] <= ' ' || value.p[i] > '~')
			return -EINVAL;
	memcpy(dst, value.p, value.len);
	dst[value.len] = '\0';
	return 0;
}

static int take_setting(struct text key, struct text value, struct s3_creds *c)
{
	if (is(key, "aws_access_key_id"))
		return take(value, c->access_key, sizeof(c->access_key));
	if (is(key, "aws_secret_access_key"))
		return take(value, c->secret_key, sizeof(c->secret_key));
	if (is(key, "aws_session_token"))
		return take(value, c->token, sizeof(c->token));
	if (is(key, "region"))
		return take(value, c->region, sizeof(c->region));
	return 0;
}

/* 0, or the number of the line that is wrong. */
static int parse(struct text file, const char *profile, bool word, struct s3_creds *c)
{
	const char *end = file.p + file.len;
	bool inside = false;
	int nr = 1;

	for (const char *p = file.p, *next; p < end; p = next + 1, nr++) {
		struct text line;
		const char *eq;

		next = memchr(p, '\n', (size_t)(end - p)) ?: end;
		line = trimmed(p, (size_t)(next - p));
		if (!line.len || line.p != p || *p == '#' || *p == ';')
			continue;
		if (*p == '[') {
			if (line.len < 2 || line.p[line.len - 1] != ']')
				return nr;
			inside = is_section(line, profile, word);
			continue;
		}
		eq = memchr(p, '=', line.len);
		if (!eq)
			return nr;
		if (inside && take_setting(trimmed(p, (size_t)(eq - p)),
					   trimmed(eq + 1, (size_t)(p + line.len - eq - 1)), c))
			return nr;
	}
	return 0;
}

static bool complete(const struct s3_creds *c)
{
	return *c->access_key && *c->secret_key;
}

static void forget_keys(struct s3_creds *c)
{
	sodium_memzero(c->access_key, sizeof(c->access_key));
	sodium_memzero(c->secret_key, sizeof(c->secret_key));
	sodium_memzero(c->token, sizeof(c->token));
}

/*
 * What the file `path` has of the profile.  1: not both keys; an optional file that is not
 * there has none.  ~/.aws/config (`word`) is often for all to read, and may be unless it
 * has a secret.
 */
static int from_file(struct s3_creds *c, const char *path, const char *profile, bool word,
		     bool optional, struct err *e)
{
	_cleanup_(cleanup_sodium) char *buf = sodium_malloc(FILE_MAX);
	bool others = false;
	struct err why = {0};
	size_t len;
	int r;

	if (!buf)
		return err_errno(e, ENOMEM, "credentials %s", path);
	r = secret_file_read(path, "credentials", buf, FILE_MAX, &len, word ? &others : NULL, &why);
	if (r && optional && (r == -ENOENT || r == -ENOTDIR || (r == -EACCES && word)))
		return 1;
	if (r)
		return err_set(e, -r, "%s", why.text);
	if (len == FILE_MAX)
		return err_set(e, EINVAL, "credentials %s: larger than %u KiB", path,
			       FILE_MAX >> 10);
	forget_keys(c);
	r = parse((struct text){buf, len}, profile, word, c);
	if (r)
		return err_set(e, EINVAL, "credentials %s: line %d is wrong", path, r);
	if (others && *c->secret_key)
		return err_set(e, EPERM, "credentials %s: others may use it; chmod 600 it", path);
	return complete(c) ? 0 : 1;
}

static struct text env(const char *name)
{
	const char *p = getenv(name) ?: "";

	return (struct text){p, strlen(p)};
}

static int from_environment(struct s3_creds *c, struct err *e)
{
	struct text key = env("AWS_ACCESS_KEY_ID"), secret = env("AWS_SECRET_ACCESS_KEY");
	struct text token = env("AWS_SESSION_TOKEN");

	if (!key.len || !secret.len)
		return 1;
	if (take(key, c->access_key, sizeof(c->access_key)) ||
	    take(secret, c->secret_key, sizeof(c->secret_key)) ||
	    (token.len && take(token, c->token, sizeof(c->token))))
		return err_set(e, EINVAL,
			       "$AWS_ACCESS_KEY_ID, $AWS_SECRET_ACCESS_KEY or "
			       "$AWS_SESSION_TOKEN has a character that none has");
	return 0;
}

/* $CREDENTIALS_DIRECTORY/s3-credentials */
static int from_systemd(struct s3_creds *c, const char *profile, struct err *e)
{
	const char *dir = getenv("CREDENTIALS_DIRECTORY");
	_cleanup_free_ char *path = NULL;

	if (!dir || !*dir)
		return 1;
	if (asprintf(&path, "%s/s3-credentials", dir) < 0)
		return err_errno(e, ENOMEM, "credentials");
	return from_file(c, path, profile, false, true, e);
}

/* The file that $variable names, else ~/.aws/NAME. */
static int from_home(struct s3_creds *c, const char *variable, const char *name,
		     const char *profile, bool word, struct err *e)
{
	const char *given = getenv(variable), *home = getenv("HOME");
	_cleanup_free_ char *path = NULL;

	if (given && *given)
		return from_file(c, given, profile, word, false, e);
	if (!home || !*home)
		return 1;
	if (asprintf(&path, "%s/.aws/%s", home, name) < 0)
		return err_errno(e, ENOMEM, "credentials");
	return from_file(c, path, profile, word, true, e);
}

static int load(const struct objstore_opts *opts, struct s3_creds *c, struct err *e)
{
	const char *profile = opts->profile ?: getenv("AWS_PROFILE");
	int r;

	profile = profile && *profile ? profile : "default";
	if (opts->credentials_file) {
		r = from_file(c, opts->credentials_file, profile, false, false, e);
		return r <= 0 ? r
			      : err_set(e, ENOKEY,
					"credentials %s: no aws_access_key_id and "
					"aws_secret_access_key in section [%s]",
					opts->credentials_file, profile);
	}
	r = from_environment(c, e);
	if (r > 0)
		r = from_systemd(c, profile, e);
	if (r > 0)
		r = from_home(c, "AWS_SHARED_CREDENTIALS_FILE", "credentials", profile, false, e);
	if (r > 0)
		r = from_home(c, "AWS_CONFIG_FILE", "config", profile, true, e);
	if (r > 0)
		return err_set(e, ENOKEY,
			       "no S3 credentials of profile %s: set $AWS_ACCESS_KEY_ID and "
			       "$AWS_SECRET_ACCESS_KEY, or write ~/.aws/credentials, or name a "
			       "credentials file, or LoadCredential=s3-credentials:FILE",
			       profile);
	return r;
}

/* The region is in the config file even where the keys are elsewhere. */
static void find_region(const struct objstore_opts *opts, struct s3_creds *c)
{
	const char *profile = opts->profile ?: getenv("AWS_PROFILE");
	struct s3_creds *other;

	if (*c->region)
		return;
	other = sodium_malloc(sizeof(*other));
	if (!other)
		return;
	memset(other, 0, sizeof(*other));
	from_home(other, "AWS_CONFIG_FILE", "config", profile && *profile ? profile : "default",
		  true, NULL);
	memcpy(c->region, other->region, sizeof(c->region));
	sodium_free(other);
}

int s3_creds_load(const struct objstore_opts *opts, const struct s3_creds **ret, struct err *e)
{
	struct s3_creds *c = sodium_malloc(sizeof(*c));
	int r;

	*ret = NULL;
	if (!c)
		return err_errno(e, ENOMEM, "credentials");
	memset(c, 0, sizeof(*c));
	r = load(opts, c, e);
	if (r) {
		sodium_free(c);
		return r;
	}
	find_region(opts, c);
	sodium_mprotect_readonly(c);
	*ret = c;
	return 0;
}

void s3_creds_free(const struct s3_creds *c)
{
	sodium_free((void *)c);
}
