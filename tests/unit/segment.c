/* SPDX-License-Identifier: MIT */
/*
 * Goal: what is encoded decodes to the same; each flipped bit of a superblock or
 * a batch header, each truncation, each wrong place, and each number that our
 * writer could not have written is refused with a reason; nothing is read behind
 * the end of what was given.
 * Method: exhaustive over bits and lengths, in exactly sized heap blocks (ASan).
 */
#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include <xxhash.h>

#include "snapd/store/segment.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/rand.h"

static const struct seg_ident ident = {
	.store = "0123456789abcde",
	.segment = 77,
	.generation = 5,
	.segment_bytes = SEG_BYTES_MIN,
};

/* The decoders' results; the reason must be there if and only if it is refused. */
static int decode_super(const void *block, struct seg_ident *ret)
{
	struct err e = {0};
	int r = seg_super_decode(block, ret, &e);

	CHECK((r == 0) == !e.text[0] && e.code == r);
	return r;
}

static int decode_at(void *buf, size_t len, uint32_t block)
{
	const struct batch_header *h;
	const struct batch_page *pages;
	struct err e = {0};
	int r = batch_decode(buf, len, &ident, block, &h, &pages, &e);

	CHECK(r == -ENODATA || (r == 0) == !e.text[0]);
	CHECK(r != 0 || ((const void *)h == buf && (pages != NULL) == (h->type == BATCH_PAGES)));
	return r;
}

static void test_super(void)
{
	_Alignas(8) uint8_t block[FMT_BLOCK];
	struct seg_ident got;
	struct seg_super *super = (struct seg_super *)block;

	seg_super_encode(block, &ident);
	CHECK(decode_super(block, &got) == 0);
	CHECK(memcmp(&got, &ident, sizeof(got)) == 0);
	for (size_t bit = 0; bit < sizeof(struct seg_super) * 8; bit++) {
		block[bit / 8] ^= (uint8_t)(1u << bit % 8);
		CHECK(decode_super(block, &got) == -EUCLEAN);
		block[bit / 8] ^= (uint8_t)(1u << bit % 8);
	}
	CHECK(decode_super(block, &got) == 0);
	CHECK(super->segment == 77 && super->generation == 5);
	memset(block, 0, sizeof(block));
	CHECK(decode_super(block, &got) == -EUCLEAN);
	for (uint64_t bad = SEG_BYTES_MIN - 4096; bad;
	     bad = bad == SEG_BYTES_MIN + 1 ? 0 : SEG_BYTES_MIN + 1) {
		struct seg_ident wrong = ident;

		wrong.segment_bytes = bad;
		seg_super_encode(block, &wrong);
		CHECK(decode_super(block, &got) == -EUCLEAN);
	}
}

/* A PAGES batch of nr pages of 1 << shift bytes, payload not included; malloc()ed. */
static struct batch_header *make_pages(uint32_t nr, uint8_t shift)
{
	size_t len = batch_header_bytes(nr);
	struct batch_header *h = aligned_alloc(8, len);
	struct batch_page *p = (struct batch_page *)(h + 1);

	CHECK(h);
	memset(h, 0, len);
	h->type = BATCH_PAGES;
	h->header_bytes = (uint32_t)len;
	h->nr_entries = nr;
	h->page_shift = shift;
	h->payload_bytes = (uint64_t)nr << shift;
	h->segment = ident.segment;
	h->block = 9;
	h->generation = ident.generation;
	memcpy(h->store, ident.store, sizeof(h->store));
	for (uint32_t i = 0; i < nr; i++)
		p[i] = (struct batch_page){.id_lo = i + 1,
					   .gfn = 1000 + i,
					   .offset = i << shift,
					   .len_codec = 1u << shift << 8 | CODEC_RAW};
	batch_seal(h);
	return h;
}

static struct batch_header *make_blob(enum batch_type type, uint32_t part, uint64_t bytes)
{
	struct batch_header *h = make_pages(1, 12);

	memset(h + 1, 0, FMT_BLOCK - sizeof(*h));
	h->type = (uint8_t)type;
	h->page_shift = 0;
	h->nr_entries = part;
	h->payload_bytes = bytes;
	h->prev = part ? (struct batch_ref){3, 4} : (struct batch_ref){0};
	batch_seal(h);
	return h;
}

static void test_batch_shapes(void)
{
	static const uint8_t shifts[] = {12, 14, 16};

	for (size_t s = 0; s < ARRAY_SIZE(shifts); s++) {
		uint32_t max = MIN(BATCH_PAGES_MAX, (BATCH_BYTES_MAX - FMT_BLOCK) >> shifts[s]);

		for (uint32_t nr = 1; nr <= max; nr++) {
			_cleanup_free_ struct batch_header *h = make_pages(nr, shifts[s]);

			CHECK(decode_at(h, h->header_bytes, 9) == 0);
			CHECK(batch_blocks(h) * FMT_BLOCK <= BATCH_BYTES_MAX);
		}
	}
	for (int type = BATCH_MANIFEST; type <= BATCH_EPOCH; type++)
		for (uint32_t part = 0; part < 3; part++) {
			_cleanup_free_ struct batch_header *h = make_blob(type, part, 4097);

			CHECK(decode_at(h, FMT_BLOCK, 9) == 0);
			CHECK(batch_blocks(h) == 3);
		}
}

static void test_flips(uint32_t nr)
{
	_cleanup_free_ struct batch_header *h = make_pages(nr, 12);
	uint8_t *bytes = (uint8_t *)h;
	size_t len = h->header_bytes;

	for (size_t bit = 0; bit < len * 8; bit++) {
		bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
		CHECK(decode_at(h, len, 9) == -EUCLEAN);
		bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
	}
	CHECK(decode_at(h, len, 9) == 0);
}

static void test_truncated(uint32_t nr)
{
	_cleanup_free_ struct batch_header *h = make_pages(nr, 12);

	for (size_t len = 0; len < h->header_bytes; len++) {
		void *cut = aligned_alloc(8, ALIGN_UP(len, 8) + (len == 0) * 8);

		memcpy(cut, h, len);
		CHECK(decode_at(cut, len, 9) == (len < FMT_BLOCK ? -EUCLEAN : -ENODATA));
		free(cut);
	}
}

/* As a writer of `version` would seal; the hash as docs/format.md defines it. */
static void seal_as(struct batch_header *h, uint16_t version)
{
	h->version = version;
	h->hash = 0;
	h->hash = XXH3_64bits(h, h->header_bytes);
}

static void test_newer(void)
{
	_cleanup_free_ struct batch_header *h = make_pages(3, 12);
	_Alignas(8) uint8_t block[FMT_BLOCK];
	struct seg_super *super = (struct seg_super *)block;
	struct seg_ident got;

	seal_as(h, 1);
	CHECK(decode_at(h, h->header_bytes, 9) == 0);
	seal_as(h, 2); /* an encrypted one, in a store that is not */
	CHECK(decode_at(h, h->header_bytes, 9) == -EUCLEAN);
	seal_as(h, 3);
	CHECK(decode_at(h, h->header_bytes, 9) == -EPROTO);
	seg_super_encode(block, &ident);
	super->minor++;
	super->hash = XXH3_64bits(super, offsetof(struct seg_super, hash));
	CHECK(decode_super(block, &got) == 0);
	super->major++;
	super->hash = XXH3_64bits(super, offsetof(struct seg_super, hash));
	CHECK(decode_super(block, &got) == -EPROTO);
}

/* What our writer cannot have written is refused, even with a right hash. */
static void check_refused(struct batch_header *h)
{
	batch_seal(h);
	CHECK(decode_at(h, h->header_bytes, 9) == -EUCLEAN);
}

#define REFUSED(change)                                                    \
	do {                                                               \
		_cleanup_free_ struct batch_header *h = make_pages(3, 12); \
		struct batch_page *p = (struct batch_page *)(h + 1);       \
                                                                           \
		(void)p;                                                   \
		change;                                                    \
		check_refused(h);                                          \
	} while (0)

#define REFUSED_BLOB(change)                                                            \
	do {                                                                            \
		_cleanup_free_ struct batch_header *h = make_blob(BATCH_STATE, 1, 100); \
                                                                                        \
		change;                                                                 \
		check_refused(h);                                                       \
	} while (0)

static void test_impossible(void)
{
	REFUSED(h->type = 0);
	REFUSED(h->type = 6);
	REFUSED(h->store[3] ^= 1);
	REFUSED(h->segment++);
	REFUSED(h->block++);
	REFUSED(h->generation--);
	REFUSED(h->page_shift = 13);
	REFUSED(h->page_shift = 14);
	REFUSED(h->page_shift = 200);
	REFUSED(h->nr_entries = 0);
	REFUSED(h->nr_entries = 200);
	REFUSED(h->nr_entries = ~0u);
	REFUSED(h->payload_bytes--);
	REFUSED(h->payload_bytes = BATCH_BYTES_MAX);
	REFUSED(h->payload_bytes = ~0ull);
	REFUSED(p[1].offset++);
	REFUSED(p[2].offset += FMT_BLOCK);
	REFUSED(p[2].offset = ~0u / FMT_BLOCK * FMT_BLOCK);
	REFUSED(p[1].len_codec++);
	REFUSED(p[1].len_codec -= 256);
	REFUSED(p[1].len_codec = 4096 << 8 | CODEC_LZ4);
	REFUSED(p[1].len_codec = CODEC_ZSTD);
	REFUSED(p[1].len_codec = 100 << 8 | (CODEC_ZSTD + 1));
	REFUSED((p[1].len_codec = 100 << 8 | CODEC_LZ4, p[1].offset = 3 * 4096 - 99));
	REFUSED(p[0].id_lo = p[0].id_hi = 0);
	REFUSED_BLOB(h->page_shift = 12);
	REFUSED_BLOB(h->nr_entries = 0);
	REFUSED_BLOB(h->prev = (struct batch_ref){0});
	REFUSED_BLOB(h->payload_bytes = BATCH_BYTES_MAX - FMT_BLOCK + 1);
}

/* A batch must end inside its segment, and none lies on the superblock. */
static void test_place(void)
{
	_cleanup_free_ struct batch_header *h = make_pages(3, 12);
	uint32_t last = SEG_BYTES_MIN / FMT_BLOCK - batch_blocks(h);

	h->block = last;
	batch_seal(h);
	CHECK(decode_at(h, h->header_bytes, last) == 0);
	h->block = last + 1;
	batch_seal(h);
	CHECK(decode_at(h, h->header_bytes, last + 1) == -EUCLEAN);
	h->block = 0;
	batch_seal(h);
	CHECK(decode_at(h, h->header_bytes, 0) == -EUCLEAN);
}

static void test_blob_payload(void)
{
	_cleanup_free_ struct batch_header *h = make_blob(BATCH_MANIFEST, 0, 5000);
	uint8_t payload[5000];
	struct err e = {0};

	memset(payload, 7, sizeof(payload));
	batch_blob_finish(NULL, h, payload);
	CHECK(batch_blob_check(NULL, h, payload, &e) == 0 && !e.text[0]);
	for (size_t i = 0; i < sizeof(payload); i++) {
		payload[i] ^= 0x10;
		CHECK(batch_blob_check(NULL, h, payload, NULL) == -EUCLEAN);
		payload[i] ^= 0x10;
	}
	h->payload_bytes--;
	CHECK(batch_blob_check(NULL, h, payload, &e) == -EUCLEAN && e.text[0]);
}

static void test_page_check(void)
{
	static _Alignas(64) uint8_t page[4096];
	static const struct page_secret secret = {"a secret"};
	_cleanup_free_ struct batch_header *h = make_pages(1, 12);
	struct batch_page *p = (struct batch_page *)(h + 1);
	struct pageid id;
	struct err e = {0};

	page[17] = 4;
	id = pageid_of(&secret, page, sizeof(page));
	p->id_lo = id.lo;
	p->id_hi = id.hi;
	CHECK(batch_page_check(&secret, h, p, page, &e) == 0 && !e.text[0]);
	page[4095] ^= 0x80;
	CHECK(batch_page_check(&secret, h, p, page, &e) == -EUCLEAN);
	CHECK(strstr(e.text, "0x3e8000")); /* its GPA */
	memset(page, 0, sizeof(page));
	CHECK(batch_page_check(&secret, h, p, page, NULL) == -EUCLEAN);
}

int main(void)
{
	test_super();
	test_batch_shapes();
	test_flips(3);
	test_flips(200);
	test_truncated(3);
	test_truncated(200);
	test_newer();
	test_impossible();
	test_place();
	test_blob_payload();
	test_page_check();
	return 0;
}
