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
#include "snapd/store/seal.h"
#include "snapd/util/err.h"

struct seg_ident {
	uint8_t store[16];
	uint32_t segment;
	uint64_t generation;
	uint64_t segment_bytes;
	uint64_t rewrites;	 /* not 0: blocks of zeroes may lie between its batches */
	const struct seal *seal; /* borrowed; NULL: the store is not encrypted */
};

void seg_super_encode(void *block, const struct seg_ident *id);
int seg_super_decode(const void *block, struct seg_ident *ret, struct err *e);

/* Header bytes of a batch of nr pages: whole blocks. */
static inline uint32_t batch_header_bytes_of(uint16_t version, uint32_t nr_pages)
{
	uint32_t record =
		sizeof(struct batch_page) + (version == BATCH_SEALED ? SEAL_TAG_BYTES : 0);

	return (batch_fixed_bytes(version) + nr_pages * record + FMT_BLOCK - 1) & ~(FMT_BLOCK - 1);
}

static inline uint32_t batch_header_bytes(uint32_t nr_pages)
{
	return batch_header_bytes_of(BATCH_PLAIN, nr_pages);
}

/* Of the largest header in such a store. */
static inline uint32_t batch_header_max(const struct seal *seal)
{
	return batch_header_bytes_of(seal ? BATCH_SEALED : BATCH_PLAIN, BATCH_PAGES_MAX);
}

/* Blocks that a decoded batch takes in its segment. */
static inline uint32_t batch_blocks(const struct batch_header *h)
{
	return h->header_bytes / FMT_BLOCK +
	       (uint32_t)((h->payload_bytes + FMT_BLOCK - 1) / FMT_BLOCK);
}

/* Set magic and hash, and a version that is not set yet, over header_bytes at `header`,
 * padding zeroed by the caller.  Everything else is set before, for blobs with
 * batch_blob_finish(). */
void batch_seal(struct batch_header *header);
/* Blobs: payload_bytes at `payload` get their hash in the header, or are encrypted in
 * place; the reverse, for bytes read. */
void batch_blob_finish(const struct seal *seal, struct batch_header *header, void *payload);
int batch_blob_check(const struct seal *seal, const struct batch_header *h, void *payload,
		     struct err *e);
/* `buf` (8-aligned) holds `len` bytes from the batch's first block on, at least its
 * header; with len between FMT_BLOCK and a header's bytes, -ENODATA says that more
 * are needed (never with len >= batch_header_max()).  *ret and *pages (NULL for blobs)
 * borrow buf.  The payload is not looked at.  A sealed header is opened in place: it
 * can't be decoded twice. */
int batch_decode(void *buf, size_t len, const struct seg_ident *where, uint32_t block,
		 const struct batch_header **ret, const struct batch_page **pages, struct err *e);
/* 1 << page_shift uncompressed bytes of a page of batch h against its record. */
int batch_page_check(const struct page_secret *s, const struct batch_header *h,
		     const struct batch_page *p, const void *bytes, struct err *e);
