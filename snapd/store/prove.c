/* SPDX-License-Identifier: MIT */
/*
 * The queue of pages that look stored already.  In: pages with candidate locs; out:
 * the same, when the epoch resolves them together, so that the read-back is few
 * sorted reads.  Bounded: PENDING_BYTES of page copies.
 *
 * Threads: the epoch's.
 */
#include "snapd/store/internal.h"

#include <string.h>

#define GFN_SLOTS   (PENDING_MAX * 2u)
#define GAP_ENTRIES 4u /* a reader reads as many pages along, or more */

/* A candidate of another epoch, and then an extent of neighbouring ones. */
struct prover_dup {
	loc_t loc;
	uint32_t entry; /* of the prover; extents: the first of dups */
	uint32_t nr;
};

int prover_init(struct prover *p, uint32_t page_size)
{
	*p = (struct prover){.page_size = page_size, .max = PENDING_BYTES / page_size};
	p->entries = calloc(p->max, sizeof(*p->entries));
	p->probes = calloc(p->max, sizeof(*p->probes));
	p->arena = aligned_alloc(FMT_BLOCK, PENDING_BYTES);
	p->gfns = calloc(GFN_SLOTS, sizeof(*p->gfns));
	p->dups = calloc(2 * p->max, sizeof(*p->dups));
	if (p->entries && p->probes && p->arena && p->gfns && p->dups)
		return 0;
	prover_deinit(p);
	return -ENOMEM;
}

void prover_deinit(struct prover *p)
{
	free(p->entries);
	free(p->probes);
	free(p->arena);
	free(p->gfns);
	free(p->dups);
	*p = (struct prover){0};
}

static uint32_t gfn_slot(const struct prover *p, uint64_t gfn)
{
	uint32_t i = (uint32_t)(gfn * 0x9e3779b97f4a7c15u >> 32) % GFN_SLOTS;

	while (p->gfns[i] && p->gfns[i] != gfn + 1)
		i = (i + 1) % GFN_SLOTS;
	return i;
}

bool prover_has(const struct prover *p, uint64_t gfn)
{
	return p->nr && p->gfns[gfn_slot(p, gfn)];
}

bool prover_full(const struct prover *p)
{
	return p->nr == p->max;
}

void prover_add(struct prover *p, const struct epoch_page *page, loc_t live, loc_t dup)
{
	uint8_t *bytes = p->arena + (size_t)p->nr * p->page_size;

	assert(!prover_full(p));
	memcpy(bytes, page->bytes, p->page_size);
	p->gfns[gfn_slot(p, page->gfn)] = page->gfn + 1;
	p->entries[p->nr++] = (struct pending){
		.gfn = page->gfn, .id = page->id, .live = live, .dup = dup, .bytes = bytes};
}

/* ---- how many reads a restore needs for them ---- */

static int by_loc(const void *a, const void *b)
{
	loc_t x = ((const struct prover_dup *)a)->loc, y = ((const struct prover_dup *)b)->loc;

	return (x > y) - (x < y);
}

static int longest_first(const void *a, const void *b)
{
	const struct prover_dup *x = a, *y = b;

	if (x->nr != y->nr)
		return x->nr > y->nr ? -1 : 1;
	return by_loc(a, b);
}

/* Candidates that a restore would not read anyway, by place. */
static uint32_t list_dups(const struct prover *p, const struct appender *a)
{
	uint32_t nr = 0;

	for (uint32_t i = 0; i < p->nr; i++) {
		const struct pending *q = &p->entries[i];

		if (!q->settled && q->dup && !append_owns(a, q->dup))
			p->dups[nr++] = (struct prover_dup){.loc = q->dup, .entry = i};
	}
	qsort(p->dups, nr, sizeof(*p->dups), by_loc);
	return nr;
}

/* Those that one read brings, of dups[0, nr); *ret behind them in the same array. */
static uint32_t list_extents(const struct prover *p, uint32_t nr)
{
	struct prover_dup *x = p->dups + nr - 1;
	uint32_t nr_extents = 0;

	for (uint32_t i = 0; i < nr; i++) {
		if (!i || loc_batch(p->dups[i].loc) != loc_batch(p->dups[i - 1].loc) ||
		    p->dups[i].loc - p->dups[i - 1].loc > GAP_ENTRIES) {
			*++x = (struct prover_dup){.loc = p->dups[i].loc, .entry = i};
			nr_extents++;
		}
		x->nr++;
	}
	return nr_extents;
}

uint64_t prover_limit(struct prover *p, const struct appender *a, uint64_t reads,
		      uint64_t *declined)
{
	uint32_t nr = list_dups(p, a);
	uint32_t nr_extents = nr ? list_extents(p, nr) : 0;
	struct prover_dup *extents = p->dups + nr;

	if (nr_extents <= reads)
		return nr_extents;
	qsort(extents, nr_extents, sizeof(*extents), longest_first);
	for (uint64_t i = reads; i < nr_extents; i++) {
		for (uint32_t k = 0; k < extents[i].nr; k++)
			p->entries[p->dups[extents[i].entry + k].entry].dup = 0;
		*declined += extents[i].nr;
	}
	return reads;
}

/* ---- memory ---- */

int scratch_get(struct store *s, uint32_t page_size, struct epoch_scratch **ret)
{
	struct epoch_scratch *x = NULL;

	pthread_mutex_lock(&s->segments_lock);
	for (uint32_t i = 0; i < s->nr_idle_scratch && !x; i++) {
		if (s->idle_scratch[i]->page_size != page_size)
			continue;
		x = s->idle_scratch[i];
		s->idle_scratch[i] = s->idle_scratch[--s->nr_idle_scratch];
	}
	pthread_mutex_unlock(&s->segments_lock);
	if (!x) {
		x = calloc(1, sizeof(*x));
		if (!x || prover_init(&x->prover, page_size)) {
			free(x);
			return -ENOMEM;
		}
		x->page_size = page_size;
	}
	*ret = x;
	return 0;
}

void scratch_put(struct store *s, struct epoch_scratch *x)
{
	if (!x)
		return;
	changes_reset(&x->changes, SCRATCH_CHANGES_KEPT);
	if (x->manifest.cap > SCRATCH_MANIFEST_KEPT)
		manifest_writer_deinit(&x->manifest);
	prover_reset(&x->prover);
	pthread_mutex_lock(&s->segments_lock);
	if (s->nr_idle_scratch < s->max_idle)
		s->idle_scratch[s->nr_idle_scratch++] = steal_ptr(&x);
	pthread_mutex_unlock(&s->segments_lock);
	scratch_destroy(x);
}

void scratch_destroy(struct epoch_scratch *x)
{
	if (!x)
		return;
	changes_deinit(&x->changes);
	manifest_writer_deinit(&x->manifest);
	prover_deinit(&x->prover);
	free(x);
}

void prover_reset(struct prover *p)
{
	if (p->nr)
		memset(p->gfns, 0, GFN_SLOTS * sizeof(*p->gfns));
	p->nr = 0;
}
