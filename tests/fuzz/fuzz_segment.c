/* SPDX-License-Identifier: MIT */
/*
 * Any bytes as a superblock and as a batch.  As they are, the checksum refuses
 * nearly all; so they are also sealed, and given the place that they claim, to
 * reach the checks behind it.  What is accepted must lie within its batch.
 */
#include <errno.h>
#include <string.h>

#include <xxhash.h>

#include "snapd/store/segment.h"
#include "snapd/util/cleanup.h"
#include "tests/fuzz/fuzz.h"

static void check_accepted(const struct batch_header *h, const struct batch_page *pages)
{
	PROMISE((uint64_t)batch_blocks(h) * FMT_BLOCK <= BATCH_BYTES_MAX);
	PROMISE((h->type == BATCH_PAGES) == (pages != NULL));
	for (uint32_t i = 0; pages && i < h->nr_entries; i++) {
		PROMISE((const uint8_t *)(pages + i + 1) <= (const uint8_t *)h + h->header_bytes);
		PROMISE(pages[i].offset + (uint64_t)(pages[i].len_codec >> 8) <= h->payload_bytes);
		PROMISE(pages[i].len_codec >> 8 <= 1u << h->page_shift);
		PROMISE(page_is_gone(&pages[i]) ||
			(pages[i].len_codec >> 8 == 1u << h->page_shift) ==
				(page_codec(&pages[i]) == CODEC_RAW));
	}
}

static void decode_batch(void *buf, size_t len, const struct seg_ident *where, uint32_t block)
{
	const struct batch_header *h = NULL;
	const struct batch_page *pages = NULL;
	struct err e = {0};
	int r = batch_decode(buf, len, where, block, &h, &pages, &e);

	PROMISE(r == 0 || r == -EUCLEAN || r == -EPROTO || (r == -ENODATA && len < 2 * FMT_BLOCK));
	PROMISE(r == -ENODATA || (r == 0) == !e.text[0]);
	if (r == 0)
		check_accepted(h, pages);
}

/* The bytes as a batch that their writer sealed, where it says it is. */
static void decode_sealed(const uint8_t *data, size_t len)
{
	size_t bytes = MAX(ALIGN_UP(len, FMT_BLOCK), (size_t)FMT_BLOCK);
	_cleanup_free_ struct batch_header *h = aligned_alloc(64, bytes);
	struct seg_ident where = {.segment_bytes = SEG_BYTES_DEFAULT};

	if (!h)
		return;
	memset(h, 0, bytes);
	memcpy(h, data, len);
	if (h->header_bytes < FMT_BLOCK || h->header_bytes > bytes)
		h->header_bytes = FMT_BLOCK;
	batch_seal(h);
	memcpy(where.store, h->store, sizeof(where.store));
	where.segment = h->segment;
	where.generation = h->generation;
	decode_batch(h, bytes, &where, h->block);
}

static void decode_super(const uint8_t *data, size_t len)
{
	_Alignas(8) uint8_t block[FMT_BLOCK] = {0};
	struct seg_super *super = (struct seg_super *)block;
	struct seg_ident id;
	struct err e = {0};
	int r;

	memcpy(block, data, MIN(len, sizeof(block)));
	memcpy(super->magic, SEG_MAGIC, sizeof(super->magic));
	super->hash = XXH3_64bits(super, offsetof(struct seg_super, hash));
	r = seg_super_decode(block, &id, &e);
	PROMISE(r == 0 || r == -EUCLEAN || r == -EPROTO);
	PROMISE((r == 0) == !e.text[0]);
	if (r == 0)
		PROMISE(id.segment_bytes >= SEG_BYTES_MIN && id.segment_bytes <= SEG_BYTES_MAX);
}

/* A batch may be changed where it lies while it is decoded. */
static void decode_as_is(const uint8_t *data, size_t len)
{
	static const struct seg_ident here = {.segment = 1, .segment_bytes = SEG_BYTES_DEFAULT};
	void *copy = NULL;

	if (posix_memalign(&copy, 64, len ? len : 1))
		return;
	memcpy(copy, data, len);
	decode_batch(copy, len, &here, 1);
	free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	decode_as_is(data, len);
	decode_sealed(data, MIN(len, (size_t)4 * FMT_BLOCK));
	decode_super(data, len);
	return 0;
}
