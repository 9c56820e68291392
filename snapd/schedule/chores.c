/* SPDX-License-Identifier: MIT */
/* Prune and verify of a policy's repository; see chores.h. */
#include "snapd/schedule/chores.h"

#include <stdio.h>

#include "snapd/backup/backup.h"
#include "snapd/core/daemon.h"
#include "snapd/policy/policy.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"

#define RETRY_S 3600

static const struct {
	const char *name, *setting;
	enum backup_op op;
	enum job_kind kind;
	int (*body)(struct job *job, struct err *e);
} kinds[NR_CHORES] = {
	[CHORE_PRUNE] = {"prune", "backup_prune", BACKUP_PRUNE, JOB_BACKUP_PRUNE, backup_prune_job},
	[CHORE_VERIFY] = {"verify", "backup_verify", BACKUP_VERIFY, JOB_BACKUP_VERIFY,
			  backup_verify_job},
};

static bool is_wanted(const struct policy *p, enum chore_kind k)
{
	return *policy_text(p, kinds[k].setting) && *policy_text(p, "backup");
}

/* When it is due; a repository that is new is so from now on. */
static int64_t due_s(struct daemon *d, const struct policy *p, enum chore_kind k, int64_t now_s)
{
	const struct calendar *c = k == CHORE_PRUNE ? &p->backup_prune : &p->backup_verify;
	const char *repository = policy_text(p, "backup");
	int64_t last_s = (int64_t)backup_last_done(d, repository, kinds[k].op);

	if (!last_s)
		backup_set_last_done(d, repository, kinds[k].op, (uint64_t)now_s);
	if (!last_s || last_s > now_s)
		last_s = now_s;
	return calendar_next(c, p->zone, last_s);
}

static void end_job(struct chore *c, const struct policy *p, enum chore_kind k, int64_t now_s)
{
	const json_t *damages = json_object_get(c->job->result, "damages");

	*c->said = '\0';
	if (job_state_of(c->job) != JOB_DONE) {
		c->retry_s = now_s + RETRY_S;
		snprintf(c->said, sizeof(c->said), "backup %s: %.160s", kinds[k].name,
			 c->job->err.text);
		log_warn("policy %s: %s", p->name, c->said);
	} else if (json_array_size(damages)) {
		snprintf(c->said, sizeof(c->said), "the repository is damaged: %zu objects",
			 json_array_size(damages));
	}
	job_unref(c->job);
	c->job = NULL;
}

static void start_job(struct chore *c, struct daemon *d, const struct policy *p, enum chore_kind k,
		      int64_t now_s)
{
	json_t *args = json_pack("{ss}", "repository", policy_text(p, "backup"));

	if (k == CHORE_VERIFY)
		json_object_set_new(args, "percent", json_integer(p->backup_verify_percent));
	c->job = job_new(d, kinds[k].kind, 0, args, kinds[k].body);
	if (c->job && !job_run_detached(c->job))
		return;
	job_unref(c->job);
	c->job = NULL;
	c->retry_s = now_s + RETRY_S;
}

static void step(struct chore *c, struct daemon *d, const struct policy *p, enum chore_kind k,
		 int64_t now_s)
{
	if (c->job && job_state_ended(job_state_of(c->job)))
		end_job(c, p, k, now_s);
	if (c->retry_s > now_s + RETRY_S) /* the clock was put back */
		c->retry_s = now_s;
	if (!c->job && is_wanted(p, k) && !p->paused && now_s >= c->retry_s &&
	    now_s >= due_s(d, p, k, now_s))
		start_job(c, d, p, k, now_s);
}

void chores_step(struct chores *c, struct daemon *d, const struct policy *p, int64_t now_s)
{
	for (int k = 0; k < NR_CHORES; k++)
		step(&c->all[k], d, p, (enum chore_kind)k, now_s);
}

void chores_stop(struct chores *c)
{
	for (int k = 0; k < NR_CHORES; k++) {
		if (c->all[k].job)
			job_cancel(c->all[k].job);
		job_unref(c->all[k].job);
		c->all[k].job = NULL;
	}
}

json_t *chores_json(const struct chores *c, struct daemon *d, const struct policy *p, int64_t now_s)
{
	json_t *o = json_object();

	for (int k = 0; k < NR_CHORES; k++)
		if (is_wanted(p, (enum chore_kind)k))
			json_object_set_new(
				o, kinds[k].name,
				json_pack("{sb sI sI ss}", "busy", c->all[k].job != NULL, "last_s",
					  (json_int_t)backup_last_done(d, policy_text(p, "backup"),
								       kinds[k].op),
					  "due_s",
					  (json_int_t)due_s(d, p, (enum chore_kind)k, now_s),
					  "said", c->all[k].said));
	return o;
}
