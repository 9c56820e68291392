/* SPDX-License-Identifier: MIT */
/* Backups of one policy and one VM; see line_backup.h. */
#include "snapd/schedule/line_backup.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#include "snapd/backup/backup.h"
#include "snapd/core/daemon.h"
#include "snapd/schedule/line.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"

#define RETRY_MIN_NS 1000000000ull
#define RETRY_MAX_NS 300000000000ull

static uint64_t monotonic_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

/* Soon, since most of what fails is over soon; then after twice as long each time. */
static void try_later(struct line_backup *b)
{
	b->pause_ns = b->pause_ns ? MIN(2 * b->pause_ns, RETRY_MAX_NS) : RETRY_MIN_NS;
	b->retry_ns = monotonic_ns() + b->pause_ns;
}

/* Nothing is known of another repository. */
static void look_where(struct line_backup *b, const struct policy *p)
{
	const char *repository = policy_text(p, "backup");

	if (b->job || !strcmp(b->repository, repository))
		return;
	snprintf(b->repository, sizeof(b->repository), "%s", repository);
	b->seen = b->retry_ns = b->pause_ns = 0;
	*b->said = '\0';
}

static void end_job(struct line *l, const struct policy *p, int64_t now_s)
{
	struct line_backup *b = &l->backup;
	const json_t *r = b->job->result;

	if (job_state_of(b->job) == JOB_DONE) {
		b->pushed += json_array_size(json_object_get(r, "pushed"));
		b->bytes_sent += (uint64_t)json_integer_value(json_object_get(r, "bytes_sent"));
		b->last_s = now_s;
		b->pause_ns = 0;
		*b->said = '\0';
	} else {
		b->failures++;
		b->seen = 0;
		try_later(b);
		snprintf(b->said, sizeof(b->said), "backup: %.170s", b->job->err.text);
		log_warn("policy %s, %s: %s", p->name, l->vm, b->said);
	}
	job_unref(b->job);
	b->job = NULL;
}

/* The policy's backup_keep_… as the API has rules. */
static json_t *keep_json(const struct policy *p)
{
	json_t *keep = json_object();

	for (size_t i = 0; policy_setting(i); i++) {
		const char *key = policy_setting(i);

		if (!strncmp(key, POLICY_BACKUP_KEEP, strlen(POLICY_BACKUP_KEEP)) &&
		    *policy_text(p, key))
			json_object_set_new(keep, key + strlen(POLICY_BACKUP_KEEP),
					    json_string(policy_text(p, key)));
	}
	if (json_object_size(keep))
		return keep;
	json_decref(keep);
	return NULL;
}

static void start_job(struct line *l, struct daemon *d, const struct policy *p)
{
	struct line_backup *b = &l->backup;
	const char *zone = policy_text(p, "timezone");
	char tag[POLICY_NAME_MAX + sizeof(POLICY_TAG_PREFIX)];

	snprintf(tag, sizeof(tag), POLICY_TAG_PREFIX "%s", p->name);
	b->job = job_new(d, JOB_BACKUP_PUSH, 0,
			 json_pack("{ss ss sI ss sb ss so*}", "repository",
				   policy_text(p, "backup"), "vm", l->vm, "uid", (json_int_t)l->uid,
				   "tag", tag, "newest", !p->backup_hold, "zone",
				   *zone ? zone : p->calendar.zone, "keep", keep_json(p)),
			 backup_push_job);
	if (b->job && !job_run_detached(b->job)) {
		b->seen = l->snapshot;
		return;
	}
	job_unref(b->job);
	b->job = NULL;
	try_later(b);
}

void line_backup_step(struct line *l, struct daemon *d, const struct policy *p, int64_t now_s)
{
	struct line_backup *b = &l->backup;

	if (b->job && job_state_ended(job_state_of(b->job)))
		end_job(l, p, now_s);
	look_where(b, p);
	if (line_backup_is_idle(l, p) || b->job || p->paused || monotonic_ns() < b->retry_ns)
		return;
	start_job(l, d, p);
}

bool line_backup_is_idle(const struct line *l, const struct policy *p)
{
	const struct line_backup *b = &l->backup;

	return !b->job && (!*policy_text(p, "backup") || !l->snapshot || l->snapshot == b->seen);
}

void line_backup_stop(struct line_backup *b)
{
	if (b->job)
		job_cancel(b->job);
	job_unref(b->job);
	b->job = NULL;
}

json_t *line_backup_json(const struct line_backup *b)
{
	return json_pack("{sb sI sI sI sI ss}", "busy", b->job != NULL, "last_s",
			 (json_int_t)b->last_s, "pushed", (json_int_t)b->pushed, "bytes_sent",
			 (json_int_t)b->bytes_sent, "failures", (json_int_t)b->failures, "said",
			 b->said);
}
