/* SPDX-License-Identifier: MIT */
/*
 * dedup: 64 bits of a page's identity → where such a page lies.  Candidates only:
 * an entry may be stale or a collision, the caller compares bytes (I8).
 *
 * In memory, open addressing, 16 bytes an entry.  A table is one thread's; struct
 * dedup is tables under a lock each, for all threads.  At its limit a table
 * forgets older entries instead of growing: duplicates are then missed, never
 * invented.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "include/snapd/format.h"

struct dedup_slot {
	uint64_t key; /* 0: empty */
	loc_t loc;
};

struct dedup_table {
	struct dedup_slot *slots; /* owned; one cache line answers most questions */
	size_t nr_slots, nr_used;
	size_t max_slots; /* 0: no limit */
};

void dedup_table_init(struct dedup_table *t, size_t max_slots);
void dedup_table_deinit(struct dedup_table *t);
/* LOC_NONE (0) when there is none. */
loc_t dedup_table_get(const struct dedup_table *t, uint64_t key);
/* Memory begins to fetch what get and put of this key will look at. */
void dedup_table_prefetch(const struct dedup_table *t, uint64_t key);
/* Replaces an entry of the same key.  Out of memory: the entry is dropped. */
void dedup_table_put(struct dedup_table *t, uint64_t key, loc_t loc);
/* Keep only entries for which keep() says so. */
void dedup_table_filter(struct dedup_table *t, bool (*keep)(void *opaque, loc_t loc), void *opaque);

#define DEDUP_SHARDS 64u
struct dedup_shard {
	_Alignas(64) pthread_mutex_t lock; /* held for the table's own work only */
	struct dedup_table table;
};
struct dedup {
	struct dedup_shard shards[DEDUP_SHARDS];
};

void dedup_init(struct dedup *d, size_t max_entries);
void dedup_deinit(struct dedup *d);
loc_t dedup_get(struct dedup *d, uint64_t key);
void dedup_prefetch(struct dedup *d, uint64_t key);
void dedup_put(struct dedup *d, uint64_t key, loc_t loc);
void dedup_filter(struct dedup *d, bool (*keep)(void *opaque, loc_t loc), void *opaque);
uint64_t dedup_nr(struct dedup *d);

/* The key of a page: equal pages of one domain (owner) and size share it.  Never 0. */
static inline uint64_t dedup_key(uint64_t fp, uint32_t uid, uint32_t page_shift)
{
	uint64_t domain = ((uint64_t)uid << 8 | page_shift) * 0x9e3779b97f4a7c15u;
	uint64_t key = fp ^ domain ^ domain >> 29;

	return key ? key : 1;
}
