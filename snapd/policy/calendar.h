/* SPDX-License-Identifier: MIT */
/*
 * calendar: points of local time that recur, in the words of systemd.time(7), "Calendar
 * Events".  Pure: text in; from a time and a zone, the next point out.
 *
 *   [WEEKDAYS] [[YEAR-]MONTH-DAY] [HOUR:MINUTE[:SECOND]] [ZONE]
 *
 * Each number is "*", N, A..B, with "/STEP", or a list of those separated by commas;
 * "MONTH~DAY" counts days from the month's end.  Weekdays are Mon..Fri,Sun and the like.
 * minutely, hourly, daily, weekly, monthly, quarterly, semiannually and yearly (with or
 * without a zone) are short for what systemd takes them for.  Fractions of seconds are refused.
 *
 * Clocks that are put forward and back:
 *   - a point that names its hour and falls into the hour that is left out comes when that
 *     hour would have begun: nothing is lost for a day;
 *   - a point that names its hour and falls into the hour that comes twice comes the first
 *     time only;
 *   - points of every hour go by real time: none is made up for, none is left out.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "snapd/policy/zone.h"
#include "snapd/util/err.h"

#define CALENDAR_YEAR_MIN 1970
#define CALENDAR_YEAR_MAX 2199

struct calendar {
	/* Bit n of a set: the value n is in it (years: YEAR_MIN + n). */
	uint64_t years[4];
	uint16_t months; /* 1..12 */
	uint32_t days;	 /* 1..31, or from the end: 1 is the last */
	bool days_from_end;
	uint8_t weekdays; /* 0 Monday .. 6 */
	uint32_t hours;
	uint64_t minutes, seconds;
	char zone[64]; /* "" none named */
};

/* -EINVAL with the reason, also for a date that never comes. */
int calendar_parse(const char *text, struct calendar *ret, struct err *e);

/* The first point after `after_s` (Unix time); INT64_MAX: none up to YEAR_MAX. */
int64_t calendar_next(const struct calendar *c, const struct zone *zone, int64_t after_s);
