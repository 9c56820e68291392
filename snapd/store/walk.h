/* SPDX-License-Identifier: MIT */
/*
 * walk: the batches of a segment, in the order in which they lie there, from the
 * headers alone.  After damage it goes on at the next block that holds a header
 * which says that it belongs there (its hash covers store, segment, generation and
 * block), so one bad block costs one batch.  Blocks of zeroes between the batches of a
 * segment that was written again are stepped over.  One thread.
 */
#pragma once

#include <stdbool.h>

#include "snapd/store/segment.h"

struct seg_walk {
	int fd; /* borrowed */
	struct seg_ident ident;
	uint32_t block, end; /* next to look at; where to stop */
	uint8_t *buf;	     /* owned; holds blocks [buf_block, buf_block + buf_blocks) */
	uint32_t buf_block, buf_blocks;
};

/* In a segment that was written again holes may lie between batches: the first block from
 * `block` on that can hold something. */
uint32_t seg_skip_hole(int fd, const struct seg_ident *ident, uint32_t block);
/* Nothing of a batch. */
bool seg_block_is_hole(const struct seg_ident *ident, const void *block);
int seg_walk_init(struct seg_walk *w, int fd, const struct seg_ident *ident, uint32_t end);
void seg_walk_deinit(struct seg_walk *w);
/* 1: a batch at *at, *ret and *pages (NULL: a blob) valid until the next call; 0: the end;
 * -EUCLEAN: blocks [*at, w->block) hold no batch, for the reason given; -errno of a read,
 * which took *at..w->block along. */
int seg_walk_next(struct seg_walk *w, uint32_t *at, const struct batch_header **ret,
		  const struct batch_page **pages, struct err *e);
