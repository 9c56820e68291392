// SPDX-License-Identifier: MIT
/* Retention: see keep.h. */
#include "snapd/policy/keep.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"

#define SPAN_MAX_S (1000ull * 366 * 86400)

const char *const keep_period_names[KEEP_NR_PERIODS] = {"hourly", "daily", "weekly", "monthly",
							"yearly"};

/* ---- text ---- */

int keep_parse_span(const char *text, uint64_t *ret)
{
	static const struct {
		char letter;
		uint64_t seconds;
	} units[] = {{'s', 1},	    {'m', 60},	    {'h', 3600},    {'d', 86400},
		     {'w', 604800}, {'M', 2592000}, {'y', 31536000}};
	uint64_t sum = 0;

	do {
		uint64_t n, unit = 0;
		char *end;

		if (*text < '0' || *text > '9')
			return -EINVAL;
		errno = 0;
		n = strtoull(text, &end, 10);
		for (size_t i = 0; i < ARRAY_SIZE(units); i++)
			if (*end == units[i].letter)
				unit = units[i].seconds;
		if (errno || !unit || n > (SPAN_MAX_S - sum) / unit)
			return -EINVAL;
		sum += n * unit;
		text = end + 1;
	} while (*text);
	*ret = sum;
	return sum ? 0 : -EINVAL;
}

static int parse_count(const char *text, uint32_t *ret)
{
	unsigned long n;
	char *end;

	if (!strcmp(text, "all")) {
		*ret = KEEP_ALL;
		return 0;
	}
	if (*text < '0' || *text > '9')
		return -EINVAL;
	errno = 0;
	n = strtoul(text, &end, 10);
	if (errno || *end || n >= KEEP_ALL)
		return -EINVAL;
	*ret = (uint32_t)n;
	return 0;
}

static int parse_step(const char *step, size_t len, struct keep_rules *rules)
{
	char text[32], *x;
	uint64_t span_s;
	uint32_t count;

	if (len >= sizeof(text) || rules->nr_grid == KEEP_GRID_MAX)
		return -EINVAL;
	memcpy(text, step, len);
	text[len] = '\0';
	x = strchr(text, 'x');
	if (!x)
		return -EINVAL;
	*x = '\0';
	if (parse_count(text, &count) || !count || count == KEEP_ALL ||
	    keep_parse_span(x + 1, &span_s) || span_s > SPAN_MAX_S / count)
		return -EINVAL;
	if (rules->nr_grid && (rules->grid[rules->nr_grid - 1].span_s >= span_s ||
			       span_s % rules->grid[rules->nr_grid - 1].span_s))
		return -EINVAL;
	rules->grid[rules->nr_grid].count = count;
	rules->grid[rules->nr_grid++].span_s = span_s;
	return 0;
}

static int parse_grid(const char *text, struct keep_rules *rules, struct err *e)
{
	const char *p = text;

	rules->nr_grid = 0;
	do {
		size_t len;

		p += strspn(p, ", ");
		len = strcspn(p, ", ");
		if (parse_step(p, len, rules))
			return err_set(e, EINVAL,
				       "grid '%.80s': want at most %d steps such as 24x1h, 14x1d, "
				       "6x30d, the "
				       "span of each a multiple of the one before",
				       text, KEEP_GRID_MAX);
		p += len;
	} while (p[strspn(p, ", ")]);
	return 0;
}

static int set_tags(struct keep_rules *rules, const char *value, struct err *e)
{
	if (!*value || strlen(value) >= sizeof(rules->tags))
		return err_set(e, EINVAL,
			       "tags: want 1 to %zu characters, tags separated by commas",
			       sizeof(rules->tags) - 1);
	snprintf(rules->tags, sizeof(rules->tags), "%s", value);
	return 0;
}

static int set_count(uint32_t *field, const char *key, const char *value, struct err *e)
{
	if (parse_count(value, field))
		return err_set(e, EINVAL, "%s '%.40s': want a number, or all", key, value);
	return 0;
}

int keep_set(struct keep_rules *rules, const char *key, const char *value, struct err *e)
{
	if (!strcmp(key, "last"))
		return set_count(&rules->last, key, value, e);
	for (int p = 0; p < KEEP_NR_PERIODS; p++)
		if (!strcmp(key, keep_period_names[p]))
			return set_count(&rules->period[p], key, value, e);
	if (!strcmp(key, "tags"))
		return set_tags(rules, value, e);
	if (!strcmp(key, "grid"))
		return parse_grid(value, rules, e);
	if (strcmp(key, "within") != 0)
		return err_set(e, EINVAL, "there is no rule \"%.40s\" for what to keep", key);
	if (keep_parse_span(value, &rules->within_s))
		return err_set(e, EINVAL, "within '%.40s': want a time such as 36h, 2w3d or 1y6M",
			       value);
	return 0;
}

/* ---- deciding ---- */

/* The next word of a list, without blanks at its ends; NULL: no more.  *list moves behind it. */
static const char *next_tag(const char **list, size_t *len)
{
	const char *word = *list + strspn(*list, ", ");

	*len = strcspn(word, ",");
	*list = word + *len;
	while (*len && word[*len - 1] == ' ')
		--*len;
	return *len ? word : NULL;
}

bool keep_has_tag(const char *tags, const char *tag)
{
	const char *word;
	size_t len;

	while ((word = next_tag(&tags, &len)))
		if (len == strlen(tag) && !strncmp(word, tag, len))
			return true;
	return false;
}

bool keep_has_rules(const struct keep_rules *r)
{
	bool any = r->last || r->within_s || r->nr_grid || r->tags[0];

	for (int p = 0; p < KEEP_NR_PERIODS; p++)
		any |= r->period[p] > 0;
	return any;
}

__attribute__((format(printf, 2, 3))) static void want(struct keep_snapshot *s, const char *fmt,
						       ...)
{
	size_t n = s->keep ? strlen(s->why) : 0;
	va_list ap;

	if (n && n + 2 < sizeof(s->why)) {
		memcpy(s->why + n, ", ", 3);
		n += 2;
	}
	s->keep = true;
	va_start(ap, fmt);
	vsnprintf(s->why + n, sizeof(s->why) - n, fmt, ap);
	va_end(ap);
}

static int newest_first(const void *x, const void *y)
{
	const struct keep_snapshot *a = x, *b = y;

	if (a->taken_s != b->taken_s)
		return a->taken_s < b->taken_s ? 1 : -1;
	return a->id < b->id ? 1 : a->id > b->id ? -1 : 0;
}

/* Equal for two times if and only if they are in the same hour, day, … there. */
static int64_t period_of(enum keep_period p, const struct zone *zone, int64_t taken_s)
{
	int64_t local = zone_local(zone, taken_s);
	struct zone_date d;

	switch (p) {
	case KEEP_HOURLY: /* when clocks go back, two hours of one name follow each other */
		return zone_floor(taken_s + (local - taken_s) % 3600, 3600);
	case KEEP_DAILY:
		return zone_floor(local, 86400);
	case KEEP_WEEKLY: /* 1970-01-01 was a Thursday */
		return zone_floor(zone_floor(local, 86400) + 3, 7);
	default:
		d = zone_date(local);
		return p == KEEP_MONTHLY ? (int64_t)d.year * 12 + d.month : d.year;
	}
}

static void decide_period(uint32_t count, enum keep_period p, const struct zone *zone,
			  struct keep_snapshot *snaps, size_t nr)
{
	static const char *const words[] = {"hour", "day", "week", "month", "year"};
	const struct keep_snapshot *first = NULL;
	int64_t at = 0;
	uint32_t n = 0;

	for (size_t i = 0; i < nr && count; i++) {
		struct keep_snapshot *s = &snaps[i];
		int64_t period = period_of(p, zone, s->taken_s);

		if (first && period == at) {
			if (!s->keep)
				snprintf(s->why, sizeof(s->why), "snapshot %llu is kept for its %s",
					 (unsigned long long)first->id, words[p]);
			continue;
		}
		if (count != KEEP_ALL && n == count)
			break;
		at = period;
		first = s;
		n++;
		if (count == KEEP_ALL)
			want(s, "%s", keep_period_names[p]);
		else
			want(s, "%s %u of %u", keep_period_names[p], n, count);
	}
}

/* The finest step that covers the whole bucket in which it was taken; nr_grid: none. */
static uint32_t grid_step(const struct keep_rules *r, int64_t newest_s, int64_t taken_s,
			  int64_t *bucket)
{
	int64_t reach_s = 0;
	uint32_t i;

	for (i = 0; i < r->nr_grid; i++) {
		int64_t span_s = (int64_t)r->grid[i].span_s;

		reach_s += r->grid[i].count * span_s;
		*bucket = zone_floor(taken_s, span_s);
		if (*bucket * span_s > newest_s - reach_s)
			break;
	}
	return i;
}

static void span_text(uint64_t span_s, char *text, size_t size)
{
	static const struct {
		uint64_t seconds;
		char letter;
	} units[] = {{86400, 'd'}, {3600, 'h'}, {60, 'm'}, {1, 's'}};
	size_t i = 0;

	while (span_s % units[i].seconds)
		i++;
	snprintf(text, size, "%llu%c", (unsigned long long)(span_s / units[i].seconds),
		 units[i].letter);
}

static void decide_grid(const struct keep_rules *r, struct keep_snapshot *snaps, size_t nr)
{
	const struct keep_snapshot *oldest = NULL;
	uint32_t at_step = KEEP_GRID_MAX;
	int64_t at_bucket = 0;
	char span[24];

	for (size_t i = nr; r->nr_grid && i-- > 0;) {
		struct keep_snapshot *s = &snaps[i];
		int64_t bucket = 0;
		uint32_t step = grid_step(r, snaps[0].taken_s, s->taken_s, &bucket);

		if (step == r->nr_grid)
			continue;
		span_text(r->grid[step].span_s, span, sizeof(span));
		if (!oldest || step != at_step || bucket != at_bucket) {
			oldest = s;
			at_step = step;
			at_bucket = bucket;
			want(s, "grid %ux%s", r->grid[step].count, span);
		} else if (!s->keep) {
			snprintf(s->why, sizeof(s->why), "snapshot %llu is kept for its %s",
				 (unsigned long long)oldest->id, span);
		}
	}
}

/* Is a word of the list `tags` in the list `wanted`?  Its length, and where; 0: none. */
static int common_tag(const char *tags, const char *wanted, const char **ret)
{
	size_t len, wanted_len;

	while ((*ret = next_tag(&tags, &len))) {
		const char *list = wanted, *word;

		while ((word = next_tag(&list, &wanted_len)))
			if (len == wanted_len && !strncmp(word, *ret, len))
				return (int)len;
	}
	return 0;
}

static void decide_alone(const struct keep_rules *r, struct keep_snapshot *s, int64_t newest_s)
{
	const char *tag;
	int len = s->tags ? common_tag(s->tags, r->tags, &tag) : 0;

	if (s->pinned)
		want(s, "pinned");
	if (s->held)
		want(s, "not backed up yet");
	if (len)
		want(s, "tag %.*s", len, tag);
	if (r->within_s && (uint64_t)(newest_s - s->taken_s) < r->within_s)
		want(s, "within");
}

/* How many of them, newest first, the clock has not come to yet: they stay. */
static size_t keep_later(struct keep_snapshot *snaps, size_t nr, int64_t now_s)
{
	size_t later = 0;

	for (; later < nr && snaps[later].taken_s > now_s; later++) {
		snaps[later].keep = false;
		want(&snaps[later], "later than now");
	}
	return later;
}

void keep_decide(const struct keep_rules *rules, const struct zone *zone, int64_t now_s,
		 struct keep_snapshot *snaps, size_t nr)
{
	bool any = keep_has_rules(rules);
	size_t later;

	qsort(snaps, nr, sizeof(*snaps), newest_first);
	later = keep_later(snaps, nr, now_s);
	snaps += later;
	nr -= later;
	for (size_t i = 0; i < nr; i++) {
		struct keep_snapshot *s = &snaps[i];

		s->keep = false;
		snprintf(s->why, sizeof(s->why), "no rule keeps it");
		if (!any)
			want(s, "no rules");
		else if (i == 0)
			want(s, "newest");
		decide_alone(rules, s, snaps[0].taken_s);
		if (i < rules->last && rules->last == KEEP_ALL)
			want(s, "last");
		else if (i < rules->last)
			want(s, "last %zu of %u", i + 1, rules->last);
	}
	for (int p = 0; p < KEEP_NR_PERIODS; p++)
		decide_period(rules->period[p], p, zone, snaps, nr);
	decide_grid(rules, snaps, nr);
}
