/* SPDX-License-Identifier: MIT */
/*
 * What is on disk, as structs.  docs/format.md is the normative text, with the
 * reasons, "valid if and only if" for each piece, and the index (LMDB) records.
 * All integers are little-endian; all structs have no implicit padding.
 *
 *   STORE/index/data.mdb, lock.mdb     LMDB: the small transactional root
 *   STORE/segments/XXXXXXXX.seg        append-only files of fixed size
 *   STORE/lock                         flock()ed by the one writing process
 *   STORE/key                          of an encrypted store: its key, encrypted
 *
 * A segment is: block 0 struct seg_super, then batches up to the committed tail
 * that the index names; what lies behind the tail means nothing.  A block is
 * 4096 bytes; every batch starts on a block.
 *
 * A batch is a header (whole blocks), then a payload (whole blocks):
 *   PAGES       struct batch_header, nr_entries × struct batch_page; payload: first
 *               the raw pages, on block boundaries, then the compressed ones, packed
 *   blobs       MANIFEST, CHECKPOINT, STATE, EPOCH, INDEX: struct batch_header in one
 *               block, payload: one part of the blob; a blob of several parts is
 *               chained backwards by `prev`, and named by its last part
 */
#pragma once

#include <assert.h>
#include <stdbool.h>
#include <stdint.h>

#include "protocol.h" /* struct snapd_point */

#define FMT_BLOCK	  4096u
#define FMT_MAJOR	  1u
#define FMT_MINOR	  0u
#define SEG_MAGIC	  "SNPSEG01"
#define SEG_BYTES_DEFAULT (64u << 20)
#define SEG_BYTES_MIN	  (2u << 20)
#define SEG_BYTES_MAX	  (1u << 30)
#define BATCH_MAGIC	  0x42504e53u /* "SNPB" */
#define BATCH_BYTES_MAX	  (1u << 20)  /* header and payload */
#define BATCH_PAGES_MAX	  252u	      /* 4 KiB pages: header of 2 blocks (sealed: 3), 255 in all */
#define BATCH_PLAIN	  1u	      /* versions of batches */
#define BATCH_SEALED	  2u
#define KEY_MAGIC	  "SNPKEY01"
#define SEAL_NONCE_BYTES  20u
#define SEAL_TAG_BYTES	  16u

struct seg_super {
	char magic[8];
	uint16_t major;
	uint16_t minor;
	uint32_t segment;
	uint64_t generation; /* counts up each time the file is recycled */
	uint64_t segment_bytes;
	uint8_t store[16];
	uint64_t rewrites; /* times that the segment was written again without what died in it */
	uint64_t hash;	   /* XXH3-64 of the bytes before it */
};
static_assert(sizeof(struct seg_super) == 64, "disk format");

enum batch_type {
	BATCH_PAGES = 1,
	BATCH_MANIFEST = 2,   /* changes of one epoch, manifest.h */
	BATCH_CHECKPOINT = 3, /* a whole map, same encoding */
	BATCH_STATE = 4,      /* state.h blob */
	BATCH_EPOCH = 5,      /* the index records of a commit, for rebuilding the index */
	BATCH_INDEX = 6,      /* those of another transaction, or all of the index */
};

/* A batch in the store: {0,0} is none (block 0 is the superblock). */
struct batch_ref {
	uint32_t segment;
	uint32_t block;
};

struct batch_header {
	uint32_t magic;
	uint16_t version;	/* BATCH_PLAIN; in an encrypted store BATCH_SEALED */
	uint8_t type;		/* enum batch_type */
	uint8_t page_shift;	/* PAGES: 12, 14, 16; else 0 */
	uint32_t header_bytes;	/* a multiple of FMT_BLOCK */
	uint32_t nr_entries;	/* PAGES: pages; blobs: index of this part, from 0 */
	uint64_t payload_bytes; /* used bytes; the batch takes them rounded up to blocks */
	uint32_t segment;	/* where this batch believes to be: a misdirected write shows */
	uint32_t block;
	uint64_t generation; /* of the segment; else it is left over from an earlier life */
	uint64_t seq;	     /* order of writing, across the store */
	uint8_t store[16];
	uint8_t vm[16];
	struct snapd_point point; /* the epoch it was written for */
	uint64_t payload_lo;	  /* blobs: XXH3-128 (no secret) of this part; PAGES: 0 */
	uint64_t payload_hi;
	struct batch_ref prev; /* blobs: the part before this one */
	uint64_t hash;	       /* XXH3-64 of the header's bytes, this field taken as 0 */
};
static_assert(sizeof(struct batch_header) == 128, "disk format");

/* Behind the header of a sealed batch; behind it in PAGES: the records, then
 * nr_entries × 16 bytes, the tags of the pages, all encrypted. */
struct batch_sealed {
	uint8_t nonce[SEAL_NONCE_BYTES];
	uint8_t reserved[12];
	uint8_t tag[SEAL_TAG_BYTES]; /* PAGES: of records and tags; blobs: of the payload */
};
static_assert(sizeof(struct batch_sealed) == 48, "disk format");

/* STORE/key */
struct key_file {
	char magic[8];
	uint16_t major; /* of the format */
	uint8_t reserved[6];
	uint8_t store[16];
	uint8_t salt[16];
	uint8_t nonce[24];
	uint8_t wrapped[32]; /* the store key, encrypted */
	uint8_t tag[SEAL_TAG_BYTES];
	uint64_t hash; /* XXH3-64 of the bytes before it */
};
static_assert(sizeof(struct key_file) == 128, "disk format");

enum page_codec {
	CODEC_RAW = 0,	/* offset is a multiple of FMT_BLOCK */
	CODEC_LZ4 = 1,	/* one LZ4 block, behind all raw pages of its batch */
	CODEC_ZSTD = 2, /* one Zstandard frame, likewise */
};

struct batch_page {
	uint64_t id_lo, id_hi; /* struct pageid of the uncompressed bytes */
	uint64_t gfn;	       /* home GFN under which it was first stored */
	uint32_t offset;       /* in the payload, bytes */
	uint32_t len_codec;    /* stored bytes << 8 | enum page_codec */
};
static_assert(sizeof(struct batch_page) == 32, "disk format");

static inline const struct batch_sealed *batch_sealed(const struct batch_header *h)
{
	return (const struct batch_sealed *)(h + 1);
}

/* Bytes in front of the records. */
static inline uint32_t batch_fixed_bytes(uint16_t version)
{
	return (uint32_t)(sizeof(struct batch_header) +
			  (version == BATCH_SEALED ? sizeof(struct batch_sealed) : 0));
}

/* Records of a PAGES batch, opened if it was sealed. */
static inline const struct batch_page *batch_pages(const struct batch_header *h)
{
	return (const struct batch_page *)((const uint8_t *)h + batch_fixed_bytes(h->version));
}

static inline const uint8_t *batch_page_tag(const struct batch_header *h, uint32_t i)
{
	return (const uint8_t *)(batch_pages(h) + h->nr_entries) + (uint64_t)i * SEAL_TAG_BYTES;
}

/* Nothing needed it when its segment was written again. */
static inline bool page_is_gone(const struct batch_page *p)
{
	return !(p->id_lo | p->id_hi | p->gfn | p->offset | p->len_codec);
}

static inline enum page_codec page_codec(const struct batch_page *p)
{
	return (enum page_codec)(p->len_codec & 0xff);
}

static inline uint32_t page_stored_bytes(const struct batch_page *p)
{
	return p->len_codec >> 8;
}

/*
 * loc: where a page's bytes are, 8 bytes.
 *   63..60 kind   0 nothing known (not in the map), 1 zero page, 2 page in a batch
 *   59..32 segment   31..12 block of the batch header   11..0 entry in the batch
 */
typedef uint64_t loc_t;
enum loc_kind { LOC_NONE = 0, LOC_ZERO = 1, LOC_PAGE = 2 };
#define LOC_ZERO_PAGE ((loc_t)LOC_ZERO << 60)

static inline enum loc_kind loc_kind(loc_t l)
{
	return (enum loc_kind)(l >> 60);
}

static inline loc_t loc_make(uint32_t segment, uint32_t block, uint32_t entry)
{
	return (loc_t)LOC_PAGE << 60 | (loc_t)segment << 32 | (loc_t)block << 12 | entry;
}

static inline uint32_t loc_segment(loc_t l)
{
	return (uint32_t)(l >> 32) & 0xfffffffu;
}

static inline uint32_t loc_block(loc_t l)
{
	return (uint32_t)(l >> 12) & 0xfffffu;
}

/* The same for all pages of a batch. */
static inline uint64_t loc_batch(loc_t l)
{
	return l >> 12;
}

static inline uint32_t loc_entry(loc_t l)
{
	return (uint32_t)l & 0xfffu;
}
