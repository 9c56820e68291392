/* SPDX-License-Identifier: MIT */
/* Duplicate candidates; see dedup.h.  Linear probing, at most 3/4 full. */
#include "snapd/store/dedup.h"

#include <stdlib.h>
#include <string.h>

#define SLOTS_MIN 1024u

void dedup_table_init(struct dedup_table *t, size_t max_slots)
{
	*t = (struct dedup_table){.max_slots = max_slots};
}

void dedup_table_deinit(struct dedup_table *t)
{
	free(t->slots);
	t->slots = NULL;
	t->nr_slots = t->nr_used = 0;
}

/* Keys are hashes already; the shard was chosen by the top bits. */
static size_t slot_of(const struct dedup_table *t, uint64_t key)
{
	return (size_t)(key ^ key >> 31) & (t->nr_slots - 1);
}

/* The slot that holds the key, or the empty one where it would go. */
static size_t probe(const struct dedup_table *t, uint64_t key)
{
	size_t i = slot_of(t, key);

	while (t->slots[i].key && t->slots[i].key != key)
		i = (i + 1) & (t->nr_slots - 1);
	return i;
}

loc_t dedup_table_get(const struct dedup_table *t, uint64_t key)
{
	size_t i;

	if (!t->nr_slots)
		return 0;
	i = probe(t, key);
	return t->slots[i].key ? t->slots[i].loc : 0;
}

void dedup_table_prefetch(const struct dedup_table *t, uint64_t key)
{
	if (t->nr_slots)
		__builtin_prefetch(&t->slots[slot_of(t, key)]);
}

static bool table_resize(struct dedup_table *t, size_t nr_slots)
{
	struct dedup_table bigger = {.nr_slots = nr_slots, .max_slots = t->max_slots};

	bigger.slots = calloc(nr_slots, sizeof(*bigger.slots));
	if (!bigger.slots)
		return false;
	for (size_t i = 0; i < t->nr_slots; i++) {
		if (!t->slots[i].key)
			continue;
		bigger.slots[probe(&bigger, t->slots[i].key)] = t->slots[i];
		bigger.nr_used++;
	}
	dedup_table_deinit(t);
	*t = bigger;
	return true;
}

static bool table_full(const struct dedup_table *t)
{
	return t->nr_used + 1 > t->nr_slots / 4 * 3;
}

static bool make_room(struct dedup_table *t)
{
	size_t want = t->nr_slots ? t->nr_slots * 2 : SLOTS_MIN;

	if (!table_full(t))
		return true;
	if (t->max_slots && want > t->max_slots)
		return false;
	return table_resize(t, want);
}

void dedup_table_put(struct dedup_table *t, uint64_t key, loc_t loc)
{
	bool room = make_room(t);
	size_t i;

	if (!t->nr_slots)
		return;
	i = probe(t, key);
	if (!t->slots[i].key && !room) {
		i = slot_of(t, key); /* in place of a neighbour; an empty home slot stays so */
		if (!t->slots[i].key)
			return;
		/* Overwriting keeps probe chains whole, and the key is in its home slot. */
	} else if (!t->slots[i].key) {
		t->nr_used++;
	}
	t->slots[i] = (struct dedup_slot){key, loc};
}

void dedup_table_filter(struct dedup_table *t, bool (*keep)(void *opaque, loc_t loc), void *opaque)
{
	struct dedup_table kept = {.max_slots = t->max_slots};

	for (size_t i = 0; i < t->nr_slots; i++)
		if (t->slots[i].key && keep(opaque, t->slots[i].loc))
			dedup_table_put(&kept, t->slots[i].key, t->slots[i].loc);
	dedup_table_deinit(t);
	*t = kept;
}

/* ---- shards ---- */

static struct dedup_shard *shard_of(struct dedup *d, uint64_t key)
{
	return &d->shards[key >> 58];
}

void dedup_init(struct dedup *d, size_t max_entries)
{
	size_t slots = SLOTS_MIN;

	static_assert(DEDUP_SHARDS == 1u << (64 - 58), "shard_of() takes the top bits");
	while (slots / 4 * 3 * DEDUP_SHARDS < max_entries)
		slots *= 2;
	for (unsigned i = 0; i < DEDUP_SHARDS; i++) {
		pthread_mutex_init(&d->shards[i].lock, NULL);
		dedup_table_init(&d->shards[i].table, slots);
	}
}

void dedup_deinit(struct dedup *d)
{
	for (unsigned i = 0; i < DEDUP_SHARDS; i++) {
		dedup_table_deinit(&d->shards[i].table);
		pthread_mutex_destroy(&d->shards[i].lock);
	}
}

loc_t dedup_get(struct dedup *d, uint64_t key)
{
	struct dedup_shard *s = shard_of(d, key);
	loc_t loc;

	pthread_mutex_lock(&s->lock);
	loc = dedup_table_get(&s->table, key);
	pthread_mutex_unlock(&s->lock);
	return loc;
}

void dedup_prefetch(struct dedup *d, uint64_t key)
{
	struct dedup_shard *s = shard_of(d, key);

	pthread_mutex_lock(&s->lock);
	dedup_table_prefetch(&s->table, key);
	pthread_mutex_unlock(&s->lock);
}

void dedup_put(struct dedup *d, uint64_t key, loc_t loc)
{
	struct dedup_shard *s = shard_of(d, key);

	pthread_mutex_lock(&s->lock);
	dedup_table_put(&s->table, key, loc);
	pthread_mutex_unlock(&s->lock);
}

void dedup_filter(struct dedup *d, bool (*keep)(void *opaque, loc_t loc), void *opaque)
{
	for (unsigned i = 0; i < DEDUP_SHARDS; i++) {
		pthread_mutex_lock(&d->shards[i].lock);
		dedup_table_filter(&d->shards[i].table, keep, opaque);
		pthread_mutex_unlock(&d->shards[i].lock);
	}
}

uint64_t dedup_nr(struct dedup *d)
{
	uint64_t nr = 0;

	for (unsigned i = 0; i < DEDUP_SHARDS; i++) {
		pthread_mutex_lock(&d->shards[i].lock);
		nr += d->shards[i].table.nr_used;
		pthread_mutex_unlock(&d->shards[i].lock);
	}
	return nr;
}
