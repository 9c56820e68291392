/* SPDX-License-Identifier: MIT */
/*
 * blob: a payload ↔ an object that is compressed and, in a sealed repository, encrypted.
 * Pure.  The object's name is the hash of all its bytes.
 */
#pragma once

#include "snapd/backup/keys.h"

struct blob {
	uint8_t *bytes; /* owned: the object */
	size_t len;
	struct bk_name name;
};

/* -ENOMEM; -EFBIG beyond BK_BLOB_MAX. */
int blob_encode(const struct repo_keys *k, enum bk_type type, const void *payload, size_t len,
		struct blob *ret, struct err *e);
void blob_deinit(struct blob *b);
/* *ret is malloc()ed, one byte longer than *ret_len.  -EUCLEAN, -EPROTO, -ENOMEM. */
int blob_decode(const struct repo_keys *k, enum bk_type type, const struct bk_name *name,
		const void *bytes, size_t len, uint8_t **ret, size_t *ret_len, struct err *e);
