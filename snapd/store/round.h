/* SPDX-License-Identifier: MIT */
/*
 * round: what read.c and round.c share of a reader; nobody else includes it.
 */
#pragma once

#include "snapd/store/headers.h"
#include "snapd/store/internal.h"
#include "snapd/util/pool.h"

#define NR_ROUNDS     6u
#define ROUND_BYTES   (4u << 20)
#define ROUND_BATCHES 64u
#define GAPS_BYTES    (2u << 20) /* of a round */

struct page_job;
struct extent;

/* What a call wants, by loc. */
struct source {
	struct page_read *reads; /* one of the three */
	const struct page_at *pages;
	struct page_probe *probes;
	store_place_fn *place; /* of pages */
	void *arg;
	size_t nr, next;
	size_t ahead; /* up to here headers were looked for */
	int failed;   /* -errno: no more rounds */
};

struct round {
	struct pool_task task;
	struct store_reader *reader;
	struct source *src;
	struct open_batch batches[ROUND_BATCHES];
	uint32_t nr_batches, nr_jobs, nr_found, nr_extents, nr_placed;
	bool handed;	       /* `task` was submitted */
	struct page_job *jobs; /* owned, max_jobs, as the next five */
	struct page_job **found;
	struct extent *extents;
	struct read_req *reqs;
	struct placed_page *placed; /* of source.pages */
	int *errs;
	uint8_t *arena; /* owned, mapped: arena_bytes */
	uint8_t *out;	/* owned, mapped: max_jobs pages, of source.pages */
	size_t arena_used, gaps;
	struct read_group group;
	struct codec *codec; /* lent by the store during step 5 */
	uint8_t *page;	     /* owned, page_size: a compressed page that is probed */
	uint8_t *opened;     /* owned, page_size: stored bytes, decrypted */
	struct err first;
};

struct store_reader {
	struct store *s;
	struct reader *io; /* owned */
	uint32_t page_size, page_shift;
	uint32_t max_jobs; /* of a round */
	size_t arena_bytes;
	struct header_cache headers;
	struct open_batch ahead[ROUND_BATCHES];
	struct round rounds[NR_ROUNDS];
	/* rounds[n % NR_ROUNDS]: ended ≤ handed ≤ started */
	uint64_t started, handed, ended;
};

/* Steps 1 to 4, up to where the disk works; made when it is first needed. */
void round_start(struct store_reader *r, struct round *d, struct source *src);
/* All its pages, and every later round of the call. */
void round_fail(struct round *d, int err);
/* Step 5, after the reads. */
void round_finish(struct round *d);
void round_deinit(struct round *d); /* accepts one that was never started */
