/* SPDX-License-Identifier: MIT */
/*
 * s3_creds: who we are to an S3 server.  In: options, environment, files; out: a key pair in
 * memory that is locked, guarded, read-only, left out of core dumps, and wiped at the end.
 *
 * The first of these that has both keys:
 *   1. the option credentials_file
 *   2. $AWS_ACCESS_KEY_ID, $AWS_SECRET_ACCESS_KEY and, if set, $AWS_SESSION_TOKEN
 *   3. $CREDENTIALS_DIRECTORY/s3-credentials, from systemd's LoadCredential=
 *   4. $AWS_SHARED_CREDENTIALS_FILE or ~/.aws/credentials
 *   5. $AWS_CONFIG_FILE or ~/.aws/config
 * The files are AWS's: "[profile]" and "key = value" (in the last "[profile NAME]"), without
 * what is indented.  A file that others may read is refused when it has the keys.
 */
#pragma once

#include "snapd/backup/objstore.h"

#define S3_TOKEN_MAX 4096u

struct s3_creds {
	char access_key[129];
	char secret_key[129];
	char token[S3_TOKEN_MAX + 1]; /* "" without */
	char region[33];	      /* the profile's; "" when it names none */
};

/* -ENOKEY: there are none; -EPERM, -EINVAL, or an error of reading a file. */
int s3_creds_load(const struct objstore_opts *opts, const struct s3_creds **ret, struct err *e);
void s3_creds_free(const struct s3_creds *c); /* accepts NULL */
