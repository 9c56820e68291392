/* SPDX-License-Identifier: MIT */
/*
 * memory: the layers of a manifest in memory: home GFN → pack and entry, as a pagemap whose
 * locs are *refs*: kind PAGE, number of the pack in a packset, entry.  One thread.
 */
#pragma once

#include "snapd/backup/repo.h"
#include "snapd/store/manifest.h"
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

/* All layers as one sequence, ascending by GFN; locs are refs; frames that are gone may come as
 * GONE.  In memory is one map of each layer. */
struct memory_stream;
int memory_stream_open(struct repo *r, const struct manifest *m, struct packset *packs,
		       struct memory_stream **ret, struct err *e);
void memory_stream_close(struct memory_stream *s); /* accepts NULL */
/* 1, 0 at the end, -errno. */
int memory_stream_next(struct memory_stream *s, struct manifest_run *ret, struct err *e);
