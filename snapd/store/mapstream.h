/* SPDX-License-Identifier: MIT */
/*
 * mapstream: the map at a point, or what changed up to it since an earlier point, as runs
 * ascending by GFN and apart; each with the loc at the point.  In: the manifests and the
 * checkpoint of the epochs on the way, read piece by piece and laid over each other (overlay.h).
 * Memory: what the caller gives it, 1 MiB,
 * and some 1000 bytes for each of these epochs, at most 1024 to a checkpoint, however large the VM.
 *
 * M1 What is read of a blob is checked part by part before it is used, and as a whole at its end:
 *    whoever acts on runs must not make that final before the end came.
 * M2 What is needed stays: the caller has pinned the point, which keeps it back to its checkpoint;
 *    what lies before that is pinned here.
 *
 * One thread; blocks.
 */
#pragma once

#include "snapd/store.h"
#include "snapd/store/manifest.h"

#define MAPSTREAM_BYTES (24u << 20)

struct mapstream;

/*
 * Without `base`: all frames of the map at `at`; nothing is GONE.  With: all frames that changed
 * since, and perhaps some that did not; GONE ones, too.  The records of the epochs after `base`
 * are enough for that: its snapshot may have been deleted, and its own record; it may even have
 * been merged with those.  -ENOENT: it is no ancestor, or those are gone as well.
 */
int mapstream_open(struct store *s, struct snapd_point at, const struct snapd_point *base,
		   size_t memory_bytes, struct mapstream **ret, struct err *e);
void mapstream_close(struct mapstream *m); /* accepts NULL */
/* 1, 0 at the end.  -EUCLEAN, -EIO, … */
int mapstream_next(struct mapstream *m, struct manifest_run *ret, struct err *e);

/* Epochs `from` to `to` of a timeline. */
typedef int (*mapstream_stretch_fn)(void *arg, uint64_t timeline, uint64_t from, uint64_t to);
/* The ancestors of a point that mapstream_open() could go back to, nearest first, in
 * stretches, until fn returns other than 0, which is returned. */
int mapstream_ancestors(struct store *s, struct snapd_point at, mapstream_stretch_fn fn, void *arg,
			struct err *e);
