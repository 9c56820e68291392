/* SPDX-License-Identifier: MIT */
/*
 * seal: authenticated encryption of a store.  In: the user's key file and STORE/key;
 * out: keys, and batches sealed and opened in place.
 *
 * A store has one random *store key*, for life.  STORE/key holds it encrypted with a
 * key made from the user's, so that the user's can change without a page being
 * written again.  From the store key come, each for one purpose: the keys of page
 * records, of pages, of blobs and of index records, and the secret of page hashes.
 *
 *   E1 No two encryptions share key and nonce: each batch has 160 random bits of its
 *      own, and its parts are numbered.  (Not derived from seq or place: both come
 *      again after a crash.)
 *   E2 Every part is authenticated with the place, life and epoch of its batch: a
 *      batch that was moved, or is of an earlier life of its segment, does not open.
 *   E3 A sealed store has sealed batches and keyed index records only: what is not
 *      sealed is refused there.
 *
 * What stays in the clear: sizes, counts, times, places, ids, names of VMs and
 * snapshots, command lines.  Nothing of a page's, a manifest's or a state's bytes, nor
 * a hash of them.  An old copy of the whole store cannot be told from the store.
 *
 * Keys lie in guarded, locked memory and are wiped.  Threads: any; keys are constant.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "include/snapd/format.h"
#include "snapd/store/pageid.h"
#include "snapd/util/err.h"

struct seal;

#define SEAL_INDEX_KEY_BYTES 32u

/* The key file `path` opened for the store at `dir_fd` (`dir` for reasons); made when
 * `create` and there is none.  *ret is NULL and 0 returned when the store is not sealed
 * and no path is given.  -ENOKEY: sealed, no path; -EKEYREJECTED: another key; -EPROTO:
 * newer, or path given for a store that is not sealed; -EUCLEAN; -EPERM: others may
 * read the key. */
int seal_open(int dir_fd, const char *dir, const char *path, bool create, struct seal **ret,
	      struct err *e);
void seal_close(struct seal *s); /* accepts NULL */
/* From now on the store is opened with the key file `path`.  Durable. */
int seal_rekey(const struct seal *s, int dir_fd, const char *dir, const char *path, struct err *e);
/* The key that a store's, or a backup repository's, is encrypted with: made from the user's
 * key file.  -EPERM: others may read it. */
int seal_wrapping_key(const char *path, const uint8_t salt[16], uint8_t ret[32], struct err *e);
const uint8_t *seal_uuid(const struct seal *s); /* 16 bytes: the store's */
const uint8_t *seal_index_key(const struct seal *s);
void seal_page_secret(const struct seal *s, struct page_secret *ret);

/* ---- batches; `h` with all its fields but the hash, and room behind it ---- */

/* A sealed batch's nonce; before its parts are sealed. */
void seal_begin(struct batch_header *h);
/* Stored bytes of page i, in place; its tag goes to its record. */
void seal_page(const struct seal *s, struct batch_header *h, uint32_t i, void *bytes, size_t len);
/* Records and tags, in place, after all pages. */
void seal_records(const struct seal *s, struct batch_header *h);
/* A blob's payload, in place. */
void seal_blob(const struct seal *s, struct batch_header *h, void *payload);
/* The reverse; false: not authentic, and the bytes mean nothing.  dst may be src. */
bool unseal_page(const struct seal *s, const struct batch_header *h, uint32_t i, void *dst,
		 const void *src, size_t len);
bool unseal_records(const struct seal *s, struct batch_header *h);
bool unseal_blob(const struct seal *s, const struct batch_header *h, void *payload);
