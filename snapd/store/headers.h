/* SPDX-License-Identifier: MIT */
/*
 * headers: batches that a reader is about to use, and a cache of their headers.  In:
 * (segment, block); out: the segment's file, open, and the header, proved.
 *
 * A header is known by segment, generation, how often that was rewritten, and block.  The cache
 * must be forgotten after an epoch that failed, since blocks behind the tails are written again.
 *
 *   H1 A header that some open_batch uses stays where it is until that is closed.
 *
 * Threads: one reader's thread; bytes of a header in use may be read by any.
 */
#pragma once

#include "snapd/io_uring_reader.h"
#include "snapd/store/segment.h"

struct store;
struct seg;

#define CACHE_HEADERS 1024u
#define CACHE_BUCKETS 2048u
#define NO_HEADER     UINT32_MAX

struct cached_header {
	uint64_t generation, rewrites;
	uint32_t segment, block;
	uint32_t next;	/* in its bucket */
	uint32_t users; /* open batches */
	bool valid;
};

struct header_cache {
	uint8_t *bytes; /* owned, mapped */
	uint32_t hand;
	struct cached_header slots[CACHE_HEADERS];
	uint32_t buckets[CACHE_BUCKETS];
};

struct open_batch {
	uint32_t segment, block;
	uint32_t header; /* its slot, in use; NO_HEADER */
	bool missing;	 /* to be loaded */
	struct seg *seg; /* open; NULL: err */
	struct seg_ident ident;
	int fd; /* borrowed from seg */
	int err;
	struct err why;
};

int headers_init(struct header_cache *c); /* -ENOMEM */
void headers_deinit(struct header_cache *c);
void headers_forget(struct header_cache *c);
/* The header of a batch, if it is there; borrowed until the next batch is opened. */
const struct batch_header *headers_peek(struct header_cache *c, struct store *s, uint32_t segment,
					uint32_t block);

/* Fill in *b, with a slot; an error is b's.  At most CACHE_HEADERS are open at once. */
void batch_open(struct header_cache *c, struct store *s, uint32_t segment, uint32_t block,
		struct open_batch *b);
/* Read the headers that are missing, together.  An error of one is its own; returned is
 * one of the ring (none is loaded). */
int batches_load(struct header_cache *c, struct store *s, struct reader *io, struct open_batch *b,
		 uint32_t nr);
/* Without an error only. */
static inline const struct batch_header *batch_header_of(const struct header_cache *c,
							 const struct open_batch *b);
void batch_close(struct header_cache *c, struct store *s, struct open_batch *b);

#define HEADER_BYTES (3u * FMT_BLOCK) /* the largest, of a sealed batch */
static inline const struct batch_header *batch_header_of(const struct header_cache *c,
							 const struct open_batch *b)
{
	return (const void *)(c->bytes + (size_t)b->header * HEADER_BYTES);
}
