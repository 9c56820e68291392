/* SPDX-License-Identifier: MIT */
/*
 * manifest: gfn → loc, sorted, as bytes.  The same encoding serves an epoch's
 * changes and a checkpoint's whole map.  Pure; the decoder takes untrusted bytes.
 *
 * A stream of runs, ascending in gfn, each two varints (LEB128) and at times a
 * loc:   gap    frames between the end of the run before and this one
 *        len << 2 | kind
 *          kind 0  `len` pages; the loc of the first is the one after the last
 *                  page's of the run before (next entry of the same batch)
 *          kind 1  `len` zero pages
 *          kind 2  `len` pages; the loc of the first follows as 8 bytes
 *          kind 3  `len` frames that are gone (their memory was unplugged)
 * Within a run, locs count up by one entry.  Pages written in gfn order thus
 * cost two to three bytes each, and whole zero ranges a few bytes in all.
 */
#pragma once

#include <stddef.h>

#include "include/snapd/format.h"
#include "snapd/util/err.h"

/* One past the highest frame that a manifest can name: 2^64 bytes of 4 KiB pages. */
#define MANIFEST_GFN_MAX ((uint64_t)1 << 52)
#define MANIFEST_GONE	 ((loc_t)3 << 60) /* kind 3, only in manifests */

struct manifest_writer {
	uint8_t *buf; /* owned */
	size_t len, cap;
	uint64_t next_gfn; /* after the run being gathered */
	uint64_t end_gfn;  /* end of the last run written out */
	uint64_t run_gfn, run_len;
	loc_t run_loc, prev_loc; /* first of the run gathered; last page written out */
	uint64_t nr_pages;
	int error;
};

/* Of a writer that is zeroed, or was used: its memory stays. */
int manifest_writer_init(struct manifest_writer *w);
void manifest_writer_deinit(struct manifest_writer *w);
/* gfn must be above every gfn before it; loc a page, ZERO, or GONE.  Errors are
 * kept for manifest_finish(). */
void manifest_add(struct manifest_writer *w, uint64_t gfn, loc_t loc);
/* As for each of n frames; locs of pages count up, ZERO and GONE do not. */
void manifest_add_run(struct manifest_writer *w, uint64_t gfn, uint64_t n, loc_t loc);
/* Nothing can be added afterwards.  *ret borrows the writer's buffer, not NULL even
 * when *len is 0.  -ENOMEM; -EINVAL when something above was broken. */
int manifest_finish(struct manifest_writer *w, const uint8_t **ret, size_t *len);

struct manifest_reader {
	const uint8_t *p, *end; /* borrowed */
	uint64_t gfn;
	loc_t loc;
};
struct manifest_run {
	uint64_t gfn;
	uint64_t len;
	loc_t loc; /* of the first page; ZERO and GONE: of all */
};

void manifest_reader_init(struct manifest_reader *r, const void *buf, size_t len);
/* 1: *ret is the next run; 0: the end; -EUCLEAN. */
int manifest_next(struct manifest_reader *r, struct manifest_run *ret, struct err *e);
