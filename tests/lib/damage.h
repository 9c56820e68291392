/* SPDX-License-Identifier: MIT */
/*
 * damage: what the tests of a backup repository's objects share: keys of repositories, open and
 * sealed, and ways to spoil bytes.  In: bytes that are right; out: copies of them that are not.
 */
#pragma once

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "snapd/backup/keys.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/rand.h"

/* A file with the key that is made of this byte; its name is the caller's, "…XXXXXX". */
static inline void make_key_file(char *path, uint8_t fill)
{
	_cleanup_fd_ int fd = mkostemp(path, O_CLOEXEC);
	uint8_t bytes[40];

	memset(bytes, fill, sizeof(bytes));
	CHECK(fd >= 0 && write(fd, bytes, sizeof(bytes)) == sizeof(bytes));
}

/* Those of a new repository: sealed with the key of this file, or open (NULL). */
static inline struct repo_keys make_keys(const char *key_path, struct bk_config *config)
{
	struct repo_keys keys;
	struct err e = {0};

	CHECK(!keys_make(key_path, 60, 5, config, &keys, &e));
	CHECK(keys.sealed == (key_path != NULL) && keys.grace_s == 60);
	return keys;
}

static inline void flip(void *bytes, size_t bit)
{
	((uint8_t *)bytes)[bit / 8] ^= (uint8_t)(1u << bit % 8);
}

/* A buffer of exactly this size, so that a read behind it is one that ASan sees. */
static inline uint8_t *copy_of(const void *bytes, size_t len)
{
	uint8_t *copy = malloc(len ? len : 1);

	CHECK(copy);
	memcpy(copy, bytes, len);
	return copy;
}

static inline bool refused(int rc)
{
	return rc == -E_CORRUPT || rc == -EPROTO;
}

/* Where a change is noticed though the name agrees: all but what is random or reserved. */
static inline bool has_meaning(size_t byte)
{
	return byte < offsetof(struct bk_header, reserved) ||
	       (byte >= offsetof(struct bk_header, repo) &&
		byte < offsetof(struct bk_header, nonce)) ||
	       (byte >= offsetof(struct bk_header, table_bytes) &&
		byte < offsetof(struct bk_header, reserved3));
}
