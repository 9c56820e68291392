/* SPDX-License-Identifier: MIT */
/*
 * segment: byte layout of superblocks and batches; encode and decode.  Pure: no
 * files, no memory of its own.  Decoders take untrusted bytes; each returns 0,
 * -EUCLEAN, or -EPROTO (intact, but of a newer format) with the reason, and never
 * reads outside what it was given.
 */
#pragma once

#include <stddef.h>

#include "include/snapd/format.h"
#include "snapd/store/pageid.h"
#include "snapd/util/err.h"

struct seg_ident {
	uint8_t store[16];
	uint32_t segment;
	uint64_t generation;
	uint64_t segment_bytes;
};

void seg_super_encode(void *block, const struct seg_ident *id);
int seg_super_decode(const void *block, struct seg_ident *ret, struct err *e);

/* Header bytes of a batch of nr pages: whole blocks. */
static inline uint32_t batch_header_bytes(uint32_t nr_pages)
{
	return (uint32_t)(sizeof(struct batch_header) + nr_pages * sizeof(struct batch_page) +
			  FMT_BLOCK - 1) &
	       ~(FMT_BLOCK - 1);
}

/* Blocks that a decoded batch takes in its segment. */
static inline uint32_t batch_blocks(const struct batch_header *h)
{
	return h->header_bytes / FMT_BLOCK +
	       (uint32_t)((h->payload_bytes + FMT_BLOCK - 1) / FMT_BLOCK);
}

/* Set magic, version and hash over header_bytes at `header`, padding zeroed by the
 * caller.  Everything else is set before, for blobs with batch_blob_hash(). */
void batch_seal(struct batch_header *header);
/* Blobs: set payload_lo and _hi from payload_bytes at `payload`; check them. */
void batch_blob_hash(struct batch_header *header, const void *payload);
int batch_blob_check(const struct batch_header *h, const void *payload, struct err *e);
/* `buf` (8-aligned) holds `len` bytes from the batch's first block on, at least its
 * header; with len between FMT_BLOCK and a header's bytes, -ENODATA says that more
 * are needed (never with len >= 2 * FMT_BLOCK).  *ret and *pages (NULL for blobs)
 * borrow buf.  The payload is not looked at. */
int batch_decode(void *buf, size_t len, const struct seg_ident *where, uint32_t block,
		 const struct batch_header **ret, const struct batch_page **pages, struct err *e);
/* 1 << page_shift uncompressed bytes of a page of batch h against its record. */
int batch_page_check(const struct page_secret *s, const struct batch_header *h,
		     const struct batch_page *p, const void *bytes, struct err *e);
