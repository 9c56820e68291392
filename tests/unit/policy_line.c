/* SPDX-License-Identifier: MIT */
/*
 * Goal: a policy's line does with a real VM thread, real snapshots and real prunes what policy.h
 * says of points in time, through years, clock changes and jumps, and through runs that fail.
 * Method: line_step() is told the time of a fake clock; jobs take as long as they take while it
 * stands still.  The schedule is the one that is hardest to get right: 02:30 on each Sunday in
 * Europe/Berlin, where on two Sundays of a year 02:30 is not there, or comes twice.
 */
#include <string.h>
#include <unistd.h>

#include "snapd/schedule/line.h"
#include "snapd/store.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/fake_agent.h"
#include "tests/lib/rand.h"
#include "tests/lib/service.h"

#define PAGES	8u
#define DAY_S	86400
#define BEGIN_S (1798761600 + 12 * 3600) /* 2027-01-01 12:00 UTC, a Friday: a leap day is ahead */

static struct service service;
static struct fake_agent agent;
static struct line line;
static int64_t now_s;

static struct policy *policy_of(const char *const words[][2], size_t nr)
{
	struct policy *p;
	struct err e = {0};

	check(!policy_new("weekly", &p, &e), "%s", e.text);
	for (size_t i = 0; i < nr; i++)
		check(!policy_set(p, words[i][0], words[i][1], &e), "%s", e.text);
	check(!policy_finish(p, &e), "%s", e.text);
	return p;
}

/* Look once, and until what it begins has ended. */
static void look(const struct policy *p)
{
	line_step(&line, &service.d, p, now_s);
	for (int i = 0; line.state != LINE_IDLE; i++) {
		check(i < 100000, "stuck in %s", line_state_names[line.state]);
		usleep(100);
		line_step(&line, &service.d, p, now_s);
	}
}

static uint64_t nr_snapshots(void)
{
	_cleanup_free_ struct store_snapshot *list = NULL;
	size_t nr = 0;

	check(!store_snapshot_list(service.d.store, NULL, &list, &nr, NULL), "list");
	return nr;
}

static bool is_sunday(int64_t day)
{
	return (day + 3) % 7 == 6;
}

/* One run on each Sunday, at 02:30 as the clock on the wall has it, or when that hour is left
 * out; a look comes at most half an hour late.  On other days hours pass between two. */
static void three_years(const struct policy *p, struct rand *r)
{
	int64_t end_s = BEGIN_S + 3 * 366ll * DAY_S; /* a Thursday */
	uint64_t ran = 0, sundays = 0;

	for (int64_t last = 0; now_s < end_s;) {
		int64_t local_s = zone_local(p->zone, now_s), day = zone_floor(local_s, DAY_S);
		int64_t of_day = local_s - day * DAY_S;

		sundays += day != last && is_sunday(day);
		look(p);
		if (line.runs > ran)
			check(line.runs == ran + 1 && is_sunday(day) && of_day >= 9000 &&
				      of_day <= 9000 + 5400,
			      "it ran at %lld s of day %lld", (long long)of_day, (long long)day);
		ran = line.runs;
		last = day;
		now_s += 60 + (int64_t)rand_below(
				      r, is_sunday(day) || is_sunday(day + 1) ? 1740 : 4 * 3600);
	}
	check(ran == sundays && ran > 150, "%llu runs on %llu Sundays", (unsigned long long)ran,
	      (unsigned long long)sundays);
	check(!line.failures && !line.skipped, "%s", line.said);
}

/* Points that a jump passes over, or that pass while the VM is not there, make one run. */
static void jumps(const struct policy *p)
{
	uint64_t ran = line.runs;

	now_s += 90 * DAY_S;
	look(p);
	look(p);
	check(line.runs == ran + 1, "%llu runs after a jump ahead",
	      (unsigned long long)(line.runs - ran));
	now_s -= 900 * DAY_S;
	for (int64_t end_s = now_s + 8 * DAY_S; now_s < end_s; now_s += 1800)
		look(p);
	check(line.runs >= ran + 2, "waits until the clock has caught up");
	ran = line.runs;
	line.attached = false;
	for (int64_t end_s = now_s + 30 * DAY_S; now_s < end_s; now_s += 3600)
		look(p);
	check(line.runs == ran, "ran without its VM");
	line.attached = true;
	look(p);
	look(p);
	check(line.runs == ran + 1, "%llu runs make up for a month",
	      (unsigned long long)(line.runs - ran));
}

/* It fails, says why, and makes room all the same. */
static void failing(void)
{
	_cleanup_(cleanup_policy) struct policy *p =
		policy_of((const char *const[][2]){{"schedule", "hourly"}, {"keep_last", "2"}}, 2);
	uint64_t failures = line.failures, ran = line.runs;

	check(nr_snapshots() > 100, "nothing to prune");
	agent.fail_at = SNAPD_MSG_PAUSE;
	line.wanted = true;
	look(p);
	check(line.runs == ran + 1 && line.failures == failures + 1 && *line.said,
	      "it did not fail");
	check(line.asked.ended == 1 && !strcmp(line.asked.said, line.said), "nobody is answered");
	check(nr_snapshots() == 2, "%llu snapshots stay", (unsigned long long)nr_snapshots());
	now_s += 3601;
	look(p);
	check(line.failures == failures + 1 && !*line.said && nr_snapshots() == 2, "%s", line.said);
}

/* Each fourth, wherever it begins; one that fails does not count. */
static void self_checks(void)
{
	_cleanup_(cleanup_policy) struct policy *p = policy_of(
		(const char *const[][2]){{"schedule", "hourly"}, {"self_check_every", "4"}}, 2);
	uint32_t left = line.unchecked % 4;

	for (int i = 0; i < 9; i++) {
		bool fails = i == 3;

		agent.fail_at = fails ? SNAPD_MSG_PAUSE : 0;
		now_s += 3601;
		look(p);
		check(line.unchecked % 4 == (fails ? left : (left + 3) % 4), "%u after %u",
		      line.unchecked, left);
		left = line.unchecked % 4;
	}
}

static void run_once(const struct policy *p)
{
	uint64_t ran = line.runs;

	line.wanted = true;
	look(p);
	check(line.runs == ran + 1 && !*line.said, "%s", line.said);
}

/* Until no push is under way or to come. */
static void back_up(const struct policy *p)
{
	for (int i = 0; !line_backup_is_idle(&line, p); i++) {
		check(i < 100000 && !line.backup.failures, "%s", line.backup.said);
		usleep(100);
		line_step(&line, &service.d, p, now_s);
	}
}

/* With backup_hold = no the newest alone is pushed, and nothing waits for it; else each is, before
 * it may go. */
static void holding(void)
{
	char url[128];
	_cleanup_(cleanup_policy) struct policy *none =
		policy_of((const char *const[][2]){{"every", "1h"}, {"keep_last", "all"}}, 2);
	_cleanup_(cleanup_policy) struct policy *newest = NULL, *each = NULL;
	uint64_t pushed;

	snprintf(url, sizeof(url), "file://%s/backup-repository", service.dir);
	newest = policy_of((const char *const[][2]){{"every", "1h"},
						    {"keep_last", "all"},
						    {"backup", url},
						    {"backup_hold", "no"}},
			   4);
	each = policy_of(
		(const char *const[][2]){{"every", "1h"}, {"keep_last", "all"}, {"backup", url}},
		3);
	service.d.config.store_dir = service.dir; /* where what is known of a repository lies */
	for (int i = 0; i < 3; i++)
		run_once(none);
	line_step(&line, &service.d, newest, now_s);
	back_up(newest);
	check(line.backup.pushed == 1, "%llu pushed, not the newest alone",
	      (unsigned long long)line.backup.pushed);
	run_once(none);
	pushed = line.backup.pushed;
	line_step(&line, &service.d, each, now_s);
	back_up(each);
	check(line.backup.pushed == pushed + nr_snapshots() - 1, "%llu pushed of %llu",
	      (unsigned long long)(line.backup.pushed - pushed),
	      (unsigned long long)nr_snapshots());
	service.d.config.store_dir = NULL;
}

static uint64_t points_left_out(const struct policy *p)
{
	uint64_t ran = line.runs, left_out = 0;

	for (; line.runs == ran; now_s += 60) {
		uint64_t skipped = line.skipped;

		check(left_out < 100, "it never runs again");
		look(p);
		left_out += line.skipped - skipped;
	}
	return left_out;
}

static void say_pause(bool dear)
{
	atomic_store(&agent.paused_ns, dear ? 1000000000000000 : 0);
}

/* Pages written to, each by a fault of its own. */
static void say_faults(bool dear)
{
	if (dear)
		atomic_fetch_add(&agent.shm->published, 1ull << 40);
}

/* While runs are over a bound it leaves out 1, 3, 7, at most 63 points; half as many after each
 * that is not. */
static void backs_off(const char *bound, const char *value, void (*say)(bool dear))
{
	static const uint64_t expect[] = {0, 1, 3, 7, 15, 31, 63, 63, 63, 31, 15, 7, 3, 1, 0, 0};
	_cleanup_(cleanup_policy) struct policy *p =
		policy_of((const char *const[][2]){{"every", "1m"}, {bound, value}}, 2);

	now_s += 60;
	say(false);
	points_left_out(p);
	for (size_t i = 0; i < ARRAY_SIZE(expect); i++) {
		uint64_t n;

		say(i < 8);
		n = points_left_out(p);
		check(n == expect[i], "%s: %llu points left out before run %zu", bound,
		      (unsigned long long)n, i);
	}
	check(!line.failures || !*line.said, "%s", line.said);
}

static void forgetting(const struct policy *p)
{
	_cleanup_(cleanup_policy) struct policy *backed = policy_of(
		(const char *const[][2]){{"every", "1h"}, {"backup", "file:///nowhere"}}, 2);

	line.there_s = now_s;
	line.attached = false;
	check(!line_is_over(&line, p, now_s + LINE_FORGET_S), "a VM is forgotten too soon");
	check(line_is_over(&line, p, now_s + LINE_FORGET_S + 1), "a VM is remembered for ever");
	check(!line_is_over(&line, backed, now_s + LINE_FORGET_S + 1),
	      "so is what is to be pushed");
	line.attached = true;
	check(!line_is_over(&line, p, now_s + LINE_FORGET_S + 1), "one that is there is forgotten");
}

int main(void)
{
	_cleanup_(cleanup_policy) struct policy *p = policy_of(
		(const char *const[][2]){{"schedule", "Sun 02:30"}, {"timezone", "Europe/Berlin"}},
		2);
	struct rand r = rand_of(rand_seed());

	service_start(&service, NULL);
	fa_init(&agent, "vm", PAGES, 0);
	check(service_attach(&service, &agent), "attach");
	now_s = BEGIN_S;
	line_init(&line, &service.d, p, "vm", getuid(), now_s);
	line.attached = true;
	three_years(p, &r);
	jumps(p);
	failing();
	self_checks();
	backs_off("max_pause", "1s", say_pause);
	backs_off("max_paused", "100%", say_pause);
	backs_off("max_overhead", "100%", say_faults);
	forgetting(p);
	holding();
	line_stop(&line);
	fa_disconnect(&agent);
	fa_deinit(&agent);
	service_stop(&service);
	printf("%llu runs of a line, as the clock says\n", (unsigned long long)line.runs);
	return 0;
}
