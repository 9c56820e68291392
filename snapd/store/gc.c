/* SPDX-License-Identifier: MIT */
/*
 * Giving space back.  In: the index, and which timelines belong to running VMs.
 * Out: segments in which nothing is needed are free or gone, and the records of
 * epochs that nothing leads to are removed.  No page is copied.
 *
 * Needed is what a *root* leads to.  Roots are the epochs of snapshots, the heads
 * of live timelines (and of those younger than YOUNG_NS, whose VM may not be on the
 * caller's list yet), pinned points, and the parents of epochs in flight.  A root
 * needs its records back to a checkpoint, the segments of their blobs, and every
 * segment that their manifests name.  (That is somewhat more than its map names: a
 * page that was overwritten on the way stays until the way is not needed; the rule
 * for checkpoints bounds it by half a map for a root.)
 *
 * gc runs beside everything else:
 *   G1 A point that becomes a root while gc runs is noted under roots_lock
 *      (gc_note_root()).  The last step holds roots_lock, and is only taken when
 *      every noted root has been marked; where commits come faster than their maps
 *      can be marked, the last few are marked under the lock.
 *   G2 Pages that an epoch in flight, or one committed since the start, refers to
 *      are known by segment (seg_ref()); those segments stay.
 *   G3 A segment is *condemned* in that last step, under segments_lock: from there
 *      on seg_ref() refuses it.  It is reused only after the index said so durably,
 *      and after its pages have left the dedup table.
 *   G4 Only records that were there at the start are removed.
 *   G5 When anything cannot be read, nothing is dropped: damage is no reason to
 *      throw more away.
 *
 * A crash at any point leaves what the last LMDB commit says; files without a
 * record are removed at the next start.
 */
#include "snapd/store/gc.h"

#include <fcntl.h>
#include <string.h>

#include "snapd/util/log.h"

#define YOUNG_NS      (3600ull * 1000000000u)
#define ROUNDS_MAX    4u /* of marking while others go on */
#define FREE_KEPT_MAX 4u /* free segments kept for recycling */

/* ---- roots ---- */

static int add_root(struct gc *g, struct snapd_point at, struct err *e)
{
	if (!at.timeline)
		return 0;
	if (g->nr_roots == g->cap_roots) {
		size_t cap = g->cap_roots ? g->cap_roots * 2 : 64;
		struct snapd_point *p = realloc(g->roots, cap * sizeof(*p));

		if (!p)
			return err_errno(e, ENOMEM, "gc");
		g->roots = p;
		g->cap_roots = cap;
	}
	g->roots[g->nr_roots++] = at;
	return 0;
}

static bool is_live(const struct gc *g, uint64_t timeline, const struct rec_timeline *rec)
{
	uint64_t now = store_now_ns();

	for (size_t i = 0; i < g->nr_live; i++)
		if (g->live[i] == timeline)
			return true;
	return !rec->last && rec->created_ns + YOUNG_NS > now;
}

static int roots_of_snapshots(struct gc *g, struct ix_txn *t, struct err *e)
{
	struct rec_snapshot rec;
	struct ix_iter it;
	struct ix_key k;
	int r;

	r = index_iter_init(&it, t, IX_SNAPSHOTS, NULL, e);
	while (!r && (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0)
		r = add_root(g, rec.point, e);
	index_iter_deinit(&it);
	return r;
}

static int roots_of_timelines(struct gc *g, struct ix_txn *t, struct err *e)
{
	struct rec_timeline rec;
	struct ix_iter it;
	struct ix_key k;
	int r;

	r = index_iter_init(&it, t, IX_TIMELINES, NULL, e);
	while (!r && (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0) {
		struct snapd_point head = {ix_be64(k.b), rec.last};

		r = is_live(g, head.timeline, &rec) ? add_root(g, head, e) : 0;
	}
	index_iter_deinit(&it);
	return r;
}

static int add_epoch(struct gc *g, struct snapd_point at, const struct rec_epoch *rec,
		     struct err *e)
{
	if (g->nr_epochs == g->cap_epochs) {
		size_t cap = g->cap_epochs ? g->cap_epochs * 2 : 64;
		struct gc_epoch *p = realloc(g->epochs, cap * sizeof(*p));

		if (!p)
			return err_errno(e, ENOMEM, "gc");
		g->epochs = p;
		g->cap_epochs = cap;
	}
	g->epochs[g->nr_epochs++] = (struct gc_epoch){.at = at, .ancestor = rec->ancestor};
	return 0;
}

static int list_epochs(struct gc *g, struct ix_txn *t, struct err *e)
{
	struct rec_epoch rec;
	struct ix_iter it;
	struct ix_key k;
	int r;

	r = index_iter_init(&it, t, IX_EPOCHS, NULL, e);
	while (!r && (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0)
		r = add_epoch(g, (struct snapd_point){ix_be64(k.b), ix_be64(k.b + 8)}, &rec, e);
	index_iter_deinit(&it);
	return r;
}

/* Under roots_lock: from here on new roots are noted, and live timelines listed. */
static int start(struct gc *g, struct err *e)
{
	struct store *s = g->s;
	scoped_lock(&s->roots_lock);

	if (s->gc_active)
		return err_set(e, EBUSY, "store %s: space is being reclaimed already", s->dir);
	s->gc_active = true;
	s->gc_spoiled = false;
	s->nr_gc_new = 0;
	free(s->gc_refs.bits);
	s->gc_refs = (struct seg_refs){0};
	for (const struct pin *p = s->pins; p; p = p->next)
		if (add_root(g, p->at, e))
			return -ENOMEM;
	for (const struct epoch *ep = s->epochs; ep; ep = ep->next)
		if (add_root(g, ep->parent, e))
			return -ENOMEM;
	return 0;
}

static int collect(struct gc *g, struct err *e)
{
	struct ix_txn t;
	int r;

	r = index_begin(g->s->index, &t, e);
	if (r)
		return r;
	r = list_epochs(g, &t, e);
	if (!r)
		r = roots_of_snapshots(g, &t, e);
	if (!r)
		r = roots_of_timelines(g, &t, e);
	index_end(&t);
	return r;
}

/* ---- the last step ---- */

/* 1: new roots came; they are in g->roots. */
static int take_new_roots(struct gc *g, struct err *e)
{
	struct store *s = g->s;

	if (s->gc_spoiled)
		return err_errno(e, ENOMEM, "gc");
	if (!s->nr_gc_new)
		return 0;
	for (size_t i = 0; i < s->nr_gc_new; i++)
		if (add_root(g, s->gc_new[i], e))
			return -ENOMEM;
	s->nr_gc_new = 0;
	return 1;
}

static bool in_use(const struct seg *seg)
{
	return seg && seg->state != SEG_FREE;
}

static bool is_referred(const struct store *s, uint32_t id)
{
	if (seg_refs_has(&s->gc_refs, id))
		return true;
	for (const struct epoch *ep = s->epochs; ep; ep = ep->next)
		if (seg_refs_has(&ep->refs, id))
			return true;
	return false;
}

/* Could go, but for the journal in it. */
static bool is_unneeded(const struct gc *g, uint32_t id)
{
	const struct seg *seg = g->s->segs[id];

	return in_use(seg) && !seg->busy && !seg->users && seg->indexed &&
	       !seg_refs_has(&g->need, id) && !is_referred(g->s, id);
}

/* What to do with a journal that keeps segments for itself: without anything else in the
 * store it is not needed; else one open segment is its due, and from more it moves. */
static void decide_journal(struct gc *g)
{
	const struct store *s = g->s;
	uint32_t alone = 0, full = 0, others = 0;

	for (uint32_t i = 0; i < s->nr_segs; i++) {
		bool unneeded = in_use(s->segs[i]) && is_unneeded(g, i);

		others += in_use(s->segs[i]) && !unneeded;
		if (!unneeded || !seg_refs_has(&s->journal_refs, i))
			continue;
		alone++;
		full += s->segs[i]->state == SEG_SEALED;
	}
	g->no_journal = !others;
	g->image = others && (full || alone > 1);
}

static int condemn(struct gc *g, struct err *e)
{
	struct store *s = g->s;
	scoped_lock(&s->segments_lock);
	uint32_t free_kept = 0;

	decide_journal(g);
	for (uint32_t i = 0; i < s->nr_segs; i++)
		free_kept += s->segs[i] && s->segs[i]->state == SEG_FREE;
	for (uint32_t i = 0; i < s->nr_segs; i++) {
		struct seg *seg = s->segs[i];
		bool remove = seg && (seg->damaged || seg->segment_bytes != s->segment_bytes ||
				      free_kept >= FREE_KEPT_MAX);

		if (!seg || !is_unneeded(g, i) ||
		    (!g->image && !g->no_journal && seg_refs_has(&s->journal_refs, i)))
			continue;
		if (seg_refs_add(&g->condemned, i) || (remove && seg_refs_add(&g->removed, i)))
			return err_errno(e, ENOMEM, "gc");
		free_kept += !remove;
		g->freed += seg->segment_bytes;
		seg->condemned = true;
	}
	return 0;
}

static int prune_segments(struct gc *g, struct ix_txn *t, struct err *e)
{
	for (uint32_t i = 0; i < g->condemned.nr; i++) {
		struct ix_key k = ix_key_u32(i);
		struct rec_segment rec;
		int r;

		if (!seg_refs_has(&g->condemned, i))
			continue;
		if (seg_refs_has(&g->removed, i)) {
			r = index_del(t, IX_SEGMENTS, &k, e);
		} else {
			r = index_get(t, IX_SEGMENTS, &k, &rec, sizeof(rec), NULL, NULL, e);
			rec.state = SEG_FREE;
			rec.tail = 1;
			rec.pages = 0;
			if (!r)
				r = index_put(t, IX_SEGMENTS, &k, &rec, sizeof(rec), NULL, 0, e);
		}
		if (r)
			return r == -ENOENT ? err_set(e, E_CORRUPT, "segment %08x has no record", i)
					    : r;
	}
	return 0;
}

/* The nearest ancestor that is kept. */
static struct snapd_point kept_ancestor(struct gc *g, struct snapd_point at)
{
	const struct gc_epoch *x;

	while (at.timeline && (x = gc_find_epoch(g, at)) && !x->kept)
		at = x->ancestor;
	return at;
}

static int prune_epoch(struct gc *g, const struct gc_epoch *x, struct ix_txn *t, struct err *e)
{
	struct ix_key k = ix_key_point(x->at);
	struct snapd_point ancestor;
	struct rec_epoch rec;
	int r;

	if (!x->kept)
		return index_del(t, IX_EPOCHS, &k, e);
	ancestor = kept_ancestor(g, x->ancestor);
	if (ancestor.timeline == x->ancestor.timeline && ancestor.epoch == x->ancestor.epoch)
		return 0;
	r = index_get(t, IX_EPOCHS, &k, &rec, sizeof(rec), NULL, NULL, e);
	if (r)
		return r == -ENOENT ? err_set(e, E_CORRUPT, "the record of an epoch is missing")
				    : r;
	rec.ancestor = ancestor;
	return index_put(t, IX_EPOCHS, &k, &rec, sizeof(rec), NULL, 0, e);
}

static bool timeline_used(const struct gc *g, uint64_t id, const struct rec_timeline *rec)
{
	if (is_live(g, id, rec))
		return true;
	for (const struct epoch *ep = g->s->epochs; ep; ep = ep->next)
		if (ep->point.timeline == id)
			return true;
	for (const struct pin *p = g->s->pins; p; p = p->next)
		if (p->at.timeline == id)
			return true;
	return false;
}

/* After the epochs were pruned: 1 when the timeline has one left. */
static int has_epochs(struct ix_txn *t, uint64_t id, struct err *e)
{
	struct ix_key prefix = ix_key_u64(id), k;
	struct rec_epoch rec;
	struct ix_iter it;
	int r;

	r = index_iter_init(&it, t, IX_EPOCHS, &prefix, e);
	if (!r)
		r = index_iter_next(&it, &k, &rec, sizeof(rec), e);
	index_iter_deinit(&it);
	return r;
}

/* The first timeline above `after` that leads to nothing any more; 0: none. */
static int next_dead(struct gc *g, struct ix_txn *t, uint64_t after, uint64_t *ret, struct err *e)
{
	struct rec_timeline rec;
	struct ix_iter it;
	struct ix_key k;
	int r;

	*ret = 0;
	r = index_iter_init(&it, t, IX_TIMELINES, NULL, e);
	while (!r && !*ret && (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0) {
		uint64_t id = ix_be64(k.b);

		r = id <= after || timeline_used(g, id, &rec) ? 1 : has_epochs(t, id, e);
		*ret = r ? 0 : id;
		r = MIN(r, 0);
	}
	index_iter_deinit(&it);
	return r;
}

static int prune_timelines(struct gc *g, struct ix_txn *t, struct err *e)
{
	uint64_t id = 0;
	int r;

	while (!(r = next_dead(g, t, id, &id, e)) && id) {
		struct ix_key k = ix_key_u64(id);

		r = index_del(t, IX_TIMELINES, &k, e);
		if (r)
			return r;
	}
	return r;
}

static int prune_txn(struct ix_txn *t, void *arg, struct err *e)
{
	struct gc *g = arg;
	int r = prune_segments(g, t, e);

	for (size_t i = 0; !r && i < g->nr_epochs; i++)
		r = prune_epoch(g, &g->epochs[i], t, e);
	if (!r)
		r = prune_timelines(g, t, e);
	return r || !g->no_journal ? r : journal_put_empty(t, e);
}

/* 1: not yet, there are new roots to mark.  Holds off new roots and epochs; in the
 * last round also while it marks those that came since the round before. */
static int last_step(struct gc *g, bool last_round, struct err *e)
{
	scoped_lock(&g->s->roots_lock);
	int r = take_new_roots(g, e);

	g->locked = true;
	if (r == 1 && last_round)
		r = gc_mark_roots(g, e);
	g->locked = false;
	if (!r)
		r = condemn(g, e);
	if (r)
		return r;
	if (g->no_journal)
		return index_update(g->s->index, prune_txn, g, e);
	return g->image ? store_update_image(g->s, prune_txn, g, e)
			: store_update(g->s, prune_txn, g, e);
}

/* ---- afterwards ---- */

static bool keep_entry(void *opaque, loc_t loc)
{
	const struct gc *g = opaque;

	return !seg_refs_has(&g->condemned, loc_segment(loc));
}

/* Durable in the index: now the segments may be reused, or go. */
static void free_segments(struct gc *g)
{
	struct store *s = g->s;
	scoped_lock(&s->segments_lock);

	if (g->no_journal) {
		free(s->journal_refs.bits);
		s->journal_refs = (struct seg_refs){0};
	}
	for (uint32_t i = 0; i < g->condemned.nr; i++) {
		struct seg *seg = seg_find(s, i);

		if (!seg_refs_has(&g->condemned, i))
			continue;
		seg->state = SEG_FREE;
		seg->tail = 1;
		seg->pages = 0;
		if (!seg_refs_has(&g->removed, i))
			continue;
		/* Whoever has it open, without a pin, lost a race for a deleted snapshot;
		 * the file then stays for recycling. */
		seg->indexed = false;
		if (!seg->users)
			seg_drop(s, seg);
	}
}

static void release_segments(struct gc *g)
{
	dedup_filter(&g->s->dedup, keep_entry, g);
	free_segments(g);
	for (uint32_t i = 0; i < g->condemned.nr; i++)
		if (seg_refs_has(&g->condemned, i) && !seg_refs_has(&g->removed, i))
			seg_retire(g->s, i);
}

static void finish(struct gc *g, bool done)
{
	struct store *s = g->s;

	gc_keep_named(g, done);
	if (done)
		release_segments(g);
	pthread_mutex_lock(&s->segments_lock);
	for (uint32_t i = 0; i < s->nr_segs; i++)
		if (s->segs[i] && !done)
			s->segs[i]->condemned = false;
	pthread_mutex_unlock(&s->segments_lock);
	pthread_mutex_lock(&s->roots_lock);
	s->gc_active = false;
	pthread_mutex_unlock(&s->roots_lock);
}

static void gc_deinit(struct gc *g)
{
	free(g->epochs);
	free(g->roots);
	free(g->live);
	free(g->need.bits);
	free(g->condemned.bits);
	free(g->removed.bits);
	gc_named_free(g->fresh, g->nr_fresh);
}

int store_gc_paced(struct store *s, const struct gc_config *c, uint64_t *freed, struct err *e)
{
	_cleanup_(gc_deinit) struct gc g = {
		.s = s,
		.pace = {.rate_bytes = c->rate_bytes, .stop = c->stop, .opaque = c->opaque}};
	int r;

	*freed = 0;
	if (s->read_only)
		return err_set(e, EROFS, "store %s is open read-only", s->dir);
	r = start(&g, e);
	if (r == -EBUSY)
		return r;
	if (!r && c->live && (r = c->live(c->live_opaque, &g.live, &g.nr_live)))
		err_errno(e, -r, "listing the timelines in use");
	if (!r)
		r = collect(&g, e);
	for (uint32_t round = 1; !r; round++) {
		r = gc_mark_roots(&g, e);
		if (!r)
			r = last_step(&g, round == ROUNDS_MAX, e);
		if (r != 1)
			break;
		r = 0;
	}
	finish(&g, !r);
	if (!r)
		*freed = g.freed;
	if (!r && atomic_load(&s->journal_stale)) /* there may be room now */
		r = store_update_image(s, NULL, NULL, e);
	return r;
}

int store_gc(struct store *s, store_live_fn live, void *opaque, uint64_t *freed, struct err *e)
{
	struct gc_config c = {.live = live, .live_opaque = opaque};

	return store_gc_paced(s, &c, freed, e);
}
