/* SPDX-License-Identifier: MIT */
/* Counts of what names a place in a segment; see refs.h. */
#include "snapd/store/refs.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"

#define PLACE_MASK (((uint64_t)1 << 60) - 1) /* of a loc: all but its kind */

/* ---- what came and went ---- */

void ref_log_deinit(struct ref_log *l)
{
	free(l->v);
	*l = (struct ref_log){0};
}

static int add(struct ref_log *l, struct ref_delta d)
{
	struct ref_delta *last = l->nr ? &l->v[l->nr - 1] : NULL;

	if (last && last->n == d.n && last->at + last->len == d.at) {
		last->len += d.len;
		return 0;
	}
	if (array_grow(l->v, l->nr, l->cap))
		return -ENOMEM;
	assert(l->v);
	l->v[l->nr++] = d;
	return 0;
}

int ref_log_add(struct ref_log *l, loc_t first, uint64_t len, int32_t n)
{
	return add(l, (struct ref_delta){first & PLACE_MASK, (uint32_t)len, n});
}

int ref_log_add_part(struct ref_log *l, struct batch_ref at, int32_t n)
{
	return at.block ? ref_log_add(l, loc_make(at.segment, at.block, REF_BLOB), 1, n) : 0;
}

int ref_log_add_all(struct ref_log *l, const struct ref_log *from)
{
	int r = 0;

	for (size_t i = 0; !r && i < from->nr; i++)
		r = add(l, from->v[i]);
	return r;
}

/* ---- records ---- */

void seg_counts_deinit(struct seg_counts *c)
{
	free(c->runs);
	c->runs = NULL;
	c->nr = 0;
}

static int run_cmp(const void *key, const void *elem)
{
	uint32_t at = *(const uint32_t *)key;
	const struct ref_run *run = elem;

	return at < run->at ? -1 : at - run->at >= run->len;
}

bool refs_has(const struct seg_counts *c, uint32_t at)
{
	return c->nr && bsearch(&at, c->runs, c->nr, sizeof(*c->runs), run_cmp);
}

static bool runs_are_sane(const struct seg_counts *c)
{
	uint64_t end = 0;

	for (uint32_t i = 0; i < c->nr; i++) {
		const struct ref_run *run = &c->runs[i];

		if (run->at < end || !run->len || !run->count ||
		    (uint64_t)run->at + run->len > UINT32_MAX)
			return false;
		end = (uint64_t)run->at + run->len;
	}
	return true;
}

int refs_get(struct ix_txn *t, uint32_t segment, struct seg_counts *ret, struct err *e)
{
	struct ix_key k = ix_key_u32(segment);
	struct rec_refs rec;
	const void *tail;
	size_t len;
	int r;

	*ret = (struct seg_counts){.segment = segment};
	r = index_get(t, IX_REFS, &k, &rec, sizeof(rec), &tail, &len, e);
	if (r)
		return r;
	ret->generation = rec.generation;
	ret->pages = rec.pages;
	ret->places = rec.places;
	ret->high = rec.high;
	ret->looks = rec.looks;
	ret->nr = (uint32_t)(len / sizeof(*ret->runs));
	ret->runs = malloc(len + 1);
	if (!ret->runs)
		return err_errno(e, ENOMEM, "gc");
	memcpy(ret->runs, tail, len);
	if (len % sizeof(*ret->runs) || !runs_are_sane(ret)) {
		seg_counts_deinit(ret);
		return -ESTALE;
	}
	return 0;
}

int refs_put(struct ix_txn *t, struct seg_counts *c, struct err *e)
{
	struct ix_key k = ix_key_u32(c->segment);
	struct rec_refs rec = {.generation = c->generation,
			       .pages = c->pages,
			       .places = c->places,
			       .high = c->high,
			       .looks = c->looks};

	if (!c->nr)
		return index_del(t, IX_REFS, &k, e);
	return index_put(t, IX_REFS, &k, &rec, sizeof(rec), c->runs, c->nr * sizeof(*c->runs), e);
}

/* ---- changes ---- */

/* Where the count changes, and by how much. */
struct edge {
	uint64_t at;
	int64_t n;
};

static int compare_edges(const void *a, const void *b)
{
	const struct edge *x = a, *y = b;

	return x->at < y->at ? -1 : x->at > y->at;
}

static int compare_deltas(const void *a, const void *b)
{
	const struct ref_delta *x = a, *y = b;

	return x->at < y->at ? -1 : x->at > y->at;
}

static int put_run(struct seg_counts *c, uint32_t *cap, uint64_t from, uint64_t to, uint64_t count)
{
	struct ref_run *last = c->nr ? &c->runs[c->nr - 1] : NULL;
	size_t nr = c->nr, room = *cap;

	if (from == to || !count)
		return 0;
	c->places += to - from;
	if ((from & 0xfff) != REF_BLOB)
		c->pages += to - from;
	if (last && last->at + (uint64_t)last->len == from && last->count == count) {
		last->len += (uint32_t)(to - from);
		return 0;
	}
	if (array_grow(c->runs, nr, room))
		return -ENOMEM;
	*cap = (uint32_t)room;
	c->runs[c->nr++] = (struct ref_run){(uint32_t)from, (uint32_t)(to - from), (uint32_t)count};
	return 0;
}

/* The sum of all that lies between each two edges.  -ESTALE: it is below zero. */
static int sum_up(struct edge *edges, size_t nr, struct seg_counts *c)
{
	uint32_t cap = 0;
	int64_t level = 0;
	int r = 0;

	qsort(edges, nr, sizeof(*edges), compare_edges);
	for (size_t i = 0; !r && i < nr; i++) {
		level += edges[i].n;
		if (i + 1 == nr || edges[i + 1].at == edges[i].at)
			continue;
		if (level < 0 || level > UINT32_MAX)
			return -ESTALE;
		r = put_run(c, &cap, edges[i].at, edges[i + 1].at, (uint64_t)level);
	}
	return r;
}

static int change_segment(struct seg_counts *c, const struct ref_delta *d, size_t nr)
{
	_cleanup_free_ struct edge *edges = calloc(2 * (c->nr + nr), sizeof(*edges));
	_cleanup_free_ struct ref_run *runs = c->runs;
	size_t n = 0;
	int r;

	c->runs = NULL;
	if (!edges)
		return -ENOMEM;
	for (uint32_t i = 0; runs && i < c->nr; i++) {
		edges[n++] = (struct edge){runs[i].at, runs[i].count};
		edges[n++] =
			(struct edge){(uint64_t)runs[i].at + runs[i].len, -(int64_t)runs[i].count};
	}
	for (size_t i = 0; i < nr; i++) {
		uint64_t at = d[i].at & UINT32_MAX;

		edges[n++] = (struct edge){at, d[i].n};
		edges[n++] = (struct edge){at + d[i].len, -(int64_t)d[i].n};
	}
	c->nr = 0;
	c->pages = c->places = 0;
	r = sum_up(edges, n, c);
	c->high = MAX(c->high, c->places);
	return r;
}

void ref_changes_deinit(struct ref_changes *c)
{
	for (size_t i = 0; i < c->nr; i++)
		seg_counts_deinit(&c->v[i]);
	free(c->v);
	*c = (struct ref_changes){0};
}

int refs_change(struct ix_txn *t, struct ref_log *l, struct ref_changes *ret, struct err *e)
{
	if (l->nr)
		qsort(l->v, l->nr, sizeof(*l->v), compare_deltas);
	for (size_t i = 0, n; i < l->nr; i += n) {
		uint32_t segment = (uint32_t)(l->v[i].at >> 32);
		struct seg_counts *c;
		int r;

		for (n = 1; i + n < l->nr && l->v[i + n].at >> 32 == segment; n++)
			;
		if (array_grow(ret->v, ret->nr, ret->cap))
			return err_errno(e, ENOMEM, "gc");
		c = &ret->v[ret->nr];
		r = refs_get(t, segment, c, e);
		if (r && r != -ENOENT)
			return r;
		ret->nr++;
		r = change_segment(c, &l->v[i], n);
		if (r)
			return r == -ESTALE ? r : err_errno(e, -r, "gc");
	}
	return 0;
}

int refs_put_all(struct ix_txn *t, struct ref_changes *c, struct err *e)
{
	int r = 0;

	for (size_t i = 0; !r && i < c->nr; i++)
		r = refs_put(t, &c->v[i], e);
	return r;
}
