/* SPDX-License-Identifier: MIT */
/*
 * gc: what gc.c (roots, the last step), mark.c (what epochs name), merge.c (manifests
 * of epochs that go), condemn.c (segments), prune.c (records) and rewrite.c (segments in part dead)
 * share.
 */
#pragma once

#include "snapd/store/internal.h"
#include "snapd/store/pace.h"
#include "snapd/store/refs.h"

struct gc_epoch {
	struct snapd_point at, ancestor, parent;
	bool chained; /* its map builds on its parent's */
	bool root;
	bool kept; /* a root, or one builds on it */
	bool counted;
	bool left; /* it is to go, but in the next round */
	bool held; /* somebody reads its blobs */
};

static inline bool gc_stays(const struct gc_epoch *x)
{
	return x->kept || x->left;
}

/* An epoch that was counted and goes: what it no longer names. */
struct gc_drop {
	size_t epoch; /* of the list */
	struct ref_log log;
};

struct gc {
	struct store *s;
	struct gc_epoch *epochs; /* owned; ascending, as the index has them */
	size_t nr_epochs, cap_epochs;
	struct gc_drop *drops; /* owned */
	size_t nr_drops, cap_drops;
	size_t nr_dropped_places;
	bool more;		    /* some are left for another round */
	bool merged;		    /* records changed: the list is another one */
	struct ref_changes changes; /* of the last step */
	struct seg_refs need;	    /* by what is named after the last step */
	struct seg_refs condemned;
	struct seg_refs victims;      /* to be looked through for space, when the index says so */
	struct ref_changes rewritten; /* what is left in segments that were written again */
	bool image;		      /* the journal is to move: an image of the index */
	bool no_journal;	      /* nothing is left that one would be needed for */
	struct seg_refs removed;      /* those condemned whose files go */
	struct snapd_point *roots;    /* owned; to be marked */
	size_t nr_roots, cap_roots;
	uint64_t *live; /* owned */
	size_t nr_live;
	uint64_t freed;
	uint64_t since; /* commits that came later are not in the list */
	struct pace pace;
	bool locked; /* roots_lock is held: no naps */
};

struct gc_epoch *gc_find_epoch(struct gc *g, struct snapd_point at);
/* After so much was read or written: wait until it is due.  -ECANCELED. */
int gc_pace(struct gc *g, uint64_t bytes, struct err *e);

/* ---- gc.c ---- */

/* Is a running VM on the timeline, or may one be? */
bool gc_is_live(const struct gc *g, uint64_t timeline, const struct rec_timeline *rec);

/* ---- condemn.c ---- */

/* g->condemned, removed, victims; what they say is in the segments, too (G3). */
int gc_condemn(struct gc *g, struct err *e);

/* ---- prune.c ---- */

/* Arg: the gc. */
int gc_prune_txn(struct ix_txn *t, void *arg, struct err *e);

/* ---- mark.c ---- */

/* What was counted by runs before, for the list of epochs.  -ESTALE. */
int gc_load_counts(struct gc *g, struct ix_txn *t, struct err *e);
void gc_learn(struct gc *g, const struct ref_changes *c);
/* Mark what g->roots need, and empty the list. */
int gc_mark_roots(struct gc *g, struct err *e);
/* A point and all that it builds on are held. */
int gc_hold(struct gc *g, struct snapd_point at, struct err *e);
/* All that an epoch names, n times. */
int gc_name_epoch(struct gc *g, const struct gc_epoch *x, int32_t n, struct ref_log *log,
		  struct err *e);
/* As refs_change(), of this life of the segments.  -ESTALE. */
int gc_change(struct gc *g, struct ref_log *log, struct ref_changes *ret, struct err *e);
/* Count what is marked and was not counted before; durable, some at a time, so that a run
 * that was cancelled goes on where it was.  -ECANCELED; -ESTALE. */
int gc_count(struct gc *g, struct err *e);
/* Read what epochs that are not marked named, as far as there is memory for it. */
int gc_read_drops(struct gc *g, struct err *e);
/* What changes when those go that still are not marked: g->changes.  -ESTALE. */
int gc_plan(struct gc *g, struct err *e);
/* Nothing is counted any more. */
int gc_forget_counts(struct gc *g, struct err *e);

/* ---- merge.c ---- */

/* Epochs that are marked only because one other builds on them: no more, in the next run,
 * which is due when g->merged is set.  -ECANCELED; -ESTALE. */
int gc_merge(struct gc *g, struct err *e);

/* ---- rewrite.c ---- */

/* The victims without what nothing names.  -ECANCELED. */
int gc_rewrite(struct gc *g, struct err *e);
