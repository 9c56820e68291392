/* SPDX-License-Identifier: MIT */
/*
 * pagemap: home GFN → loc in memory: what a VM's RAM is, or a snapshot was, in
 * the store.  8 bytes a page in chunks of 512 frames, chunks found by hash, so
 * holes in the address space cost nothing.  With fingerprints (running VMs) each
 * chunk also has 16 bits of each page's id, to see that a page did change without
 * reading it back: 10 bytes a page.  Not thread-safe; owned by one thread at a time.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "include/snapd/format.h"

/* Of one map, 8 TiB of 4 KiB pages: a bound on what a hostile manifest can make
 * us allocate. */
#define PAGEMAP_CHUNKS_MAX (1u << 22)

struct pagemap;
struct chunk;

int pagemap_create(bool with_fp, struct pagemap **ret);
void pagemap_destroy(struct pagemap *m);
int pagemap_clone(const struct pagemap *m, struct pagemap **ret);
/* 0 (LOC_NONE) where nothing is known. */
loc_t pagemap_get(const struct pagemap *m, uint64_t gfn);
/* What a map keeps of an id; 0 says not known. */
static inline uint16_t pagemap_fp_of(uint64_t id_lo)
{
	uint16_t fp = (uint16_t)(id_lo >> 16);

	return fp || !id_lo ? fp : 1;
}
uint16_t pagemap_fp(const struct pagemap *m, uint64_t gfn);
/* -ENOMEM; -E2BIG beyond PAGEMAP_CHUNKS_MAX.  loc NONE never fails. */
int pagemap_set(struct pagemap *m, uint64_t gfn, loc_t loc, uint16_t fp);
/* All of a run; loc as in a manifest (pages count up, ZERO, GONE = NONE do not); fp
 * becomes "not known".  Errors as pagemap_set(), after a part was done perhaps;
 * -EINVAL when the run goes beyond the last GFN. */
int pagemap_set_run(struct pagemap *m, uint64_t gfn, uint64_t n, loc_t loc);
/* Setting entries of this frame's chunk will not fail.  Errors as pagemap_set(). */
#define PAGEMAP_CHUNK_FRAMES 512u
int pagemap_reserve(struct pagemap *m, uint64_t gfn);
uint64_t pagemap_nr(const struct pagemap *m);	    /* entries other than NONE */
uint64_t pagemap_nr_pages(const struct pagemap *m); /* entries of kind PAGE */

/* Entries other than NONE, ascending; the map does not change meanwhile. */
struct pagemap_iter {
	const struct pagemap *m;
	uint64_t *chunks; /* sorted chunk numbers, owned */
	size_t nr_chunks, at;
	const struct chunk *chunk; /* the one at `at`; NULL: not looked up */
	uint32_t slot;
};
int pagemap_iter_init(struct pagemap_iter *it, const struct pagemap *m);
void pagemap_iter_deinit(struct pagemap_iter *it);
bool pagemap_iter_next(struct pagemap_iter *it, uint64_t *gfn, loc_t *loc);

/* GFNs whose loc differs between a and b, ascending, in a malloc()ed array that
 * the caller frees.  Whole equal chunks cost a memcmp. */
int pagemap_diff(const struct pagemap *a, const struct pagemap *b, uint64_t **gfns, size_t *nr);
