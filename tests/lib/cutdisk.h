/* SPDX-License-Identifier: MIT */
/*
 * cutdisk: what a power cut may leave of a recorded workload.  In: a log of
 * simdisk.h.  Out: directories, one after the other, each handed to the caller.
 *
 * The disk that is assumed:
 *   D1 A sync that returned made durable: of a file, every write and size that was
 *      complete when it began; of a directory, every entry made or removed before.  A
 *      write through O_DSYNC makes itself durable, and nothing else.
 *   D2 Anything else may be there or not, in any combination, whatever the order in
 *      which it was asked for: each write whole, not at all, or torn: any subset of
 *      its 512-byte sectors; each size; each entry.  A sector is never half written.
 *      A rename is one change, also when it ends another file's entry.
 *   D3 What was never written reads as zeros.
 *   D4 A sync that failed loses what it was to make durable: no later one covers it.
 *
 * Between two syncs the set of what is open only grows, and a later write that is
 * dropped is one that had not been issued: so every cut between two syncs (or marks)
 * is among those right before the second, and only those are made.  Up to `limit`
 * combinations all are tried; beyond, the regular ones (nothing, all, each prefix,
 * all but one, one alone) and as many at random.  Equal states are tried once.
 */
#pragma once

#include "tests/lib/rand.h"
#include "tests/lib/simdisk.h"

struct cut {
	const struct disk_log *log;
	const char *dir;	/* exists; states are made below */
	uint64_t seed;		/* of torn writes and samples */
	uint32_t limit;		/* combinations at one point */
	uint32_t one_in;	/* of the states that were made, this share is visited; 0, 1: all */
	const char *stale_lock; /* a file whose contents lock.mdb has in half of the states */
	/* `marks` of the log are behind; the directory is removed afterwards. */
	void (*visit)(void *arg, const char *dir, size_t marks);
	void *arg;
};

struct cut_stats {
	uint64_t points, exhaustive, combinations, states;
};

/* Before each visit cut_now() is set to what the state is, for failures. */
void cut_run(const struct cut *c, struct cut_stats *stats);
const char *cut_now(void);
