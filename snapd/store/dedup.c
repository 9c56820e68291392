/* SPDX-License-Identifier: MIT */
/*
 * Duplicate candidates; see dedup.h.
 *
 * A key has two lines.  An entry goes to the emptier one; when both are full, one of
 * their eight entries moves to its own other line; when none can, the shard doubles,
 * or at its limit forgets: in one of the two lines, chosen by the key, the entry that
 * was used longest ago, of those of the sample when they are more than half of it, else
 * of the others.
 *
 * D1 the entries of a line come first, its empty slots last.
 * D2 a key is in the table at most once.
 */
#include "snapd/store/dedup.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define LINES_MIN   16u
#define SAMPLED_MAX (DEDUP_WAYS / 2)

static bool is_sampled(uint64_t key)
{
	return (key >> 40) % DEDUP_SAMPLE == 0;
}

/* Keys are hashes already; the shard was chosen by the top bits. */
static struct dedup_line *first_line(const struct dedup_shard *s, uint64_t key)
{
	return &s->lines[key & (s->nr_lines - 1)];
}

static struct dedup_line *second_line(const struct dedup_shard *s, uint64_t key)
{
	uint64_t other = (key ^ key >> 32) * 0x9e3779b97f4a7c15u >> 24;

	/* At least one bit apart from the first. */
	return &s->lines[(key ^ (other | 1)) & (s->nr_lines - 1)];
}

static struct dedup_line *other_line(const struct dedup_shard *s, const struct dedup_line *l,
				     uint64_t key)
{
	struct dedup_line *first = first_line(s, key);

	return l == first ? second_line(s, key) : first;
}

static unsigned int line_used(const struct dedup_line *l)
{
	unsigned int n = 0;

	while (n < DEDUP_WAYS && l->slots[n].key)
		n++;
	return n;
}

/* `slot` becomes the most recent; what was at `at` is gone. */
static void line_push(struct dedup_line *l, unsigned int at, struct dedup_slot slot)
{
	memmove(&l->slots[1], &l->slots[0], at * sizeof(slot));
	l->slots[0] = slot;
}

static void line_remove(struct dedup_line *l, unsigned int at)
{
	memmove(&l->slots[at], &l->slots[at + 1], (DEDUP_WAYS - 1 - at) * sizeof(l->slots[0]));
	l->slots[DEDUP_WAYS - 1] = (struct dedup_slot){0};
}

static struct dedup_slot *line_find(struct dedup_line *l, uint64_t key)
{
	for (unsigned int i = 0; i < DEDUP_WAYS; i++) {
		struct dedup_slot slot = l->slots[i];

		if (slot.key != key)
			continue;
		line_push(l, i, slot);
		return &l->slots[0];
	}
	return NULL;
}

static struct dedup_slot *shard_find(const struct dedup_shard *s, uint64_t key)
{
	struct dedup_slot *slot;

	if (!s->nr_lines)
		return NULL;
	slot = line_find(first_line(s, key), key);
	return slot ? slot : line_find(second_line(s, key), key);
}

/* Into the emptier of its two lines; false when both are full. */
static bool shard_place(struct dedup_shard *s, struct dedup_slot slot)
{
	struct dedup_line *a = first_line(s, slot.key), *b = second_line(s, slot.key);
	unsigned int in_a = line_used(a), in_b = line_used(b);

	if (in_a == DEDUP_WAYS && in_b == DEDUP_WAYS)
		return false;
	line_push(in_a <= in_b ? a : b, in_a <= in_b ? in_a : in_b, slot);
	s->nr_used++;
	return true;
}

/* An entry of the full line l goes to its other line, as the oldest there. */
static bool line_relieve(struct dedup_shard *s, struct dedup_line *l)
{
	for (unsigned int i = DEDUP_WAYS; i-- > 0;) {
		struct dedup_line *other = other_line(s, l, l->slots[i].key);
		unsigned int n = line_used(other);

		if (n == DEDUP_WAYS)
			continue;
		other->slots[n] = l->slots[i];
		line_remove(l, i);
		return true;
	}
	return false;
}

static bool shard_insert(struct dedup_shard *s, struct dedup_slot slot)
{
	if (shard_place(s, slot))
		return true;
	return (line_relieve(s, first_line(s, slot.key)) ||
		line_relieve(s, second_line(s, slot.key))) &&
	       shard_place(s, slot);
}

static struct dedup_line *make_lines(size_t nr)
{
	struct dedup_line *lines = aligned_alloc(sizeof(*lines), nr * sizeof(*lines));

	if (lines)
		memset(lines, 0, nr * sizeof(*lines));
	return lines;
}

/* Double it, and again until all entries fit; false when that can't be. */
static bool shard_grow(struct dedup_shard *s, size_t max_lines)
{
	for (size_t nr = s->nr_lines ? s->nr_lines * 2 : LINES_MIN; nr <= max_lines; nr *= 2) {
		struct dedup_shard bigger = {.nr_lines = nr, .lines = make_lines(nr)};
		size_t moved = 0;

		if (!bigger.lines)
			return false;
		for (size_t i = 0; i < s->nr_lines * DEDUP_WAYS; i++) {
			struct dedup_slot slot = s->lines[i / DEDUP_WAYS].slots[i % DEDUP_WAYS];

			moved += slot.key && shard_insert(&bigger, slot);
		}
		if (moved < s->nr_used) {
			free(bigger.lines);
			continue;
		}
		free(s->lines);
		s->lines = bigger.lines;
		s->nr_lines = nr;
		return true;
	}
	return false;
}

/* The entry of a full line to forget, for one that is of the sample or not. */
static unsigned int line_victim(const struct dedup_line *l, bool sampled)
{
	unsigned int nr_sampled = 0;
	bool of_sample;

	for (unsigned int i = 0; i < DEDUP_WAYS; i++)
		nr_sampled += is_sampled(l->slots[i].key);
	of_sample = nr_sampled + sampled > SAMPLED_MAX;
	for (unsigned int i = DEDUP_WAYS; i-- > 0;)
		if (is_sampled(l->slots[i].key) == of_sample)
			return i;
	return DEDUP_WAYS - 1;
}

static void shard_evict(const struct dedup_shard *s, struct dedup_slot slot)
{
	struct dedup_line *l = slot.key >> 57 & 1 ? first_line(s, slot.key)
						  : second_line(s, slot.key);

	line_push(l, line_victim(l, is_sampled(slot.key)), slot);
}

/* False when an entry was forgotten. */
static bool shard_put(struct dedup_shard *s, struct dedup_slot slot, size_t max_lines)
{
	while (!s->nr_lines || !shard_insert(s, slot)) {
		if (shard_grow(s, max_lines))
			continue;
		if (s->nr_lines)
			shard_evict(s, slot);
		return false;
	}
	return true;
}

/* ---- all shards ---- */

static struct dedup_shard *shard_of(struct dedup *d, uint64_t key)
{
	return &d->shards[key >> 58];
}
static_assert(DEDUP_SHARDS == 1u << (64 - 58), "shard_of() takes the top bits");

void dedup_init(struct dedup *d, uint64_t max_bytes)
{
	*d = (struct dedup){.max_lines = LINES_MIN};
	while (d->max_lines * 2 * sizeof(struct dedup_line) * DEDUP_SHARDS <= max_bytes)
		d->max_lines *= 2;
	for (unsigned int i = 0; i < DEDUP_SHARDS; i++)
		pthread_mutex_init(&d->shards[i].lock, NULL);
}

void dedup_deinit(struct dedup *d)
{
	for (unsigned int i = 0; i < DEDUP_SHARDS; i++) {
		free(d->shards[i].lines);
		pthread_mutex_destroy(&d->shards[i].lock);
	}
}

loc_t dedup_get(struct dedup *d, uint64_t key)
{
	struct dedup_shard *s = shard_of(d, key);
	const struct dedup_slot *slot;
	loc_t loc;

	pthread_mutex_lock(&s->lock);
	slot = shard_find(s, key);
	loc = slot ? slot->loc : 0;
	pthread_mutex_unlock(&s->lock);
	return loc;
}

void dedup_prefetch(struct dedup *d, uint64_t key)
{
	struct dedup_shard *s = shard_of(d, key);

	pthread_mutex_lock(&s->lock);
	if (s->nr_lines) {
		__builtin_prefetch(first_line(s, key), 1);
		__builtin_prefetch(second_line(s, key), 1);
	}
	pthread_mutex_unlock(&s->lock);
}

static void put(struct dedup *d, uint64_t key, loc_t loc, bool replace)
{
	struct dedup_shard *s = shard_of(d, key);
	struct dedup_slot *slot;

	pthread_mutex_lock(&s->lock);
	slot = shard_find(s, key);
	if (slot)
		slot->loc = replace ? loc : slot->loc;
	else if (!shard_put(s, (struct dedup_slot){key, loc}, d->max_lines))
		atomic_store_explicit(&d->evicts, true, memory_order_relaxed);
	pthread_mutex_unlock(&s->lock);
}

void dedup_put(struct dedup *d, uint64_t key, loc_t loc)
{
	put(d, key, loc, true);
}

void dedup_add(struct dedup *d, uint64_t key, loc_t loc)
{
	put(d, key, loc, false);
}

static void shard_filter(struct dedup_shard *s, bool (*keep)(void *opaque, loc_t loc), void *opaque)
{
	for (size_t i = 0; i < s->nr_lines; i++) {
		for (unsigned int k = line_used(&s->lines[i]); k-- > 0;) {
			if (keep(opaque, s->lines[i].slots[k].loc))
				continue;
			line_remove(&s->lines[i], k);
			s->nr_used--;
		}
	}
}

void dedup_filter(struct dedup *d, bool (*keep)(void *opaque, loc_t loc), void *opaque)
{
	for (unsigned int i = 0; i < DEDUP_SHARDS; i++) {
		pthread_mutex_lock(&d->shards[i].lock);
		shard_filter(&d->shards[i], keep, opaque);
		pthread_mutex_unlock(&d->shards[i].lock);
	}
}

uint64_t dedup_nr(struct dedup *d)
{
	uint64_t nr = 0;

	for (unsigned int i = 0; i < DEDUP_SHARDS; i++) {
		pthread_mutex_lock(&d->shards[i].lock);
		nr += d->shards[i].nr_used;
		pthread_mutex_unlock(&d->shards[i].lock);
	}
	return nr;
}

uint64_t dedup_bytes(struct dedup *d)
{
	uint64_t bytes = 0;

	for (unsigned int i = 0; i < DEDUP_SHARDS; i++) {
		pthread_mutex_lock(&d->shards[i].lock);
		bytes += d->shards[i].nr_lines * sizeof(struct dedup_line);
		pthread_mutex_unlock(&d->shards[i].lock);
	}
	return bytes;
}

bool dedup_evicts(struct dedup *d)
{
	return atomic_load_explicit(&d->evicts, memory_order_relaxed);
}
