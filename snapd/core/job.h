/* SPDX-License-Identifier: MIT */
/*
 * job: one piece of long work that a client asked for: a snapshot, a rollback, a
 * verify…  Made by the control thread, run by the VM's thread (vm_submit()) or by
 * a job thread (job_run_detached()), watched by any number of clients.
 *
 *   QUEUED ──► RUNNING ──► DONE | FAILED | CANCELLED
 *
 * Reference-counted: the registry holds one until the job is old (an hour after
 * its end, or 1024 later jobs), its runner one, each watcher one.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <pthread.h>

#include <jansson.h>

#include "snapd/util/err.h"

struct daemon;
struct vm;

enum job_state { JOB_QUEUED, JOB_RUNNING, JOB_DONE, JOB_FAILED, JOB_CANCELLED, JOB_NR_STATES };
enum job_kind {
	JOB_SNAPSHOT,
	JOB_ROLLBACK,
	JOB_VERIFY,
	JOB_DIFF,
	JOB_DELETE,
	JOB_IMPORT,
	JOB_EXPORT,
	JOB_GC,
	JOB_SELF_CHECK,
	JOB_SET,
	JOB_PRUNE,
	JOB_REMOVE,
	JOB_CHECK,
	JOB_ACCOUNT,
	JOB_REPAIR,
	JOB_BACKUP_PUSH,
	JOB_BACKUP_PULL,
	JOB_BACKUP_LIST,
	JOB_BACKUP_VERIFY,
	JOB_BACKUP_FORGET,
	JOB_BACKUP_PRUNE,
	JOB_BACKUP_STATUS,
	JOB_NR_KINDS
};
extern const char *const job_state_names[JOB_NR_STATES];
extern const char *const job_kind_names[JOB_NR_KINDS];

struct job {
	uint64_t id;
	enum job_kind kind;
	uint32_t uid; /* who asked; only they and root see it */
	json_t *args; /* owned; read-only once the job is queued */
	/* progress: written by the runner, read by anyone */
	_Atomic uint64_t done, total; /* bytes, or pages: see unit */
	const char *unit;	      /* "pages", "bytes", "objects" */
	_Atomic(const char *) phase;  /* static strings: "early capture", "paused", … */
	_Atomic bool cancel;	      /* runner looks at it between steps */
	/* under lock */
	pthread_mutex_t lock;
	pthread_cond_t changed;
	enum job_state state;
	struct err err;				   /* FAILED, CANCELLED */
	json_t *result;				   /* DONE; owned */
	uint64_t created_ns, started_ns, ended_ns; /* CLOCK_REALTIME */
	_Atomic int refs;
	/* runner's */
	struct daemon *daemon;
	int (*fn)(struct job *job, struct err *e); /* sets job->result; on the runner's thread */
	struct job *next;			   /* queue of the VM, or of the job threads */
	struct vm *vm; /* vm_submit() sets it; borrowed: the VM outlives its queue */
	void *ctx;     /* of the asker's, for fn; freed by ctx_free with the job */
	void (*ctx_free)(void *ctx);
	/* Called once when it has ended, also when fn never ran; by any thread, without
	 * a lock.  ctx may be kept for an hour after it, for those who look. */
	void (*over)(struct job *job);
	/* job.c's, under the registry's lock */
	struct job *older, *newer;
	bool on_thread;
};

/* The registry; before any job, and after every VM thread has ended.  jobs_stop()
 * cancels and waits for the job threads. */
int jobs_start(struct daemon *d);
void jobs_stop(struct daemon *d);

/* The reference returned is the caller's; the registry has another.  job_run_detached()
 * and vm_submit() take one of their own for as long as the job is queued or runs.
 * NULL: out of memory (args are freed in any case). */
struct job *job_new(struct daemon *d, enum job_kind kind, uint32_t uid, json_t *args_stolen,
		    int (*fn)(struct job *, struct err *));
struct job *job_ref(struct job *job);
void job_unref(struct job *job);
/* Run job->fn on this thread, with all state changes and the eventfd that wakes
 * the control thread's watchers.  Does nothing when it was cancelled in the queue. */
void job_run(struct job *job);
/* On a thread of its own; at most 16 at once and 8 of one user, others queue.
 * -EBUSY: too many of this user's are queued already. */
int job_run_detached(struct job *job);
/* Any thread.  A queued job ends at once; a running one when it next looks. */
void job_cancel(struct job *job);
/* Finish without running (VM is gone, daemon stops).  No effect when it has ended. */
void job_fail(struct job *job, int code, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));
/* "not-found", "busy", "corrupt"…: what the API calls an error; code is ±errno. */
const char *err_name(int code);
/* For texts that go into JSON: bytes that are not ASCII become '?'. */
void err_ascii(struct err *e);
struct job *job_find(struct daemon *d, uint64_t id); /* a new reference, or NULL */
/* Of its arguments: 0, NULL where there is none. */
static inline uint64_t job_arg_u64(const struct job *job, const char *key)
{
	return (uint64_t)json_integer_value(json_object_get(job->args, key));
}
static inline const char *job_arg_text(const struct job *job, const char *key)
{
	return json_string_value(json_object_get(job->args, key));
}
json_t *job_to_json(struct job *job);		       /* a new object */
json_t *job_list_json(struct daemon *d, uint32_t uid); /* uid 0: all; newest first */
enum job_state job_state_of(struct job *job);
static inline bool job_state_ended(enum job_state s)
{
	return s >= JOB_DONE;
}
/* How many jobs of that kind came to that state since the daemon started. */
uint64_t job_count(struct daemon *d, enum job_kind kind, enum job_state state);
