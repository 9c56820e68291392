/* SPDX-License-Identifier: MIT */
/* Retention rules; see keep.h. */
#include "snapd/daemon/keep.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/util/cleanup.h"

#define NS	 1000000000ull
#define HOUR_NS	 (3600 * NS)
#define NO_LABEL INT64_MIN

const char *const keep_reason_names[KEEP_NR_REASONS] = {
	[KEEP_PINNED] = "pinned", [KEEP_LAST] = "last",	    [KEEP_HOURLY] = "hourly",
	[KEEP_DAILY] = "daily",	  [KEEP_WEEKLY] = "weekly", [KEEP_MONTHLY] = "monthly",
	[KEEP_YEARLY] = "yearly", [KEEP_WITHIN] = "within", [KEEP_TAG] = "tag",
};

bool keep_has_rule(const struct keep_rules *r)
{
	for (int i = KEEP_LAST; i <= KEEP_YEARLY; i++)
		if (r->periods[i])
			return true;
	return r->within_ns || r->tags;
}

/* A number that is the same for all times of one period, and only for those. */
static int64_t label_of(enum keep_reason period, uint64_t ns)
{
	time_t t = (time_t)(ns / NS);
	char week[8];
	struct tm tm;

	if (!localtime_r(&t, &tm))
		return (int64_t)t;
	switch (period) {
	case KEEP_HOURLY:
		/* With the offset: the hour that comes twice in autumn is two hours. */
		return ((tm.tm_year * 366LL + tm.tm_yday) * 24 + tm.tm_hour) * 200000 +
		       tm.tm_gmtoff;
	case KEEP_DAILY:
		return tm.tm_year * 366LL + tm.tm_yday;
	case KEEP_WEEKLY:
		strftime(week, sizeof(week), "%G%V", &tm);
		return atoi(week);
	case KEEP_MONTHLY:
		return tm.tm_year * 12LL + tm.tm_mon;
	case KEEP_YEARLY:
		return tm.tm_year;
	default:
		return 0;
	}
}

static void apply_last(uint32_t n, struct keep_item *items, size_t nr)
{
	for (size_t i = nr; i-- && n; n--)
		items[i].reasons |= 1u << KEEP_LAST;
}

static void apply_period(enum keep_reason period, uint32_t n, struct keep_item *items, size_t nr)
{
	int64_t seen = NO_LABEL;

	for (size_t i = nr; i-- && n;) {
		int64_t label = label_of(period, items[i].taken_ns);

		if (label == seen)
			continue;
		seen = label;
		items[i].reasons |= 1u << period;
		n--;
	}
}

static void apply_within(uint64_t within_ns, struct keep_item *items, size_t nr)
{
	for (size_t i = nr; i--;)
		if (items[nr - 1].taken_ns - items[i].taken_ns <= within_ns)
			items[i].reasons |= 1u << KEEP_WITHIN;
}

/* Is the word [w, w + len) one of the comma-separated list? */
static bool in_list(const char *list, const char *w, size_t len)
{
	while (*list) {
		size_t n = strcspn(list, ",");

		if (n == len && !memcmp(list, w, len))
			return true;
		list += n + (list[n] == ',');
	}
	return false;
}

static bool shares_tag(const char *a, const char *b)
{
	while (*a) {
		size_t n = strcspn(a, ",");

		if (n && in_list(b, a, n))
			return true;
		a += n + (a[n] == ',');
	}
	return false;
}

void keep_apply(const struct keep_rules *r, struct keep_item *items, size_t nr)
{
	for (size_t i = 0; i < nr; i++) {
		items[i].reasons = items[i].pinned ? 1u << KEEP_PINNED : 0;
		if (r->tags && shares_tag(items[i].tags, r->tags))
			items[i].reasons |= 1u << KEEP_TAG;
	}
	if (!nr)
		return;
	apply_last(r->periods[KEEP_LAST], items, nr);
	for (int p = KEEP_HOURLY; p <= KEEP_YEARLY; p++)
		apply_period((enum keep_reason)p, r->periods[p], items, nr);
	if (r->within_ns)
		apply_within(r->within_ns, items, nr);
}

int keep_parse_duration(const char *text, uint64_t *ret_ns, struct err *e)
{
	static const struct {
		char unit;
		uint64_t ns;
	} units[] = {
		{'y', 365 * 24 * HOUR_NS}, {'m', 30 * 24 * HOUR_NS}, {'w', 7 * 24 * HOUR_NS},
		{'d', 24 * HOUR_NS},	   {'h', HOUR_NS},
	};
	const char *p = text;
	uint64_t sum = 0;

	for (size_t u = 0; u < ARRAY_SIZE(units) && *p; u++) {
		char *end;
		unsigned long n;

		if (*p < '0' || *p > '9')
			break;
		n = strtoul(p, &end, 10);
		if (*end != units[u].unit)
			continue;
		if (n > 100000 || n * units[u].ns > UINT64_MAX / 8 - sum)
			break;
		sum += n * units[u].ns;
		p = end + 1;
	}
	if (*p || !sum)
		return err_set(e, EINVAL,
			       "\"%.40s\" is no duration: numbers with y, m, w, d, h, in that "
			       "order, such as 1y6m or 36h",
			       text);
	*ret_ns = sum;
	return 0;
}
