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

#define GFN_SLOTS (PENDING_MAX * 2u)

int prover_init(struct prover *p, uint32_t page_size)
{
	*p = (struct prover){.page_size = page_size, .max = PENDING_BYTES / page_size};
	p->entries = calloc(p->max, sizeof(*p->entries));
	p->probes = calloc(p->max, sizeof(*p->probes));
	p->arena = aligned_alloc(FMT_BLOCK, PENDING_BYTES);
	p->gfns = calloc(GFN_SLOTS, sizeof(*p->gfns));
	if (p->entries && p->probes && p->arena && p->gfns)
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

void prover_add(struct prover *p, const struct epoch_page *page, loc_t live, bool live_known,
		loc_t dup)
{
	uint8_t *bytes = p->arena + (size_t)p->nr * p->page_size;

	assert(!prover_full(p));
	memcpy(bytes, page->bytes, p->page_size);
	p->gfns[gfn_slot(p, page->gfn)] = page->gfn + 1;
	p->entries[p->nr++] = (struct pending){.gfn = page->gfn,
					       .id = page->id,
					       .live = live,
					       .live_known = live_known,
					       .dup = dup,
					       .bytes = bytes};
}

void prover_reset(struct prover *p)
{
	if (p->nr)
		memset(p->gfns, 0, GFN_SLOTS * sizeof(*p->gfns));
	p->nr = 0;
}
