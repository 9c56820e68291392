/* SPDX-License-Identifier: MIT */
/*
 * memory: the layers of a manifest in memory: home GFN → pack and entry, as a pagemap whose
 * locs are *refs*: kind PAGE, number of the pack in a packset, entry.  One thread.
 */
#pragma once

#include "snapd/backup/repo.h"
#include "snapd/store/pagemap.h"

static inline loc_t ref_make(uint32_t pack, uint32_t entry)
{
	return (loc_t)LOC_PAGE << 60 | (loc_t)pack << 32 | entry;
}

static inline uint32_t ref_pack(loc_t ref)
{
	return (uint32_t)(ref >> 32) & (PACKSET_MAX - 1);
}

static inline uint32_t ref_entry(loc_t ref)
{
	return (uint32_t)ref;
}

/* Called for each run that a layer says is gone, before the map changes; may be NULL. */
typedef int (*memory_gone_fn)(void *arg, uint64_t gfn, uint64_t nr, struct err *e);
/* Lay layers [first, nr_layers) of m over `map`; their packs join `packs`. */
int memory_load(struct repo *r, const struct manifest *m, uint32_t first, struct packset *packs,
		struct pagemap *map, memory_gone_fn gone, void *arg, struct err *e);
