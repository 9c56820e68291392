/* SPDX-License-Identifier: MIT */
/*
 * capture_impl: the inside of a capture, for the files that make it: capture.c (early capture, and
 * of a dead VM), capture_pause.c (in the pause and after it), capture_chunk.c (pages to the store).
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "snapd/gpaset.h"
#include "snapd/store.h"
#include "snapd/util/pool.h"
#include "snapd/vm/capture.h"
#include "snapd/vm/priv.h"

#define CHUNK_PAGES 256u
#define NR_CHUNKS   8u

struct chunk {
	struct pool_task task;
	struct capture *c; /* borrowed */
	uint32_t nr;
	bool busy;   /* submitted, not yet handed on */
	bool staged; /* pages[].bytes are there already: only identify them */
	int err;
	uint8_t *buf;			 /* CHUNK_PAGES pages; borrowed from the ring's memory */
	const uint8_t *src[CHUNK_PAGES]; /* NULL: a hole */
	struct epoch_page pages[CHUNK_PAGES];
};

struct capture {
	struct vm *vm;
	const struct page_secret *secret; /* borrowed from the store */
	uint32_t page_size;
	struct epoch *ep;	 /* borrowed; NULL outside an epoch */
	struct selfcheck *check; /* borrowed; NULL: none in this epoch */
	struct chunk *chunks;	 /* NR_CHUNKS, owned */
	uint8_t *chunk_mem;	 /* owned */
	uint64_t filled, handed; /* chunks given to the pool, to the store */
	uint8_t *set_mem;	 /* owned; behind both sets */
	size_t set_bytes;	 /* of each */
	struct gpaset seen, late;
	uint64_t nr_late;
	uint64_t *staged; /* what is in staging memory, in order: frames, and
			   * from their copy on home GFNs; owned */
	uint64_t nr_staged;
	size_t last_staged_bytes;  /* of the epoch before: a forecast */
	size_t gone_told;	   /* of vm->gone, told to the epoch */
	size_t gone_at_pause;	   /* what is unplugged later is not of this epoch */
	uint64_t run_end, run_len; /* frames in a row, as they are taken */
	uint64_t known_until;	   /* frame up to which `in_hole` holds */
	bool in_hole;
	struct capture_stats stats;
};

/* ---- capture_chunk.c ---- */
void capture_chunk_task(struct pool_task *task);
/* The next chunk to fill, empty. */
int capture_next_chunk(struct capture *c, struct chunk **ret, struct err *e);
/* `src` NULL: a hole.  `bytes`: where they are to be, or, staged, are. */
void capture_chunk_add(struct capture *c, struct chunk *k, uint64_t gfn, const uint8_t *src,
		       const uint8_t *bytes);
void capture_submit_chunk(struct capture *c, struct chunk *k, bool staged);
int capture_hand_on_all(struct capture *c, struct err *e);

/* ---- capture.c ---- */
/* Unplugged memory, to the epoch, in its place among the pages. */
int capture_tell_gone(struct capture *c, size_t end, struct err *e);
/* A frame that was given back once: is its page still a hole? */
bool capture_still_hole(struct capture *c, const struct vm_piece *p, uint64_t frame);
