// SPDX-License-Identifier: MIT
/* Calendar events: see calendar.h. */
#include "snapd/policy/calendar.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "snapd/util/cleanup.h"

#define ALL_HOURS   ((1u << 24) - 1)
#define NR_YEARS    (CALENDAR_YEAR_MAX - CALENDAR_YEAR_MIN + 1)
#define DAYS_AHEAD  (NR_YEARS * 366)
#define VALUES_MAX  256
#define DAY_SECONDS 86400

static_assert(NR_YEARS <= VALUES_MAX, "a bit for each year");

/* ---- text: one number of a point, a set of values ---- */

struct value_set {
	uint64_t bits[VALUES_MAX / 64];
};

static bool has(const uint64_t *bits, int64_t n)
{
	return bits[n / 64] >> n % 64 & 1;
}

static bool parse_int(const char **p, int *ret)
{
	int n = 0, digits = 0;

	for (; **p >= '0' && **p <= '9' && digits < 5; (*p)++, digits++)
		n = n * 10 + **p - '0';
	*ret = n;
	return digits > 0 && digits < 5;
}

/* "*", "N", "A..B", each with "/STEP"; "N/STEP" goes on to the last value, which
 * for days counted from the month's end is 1. */
static bool parse_range(const char **p, int low, int high, bool from_end, struct value_set *set)
{
	int from = low, to = high, step = 1;
	bool all = **p == '*', open = false;

	if (all)
		(*p)++;
	else if (!parse_int(p, &from))
		return false;
	if (!all && (*p)[0] == '.' && (*p)[1] == '.') {
		*p += 2;
		if (!parse_int(p, &to))
			return false;
	} else if (!all) {
		open = **p == '/';
		to = open ? high : from;
	}
	if (**p == '/') {
		(*p)++;
		if (!parse_int(p, &step) || !step)
			return false;
	}
	if (from < low || to > high || from > to)
		return false;
	for (int n = from; n <= to && n >= low; n += open && from_end ? -step : step)
		set->bits[(n - low) / 64] |= 1ull << (n - low) % 64;
	return true;
}

/* Up to `end` (or the text's end); bit 0 of the set is `low`. */
static bool parse_values(const char *text, size_t len, int low, int high, bool from_end,
			 struct value_set *set)
{
	char copy[128];
	const char *p = copy;

	if (!len || len >= sizeof(copy))
		return false;
	memcpy(copy, text, len);
	copy[len] = '\0';
	*set = (struct value_set){0};
	while (parse_range(&p, low, high, from_end, set)) {
		if (!*p)
			return true;
		if (*p++ != ',')
			return false;
	}
	return false;
}

static bool parse_set(const char *text, size_t len, int low, int high, struct value_set *set)
{
	return parse_values(text, len, low, high, false, set);
}

/* ---- text: the parts ---- */

static int weekday_of(const char *p, size_t len)
{
	static const char *const names[] = {"monday", "tuesday",  "wednesday", "thursday",
					    "friday", "saturday", "sunday"};

	for (int i = 0; i < 7; i++)
		if ((len == 3 || len == strlen(names[i])) && !strncasecmp(p, names[i], len))
			return i;
	return -1;
}

/* "Mon", "Mon..Fri", "Sat,Sun". */
static bool parse_weekdays(const char *p, size_t len, uint8_t *ret)
{
	const char *end = p + len;
	uint8_t days = 0;

	while (p < end) {
		size_t n = strcspn(p, "., \t");
		int from = weekday_of(p, n), to = from;

		p += n;
		if (from >= 0 && p + 2 < end && p[0] == '.' && p[1] == '.') {
			p += 2;
			n = strcspn(p, "., \t");
			to = weekday_of(p, n);
			p += n;
		}
		if (from < 0 || to < 0)
			return false;
		for (int d = from;; d = (d + 1) % 7) {
			days |= (uint8_t)(1u << d);
			if (d == to)
				break;
		}
		if (p < end && *p++ != ',')
			return false;
	}
	*ret = days ? days : *ret;
	return days != 0;
}

static bool parse_date(const char *p, size_t len, struct calendar *c)
{
	const char *end = p + len, *day = memchr(p, '~', len), *month = p;
	struct value_set set;

	c->days_from_end = day != NULL;
	if (!day)
		day = memrchr(p, '-', len);
	if (!day)
		return false;
	if (memchr(p, '-', (size_t)(day - p))) {
		month = memchr(p, '-', (size_t)(day - p));
		if (!parse_set(p, (size_t)(month - p), CALENDAR_YEAR_MIN, CALENDAR_YEAR_MAX, &set))
			return false;
		memcpy(c->years, set.bits, sizeof(c->years));
		month++;
	}
	if (!parse_set(month, (size_t)(day - month), 1, 12, &set))
		return false;
	c->months = (uint16_t)(set.bits[0] << 1);
	if (!parse_values(day + 1, (size_t)(end - day - 1), 1, 31, c->days_from_end, &set))
		return false;
	c->days = (uint32_t)(set.bits[0] << 1);
	return true;
}

static bool parse_time(const char *p, size_t len, struct calendar *c)
{
	const char *end = p + len, *minute = memchr(p, ':', len), *second;
	struct value_set set;

	if (!minute || !parse_set(p, (size_t)(minute - p), 0, 23, &set))
		return false;
	c->hours = (uint32_t)set.bits[0];
	minute++;
	second = memchr(minute, ':', (size_t)(end - minute));
	if (!parse_set(minute, (size_t)((second ? second : end) - minute), 0, 59, &set))
		return false;
	c->minutes = set.bits[0];
	if (second && !parse_set(second + 1, (size_t)(end - second - 1), 0, 59, &set))
		return false;
	c->seconds = second ? set.bits[0] : 1;
	return true;
}

/* The word at the beginning, in full; NULL: it is not short for anything. */
static const char *long_form(const char *text, size_t len)
{
	static const char *const words[][2] = {
		{"minutely", "*-*-* *:*"},
		{"hourly", "*-*-* *:00"},
		{"daily", "*-*-* 00:00"},
		{"weekly", "Mon *-*-* 00:00"},
		{"monthly", "*-*-01 00:00"},
		{"quarterly", "*-01,04,07,10-01 00:00"},
		{"semiannually", "*-01,07-01 00:00"},
		{"yearly", "*-01-01 00:00"},
		{"annually", "*-01-01 00:00"},
	};

	for (size_t i = 0; i < ARRAY_SIZE(words); i++)
		if (strlen(words[i][0]) == len && !strncasecmp(text, words[i][0], len))
			return words[i][1];
	return NULL;
}

static void any_day(struct calendar *c)
{
	*c = (struct calendar){.months = 0x1ffe, .days = 0xfffffffe, .weekdays = 0x7f};
	memset(c->years, 0xff, sizeof(c->years));
	c->hours = 1;
	c->minutes = 1;
	c->seconds = 1;
}

/* The parts in their order; each at most once. */
static bool parse_parts(const char *p, struct calendar *c)
{
	enum { WEEKDAYS, DATE, TIME, ZONE } at = WEEKDAYS;
	const char *in_full;
	int parts = 0;

	any_day(c);
	p += strspn(p, " \t");
	in_full = long_form(p, strcspn(p, " \t"));
	if (in_full) {
		parse_parts(in_full, c);
		p += strcspn(p, " \t");
		at = ZONE;
		parts = 1;
	}
	for (p += strspn(p, " \t"); *p; p += strspn(p, " \t"), parts++) {
		size_t len = strcspn(p, " \t");
		bool is_date = memchr(p, '~', len) || (memchr(p, '-', len) && !memchr(p, ':', len));

		if (at <= WEEKDAYS && parse_weekdays(p, len, &c->weekdays)) {
			at = DATE;
		} else if (at <= DATE && is_date && parse_date(p, len, c)) {
			at = TIME;
		} else if (at <= TIME && parse_time(p, len, c)) {
			at = ZONE;
		} else if (parts && at <= ZONE && len < sizeof(c->zone) && !c->zone[0] &&
			   isalpha((unsigned char)*p)) {
			memcpy(c->zone, p, len);
		} else {
			return false;
		}
		p += len;
	}
	return parts > 0;
}

static bool day_matches(const struct calendar *c, int64_t day);

/* The 30th of February, or the first Monday of a year gone by, at most one cycle of weekdays
 * and leap days away. */
static bool ever_comes(const struct calendar *c)
{
	for (int64_t day = 0; day < DAYS_AHEAD; day++)
		if (day_matches(c, day))
			return true;
	return false;
}

int calendar_parse(const char *text, struct calendar *ret, struct err *e)
{
	struct zone *zone;

	if (!parse_parts(text, ret))
		return err_set(
			e, EINVAL,
			"'%.80s' is no time that recurs: want hourly, daily, Mon..Fri 02:30, "
			"*-*-01 04:00 or the like (systemd.time(7))",
			text);
	if (!ever_comes(ret))
		return err_set(e, EINVAL, "'%.80s' never comes", text);
	if (!ret->zone[0])
		return 0;
	if (zone_open(ret->zone, &zone, e))
		return -EINVAL;
	zone_close(zone);
	return 0;
}

/* ---- the next point ---- */

static int days_of_month(struct zone_date d)
{
	struct zone_date next = {d.year + d.month / 12, d.month % 12 + 1, 1};

	return (int)(zone_day_number(next) -
		     zone_day_number((struct zone_date){d.year, d.month, 1}));
}

/* `day`: since 1970-01-01, a Thursday. */
static bool day_matches(const struct calendar *c, int64_t day)
{
	struct zone_date d = zone_date(day * DAY_SECONDS);
	int number = c->days_from_end ? days_of_month(d) - d.day + 1 : d.day;

	return d.year >= CALENDAR_YEAR_MIN && d.year <= CALENDAR_YEAR_MAX &&
	       has(c->years, d.year - CALENDAR_YEAR_MIN) && c->months >> d.month & 1 &&
	       c->days >> number & 1 && c->weekdays >> (((day + 3) % 7 + 7) % 7) & 1;
}

/* The first value in the set that is at least `from`; -1: none. */
static int at_least(uint64_t set, int from)
{
	if (from > 63 || !(set >> from))
		return -1;
	return from + __builtin_ctzll(set >> from);
}

/* The first time of day, in seconds, at or after `from`; -1: none that day. */
static int64_t time_in_day(const struct calendar *c, int64_t from)
{
	int hour = (int)(from / 3600), minute = (int)(from / 60 % 60), second = (int)(from % 60);

	for (int h = at_least(c->hours, hour); h >= 0; h = at_least(c->hours, h + 1)) {
		int m = at_least(c->minutes, h == hour ? minute : 0);

		for (; m >= 0; m = at_least(c->minutes, m + 1)) {
			int s = at_least(c->seconds, h == hour && m == minute ? second : 0);

			if (s >= 0)
				return h * 3600 + m * 60 + s;
		}
	}
	return -1;
}

/* The first point of the wall's clock at or after `local_s`; INT64_MAX: none. */
static int64_t next_local(const struct calendar *c, int64_t local_s)
{
	int64_t day = zone_floor(local_s, DAY_SECONDS), from = local_s - day * DAY_SECONDS;

	for (int i = 0; i < DAYS_AHEAD; i++, day++, from = 0) {
		int64_t at = day_matches(c, day) ? time_in_day(c, from) : -1;

		if (at >= 0)
			return day * DAY_SECONDS + at;
	}
	return INT64_MAX;
}

int64_t calendar_next(const struct calendar *c, const struct zone *zone, int64_t after_s)
{
	bool names_hour = c->hours != ALL_HOURS;
	int64_t at_s = after_s + 1;

	for (;;) {
		struct zone_span span = zone_span(zone, at_s);
		int64_t from = at_s + span.offset_s, next;

		/* What the clock showed before it was put back does not come again. */
		if (names_hour && span.start_s != INT64_MIN)
			from = MAX(from, span.start_s + zone_offset(zone, span.start_s - 1));
		next = next_local(c, from);
		if (next == INT64_MAX)
			return INT64_MAX;
		if (span.end_s == INT64_MAX || next - span.offset_s < span.end_s)
			return next - span.offset_s;
		/* Put forward: what would have come in the hour left out comes now. */
		if (names_hour && next < span.end_s + zone_offset(zone, span.end_s))
			return span.end_s;
		at_s = span.end_s;
	}
}
