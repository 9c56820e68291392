/* SPDX-License-Identifier: MIT */
/*
 * gpaset: see gpaset.h for what enters and leaves, and for G1-G3.
 *
 * Why sequentially consistent operations.  add is "set bit; look at summary;
 * set summary if clear", take is "clear summary; look at bits".  Both are a
 * store followed by a load of the other's variable: with anything weaker add
 * could see the old summary bit while take sees the old word, and the frame would
 * stay behind unseen.  The read-modify-writes order it on every architecture (on arm64
 * the load is an LDAR, which may not overtake the STLXR or LDSETAL before it), and
 * spare add the second locked instruction when the summary bit is set already,
 * which is nearly always.
 *
 * add never skips the bit's own read-modify-write, even where the bit is set: it
 * is what makes the page's bytes visible to the taker that clears the bit.
 */
#include "snapd/gpaset.h"

#include <assert.h>
#include <string.h>

#include "snapd/util/cleanup.h"

#define WORD_FRAMES    64u
#define SUMMARY_FRAMES 4096u
#define PART_ALIGN     4096u

static size_t bits_bytes(uint64_t nr_frames)
{
	return ALIGN_UP(nr_frames / 8, PART_ALIGN);
}

size_t gpaset_bytes(uint64_t nr_frames)
{
	assert(nr_frames % SUMMARY_FRAMES == 0);
	return bits_bytes(nr_frames) + ALIGN_UP(nr_frames / 512, PART_ALIGN);
}

void gpaset_init(struct gpaset *set, void *mem, uint64_t nr_frames)
{
	assert(nr_frames % SUMMARY_FRAMES == 0);
	assert((uintptr_t)mem % sizeof(uint64_t) == 0);
	set->bits = mem;
	set->summary = (void *)((char *)mem + bits_bytes(nr_frames));
	set->nr_frames = nr_frames;
}

/* The bits of 64-bit unit `unit` that lie in [first, end). */
static uint64_t unit_mask(uint64_t unit, uint64_t first, uint64_t end)
{
	uint64_t lo = unit * 64, mask = ~0ull;

	if (end <= lo || first >= lo + 64)
		return 0;
	if (first > lo)
		mask &= ~0ull << (first - lo);
	if (end < lo + 64)
		mask &= ~0ull >> (lo + 64 - end);
	return mask;
}

static void summary_set(struct gpaset *set, uint64_t unit, uint64_t mask)
{
	if ((atomic_load(&set->summary[unit]) & mask) != mask)
		atomic_fetch_or(&set->summary[unit], mask);
}

static void word_add(struct gpaset *set, uint64_t word, uint64_t mask)
{
	atomic_fetch_or(&set->bits[word], mask);
	summary_set(set, word / 64, 1ull << (word % 64));
}

void gpaset_add(struct gpaset *set, uint64_t frame)
{
	assert(frame < set->nr_frames);
	word_add(set, frame / WORD_FRAMES, 1ull << (frame % WORD_FRAMES));
}

static uint64_t range_end(uint64_t first, uint64_t n, uint64_t nr_frames)
{
	return n > nr_frames - first ? nr_frames : first + n;
}

void gpaset_add_range(struct gpaset *set, uint64_t first, uint64_t n)
{
	uint64_t end, unit, word, last;

	if (!n || first >= set->nr_frames)
		return;
	end = range_end(first, n, set->nr_frames);
	last = (end - 1) / WORD_FRAMES;
	for (unit = first / SUMMARY_FRAMES; unit <= last / 64; unit++) {
		for (word = MAX(unit * 64, first / WORD_FRAMES); word <= MIN(last, unit * 64 + 63);
		     word++)
			atomic_fetch_or(&set->bits[word], unit_mask(word, first, end));
		summary_set(set, unit, unit_mask(unit, first / WORD_FRAMES, last + 1));
	}
}

bool gpaset_test(const struct gpaset *set, uint64_t frame)
{
	if (frame >= set->nr_frames)
		return false;
	return atomic_load(&set->bits[frame / WORD_FRAMES]) >> (frame % WORD_FRAMES) & 1;
}

/* The lowest `max` bits of v. */
static uint64_t lowest_bits(uint64_t v, size_t max)
{
	uint64_t rest = v;

	if ((size_t)__builtin_popcountll(v) <= max)
		return v;
	while (max--)
		rest &= rest - 1;
	return v & ~rest;
}

static size_t list_bits(uint64_t word, uint64_t v, uint64_t *frames)
{
	size_t n = 0;

	for (; v; v &= v - 1)
		frames[n++] = word * WORD_FRAMES + (uint64_t)__builtin_ctzll(v);
	return n;
}

/* Take at most `max` of the `want`ed bits of one word whose summary bit was just
 * cleared; sets it again where bits stay behind.  G3: inflight first. */
static uint64_t word_take(struct gpaset *set, struct gpaset *inflight, uint64_t word, uint64_t want,
			  size_t max)
{
	uint64_t all = atomic_load(&set->bits[word]);
	uint64_t v = lowest_bits(all & want, max);

	if (v && inflight)
		word_add(inflight, word, v);
	if (v)
		all = atomic_fetch_and(&set->bits[word], ~v);
	if (all & ~v)
		summary_set(set, word / 64, 1ull << (word % 64));
	return v;
}

/* Take from the words under one summary unit. */
static size_t unit_take(struct gpaset *set, struct gpaset *inflight, uint64_t unit, uint64_t first,
			uint64_t end, uint64_t *frames, size_t max)
{
	uint64_t words = unit_mask(unit, first / WORD_FRAMES, DIV_ROUND_UP(end, WORD_FRAMES));
	uint64_t word, v;
	size_t n = 0;

	if (!(atomic_load(&set->summary[unit]) & words))
		return 0;
	words &= atomic_fetch_and(&set->summary[unit], ~words); /* G2 */
	for (; words && n < max; words &= words - 1) {
		word = unit * 64 + (uint64_t)__builtin_ctzll(words);
		v = word_take(set, inflight, word, unit_mask(word, first, end), max - n);
		n += list_bits(word, v, frames + n);
	}
	if (words)
		summary_set(set, unit, words);
	return n;
}

size_t gpaset_take(struct gpaset *set, struct gpaset *inflight, uint64_t limit, uint64_t *cursor,
		   uint64_t *frames, size_t max)
{
	uint64_t end = MIN(limit, set->nr_frames), first = *cursor, unit;
	size_t n = 0;

	for (unit = first / SUMMARY_FRAMES; unit * SUMMARY_FRAMES < end && n < max; unit++)
		n += unit_take(set, inflight, unit, first, end, frames + n, max - n);
	if (n && n == max)
		*cursor = frames[n - 1] + 1;
	else if (max)
		*cursor = MAX(first, end);
	return n;
}

/* Call `expr` for each word under a set summary bit that meets [first, end). */
#define for_each_marked_word(set, word, first, end)                                                \
	for (uint64_t _u = (first) / SUMMARY_FRAMES; _u * SUMMARY_FRAMES < (end); _u++)            \
		for (uint64_t _m =                                                                 \
			     atomic_load(&(set)->summary[_u]) &                                    \
			     unit_mask(_u, (first) / WORD_FRAMES, DIV_ROUND_UP(end, WORD_FRAMES)); \
		     _m && ((word) = _u * 64 + (uint64_t)__builtin_ctzll(_m), 1); _m &= _m - 1)

size_t gpaset_peek(const struct gpaset *set, uint64_t limit, uint64_t *cursor, uint64_t *frames,
		   size_t max)
{
	uint64_t end = MIN(limit, set->nr_frames), first = *cursor, word, v;
	size_t n = 0;

	if (!max)
		return 0;
	for_each_marked_word (set, word, first, end) {
		v = atomic_load(&set->bits[word]) & unit_mask(word, first, end);
		n += list_bits(word, lowest_bits(v, max - n), frames + n);
		if (n == max) {
			*cursor = frames[n - 1] + 1;
			return n;
		}
	}
	*cursor = MAX(first, end);
	return n;
}

uint64_t gpaset_count(const struct gpaset *set, uint64_t limit)
{
	uint64_t end = MIN(limit, set->nr_frames), word, n = 0;

	for_each_marked_word (set, word, (uint64_t)0, end)
		n += (uint64_t)__builtin_popcountll(atomic_load(&set->bits[word]) &
						    unit_mask(word, 0, end));
	return n;
}

void gpaset_merge(struct gpaset *dst, struct gpaset *src, uint64_t limit)
{
	uint64_t end = MIN(limit, src->nr_frames), word, v;

	assert(dst->nr_frames == src->nr_frames);
	for_each_marked_word (src, word, (uint64_t)0, end) {
		atomic_fetch_and(&src->summary[word / 64], ~(1ull << (word % 64)));
		v = atomic_load(&src->bits[word]) & unit_mask(word, 0, end);
		if (v)
			word_add(dst, word, v);
		if (atomic_fetch_and(&src->bits[word], ~v) & ~v)
			summary_set(src, word / 64, 1ull << (word % 64));
	}
}

void gpaset_clear_range(struct gpaset *set, uint64_t first, uint64_t n)
{
	uint64_t end, word, mask;

	if (!n || first >= set->nr_frames)
		return;
	end = range_end(first, n, set->nr_frames);
	for_each_marked_word (set, word, first, end) {
		mask = unit_mask(word, first, end);
		atomic_fetch_and(&set->summary[word / 64], ~(1ull << (word % 64)));
		if (atomic_fetch_and(&set->bits[word], ~mask) & ~mask)
			summary_set(set, word / 64, 1ull << (word % 64));
	}
}

void gpaset_clear(struct gpaset *set, uint64_t limit)
{
	gpaset_clear_range(set, 0, limit);
}

void gpaset_rebuild(struct gpaset *set, uint64_t limit)
{
	uint64_t end = DIV_ROUND_UP(MIN(limit, set->nr_frames), WORD_FRAMES), word;

	/* Sequentially consistent, as take's look is: the agent adds on, and may have seen
	 * the summary bit that a taker cleared before it died. */
	for (word = 0; word < end; word++)
		if (atomic_load(&set->bits[word]))
			summary_set(set, word / 64, 1ull << (word % 64));
}
