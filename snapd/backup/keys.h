/* SPDX-License-Identifier: MIT */
/*
 * keys: what a repository's config object says, and the keys that follow from it: names,
 * hashes of pages, encryption.  Pure but for reading the user's key file.  Any thread.
 *
 * Names are BLAKE2b-256 with a key of the repository's.  In a sealed repository that key is
 * secret: names tell nothing of what they name, and nobody without it can make an object
 * that fits a name.  In an open one it follows from the repository's id, and names are mere
 * hashes.  256 bits of a cryptographic hash decide that two pages are equal, without a look at
 * the bytes: those are in a bucket, and the pages come from guests that would gain by a
 * collision, so a fast hash would not do.
 *
 * Encryption: XChaCha20-Poly1305.  The nonce is an object's 20 random bytes and the number of
 * the part; table and blob, and runs, have keys of their own.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "snapd/backup/layout.h"
#include "snapd/util/err.h"

struct repo_keys {
	uint8_t repo[16];
	bool sealed;
	uint64_t grace_s;
	uint8_t names[32], pages[32], bodies[32], runs[32];
};

/* A new repository: *ret is its config, *keys what follows.  key_file NULL: open. */
int keys_make(const char *key_file, uint64_t grace_s, uint64_t now_ns, struct bk_config *ret,
	      struct repo_keys *keys, struct err *e);
/* -EUCLEAN; -EPROTO: newer, or a key is given and it is open; -ENOKEY: none is given;
 * -EKEYREJECTED. */
int keys_open(const struct bk_config *config, size_t len, const char *key_file,
	      struct repo_keys *keys, struct err *e);
void keys_wipe(struct repo_keys *keys);

void keys_page_name(const struct repo_keys *k, const void *page, size_t len, struct bk_name *ret);
/* Of two pieces one after the other. */
void keys_object_name(const struct repo_keys *k, const void *a, size_t a_len, const void *b,
		      size_t b_len, struct bk_name *ret);

/* A header with fresh random bytes. */
void keys_header(const struct repo_keys *k, enum bk_type type, struct bk_header *ret);
/* Magic, version, type, repository, seal: what does not hang on the type.  -EUCLEAN, -EPROTO. */
int keys_check_header(const struct repo_keys *k, const struct bk_header *h, enum bk_type type,
		      struct err *e);

/* In place; the tag goes to bytes[len].  part 0: payload or table; n + 1: run n. */
void keys_seal(const struct repo_keys *k, const struct bk_header *h, uint32_t part, uint8_t *bytes,
	       size_t len);
/* bytes[len] is the tag; false: not authentic. */
bool keys_unseal(const struct repo_keys *k, const struct bk_header *h, uint32_t part,
		 uint8_t *bytes, size_t len);

#define BK_HEX_BYTES 65u
const char *name_hex(const struct bk_name *n, char ret[BK_HEX_BYTES]);
int name_parse(const char *hex, struct bk_name *ret); /* -EINVAL */
