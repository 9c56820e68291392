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

#define YOUNG_NS      (3600ull * 1000000000u)
#define FREE_KEPT_MAX 4u  /* free segments kept for recycling */
#define RUNS_MAX      64u /* when more goes than memory holds at once */

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

/* Nobody is at work in it, and what is named in it is known (G2). */
static bool is_settled(const struct gc *g, uint32_t id)
{
	const struct seg *seg = g->s->segs[id];

	return in_use(seg) && !seg->busy && seg->indexed && seg->commit <= g->since &&
	       !is_referred(g->s, id);
}

/* Could go, but for the journal in it. */
static bool is_unneeded(const struct gc *g, uint32_t id)
{
	return is_settled(g, id) && !g->s->segs[id]->users && !seg_refs_has(&g->need, id);
}

/* What the counts say after the last step. */
static struct seg_named named_in(const struct gc *g, uint32_t id)
{
	for (size_t lo = 0, hi = g->changes.nr; lo < hi;) {
		size_t mid = lo + (hi - lo) / 2;
		const struct seg_counts *c = &g->changes.v[mid];

		if (c->segment == id)
			return (struct seg_named){c->pages, c->places, c->high, c->looks};
		if (c->segment < id)
			lo = mid + 1;
		else
			hi = mid;
	}
	return g->s->segs[id]->named;
}

/* Has so much died in it that it is worth a look at its headers?  Each look after the first
 * takes that a sixteenth went since, so they cost a bounded share of what dies. */
static bool is_worth_a_look(const struct gc *g, uint32_t id)
{
	const struct seg *seg = g->s->segs[id];
	struct seg_named n = named_in(g, id);
	bool open = seg->state == SEG_OPEN;
	uint64_t share = open ? 4 : 16; /* an open one takes more pages yet */

	if (!seg_refs_has(&g->need, id) || !is_settled(g, id) || seg->damaged)
		return false;
	if (!n.looks && seg->pages > n.pages && (seg->pages - n.pages) * share >= seg->pages)
		return true;
	return n.high > n.places && (n.high - n.places) * share >= n.high;
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
		bool remove = seg &&
			      (seg->damaged || seg->segment_bytes != s->segment_bytes ||
			       seg->disk_bytes != seg->segment_bytes || free_kept >= FREE_KEPT_MAX);

		if (seg && is_worth_a_look(g, i)) {
			if (seg_refs_add(&g->victims, i))
				return err_errno(e, ENOMEM, "gc");
			seg->condemned = true;
			continue;
		}
		if (!seg || !is_unneeded(g, i) ||
		    (!g->image && !g->no_journal && seg_refs_has(&s->journal_refs, i)))
			continue;
		if (seg_refs_add(&g->condemned, i) || (remove && seg_refs_add(&g->removed, i)))
			return err_errno(e, ENOMEM, "gc");
		free_kept += !remove;
		g->freed += seg->disk_bytes;
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

static bool stays(const struct gc_epoch *x)
{
	return x->kept || x->left;
}

/* The nearest ancestor that is kept. */
static struct snapd_point kept_ancestor(struct gc *g, struct snapd_point at)
{
	const struct gc_epoch *x;

	while (at.timeline && (x = gc_find_epoch(g, at)) && !stays(x))
		at = x->ancestor;
	return at;
}

static int prune_epoch(struct gc *g, const struct gc_epoch *x, struct ix_txn *t, struct err *e)
{
	struct ix_key k = ix_key_point(x->at);
	struct snapd_point ancestor;
	struct rec_epoch rec;
	int r;

	if (!stays(x)) {
		r = x->counted ? index_del(t, IX_COUNTED, &k, e) : 0;
		return r ? r : index_del(t, IX_EPOCHS, &k, e);
	}
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
	int r = refs_put_all(t, &g->changes, e);

	if (!r)
		r = prune_segments(g, t, e);

	for (size_t i = 0; !r && i < g->nr_epochs; i++)
		r = prune_epoch(g, &g->epochs[i], t, e);
	if (!r)
		r = prune_timelines(g, t, e);
	return r || !g->no_journal ? r : journal_put_empty(t, e);
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
		r = condemn(g, e);
	if (!r && g->no_journal)
		r = index_update(g->s->index, prune_txn, g, e);
	else if (!r)
		r = g->image ? store_update_image(g->s, prune_txn, g, e)
			     : store_update(g->s, prune_txn, g, e);
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

static int mark(struct gc *g, const struct gc_config *c, struct err *e)
{
	int r = c->live ? c->live(c->live_opaque, &g->live, &g->nr_live) : 0;

	if (r)
		return err_errno(e, -r, "listing the timelines in use");
	r = collect(g, e);
	if (!r)
		r = gc_mark_roots(g, e);
	if (!r)
		r = gc_count(g, e);
	return r ? r : gc_read_drops(g, e);
}

/* 1: there is more to do.  -ESTALE: the counts can't be used. */
static int run_once(struct store *s, const struct gc_config *c, struct pace *pace, uint64_t *freed,
		    struct err *e)
{
	_cleanup_(gc_deinit) struct gc g = {.s = s, .pace = *pace};
	int r = start(&g, e);

	if (r == -EBUSY)
		return r;
	if (!r)
		r = mark(&g, c, e);
	if (!r)
		r = last_step(&g, e);
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
	bool again = false;
	int r = 1;

	*freed = 0;
	if (s->read_only)
		return err_set(e, EROFS, "store %s is open read-only", s->dir);
	for (uint32_t i = 0; r == 1 && i < RUNS_MAX; i++) {
		r = run_once(s, c, &pace, freed, e);
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
