/* SPDX-License-Identifier: MIT */
/*
 * Goal: what is put into a pack comes out of it, and nothing else does: a head cut off anywhere,
 * with any bit flipped, of another repository or key, and a run that is not what it was or where it
 * was, are refused with a reason.
 * Method: packs of every page size, open and sealed, with runs that shrink and some that do not.
 * Where encryption is to notice it, the object's name is made to agree first, as one who had that
 * key would.
 */
#include <errno.h>
#include <malloc.h>
#include <sodium.h>

#include "snapd/backup/pack.h"
#include "tests/lib/damage.h"

#define NR_PAGES 21u /* more than a run, and no multiple of it */

static uint8_t *pages; /* NR_PAGES of 64 KiB at most */

static void *page_at(uint32_t i, uint32_t page_size)
{
	return pages + (size_t)i * page_size;
}

/* Runs that shrink, and some that do not. */
static void fill_pages(uint32_t page_size)
{
	for (uint32_t i = 0; i < NR_PAGES; i++) {
		memset(page_at(i, page_size), (int)i, page_size);
		if (i >= NR_PAGES - 5)
			randombytes_buf(page_at(i, page_size), page_size);
	}
}

static void build(struct pack_builder *b, const struct repo_keys *k, uint32_t page_size)
{
	const void *list[NR_PAGES];
	uint8_t *scratch = malloc(PACK_SCRATCH_BYTES);
	struct bk_name name;

	CHECK(scratch && !pack_builder_init(b, k));
	b->scratch = scratch;
	fill_pages(page_size);
	pack_begin(b, page_size);
	CHECK(pack_has_room(b, NR_PAGES) && !pack_has_room(b, BK_PACK_PAGES + 1));
	for (uint32_t i = 0; i < NR_PAGES; i++) {
		list[i] = page_at(i, page_size);
		keys_page_name(k, list[i], page_size, &name);
		CHECK(pack_find(b, &name) == -1 && pack_reserve(b, &name) == i &&
		      pack_find(b, &name) == (int32_t)i);
	}
	pack_add(b, NULL, list);
	CHECK(!pack_finish(b));
	b->scratch = NULL;
	free(scratch);
}

static int decode_head(const struct repo_keys *k, const struct bk_name *name, const void *bytes,
		       size_t len)
{
	_cleanup_free_ uint8_t *copy = copy_of(bytes, len);
	struct pack_head h = {0};
	struct err e = {0};
	int rc = pack_head_decode(k, name, copy, len, &h, &e);

	CHECK((rc == 0) == !e.text[0]);
	pack_head_deinit(&h);
	return rc;
}

static void damage_head(const struct repo_keys *k, struct pack_builder *b)
{
	struct repo_keys other = *k;
	size_t names_at = sizeof(b->header) + b->header.nr_runs * sizeof(struct bk_run);
	struct bk_name name;

	CHECK(decode_head(k, &b->name, b->head, b->head_bytes) == 0);
	for (size_t len = 0; len < b->head_bytes; len++)
		CHECK(refused(decode_head(k, &b->name, b->head, len)));
	for (size_t bit = 0; bit < 8 * b->head_bytes; bit++) {
		flip(b->head, bit);
		CHECK(refused(decode_head(k, &b->name, b->head, b->head_bytes)));
		keys_object_name(k, b->head, b->head_bytes, NULL, 0, &name);
		if (k->sealed || has_meaning(bit / 8) ||
		    (bit / 8 >= sizeof(b->header) && bit / 8 < names_at))
			CHECK(refused(decode_head(k, &name, b->head, b->head_bytes)));
		flip(b->head, bit);
	}
	other.bodies[0]++;
	CHECK((decode_head(&other, &b->name, b->head, b->head_bytes) == 0) == !k->sealed);
	other = *k;
	other.repo[0]++;
	CHECK(decode_head(&other, &b->name, b->head, b->head_bytes) == -E_CORRUPT);
}

/* 0: the pages are what they were. */
static int open_run(const struct repo_keys *k, const struct pack_head *h, uint32_t run,
		    const uint8_t *stored)
{
	uint32_t page_size = pack_page_size(h), stored_bytes = h->runs[run].stored_bytes;
	_cleanup_free_ uint8_t *copy = copy_of(stored, stored_bytes), *dst = malloc(BK_RUN_BYTES);
	struct err e = {0};
	int rc = pack_run_open(k, h, run, copy, dst, &e);

	CHECK((rc == 0) == !e.text[0] && (!rc || rc == -E_CORRUPT));
	if (!rc)
		CHECK(!memcmp(dst, page_at(h->first[run], page_size),
			      (size_t)h->runs[run].nr_pages * page_size));
	return rc;
}

/* Bits of a run: all, or one of each `every`.  A bit that zstd does not look at may be flipped
 * where nothing is sealed: open_run() sees to the pages. */
static void damage_run(const struct repo_keys *k, const struct pack_head *h, uint32_t run,
		       uint8_t *stored)
{
	size_t bits = 8 * (size_t)h->runs[run].stored_bytes, every = 1 + bits / 4096;
	bool zstd = h->runs[run].codec == BK_ZSTD;
	struct repo_keys other = *k;

	CHECK(open_run(k, h, run, stored) == 0);
	for (size_t bit = 0; bit < bits; bit += every) {
		flip(stored, bit);
		CHECK(open_run(k, h, run, stored) == -E_CORRUPT || (zstd && !k->sealed));
		flip(stored, bit);
	}
	other.pages[0]++;
	CHECK(open_run(&other, h, run, stored) == -E_CORRUPT);
	other = *k;
	other.runs[0]++;
	CHECK((open_run(&other, h, run, stored) == 0) == !k->sealed);
}

static void test_runs(const struct repo_keys *k, struct pack_builder *b)
{
	struct pack_head h;
	struct err e = {0};
	uint32_t codecs[3] = {0};
	size_t want;

	CHECK(!pack_head_bytes(k, b->head, sizeof(struct bk_header), &want, &e) &&
	      want == b->head_bytes);
	CHECK(!pack_head_decode(k, &b->name, b->head, b->head_bytes, &h, &e));
	CHECK(h.header.nr_pages == NR_PAGES && h.first[h.header.nr_runs] == NR_PAGES);
	CHECK(h.offsets[0] == b->head_bytes &&
	      h.offsets[h.header.nr_runs] == b->head_bytes + b->data_bytes);
	for (uint32_t i = 0; i < NR_PAGES; i++) {
		uint32_t run = pack_run_of(&h, i);

		CHECK(h.first[run] <= i && i < h.first[run + 1]);
	}
	for (uint32_t run = 0; run < h.header.nr_runs; run++) {
		uint8_t *stored = b->data + (h.offsets[run] - b->head_bytes);

		CHECK(open_run(k, &h, run, stored) == 0);
		if (!codecs[h.runs[run].codec]++)
			damage_run(k, &h, run, stored);
		/* One run in another's place. */
		if (run && h.runs[run].stored_bytes == h.runs[run - 1].stored_bytes)
			CHECK(open_run(k, &h, run - 1, stored) == -E_CORRUPT);
	}
	CHECK(codecs[BK_RAW] && codecs[BK_ZSTD]);
	pack_head_deinit(&h);
}

static void test_packs(const struct repo_keys *k)
{
	for (uint32_t page_size = 4096; page_size <= 65536; page_size *= 4) {
		struct pack_builder b;

		build(&b, k, page_size);
		damage_head(k, &b);
		test_runs(k, &b);
		pack_builder_deinit(&b);
	}
}

int main(void)
{
	char key_path[] = "/tmp/backup-pack-XXXXXX";

	/* A header may claim 256 MiB: they are allocated, and not to be filled by MALLOC_PERTURB_.
	 */
	mallopt(M_PERTURB, 0);
	make_key_file(key_path, 1);
	pages = malloc((size_t)NR_PAGES * 65536);
	CHECK(pages);
	for (int sealed = 0; sealed < 2; sealed++) {
		struct bk_config config;
		struct repo_keys keys = make_keys(sealed ? key_path : NULL, &config);

		test_packs(&keys);
	}
	free(pages);
	CHECK(!unlink(key_path));
	printf("packs: there and back; damaged, foreign: refused\n");
	return 0;
}
