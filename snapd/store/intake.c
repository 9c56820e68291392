/* SPDX-License-Identifier: MIT */
/*
 * Pages into an epoch: each becomes one of the four outcomes of epoch.c, by memory if that
 * can say, else it waits in the prover.  Threads: the epoch's.
 */
#include "snapd/store/internal.h"

#include <string.h>

#define PREFETCH_PAGES 8u /* ahead of the page that is put */

/* ---- what a frame is now ---- */

static bool is_gone(const struct epoch *ep, uint64_t gfn)
{
	for (size_t i = 0; i < ep->nr_gone; i++)
		if (gfn >= ep->gone[i].gfn && gfn < ep->gone[i].end)
			return true;
	return false;
}

static loc_t current_loc(const struct epoch *ep, uint64_t gfn, uint16_t *fp)
{
	const struct change *c = changes_get(&ep->scratch->changes, gfn);

	if (c) {
		*fp = pagemap_fp_of(c->fp);
		return c->loc;
	}
	if (is_gone(ep, gfn))
		return 0;
	*fp = pagemap_fp(ep->live, gfn);
	return pagemap_get(ep->live, gfn);
}

static int set_loc(struct epoch *ep, uint64_t gfn, loc_t loc, uint64_t fp, struct err *e)
{
	int r = changes_put(&ep->scratch->changes, (struct change){gfn, loc, fp});

	return r ? err_errno(e, -r, "epoch") : 0;
}

/* ---- the four outcomes ---- */

static int put_zero(struct epoch *ep, uint64_t gfn, struct err *e)
{
	uint16_t fp;

	if (current_loc(ep, gfn, &fp) == LOC_ZERO_PAGE) {
		ep->stats.unchanged++;
		return 0;
	}
	ep->stats.zero++;
	return set_loc(ep, gfn, LOC_ZERO_PAGE, 0, e);
}

static int put_duplicate(struct epoch *ep, uint64_t gfn, struct pageid id, loc_t loc, struct err *e)
{
	ep->stats.duplicate++;
	return set_loc(ep, gfn, loc, id.lo, e);
}

static uint64_t key_of(const struct epoch *ep, struct pageid id)
{
	return dedup_key(id.lo, ep->domain, ep->page_shift);
}

/* Who looks for this page's twins finds `loc`, from now on us, from the commit on
 * others.  What another epoch stored meanwhile stays: it may be done before us. */
static void offer(struct epoch *ep, struct pageid id, loc_t loc)
{
	uint64_t key = key_of(ep, id);
	loc_t there;

	if (ep->s->dedup_domain == STORE_DEDUP_OFF)
		return;
	there = dedup_get(&ep->s->dedup, key);
	if (!there || append_owns(&ep->append, there) || seg_ref(ep->s, &ep->refs, there))
		dedup_put(&ep->s->dedup, key, loc);
}

static int put_stored(struct epoch *ep, uint64_t gfn, struct pageid id, const void *bytes,
		      struct err *e)
{
	loc_t loc;
	int r;

	r = append_page(&ep->append, gfn, id, bytes, &loc, e);
	if (r)
		return r;
	offer(ep, id, loc);
	ep->stats.stored++;
	return set_loc(ep, gfn, loc, id.lo, e);
}

/* ---- proofs ---- */

static int ensure_reader(struct epoch *ep, struct err *e)
{
	return ep->reader ? 0 : store_reader_get(ep->s, ep->page_size, &ep->reader, e);
}

/* The table forgets, and this batch's sample led to it: the pages around are often wanted
 * next.  Once a batch, as far as `neighbours` remembers; what fails is only not found. */
static void offer_neighbours(struct epoch *ep, loc_t loc)
{
	uint64_t *seen = &ep->neighbours[loc_batch(loc) * 0x9e3779b97f4a7c15u >> 58];
	struct page_probe probe = {.loc = loc}; /* of no page: reads the header alone */
	const struct batch_header *h;
	const struct batch_page *pages;

	static_assert(ARRAY_SIZE(ep->neighbours) == 1u << (64 - 58), "as many as the hash has");
	if (*seen == loc_batch(loc))
		return;
	*seen = loc_batch(loc);
	if (ensure_reader(ep, NULL) || reader_probe(ep->reader, &probe, 1, NULL) ||
	    !reader_batch(ep->reader, loc, &h, &pages))
		return;
	for (uint32_t i = 0; i < h->nr_entries; i++)
		if (!page_is_gone(&pages[i]))
			dedup_add(&ep->s->dedup,
				  dedup_key(pages[i].id_lo, ep->domain, ep->page_shift),
				  loc_make(h->segment, h->block, i));
}

static loc_t find_duplicate(struct epoch *ep, struct pageid id)
{
	loc_t loc = 0;

	if (ep->s->dedup_domain != STORE_DEDUP_OFF)
		loc = dedup_get(&ep->s->dedup, key_of(ep, id));
	if (!loc || append_owns(&ep->append, loc))
		return loc;
	if (!seg_ref(ep->s, &ep->refs, loc))
		return 0;
	if (dedup_evicts(&ep->s->dedup))
		offer_neighbours(ep, loc);
	return loc;
}

enum proof { PROVED, REFUTED, UNPROVED };

/* What memory says about a candidate. */
static enum proof prove_here(struct epoch *ep, loc_t loc, bool known, const void *bytes)
{
	const void *there = append_owns(&ep->append, loc) ? append_recent(&ep->append, loc) : NULL;

	if (there)
		return memcmp(there, bytes, ep->page_size) ? REFUTED : PROVED;
	return ep->s->no_prove && known ? PROVED : UNPROVED;
}

/* Compare the candidates that `which` selects with what is stored. */
static int probe_round(struct epoch *ep, loc_t (*which)(const struct pending *q), struct err *e)
{
	struct prover *p = &ep->scratch->prover;
	uint32_t nr = 0;
	bool own = false;
	int r;

	for (uint32_t i = 0; i < p->nr; i++) {
		const struct pending *q = &p->entries[i];
		loc_t loc = q->settled ? 0 : which(q);

		if (!loc)
			continue;
		own |= append_owns(&ep->append, loc);
		p->probes[nr++] =
			(struct page_probe){.loc = loc, .id = q->id, .bytes = q->bytes, .index = i};
	}
	if (!nr)
		return 0;
	r = ensure_reader(ep, e);
	if (!r && own)
		r = append_settle(&ep->append, e);
	if (!r)
		r = reader_probe(ep->reader, p->probes, nr, e);
	if (r)
		return r;
	ep->stats.read_back += nr;
	for (uint32_t i = 0; i < nr; i++)
		p->entries[p->probes[i].index].result = p->probes[i].result;
	return 0;
}

static loc_t candidate_live(const struct pending *q)
{
	return q->live;
}

static loc_t candidate_dup(const struct pending *q)
{
	return q->dup;
}

static void count_collision(struct epoch *ep, struct pending *q, bool known)
{
	if (q->result == PROBE_COLLISION || (q->result == PROBE_DIFFERENT && known))
		ep->stats.collisions++;
	/* The hash that came with a page is only believed as long as it agrees. */
	if (q->result == PROBE_COLLISION)
		q->id = pageid_of(&ep->s->secret, q->bytes, ep->page_size);
}

/* A page that no candidate equals; its twin may have been stored a moment ago. */
static int settle_stored(struct epoch *ep, struct pending *q, struct err *e)
{
	loc_t twin = find_duplicate(ep, q->id);

	if (twin && prove_here(ep, twin, true, q->bytes) == PROVED)
		return put_duplicate(ep, q->gfn, q->id, twin, e);
	return put_stored(ep, q->gfn, q->id, q->bytes, e);
}

/* Is a page what the map has for its frame?  Sixteen bits of its id say maybe. */
static int settle_unchanged(struct epoch *ep, struct err *e)
{
	struct prover *p = &ep->scratch->prover;
	int r = probe_round(ep, candidate_live, e);

	for (uint32_t i = 0; !r && i < p->nr; i++) {
		struct pending *q = &p->entries[i];

		if (!q->live)
			continue;
		q->settled = q->result == PROBE_EQUAL;
		ep->stats.unchanged += q->settled;
		count_collision(ep, q, false);
	}
	return r;
}

/* E5: the reads that duplicates may cost so far, less what they have cost. */
static uint64_t reads_left(const struct epoch *ep)
{
	const struct prover *p = &ep->scratch->prover;
	uint64_t pages = ep->stats.stored + ep->stats.duplicate + p->nr;
	uint64_t all = DEDUP_READS_FREE + pages / ep->s->dedup_pages_per_read;

	return all > ep->dedup_reads ? all - ep->dedup_reads : 0;
}

static int settle_duplicates(struct epoch *ep, struct err *e)
{
	struct prover *p = &ep->scratch->prover;
	int r;

	ep->dedup_reads += prover_limit(p, &ep->append, reads_left(ep), &ep->stats.declined);
	r = probe_round(ep, candidate_dup, e);
	for (uint32_t i = 0; !r && i < p->nr; i++) {
		struct pending *q = &p->entries[i];

		if (q->settled || !q->dup)
			continue;
		q->settled = q->result == PROBE_EQUAL;
		if (q->settled)
			r = put_duplicate(ep, q->gfn, q->id, q->dup, e);
		else
			count_collision(ep, q, true);
	}
	return r;
}

static int settle(struct epoch *ep, struct err *e)
{
	struct prover *p = &ep->scratch->prover;
	int r = settle_unchanged(ep, e);

	if (!r)
		r = settle_duplicates(ep, e);
	for (uint32_t i = 0; !r && i < p->nr; i++)
		if (!p->entries[i].settled)
			r = settle_stored(ep, &p->entries[i], e);
	return r;
}

int epoch_settle(struct epoch *ep, struct err *e)
{
	int r;

	if (!ep->scratch->prover.nr)
		return 0;
	r = settle(ep, e);
	if (!r)
		prover_reset(&ep->scratch->prover);
	return r;
}

/* ---- putting ---- */

/* 1: the page is dealt with; 0: *live and *dup are what is left to prove. */
static int prove_now(struct epoch *ep, const struct epoch_page *page, bool known, loc_t *live,
		     loc_t *dup, struct err *e)
{
	enum proof proof = *live ? prove_here(ep, *live, known, page->bytes) : REFUTED;
	int r;

	if (proof == PROVED) {
		ep->stats.unchanged++;
		return 1;
	}
	if (proof == REFUTED)
		*live = 0;
	if (*dup == *live)
		*dup = 0;
	proof = *dup ? prove_here(ep, *dup, true, page->bytes) : REFUTED;
	if (proof == PROVED) {
		r = put_duplicate(ep, page->gfn, page->id, *dup, e);
		return r ? r : 1;
	}
	if (proof == REFUTED) {
		ep->stats.collisions += *dup != 0;
		*dup = 0;
	}
	return 0;
}

static int put_page(struct epoch *ep, const struct epoch_page *given, struct err *e)
{
	struct epoch_page with_id = *given, *page = &with_id;
	uint16_t fp = 0;
	loc_t live, dup;
	int r;

	if (prover_has(&ep->scratch->prover, page->gfn)) {
		r = epoch_settle(ep, e);
		if (r)
			return r;
	}
	ep->stats.pages_in++;
	if (pageid_is_zero(page->id)) {
		if (pageid_bytes_zero(page->bytes, ep->page_size))
			return put_zero(ep, page->gfn, e);
		page->id = pageid_of(&ep->s->secret, page->bytes, ep->page_size);
	}
	live = current_loc(ep, page->gfn, &fp);
	if (loc_kind(live) != LOC_PAGE || (fp && fp != pagemap_fp_of(page->id.lo)))
		live = 0;
	dup = find_duplicate(ep, page->id);
	r = live || dup ? prove_now(ep, page, fp != 0, &live, &dup, e) : 0;
	if (r)
		return r < 0 ? r : 0;
	if (!live && !dup)
		return put_stored(ep, page->gfn, page->id, page->bytes, e);
	prover_add(&ep->scratch->prover, page, live, dup);
	return prover_full(&ep->scratch->prover) ? epoch_settle(ep, e) : 0;
}

/* Each look into the tables of hashes is a cache miss, or two; a few at once cost as
 * much as one. */
static void prefetch(struct epoch *ep, const struct epoch_page *page)
{
	if (!pageid_is_zero(page->id) && ep->s->dedup_domain != STORE_DEDUP_OFF)
		dedup_prefetch(&ep->s->dedup, key_of(ep, page->id));
}

/* Nothing like it is known: it will be stored, unless a twin comes before it. */
static bool looks_new(struct epoch *ep, const struct epoch_page *page)
{
	uint16_t fp;

	if (pageid_is_zero(page->id))
		return false;
	if (loc_kind(current_loc(ep, page->gfn, &fp)) == LOC_PAGE &&
	    (!fp || fp == pagemap_fp_of(page->id.lo)))
		return false;
	return ep->s->dedup_domain == STORE_DEDUP_OFF ||
	       !dedup_get(&ep->s->dedup, key_of(ep, page->id));
}

static int pack_ahead(struct epoch *ep, const struct epoch_page *pages, size_t nr, struct err *e)
{
	struct packer *pk = &ep->append.packer;

	packer_reset(pk);
	for (size_t i = 0; i < nr; i++)
		if (looks_new(ep, &pages[i]))
			packer_add(pk, pages[i].bytes);
	return packer_run(pk) ? err_errno(e, ENOMEM, "epoch") : 0;
}

static int put_pages(struct epoch *ep, const struct epoch_page *pages, size_t nr, struct err *e)
{
	int r = 0;

	for (size_t i = 0; i < MIN(nr, (size_t)PREFETCH_PAGES); i++)
		prefetch(ep, &pages[i]);
	if (ep->append.packing)
		r = pack_ahead(ep, pages, nr, e);
	for (size_t i = 0; !r && i < nr; i++) {
		if (i + PREFETCH_PAGES < nr)
			prefetch(ep, &pages[i + PREFETCH_PAGES]);
		if (pages[i].gfn >= MANIFEST_GFN_MAX)
			r = err_set(e, EINVAL, "frame %#llx is out of range",
				    (unsigned long long)pages[i].gfn);
		else
			r = put_page(ep, &pages[i], e);
	}
	if (ep->append.packing) /* the pages are the caller's again */
		packer_reset(&ep->append.packer);
	return r;
}

int epoch_put(struct epoch *ep, const struct epoch_page *pages, size_t nr, struct err *e)
{
	size_t at_once = ep->append.packing ? packer_max(&ep->append.packer) : nr;
	int r = ep->failed;

	if (r)
		return err_set(e, -r, "this epoch has failed before");
	for (size_t at = 0; !r && at < nr; at += at_once)
		r = put_pages(ep, pages + at, MIN(nr - at, at_once), e);
	ep->failed = r;
	return r;
}
