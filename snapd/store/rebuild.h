/* SPDX-License-Identifier: MIT */
/*
 * rebuild: the index of a store made again from its segments alone.  Offline: the store
 * is locked.  One thread, the caller's.
 */
#pragma once

#include "snapd/store.h"

struct rebuild_config {
	const char *dir;
	const char *key_file; /* of an encrypted store */
	/* A line for everything that is not as it should be; may be NULL. */
	void (*tell)(void *opaque, const char *line);
	void *opaque;
};

struct rebuild_result {
	uint64_t segments, batches, records; /* records: batches with index records */
	uint64_t vms, timelines, epochs, snapshots;
	uint64_t damages;	 /* blocks or files that hold nothing that can be used */
	uint64_t lost_snapshots; /* their map or state can't be read: dropped, and told */
	bool journalled; /* everything committed is known; else: as when snapshots were taken */
};

/*
 * Make STORE/index again; the one that was there is STORE/index.old until the store is
 * next opened for writing.  What pages are lost, a check tells afterwards.  Stopped at
 * any point it can be run again.  -EBUSY: the store is in use; -ENOENT: no store, or no
 * record of one in the segments; -ENOKEY, -EKEYREJECTED as store_open().
 */
int store_rebuild_index(const struct rebuild_config *c, struct rebuild_result *ret, struct err *e);
