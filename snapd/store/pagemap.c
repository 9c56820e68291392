/* SPDX-License-Identifier: MIT */
/*
 * pagemap: home GFN → loc; see pagemap.h.  Any one thread at a time.
 *
 * An open-addressed table of pointers to chunks of 512 frames.  A chunk counts
 * its entries; one that became empty stays (its range usually comes back) until
 * the table grows, which leaves empty ones behind.
 *
 * P1  nr and nr_pages are the sums of the chunks' counts.
 * P2  at most half of the table's cells are taken, so a probe always ends.
 * P3  a fingerprint is 0 wherever the loc is NONE or came from a run.
 */
#include "snapd/store/pagemap.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/store/manifest.h"
#include "snapd/util/cleanup.h"

#define CHUNK_SHIFT  9
#define CHUNK_FRAMES PAGEMAP_CHUNK_FRAMES
static_assert(CHUNK_FRAMES == 1u << CHUNK_SHIFT, "frames by shifting");
#define TABLE_MIN 16u

struct chunk {
	uint64_t number; /* gfn >> CHUNK_SHIFT of its frames */
	uint32_t nr, nr_pages;
	bool reserved; /* stays although it is empty */
	loc_t loc[CHUNK_FRAMES];
	uint16_t fp[]; /* CHUNK_FRAMES of them, if the map has fingerprints */
};

struct pagemap {
	struct chunk **table; /* owned, and what it points to */
	uint32_t table_bits;
	size_t nr_chunks;
	uint64_t nr, nr_pages;
	bool with_fp;
};

static size_t chunk_bytes(const struct pagemap *m)
{
	return sizeof(struct chunk) + (m->with_fp ? CHUNK_FRAMES * sizeof(uint16_t) : 0);
}

static size_t table_cells(const struct pagemap *m)
{
	return (size_t)1 << m->table_bits;
}

/* The cell of chunk `number`, or the empty one where it belongs. */
static size_t find_cell(struct chunk *const *table, uint32_t bits, uint64_t number)
{
	size_t mask = ((size_t)1 << bits) - 1;
	size_t i = number * 0x9e3779b97f4a7c15u >> (64 - bits);

	while (table[i] && table[i]->number != number)
		i = (i + 1) & mask;
	return i;
}

static struct chunk *find_chunk(const struct pagemap *m, uint64_t number)
{
	return m->table[find_cell(m->table, m->table_bits, number)];
}

int pagemap_create(bool with_fp, struct pagemap **ret)
{
	struct pagemap *m = calloc(1, sizeof(*m));

	if (!m)
		return -ENOMEM;
	m->with_fp = with_fp;
	m->table_bits = (uint32_t)__builtin_ctz(TABLE_MIN);
	m->table = calloc(TABLE_MIN, sizeof(struct chunk *));
	if (!m->table) {
		free(m);
		return -ENOMEM;
	}
	*ret = m;
	return 0;
}

void pagemap_destroy(struct pagemap *m)
{
	if (!m)
		return;
	for (size_t i = 0; m->table && i < table_cells(m); i++)
		free(m->table[i]);
	free(m->table);
	free(m);
}

static struct chunk *copy_chunk(const struct pagemap *m, const struct chunk *c)
{
	struct chunk *copy = malloc(chunk_bytes(m));

	if (copy)
		memcpy(copy, c, chunk_bytes(m));
	return copy;
}

static int copy_chunks(struct pagemap *to, const struct pagemap *from)
{
	for (size_t i = 0; i < table_cells(from); i++) {
		if (!from->table[i])
			continue;
		to->table[i] = copy_chunk(from, from->table[i]);
		if (!to->table[i])
			return -ENOMEM;
	}
	return 0;
}

int pagemap_clone(const struct pagemap *m, struct pagemap **ret)
{
	struct pagemap *n = calloc(1, sizeof(*n));

	if (!n)
		return -ENOMEM;
	*n = *m;
	n->table = calloc(table_cells(m), sizeof(struct chunk *));
	if (!n->table || copy_chunks(n, m) < 0) {
		pagemap_destroy(n);
		return -ENOMEM;
	}
	*ret = n;
	return 0;
}

static bool is_used(const struct chunk *c)
{
	return c->nr || c->reserved;
}

/* Move the chunks to a table in which they fill at most a quarter. */
static int rebuild_table(struct pagemap *m)
{
	uint32_t bits = m->table_bits;
	struct chunk **table;
	size_t live = 0;

	for (size_t i = 0; i < table_cells(m); i++)
		live += m->table[i] && is_used(m->table[i]);
	while ((size_t)1 << bits < 4 * (live + 1))
		bits++;
	table = calloc((size_t)1 << bits, sizeof(struct chunk *));
	if (!table)
		return -ENOMEM;
	for (size_t i = 0; i < table_cells(m); i++) {
		struct chunk *c = m->table[i];

		if (c && is_used(c))
			table[find_cell(table, bits, c->number)] = c;
		else
			free(c);
	}
	free(m->table);
	m->table = table;
	m->table_bits = bits;
	m->nr_chunks = live;
	return 0;
}

static int obtain_chunk(struct pagemap *m, uint64_t number, struct chunk **ret)
{
	struct chunk *c = find_chunk(m, number);
	int r;

	if (!c) {
		if (2 * (m->nr_chunks + 1) > table_cells(m)) {
			r = rebuild_table(m);
			if (r < 0)
				return r;
		}
		if (m->nr_chunks >= PAGEMAP_CHUNKS_MAX)
			return -E2BIG;
		c = calloc(1, chunk_bytes(m));
		if (!c)
			return -ENOMEM;
		c->number = number;
		m->table[find_cell(m->table, m->table_bits, number)] = c;
		m->nr_chunks++;
	}
	*ret = c;
	return 0;
}

loc_t pagemap_get(const struct pagemap *m, uint64_t gfn)
{
	const struct chunk *c = find_chunk(m, gfn >> CHUNK_SHIFT);

	return c ? c->loc[gfn % CHUNK_FRAMES] : 0;
}

uint16_t pagemap_fp(const struct pagemap *m, uint64_t gfn)
{
	const struct chunk *c = m->with_fp ? find_chunk(m, gfn >> CHUNK_SHIFT) : NULL;

	return c ? c->fp[gfn % CHUNK_FRAMES] : 0;
}

static void put_entry(struct pagemap *m, struct chunk *c, uint32_t slot, loc_t loc, uint16_t fp)
{
	loc_t old = c->loc[slot];
	int nr = (loc != 0) - (old != 0);
	int nr_pages = (loc_kind(loc) == LOC_PAGE) - (loc_kind(old) == LOC_PAGE);

	c->loc[slot] = loc;
	if (m->with_fp)
		c->fp[slot] = loc ? fp : 0;
	c->nr += nr;
	c->nr_pages += nr_pages;
	m->nr += nr;
	m->nr_pages += nr_pages;
}

int pagemap_set(struct pagemap *m, uint64_t gfn, loc_t loc, uint16_t fp)
{
	struct chunk *c;
	int r;

	if (!loc) {
		c = find_chunk(m, gfn >> CHUNK_SHIFT);
		if (c)
			put_entry(m, c, gfn % CHUNK_FRAMES, 0, 0);
		return 0;
	}
	r = obtain_chunk(m, gfn >> CHUNK_SHIFT, &c);
	if (r < 0)
		return r;
	put_entry(m, c, gfn % CHUNK_FRAMES, loc, fp);
	return 0;
}

static void put_run(struct pagemap *m, struct chunk *c, uint32_t slot, uint32_t n, loc_t loc)
{
	uint64_t step = loc_kind(loc) == LOC_PAGE;

	for (uint32_t i = 0; i < n; i++)
		put_entry(m, c, slot + i, loc + i * step, 0);
}

/* Clear [gfn, gfn + n) by walking the chunks there are: n may be huge. */
static void clear_run(struct pagemap *m, uint64_t gfn, uint64_t n)
{
	uint64_t last = gfn + n - 1;

	for (size_t i = 0; i < table_cells(m); i++) {
		struct chunk *c = m->table[i];
		uint64_t lo, hi;

		if (!c || !c->nr || c->number < gfn >> CHUNK_SHIFT ||
		    c->number > last >> CHUNK_SHIFT)
			continue;
		lo = MAX(gfn, c->number << CHUNK_SHIFT);
		hi = MIN(last, (c->number << CHUNK_SHIFT) + CHUNK_FRAMES - 1);
		put_run(m, c, lo % CHUNK_FRAMES, (uint32_t)(hi - lo + 1), 0);
	}
}

int pagemap_set_run(struct pagemap *m, uint64_t gfn, uint64_t n, loc_t loc)
{
	struct chunk *c;
	int r;

	if (n && gfn + (n - 1) < gfn)
		return -EINVAL;
	if (loc == MANIFEST_GONE)
		loc = 0;
	if (!loc && n > CHUNK_FRAMES) {
		clear_run(m, gfn, n);
		return 0;
	}
	while (n) {
		uint32_t slot = gfn % CHUNK_FRAMES;
		uint32_t part = (uint32_t)MIN(n, (uint64_t)(CHUNK_FRAMES - slot));

		if (loc) {
			r = obtain_chunk(m, gfn >> CHUNK_SHIFT, &c);
			if (r < 0)
				return r;
		} else {
			c = find_chunk(m, gfn >> CHUNK_SHIFT);
		}
		if (c)
			put_run(m, c, slot, part, loc);
		gfn += part;
		n -= part;
		loc += loc_kind(loc) == LOC_PAGE ? part : 0;
	}
	return 0;
}

int pagemap_reserve(struct pagemap *m, uint64_t gfn)
{
	struct chunk *c;
	int r = obtain_chunk(m, gfn >> CHUNK_SHIFT, &c);

	if (!r)
		c->reserved = true;
	return r;
}

uint64_t pagemap_nr(const struct pagemap *m)
{
	return m->nr;
}

uint64_t pagemap_nr_pages(const struct pagemap *m)
{
	return m->nr_pages;
}

static int compare_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

/* Append the numbers of m's chunks that hold something; returns the new count. */
static size_t collect_chunks(const struct pagemap *m, uint64_t *numbers, size_t nr)
{
	for (size_t i = 0; i < table_cells(m); i++)
		if (m->table[i] && m->table[i]->nr)
			numbers[nr++] = m->table[i]->number;
	return nr;
}

int pagemap_iter_init(struct pagemap_iter *it, const struct pagemap *m)
{
	*it = (struct pagemap_iter){.m = m};
	it->chunks = malloc((m->nr_chunks + 1) * sizeof(uint64_t));
	if (!it->chunks)
		return -ENOMEM;
	it->nr_chunks = collect_chunks(m, it->chunks, 0);
	qsort(it->chunks, it->nr_chunks, sizeof(uint64_t), compare_u64);
	return 0;
}

void pagemap_iter_deinit(struct pagemap_iter *it)
{
	free(it->chunks);
	it->chunks = NULL;
	it->nr_chunks = 0;
}

bool pagemap_iter_next(struct pagemap_iter *it, uint64_t *gfn, loc_t *loc)
{
	for (; it->at < it->nr_chunks; it->at++, it->slot = 0, it->chunk = NULL) {
		const struct chunk *c = it->chunk;

		if (!c)
			c = it->chunk = find_chunk(it->m, it->chunks[it->at]);
		while (it->slot < CHUNK_FRAMES && !c->loc[it->slot])
			it->slot++;
		if (it->slot == CHUNK_FRAMES)
			continue;
		*gfn = (c->number << CHUNK_SHIFT) + it->slot;
		*loc = c->loc[it->slot++];
		return true;
	}
	return false;
}

static const struct chunk empty_chunk;

static const struct chunk *chunk_or_empty(const struct pagemap *m, uint64_t number)
{
	const struct chunk *c = find_chunk(m, number);

	return c ? c : &empty_chunk;
}

struct gfn_list {
	uint64_t *gfns; /* owned until taken */
	size_t nr, cap;
};

static int list_reserve(struct gfn_list *l, size_t more)
{
	size_t cap = MAX(l->cap * 2, l->nr + more);
	uint64_t *p;

	if (l->nr + more <= l->cap)
		return 0;
	p = realloc(l->gfns, cap * sizeof(uint64_t));
	if (!p)
		return -ENOMEM;
	l->gfns = p;
	l->cap = cap;
	return 0;
}

static int diff_chunk(const struct pagemap *a, const struct pagemap *b, uint64_t number,
		      struct gfn_list *out)
{
	const struct chunk *x = chunk_or_empty(a, number), *y = chunk_or_empty(b, number);
	int r;

	if (!memcmp(x->loc, y->loc, sizeof(x->loc)))
		return 0;
	r = list_reserve(out, CHUNK_FRAMES);
	if (r < 0)
		return r;
	for (uint32_t i = 0; i < CHUNK_FRAMES; i++)
		if (x->loc[i] != y->loc[i])
			out->gfns[out->nr++] = (number << CHUNK_SHIFT) + i;
	return 0;
}

int pagemap_diff(const struct pagemap *a, const struct pagemap *b, uint64_t **gfns, size_t *nr)
{
	_cleanup_free_ uint64_t *numbers = NULL;
	struct gfn_list out = {0};
	size_t nr_numbers;
	int r;

	numbers = malloc((a->nr_chunks + b->nr_chunks + 1) * sizeof(uint64_t));
	if (!numbers)
		return -ENOMEM;
	nr_numbers = collect_chunks(b, numbers, collect_chunks(a, numbers, 0));
	qsort(numbers, nr_numbers, sizeof(uint64_t), compare_u64);
	r = list_reserve(&out, 1);
	for (size_t i = 0; r == 0 && i < nr_numbers; i++)
		if (i == 0 || numbers[i] != numbers[i - 1])
			r = diff_chunk(a, b, numbers[i], &out);
	if (r < 0) {
		free(out.gfns);
		return r;
	}
	*gfns = out.gfns;
	*nr = out.nr;
	return 0;
}
