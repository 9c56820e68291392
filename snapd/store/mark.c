/* SPDX-License-Identifier: MIT */
/*
 * Marking and counting: roots in; which epochs stay, and how many of them name each
 * place in the segments (refs.h), out.
 *
 * An epoch's blobs, and the pages that its manifest names, do not change while it is in
 * the index, so each is read twice at most: when it is first kept, and when it goes.  What
 * a run costs is thus what came and went since the one before, and a walk over the
 * records of epochs; a store of an older version is read once.
 *
 * One thread: gc's.
 */
#include "snapd/store/gc.h"

#include <string.h>

#include "snapd/store/manifest.h"
#include "snapd/store/point.h"

#define COUNT_AT_ONCE (1u << 18) /* changed places that one transaction takes */
#define DROP_MAX      (4u << 20) /* in memory: what goes, in places; more takes another round */

struct gc_epoch *gc_find_epoch(struct gc *g, struct snapd_point at)
{
	return find_point(g->epochs, g->nr_epochs, sizeof(*g->epochs), at);
}

/* Not while others wait for roots_lock. */
int gc_pace(struct gc *g, uint64_t bytes, struct err *e)
{
	if (!g->locked && pace_step(&g->pace, bytes))
		return err_set(e, ECANCELED, "gc was cancelled");
	return 0;
}

/* ---- roots ---- */

/* An epoch of the list, or, in *newer, one that came since: its record is in the index.  NULL with
 * *err 0: there is none. */
static struct gc_epoch *find_or_read(struct gc *g, struct snapd_point at, struct gc_epoch *newer,
				     int *err, struct err *e)
{
	struct gc_epoch *x = at.epoch ? gc_find_epoch(g, at) : NULL;
	struct rec_epoch rec;
	struct ix_txn t;

	*err = 0;
	if (x)
		return x;
	*err = index_begin(g->s->index, &t, e);
	if (*err)
		return NULL;
	*err = store_epoch_record(&t, &at, &rec, e);
	index_end(&t);
	if (*err) {
		*err = MIN(*err, 0);
		return NULL;
	}
	x = gc_find_epoch(g, at);
	*newer = (struct gc_epoch){.at = at, .parent = rec.parent, .chained = rec.chain_epochs};
	return x ? x : newer;
}

/* From a root back to its checkpoint, as far as it was not done yet. */
static int mark_root(struct gc *g, struct snapd_point at, struct err *e)
{
	for (bool root = true;; root = false) {
		struct gc_epoch newer, *x;
		int r;

		x = find_or_read(g, at, &newer, &r, e);
		if (!x)
			return r;
		x->root |= root;
		if (x->kept)
			return 0;
		x->kept = true;
		if (!x->chained)
			return 0;
		at = x->parent;
	}
}

int gc_hold(struct gc *g, struct snapd_point at, struct err *e)
{
	for (;;) {
		struct gc_epoch newer, *x;
		int r;

		x = find_or_read(g, at, &newer, &r, e);
		if (!x)
			return r;
		x->held = true;
		if (!x->chained)
			return 0;
		at = x->parent;
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

/* ---- what an epoch names ---- */

static int no_memory(struct err *e)
{
	return err_errno(e, ENOMEM, "gc");
}

/* All parts of a blob. */
static int name_blob(struct gc *g, const struct rec_blob *blob, int32_t n, struct ref_log *log,
		     struct err *e)
{
	struct batch_ref at = blob->last;
	int r = 0;

	for (uint32_t i = blob->parts; !r && i; i--) {
		uint64_t payload;

		if (ref_log_add_part(log, at, n))
			return no_memory(e);
		r = i > 1 ? store_blob_part(g->s, &at, &payload, e) : 0;
	}
	return r;
}

/* All pages that a manifest or checkpoint names. */
static int name_pages(struct gc *g, const struct rec_blob *blob, enum batch_type type, int32_t n,
		      struct ref_log *log, struct err *e)
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
	while ((r = manifest_next(&reader, &run, e)) > 0)
		if (loc_kind(run.loc) == LOC_PAGE && ref_log_add(log, run.loc, run.len, n))
			return no_memory(e);
	return r < 0 ? r : gc_pace(g, blob->bytes, e);
}

static int name_epoch(struct gc *g, const struct rec_epoch *rec, int32_t n, struct ref_log *log,
		      struct err *e)
{
	bool own = !rec->chain_epochs && rec->checkpoint.bytes;
	int r = name_blob(g, &rec->manifest, n, log, e);

	if (!r)
		r = name_blob(g, &rec->checkpoint, n, log, e);
	if (!r)
		r = name_blob(g, &rec->state, n, log, e);
	if (!r && ref_log_add_part(log, rec->record, n))
		r = no_memory(e);
	if (r)
		return r;
	return own ? name_pages(g, &rec->checkpoint, BATCH_CHECKPOINT, n, log, e)
		   : name_pages(g, &rec->manifest, BATCH_MANIFEST, n, log, e);
}

int gc_name_epoch(struct gc *g, const struct gc_epoch *x, int32_t n, struct ref_log *log,
		  struct err *e)
{
	struct ix_key k = ix_key_point(x->at);
	struct rec_epoch rec;
	struct ix_txn t;
	int r = index_begin(g->s->index, &t, e);

	if (r)
		return r;
	r = index_get(&t, IX_EPOCHS, &k, &rec, sizeof(rec), NULL, NULL, e);
	index_end(&t);
	if (r)
		return r == -ENOENT ? err_set(e, E_CORRUPT, "the record of an epoch is missing")
				    : r;
	return name_epoch(g, &rec, n, log, e);
}

/* ---- counting ---- */

/* Segments know how much of them is named. */
void gc_learn(struct gc *g, const struct ref_changes *c)
{
	scoped_lock(&g->s->segments_lock);

	for (size_t i = 0; i < c->nr; i++) {
		struct seg *seg = seg_find(g->s, c->v[i].segment);

		if (seg)
			seg->named = (struct seg_named){c->v[i].pages, c->v[i].places, c->v[i].high,
							c->v[i].looks};
	}
}

/* Once for an open store.  -ESTALE: a count is of another life of its segment. */
static int learn_all(struct gc *g, struct ix_txn *t, struct err *e)
{
	struct rec_refs rec;
	struct ix_iter it;
	struct ix_key k;
	int r = index_iter_init(&it, t, IX_REFS, NULL, e);

	while (!r && (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0) {
		scoped_lock(&g->s->segments_lock);
		struct seg *seg = seg_find(g->s, ix_be32(k.b));

		r = k.len != 4 || !seg || seg->generation != rec.generation ? -ESTALE : 0;
		if (!r)
			seg->named = (struct seg_named){rec.pages, rec.places, rec.high, rec.looks};
	}
	index_iter_deinit(&it);
	return r == -E_CORRUPT ? -ESTALE : r;
}

/* Which epochs are counted. */
static int list_counted(struct gc *g, struct ix_txn *t, struct err *e)
{
	struct rec_counted rec;
	struct ix_iter it;
	struct ix_key k;
	int r = index_iter_init(&it, t, IX_COUNTED, NULL, e);

	while (!r && (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0) {
		struct gc_epoch *x =
			k.len == 16 ? gc_find_epoch(g, (struct snapd_point){ix_be64(k.b),
									    ix_be64(k.b + 8)})
				    : NULL;

		r = x ? 0 : -ESTALE;
		if (x)
			x->counted = true;
	}
	index_iter_deinit(&it);
	return r == -E_CORRUPT ? -ESTALE : r;
}

int gc_load_counts(struct gc *g, struct ix_txn *t, struct err *e)
{
	int r = g->s->counts_known ? 0 : learn_all(g, t, e);

	if (!r)
		r = list_counted(g, t, e);
	g->s->counts_known = !r;
	return r;
}

/* The counts are of this life of their segments. */
static int check_lives(struct gc *g, struct ref_changes *c)
{
	scoped_lock(&g->s->segments_lock);

	for (size_t i = 0; i < c->nr; i++) {
		const struct seg *seg = seg_find(g->s, c->v[i].segment);
		uint64_t life = seg ? seg->generation : 0;

		if (c->v[i].generation && c->v[i].generation != life)
			return -ESTALE;
		c->v[i].generation = life;
	}
	return 0;
}

int gc_change(struct gc *g, struct ref_log *log, struct ref_changes *ret, struct err *e)
{
	struct ix_txn t;
	int r = index_begin(g->s->index, &t, e);

	if (r)
		return r;
	r = refs_change(&t, log, ret, e);
	index_end(&t);
	return r ? r : check_lives(g, ret);
}

struct counting {
	struct ref_changes changes; /* owned */
	const struct gc *g;
	size_t from, to; /* epochs */
};

static bool is_due(const struct gc_epoch *x)
{
	return x->kept && !x->counted;
}

static int count_txn(struct ix_txn *t, void *arg, struct err *e)
{
	struct counting *c = arg;
	int r = refs_put_all(t, &c->changes, e);

	for (size_t i = c->from; !r && i < c->to; i++) {
		struct ix_key k = ix_key_point(c->g->epochs[i].at);
		struct rec_counted rec = {.head = {0}};

		if (is_due(&c->g->epochs[i]))
			r = index_put(t, IX_COUNTED, &k, &rec, sizeof(rec), NULL, 0, e);
	}
	return r;
}

static int put_counts(struct gc *g, struct ref_log *log, size_t from, size_t to, struct err *e)
{
	struct counting c = {.g = g, .from = from, .to = to};
	int r = gc_change(g, log, &c.changes, e);

	if (!r)
		r = index_update(g->s->index, count_txn, &c, e);
	if (!r)
		gc_learn(g, &c.changes);
	ref_changes_deinit(&c.changes);
	log->nr = 0;
	for (size_t i = from; !r && i < to; i++)
		g->epochs[i].counted |= is_due(&g->epochs[i]);
	return r;
}

int gc_count(struct gc *g, struct err *e)
{
	_cleanup_(ref_log_deinit) struct ref_log log = {0};
	size_t from = 0, due = 0;
	int r = 0;

	for (size_t i = 0; !r && i < g->nr_epochs; i++) {
		if (!is_due(&g->epochs[i]))
			continue;
		r = gc_name_epoch(g, &g->epochs[i], 1, &log, e);
		due++;
		if (r || log.nr < COUNT_AT_ONCE)
			continue;
		r = put_counts(g, &log, from, i + 1, e);
		from = i + 1;
		due = 0;
	}
	return r || !due ? r : put_counts(g, &log, from, g->nr_epochs, e);
}

static int forget_txn(struct ix_txn *t, void *arg, struct err *e)
{
	int r = index_clear(t, IX_REFS, e);

	(void)arg;
	return r ? r : index_clear(t, IX_COUNTED, e);
}

int gc_forget_counts(struct gc *g, struct err *e)
{
	g->s->counts_known = false;
	return index_update(g->s->index, forget_txn, NULL, e);
}

/* ---- what goes ---- */

static int read_drop(struct gc *g, size_t i, struct err *e)
{
	struct gc_drop *d;
	int r;

	if (array_grow(g->drops, g->nr_drops, g->cap_drops))
		return no_memory(e);
	d = &g->drops[g->nr_drops++];
	*d = (struct gc_drop){.epoch = i};
	r = gc_name_epoch(g, &g->epochs[i], -1, &d->log, e);
	g->nr_dropped_places += d->log.nr;
	/* What it named will never be known: count again what the others do. */
	return r == -E_CORRUPT || r == -EIO ? -ESTALE : r;
}

/* Newest first: what builds on an epoch goes before it. */
int gc_read_drops(struct gc *g, struct err *e)
{
	int r = 0;

	for (size_t i = g->nr_epochs; !r && i-- > 0;) {
		struct gc_epoch *x = &g->epochs[i];

		if (x->kept)
			continue;
		x->left = g->nr_dropped_places >= DROP_MAX;
		g->more |= x->left;
		if (!x->left && x->counted)
			r = read_drop(g, i, e);
	}
	return r;
}

static uint32_t count_slots(struct store *s)
{
	scoped_lock(&s->segments_lock);
	return s->nr_segs;
}

static int plan_need(struct gc *g, struct err *e)
{
	uint32_t nr = count_slots(g->s);
	size_t at = 0;
	struct ix_txn t;
	int r = index_begin(g->s->index, &t, e);

	for (uint32_t i = 0; !r && i < nr; i++) {
		struct ix_key k = ix_key_u32(i);
		bool named;

		while (at < g->changes.nr && g->changes.v[at].segment < i)
			at++;
		if (at < g->changes.nr && g->changes.v[at].segment == i)
			named = g->changes.v[at].nr;
		else
			named = index_has(&t, IX_REFS, &k);
		if (named && seg_refs_add(&g->need, i))
			r = no_memory(e);
	}
	index_end(&t);
	return r;
}

int gc_plan(struct gc *g, struct err *e)
{
	_cleanup_(ref_log_deinit) struct ref_log log = {0};
	int r = 0;

	for (size_t i = 0; !r && i < g->nr_drops; i++)
		if (!g->epochs[g->drops[i].epoch].kept && ref_log_add_all(&log, &g->drops[i].log))
			r = no_memory(e);
	if (!r)
		r = gc_change(g, &log, &g->changes, e);
	return r ? r : plan_need(g, e);
}
