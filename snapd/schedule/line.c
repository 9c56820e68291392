/* SPDX-License-Identifier: MIT */
/* One policy and one VM: see line.h. */
#include "snapd/schedule/line.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/statvfs.h>
#include <time.h>

#include "snapd/core/daemon.h"
#include "snapd/schedule/prune.h"
#include "snapd/upkeep/room.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/vm/vm.h"

#define BACKOFF_MAX	6
#define SELDOM_PRUNE_NS 10000000000ull /* of runs that come one upon the other */
#define COST_WINDOW_NS	10000000000ull
#define NO_ROOM		"the store's file system has less than min_free"
#define OVER_SOFT	"the store is over store_soft_max"
#define RETRY_NS	1000000000ull /* after an epoch that failed or could not be */

const char *const line_state_names[LINE_NR_STATES] = {
	[LINE_IDLE] = "idle",		[LINE_PRE_HOOK] = "pre-hook", [LINE_SNAPSHOT] = "snapshot",
	[LINE_POST_HOOK] = "post-hook", [LINE_PRUNE] = "prune",
};

static uint64_t monotonic_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

/* ---- what is known from before ---- */

static void tag_of(const struct policy *p, char *tag, size_t size)
{
	snprintf(tag, size, POLICY_TAG_PREFIX "%s", p->name);
}

void line_init(struct line *l, struct daemon *d, const struct policy *p, const char *vm,
	       uint32_t uid, int64_t now_s)
{
	_cleanup_free_ struct store_snapshot *list = NULL;
	char tag[POLICY_NAME_MAX + sizeof(POLICY_TAG_PREFIX)];
	size_t nr = 0;
	int64_t newest_s = 0;

	*l = (struct line){.uid = uid, .hook.pid_fd = -1, .last_s = now_s, .there_s = now_s};
	/* Somewhere in between: else one that is started often would never, or always, check. */
	if (getrandom(&l->unchecked, sizeof(l->unchecked), GRND_NONBLOCK) < 0)
		l->unchecked = 0;
	snprintf(l->vm, sizeof(l->vm), "%s", vm);
	tag_of(p, tag, sizeof(tag));
	if (store_snapshot_list(d->store, NULL, &list, &nr, NULL))
		return;
	for (size_t i = 0; i < nr; i++) {
		int64_t taken_s = (int64_t)(list[i].taken_ns / 1000000000);

		if (list[i].uid != uid || strcmp(list[i].vm_name, vm) != 0 ||
		    !keep_has_tag(list[i].tags, tag) || taken_s < newest_s)
			continue;
		newest_s = taken_s;
		l->snapshot = list[i].id;
	}
	if (newest_s)
		l->last_s = newest_s;
}

/* ---- ends of runs ---- */

/* Shown until the next run. */
static void trouble(struct line *l, const struct policy *p, const char *text)
{
	snprintf(l->said, sizeof(l->said), "%s: %.160s", line_state_names[l->state], text);
	log_about()->vm = l->vm;
	log_about()->policy = p->name;
	log_event(LOG_POLICY_TROUBLE, LOG_LVL_WARN, "policy %s, %s: %s", p->name, l->vm, l->said);
	*log_about() = (struct log_about){0};
}

/* What was asked for has ended. */
static void answer(struct line *l)
{
	struct line_asked *a = &l->asked;

	if (!l->is_asked)
		return;
	l->is_asked = false;
	a->ended++;
	a->snapshot = l->snapshot;
	a->pause_ns = l->pause_ns;
	memcpy(a->said, l->said, sizeof(a->said));
}

static void skip_run(struct line *l, const struct policy *p, const char *why, int64_t now_s)
{
	l->skipped++;
	snprintf(l->said, sizeof(l->said), "skipped: %s", why);
	l->last_s = policy_ran(p, l->vm, l->due_s, now_s);
	l->is_asked = l->wanted;
	l->wanted = false;
	answer(l);
}

static void end_run(struct line *l)
{
	l->state = LINE_IDLE;
	l->runs += l->counts;
	l->failures += l->counts && *l->said;
	answer(l);
}

/* ---- all the time ---- */

static void close_window(struct line_continuous *c, uint64_t now_ns)
{
	if (!c->now.since_ns)
		c->now.since_ns = now_ns;
	if (now_ns - c->now.since_ns < COST_WINDOW_NS)
		return;
	c->last = c->now;
	c->last.until_ns = now_ns;
	c->now = (struct line_cost){.since_ns = now_ns};
}

/* An epoch is durable; its job's result tells what it cost. */
static void count_epoch(struct line *l, const struct policy *p, json_t *result,
			const struct policy_cost *cost)
{
	struct line_continuous *c = &l->cont;
	uint64_t now_ns = monotonic_ns(), took_ns = now_ns - l->began_ns;
	uint64_t drain_ns = (uint64_t)json_integer_value(json_object_get(result, "drain_ns"));

	if (c->point_ns)
		c->now.exposed_ns = MAX(c->now.exposed_ns, now_ns - c->point_ns);
	c->now.epochs++;
	c->now.paused_ns += l->pause_ns;
	c->now.lost_ns += cost->lost_ns;
	c->now.of_ns += cost->of_ns;
	c->now.pages_stored += (uint64_t)json_integer_value(json_object_get(result, "stored"));
	/* Not later than it was: the next epoch rather begins too early. */
	c->point_ns = now_ns - MIN(took_ns, drain_ns + l->pause_ns);
	/* The longest counts at once, and is forgotten over some epochs. */
	c->cost_ns = MAX(took_ns, c->cost_ns - c->cost_ns / 8);
	c->next_ns = policy_next_epoch(p, c->point_ns, c->cost_ns, now_ns);
	close_window(c, now_ns);
}

static void put_off(struct line *l, const struct policy *p, const char *why, uint64_t by_ns,
		    int64_t now_s)
{
	skip_run(l, p, why, now_s);
	l->cont.next_ns = monotonic_ns() + by_ns;
	close_window(&l->cont, l->cont.next_ns - by_ns);
}

/* Nothing is dirty, so nothing can be lost: up to now the newest point is good. */
static void is_current(struct line *l, const struct policy *p, int64_t now_s)
{
	uint64_t now_ns = monotonic_ns();

	l->cont.point_ns = now_ns;
	put_off(l, p, "nothing changed",
		policy_next_epoch(p, now_ns, l->cont.cost_ns, now_ns) - now_ns, now_s);
}

/* ---- steps ---- */

static int run_hook(struct line *l, const struct policy *p, const char *key, const char *phase,
		    struct err *e)
{
	char policy[POLICY_NAME_MAX + 16], vm[SNAPD_NAME_MAX + 16], when[32], id[40], failed[24];
	const char *env[] = {policy, vm, when, failed, l->failed ? NULL : id, NULL};

	snprintf(policy, sizeof(policy), "SNAPD_POLICY=%s", p->name);
	snprintf(vm, sizeof(vm), "SNAPD_VM=%s", l->vm);
	snprintf(when, sizeof(when), "SNAPD_PHASE=%s", phase);
	snprintf(failed, sizeof(failed), "SNAPD_FAILED=%d", l->failed);
	snprintf(id, sizeof(id), "SNAPD_SNAPSHOT=%llu", (unsigned long long)l->snapshot);
	return hook_start(&l->hook, policy_text(p, key), env, p->hook_timeout_s, e);
}

/* The list of snapshots is read each time: not after each of many epochs. */
static bool prune_is_due(struct line *l, const struct policy *p)
{
	uint64_t now_ns = monotonic_ns();

	if ((p->recovery_point_ns || !l->counts) && l->pruned_ns &&
	    now_ns - l->pruned_ns < SELDOM_PRUNE_NS)
		return false;
	l->pruned_ns = now_ns;
	return true;
}

static void to_prune(struct line *l, struct daemon *d, const struct policy *p)
{
	char tag[POLICY_NAME_MAX + sizeof(POLICY_TAG_PREFIX)];
	json_t *keep = json_object();

	l->state = LINE_PRUNE;
	if (!keep_has_rules(&p->keep) || !prune_is_due(l, p)) {
		json_decref(keep);
		end_run(l);
		return;
	}
	for (size_t i = 0; policy_setting(i); i++)
		if (!strncmp(policy_setting(i), "keep_", 5) && policy_text(p, policy_setting(i))[0])
			json_object_set_new(keep, policy_setting(i) + 5,
					    json_string(policy_text(p, policy_setting(i))));
	tag_of(p, tag, sizeof(tag));
	l->job = job_new(d, JOB_PRUNE, 0,
			 json_pack("{si sI ss ss ss so sb}", "view", 0, "owner", (json_int_t)l->uid,
				   "vm", l->vm, "tag", tag, "zone",
				   *policy_text(p, "timezone") ? policy_text(p, "timezone")
							       : p->calendar.zone,
				   "keep", keep, "dry_run", 0),
			 prune_job);
	if (l->job && !job_run_detached(l->job))
		return;
	trouble(l, p, "too much to do just now");
	job_unref(l->job);
	l->job = NULL;
	end_run(l);
}

static void to_post_hook(struct line *l, struct daemon *d, const struct policy *p)
{
	struct err e = {0};

	l->state = LINE_POST_HOOK;
	if (!*policy_text(p, "post_hook")) {
		to_prune(l, d, p);
	} else if (run_hook(l, p, "post_hook", "post", &e)) {
		trouble(l, p, e.text);
		to_prune(l, d, p);
	}
}

static int submit(struct line *l, struct daemon *d, const struct policy *p, struct err *e)
{
	char tags[POLICY_NAME_MAX + sizeof(POLICY_TAG_PREFIX) + POLICY_VALUE_MAX];
	char owned[SNAPD_NAME_MAX + 16];
	const char *more = policy_text(p, "tags"), *how = policy_text(p, "compression");
	bool check = p->self_check_every && l->unchecked % p->self_check_every == 0;
	struct vm *vm;
	int rc;

	tag_of(p, tags, sizeof(tags));
	if (*more)
		snprintf(tags + strlen(tags), sizeof(tags) - strlen(tags), ",%s", more);
	snprintf(owned, sizeof(owned), "%u/%s", l->uid, l->vm);
	vm = vm_find(d, owned, 0);
	if (!vm)
		return err_set(e, ENOTCONN, "the VM is not attached");
	l->job = job_new(d, JOB_SNAPSHOT, l->uid,
			 json_pack("{ss ss ss* sb sb}", "vm", l->vm, "tags", tags, "compression",
				   *how ? how : NULL, "self_check", check, "pinned", 0),
			 snapshot_job);
	rc = l->job ? vm_submit(vm, l->job) : -ENOMEM;
	vm_unref(vm);
	if (!rc)
		return 0;
	job_unref(l->job);
	l->job = NULL;
	return err_set(e, -rc,
		       rc == -EBUSY ? "too many jobs of the VM are queued" : "the VM is not ready");
}

static void to_snapshot(struct line *l, struct daemon *d, const struct policy *p)
{
	struct err e = {0};

	l->state = LINE_SNAPSHOT;
	if (!l->failed && submit(l, d, p, &e)) {
		trouble(l, p, e.text);
		l->failed = true;
	}
	if (l->failed)
		to_post_hook(l, d, p);
}

static void begin_run(struct line *l, struct daemon *d, const struct policy *p, int64_t now_s)
{
	uint64_t now_ns = monotonic_ns();
	struct err e = {0};

	l->is_asked = l->wanted;
	l->wanted = false;
	l->failed = false;
	l->counts = true;
	*l->said = '\0';
	l->last_s = policy_ran(p, l->vm, l->due_s, now_s);
	l->interval_ns = l->began_ns ? now_ns - l->began_ns : 0;
	l->began_ns = now_ns;
	l->began_s = now_s;
	l->cont.next_ns = now_ns + MAX(RETRY_NS, p->recovery_point_ns);
	l->state = LINE_PRE_HOOK;
	if (!*policy_text(p, "pre_hook")) {
		to_snapshot(l, d, p);
		return;
	}
	if (!run_hook(l, p, "pre_hook", "pre", &e))
		return;
	trouble(l, p, e.text);
	l->failed = p->quiesce;
	to_snapshot(l, d, p);
}

/* ---- may it run? ---- */

static bool disk_is_short(const struct daemon *d, const struct policy *p)
{
	struct statvfs fs;

	return p->min_free_bytes && !statvfs(d->config.store_dir, &fs) &&
	       fs.f_bavail * fs.f_frsize < p->min_free_bytes;
}

/* Nothing new; but what may go makes room. */
static void without_room(struct line *l, struct daemon *d, const struct policy *p, const char *why,
			 int64_t now_s)
{
	skip_run(l, p, why, now_s);
	l->counts = false;
	to_prune(l, d, p);
}

/* Every second point, while the store is over its soft limit. */
static bool thins_out(struct line *l, struct daemon *d)
{
	l->left_one = !l->left_one && !l->wanted && room_is_short(d);
	return l->left_one;
}

static bool is_unchanged(const struct line *l, struct daemon *d)
{
	char owned[SNAPD_NAME_MAX + 16];
	uint64_t dirty = 1;
	struct vm *vm;

	snprintf(owned, sizeof(owned), "%u/%s", l->uid, l->vm);
	vm = vm_find(d, owned, 0);
	if (vm)
		dirty = vm_dirty_frames(vm);
	vm_unref(vm);
	return l->snapshot && !dirty;
}

static void continuous_step(struct line *l, struct daemon *d, const struct policy *p, int64_t now_s)
{
	uint64_t now_ns = monotonic_ns(), left_ns = l->cont.next_ns - MIN(l->cont.next_ns, now_ns);

	l->due_s = now_s + (int64_t)(left_ns / 1000000000);
	if (!l->attached) /* what it had is not what comes back */
		l->cont.point_ns = 0;
	if ((left_ns && !l->wanted) || !l->attached || (p->paused && !l->wanted))
		return;
	if (l->leave_out && !l->wanted) {
		l->leave_out--;
		put_off(l, p, "backs off, the last one was over the policy's bounds",
			p->recovery_point_ns, now_s);
	} else if (disk_is_short(d, p)) {
		l->cont.next_ns = now_ns + RETRY_NS;
		close_window(&l->cont, now_ns);
		without_room(l, d, p, NO_ROOM, now_s);
	} else if (thins_out(l, d)) {
		l->cont.next_ns = now_ns + p->recovery_point_ns;
		close_window(&l->cont, now_ns);
		without_room(l, d, p, OVER_SOFT, now_s);
	} else if (p->skip_unchanged && !l->wanted && is_unchanged(l, d)) {
		is_current(l, p, now_s);
	} else {
		begin_run(l, d, p, now_s);
	}
}

static void idle_step(struct line *l, struct daemon *d, const struct policy *p, int64_t now_s)
{
	if (p->recovery_point_ns) {
		continuous_step(l, d, p, now_s);
		return;
	}
	l->due_s = policy_due(p, l->vm, &l->last_s, now_s);
	if (l->wanted)
		l->due_s = MIN(l->due_s, now_s);
	if (l->due_s > now_s || !l->attached || (p->paused && !l->wanted))
		return;
	if (l->leave_out && !l->wanted) {
		l->leave_out--;
		skip_run(l, p, "backs off, the last one was over the policy's bounds", now_s);
	} else if (disk_is_short(d, p)) {
		without_room(l, d, p, NO_ROOM, now_s);
	} else if (thins_out(l, d)) {
		without_room(l, d, p, OVER_SOFT, now_s);
	} else if (p->skip_unchanged && !l->wanted && is_unchanged(l, d)) {
		skip_run(l, p, "nothing changed", now_s);
	} else {
		begin_run(l, d, p, now_s);
	}
}

/* ---- what has ended ---- */

static void pre_hook_step(struct line *l, struct daemon *d, const struct policy *p)
{
	struct err e = {0};
	int rc = hook_look(&l->hook, &e);

	if (rc == -EAGAIN)
		return;
	if (rc) {
		trouble(l, p, e.text);
		l->failed = p->quiesce;
	}
	to_snapshot(l, d, p);
}

static struct policy_cost cost_of(const struct line *l, json_t *result)
{
	json_t *lost = json_object_get(result, "lost");

	return (struct policy_cost){
		.pause_ns = l->pause_ns,
		.interval_ns = l->interval_ns,
		.lost_ns = (uint64_t)json_integer_value(json_object_get(lost, "lost_ns")),
		.of_ns = (uint64_t)json_integer_value(json_object_get(lost, "of_ns")),
	};
}

static void weigh(struct line *l, const struct policy *p, const struct policy_cost *cost)
{
	if (policy_is_over(p, cost))
		l->backoff = MIN(l->backoff + 1, (uint32_t)BACKOFF_MAX);
	else if (l->backoff)
		l->backoff--;
	l->leave_out = (1u << l->backoff) - 1;
}

/* Its result is immutable once it has ended. */
static void snapshot_step(struct line *l, struct daemon *d, const struct policy *p)
{
	enum job_state state = job_state_of(l->job);
	struct policy_cost cost;

	if (!job_state_ended(state))
		return;
	if (state == JOB_DONE) {
		json_t *snap = json_object_get(l->job->result, "snapshot");

		l->snapshot = (uint64_t)json_integer_value(json_object_get(snap, "id"));
		l->pause_ns =
			(uint64_t)json_integer_value(json_object_get(l->job->result, "pause_ns"));
		cost = cost_of(l, l->job->result);
		weigh(l, p, &cost);
		if (p->self_check_every)
			l->unchecked =
				(l->unchecked + p->self_check_every - 1) % p->self_check_every;
		if (p->recovery_point_ns)
			count_epoch(l, p, l->job->result, &cost);
	} else {
		trouble(l, p, l->job->err.text);
		l->failed = true;
	}
	job_unref(l->job);
	l->job = NULL;
	to_post_hook(l, d, p);
}

static void post_hook_step(struct line *l, struct daemon *d, const struct policy *p)
{
	struct err e = {0};
	int rc = hook_look(&l->hook, &e);

	if (rc == -EAGAIN)
		return;
	if (rc)
		trouble(l, p, e.text);
	to_prune(l, d, p);
}

static void prune_step(struct line *l, const struct policy *p)
{
	enum job_state state = job_state_of(l->job);

	if (!job_state_ended(state))
		return;
	if (state == JOB_DONE)
		l->pruned +=
			(uint64_t)json_integer_value(json_object_get(l->job->result, "deleted"));
	else
		trouble(l, p, l->job->err.text);
	job_unref(l->job);
	l->job = NULL;
	end_run(l);
}

void line_step(struct line *l, struct daemon *d, const struct policy *p, int64_t now_s)
{
	switch (l->state) {
	case LINE_IDLE:
		idle_step(l, d, p, now_s);
		break;
	case LINE_PRE_HOOK:
		pre_hook_step(l, d, p);
		break;
	case LINE_SNAPSHOT:
		snapshot_step(l, d, p);
		break;
	case LINE_POST_HOOK:
		post_hook_step(l, d, p);
		break;
	default:
		prune_step(l, p);
	}
	line_backup_step(l, d, p, now_s);
}

uint32_t line_sleep_ms(const struct line *l, const struct policy *p)
{
	uint64_t now_ns;

	if (l->state != LINE_IDLE)
		return LINE_BUSY_MS;
	if (!p->recovery_point_ns || !l->attached || p->paused)
		return UINT32_MAX;
	now_ns = monotonic_ns();
	return (uint32_t)((l->cont.next_ns - MIN(l->cont.next_ns, now_ns)) / 1000000) + 1;
}

bool line_is_over(const struct line *l, const struct policy *p, int64_t now_s)
{
	return !l->attached && l->state == LINE_IDLE && now_s - l->there_s > LINE_FORGET_S &&
	       line_backup_is_idle(l, p);
}

void line_stop(struct line *l)
{
	line_backup_stop(&l->backup);
	hook_kill(&l->hook);
	job_unref(l->job);
	l->job = NULL;
	l->state = LINE_IDLE;
}

/* Of the last full window, or, before there is one, of what there is. */
static json_t *cost_json(const struct line_continuous *c)
{
	struct line_cost cost = c->last.until_ns ? c->last : c->now;
	uint64_t until_ns = cost.until_ns ? cost.until_ns : monotonic_ns(), span_ns;

	if (!cost.since_ns)
		return json_null();
	span_ns = MAX(1ull, until_ns - cost.since_ns);
	return json_pack("{sI sI sI sI sI sf sf}", "window_ns", (json_int_t)span_ns, "epochs",
			 (json_int_t)cost.epochs, "paused_ns", (json_int_t)cost.paused_ns,
			 "pages_stored", (json_int_t)cost.pages_stored, "exposed_ns",
			 (json_int_t)cost.exposed_ns, "paused_share",
			 (double)cost.paused_ns / (double)span_ns, "lost_share",
			 (double)cost.lost_ns / (double)MAX(1ull, cost.of_ns));
}

json_t *line_json(const struct line *l)
{
	bool never = l->due_s == INT64_MAX;

	return json_pack("{ss sI sb ss s{sI sI sI ss} sI so sI sI sI sI sI sI sI ss so so}", "vm",
			 l->vm, "uid", (json_int_t)l->uid, "attached", l->attached, "state",
			 line_state_names[l->state], "asked", "ended", (json_int_t)l->asked.ended,
			 "snapshot", (json_int_t)l->asked.snapshot, "pause_ns",
			 (json_int_t)l->asked.pause_ns, "said", l->asked.said, "last_s",
			 (json_int_t)l->began_s, "next_s",
			 never ? json_null() : json_integer(l->due_s), "snapshot",
			 (json_int_t)l->snapshot, "pause_ns", (json_int_t)l->pause_ns, "runs",
			 (json_int_t)l->runs, "failures", (json_int_t)l->failures, "skipped",
			 (json_int_t)l->skipped, "pruned", (json_int_t)l->pruned, "backoff",
			 (json_int_t)l->backoff, "said", l->said, "cost", cost_json(&l->cont),
			 "backup", line_backup_json(&l->backup));
}
