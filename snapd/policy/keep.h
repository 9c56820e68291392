/* SPDX-License-Identifier: MIT */
/*
 * keep: which snapshots of one VM stay, and why.  Pure: a list and rules in, a
 * verdict and its reason for each out; nothing is deleted here.
 *
 * Rules add up: a snapshot stays if any of them wants it.
 *
 *   last N           the N newest
 *   hourly … yearly  the newest of each of the last N hours (days, weeks from
 *                    Monday, months, years) that have one, in the policy's time zone
 *   within           whatever is less than this older than the newest
 *   tags             whatever has one of them
 *   grid             "24x1h, 14x1d, 6x30d": the oldest of each hour, then, for what
 *                    is older than 24 hours, of each day, then of each 30 days.  Ages
 *                    count from the newest; spans begin at multiples of their length
 *                    since 1970 in UTC, leave a step as a whole, and are multiples of
 *                    the finer step's: so that none moves with time.
 *   pinned, held, the newest     always (held: not backed up yet)
 *   later than now               always, and left out of the reckoning: a clock that was
 *                    wrong when it was taken must not make all others look old
 *
 * All of them have one property that matters: pruning often leaves the same snapshots
 * as pruning once (tests/prop/keep.c).  Ages count from the newest snapshot and not
 * from now: a VM that is off for a month does not lose its last ones.
 *
 * No rule at all keeps everything.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "snapd/policy/zone.h"
#include "snapd/util/err.h"

#define KEEP_GRID_MAX 8
#define KEEP_ALL      UINT32_MAX /* a count: as many as there are */

enum keep_period {
	KEEP_HOURLY,
	KEEP_DAILY,
	KEEP_WEEKLY,
	KEEP_MONTHLY,
	KEEP_YEARLY,
	KEEP_NR_PERIODS
};
extern const char *const keep_period_names[KEEP_NR_PERIODS];

struct keep_rules {
	uint32_t last;
	uint32_t period[KEEP_NR_PERIODS];
	uint64_t within_s;
	struct {
		uint32_t count;
		uint64_t span_s;
	} grid[KEEP_GRID_MAX];
	uint32_t nr_grid;
	char tags[256]; /* separated by commas */
};

struct keep_snapshot {
	uint64_t id;
	int64_t taken_s;  /* Unix time */
	const char *tags; /* separated by commas; borrowed */
	bool pinned;
	bool held; /* not to be lost yet, e.g. not backed up */
	/* out */
	bool keep;
	char why[120]; /* "last 1 of 5, daily 2026-11-21" or why it goes */
};

/* Is `tag` one of `tags`, which are separated by commas, and blanks beside them? */
bool keep_has_tag(const char *tags, const char *tag);

bool keep_has_rules(const struct keep_rules *rules);

/*
 * Decide over `snaps`, all of one VM, in any order; they come back newest first.
 * `zone` (borrowed) says where a day begins, `now_s` (Unix time) what is yet to come.
 */
void keep_decide(const struct keep_rules *rules, const struct zone *zone, int64_t now_s,
		 struct keep_snapshot *snaps, size_t nr);

/* "last", "hourly" … "yearly" (a number or "all"), "within" (a span), "tags", "grid": the
 * words of prune, of policies and of the API; -EINVAL with the reason. */
int keep_set(struct keep_rules *rules, const char *key, const char *value, struct err *e);

/* "90s", "15m", "1h30m", "2d", "3w", "6M", "1y": seconds, more than none; -EINVAL.  m is a
 * minute, M a month of 30 days; a year has 365. */
int keep_parse_span(const char *text, uint64_t *ret);
