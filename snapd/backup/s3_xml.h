/* SPDX-License-Identifier: MIT */
/*
 * s3_xml: the two kinds of XML that an S3 server answers with.  In: bytes of a server that
 * is not trusted; out: a page of a listing, or what an error says.  Pure.
 *
 * Refused: document types (so no entities but the five), more than S3_XML_DEPTH elements
 * within each other, names and texts that are wanted and too long, more objects than asked.
 * A page is valid if and only if it says whether it is the last (IsTruncated), and each
 * object has one key, a size and a time.  The order of keys is the caller's to check.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "snapd/backup/objstore.h"

#define S3_XML_DEPTH	16
#define S3_PAGE_OBJECTS 1000u
#define S3_KEY_MAX	1024u

struct s3_object {
	char *key;
	struct objstore_info info;
};

struct s3_page {
	struct s3_object *objects;
	size_t nr;
	bool truncated;
};

/* 0, -EPROTO, or -ENOMEM; the page is the caller's to free after 0. */
int s3_parse_page(const char *xml, size_t len, struct s3_page *ret);
void s3_page_free(struct s3_page *page);

struct s3_error {
	char code[64];
	char message[192]; /* printable ASCII */
	char region[40];
	char endpoint[128];
};

/* What could be found: an answer that is no such document leaves all empty. */
void s3_parse_error(const char *xml, size_t len, struct s3_error *ret);
