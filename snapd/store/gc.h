/* SPDX-License-Identifier: MIT */
/* gc: what gc.c (roots, the last step) and mark.c (what they need) share. */
#pragma once

#include "snapd/store/internal.h"
#include "snapd/store/pace.h"

struct gc_epoch {
	struct snapd_point at, ancestor;
	bool kept;
};

struct gc {
	struct store *s;
	struct gc_epoch *epochs; /* owned; ascending, as the index has them */
	size_t nr_epochs, cap_epochs;
	struct seg_refs need; /* by roots */
	struct seg_refs condemned;
	bool image;		   /* the journal is to move: an image of the index */
	bool no_journal;	   /* nothing is left that one would be needed for */
	struct seg_refs removed;   /* those condemned whose files go */
	struct snapd_point *roots; /* owned; to be marked */
	size_t nr_roots, cap_roots;
	uint64_t *live; /* owned */
	size_t nr_live;
	uint64_t freed;
	struct pace pace;
	bool locked;		/* roots_lock is held: no naps */
	struct seg_refs *one;	/* borrowed: what the epoch at hand names */
	struct gc_named *fresh; /* owned, with their lists: not in the store's cache yet */
	size_t nr_fresh, cap_fresh;
};

struct gc_epoch *gc_find_epoch(struct gc *g, struct snapd_point at);
/* Mark what g->roots need, and empty the list.  -ECANCELED. */
int gc_mark_roots(struct gc *g, struct err *e);
/* What was read is kept for the next run, without what is not kept (done: not at all). */
void gc_keep_named(struct gc *g, bool done);
