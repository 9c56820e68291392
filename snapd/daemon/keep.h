/* SPDX-License-Identifier: MIT */
/*
 * keep: which snapshots of a VM a retention rule keeps, and why.  Pure.
 *
 * Rules as restic's: `last`, the newest n; hourly, daily, weekly, monthly, yearly:
 * the newest snapshot of each of the newest n periods that have one; `within`: all
 * that are at most so old, seen from the newest; tags: all that have one of them.  A
 * snapshot is kept when any rule keeps it, or it is pinned.  Periods are of local
 * time; weeks are ISO 8601's.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "snapd/util/err.h"

enum keep_reason {
	KEEP_PINNED,
	KEEP_LAST,
	KEEP_HOURLY,
	KEEP_DAILY,
	KEEP_WEEKLY,
	KEEP_MONTHLY,
	KEEP_YEARLY,
	KEEP_WITHIN,
	KEEP_TAG,
	KEEP_NR_REASONS
};
extern const char *const keep_reason_names[KEEP_NR_REASONS];

struct keep_rules {
	uint32_t periods[KEEP_NR_REASONS]; /* LAST to YEARLY: how many; others unused */
	uint64_t within_ns;		   /* 0: no such rule */
	const char *tags;		   /* comma-separated; NULL: no such rule */
};

struct keep_item {
	uint64_t taken_ns; /* CLOCK_REALTIME */
	const char *tags;  /* comma-separated */
	bool pinned;
	uint32_t reasons; /* out: 1 << enum keep_reason; 0: to be pruned */
};

bool keep_has_rule(const struct keep_rules *r);
/* Of one VM, ascending by time. */
void keep_apply(const struct keep_rules *r, struct keep_item *items, size_t nr);
/* "1y6m3w2d12h", any of them, in that order; months of 30 days, years of 365.  -EINVAL. */
int keep_parse_duration(const char *text, uint64_t *ret_ns, struct err *e);
