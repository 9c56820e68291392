/* SPDX-License-Identifier: MIT */
/*
 * Goal: retention keeps what its rules say and nothing depends on how often one prunes.
 * Method: (1) random rules over histories of years, decided by keep.c and by a slow
 * model that asks of each snapshot and each rule "is there a better one?"; (2) the same
 * histories pruned after every snapshot and pruned once: the same snapshots stay.
 * (3) words of the configuration, good and bad.
 */
#include <string.h>

#include "snapd/policy/keep.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/rand.h"

#define NR_MAX 400

static const char *const zones[] = {"UTC", "Europe/Berlin", "America/St_Johns", "Asia/Kathmandu",
				    "Australia/Lord_Howe"};
static const char *const some_tags[] = {"manual", "release", "a, manual", "man", ""};
static const char *const some_rules[] = {"manual", "b, release", "x,y"};
/* Which of the tags above a rule wants. */
static const bool wants[3][5] = {{true, false, true}, {false, true}, {false}};

static struct keep_rules random_rules(struct rand *r)
{
	static const char *const grids[] = {"24x1h, 14x1d, 6x30d", "4x15m,6x1h 3x6h", "10x1d",
					    "1x1h,1x1d"};
	struct keep_rules rules = {};
	struct err e = {};

	if (rand_below(r, 3) == 0)
		rules.last = rand_below(r, 10) ? (uint32_t)rand_below(r, 6) : KEEP_ALL;
	for (int p = 0; p < KEEP_NR_PERIODS; p++)
		if (rand_below(r, 3) == 0)
			rules.period[p] = rand_below(r, 12) ? (uint32_t)rand_below(r, 8) : KEEP_ALL;
	if (rand_below(r, 4) == 0)
		rules.within_s = 1 + rand_below(r, 40 * 86400);
	if (rand_below(r, 2))
		check(!keep_set(&rules, "grid", grids[rand_below(r, ARRAY_SIZE(grids))], &e), "%s",
		      e.text);
	if (rand_below(r, 4) == 0)
		snprintf(rules.tags, sizeof(rules.tags), "%s", some_rules[rand_below(r, 3)]);
	return rules;
}

static size_t random_history(struct rand *r, struct keep_snapshot *snaps)
{
	size_t nr = 1 + rand_below(r, NR_MAX);
	int64_t at_s = 1577836800 + (int64_t)rand_below(r, 10ull * 365 * 86400);
	uint64_t step_s = (uint64_t[]){60, 900, 3600, 86400, 86400 * 9}[rand_below(r, 5)];

	for (size_t i = 0; i < nr; i++) {
		snaps[i] = (struct keep_snapshot){.id = i + 1, .taken_s = at_s};
		snaps[i].tags = rand_below(r, 10) ? NULL : some_tags[rand_below(r, 5)];
		snaps[i].pinned = rand_below(r, 50) == 0;
		snaps[i].held = rand_below(r, 50) == 0;
		at_s += (int64_t)(rand_below(r, 20) ? rand_below(r, 2 * step_s)
						    : rand_below(r, 60 * step_s));
	}
	return nr;
}

/* ---- the model: years, months and hours by counting; no state between snapshots ---- */

static bool same_period(enum keep_period p, const struct zone *zone, int64_t a, int64_t b)
{
	int64_t la = zone_local(zone, a), lb = zone_local(zone, b);
	struct zone_date da = zone_date(la), db = zone_date(lb);
	int64_t monday_a = zone_day_number(da), monday_b = zone_day_number(db);

	while ((monday_a % 7 + 7) % 7 != 4)
		monday_a--;
	while ((monday_b % 7 + 7) % 7 != 4)
		monday_b--;
	switch (p) {
	case KEEP_HOURLY:
		return llabs(a - b) < 3600 && la - a == lb - b &&
		       zone_floor(la, 3600) == zone_floor(lb, 3600);
	case KEEP_DAILY:
		return !memcmp(&da, &db, sizeof(da));
	case KEEP_WEEKLY:
		return monday_a == monday_b;
	case KEEP_MONTHLY:
		return da.year == db.year && da.month == db.month;
	default:
		return da.year == db.year;
	}
}

/* Is `a` nearer to the present than `b`? */
static bool newer(const struct keep_snapshot *a, const struct keep_snapshot *b)
{
	return a->taken_s != b->taken_s ? a->taken_s > b->taken_s : a->id > b->id;
}

static bool newest_of_period(enum keep_period p, const struct zone *zone,
			     const struct keep_snapshot *s, const struct keep_snapshot *all,
			     size_t nr)
{
	for (size_t i = 0; i < nr; i++)
		if (newer(&all[i], s) && same_period(p, zone, all[i].taken_s, s->taken_s))
			return false;
	return true;
}

static bool model_period(uint32_t count, enum keep_period p, const struct zone *zone,
			 const struct keep_snapshot *s, const struct keep_snapshot *all, size_t nr)
{
	uint32_t before = 0;

	if (!count || !newest_of_period(p, zone, s, all, nr))
		return false;
	for (size_t i = 0; i < nr; i++)
		before += newer(&all[i], s) && newest_of_period(p, zone, &all[i], all, nr);
	return before < count;
}

static uint32_t model_step(const struct keep_rules *r, int64_t newest_s, int64_t taken_s)
{
	uint64_t reach_s = 0;

	for (uint32_t i = 0; i < r->nr_grid; i++) {
		int64_t begin_s = taken_s - taken_s % (int64_t)r->grid[i].span_s;

		reach_s += r->grid[i].count * r->grid[i].span_s;
		if ((uint64_t)MAX(newest_s - begin_s, 0) < reach_s)
			return i;
	}
	return KEEP_GRID_MAX;
}

static bool model_grid(const struct keep_rules *r, const struct keep_snapshot *s, int64_t newest_s,
		       const struct keep_snapshot *all, size_t nr)
{
	uint32_t step = model_step(r, newest_s, s->taken_s);

	if (step == KEEP_GRID_MAX)
		return false;
	for (size_t i = 0; i < nr; i++)
		if (newer(s, &all[i]) && model_step(r, newest_s, all[i].taken_s) == step &&
		    all[i].taken_s / (int64_t)r->grid[step].span_s ==
			    s->taken_s / (int64_t)r->grid[step].span_s)
			return false;
	return true;
}

static bool model_keeps(const struct keep_rules *r, const struct zone *zone,
			const struct keep_snapshot *s, const struct keep_snapshot *all, size_t nr)
{
	const struct keep_snapshot *newest = s;
	uint32_t before = 0;

	for (size_t i = 0; i < nr; i++) {
		before += newer(&all[i], s);
		if (newer(&all[i], newest))
			newest = &all[i];
	}
	if (!keep_has_rules(r) || newest == s || s->pinned || s->held || before < r->last)
		return true;
	if (r->within_s && (uint64_t)(newest->taken_s - s->taken_s) < r->within_s)
		return true;
	for (size_t rule = 0; s->tags && rule < ARRAY_SIZE(some_rules); rule++)
		for (size_t tag = 0; tag < ARRAY_SIZE(some_tags); tag++)
			if (!strcmp(r->tags, some_rules[rule]) && s->tags == some_tags[tag] &&
			    wants[rule][tag])
				return true;
	for (int p = 0; p < KEEP_NR_PERIODS; p++)
		if (model_period(r->period[p], p, zone, s, all, nr))
			return true;
	return model_grid(r, s, newest->taken_s, all, nr);
}

/* What is later than now stays, and the others are as if it had never been. */
static void against_model(const struct keep_rules *rules, const struct zone *zone, int64_t now_s,
			  const struct keep_snapshot *history, size_t nr)
{
	struct keep_snapshot got[NR_MAX], past[NR_MAX];
	size_t nr_past = 0;

	for (size_t i = 0; i < nr; i++)
		if (history[i].taken_s <= now_s)
			past[nr_past++] = history[i];
	memcpy(got, history, nr * sizeof(*got));
	keep_decide(rules, zone, now_s, got, nr);
	for (size_t i = 0; i < nr; i++) {
		check(!i || newer(&got[i - 1], &got[i]), "not newest first");
		check(got[i].keep == (got[i].taken_s > now_s ||
				      model_keeps(rules, zone, &got[i], past, nr_past)),
		      "snapshot %llu of %zu: %s, \"%s\"", (unsigned long long)got[i].id, nr,
		      got[i].keep ? "kept" : "dropped", got[i].why);
		check(got[i].why[0], "no reason");
	}
}

static size_t drop_unkept(struct keep_snapshot *snaps, size_t nr)
{
	size_t kept = 0;

	for (size_t i = 0; i < nr; i++)
		if (snaps[i].keep)
			snaps[kept++] = snaps[i];
	return kept;
}

static void often_as_once(const struct keep_rules *rules, const struct zone *zone,
			  const struct keep_snapshot *history, size_t nr)
{
	struct keep_snapshot often[NR_MAX], once[NR_MAX];
	size_t nr_often = 0, nr_once;

	for (size_t i = 0; i < nr; i++) {
		often[nr_often++] = history[i];
		keep_decide(rules, zone, INT64_MAX, often, nr_often);
		nr_often = drop_unkept(often, nr_often);
	}
	memcpy(once, history, nr * sizeof(*once));
	keep_decide(rules, zone, INT64_MAX, once, nr);
	nr_once = drop_unkept(once, nr);
	check(nr_often == nr_once, "pruned often %zu stay, once %zu", nr_often, nr_once);
	for (size_t i = 0; i < nr_once; i++)
		check(often[i].id == once[i].id, "pruned often %llu stays, once %llu",
		      (unsigned long long)often[i].id, (unsigned long long)once[i].id);
}

static void words(void)
{
	static const char *const bad[][2] = {
		{"grid", ""},
		{"grid", "24"},
		{"grid", "0x1h"},
		{"grid", "24x"},
		{"grid", "x1h"},
		{"grid", "24x1h,12x1h"},
		{"grid", "allx1h"},
		{"grid", "1x2d,1x1d"},
		{"grid", "24x7h,3x1d"},
		{"grid", "1x1s,1x2s,1x4s,1x8s,1x16s,1x32s,1x64s,1x128s,1x256s"},
		{"within", ""},
		{"within", "5"},
		{"within", "m"},
		{"within", "-5m"},
		{"within", "0s"},
		{"within", "5x"},
		{"within", "5 m"},
		{"within", "99999999999999999999s"},
		{"last", "-1"},
		{"last", "7x"},
		{"daily", "4294967295"},
		{"daily", ""},
		{"tags", ""},
		{"sometimes", "3"},
	};
	struct keep_rules rules = {};
	struct err e = {};

	check(!keep_set(&rules, "grid", " 24x1h, 14x1d 6x1M", &e), "%s", e.text);
	check(rules.nr_grid == 3 && rules.grid[2].count == 6 && rules.grid[2].span_s == 30 * 86400,
	      "misread");
	check(!keep_set(&rules, "within", "1h30m", &e) && rules.within_s == 5400, "misread");
	check(!keep_set(&rules, "last", "7", &e) && rules.last == 7, "misread");
	check(!keep_set(&rules, "weekly", "all", &e) && rules.period[KEEP_WEEKLY] == KEEP_ALL,
	      "misread");
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		err_clear(&e);
		check(keep_set(&rules, bad[i][0], bad[i][1], &e) == -EINVAL && e.text[0],
		      "%s '%s' was taken", bad[i][0], bad[i][1]);
	}
}

int main(int argc, char **argv)
{
	int rounds = argc > 1 ? atoi(argv[1]) : 300;
	struct rand r = rand_of(rand_seed());
	struct keep_snapshot history[NR_MAX];

	words();
	for (int i = 0; i < rounds; i++) {
		struct keep_rules rules = random_rules(&r);
		size_t nr = random_history(&r, history);
		struct zone *zone;
		struct err e = {};

		check(!zone_open(zones[rand_below(&r, ARRAY_SIZE(zones))], &zone, &e), "%s",
		      e.text);
		against_model(&rules, zone,
			      rand_below(&r, 2) ? INT64_MAX : history[rand_below(&r, nr)].taken_s,
			      history, MIN(nr, (size_t)120));
		often_as_once(&rules, zone, history, nr);
		zone_close(zone);
	}
	printf("%d histories: as the model says, and the same however often one prunes\n", rounds);
	return 0;
}
