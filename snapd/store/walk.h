/* SPDX-License-Identifier: MIT */
/*
 * walk: the batches of a segment, in the order in which they lie there, from the
 * headers alone.  After damage it goes on at the next block that holds a header
 * which says that it belongs there (its hash covers store, segment, generation and
 * block), so one bad block costs one batch.  One thread.
 */
#pragma once

#include "snapd/store/segment.h"

struct seg_walk {
	int fd; /* borrowed */
	struct seg_ident ident;
	uint32_t block, end; /* next to look at; where to stop */
	uint8_t *buf;	     /* owned; holds blocks [buf_block, buf_block + buf_blocks) */
	uint32_t buf_block, buf_blocks;
};

int seg_walk_init(struct seg_walk *w, int fd, const struct seg_ident *ident, uint32_t end);
void seg_walk_deinit(struct seg_walk *w);
/* 1: a batch at *at, *ret and *pages (NULL: a blob) valid until the next call; 0: the end;
 * -EUCLEAN: blocks [*at, w->block) hold no batch, for the reason given; -errno of a read,
 * which took *at..w->block along. */
int seg_walk_next(struct seg_walk *w, uint32_t *at, const struct batch_header **ret,
		  const struct batch_page **pages, struct err *e);
