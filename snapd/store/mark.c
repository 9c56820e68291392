/* SPDX-License-Identifier: MIT */
/*
 * Marking: roots in, the segments out that they need.
 *
 * An epoch's blobs and the pages that its manifest names never change, so what was
 * read of them once is remembered for as long as the store is open: a later run reads
 * the manifests of newer epochs only, and a deletion costs what it frees.  That makes
 * a run that was cancelled go on where it was.  Memory: 4 bytes for each segment that
 * an epoch names.
 *
 * One thread: gc's.
 */
#include "snapd/store/gc.h"

#include <string.h>

#include "snapd/store/manifest.h"
#include "snapd/store/point.h"

struct gc_epoch *gc_find_epoch(struct gc *g, struct snapd_point at)
{
	return find_point(g->epochs, g->nr_epochs, sizeof(*g->epochs), at);
}

static int mark_segment(struct gc *g, uint32_t id, struct err *e)
{
	return seg_refs_add(g->one, id) ? err_errno(e, ENOMEM, "gc") : 0;
}

/* Not while others wait for roots_lock. */
static int pace(struct gc *g, uint64_t bytes, struct err *e)
{
	if (!g->locked && pace_step(&g->pace, bytes))
		return err_set(e, ECANCELED, "gc was cancelled");
	return 0;
}

/* The segments of all parts of a blob. */
static int mark_blob(struct gc *g, const struct rec_blob *blob, struct err *e)
{
	struct batch_ref at = blob->last;
	int r = 0;

	for (uint32_t i = blob->parts; !r && i; i--) {
		uint64_t payload;

		r = mark_segment(g, at.segment, e);
		if (!r && i > 1)
			r = store_blob_part(g->s, &at, &payload, e);
	}
	return r;
}

/* The segments of all pages that a manifest or checkpoint names. */
static int mark_pages(struct gc *g, const struct rec_blob *blob, enum batch_type type,
		      struct err *e)
{
	_cleanup_free_ void *bytes = NULL;
	struct manifest_reader reader;
	struct manifest_run run;
	int r;

	if (!blob->bytes)
		return 0;
	r = store_blob_read(g->s, blob, type, "manifest", NULL, &bytes, e);
	if (r)
		return r;
	manifest_reader_init(&reader, bytes, blob->bytes);
	while ((r = manifest_next(&reader, &run, e)) > 0) {
		if (loc_kind(run.loc) != LOC_PAGE)
			continue;
		r = mark_segment(g, loc_segment(run.loc), e);
		if (r)
			return r;
	}
	return r < 0 ? r : pace(g, blob->bytes, e);
}

/* What an epoch names, from its blobs. */
static int read_epoch(struct gc *g, const struct rec_epoch *rec, struct err *e)
{
	bool own = !rec->chain_epochs && rec->checkpoint.bytes;
	int r = mark_blob(g, &rec->manifest, e);

	if (!r)
		r = mark_blob(g, &rec->checkpoint, e);
	if (!r)
		r = mark_blob(g, &rec->state, e);
	if (!r)
		r = mark_segment(g, rec->record.segment, e);
	if (r)
		return r;
	return own ? mark_pages(g, &rec->checkpoint, BATCH_CHECKPOINT, e)
		   : mark_pages(g, &rec->manifest, BATCH_MANIFEST, e);
}

/* ---- what is known from before ---- */

static const struct gc_named *find_named(const struct gc *g, struct snapd_point at)
{
	return find_point(g->s->gc_named, g->s->nr_gc_named, sizeof(*g->s->gc_named), at);
}

/* Remember; without memory for it, the next run reads again. */
static void note_named(struct gc *g, struct snapd_point at, const struct seg_refs *refs)
{
	struct gc_named n = {.at = at};

	for (uint32_t i = 0; i < refs->nr; i++)
		n.nr += seg_refs_has(refs, i);
	if (g->nr_fresh == g->cap_fresh) {
		size_t cap = g->cap_fresh ? g->cap_fresh * 2 : 64;
		struct gc_named *p = realloc(g->fresh, cap * sizeof(*p));

		if (!p)
			return;
		g->fresh = p;
		g->cap_fresh = cap;
	}
	n.segments = malloc((n.nr + 1) * sizeof(*n.segments));
	if (!n.segments)
		return;
	n.nr = 0;
	for (uint32_t i = 0; i < refs->nr; i++)
		if (seg_refs_has(refs, i))
			n.segments[n.nr++] = i;
	g->fresh[g->nr_fresh++] = n;
}

static int mark_epoch(struct gc *g, struct snapd_point at, const struct rec_epoch *rec,
		      struct err *e)
{
	const struct gc_named *known = find_named(g, at);
	struct seg_refs one = {0};
	int r = 0;

	g->one = known ? &g->need : &one;
	for (uint32_t i = 0; !r && known && i < known->nr; i++)
		r = mark_segment(g, known->segments[i], e);
	if (!known) {
		r = read_epoch(g, rec, e);
		if (!r && seg_refs_merge(&g->need, &one))
			r = err_errno(e, ENOMEM, "gc");
		if (!r)
			note_named(g, at, &one);
	}
	free(one.bits);
	return r;
}

void gc_named_free(struct gc_named *list, size_t nr)
{
	for (size_t i = 0; i < nr; i++)
		free(list[i].segments);
	free(list);
}

void gc_keep_named(struct gc *g, bool done)
{
	struct store *s = g->s;
	size_t nr = 0, all = s->nr_gc_named + g->nr_fresh;
	struct gc_named *list = malloc((all + 1) * sizeof(*list));

	if (!list)
		return;
	for (size_t i = 0; i < all; i++) {
		struct gc_named *n = i < s->nr_gc_named ? &s->gc_named[i]
							: &g->fresh[i - s->nr_gc_named];
		const struct gc_epoch *x = gc_find_epoch(g, n->at);

		if (done && x && !x->kept)
			free(n->segments);
		else
			list[nr++] = *n;
	}
	free(s->gc_named);
	free(g->fresh);
	g->fresh = NULL;
	g->nr_fresh = g->cap_fresh = 0;
	qsort(list, nr, sizeof(*list), compare_points);
	s->gc_named = list;
	s->nr_gc_named = nr;
}

/* ---- roots ---- */

/* From a root back to its checkpoint, as far as it was not done yet.  A record
 * that gc's list has not is newer. */
static int mark_root(struct gc *g, struct snapd_point at, struct err *e)
{
	for (;;) {
		struct rec_epoch rec;
		struct gc_epoch *x;
		struct ix_txn t;
		int r;

		r = index_begin(g->s->index, &t, e);
		if (r)
			return r;
		r = store_epoch_record(&t, &at, &rec, e);
		index_end(&t);
		if (r)
			return r < 0 ? r : 0;
		x = gc_find_epoch(g, at);
		if (x && x->kept)
			return 0;
		r = mark_epoch(g, at, &rec, e);
		if (r)
			return r;
		if (x)
			x->kept = true;
		if (!rec.chain_epochs)
			return 0;
		at = rec.parent;
	}
}

int gc_mark_roots(struct gc *g, struct err *e)
{
	while (g->nr_roots) {
		int r = mark_root(g, g->roots[--g->nr_roots], e);

		if (r)
			return r;
	}
	return 0;
}
