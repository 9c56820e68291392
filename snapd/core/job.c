/* SPDX-License-Identifier: MIT */
/*
 * job: one job: how it changes state, and what is told of it; jobs.c has the
 * registry and the threads.  Any thread; job->lock, which is not held while the
 * job's body runs, is inside the registry's.
 */
#include "snapd/core/jobs.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/core/daemon.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"

const char *const job_state_names[JOB_NR_STATES] = {
	[JOB_QUEUED] = "queued", [JOB_RUNNING] = "running",	[JOB_DONE] = "done",
	[JOB_FAILED] = "failed", [JOB_CANCELLED] = "cancelled",
};
const char *const job_kind_names[JOB_NR_KINDS] = {
	[JOB_SNAPSHOT] = "snapshot",
	[JOB_ROLLBACK] = "rollback",
	[JOB_VERIFY] = "verify",
	[JOB_DIFF] = "diff",
	[JOB_DELETE] = "delete",
	[JOB_IMPORT] = "import",
	[JOB_EXPORT] = "export",
	[JOB_GC] = "gc",
	[JOB_SELF_CHECK] = "self-check",
	[JOB_SET] = "set",
	[JOB_PRUNE] = "prune",
	[JOB_REMOVE] = "remove",
	[JOB_CHECK] = "check",
	[JOB_ACCOUNT] = "account",
	[JOB_REPAIR] = "repair",
	[JOB_BACKUP_PUSH] = "backup-push",
	[JOB_BACKUP_PULL] = "backup-pull",
	[JOB_BACKUP_LIST] = "backup-list",
	[JOB_BACKUP_VERIFY] = "backup-verify",
	[JOB_BACKUP_FORGET] = "backup-forget",
	[JOB_BACKUP_PRUNE] = "backup-prune",
	[JOB_BACKUP_STATUS] = "backup-status",
};

const char *err_name(int code)
{
	switch (abs(code)) {
	case EINVAL:
	case E2BIG:
	case ENAMETOOLONG:
		return "invalid";
	case EPERM:
	case EACCES:
		return "forbidden";
	case ENOENT:
		return "not-found";
	case EEXIST:
		return "exists";
	case EBUSY:
	case EAGAIN:
		return "busy";
	case ENOTCONN:
		return "not-connected";
	case ENOTSUP:
		return "unsupported";
	case ENOSPC:
	case EDQUOT:
	case EFBIG:
		return "no-space";
	case ECANCELED:
		return "cancelled";
	case ETIMEDOUT:
		return "timeout";
	case EMSGSIZE:
		return "too-large";
	case ENOSYS:
		return "bad-method";
	case ESHUTDOWN:
		return "stopping";
	case ENOKEY:
	case EKEYREJECTED:
		return "wrong-key";
	case ENXIO:
		return "not-found";
	case E_CORRUPT:
		return "corrupt";
	default:
		return "internal";
	}
}

void err_ascii(struct err *e)
{
	for (char *p = e->text; *p; p++)
		if ((unsigned char)*p >= 0x7f)
			*p = '?';
}

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

/* ---- one job ---- */

static void job_free(struct job *job)
{
	if (job->ctx_free)
		job->ctx_free(job->ctx);
	json_decref(job->args);
	json_decref(job->result);
	pthread_cond_destroy(&job->changed);
	pthread_mutex_destroy(&job->lock);
	free(job);
}

struct job *job_ref(struct job *job)
{
	atomic_fetch_add_explicit(&job->refs, 1, memory_order_relaxed);
	return job;
}

void job_unref(struct job *job)
{
	if (job && atomic_fetch_sub_explicit(&job->refs, 1, memory_order_acq_rel) == 1)
		job_free(job);
}

enum job_state job_state_of(struct job *job)
{
	enum job_state s;

	pthread_mutex_lock(&job->lock);
	s = job->state;
	pthread_mutex_unlock(&job->lock);
	return s;
}

struct job *job_new(struct daemon *d, enum job_kind kind, uint32_t uid, json_t *args_stolen,
		    int (*fn)(struct job *, struct err *))
{
	struct job *job = args_stolen ? calloc(1, sizeof(*job)) : NULL;

	if (!job) {
		json_decref(args_stolen);
		return NULL;
	}
	job->kind = kind;
	job->uid = uid;
	job->args = args_stolen;
	job->unit = "pages";
	job->daemon = d;
	job->fn = fn;
	job->created_ns = now_ns();
	atomic_init(&job->refs, 2);
	pthread_mutex_init(&job->lock, NULL);
	pthread_cond_init(&job->changed, NULL);
	jobs_register(d->jobs, job);
	return job;
}

/* job->lock is held; ended() follows, after letting go. */
static void end_locked(struct job *job, enum job_state state)
{
	job->state = state;
	job->ended_ns = now_ns();
	atomic_store(&job->phase, NULL);
	atomic_fetch_add(&job->daemon->jobs->ended[job->kind][state], 1);
	pthread_cond_broadcast(&job->changed);
}

static void ended(struct job *job)
{
	if (job->over)
		job->over(job);
	daemon_wake(job->daemon);
}

static bool begin(struct job *job)
{
	bool go;

	pthread_mutex_lock(&job->lock);
	go = job->state == JOB_QUEUED;
	if (go) {
		job->state = JOB_RUNNING;
		job->started_ns = now_ns();
		pthread_cond_broadcast(&job->changed);
	}
	pthread_mutex_unlock(&job->lock);
	if (go)
		daemon_wake(job->daemon);
	return go;
}

static void finish(struct job *job, int rc, const struct err *e)
{
	struct err no_result = {0};

	pthread_mutex_lock(&job->lock);
	if (rc >= 0 && !job->result) {
		rc = err_set(&no_result, ENOMEM,
			     "it is done, but there is no memory to tell the result");
		e = &no_result;
	}
	if (rc < 0) {
		job->err = *e;
		job->err.code = rc;
		if (!e->code)
			snprintf(job->err.text, sizeof(job->err.text), "%s", strerror(-rc));
		err_ascii(&job->err);
	}
	end_locked(job, rc >= 0 ? JOB_DONE : rc == -ECANCELED ? JOB_CANCELLED : JOB_FAILED);
	pthread_mutex_unlock(&job->lock);
	if (rc < 0 && rc != -ECANCELED && !job->vm) /* a VM's thread says so itself */
		log_event(LOG_JOB_FAILED, LOG_LVL_WARN, "job %llu (%s): %s",
			  (unsigned long long)job->id, job_kind_names[job->kind], job->err.text);
	ended(job);
}

void job_run(struct job *job)
{
	struct log_about before = *log_about();
	struct err e = {0};
	int rc;

	if (!begin(job))
		return;
	log_about()->job = job->id;
	if (!before.vm)
		log_about()->vm = json_string_value(json_object_get(job->args, "vm"));
	if (atomic_load(&job->cancel))
		rc = err_set(&e, ECANCELED, "cancelled before it began");
	else
		rc = job->fn(job, &e);
	finish(job, rc, &e);
	*log_about() = before;
}

void job_fail(struct job *job, int code, const char *fmt, ...)
{
	struct err e = {0};
	bool over;
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(e.text, sizeof(e.text), fmt, ap);
	va_end(ap);
	e.code = -abs(code);
	pthread_mutex_lock(&job->lock);
	over = job_state_ended(job->state);
	pthread_mutex_unlock(&job->lock);
	if (!over)
		finish(job, e.code, &e);
}

void job_cancel(struct job *job)
{
	bool over = false;

	atomic_store(&job->cancel, true);
	pthread_mutex_lock(&job->lock);
	if (job->state == JOB_QUEUED) {
		err_set(&job->err, ECANCELED, "cancelled in the queue");
		end_locked(job, JOB_CANCELLED);
		over = true;
	}
	pthread_cond_broadcast(&job->changed);
	pthread_mutex_unlock(&job->lock);
	if (over)
		ended(job);
}

/* ---- looking ---- */

static json_t *progress_json(struct job *job)
{
	const char *phase = atomic_load(&job->phase);
	uint64_t done = atomic_load(&job->done), total = atomic_load(&job->total);

	return json_pack("{sI sI ss ss*}", "done", (json_int_t)done, "total", (json_int_t)total,
			 "unit", job->unit, "phase", phase);
}

/* job->lock is held. */
static void add_outcome(struct job *job, json_t *o)
{
	if (job->started_ns)
		json_object_set_new(o, "started_ns", json_integer((json_int_t)job->started_ns));
	if (job->ended_ns)
		json_object_set_new(o, "ended_ns", json_integer((json_int_t)job->ended_ns));
	/* Copied: reference counts of a shared value would race with the runner's. */
	if (job->state == JOB_DONE && job->result)
		json_object_set_new(o, "result", json_deep_copy(job->result));
	if (job->state == JOB_FAILED || job->state == JOB_CANCELLED)
		json_object_set_new(o, "error",
				    json_pack("{ss ss}", "code", err_name(job->err.code), "text",
					      job->err.text));
}

json_t *job_to_json(struct job *job)
{
	json_t *o;

	pthread_mutex_lock(&job->lock);
	o = json_pack("{sI ss ss sI so sI so}", "id", (json_int_t)job->id, "kind",
		      job_kind_names[job->kind], "state", job_state_names[job->state], "uid",
		      (json_int_t)job->uid, "args", json_deep_copy(job->args), "created_ns",
		      (json_int_t)job->created_ns, "progress", progress_json(job));
	if (o)
		add_outcome(job, o);
	/* No answer is better than one that says done and nothing else. */
	if (job->state == JOB_DONE && !json_object_get(o, "result")) {
		json_decref(o);
		o = NULL;
	}
	pthread_mutex_unlock(&job->lock);
	return o;
}
