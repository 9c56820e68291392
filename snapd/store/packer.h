/* SPDX-License-Identifier: MIT */
/*
 * packer: a few pages that will probably be stored, compressed side by side on the
 * pool's threads before the epoch decides about them one by one.  In: pages; out:
 * for each its compressed bytes, or that it stays raw.  A guess that was wrong costs
 * time only.
 *
 * The owner's thread alone calls it; the pool's threads work inside packer_run().
 */
#pragma once

#include <stdint.h>

#include "snapd/store/codec.h"

struct pool;

#define PACK_PAGES 256u
#define PACK_BYTES (1u << 20) /* fewer pages at a time when they are large */

struct packer {
	struct codec_policy policy;
	struct codec_list *codecs; /* borrowed */
	struct pool *pool;	   /* borrowed; NULL: the caller's thread does it all */
	struct codec *codec;	   /* lent by the list: for pages one at a time */
	uint32_t page_size, nr, next;
	const void *pages[PACK_PAGES]; /* borrowed during packer_run() and packer_take() */
	uint32_t lens[PACK_PAGES];     /* 0: raw */
	uint8_t *bytes;		       /* owned: codec_pack_max() each, and one more */
};

/* Of a policy that compresses.  -ENOMEM. */
int packer_init(struct packer *p, struct codec_policy policy, uint32_t page_size,
		struct codec_list *codecs, struct pool *pool);
void packer_deinit(struct packer *p); /* accepts one that is zeroed */
/* Pages that one packer_run() takes. */
static inline uint32_t packer_max(const struct packer *p)
{
	return PACK_BYTES / p->page_size < PACK_PAGES ? PACK_BYTES / p->page_size : PACK_PAGES;
}
/* Forget what was there; then add up to packer_max() pages; then run. */
void packer_reset(struct packer *p);
void packer_add(struct packer *p, const void *page);
int packer_run(struct packer *p); /* -ENOMEM */
/* The compressed form of a page, and its length (0: raw): as prepared, when the page
 * was added in this order, else made now.  Valid until the next call. */
const void *packer_take(struct packer *p, const void *page, uint32_t *len);
