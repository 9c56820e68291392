/* SPDX-License-Identifier: MIT */
/*
 * gpaset: a set of dirty frames that many threads (and two processes) may add
 * to while one takes from it.  Pure: works on memory that the caller gives, no
 * system calls, no locks.
 *
 * Two levels: one bit per frame, and a summary bit per 64-bit word, so that
 * taking costs by what is dirty and not by RAM size (1 TiB: 512 KiB of summary).
 *
 * Invariants
 *   G1  add sets the frame's bit first and its summary bit after it (release):
 *       a set bit whose summary bit is clear belongs to an add still under way,
 *       whose summary bit will follow.
 *   G2  take clears a summary word first and looks at the words after it
 *       (acquire), so an add that comes in between leaves its summary bit set.
 *   G3  with `inflight`, a frame's bit is set there before it is cleared here:
 *       a taker that is killed at any instruction leaves dirty ∪ inflight whole.
 *       What it can lose is summary bits: gpaset_rebuild() makes them anew.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct gpaset {
	_Atomic uint64_t *bits;	   /* borrowed memory, page aligned */
	_Atomic uint64_t *summary; /* likewise */
	uint64_t nr_frames;	   /* capacity; a multiple of 4096 */
};

/* Bytes needed for a set of nr_frames (a multiple of 4096), a multiple of 4096. */
size_t gpaset_bytes(uint64_t nr_frames);
/* Lay a set over zeroed (or earlier used) memory of gpaset_bytes(). */
void gpaset_init(struct gpaset *set, void *mem, uint64_t nr_frames);

/* Any thread.  Frames out of range are ignored by add_range, a bug in add. */
void gpaset_add(struct gpaset *set, uint64_t frame);
void gpaset_add_range(struct gpaset *set, uint64_t first, uint64_t n);
bool gpaset_test(const struct gpaset *set, uint64_t frame);

/*
 * Take up to `max` frames ≥ *cursor, ascending, out of `set`, below `limit`
 * frames; *cursor moves on (start with 0).  Where `inflight` is not NULL each is
 * first set there.  Returns how many; 0: none left at or above the cursor.  One
 * taker at a time.
 */
size_t gpaset_take(struct gpaset *set, struct gpaset *inflight, uint64_t limit, uint64_t *cursor,
		   uint64_t *frames, size_t max);
/* As take, but nothing is removed. */
size_t gpaset_peek(const struct gpaset *set, uint64_t limit, uint64_t *cursor, uint64_t *frames,
		   size_t max);
/* Frames in the set, counted by summary (approximate while others add). */
uint64_t gpaset_count(const struct gpaset *set, uint64_t limit);

/* dst ∪= src, then src = ∅ (an epoch failed: inflight goes back to dirty). */
void gpaset_merge(struct gpaset *dst, struct gpaset *src, uint64_t limit);
void gpaset_clear(struct gpaset *set, uint64_t limit);
void gpaset_clear_range(struct gpaset *set, uint64_t first, uint64_t n);
/* Summary bits anew from the bits, for a set found after a crash: O(limit). */
void gpaset_rebuild(struct gpaset *set, uint64_t limit);
