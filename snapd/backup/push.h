/* SPDX-License-Identifier: MIT */
/*
 * push: a snapshot of the local store into a repository.  Job threads; blocks.
 *
 *   1 what is there: is it in the repository already; which *base* is there to build on
 *   2 pages that may differ from the base (all, without one), in batches: read, named; those that
 *     the repository has, by the cache, are referred to; the others go into packs
 *   3 packs are sent while others are filled (upload.h)
 *   4 map, state, then repo_commit(): from then on the snapshot is visible
 *
 * The base is the nearest ancestor that is in the repository.  It need not be in the store any
 * more: which pages changed is told by the epochs since.  Their records are kept back to the
 * snapshot's last checkpoint, which is written when the changes add up to half the memory, or
 * after 64 epochs (more for a large VM); once they are gone too, or the cache was lost, which knows
 * what this host pushed, or no ancestor was pushed, another snapshot of the VM that is on both
 * sides is compared, map with map; and only without that all memory is read.  What is sent is the
 * same in each case: what the bucket lacks.
 *
 * Cost: with a base, by what changed since, and a request or two for what the cache does not
 * have; without one by the whole memory, and what the bucket has that the cache does not.
 * Memory, whatever the VM's: UPLOAD_SLOTS packs, a batch, a window into each manifest that is read
 * (MAPSTREAM_BYTES together), and when layers become one, a map of each (MAP_TARGET).  By the
 * size of the repository: some 70 bytes for each pack.
 *
 * Everything may stop anywhere: what was sent is found again by the next push, and nothing
 * is visible before 4.
 */
#pragma once

#include "snapd/backup/repo.h"

struct job;
struct store;

struct push_result {
	struct bk_name name;
	bool already; /* nothing was to do */
	bool has_base;
	struct bk_name base;
	uint64_t pages_read, pages_known, pages_sent, pages_zero;
	uint64_t packs_sent, bytes_sent;
};

/* Progress goes to the job, which may be cancelled. */
int push_snapshot(struct job *job, struct repo *r, uint64_t snapshot, struct push_result *ret,
		  struct err *e);
/* Of a snapshot of this store: is it in the list?  NULL: no. */
const struct manifest *push_find(const struct repo_list *list, struct store *s, struct repo *r,
				 uint64_t snapshot);
