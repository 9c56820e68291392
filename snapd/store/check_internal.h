/* SPDX-License-Identifier: MIT */
/*
 * What the files of a check share; nobody else includes it.
 *
 *   check.c          the order of things; epochs
 *   check_index.c    records and what they refer to
 *   check_segment.c  files, batches, pages
 *   check_loss.c     what damage costs
 */
#pragma once

#include "snapd/store/check.h"
#include "snapd/store/internal.h"
#include "snapd/store/pace.h"

/* Blocks [from, to) of a segment hold nothing that can be used. */
struct bad_blocks {
	uint32_t segment, from, to;
};

struct batch_at {
	uint32_t block, nr_entries; /* 0 entries: a blob */
	uint32_t gone[8];	    /* bits: pages that were reclaimed */
};

static inline bool batch_lacks(const struct batch_at *b, uint32_t entry)
{
	return entry >= b->nr_entries || b->gone[entry / 32] & 1u << entry % 32;
}

struct seg_map {		  /* what a walk found */
	struct batch_at *batches; /* owned; ascending */
	size_t nr, cap;
	bool walked, bad; /* bad: nothing in it can be used */
};

struct known_epoch {
	struct snapd_point at;
	struct rec_epoch rec;
};

struct check {
	struct store *s;
	const struct store_check_config *c;
	struct store_check_result *ret;
	struct pace pace;
	uint64_t total;
	struct known_epoch *epochs; /* owned; ascending */
	size_t nr_epochs, cap_epochs;
	struct seg_map *segs; /* owned; by number */
	uint32_t nr_segs;
	struct bad_blocks *blocks; /* owned */
	size_t nr_blocks, cap_blocks;
	loc_t *pages; /* owned; pages whose bytes are wrong */
	size_t nr_pages, cap_pages;
	bool blobs_bad;
	bool blobs_here; /* the bytes of blobs are checked where they lie, not by epochs */
};

struct seg_view {
	struct seg_ident ident;
	uint32_t tail;
	uint64_t pages;
	bool used;
};

__attribute__((format(printf, 3, 4))) void check_tell(struct check *k, enum damage_kind kind,
						      const char *fmt, ...);
/* After reading: count, wait as the rate wants, ask whether to go on. */
int check_step(struct check *k, uint64_t bytes, struct err *e);

/* ---- check_index.c ---- */

int check_index(struct check *k, struct err *e);

/* ---- check_segment.c ---- */

struct seg_view check_view(struct check *k, uint32_t id);
int check_segment(struct check *k, uint32_t id, struct err *e);
bool check_in_bad_blocks(const struct check *k, uint32_t segment, uint32_t block);
/* NULL: no batch was found there. */
const struct batch_at *check_find_batch(const struct check *k, uint32_t segment, uint32_t block);

/* ---- check_loss.c ---- */

int check_tell_losses(struct check *k, struct err *e);
