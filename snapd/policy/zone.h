/* SPDX-License-Identifier: MIT */
/*
 * zone: clock time of a place.  Unix times in, seconds of the local clock out ("local":
 * what the clock on the wall shows, as if it were UTC), and the spans of time in which
 * the two differ by one constant.  The rules are the system's (tzdata), read by GLib.
 * Immutable once opened: any thread.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "snapd/util/err.h"

struct zone;

/* By name such as "Europe/Berlin" or "UTC"; NULL or "": the system's.  -EINVAL: there is
 * no such zone. */
int zone_open(const char *name, struct zone **ret, struct err *e);
void zone_close(struct zone *zone); /* accepts NULL */

static inline void cleanup_zone(struct zone **zone)
{
	zone_close(*zone);
}

/* Local seconds - Unix time. */
int32_t zone_offset(const struct zone *zone, int64_t at_s);

static inline int64_t zone_local(const struct zone *zone, int64_t at_s)
{
	return at_s + zone_offset(zone, at_s);
}

/* As long as one offset holds: Unix time, [start, end); INT64_MIN and INT64_MAX where
 * it never changes on that side. */
struct zone_span {
	int64_t start_s, end_s;
	int32_t offset_s;
};
struct zone_span zone_span(const struct zone *zone, int64_t at_s);

struct zone_date {
	int32_t year, month, day; /* 1.. */
};

/* The proleptic Gregorian date of local seconds, and back. */
struct zone_date zone_date(int64_t local_s);
int64_t zone_day_number(struct zone_date d); /* days since 1970-01-01 */

/* a / b rounded down, for negative a too. */
static inline int64_t zone_floor(int64_t a, int64_t b)
{
	return a / b - (a % b < 0);
}
