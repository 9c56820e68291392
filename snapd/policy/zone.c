// SPDX-License-Identifier: MIT
/* Time zones: see zone.h. */
#include "snapd/policy/zone.h"

#include <glib.h>
#include <stdlib.h>
#include <string.h>

/* Beyond these no zone has changes that anyone knows. */
#define EARLIEST_S (-2208988800ll) /* 1900 */
#define LATEST_S   7258118400ll	   /* 2200 */

struct zone {
	GTimeZone *tz;
};

/* GLib would open a path, too. */
static bool is_name(const char *name)
{
	return name[0] != '/' && !strstr(name, "..") &&
	       !name[strspn(name,
			    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_+-/")];
}

int zone_open(const char *name, struct zone **ret, struct err *e)
{
	GTimeZone *tz = NULL;
	struct zone *zone;

	if (!name || !*name)
		tz = g_time_zone_new_local();
	else if (is_name(name))
		tz = g_time_zone_new_identifier(name);
	if (!tz)
		return err_set(e, EINVAL, "no time zone '%.64s': want a name such as Europe/Berlin",
			       name);
	zone = malloc(sizeof(*zone));
	if (!zone) {
		g_time_zone_unref(tz);
		return err_set(e, ENOMEM, "out of memory");
	}
	zone->tz = tz;
	*ret = zone;
	return 0;
}

void zone_close(struct zone *zone)
{
	if (!zone)
		return;
	g_time_zone_unref(zone->tz);
	free(zone);
}

static int interval_at(const struct zone *zone, int64_t at_s)
{
	return g_time_zone_find_interval(zone->tz, G_TIME_TYPE_UNIVERSAL, at_s);
}

/* The first second in (low, high] whose interval is not `interval`'s or an earlier one. */
static int64_t first_after(const struct zone *zone, int interval, int64_t low, int64_t high)
{
	while (high - low > 1) {
		int64_t mid = low + (high - low) / 2;

		if (interval_at(zone, mid) > interval)
			high = mid;
		else
			low = mid;
	}
	return high;
}

int32_t zone_offset(const struct zone *zone, int64_t at_s)
{
	return g_time_zone_get_offset(zone->tz, interval_at(zone, at_s));
}

struct zone_span zone_span(const struct zone *zone, int64_t at_s)
{
	int i = interval_at(zone, at_s);
	struct zone_span s = {.start_s = INT64_MIN,
			      .end_s = INT64_MAX,
			      .offset_s = g_time_zone_get_offset(zone->tz, i)};

	if (at_s < LATEST_S && interval_at(zone, LATEST_S) > i)
		s.end_s = first_after(zone, i, at_s, LATEST_S);
	if (at_s > EARLIEST_S && interval_at(zone, EARLIEST_S) < i)
		s.start_s = first_after(zone, i - 1, EARLIEST_S, at_s);
	return s;
}

/* Days of the civil calendar, in years that begin in March, so that a leap day is a
 * year's last; 400 such years have 146097 days. */
int64_t zone_day_number(struct zone_date d)
{
	int64_t year = d.year - (d.month <= 2), era = zone_floor(year, 400);
	int64_t of_era = year - era * 400;
	int64_t month = d.month > 2 ? d.month - 3 : d.month + 9;
	int64_t of_year = (153 * month + 2) / 5 + d.day - 1;

	return era * 146097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719468;
}

struct zone_date zone_date(int64_t local_s)
{
	int64_t day = zone_floor(local_s, 86400) + 719468, era = zone_floor(day, 146097);
	int64_t of_era = day - era * 146097;
	int64_t year = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146096) / 365;
	int64_t of_year = of_era - (365 * year + year / 4 - year / 100);
	int64_t month = (5 * of_year + 2) / 153;

	return (struct zone_date){
		.year = (int32_t)(year + era * 400 + (month >= 10)),
		.month = (int32_t)(month < 10 ? month + 3 : month - 9),
		.day = (int32_t)(of_year - (153 * month + 2) / 5 + 1),
	};
}
