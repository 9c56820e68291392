/* SPDX-License-Identifier: MIT */
/*
 * dedup: 64 bits of a page's identity → where such a page lies.  Candidates only:
 * an entry may be stale or a collision, the caller compares bytes (I8).
 *
 * In memory, 16 bytes an entry, four entries a cache line, two lines where a key may
 * be.  It grows until its limit, and forgets nothing until then; at its limit it keeps
 *
 *   the recent   entries that were put or found lately, and
 *   a sample     one key in DEDUP_SAMPLE, chosen by its bits, for up to half of the
 *                entries: of each batch ever stored about sixteen pages stay known;
 *                whoever finds one of them puts its neighbours back (epoch.c).
 *
 * So memory is bounded however large the store is; duplicates are missed then, never
 * invented.  All functions but init and deinit: any thread; a lock for each of
 * DEDUP_SHARDS parts, held for the table's own work only.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "include/snapd/format.h"

#define DEDUP_WAYS   4u
#define DEDUP_SAMPLE 16u
#define DEDUP_SHARDS 64u

struct dedup_slot {
	uint64_t key; /* 0: empty */
	loc_t loc;
};

/* Entries without gaps, the most recent first. */
struct dedup_line {
	_Alignas(64) struct dedup_slot slots[DEDUP_WAYS];
};
static_assert(sizeof(struct dedup_line) == 64, "one cache line");

struct dedup_shard {
	_Alignas(64) pthread_mutex_t lock;
	struct dedup_line *lines; /* owned */
	size_t nr_lines;	  /* 0 or a power of two */
	size_t nr_used;
};

struct dedup {
	_Atomic bool evicts; /* at its limit, and entries were forgotten */
	size_t max_lines;    /* of a shard */
	struct dedup_shard shards[DEDUP_SHARDS];
};

/* At least a page a shard is used whatever the limit. */
void dedup_init(struct dedup *d, uint64_t max_bytes);
void dedup_deinit(struct dedup *d);
/* LOC_NONE (0) when there is none. */
loc_t dedup_get(struct dedup *d, uint64_t key);
/* Memory begins to fetch what get and put of this key will look at. */
void dedup_prefetch(struct dedup *d, uint64_t key);
/* Replaces an entry of the same key. */
void dedup_put(struct dedup *d, uint64_t key, loc_t loc);
/* As dedup_put(), for a key that is not there yet; else nothing. */
void dedup_add(struct dedup *d, uint64_t key, loc_t loc);
/* Keep only entries for which keep() says so. */
void dedup_filter(struct dedup *d, bool (*keep)(void *opaque, loc_t loc), void *opaque);
uint64_t dedup_nr(struct dedup *d);
uint64_t dedup_bytes(struct dedup *d);
/* Entries are being forgotten. */
bool dedup_evicts(struct dedup *d);

/* The key of a page: equal pages of one domain and page size share it.  Never 0. */
static inline uint64_t dedup_key(uint64_t id_lo, uint64_t domain, uint32_t page_shift)
{
	uint64_t salt = (domain ^ (uint64_t)page_shift << 56) * 0x9e3779b97f4a7c15u;
	uint64_t key = id_lo ^ salt ^ salt >> 29;

	return key ? key : 1;
}
