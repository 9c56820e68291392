/* SPDX-License-Identifier: MIT */
/*
 * segment: superblocks and batches, to and from bytes.  Pure; any thread.
 *
 * A decoder first asks whether the bytes are intact (magic, hash), then whether
 * we understand them (version), then whether they are what should lie there
 * (store, segment, generation, block), and last whether every number in them is
 * one that our writer could have written; only then does it hand out pointers.
 */
#include "snapd/store/segment.h"

#include <stddef.h>
#include <string.h>

#define XXH_STATIC_LINKING_ONLY /* XXH3_state_t on the stack */
#include <xxhash.h>

#include "snapd/util/cleanup.h"

void seg_super_encode(void *block, const struct seg_ident *id)
{
	struct seg_super super = {
		.magic = SEG_MAGIC,
		.major = FMT_MAJOR,
		.minor = FMT_MINOR,
		.segment = id->segment,
		.generation = id->generation,
		.segment_bytes = id->segment_bytes,
		.rewrites = id->rewrites,
	};

	memcpy(super.store, id->store, sizeof(super.store));
	super.hash = XXH3_64bits(&super, offsetof(struct seg_super, hash));
	memset(block, 0, FMT_BLOCK);
	memcpy(block, &super, sizeof(super));
}

int seg_super_decode(const void *block, struct seg_ident *ret, struct err *e)
{
	struct seg_super super;

	memcpy(&super, block, sizeof(super));
	if (memcmp(super.magic, SEG_MAGIC, sizeof(super.magic)) != 0)
		return err_set(e, E_CORRUPT, "not a segment: wrong magic");
	if (super.hash != XXH3_64bits(&super, offsetof(struct seg_super, hash)))
		return err_set(e, E_CORRUPT, "segment superblock is damaged: wrong checksum");
	if (super.major != FMT_MAJOR)
		return err_set(e, EPROTO, "segment has format %u.%u, this snapd reads %u.x",
			       super.major, super.minor, FMT_MAJOR);
	if (super.segment_bytes < SEG_BYTES_MIN || super.segment_bytes > SEG_BYTES_MAX ||
	    super.segment_bytes % FMT_BLOCK)
		return err_set(e, E_CORRUPT, "segment superblock gives an impossible size, %llu",
			       (unsigned long long)super.segment_bytes);
	*ret = (struct seg_ident){
		.segment = super.segment,
		.generation = super.generation,
		.segment_bytes = super.segment_bytes,
		.rewrites = super.rewrites,
	};
	memcpy(ret->store, super.store, sizeof(ret->store));
	return 0;
}

/* XXH3-64 of the header with its hash field taken as 0. */
static uint64_t header_hash(const struct batch_header *h)
{
	struct batch_header first = *h;
	XXH3_state_t state;

	first.hash = 0;
	XXH3_64bits_reset(&state);
	XXH3_64bits_update(&state, &first, sizeof(first));
	XXH3_64bits_update(&state, h + 1, h->header_bytes - sizeof(first));
	return XXH3_64bits_digest(&state);
}

void batch_seal(struct batch_header *header)
{
	header->magic = BATCH_MAGIC;
	header->version = header->version ? header->version : BATCH_PLAIN;
	header->hash = header_hash(header);
}

void batch_blob_finish(const struct seal *seal, struct batch_header *header, void *payload)
{
	XXH128_hash_t hash;

	if (seal) {
		header->magic = BATCH_MAGIC; /* authenticated with the rest */
		header->version = BATCH_SEALED;
		seal_begin(header);
		seal_blob(seal, header, payload);
		return;
	}
	hash = XXH3_128bits(payload, header->payload_bytes);
	header->payload_lo = hash.low64;
	header->payload_hi = hash.high64;
}

int batch_blob_check(const struct seal *seal, const struct batch_header *h, void *payload,
		     struct err *e)
{
	XXH128_hash_t hash;

	if (seal) {
		if (unseal_blob(seal, h, payload))
			return 0;
	} else {
		hash = XXH3_128bits(payload, h->payload_bytes);
		if (hash.low64 == h->payload_lo && hash.high64 == h->payload_hi)
			return 0;
	}
	return err_set(e, E_CORRUPT, "segment %u block %u: the batch's contents are damaged",
		       h->segment, h->block);
}

static const char *check_place(const struct batch_header *h, const struct seg_ident *where,
			       uint32_t block)
{
	if (memcmp(h->store, where->store, sizeof(h->store)) != 0)
		return "belongs to another store";
	if (h->segment != where->segment || h->block != block)
		return "belongs to another place";
	if (h->generation != where->generation)
		return "left over from an earlier life of the segment";
	if (!block || ((uint64_t)block + batch_blocks(h)) * FMT_BLOCK > where->segment_bytes)
		return "reaches outside its segment";
	return NULL;
}

static const char *check_page(const struct batch_header *h, const struct batch_page *p)
{
	uint32_t len = page_stored_bytes(p), page_size = 1u << h->page_shift;
	bool raw = page_codec(p) == CODEC_RAW;

	if (page_is_gone(p))
		return NULL;
	if (page_codec(p) > CODEC_ZSTD)
		return "a page has an unknown codec";
	if (raw ? len != page_size || p->offset % FMT_BLOCK : !len || len >= page_size)
		return "a page has an impossible size";
	if ((uint64_t)p->offset + len > h->payload_bytes)
		return "a page lies outside its batch";
	if (!(p->id_lo | p->id_hi))
		return "a stored page is recorded as zero";
	return NULL;
}

static const char *check_pages(struct batch_header *h, const struct seal *seal)
{
	const struct batch_page *pages = batch_pages(h);
	const char *why = NULL;

	if (h->page_shift != 12 && h->page_shift != 14 && h->page_shift != 16)
		return "unknown page size";
	if (!h->nr_entries || h->nr_entries > BATCH_PAGES_MAX ||
	    h->header_bytes != batch_header_bytes_of(h->version, h->nr_entries))
		return "wrong number of pages";
	if (seal && !unseal_records(seal, h))
		return "it is not authentic";
	for (uint32_t i = 0; !why && i < h->nr_entries; i++)
		why = check_page(h, &pages[i]);
	return why;
}

static const char *check_blob(const struct batch_header *h)
{
	if (h->page_shift || h->header_bytes != FMT_BLOCK)
		return "wrong header";
	if (!h->prev.block != !h->nr_entries)
		return "wrong link to the part before";
	return NULL;
}

static const char *check_contents(struct batch_header *h, const struct seal *seal)
{
	switch (h->type) {
	case BATCH_PAGES:
		return check_pages(h, seal);
	case BATCH_MANIFEST:
	case BATCH_CHECKPOINT:
	case BATCH_STATE:
	case BATCH_EPOCH:
	case BATCH_INDEX:
		return check_blob(h);
	default:
		return "unknown type";
	}
}

/* Whether buf holds a header as it was sealed; -ENODATA: not all of it. */
static int check_intact(const void *buf, size_t len, const struct seal *seal, const char **why)
{
	const struct batch_header *h = buf;

	if (len < FMT_BLOCK)
		*why = "cut off";
	else if (h->magic != BATCH_MAGIC)
		*why = "no batch there";
	else if (!h->header_bytes || h->header_bytes % FMT_BLOCK ||
		 h->header_bytes > batch_header_max(seal))
		*why = "impossible header size";
	else if (h->header_bytes > len)
		return -ENODATA;
	else if (h->hash != header_hash(h))
		*why = "wrong checksum";
	else if (h->payload_bytes > BATCH_BYTES_MAX - h->header_bytes)
		*why = "impossible size";
	return 0;
}

int batch_decode(void *buf, size_t len, const struct seg_ident *where, uint32_t block,
		 const struct batch_header **ret, const struct batch_page **pages, struct err *e)
{
	struct batch_header *h = buf;
	const char *why = NULL;

	if (check_intact(buf, len, where->seal, &why) == -ENODATA)
		return -ENODATA;
	if (!why && h->version > BATCH_SEALED)
		return err_set(e, EPROTO,
			       "segment %u block %u: batch of version %u, newer than this snapd",
			       where->segment, block, h->version);
	if (!why)
		why = check_place(h, where, block);
	if (!why && h->version != (where->seal ? BATCH_SEALED : BATCH_PLAIN))
		why = where->seal ? "it is not encrypted" : "it is encrypted, but the store is not";
	if (!why)
		why = check_contents(h, where->seal);
	if (why)
		return err_set(e, E_CORRUPT, "segment %u block %u: damaged batch: %s",
			       where->segment, block, why);
	*ret = h;
	*pages = h->type == BATCH_PAGES ? batch_pages(h) : NULL;
	return 0;
}

int batch_page_check(const struct page_secret *s, const struct batch_header *h,
		     const struct batch_page *p, const void *bytes, struct err *e)
{
	struct pageid id = pageid_of(s, bytes, (size_t)1 << h->page_shift);

	if (id.lo == p->id_lo && id.hi == p->id_hi)
		return 0;
	return err_set(e, E_CORRUPT, "segment %u block %u offset %u: page %#llx is damaged",
		       h->segment, h->block, p->offset,
		       (unsigned long long)p->gfn << h->page_shift);
}
