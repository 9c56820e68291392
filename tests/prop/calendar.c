/* SPDX-License-Identifier: MIT */
/*
 * Goal: the next point of a calendar event is right in every zone, over leap days and clock
 * changes.  Method: (1) random events, against a model that looks at each minute of real
 * time, one after the other, for years; (2) dates that people know, among them the nights
 * in which clocks change; (3) words, good and bad.
 */
#include <string.h>

#include "snapd/policy/calendar.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/rand.h"

static const char *const zones[] = {"UTC", "Europe/Berlin", "America/St_Johns",
				    "Australia/Lord_Howe", "America/Santiago"};

static struct zone *zone_of(const char *name)
{
	struct zone *zone;
	struct err e = {};

	check(!zone_open(name, &zone, &e), "%s", e.text);
	return zone;
}

static int64_t unix_of(int y, int m, int d, int hour, int minute)
{
	return zone_day_number((struct zone_date){y, m, d}) * 86400 + hour * 3600 + minute * 60;
}

/* ---- the model: whole minutes ---- */

static bool shown(const struct calendar *c, int64_t local_s)
{
	struct zone_date d = zone_date(local_s), next = {d.year, d.month, d.day};
	int64_t weekday = (zone_floor(local_s, 86400) + 3) % 7;
	int left = 1;

	while (next = zone_date(local_s + left * 86400ll), next.month == d.month)
		left++;
	return c->months >> d.month & 1 && c->days >> (c->days_from_end ? left : d.day) & 1 &&
	       c->weekdays >> weekday & 1 && c->hours >> local_s / 3600 % 24 & 1 &&
	       c->minutes >> local_s / 60 % 60 & 1 &&
	       c->years[(d.year - 1970) / 64] >> (d.year - 1970) % 64 & 1;
}

/* Did the clock show that minute in the day before? */
static bool shown_before(const struct zone *zone, int64_t at_s)
{
	for (int64_t t = at_s - 60; t > at_s - 3 * 3600; t -= 60)
		if (zone_local(zone, t) == zone_local(zone, at_s))
			return true;
	return false;
}

static bool model_due(const struct calendar *c, const struct zone *zone, int64_t at_s)
{
	int64_t local_s = zone_local(zone, at_s), before_s = zone_local(zone, at_s - 60);
	bool names_hour = c->hours != (1u << 24) - 1;

	if (names_hour)
		for (int64_t missing = before_s + 60; missing < local_s; missing += 60)
			if (shown(c, missing))
				return true;
	if (!shown(c, local_s))
		return false;
	return !names_hour || !shown_before(zone, at_s);
}

static void random_number(struct rand *r, int low, int high, char *text)
{
	int from = low + (int)rand_below(r, (uint64_t)(high - low + 1));
	int to = from + (int)rand_below(r, (uint64_t)(high - from + 1));

	switch (rand_below(r, 6)) {
	case 0:
	case 1:
		strcpy(text, "*");
		break;
	case 2:
		sprintf(text, "%d..%d", from, to);
		break;
	case 3:
		sprintf(text, "%d,%d", from, to);
		break;
	case 4:
		sprintf(text, "*/%d", 1 + (int)rand_below(r, 9));
		break;
	default:
		sprintf(text, "%d", from);
	}
}

static void random_event(struct rand *r, char *text)
{
	static const char *const days[] = {"", "Mon ", "Sat,Sun ", "Fri..Mon "};
	char month[24], day[24], hour[24], minute[24];

	random_number(r, 1, 12, month);
	random_number(r, 1, 28, day);
	random_number(r, 0, 23, hour);
	random_number(r, 0, 59, minute);
	sprintf(text, "%s*-%s%c%s %s:%s", days[rand_below(r, 4)], rand_below(r, 3) ? "*" : month,
		rand_below(r, 5) ? '-' : '~', rand_below(r, 2) ? "*" : day, hour, minute);
}

/* Each point from a random minute on, over a stretch around a clock change or a year's end. */
static void against_model(struct rand *r)
{
	struct zone *zone = zone_of(zones[rand_below(r, ARRAY_SIZE(zones))]);
	int64_t at_s = unix_of(2020, 1, 1, 0, 0) + (int64_t)rand_below(r, 8 * 366ull * 1440) * 60,
		end_s;
	struct zone_span span = zone_span(zone, at_s);
	struct calendar c;
	struct err e = {};
	char text[128];
	int64_t next_s;

	if (rand_below(r, 4) && span.end_s != INT64_MAX)
		at_s = span.end_s - 86400;
	end_s = at_s + 3 * 86400;
	random_event(r, text);
	if (calendar_parse(text, &c, &e)) {
		check(strstr(e.text, "never"), "'%s': %s", text, e.text);
		zone_close(zone);
		return;
	}
	next_s = calendar_next(&c, zone, at_s);
	for (int64_t t = at_s + 60; t < end_s; t += 60) {
		bool due = model_due(&c, zone, t);

		check(due == (next_s == t),
		      "'%s' after %lld: at %lld the model says %d, calendar %lld", text,
		      (long long)at_s, (long long)t, due, (long long)next_s);
		if (due)
			next_s = calendar_next(&c, zone, t);
	}
	check(next_s >= end_s, "'%s': %lld was passed over", text, (long long)next_s);
	zone_close(zone);
}

/* ---- known dates ---- */

static void known(const char *text, const char *zone_name, int64_t after_s, int64_t want_s)
{
	struct zone *zone = zone_of(zone_name);
	struct calendar c;
	struct err e = {};
	int64_t got;

	check(!calendar_parse(text, &c, &e), "%s", e.text);
	got = calendar_next(&c, zone, after_s);
	check(got == want_s, "'%s' in %s after %lld: %lld, not %lld", text, zone_name,
	      (long long)after_s, (long long)got, (long long)want_s);
	zone_close(zone);
}

static void known_dates(void)
{
	const char *berlin = "Europe/Berlin";

	known("daily", "UTC", unix_of(2026, 11, 21, 0, 0), unix_of(2026, 11, 22, 0, 0));
	known("weekly", "UTC", unix_of(2026, 11, 21, 12, 0), unix_of(2026, 11, 23, 0, 0));
	known("quarterly", "UTC", unix_of(2026, 11, 21, 0, 0), unix_of(2027, 1, 1, 0, 0));
	known(" Daily  Asia/Tokyo", "Asia/Tokyo", unix_of(2026, 11, 21, 0, 0),
	      unix_of(2026, 11, 21, 15, 0));
	known("*-02-29 12:00", "UTC", unix_of(2024, 2, 29, 12, 0), unix_of(2028, 2, 29, 12, 0));
	known("*-02-29 12:00", "UTC", unix_of(2096, 3, 1, 0, 0), unix_of(2104, 2, 29, 12, 0));
	known("*-02~01", "UTC", unix_of(2027, 3, 1, 0, 0), unix_of(2028, 2, 29, 0, 0));
	known("Mon *-05~07/1 08:00", "UTC", unix_of(2026, 1, 1, 0, 0), unix_of(2026, 5, 25, 8, 0));
	/* Put forward on 2026-03-29 at 02:00: 02:30 comes at 03:00 summer time, 01:00 UTC. */
	known("02:30", berlin, unix_of(2026, 3, 28, 12, 0), unix_of(2026, 3, 29, 1, 0));
	known("02:30", berlin, unix_of(2026, 3, 29, 1, 0), unix_of(2026, 3, 30, 0, 30));
	/* Put back on 2026-10-25 at 03:00: 02:30 comes in summer time only. */
	known("02:30", berlin, unix_of(2026, 10, 24, 12, 0), unix_of(2026, 10, 25, 0, 30));
	known("02:30", berlin, unix_of(2026, 10, 25, 0, 30), unix_of(2026, 10, 26, 1, 30));
	/* Every hour goes on, also through the hour that comes twice. */
	known("*:30", berlin, unix_of(2026, 10, 25, 0, 30), unix_of(2026, 10, 25, 1, 30));
	known("*:30", berlin, unix_of(2026, 3, 29, 0, 30), unix_of(2026, 3, 29, 1, 30));
	known("*-*-* 00:00:30", "UTC", unix_of(2026, 1, 1, 0, 0), unix_of(2026, 1, 1, 0, 0) + 30);
	known("2199-12-31", "UTC", unix_of(2026, 1, 1, 0, 0), unix_of(2199, 12, 31, 0, 0));
	known("2199-12-31", "UTC", unix_of(2199, 12, 31, 0, 0), INT64_MAX);
	known("Fri..Mon 10:00", "UTC", unix_of(2026, 11, 23, 10, 0), unix_of(2026, 11, 27, 10, 0));
}

static void words(void)
{
	static const char *const bad[] = {
		"",
		"never",
		"25:00",
		"12:60",
		"*-13-01",
		"*-00-01",
		"*-02-30",
		"1999..1998-01-01",
		"Mon..",
		"Mo 12:00",
		"12:00 12:00",
		"12:00 Mon",
		"*-*-* 1.5:0",
		"*/0:00",
		"12:00:00.5",
		"*-*-* Mars/Base",
		"../../etc/passwd",
		"12",
		"2400-01-01",
		"*,:00",
		"12:00 UTC UTC",
		"1..:00",
		"99999:00",
		"daily 12:00",
		"daily daily",
		"daily Mars/Base",
	};
	struct calendar c;

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		struct err e = {};

		check(calendar_parse(bad[i], &c, &e) == -EINVAL && e.text[0], "'%s' was taken",
		      bad[i]);
		/* What is no zone is not called one. */
		check(!strstr(e.text, "zone") || strstr(bad[i], "Mars") ||
			      strstr(bad[i], "daily ") || strstr(bad[i], " Mon"),
		      "'%s': %s", bad[i], e.text);
	}
	check(!calendar_parse(
		      "  mon,Wednesday..fri  2026..2030-*/3-1..7/2  9..17:0/15:00  Asia/Tokyo ", &c,
		      NULL),
	      "refused");
	check(c.weekdays == 0x1d && c.hours == 0x3fe00 && !strcmp(c.zone, "Asia/Tokyo") &&
		      c.minutes == (1ull | 1ull << 15 | 1ull << 30 | 1ull << 45) &&
		      c.days == 0xaa && c.months == (1 << 1 | 1 << 4 | 1 << 7 | 1 << 10),
	      "misread");
}

int main(int argc, char **argv)
{
	int rounds = argc > 1 ? atoi(argv[1]) : 150;
	struct rand r = rand_of(rand_seed());

	words();
	known_dates();
	for (int i = 0; i < rounds; i++)
		against_model(&r);
	printf("%d events, each as the model says\n", rounds);
	return 0;
}
