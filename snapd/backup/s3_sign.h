/* SPDX-License-Identifier: MIT */
/*
 * s3_sign: AWS Signature Version 4 of one request.  In: what is asked, and the keys; out:
 * the value of its Authorization header.  Pure.
 *
 * libcurl can sign, too, but takes the secret into memory that is swapped, dumped and not
 * wiped; here it stays where s3_creds put it, and what is made of it lives on the stack and
 * is wiped.
 */
#pragma once

#include <stddef.h>

#include "snapd/backup/s3_creds.h"

#define S3_DATE_BYTES 17u /* 20130524T000000Z */
#define S3_AUTH_BYTES 512u
#define S3_SHA256_HEX 65u

struct s3_to_sign {
	const char *method;
	const char *path;  /* encoded, from '/' on */
	const char *query; /* encoded, in order, "" without */
	const char *host;  /* as the Host header has it */
	const char *payload_sha256;
	const char *date;  /* S3_DATE_BYTES */
	const char *range; /* value of the Range header, NULL without */
	const char *region;
};

/* Signs host, range, x-amz-content-sha256, x-amz-date and x-amz-security-token. */
void s3_sign(const struct s3_to_sign *what, const struct s3_creds *creds,
	     char ret[static S3_AUTH_BYTES]);
/* Percent-encoded as signatures want it; '/' stays when keep_slash.  Bytes written, less
 * the NUL; `dst` has room for 3 * strlen(src) + 1. */
size_t s3_encode(char *dst, const char *src, bool keep_slash);
