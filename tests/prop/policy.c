/* SPDX-License-Identifier: MIT */
/*
 * Goal: runs come when they are due, whatever the clock does, over years.
 * Method: a fake clock goes on in random steps, jumps forward (sleep, a host that was off)
 * and back (a clock put right), while a line of a random policy is asked and run.  After
 * each step it must hold:
 *   - what has just run is not due again before its next point;
 *   - nothing is waited for longer than a period (and its jitter) from now on;
 *   - without jumps a period is kept to the second, for ever;
 *   - missed = skip runs nothing later than POLICY_LATE_S after its point; missed = run
 *     runs once after a gap, however many points were in it.
 * With a recovery point: epochs that cost what is expected are durable in time, and are not
 * made more often than that takes; those that cost more come back to back.
 * Then words of the file, good and bad.
 */
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "snapd/policy/policy.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/inifile.h"
#include "tests/lib/check.h"
#include "tests/lib/rand.h"

#define START_S 1750000000ll

static struct policy *policy_of(const char *const words[][2], size_t nr)
{
	struct policy *p;
	struct err e = {};

	check(!policy_new("nightly", &p, &e), "%s", e.text);
	for (size_t i = 0; i < nr; i++)
		check(!words[i][0] || !policy_set(p, words[i][0], words[i][1], &e), "%s", e.text);
	check(!policy_finish(p, &e), "%s", e.text);
	return p;
}

struct clock {
	int64_t now_s;
	bool jumped_back;
	int64_t passed_s; /* in the last step */
};

static void tick(struct clock *c, struct rand *r, int64_t step_s, bool jumps)
{
	uint64_t die = rand_below(r, 100);

	c->jumped_back = jumps && die == 0;
	c->passed_s = 1 + (int64_t)rand_below(r, (uint64_t)step_s);
	if (jumps && die == 1)
		c->passed_s = (int64_t)rand_below(r, 90 * 86400);
	c->now_s += c->jumped_back ? -(int64_t)rand_below(r, 90 * 86400) : c->passed_s;
}

static const char *const periods[] = {"1s", "15s", "5m", "1h", "1d", "1w"};
static const int64_t period_s[] = {1, 15, 300, 3600, 86400, 604800};

static void by_period(struct rand *r)
{
	size_t which = rand_below(r, ARRAY_SIZE(periods));
	bool skip = rand_below(r, 2), with_jitter = which > 1 && rand_below(r, 2),
	     jumps = rand_below(r, 2);
	_cleanup_(cleanup_policy) struct policy *p =
		policy_of((const char *const[][2]){{"every", periods[which]},
						   {"missed", skip ? "skip" : "run"},
						   {with_jitter ? "jitter" : NULL, "10s"}},
			  3);
	int64_t period = period_s[which], last_s = START_S, first_due, runs = 0;
	struct clock clock = {.now_s = START_S};

	first_due = policy_due(p, "web", &last_s, clock.now_s);
	check(first_due >= START_S + period && first_due <= START_S + period + 10, "first at %lld",
	      (long long)first_due);
	for (int i = 0; i < 2000; i++) {
		int64_t due_s;

		tick(&clock, r, skip ? MIN(period, POLICY_LATE_S - 10) : period, jumps);
		due_s = policy_due(p, "web", &last_s, clock.now_s);
		check(due_s <= clock.now_s + period + 10, "waits %lld s for a period of %lld",
		      (long long)(due_s - clock.now_s), (long long)period);
		if (due_s > clock.now_s)
			continue;
		check(!skip || clock.now_s - due_s <= POLICY_LATE_S, "runs %lld s late",
		      (long long)(clock.now_s - due_s));
		if (!jumps && period >= 2 * POLICY_LATE_S)
			check((due_s - first_due) % period == 0, "drifts");
		last_s = policy_ran(p, "web", due_s, clock.now_s);
		runs++;
		check(policy_due(p, "web", &last_s, clock.now_s) > clock.now_s,
		      "due again at once");
	}
	check(runs > 0 || (skip && (jumps || period > 3600)), "never ran");
}

/* Every point of a calendar is run once, in the minute it is due, and none twice. */
static void by_calendar(struct rand *r)
{
	static const char *const events[] = {"hourly", "02:30", "Mon..Fri 09,18:15", "*-*-01 04:00",
					     "*:0/10"};
	static const char *const zones[] = {"UTC", "Europe/Berlin", "America/New_York"};
	const char *event = events[rand_below(r, ARRAY_SIZE(events))];
	_cleanup_(cleanup_policy) struct policy *p =
		policy_of((const char *const[][2]){{"schedule", event},
						   {"timezone", zones[rand_below(r, 3)]},
						   {"missed", "skip"}},
			  3);
	int64_t now_s = START_S + (int64_t)rand_below(r, 2 * 365 * 86400ull), last_s = now_s;
	int64_t expect_s = calendar_next(&p->calendar, p->zone, now_s);

	for (int i = 0; i < 5000; i++) {
		int64_t due_s;

		now_s += 59;
		due_s = policy_due(p, "db", &last_s, now_s);
		if (expect_s > now_s) {
			check(due_s > now_s, "'%s' runs at %lld, not at %lld", event,
			      (long long)due_s, (long long)expect_s);
			continue;
		}
		check(due_s == expect_s, "'%s' runs at %lld, not at %lld", event, (long long)due_s,
		      (long long)expect_s);
		last_s = policy_ran(p, "db", due_s, now_s);
		expect_s = calendar_next(&p->calendar, p->zone, expect_s);
	}
}

static void after_a_gap(void)
{
	_cleanup_(cleanup_policy) struct policy *p =
		policy_of((const char *const[][2]){{"schedule", "daily"}, {"timezone", "UTC"}}, 2);
	int64_t last_s = START_S, now_s = START_S + 10 * 86400 + 5, due_s, runs = 0;

	for (int i = 0; i < 3600; i++, now_s++) {
		due_s = policy_due(p, "db", &last_s, now_s);
		if (due_s > now_s)
			continue;
		last_s = policy_ran(p, "db", due_s, now_s);
		runs++;
	}
	check(runs == 1, "%lld runs make up for ten days", (long long)runs);
}

static void by_recovery_point(struct rand *r)
{
	static const char *const points[] = {"50ms", "300ms", "1s", "60s"};
	_cleanup_(cleanup_policy) struct policy *p = policy_of(
		(const char *const[][2]){{"recovery_point", points[rand_below(r, 4)]}}, 1);
	uint64_t target_ns = p->recovery_point_ns, now_ns = rand_below(r, 1ull << 40);
	uint64_t cost_ns = 1 + rand_below(r, target_ns * 3 / 2), point_ns = 0;

	for (int i = 0; i < 1000; i++) {
		uint64_t begin_ns = policy_next_epoch(p, point_ns, cost_ns, now_ns);
		uint64_t taken_ns, durable_ns = begin_ns + cost_ns;

		check(begin_ns >= now_ns, "begins before now");
		taken_ns = begin_ns + rand_below(r, cost_ns);
		if (point_ns && (begin_ns > now_ns || 2 * cost_ns <= target_ns))
			check(durable_ns - point_ns == target_ns, "%llu ns exposed, of %llu",
			      (unsigned long long)(durable_ns - point_ns),
			      (unsigned long long)target_ns);
		if (cost_ns >= target_ns)
			check(begin_ns == MAX(now_ns, point_ns), "waits, and is late already");
		point_ns = taken_ns;
		now_ns = durable_ns;
	}
}

/* Intervals of an hour's worth of runs on a fake clock: a run is over a bound if and only if it is,
 * to the nanosecond. */
static void bounds(struct rand *r)
{
	_cleanup_(cleanup_policy) struct policy *p =
		policy_of((const char *const[][2]){{"every", "1m"},
						   {"max_pause", "20ms"},
						   {"max_paused", "2%"},
						   {"max_overhead", "5%"}},
			  4);
	_cleanup_(cleanup_policy) struct policy *free_one =
		policy_of((const char *const[][2]){{"every", "1m"}}, 1);

	for (int i = 0; i < 60; i++) {
		uint64_t interval_ns = (1 + rand_below(r, 4000000)) * 1000;
		uint64_t bound_ns = MIN(20000000ull, interval_ns / 50);
		struct policy_cost c = {.pause_ns = bound_ns,
					.interval_ns = interval_ns,
					.lost_ns = interval_ns / 20,
					.of_ns = interval_ns};

		check(!policy_is_over(p, &c), "%llu of %llu ns are within",
		      (unsigned long long)c.pause_ns, (unsigned long long)interval_ns);
		c.pause_ns++;
		check(policy_is_over(p, &c) && !policy_is_over(free_one, &c),
		      "a pause over the bound");
		c.pause_ns = 0;
		check(!policy_is_over(p, &c), "the overhead is within");
		c.lost_ns++;
		check(policy_is_over(p, &c) && !policy_is_over(free_one, &c),
		      "an overhead over the bound");
		c.of_ns = 0;
		check(!policy_is_over(p, &c), "an overhead of no time");
		c = (struct policy_cost){.pause_ns = 20000000};
		check(!policy_is_over(p, &c), "a first run has no share of the time");
		c.pause_ns++;
		check(policy_is_over(p, &c), "but a pause");
	}
}

static void words(void)
{
	static const char *const bad[][2] = {
		{"every", "5"},
		{"every", "0s"},
		{"every", ""},
		{"schedule", "sometimes"},
		{"owner", "root"},
		{"owner", "-1"},
		{"missed", "no"},
		{"min_free", "10GB"},
		{"max_pause", "0ms"},
		{"max_pause", "50"},
		{"max_paused", "2"},
		{"max_overhead", "0%"},
		{"max_paused", "101%"},
		{"keep_grid", "1x5m,1x7m"},
		{"keep_last", "-3"},
		{"paused", "maybe"},
		{"timezone", "Mars/Base"},
		{"hook_timeout", "soon"},
		{"recovery_point", "49ms"},
		{"recovery_point", "3601s"},
		{"recovery_point", "1"},
		{"recovery_point", "5m"},
		{"colour", "red"},
		{"vms", "a\nb"},
	};
	_cleanup_(cleanup_policy) struct policy *p = policy_of(
		(const char *const[][2]){{"every", "5m"}, {"vms", "web*, db"}, {"owner", "1000"}},
		3);
	struct policy *q;
	struct err e = {};

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		err_clear(&e);
		check(policy_set(p, bad[i][0], bad[i][1], &e) == -EINVAL && e.text[0],
		      "%s = %s was taken", bad[i][0], bad[i][1]);
	}
	check(policy_covers(p, "web7", 1000, "") && policy_covers(p, "db", 1000, "") &&
		      !policy_covers(p, "db2", 1000, "") && !policy_covers(p, "web7", 0, ""),
	      "covers the wrong VMs");
	check(!policy_set(p, "vm_tags", "gold, eu", &e) &&
		      policy_covers(p, "web7", 1000, "us,eu") &&
		      policy_covers(p, "db", 1000, "gold") &&
		      !policy_covers(p, "web7", 1000, "golden,us") &&
		      !policy_covers(p, "db", 1000, "") && !policy_covers(p, "x", 1000, "eu"),
	      "covers VMs with the wrong tags");
	check(policy_new("../x", &q, NULL) == -EINVAL && policy_new("", &q, NULL) == -EINVAL,
	      "bad names taken");
	check(!policy_new("both", &q, NULL) && policy_finish(q, NULL) == -EINVAL,
	      "no time, and taken");
	check(!policy_set(q, "every", "1h", NULL) && !policy_set(q, "schedule", "daily", NULL) &&
		      policy_finish(q, NULL) == -EINVAL,
	      "two times, and taken");
	policy_free(q);
	check(!policy_new("both", &q, NULL) && !policy_set(q, "every", "1h", NULL) &&
		      !policy_set(q, "recovery_point", "1s", NULL) &&
		      policy_finish(q, NULL) == -EINVAL,
	      "a period and a recovery point, and taken");
	policy_free(q);
	check(!policy_new("late", &q, NULL) && !policy_set(q, "jitter", "1s", NULL) &&
		      !policy_set(q, "recovery_point", "9s", NULL) &&
		      policy_finish(q, NULL) == -EINVAL,
	      "a recovery point with jitter, and taken");
	policy_free(q);
}

/* What a snapshot has no room for is refused here, and not at each run. */
static void long_tags(void)
{
	static const char name[] = "a-name-of-so-many-letters-that-few-are-left-for-all-the-tags";
	char tags[POLICY_VALUE_MAX];
	struct policy *p;
	size_t fits = POLICY_VALUE_MAX - strlen("policy:,") - sizeof(name);

	memset(tags, 't', sizeof(tags));
	check(!policy_new(name, &p, NULL) && !policy_set(p, "every", "1h", NULL), "made");
	tags[fits] = '\0';
	check(!policy_set(p, "tags", tags, NULL) && !policy_finish(p, NULL), "they fit");
	tags[fits] = 't';
	tags[fits + 1] = '\0';
	check(!policy_set(p, "tags", tags, NULL) && policy_finish(p, NULL) == -EINVAL,
	      "they do not fit");
	policy_free(p);
}

/* What its file could not hold is refused, and not lost at the next start. */
static void file_lines(void)
{
	char hook[POLICY_VALUE_MAX] = "", value[POLICY_VALUE_MAX];
	struct policy *p;

	memset(hook, 'h', INIFILE_LINE_MAX - strlen("pre_hook = "));
	check(!policy_new("x", &p, NULL) && !policy_set(p, "pre_hook", hook, NULL), "it fits");
	strcat(hook, "h");
	check(policy_set(p, "pre_hook", hook, NULL) == -EINVAL, "a line too long, and taken");
	for (const char *const *bad = (const char *const[]){"a ; b", " a", "a ", ";a", NULL}; *bad;
	     bad++) {
		snprintf(value, sizeof(value), "%s", *bad);
		check(policy_set(p, "pre_hook", value, NULL) == -EINVAL, "'%s' taken", *bad);
	}
	policy_free(p);
}

static int read_text(const char *dir, const char *text, size_t len, struct policy **ret,
		     struct err *e)
{
	char path[64];
	FILE *f;

	snprintf(path, sizeof(path), "%s/text.conf", dir);
	f = fopen(path, "w");
	check(f && fwrite(text, 1, len, f) == len && !fclose(f), "%s", path);
	*e = (struct err){0};
	return policy_read(dir, "text", ret, e);
}

/* What a person writes is in force as it stands, or refused by line: never a part of it. */
static void file_texts(const char *dir)
{
	char vms[INIFILE_LINE_MAX + 1] = "vms = ", text[1024], path[64];
	struct policy *p = NULL;
	struct err e;

	memset(vms + 6, 'v', INIFILE_LINE_MAX - 6);
	for (const char *const *end = (const char *const[]){"\n", "", NULL}; *end; end++) {
		snprintf(text, sizeof(text), "[policy]\r\n\t every = 5m\n  # a word\n%s%s", vms,
			 *end);
		check(!read_text(dir, text, strlen(text), &p, &e), "%s", e.text);
		check(strlen(policy_text(p, "vms")) == INIFILE_LINE_MAX - 6 && p->every_s == 300,
		      "cut off");
		policy_free(p);
		snprintf(text, sizeof(text), "every = 5m\n%sv%s", vms, *end);
		check(read_text(dir, text, strlen(text), &p, &e) == -EINVAL &&
			      strstr(e.text, "line 2: more than"),
		      "%s", e.text);
		snprintf(text, sizeof(text), "every = 5m\n%s\n\nevery = 6m%s", vms, *end);
		text[30] = '\0';
		check(read_text(dir, text, 230, &p, &e) == -EINVAL && strstr(e.text, "line 2: "),
		      "%s", e.text);
	}
	for (const char *const *bad =
		     (const char *const[]){
			     "every = 5m\nvms = a,\n   every = 1s\nb\n", "line 4: not",
			     "every = 5m\nvms = a,\n  b\n", "line 3: not 'name = value'",
			     "[policy]\nevery = 5m\nkeep_lost = 3\nkeep_list = 4\n",
			     "line 3: a policy has no setting \"keep_lost\"",
			     "every = 5m\nnothing\nkeep_lost = 3\n", "line 2: not",
			     "[polity]\nevery = 5m\n", "line 2: unknown section", NULL};
	     *bad; bad += 2)
		check(read_text(dir, bad[0], strlen(bad[0]), &p, &e) == -EINVAL &&
			      strstr(e.text, bad[1]),
		      "'%s' and not '%s' of %s", e.text, bad[1], bad[0]);
	snprintf(path, sizeof(path), "%s/text.conf", dir);
	unlink(path);
}

static void files(void)
{
	char dir[] = "policies.XXXXXX", path[64];
	_cleanup_(cleanup_policy) struct policy *p =
		policy_of((const char *const[][2]){{"every", "5m"},
						   {"keep_grid", "24x1h, 14x1d"},
						   {"pre_hook", "a; b"}},
			  3);
	_cleanup_(cleanup_policy) struct policy *q = NULL;
	struct err e = {};

	check(mkdtemp(dir), "mkdtemp");
	check(!policy_write(dir, p, &e), "%s", e.text);
	check(!policy_read(dir, "nightly", &q, &e), "%s", e.text);
	check(!memcmp(p->text, q->text, sizeof(p->text)) && q->every_s == 300 &&
		      q->keep.nr_grid == 2,
	      "not what was written: '%s'", policy_text(q, "pre_hook"));
	file_texts(dir);
	snprintf(path, sizeof(path), "%s/nightly.conf", dir);
	unlink(path);
	rmdir(dir);
}

int main(int argc, char **argv)
{
	int rounds = argc > 1 ? atoi(argv[1]) : 60;
	struct rand r = rand_of(rand_seed());

	words();
	long_tags();
	file_lines();
	files();
	after_a_gap();
	for (int i = 0; i < rounds; i++) {
		by_period(&r);
		by_calendar(&r);
		by_recovery_point(&r);
		bounds(&r);
	}
	printf("%d policies by period, %d by calendar\n", rounds, rounds);
	return 0;
}
