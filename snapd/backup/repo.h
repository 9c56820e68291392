/* SPDX-License-Identifier: MIT */
/*
 * repo: a backup repository in an object store: opened, listed, added to, forgotten from,
 * pruned.  No locks; any number of hosts at once.
 *
 * G is the repository's grace time (its config says it), W = G / 4.  All ages are differences
 * of the store's own times (mtime, objstore_clock()), W is measured by this process.
 *
 *   R1 Objects do not change, and a name that was deleted never comes back (layout.h).
 *   R2 A manifest is put last, after everything it refers to has arrived.
 *   R3 A snapshot is forgotten by a *tombstone*.  Its manifest goes on counting until that is
 *      G old; then manifest and tombstone are deleted, in this order.
 *   R4 A pack or blob is deleted only if a *mark* that names it is G old, and a list of all
 *      manifests begun after that names it nowhere.  A mark stays until all it names are gone.
 *   R5 A manifest may refer to (a) what a *base* manifest refers to, that had no tombstone and
 *      then was there, (b) packs and blobs that no mark named and then were there; and is put
 *      less than W after the first of these looks began (repo_commit()).
 *
 * What follows: nothing that a visible manifest refers to is ever deleted.  Let the look
 * of R5 begin at t; the manifest is there by t + W < t + G.
 *   (a) The base's tombstone is put after t, so the base is there until t + G: each list of
 *       manifests sees the base (if it ends by t + G) or the new one (if it begins after t + W),
 *       and lists take less than G - W.
 *   (b) X is deleted only after a mark for X.  None was there at t and X was there after that;
 *       had there been one before, it would be there still (R4).  So the mark is younger than t,
 *       and the list of R4 begins after t + G: it sees the new manifest.
 *   A second prune changes nothing: marks are not taken back, and by R1 to delete twice is
 *   harmless.  What is assumed: lists show what was put before they began; a request that
 *   takes effect does so within G - W after it was sent.
 *
 * Threads: any; each call blocks.
 */
#pragma once

#include <stdbool.h>

#include "snapd/backup/blob.h"
#include "snapd/backup/cache.h"
#include "snapd/backup/keys.h"
#include "snapd/backup/layer.h"
#include "snapd/backup/manifest.h"
#include "snapd/backup/objstore.h"

struct repo_config {
	struct objstore *os;	      /* borrowed */
	const char *key_file;	      /* NULL: not encrypted */
	const char *cache_dir;	      /* each repository has a directory in it; made */
	bool create;		      /* when there is none yet */
	uint64_t grace_s;	      /* of a new one; 0: default */
	int64_t (*now_ms)(void *arg); /* monotonic; NULL: the system's */
	void *now_arg;
};

struct repo {
	struct objstore *os;
	struct repo_keys keys;
	struct cache *cache;
	int64_t (*now_ms)(void *arg);
	void *now_arg;
};

/* -ENOENT: there is no repository; the errors of keys_open() and objstore.h. */
int repo_open(const struct repo_config *c, struct repo **ret, struct err *e);
void repo_close(struct repo *r); /* accepts NULL */

enum repo_room {
	REPO_PACKS,
	REPO_BLOBS,
	REPO_SNAPSHOTS,
	REPO_FORGOTTEN,
	REPO_MARKS,
	REPO_NR_ROOMS
};
extern const char *const repo_rooms[REPO_NR_ROOMS]; /* "packs/", … */
#define REPO_KEY_BYTES 80u
const char *repo_key(enum repo_room room, const struct bk_name *name, char ret[REPO_KEY_BYTES]);

/* fn(arg, name, info) for each object of a room; names that are none are passed over. */
typedef int (*repo_list_fn)(void *arg, const struct bk_name *name,
			    const struct objstore_info *info);
int repo_each(struct repo *r, enum repo_room room, repo_list_fn fn, void *arg, struct err *e);
/* The same as a set. */
int repo_names(struct repo *r, enum repo_room room, struct packset *ret, struct err *e);

/* Put a payload; *sent grows by its bytes. */
int repo_put_blob(struct repo *r, enum repo_room room, enum bk_type type, const void *payload,
		  size_t len, struct bk_name *ret, uint64_t *sent, struct err *e);
/* *ret malloc()ed.  Reasons name the object. */
int repo_get_blob(struct repo *r, enum repo_room room, enum bk_type type,
		  const struct bk_name *name, uint8_t **ret, size_t *len, struct err *e);
/* A manifest or a mark, which the cache may have. */
int repo_get_cached(struct repo *r, enum repo_room room, enum bk_type type,
		    const struct bk_name *name, uint8_t **ret, size_t *len, struct err *e);
int repo_get_manifest(struct repo *r, const struct bk_name *name, struct manifest *ret,
		      struct err *e);

/* ---- snapshots ---- */

struct repo_bad {
	struct bk_name name;
	struct err why;
};
struct repo_list {
	struct manifest *all; /* owned; by VM, then by time */
	size_t nr;
	struct repo_bad *bad; /* owned; manifests that cannot be read */
	size_t nr_bad;
};
/* Those that are not forgotten.  A manifest that is damaged does not fail the list. */
int repo_list(struct repo *r, struct repo_list *ret, struct err *e);
void repo_list_deinit(struct repo_list *l);

struct repo_relied {
	struct bk_name name;
	bool is_pack;
	bool sent;	 /* by us, at */
	int64_t sent_ms; /* now_ms() */
	bool lost;	 /* out */
};
/* Make the snapshot visible; m->name is set.  -ESTALE: what it relies on is or may soon be
 * gone: *base_lost, or some relied[].lost. */
int repo_commit(struct repo *r, struct manifest *m, const struct bk_name *base, bool *base_lost,
		struct repo_relied *relied, size_t nr, struct err *e);
int repo_forget(struct repo *r, const struct bk_name *name, struct err *e);
/* Everything that marks name. */
int repo_marked(struct repo *r, struct packset *ret, struct err *e);

/* ---- prune ---- */

struct prune_stats {
	uint64_t snapshots;    /* manifests, those that are forgotten, too */
	uint64_t packs, blobs; /* there */
	uint64_t snapshots_deleted, packs_deleted, blobs_deleted, bytes_deleted;
	uint64_t marked;  /* by this prune: to be deleted when the grace time is over */
	uint64_t waiting; /* marked before, not old enough yet */
};
/* stop(opaque) true: -ECANCELED, with nothing left half done.  -EUCLEAN: a manifest or map
 * cannot be read, so nothing can be said to be unused. */
int repo_prune(struct repo *r, bool dry_run, bool (*stop)(void *opaque), void *opaque,
	       struct prune_stats *ret, struct err *e);
