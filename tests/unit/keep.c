/* SPDX-License-Identifier: MIT */
/*
 * Goal: retention keeps what keep.h says, and no more.
 * Method: times and rules with the answer worked out by hand, in UTC and across the
 * ends of days, ISO weeks and years and an hour that comes twice; then random
 * histories against a slow reading of the same sentences.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/daemon/keep.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/rand.h"

#define NS 1000000000ull
#define NR 200u

static void set_zone(const char *zone)
{
	setenv("TZ", zone, 1);
	tzset();
}

static uint64_t at(int year, int month, int day, int hour, int min)
{
	struct tm tm = {.tm_year = year - 1900,
			.tm_mon = month - 1,
			.tm_mday = day,
			.tm_hour = hour,
			.tm_min = min,
			.tm_isdst = -1};

	return (uint64_t)mktime(&tm) * NS;
}

/* Which are kept, as a string of '+' and '-'. */
static void expect(const struct keep_rules *r, const uint64_t *times, size_t nr, const char *want)
{
	struct keep_item items[16];
	char got[17] = "";

	for (size_t i = 0; i < nr; i++)
		items[i] = (struct keep_item){.taken_ns = times[i], .tags = ""};
	keep_apply(r, items, nr);
	for (size_t i = 0; i < nr; i++)
		got[i] = items[i].reasons ? '+' : '-';
	if (strcmp(got, want) != 0)
		printf("got %s, want %s\n", got, want);
	CHECK(!strcmp(got, want));
}

static void test_periods(void)
{
	uint64_t times[] = {at(2024, 12, 29, 23, 0),  at(2024, 12, 30, 1, 0),
			    at(2024, 12, 31, 23, 59), at(2025, 1, 1, 0, 0),
			    at(2025, 1, 1, 0, 59),    at(2025, 1, 6, 0, 0)};

	expect(&(struct keep_rules){.periods[KEEP_LAST] = 2}, times, 6, "----++");
	expect(&(struct keep_rules){.periods[KEEP_HOURLY] = 2}, times, 6, "----++");
	expect(&(struct keep_rules){.periods[KEEP_HOURLY] = 3}, times, 6, "--+-++");
	expect(&(struct keep_rules){.periods[KEEP_DAILY] = 3}, times, 6, "--+-++");
	/* 30 December 2024 begins the first ISO week of 2025. */
	expect(&(struct keep_rules){.periods[KEEP_WEEKLY] = 3}, times, 6, "+---++");
	expect(&(struct keep_rules){.periods[KEEP_MONTHLY] = 9}, times, 6, "--+--+");
	expect(&(struct keep_rules){.periods[KEEP_YEARLY] = 1}, times, 6, "-----+");
	expect(&(struct keep_rules){.within_ns = 5 * 86400 * NS}, times, 6, "---+++");
	expect(&(struct keep_rules){.periods[KEEP_LAST] = 100}, times, 6, "++++++");
}

/* 26 October 2025 in Berlin: 02:30 comes twice, and is in two hours of one day. */
static void test_autumn(void)
{
	uint64_t first = 1761438600ull * NS, times[] = {first, first + 3600 * NS};

	set_zone("CET-1CEST,M3.5.0,M10.5.0/3");
	expect(&(struct keep_rules){.periods[KEEP_HOURLY] = 2}, times, 2, "++");
	expect(&(struct keep_rules){.periods[KEEP_DAILY] = 2}, times, 2, "-+");
	set_zone("UTC");
}

static void test_tags_and_pins(void)
{
	struct keep_item items[] = {{1, "", true, 9},
				    {2, "a", false, 9},
				    {3, "b,ab", false, 9},
				    {4, "x,a", false, 9},
				    {5, "aa,", false, 9}};

	keep_apply(&(struct keep_rules){.tags = "q,a"}, items, ARRAY_SIZE(items));
	CHECK(items[0].reasons == 1u << KEEP_PINNED && items[1].reasons == 1u << KEEP_TAG);
	CHECK(!items[2].reasons && items[3].reasons == 1u << KEEP_TAG && !items[4].reasons);
	keep_apply(&(struct keep_rules){.tags = ""}, items, ARRAY_SIZE(items));
	CHECK(!items[1].reasons && !items[4].reasons);
}

static void test_durations(void)
{
	static const char *const bad[] = {"",	      "1",   "h",  "1h1d",	   "1s",
					  "-1h",      "1h ", "0h", "99999999999h", "1d1d",
					  "9999999y", NULL};
	uint64_t ns;

	CHECK(!keep_parse_duration("36h", &ns, NULL) && ns == 36 * 3600 * NS);
	CHECK(!keep_parse_duration("1y2m3w4d5h", &ns, NULL) &&
	      ns == ((365 + 60 + 21 + 4) * 24 + 5) * 3600 * NS);
	for (size_t i = 0; bad[i]; i++)
		CHECK(keep_parse_duration(bad[i], &ns, NULL) == -EINVAL);
	CHECK(!keep_has_rule(&(struct keep_rules){0}));
	CHECK(keep_has_rule(&(struct keep_rules){.within_ns = 1}));
	CHECK(keep_has_rule(&(struct keep_rules){.periods[KEEP_YEARLY] = 1}));
}

static void stamp(enum keep_reason period, uint64_t ns, char *ret, size_t size)
{
	static const char *const formats[] = {[KEEP_HOURLY] = "%F %H %z",
					      [KEEP_DAILY] = "%F",
					      [KEEP_WEEKLY] = "%G-%V",
					      [KEEP_MONTHLY] = "%Y-%m",
					      [KEEP_YEARLY] = "%Y"};
	time_t t = (time_t)(ns / NS);
	struct tm tm;

	localtime_r(&t, &tm);
	strftime(ret, size, formats[period], &tm);
}

/* Is item i the newest of its period, and are there fewer than n later periods? */
static bool model(enum keep_reason period, uint32_t n, const struct keep_item *items, size_t nr,
		  size_t i)
{
	char mine[32], other[32], seen[NR][32];
	size_t nr_seen = 0;

	stamp(period, items[i].taken_ns, mine, sizeof(mine));
	for (size_t k = i + 1; k < nr; k++) {
		bool known = false;

		stamp(period, items[k].taken_ns, other, sizeof(other));
		if (!strcmp(mine, other))
			return false;
		for (size_t s = 0; s < nr_seen; s++)
			known |= !strcmp(seen[s], other);
		if (!known)
			strcpy(seen[nr_seen++], other);
	}
	return nr_seen < n;
}

static void test_random(struct rand *r)
{
	struct keep_item items[NR];
	uint64_t t = at(2023, 1, 1, 0, 0);
	size_t nr = 1 + rand_below(r, NR);
	struct keep_rules rules = {0};

	for (int p = KEEP_LAST; p <= KEEP_YEARLY; p++)
		rules.periods[p] = rand_below(r, 2) ? (uint32_t)rand_below(r, 12) : 0;
	for (size_t i = 0; i < nr; i++) {
		t += rand_below(r, rand_below(r, 8) ? 7200 : 40 * 86400) * NS;
		items[i] =
			(struct keep_item){.taken_ns = t, .tags = "", .pinned = !rand_below(r, 9)};
	}
	keep_apply(&rules, items, nr);
	for (size_t i = 0; i < nr; i++) {
		uint32_t want = items[i].pinned ? 1u << KEEP_PINNED : 0;

		if (nr - i <= rules.periods[KEEP_LAST])
			want |= 1u << KEEP_LAST;
		for (int p = KEEP_HOURLY; p <= KEEP_YEARLY; p++)
			if (model((enum keep_reason)p, rules.periods[p], items, nr, i))
				want |= 1u << p;
		CHECK(items[i].reasons == want);
	}
}

int main(void)
{
	struct rand r = rand_of(rand_seed());

	set_zone("UTC");
	test_periods();
	test_autumn();
	test_tags_and_pins();
	test_durations();
	for (int i = 0; i < 60; i++)
		test_random(&r);
	set_zone("CET-1CEST,M3.5.0,M10.5.0/3");
	for (int i = 0; i < 60; i++)
		test_random(&r);
	return 0;
}
