/* SPDX-License-Identifier: MIT */
/*
 * Giving space back.  In: the index, and which timelines belong to running VMs.
 * Out: segments in which nothing is needed are free or gone, those in which little is
 * are smaller (rewrite.c), and the records of epochs that nothing leads to are removed.
 *
 * Needed is what a *root* leads to.  Roots are the epochs of snapshots, the heads
 * of live timelines (and of those younger than YOUNG_NS, whose VM may not be on the
 * caller's list yet), pinned points, and the parents of epochs in flight.  A root
 * needs its records back to a checkpoint, their blobs, and every page that their
 * manifests name.  How many epochs name a place is counted (mark.c, refs.h): so a run
 * reads the manifests of what came and of what goes, however much stays.
 *
 * gc runs beside everything else:
 *   G1 A point that becomes a root while gc runs is noted under roots_lock
 *      (gc_note_root()).  The last step holds roots_lock, and what those roots need is
 *      marked, and counted, in it first.
 *   G2 Pages that an epoch in flight, or one committed since the start, refers to
 *      are known by segment (seg_ref()); those segments stay as they are.  So do
 *      segments that were written to since.
 *   G3 A segment is *condemned* in that last step, under segments_lock: from there
 *      on seg_ref() refuses it.  It is reused, or written again without what nothing
 *      names, only after the index said so durably.  Until its pages have left the dedup
 *      table, proofs refuse them.
 *   G4 Only records that were there at the start are removed.
 *   G5 When anything that stays cannot be read, nothing is dropped: damage is no reason
 *      to throw more away.
 *
 * A crash at any point leaves what the last LMDB commit says; files without a
 * record are removed at the next start.
 */
#include "snapd/store/gc.h"

#include <fcntl.h>
#include <string.h>

#include "snapd/util/log.h"

#define YOUNG_NS (3600ull * 1000000000u)
#define RUNS_MAX 64u /* when more goes than memory holds at once */

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

bool gc_is_live(const struct gc *g, uint64_t timeline, const struct rec_timeline *rec)
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

		r = gc_is_live(g, head.timeline, &rec) ? add_root(g, head, e) : 0;
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
	g->epochs[g->nr_epochs++] = (struct gc_epoch){.at = at,
						      .ancestor = rec->ancestor,
						      .parent = rec->parent,
						      .chained = rec->chain_epochs};
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
	pthread_mutex_lock(&s->segments_lock);
	g->since = s->commits;
	pthread_mutex_unlock(&s->segments_lock);
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
		r = gc_load_counts(g, &t, e);
	if (!r)
		r = roots_of_snapshots(g, &t, e);
	if (!r)
		r = roots_of_timelines(g, &t, e);
	index_end(&t);
	return r;
}

/* ---- the last step ---- */

/* To g->roots. */
static int take_new_roots(struct gc *g, struct err *e)
{
	struct store *s = g->s;

	if (s->gc_spoiled)
		return err_errno(e, ENOMEM, "gc");
	for (size_t i = 0; i < s->nr_gc_new; i++)
		if (add_root(g, s->gc_new[i], e))
			return -ENOMEM;
	s->nr_gc_new = 0;
	return 0;
}

/* Holds off new roots and epochs, also while it marks and counts those that came since. */
static int last_step(struct gc *g, struct err *e)
{
	scoped_lock(&g->s->roots_lock);
	int r = take_new_roots(g, e);

	g->locked = true;
	if (!r)
		r = gc_mark_roots(g, e);
	if (!r)
		r = gc_count(g, e);
	g->locked = false;
	if (!r)
		r = gc_plan(g, e);
	if (!r)
		r = gc_condemn(g, e);
	if (!r && g->no_journal)
		r = index_update(g->s->index, gc_prune_txn, g, e);
	else if (!r)
		r = g->image ? store_update_image(g->s, gc_prune_txn, g, e)
			     : store_update(g->s, gc_prune_txn, g, e);
	if (!r)
		gc_learn(g, &g->changes);
	return r;
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
	if (g->condemned.nr)
		dedup_filter(&g->s->dedup, keep_entry, g);
	free_segments(g);
	for (uint32_t i = 0; i < g->condemned.nr; i++)
		if (seg_refs_has(&g->condemned, i) && !seg_refs_has(&g->removed, i))
			seg_retire(g->s, i);
}

/* r: 0: the index has what the last step decided; else nothing happened. */
static int finish(struct gc *g, int r, struct err *e)
{
	struct store *s = g->s;
	bool done = !r;

	if (done)
		release_segments(g);
	else
		g->freed = 0;
	if (done)
		r = gc_rewrite(g, e);
	pthread_mutex_lock(&s->segments_lock);
	for (uint32_t i = 0; i < s->nr_segs; i++)
		if (s->segs[i] && (!done || seg_refs_has(&g->victims, i)))
			s->segs[i]->condemned = false;
	pthread_mutex_unlock(&s->segments_lock);
	pthread_mutex_lock(&s->roots_lock);
	s->gc_active = false;
	pthread_mutex_unlock(&s->roots_lock);
	return r;
}

static void gc_deinit(struct gc *g)
{
	for (size_t i = 0; i < g->nr_drops; i++)
		ref_log_deinit(&g->drops[i].log);
	free(g->drops);
	ref_changes_deinit(&g->changes);
	free(g->epochs);
	free(g->roots);
	free(g->live);
	free(g->need.bits);
	free(g->condemned.bits);
	free(g->victims.bits);
	ref_changes_deinit(&g->rewritten);
	free(g->removed.bits);
}

/* Up to the last step, unless g->merged says that it is due in another run. */
static int mark(struct gc *g, const struct gc_config *c, bool merge, struct err *e)
{
	int r = c->live ? c->live(c->live_opaque, &g->live, &g->nr_live) : 0;

	if (r)
		return err_errno(e, -r, "listing the timelines in use");
	r = collect(g, e);
	if (!r)
		r = gc_mark_roots(g, e);
	if (!r && merge)
		r = gc_merge(g, e);
	if (r || g->merged)
		return r;
	r = gc_count(g, e);
	return r ? r : gc_read_drops(g, e);
}

/* 1: there is more to do.  -ESTALE: the counts can't be used. */
static int run_once(struct store *s, const struct gc_config *c, bool merge, struct pace *pace,
		    uint64_t *freed, struct err *e)
{
	_cleanup_(gc_deinit) struct gc g = {.s = s, .pace = *pace};
	int r = start(&g, e);

	if (r == -EBUSY)
		return r;
	if (!r)
		r = mark(&g, c, merge, e);
	if (!r)
		r = g.merged ? 1 : last_step(&g, e);
	if (r == -ESTALE && (r = gc_forget_counts(&g, e)) == 0)
		r = -ESTALE;
	r = finish(&g, r, e);
	*freed += g.freed;
	*pace = g.pace;
	return r ? r : g.more;
}

int store_gc_paced(struct store *s, const struct gc_config *c, uint64_t *freed, struct err *e)
{
	struct pace pace = {.rate_bytes = c->rate_bytes, .stop = c->stop, .opaque = c->opaque};
	bool again = false, merge = true;
	int r = 1;

	*freed = 0;
	if (s->read_only)
		return err_set(e, EROFS, "store %s is open read-only", s->dir);
	for (uint32_t i = 0; r == 1 && i < RUNS_MAX; i++) {
		r = run_once(s, c, merge, &pace, freed, e);
		merge &= r == -ESTALE;
		if (r != -ESTALE)
			continue;
		if (again)
			return err_set(e, E_CORRUPT,
				       "store %s: what needs which page can't be "
				       "counted; snapctl store check says what is damaged",
				       s->dir);
		log_notice("store %s: what needs which page is counted again", s->dir);
		again = true;
		r = 1;
	}
	r = MIN(r, 0);
	if (!r && atomic_load(&s->journal_stale)) /* there may be room now */
		r = store_update_image(s, NULL, NULL, e);
	return r;
}

int store_gc(struct store *s, store_live_fn live, void *opaque, uint64_t *freed, struct err *e)
{
	struct gc_config c = {.live = live, .live_opaque = opaque};

	return store_gc_paced(s, &c, freed, e);
}
