/* SPDX-License-Identifier: MIT */
/*
 * cache: what this host knows of a repository, so that a small push asks for little: an LMDB
 * environment, a directory for each repository.  Thread-safe.
 *
 *   objects   NAME → the object's bytes: manifests and marks
 *   packs     number be32 → struct: its name, whether it arrived
 *   numbers   NAME of a pack → number
 *   pages     NAME of a page → pack number, entry; and a hash over both
 *   local     NAME of a manifest → number of the local snapshot that was pulled from it
 *
 * Nothing in it is believed that it cannot prove: objects fit their names, a page's record
 * has a hash of its own, and a pack that a manifest is to rely on is asked for in the bucket
 * first (repo.h).  A file that is damaged is removed and made again; what is lost is bytes sent
 * twice, never data.
 *
 * A pack is INTENDED before its upload begins, and SENT when it has arrived: after kill -9 the
 * next push asks for those that may have, and sends none twice.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "snapd/backup/layout.h"
#include "snapd/util/err.h"

struct cache;

enum cache_pack { CACHE_NONE, CACHE_INTENDED, CACHE_SENT };

/* `dir` is made; its parents are there.  One that is open already is shared: LMDB allows a
 * process to open a file once only. */
int cache_open(const char *dir, struct cache **ret, struct err *e);
void cache_close(struct cache *c); /* accepts NULL */

/* One push at a time: two of one host would send the same twice.  False: not now. */
bool cache_try_push(struct cache *c);
void cache_end_push(struct cache *c);

/* *ret malloc()ed, NULL: not there. */
int cache_get_object(struct cache *c, const struct bk_name *name, void **ret, size_t *len,
		     struct err *e);
int cache_put_object(struct cache *c, const struct bk_name *name, const void *bytes, size_t len,
		     struct err *e);
int cache_drop_object(struct cache *c, const struct bk_name *name, struct err *e);

/* A pack and its pages; what it knows of those pages already is replaced. */
int cache_put_pack(struct cache *c, const struct bk_name *name, enum cache_pack state,
		   const struct bk_name *pages, uint32_t nr, struct err *e);
/* Only its state; NONE forgets it, and so the places of its pages. */
int cache_set_pack(struct cache *c, const struct bk_name *name, enum cache_pack state,
		   struct err *e);
enum cache_pack cache_pack_state(struct cache *c, const struct bk_name *name);
typedef int (*cache_pack_fn)(void *arg, const struct bk_name *name, enum cache_pack state);
/* fn makes no calls of its own. */
int cache_each_pack(struct cache *c, cache_pack_fn fn, void *arg, struct err *e);

struct cache_place {
	struct bk_name pack;
	uint32_t entry;
	enum cache_pack state; /* of the pack; never NONE */
};
/* Many look-ups in one transaction. */
struct cache_view;
int cache_view_open(struct cache *c, struct cache_view **ret, struct err *e);
void cache_view_close(struct cache_view *v); /* accepts NULL */
bool cache_find(struct cache_view *v, const struct bk_name *page, struct cache_place *ret);

/* 0: none. */
uint64_t cache_local(struct cache *c, const struct bk_name *manifest);
int cache_set_local(struct cache *c, const struct bk_name *manifest, uint64_t snapshot,
		    struct err *e);
