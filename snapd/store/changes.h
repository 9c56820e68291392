/* SPDX-License-Identifier: MIT */
/*
 * changes: what an epoch changes: home GFN → loc, in the order in which it is
 * learnt; in the end one sorted array, from which the manifest is written and the
 * live map brought up to date.  Pure; one thread.
 *
 * Pages mostly come in ascending order, so the array is a few sorted *runs*: an entry
 * above the last one goes on with the last run, another begins one.  Runs are merged
 * whenever one is not at least twice as long as the next, so there are at most log2 of
 * the entries.  24 bytes a changed page, twice as many while runs are merged.
 *
 * C1 GFNs ascend within a run.
 * C2 each run is more than twice as long as the next, or it is the last but one.
 * C3 of a GFN that several runs have, the last run's entry counts.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "include/snapd/format.h"

#define CHANGES_RUNS_MAX 64u

struct change {
	uint64_t gfn;
	loc_t loc;
	uint64_t fp; /* 64 bits of the page's id; 0: not known */
};

struct changes {
	struct change *v; /* owned */
	size_t nr, cap;
	struct change *scratch; /* owned; cap_scratch of them */
	size_t cap_scratch;
	size_t starts[CHANGES_RUNS_MAX]; /* first entry of each run */
	uint32_t nr_runs;
};

void changes_deinit(struct changes *c);
/* As after init, memory kept up to `keep` entries. */
void changes_reset(struct changes *c, size_t keep);
/* The latest for this frame; NULL: none.  Valid until the next call of another function. */
const struct change *changes_get(const struct changes *c, uint64_t gfn);
/* -ENOMEM */
int changes_put(struct changes *c, struct change change);
/* Forget frames [gfn, end).  -ENOMEM */
int changes_clear(struct changes *c, uint64_t gfn, uint64_t end);
/* One run: v[0, nr) is sorted, each GFN once.  -ENOMEM */
int changes_sort(struct changes *c);
