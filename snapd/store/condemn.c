/* SPDX-License-Identifier: MIT */
/*
 * Segments → what gc's last step does with each: in which nothing is needed, freed or
 * removed; in which much has died, looked through and written again; the journal's, left.
 * One thread: gc's, under roots_lock.
 */
#include "snapd/store/gc.h"

#define FREE_KEPT_MAX 4u /* free segments kept for recycling */

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

static bool is_empty(const struct gc *g)
{
	for (size_t i = 0; i < g->nr_epochs; i++)
		if (gc_stays(&g->epochs[i]))
			return false;
	return true;
}

/* What to do with a journal that keeps segments for itself: without anything else in the
 * store it is not needed; else one open segment is its due, and from more it moves.  An epoch
 * without pages may be in the journal alone. */
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
	g->no_journal = !others && is_empty(g);
	g->image = !g->no_journal && (full || alone > 1);
}

int gc_condemn(struct gc *g, struct err *e)
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
