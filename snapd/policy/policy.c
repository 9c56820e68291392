// SPDX-License-Identifier: MIT
/* Policies: their words and their files; see policy.h. */
#include "snapd/policy/policy.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "snapd/util/inifile.h"

#define HOOK_TIMEOUT_S	      10
#define RECOVERY_POINT_MIN_US 50000
#define RECOVERY_POINT_MAX_US 3600000000

/* ---- values ---- */

static int want(struct err *e, const char *key, const char *value, const char *what)
{
	return err_set(e, EINVAL, "%s '%.60s': want %s", key, value, what);
}

static int parse_choice(const char *key, const char *value, const char *no, const char *yes,
			bool *ret, struct err *e)
{
	char what[64];

	if (!strcmp(value, yes) || !strcmp(value, no)) {
		*ret = !strcmp(value, yes);
		return 0;
	}
	snprintf(what, sizeof(what), "%s or %s", yes, no);
	return want(e, key, value, what);
}

/* A number, then one of the units (a table that ends with NULL). */
struct unit {
	const char *name;
	uint64_t factor;
};

static int parse_units(const char *value, const struct unit *units, uint64_t *ret)
{
	uint64_t n;
	char *end;

	if (*value < '0' || *value > '9')
		return -EINVAL;
	errno = 0;
	n = strtoull(value, &end, 10);
	for (; units->name; units++) {
		if (strcmp(end, units->name) != 0)
			continue;
		if (errno || n > INT64_MAX / units->factor)
			return -EINVAL;
		*ret = n * units->factor;
		return 0;
	}
	return -EINVAL;
}

static int parse_span(const char *key, const char *value, uint64_t *ret, struct err *e)
{
	return keep_parse_span(value, ret) ? want(e, key, value, "a time such as 90s, 5m or 1h30m")
					   : 0;
}

/* ---- settings ---- */

static int set_nothing(struct policy *p, const char *key, const char *value, struct err *e)
{
	return 0;
}

static int set_owner(struct policy *p, const char *key, const char *value, struct err *e)
{
	static const struct unit none[] = {{"", 1}, {NULL}};
	uint64_t uid;

	if (parse_units(value, none, &uid) || uid >= UINT32_MAX)
		return want(e, key, value, "a user's number");
	p->owner = (int64_t)uid;
	return 0;
}

static int set_every(struct policy *p, const char *key, const char *value, struct err *e)
{
	return parse_span(key, value, &p->every_s, e);
}

static int set_schedule(struct policy *p, const char *key, const char *value, struct err *e)
{
	return calendar_parse(value, &p->calendar, e);
}

static int set_jitter(struct policy *p, const char *key, const char *value, struct err *e)
{
	return parse_span(key, value, &p->jitter_s, e);
}

static int set_timezone(struct policy *p, const char *key, const char *value, struct err *e)
{
	zone_close(p->zone);
	p->zone = NULL;
	return zone_open(value, &p->zone, e);
}

static int set_missed(struct policy *p, const char *key, const char *value, struct err *e)
{
	return parse_choice(key, value, "skip", "run", &p->catch_up, e);
}

static int set_skip_unchanged(struct policy *p, const char *key, const char *value, struct err *e)
{
	return parse_choice(key, value, "no", "yes", &p->skip_unchanged, e);
}

static int set_self_check(struct policy *p, const char *key, const char *value, struct err *e)
{
	static const struct unit none[] = {{"", 1}, {NULL}};
	uint64_t n;

	if (parse_units(value, none, &n) || n > UINT32_MAX)
		return want(e, key, value, "a number of snapshots");
	p->self_check_every = (uint32_t)n;
	return 0;
}

static int set_hook_timeout(struct policy *p, const char *key, const char *value, struct err *e)
{
	return parse_span(key, value, &p->hook_timeout_s, e);
}

static int set_consistency(struct policy *p, const char *key, const char *value, struct err *e)
{
	return parse_choice(key, value, "crash", "quiesce", &p->quiesce, e);
}

static int set_compression(struct policy *p, const char *key, const char *value, struct err *e)
{
	const char *level = strncmp(value, "zstd:", 5) ? NULL : value + 5;
	char *end = NULL;
	long n = level ? strtol(level, &end, 10) : 0;

	if (level ? end != level && !*end && n >= -7 && n <= 19
		  : !strcmp(value, "none") || !strcmp(value, "lz4") || !strcmp(value, "zstd"))
		return 0;
	return want(e, key, value, "none, lz4, zstd or zstd:LEVEL, -7 to 19");
}

static int set_min_free(struct policy *p, const char *key, const char *value, struct err *e)
{
	static const struct unit bytes[] = {{"", 1},	       {"K", 1ull << 10}, {"M", 1ull << 20},
					    {"G", 1ull << 30}, {"T", 1ull << 40}, {NULL}};

	return parse_units(value, bytes, &p->min_free_bytes)
		       ? want(e, key, value, "bytes such as 10G")
		       : 0;
}

static const struct unit times[] = {{"us", 1}, {"ms", 1000}, {"s", 1000000}, {NULL}};

static int set_recovery_point(struct policy *p, const char *key, const char *value, struct err *e)
{
	uint64_t us;

	if (parse_units(value, times, &us) || us < RECOVERY_POINT_MIN_US ||
	    us > RECOVERY_POINT_MAX_US)
		return want(e, key, value, "a time from 50ms to 3600s");
	p->recovery_point_ns = us * 1000;
	return 0;
}

static int set_max_pause(struct policy *p, const char *key, const char *value, struct err *e)
{
	if (parse_units(value, times, &p->max_pause_us) || !p->max_pause_us)
		return want(e, key, value, "a time such as 50ms");
	return 0;
}

static int parse_share(const char *key, const char *value, uint32_t *ret, struct err *e)
{
	static const struct unit share[] = {{"%", 10}, {NULL}};
	uint64_t permille;

	if (parse_units(value, share, &permille) || !permille || permille > 1000)
		return want(e, key, value, "a part of the time such as 2%");
	*ret = (uint32_t)permille;
	return 0;
}

static int set_max_paused(struct policy *p, const char *key, const char *value, struct err *e)
{
	return parse_share(key, value, &p->max_paused_permille, e);
}

static int set_max_overhead(struct policy *p, const char *key, const char *value, struct err *e)
{
	return parse_share(key, value, &p->max_overhead_permille, e);
}

static int set_keep(struct policy *p, const char *key, const char *value, struct err *e)
{
	return keep_set(&p->keep, key + strlen("keep_"), value, e);
}

static int set_backup(struct policy *p, const char *key, const char *value, struct err *e)
{
	return strncmp(value, "s3://", 5) != 0 && strncmp(value, "file:///", 8) != 0
		       ? want(e, key, value, "s3://BUCKET/PREFIX or file:///PATH")
		       : 0;
}

static int set_backup_hold(struct policy *p, const char *key, const char *value, struct err *e)
{
	return parse_choice(key, value, "no", "yes", &p->backup_hold, e);
}

static int set_backup_keep(struct policy *p, const char *key, const char *value, struct err *e)
{
	return keep_set(&p->backup_keep, key + strlen(POLICY_BACKUP_KEEP), value, e);
}

/* In the policy's own zone. */
static int parse_calendar(const char *key, const char *value, struct calendar *ret, struct err *e)
{
	int rc = calendar_parse(value, ret, e);

	return !rc && ret->zone[0] ? want(e, key, value, "a calendar event without a zone") : rc;
}

static int set_backup_prune(struct policy *p, const char *key, const char *value, struct err *e)
{
	return parse_calendar(key, value, &p->backup_prune, e);
}

static int set_backup_verify(struct policy *p, const char *key, const char *value, struct err *e)
{
	return parse_calendar(key, value, &p->backup_verify, e);
}

static int set_backup_verify_data(struct policy *p, const char *key, const char *value,
				  struct err *e)
{
	static const struct unit percent[] = {{"%", 1}, {NULL, 0}};
	uint64_t n;

	if (parse_units(value, percent, &n) || n > 100)
		return want(e, key, value, "a part of the repository such as 10%");
	p->backup_verify_percent = (uint32_t)n;
	return 0;
}

static int set_paused(struct policy *p, const char *key, const char *value, struct err *e)
{
	return parse_choice(key, value, "no", "yes", &p->paused, e);
}

static const struct {
	const char *key;
	int (*set)(struct policy *p, const char *key, const char *value, struct err *e);
} settings[] = {
	{"vms", set_nothing},
	{"vm_tags", set_nothing},
	{"owner", set_owner},
	{"every", set_every},
	{"schedule", set_schedule},
	{"recovery_point", set_recovery_point},
	{"jitter", set_jitter},
	{"timezone", set_timezone},
	{"missed", set_missed},
	{"skip_unchanged", set_skip_unchanged},
	{"self_check_every", set_self_check},
	{"tags", set_nothing},
	{"pre_hook", set_nothing},
	{"post_hook", set_nothing},
	{"hook_timeout", set_hook_timeout},
	{"consistency", set_consistency},
	{"min_free", set_min_free},
	{"compression", set_compression},
	{"max_pause", set_max_pause},
	{"max_paused", set_max_paused},
	{"max_overhead", set_max_overhead},
	{"keep_last", set_keep},
	{"keep_hourly", set_keep},
	{"keep_daily", set_keep},
	{"keep_weekly", set_keep},
	{"keep_monthly", set_keep},
	{"keep_yearly", set_keep},
	{"keep_within", set_keep},
	{"keep_tags", set_keep},
	{"keep_grid", set_keep},
	{"backup", set_backup},
	{"backup_hold", set_backup_hold},
	{"backup_keep_last", set_backup_keep},
	{"backup_keep_hourly", set_backup_keep},
	{"backup_keep_daily", set_backup_keep},
	{"backup_keep_weekly", set_backup_keep},
	{"backup_keep_monthly", set_backup_keep},
	{"backup_keep_yearly", set_backup_keep},
	{"backup_keep_within", set_backup_keep},
	{"backup_keep_tags", set_backup_keep},
	{"backup_keep_grid", set_backup_keep},
	{"backup_prune", set_backup_prune},
	{"backup_verify", set_backup_verify},
	{"backup_verify_data", set_backup_verify_data},
	{"paused", set_paused},
};

const char *policy_setting(size_t i)
{
	return i < ARRAY_SIZE(settings) ? settings[i].key : NULL;
}

static_assert(ARRAY_SIZE(settings) == POLICY_NR_SETTINGS, "a text for each setting");

static bool is_clean(const char *s)
{
	for (; *s; s++)
		if ((unsigned char)*s < ' ' || *s == 0x7f)
			return false;
	return true;
}

/* What inih reads back from a line as it was written: no longer than its buffer, no blanks at
 * the ends, and no ';' behind a blank, where a comment begins. */
static bool fits_line(const char *key, const char *value)
{
	size_t len = strlen(value);

	return strlen(key) + strlen(" = ") + len <= INIFILE_LINE_MAX && value[0] != ' ' &&
	       value[0] != ';' && value[len - 1] != ' ' && !strstr(value, " ;");
}

int policy_set(struct policy *p, const char *key, const char *value, struct err *e)
{
	for (size_t i = 0; i < ARRAY_SIZE(settings); i++) {
		int rc;

		if (strcmp(key, settings[i].key) != 0)
			continue;
		if (!*value || strlen(value) >= POLICY_VALUE_MAX || !is_clean(value))
			return err_set(e, EINVAL, "%s: want 1 to %d characters", key,
				       POLICY_VALUE_MAX - 1);
		if (!fits_line(key, value))
			return err_set(e, EINVAL,
				       "%s: a line of a policy's file has room for %zu characters, "
				       "without blanks at the ends and ' ;'",
				       key, INIFILE_LINE_MAX - strlen(key) - strlen(" = "));
		rc = settings[i].set(p, key, value, e);
		if (!rc)
			snprintf(p->text[i], sizeof(p->text[i]), "%s", value);
		return rc;
	}
	return err_set(e, EINVAL, "a policy has no setting \"%.40s\"", key);
}

const char *policy_text(const struct policy *p, const char *key)
{
	for (size_t i = 0; i < ARRAY_SIZE(settings); i++)
		if (!strcmp(key, settings[i].key))
			return p->text[i];
	return "";
}

/* ---- life ---- */

static bool is_name(const char *name)
{
	size_t len =
		strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-");

	return len && len < POLICY_NAME_MAX && !name[len];
}

int policy_new(const char *name, struct policy **ret, struct err *e)
{
	struct policy *p;

	if (!is_name(name))
		return err_set(e, EINVAL,
			       "policy '%.80s': want letters, digits, '-' and '_' as a name", name);
	p = calloc(1, sizeof(*p));
	if (!p)
		return err_errno(e, ENOMEM, "policy");
	snprintf(p->name, sizeof(p->name), "%s", name);
	p->owner = -1;
	p->catch_up = true;
	p->backup_hold = true;
	p->hook_timeout_s = HOOK_TIMEOUT_S;
	*ret = p;
	return 0;
}

void policy_free(struct policy *p)
{
	if (!p)
		return;
	zone_close(p->zone);
	free(p);
}

int policy_finish(struct policy *p, struct err *e)
{
	bool by_calendar = policy_text(p, "schedule")[0];

	if (!!p->every_s + by_calendar + !!p->recovery_point_ns != 1)
		return err_set(e, EINVAL,
			       "policy %s: want one of every, schedule and recovery_point",
			       p->name);
	if (p->recovery_point_ns && p->jitter_s)
		return err_set(e, EINVAL, "policy %s: jitter is for every and schedule", p->name);
	if (p->every_s && p->jitter_s >= p->every_s)
		return err_set(e, EINVAL, "policy %s: jitter has to be less than every", p->name);
	if (p->quiesce && !policy_text(p, "pre_hook")[0])
		return err_set(e, EINVAL, "policy %s: consistency = quiesce needs pre_hook",
			       p->name);
	if (!*policy_text(p, "backup") &&
	    (*policy_text(p, "backup_hold") || *policy_text(p, "backup_prune") ||
	     *policy_text(p, "backup_verify") || keep_has_rules(&p->backup_keep)))
		return err_set(e, EINVAL, "policy %s: backup_... without backup", p->name);
	if (p->backup_verify_percent && !*policy_text(p, "backup_verify"))
		return err_set(e, EINVAL, "policy %s: backup_verify_data without backup_verify",
			       p->name);
	if (strlen(POLICY_TAG_PREFIX) + strlen(p->name) + 1 + strlen(policy_text(p, "tags")) >=
	    POLICY_VALUE_MAX)
		return err_set(e, EINVAL,
			       "policy %s: tags: with policy:%s they are more than %d bytes",
			       p->name, p->name, POLICY_VALUE_MAX - 1);
	if (p->zone)
		return 0;
	return zone_open(by_calendar ? p->calendar.zone : NULL, &p->zone, e);
}

static bool is_like(const char *vm, const char *glob)
{
	return !fnmatch(glob, vm, 0);
}

/* Does one of `words`, separated by commas, fit?  No words: everything does. */
static bool one_fits(const char *words, bool (*fits)(const char *what, const char *word),
		     const char *what)
{
	char word[POLICY_VALUE_MAX];

	if (!*words)
		return true;
	while (*words) {
		size_t len = strcspn(words, ", ");

		memcpy(word, words, len);
		word[len] = '\0';
		if (len && fits(what, word))
			return true;
		words += len;
		words += strspn(words, ", ");
	}
	return false;
}

bool policy_covers(const struct policy *p, const char *vm, uint32_t uid, const char *vm_tags)
{
	if (p->owner >= 0 && p->owner != (int64_t)uid)
		return false;
	return one_fits(policy_text(p, "vms"), is_like, vm) &&
	       one_fits(policy_text(p, "vm_tags"), keep_has_tag, vm_tags);
}

/* ---- files ---- */

static int on_setting(void *arg, const char *section, const char *key, const char *value,
		      struct err *e)
{
	if (*section && strcmp(section, "policy") != 0)
		return err_set(e, EINVAL, "unknown section [%.40s]", section);
	return policy_set(arg, key, value, e);
}

int policy_read(const char *dir, const char *name, struct policy **ret, struct err *e)
{
	_cleanup_(cleanup_policy) struct policy *p = NULL;
	struct err why = {0};
	char path[PATH_MAX];
	int rc = policy_new(name, &p, e);

	if (rc)
		return rc;
	snprintf(path, sizeof(path), "%s/%s.conf", dir, name);
	rc = inifile_read(path, on_setting, p, e);
	if (rc)
		return rc;
	rc = policy_finish(p, &why);
	if (rc)
		return err_set(e, EINVAL, "%s: %s", path, why.text);
	*ret = steal_ptr(&p);
	return 0;
}

static int put_settings(FILE *f, const struct policy *p)
{
	fprintf(f, "[policy]\n");
	for (size_t i = 0; i < ARRAY_SIZE(settings); i++)
		if (p->text[i][0])
			fprintf(f, "%s = %s\n", settings[i].key, p->text[i]);
	return fflush(f) || fsync(fileno(f)) ? -errno : 0;
}

int policy_write(const char *dir, const struct policy *p, struct err *e)
{
	char path[PATH_MAX], temporary[PATH_MAX];
	_cleanup_fd_ int fd = -1, dir_fd = -1;
	FILE *f;
	int rc;

	snprintf(path, sizeof(path), "%s/%s.conf", dir, p->name);
	snprintf(temporary, sizeof(temporary), "%s/.%s.conf.new", dir, p->name);
	dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644);
	f = fd >= 0 ? fdopen(fd, "w") : NULL;
	if (dir_fd < 0 || !f)
		return err_errno(e, errno, "cannot write %s", temporary);
	steal_fd(&fd);
	rc = put_settings(f, p);
	fclose(f);
	if (!rc && (rename(temporary, path) || fsync(dir_fd)))
		rc = -errno;
	if (rc)
		unlink(temporary);
	return rc ? err_errno(e, -rc, "cannot write %s", path) : 0;
}

/* ---- when ---- */

/* FNV-1a: the same for a policy and a VM on each day and host. */
static uint64_t jitter(const struct policy *p, const char *vm)
{
	const char *words[] = {p->name, "\n", vm};
	uint64_t h = 0xcbf29ce484222325;

	for (size_t i = 0; i < ARRAY_SIZE(words); i++)
		for (const char *c = words[i]; *c; c++)
			h = (h ^ (uint8_t)*c) * 0x100000001b3;
	return p->jitter_s ? h % (p->jitter_s + 1) : 0;
}

static int64_t point_after(const struct policy *p, int64_t at_s)
{
	return p->every_s ? at_s + (int64_t)p->every_s : calendar_next(&p->calendar, p->zone, at_s);
}

int64_t policy_due(const struct policy *p, const char *vm, int64_t *last_s, int64_t now_s)
{
	int64_t later_s = (int64_t)jitter(p, vm);
	int64_t point;

	*last_s = MIN(*last_s, now_s);
	point = point_after(p, *last_s);

	if (point == INT64_MAX)
		return INT64_MAX;
	if (!p->catch_up && point + later_s < now_s - POLICY_LATE_S) {
		point = point_after(p, now_s - later_s);
		if (point == INT64_MAX)
			return INT64_MAX;
	}
	return point + later_s;
}

uint64_t policy_next_epoch(const struct policy *p, uint64_t point_ns, uint64_t cost_ns,
			   uint64_t now_ns)
{
	uint64_t early_ns = MIN(cost_ns, p->recovery_point_ns);

	return MAX(now_ns, point_ns + p->recovery_point_ns - early_ns);
}

int64_t policy_ran(const struct policy *p, const char *vm, int64_t due_s, int64_t now_s)
{
	int64_t later_s = (int64_t)jitter(p, vm), point = due_s - later_s;
	int64_t next = point_after(p, point);

	return due_s > now_s || (next != INT64_MAX && next + later_s <= now_s) ? now_s - later_s
									       : point;
}

/* ---- how dear ---- */

static bool is_more(uint64_t ns, uint64_t of_ns, uint32_t permille)
{
	return permille && of_ns && ns > of_ns / 1000 * permille;
}

bool policy_is_over(const struct policy *p, const struct policy_cost *c)
{
	return (p->max_pause_us && c->pause_ns > p->max_pause_us * 1000) ||
	       is_more(c->pause_ns, c->interval_ns, p->max_paused_permille) ||
	       is_more(c->lost_ns, c->of_ns, p->max_overhead_permille);
}
