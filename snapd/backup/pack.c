/* SPDX-License-Identifier: MIT */
/* Pages into packs and out of them; see pack.h. */
#include "snapd/backup/pack.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "snapd/util/cleanup.h"
#include "snapd/util/pool.h"

#define ZSTD_LEVEL     1
#define NR_SLOTS       (4 * BK_PACK_PAGES)
#define PARALLEL_RUNS  4 /* fewer are not worth a thread */
#define RUN_STORED_MAX (BK_RUN_BYTES + BK_TAG_BYTES)

static_assert(BK_PACK_PAGES < UINT16_MAX, "slots hold entry + 1");

/* ---- building ---- */

int pack_builder_init(struct pack_builder *b, const struct repo_keys *keys)
{
	*b = (struct pack_builder){.keys = keys};
	b->runs = calloc(BK_PACK_PAGES, sizeof(*b->runs));
	b->names = calloc(BK_PACK_PAGES, sizeof(*b->names));
	b->slots = calloc(NR_SLOTS, sizeof(*b->slots));
	b->data = malloc(BK_PACK_DATA);
	if (b->runs && b->names && b->slots && b->data)
		return 0;
	pack_builder_deinit(b);
	return -ENOMEM;
}

void pack_builder_deinit(struct pack_builder *b)
{
	free(b->runs);
	free(b->names);
	free(b->slots);
	free(b->data);
	free(b->head);
	*b = (struct pack_builder){0};
}

void pack_begin(struct pack_builder *b, uint32_t page_size)
{
	keys_header(b->keys, BK_PACK, &b->header);
	b->header.page_shift = (uint8_t)__builtin_ctz(page_size);
	b->page_size = page_size;
	b->data_bytes = 0;
	b->nr_reserved = 0;
	memset(b->slots, 0, NR_SLOTS * sizeof(*b->slots));
	free(b->head);
	b->head = NULL;
}

bool pack_has_room(const struct pack_builder *b, uint32_t nr)
{
	uint64_t nr_runs = DIV_ROUND_UP((uint64_t)nr * b->page_size, BK_RUN_BYTES);

	return b->header.nr_pages + nr <= BK_PACK_PAGES &&
	       b->data_bytes + nr_runs * RUN_STORED_MAX <= BK_PACK_DATA;
}

/* Names are hashes: any of their bits will do. */
static uint32_t slot_of(const struct bk_name *name)
{
	uint32_t h;

	memcpy(&h, name->b, sizeof(h));
	return h % NR_SLOTS;
}

int32_t pack_find(const struct pack_builder *b, const struct bk_name *name)
{
	for (uint32_t s = slot_of(name); b->slots[s]; s = (s + 1) % NR_SLOTS)
		if (!memcmp(&b->names[b->slots[s] - 1], name, sizeof(*name)))
			return b->slots[s] - 1;
	return -1;
}

uint32_t pack_reserve(struct pack_builder *b, const struct bk_name *name)
{
	uint32_t entry = b->header.nr_pages + b->nr_reserved++, s = slot_of(name);

	assert(entry < BK_PACK_PAGES);
	b->names[entry] = *name;
	while (b->slots[s])
		s = (s + 1) % NR_SLOTS;
	b->slots[s] = (uint16_t)(entry + 1);
	return entry;
}

/* One call to add(), cut into runs. */
struct adding {
	struct pack_builder *b;
	const void *const *pages;
	uint32_t nr, per_run, first_run;
};

static uint32_t pages_of_run(const struct adding *a, uint64_t i)
{
	return MIN(a->per_run, a->nr - (uint32_t)i * a->per_run);
}

static void make_run(const struct adding *a, ZSTD_CCtx *z, uint64_t i, uint8_t *plain)
{
	struct pack_builder *b = a->b;
	struct bk_run *run = &b->runs[a->first_run + i];
	uint8_t *dst = b->scratch + i * RUN_STORED_MAX;
	uint32_t n = pages_of_run(a, i), len = n * b->page_size;
	size_t packed;

	for (uint32_t p = 0; p < n; p++)
		memcpy(plain + (size_t)p * b->page_size, a->pages[i * a->per_run + p],
		       b->page_size);
	packed = z ? ZSTD_compressCCtx(z, dst, len - len / 8, plain, len, ZSTD_LEVEL) : 0;
	*run = (struct bk_run){.nr_pages = (uint16_t)n, .codec = BK_ZSTD};
	if (!packed || ZSTD_isError(packed)) { /* does not shrink by an eighth */
		memcpy(dst, plain, len);
		packed = len;
		run->codec = BK_RAW;
	}
	run->stored_bytes = (uint32_t)packed;
	if (b->keys->sealed) {
		keys_seal(b->keys, &b->header, a->first_run + (uint32_t)i + 1, dst, packed);
		run->stored_bytes += BK_TAG_BYTES;
	}
}

static int make_runs(void *arg, uint64_t first, uint64_t n)
{
	const struct adding *a = arg;
	ZSTD_CCtx *z = ZSTD_createCCtx(); /* without one runs stay raw */
	uint8_t plain[BK_RUN_BYTES];

	for (uint64_t i = first; i < first + n; i++)
		make_run(a, z, i, plain);
	ZSTD_freeCCtx(z);
	return 0;
}

void pack_add(struct pack_builder *b, struct pool *pool, const void *const *pages)
{
	uint32_t nr = b->nr_reserved;
	struct adding a = {.b = b,
			   .pages = pages,
			   .nr = nr,
			   .per_run = BK_RUN_BYTES / b->page_size,
			   .first_run = b->header.nr_runs};
	uint64_t nr_runs = DIV_ROUND_UP(nr, a.per_run);

	assert(nr_runs * RUN_STORED_MAX <= PACK_SCRATCH_BYTES);
	if (pool)
		pool_ranges(pool, nr_runs, PARALLEL_RUNS, make_runs, &a);
	else
		make_runs(&a, 0, nr_runs);
	for (uint64_t i = 0; i < nr_runs; i++) {
		uint32_t stored = b->runs[a.first_run + i].stored_bytes;

		memcpy(b->data + b->data_bytes, b->scratch + i * RUN_STORED_MAX, stored);
		b->data_bytes += stored;
	}
	b->header.nr_pages += nr;
	b->nr_reserved = 0;
	b->header.nr_runs += (uint32_t)nr_runs;
}

int pack_finish(struct pack_builder *b)
{
	size_t runs = b->header.nr_runs * sizeof(*b->runs);
	size_t names = b->header.nr_pages * sizeof(*b->names);
	uint8_t *table;

	b->header.plain_bytes = runs + names;
	b->header.table_bytes = runs + names + (b->keys->sealed ? BK_TAG_BYTES : 0);
	b->header.body_bytes = b->data_bytes;
	b->head_bytes = sizeof(b->header) + b->header.table_bytes;
	b->head = malloc(b->head_bytes);
	if (!b->head)
		return -ENOMEM;
	memcpy(b->head, &b->header, sizeof(b->header));
	table = b->head + sizeof(b->header);
	memcpy(table, b->runs, runs);
	memcpy(table + runs, b->names, names);
	if (b->keys->sealed)
		keys_seal(b->keys, &b->header, 0, table, runs + names);
	keys_object_name(b->keys, b->head, b->head_bytes, NULL, 0, &b->name);
	return 0;
}

/* ---- reading ---- */

int pack_head_bytes(const struct repo_keys *k, const void *bytes, size_t len, size_t *ret,
		    struct err *e)
{
	struct bk_header h;
	uint64_t plain;
	int rc;

	if (len < sizeof(h))
		return err_set(e, E_CORRUPT, "cut off in the header");
	memcpy(&h, bytes, sizeof(h));
	rc = keys_check_header(k, &h, BK_PACK, e);
	if (rc)
		return rc;
	plain = (uint64_t)h.nr_runs * sizeof(struct bk_run) +
		(uint64_t)h.nr_pages * sizeof(struct bk_name);
	if ((h.page_shift != 12 && h.page_shift != 14 && h.page_shift != 16) || !h.nr_pages ||
	    h.nr_pages > BK_PACK_PAGES || !h.nr_runs || h.nr_runs > h.nr_pages || h.codec ||
	    h.plain_bytes != plain || h.table_bytes != plain + (k->sealed ? BK_TAG_BYTES : 0) ||
	    h.body_bytes > BK_PACK_DATA)
		return err_set(e, E_CORRUPT, "the header makes no sense");
	*ret = sizeof(h) + h.table_bytes;
	return 0;
}

static int check_runs(struct pack_head *h, bool sealed, struct err *e)
{
	uint32_t per_run = BK_RUN_BYTES >> h->header.page_shift, entry = 0;
	uint64_t at = sizeof(h->header) + h->header.table_bytes;

	for (uint32_t i = 0; i < h->header.nr_runs; i++) {
		const struct bk_run *r = &h->runs[i];
		uint32_t plain = (uint32_t)r->nr_pages << h->header.page_shift;
		uint32_t tag = sealed ? BK_TAG_BYTES : 0;

		h->offsets[i] = at;
		h->first[i] = entry;
		if (!r->nr_pages || r->nr_pages > per_run || r->reserved ||
		    (r->codec == BK_RAW ? r->stored_bytes != plain + tag
					: r->codec != BK_ZSTD || r->stored_bytes <= tag ||
						  r->stored_bytes >= plain + tag))
			return err_set(e, E_CORRUPT, "run %u makes no sense", i);
		at += r->stored_bytes;
		entry += r->nr_pages;
	}
	h->offsets[h->header.nr_runs] = at;
	h->first[h->header.nr_runs] = entry;
	if (entry != h->header.nr_pages ||
	    at != sizeof(h->header) + h->header.table_bytes + h->header.body_bytes)
		return err_set(e, E_CORRUPT, "the runs do not add up");
	return 0;
}

int pack_head_decode(const struct repo_keys *k, const struct bk_name *name, const void *bytes,
		     size_t len, struct pack_head *ret, struct err *e)
{
	struct bk_name is;
	size_t want;
	int rc = pack_head_bytes(k, bytes, len, &want, e);

	*ret = (struct pack_head){0};
	if (rc)
		return rc;
	if (len < want)
		return err_set(e, E_CORRUPT, "cut off in the table");
	keys_object_name(k, bytes, want, NULL, 0, &is);
	if (memcmp(&is, name, sizeof(is)) != 0)
		return err_set(e, E_CORRUPT, "header or table is not what the name says");
	memcpy(&ret->header, bytes, sizeof(ret->header));
	ret->table = malloc(ret->header.table_bytes);
	ret->offsets = calloc(ret->header.nr_runs + 1, sizeof(*ret->offsets));
	ret->first = calloc(ret->header.nr_runs + 1, sizeof(*ret->first));
	if (!ret->table || !ret->offsets || !ret->first)
		rc = err_errno(e, ENOMEM, "pack");
	if (!rc) {
		memcpy(ret->table, (const uint8_t *)bytes + sizeof(ret->header),
		       ret->header.table_bytes);
		ret->runs = (const void *)ret->table;
		ret->names = (const void *)(ret->runs + ret->header.nr_runs);
	}
	if (!rc && k->sealed &&
	    !keys_unseal(k, &ret->header, 0, ret->table, ret->header.plain_bytes))
		rc = err_set(e, E_CORRUPT, "the table is not authentic");
	if (!rc)
		rc = check_runs(ret, k->sealed, e);
	if (rc)
		pack_head_deinit(ret);
	return rc;
}

void pack_head_deinit(struct pack_head *h)
{
	free(h->table);
	free(h->offsets);
	free(h->first);
	*h = (struct pack_head){0};
}

uint32_t pack_run_of(const struct pack_head *h, uint32_t entry)
{
	uint32_t lo = 0, hi = h->header.nr_runs;

	while (hi - lo > 1) {
		uint32_t mid = lo + (hi - lo) / 2;

		*(h->first[mid] <= entry ? &lo : &hi) = mid;
	}
	return lo;
}

static int check_pages(const struct repo_keys *k, const struct pack_head *h, uint32_t run,
		       const uint8_t *pages, struct err *e)
{
	for (uint32_t i = 0; i < h->runs[run].nr_pages; i++) {
		struct bk_name is;

		keys_page_name(k, pages + ((size_t)i << h->header.page_shift), pack_page_size(h),
			       &is);
		if (memcmp(&is, &h->names[h->first[run] + i], sizeof(is)) != 0)
			return err_set(e, E_CORRUPT, "page %u is not what its name says",
				       h->first[run] + i);
	}
	return 0;
}

int pack_run_open(const struct repo_keys *k, const struct pack_head *h, uint32_t run,
		  uint8_t *stored, uint8_t *dst, struct err *e)
{
	const struct bk_run *r = &h->runs[run];
	uint32_t len = r->stored_bytes - (k->sealed ? BK_TAG_BYTES : 0);
	uint32_t plain = (uint32_t)r->nr_pages << h->header.page_shift;

	if (k->sealed && !keys_unseal(k, &h->header, run + 1, stored, len))
		return err_set(e, E_CORRUPT, "run %u is not authentic", run);
	if (r->codec == BK_RAW)
		memcpy(dst, stored, plain);
	else if (ZSTD_decompress(dst, plain, stored, len) != plain)
		return err_set(e, E_CORRUPT, "run %u is no frame of %u pages", run, r->nr_pages);
	return check_pages(k, h, run, dst, e);
}
