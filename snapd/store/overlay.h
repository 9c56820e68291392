/* SPDX-License-Identifier: MIT */
/*
 * overlay: sorted runs of several layers, one over the other, as one sorted sequence: maps and
 * changes in the order of their frames, without a map in memory.  Pure; one thread.
 *
 * In: layers, the uppermost first, each a function that gives its runs, ascending and apart.  Out:
 * runs, ascending and apart, of all frames that any layer names, each as the uppermost that
 * names it has it.  A run may come in pieces.
 *
 * Layers whose run begins later wait in a heap by that beginning; those whose run may be at the
 * current frame are in a heap by rank.  O(log layers) a run.
 *
 * O1 No waiting layer's run begins before the current frame.
 * O2 The lowest rank of those at hand that covers the current frame decides.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "snapd/store/manifest.h"
#include "snapd/util/err.h"

/* 1: *ret is the next run; 0: no more; -errno. */
typedef int (*overlay_fn)(void *layer, struct manifest_run *ret, struct err *e);

struct overlay_layer;
struct overlay {
	overlay_fn fn;
	struct overlay_layer *layers; /* owned; by rank */
	uint32_t *waiting, *at_hand;  /* owned; heaps of ranks */
	uint32_t nr_waiting, nr_at_hand;
	uint64_t gfn; /* all before it was given */
};

/* `layers`: arguments for fn, borrowed until deinit.  -ENOMEM, or what fn returns. */
int overlay_init(struct overlay *o, overlay_fn fn, void *const *layers, uint32_t nr, struct err *e);
void overlay_deinit(struct overlay *o); /* accepts one that is zeroed */
/* As a layer's fn. */
int overlay_next(struct overlay *o, struct manifest_run *ret, struct err *e);

/* What is left of a run from `gfn` on, which is in it or is its end. */
static inline struct manifest_run run_from(struct manifest_run r, uint64_t gfn)
{
	uint64_t skip = gfn - r.gfn;

	return (struct manifest_run){.gfn = gfn,
				     .len = r.len - skip,
				     .loc = loc_kind(r.loc) == LOC_PAGE ? r.loc + skip : r.loc};
}
