/* SPDX-License-Identifier: MIT */
/*
 * What gc's last step decided → the index: the transaction.  In: epochs that stay and that
 * go, segments that are condemned.  One thread: gc's, under roots_lock.
 */
#include "snapd/store/gc.h"

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

	while (at.timeline && (x = gc_find_epoch(g, at)) && !gc_stays(x))
		at = x->ancestor;
	return at;
}

static int prune_epoch(struct gc *g, const struct gc_epoch *x, struct ix_txn *t, struct err *e)
{
	struct ix_key k = ix_key_point(x->at);
	struct snapd_point ancestor;
	struct rec_epoch rec;
	int r;

	if (!gc_stays(x)) {
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
	if (gc_is_live(g, id, rec))
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

int gc_prune_txn(struct ix_txn *t, void *arg, struct err *e)
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
