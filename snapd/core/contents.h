/* SPDX-License-Identifier: MIT */
/*
 * contents: a snapshot opened for reading: its state, the pieces that its RAM
 * consists of, and the map of its pages.  Everything comes from disk and is
 * checked.  As long as it is open, deleting the snapshot takes nothing away from it.
 * One thread at a time.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "snapd/store/pagemap.h"
#include "snapd/state.h"
#include "snapd/store.h"

struct contents {
	struct store *store; /* where snap.point is pinned; NULL: nowhere */
	struct store_snapshot snap;
	void *state; /* owned */
	size_t state_len;
	struct snapd_state_reader reader; /* of `state` */
	const struct state_piece *pieces; /* in `state`; ascending, apart */
	size_t nr_pieces;
	uint64_t nr_pages;   /* of all pieces */
	struct pagemap *map; /* NULL without with_map; owned */
};

int contents_open(struct store *s, uint64_t snapshot, bool with_map, struct contents *ret,
		  struct err *e);
void contents_deinit(struct contents *c);

/* The "pieces" record, checked: sorted, apart, not empty, within reason.  -EUCLEAN. */
int contents_pieces(const struct snapd_state_reader *r, const struct state_piece **ret, size_t *nr,
		    uint64_t *nr_pages, struct err *e);

/* No vCPUs: memory of a VM whose VMM was dead. */
bool contents_postmortem(const struct snapd_state_reader *r);

/* All frames of the pieces, ascending by home GFN. */
struct contents_walk {
	const struct contents *c;
	size_t piece;
	uint64_t page; /* in the piece */
};
static inline struct contents_walk contents_walk(const struct contents *c)
{
	return (struct contents_walk){.c = c};
}
/* 1, 0 at the end, or -EUCLEAN when the store does not know that page. */
int contents_next(struct contents_walk *w, uint64_t *gfn, loc_t *loc, struct err *e);
