/* SPDX-License-Identifier: MIT */
/*
 * jobs: the registry of jobs and the job threads.
 *
 * The registry is a list, oldest first; an ended job leaves it an hour after its
 * end, or when 1024 newer jobs are there.  Detached jobs run on a thread each, 16
 * at most and 8 of one user, so that one user's slow exports leave room for
 * others; the rest queue, in order, at most 64 of one user.
 *
 * Locks: jobs->lock (registry, queue, thread count) → job->lock (state, result,
 * error, times).  Neither is held while a job's body runs.
 */
#include "snapd/core/jobs.h"

#include <signal.h>
#include <stdlib.h>

#include "snapd/core/daemon.h"
#include "snapd/util/cleanup.h"

#define JOB_THREADS_USER 8
#define JOB_QUEUED_USER	 64
#define JOB_KEEP_NR	 1024
#define JOB_KEEP_NS	 (3600ull * 1000000000)

int jobs_start(struct daemon *d)
{
	struct jobs *jobs = calloc(1, sizeof(*jobs));

	if (!jobs)
		return -ENOMEM;
	pthread_mutex_init(&jobs->lock, NULL);
	pthread_cond_init(&jobs->idle, NULL);
	jobs->queue_end = &jobs->queue;
	jobs->next_id = 1;
	d->jobs = jobs;
	return 0;
}

static void unlink_job(struct jobs *jobs, struct job *job)
{
	*(job->older ? &job->older->newer : &jobs->oldest) = job->newer;
	*(job->newer ? &job->newer->older : &jobs->newest) = job->older;
	job->older = job->newer = NULL;
	jobs->nr--;
}

/* Joined rather than detached: libraries free what they keep for a thread as it ends,
 * and must have done so before the process does. */
static void join_ended(struct jobs *jobs)
{
	for (size_t i = 0; i < ARRAY_SIZE(jobs->threads); i++) {
		struct job_thread *t = &jobs->threads[i];

		if (t->state != JOB_THREAD_ENDED)
			continue;
		pthread_join(t->id, NULL);
		t->state = JOB_THREAD_NONE;
	}
}

void jobs_stop(struct daemon *d)
{
	struct jobs *jobs = d->jobs;
	struct job *job;

	if (!jobs)
		return;
	pthread_mutex_lock(&jobs->lock);
	jobs->stopping = true;
	for (job = jobs->oldest; job; job = job->newer)
		atomic_store(&job->cancel, true);
	while (jobs->nr_threads)
		pthread_cond_wait(&jobs->idle, &jobs->lock);
	pthread_mutex_unlock(&jobs->lock);
	join_ended(jobs);

	while ((job = jobs->queue)) {
		jobs->queue = job->next;
		job_fail(job, ECANCELED, "the service is stopping");
		job_unref(job);
	}
	while ((job = jobs->oldest)) {
		unlink_job(jobs, job);
		job_unref(job);
	}
	d->jobs = NULL;
	pthread_cond_destroy(&jobs->idle);
	pthread_mutex_destroy(&jobs->lock);
	free(jobs);
}

static bool too_old(struct jobs *jobs, struct job *job, uint64_t now)
{
	bool old;

	pthread_mutex_lock(&job->lock);
	old = job_state_ended(job->state) &&
	      (jobs->nr > JOB_KEEP_NR || job->ended_ns + JOB_KEEP_NS < now);
	pthread_mutex_unlock(&job->lock);
	return old;
}

void jobs_register(struct jobs *jobs, struct job *job)
{
	struct job *next;

	pthread_mutex_lock(&jobs->lock);
	job->id = jobs->next_id++;
	job->older = jobs->newest;
	*(job->older ? &job->older->newer : &jobs->oldest) = job;
	jobs->newest = job;
	jobs->nr++;
	for (struct job *old = jobs->oldest; old != job; old = next) {
		next = old->newer;
		if (too_old(jobs, old, job->created_ns)) {
			unlink_job(jobs, old);
			job_unref(old);
		}
	}
	pthread_mutex_unlock(&jobs->lock);
}

/* ---- threads ---- */

/* jobs->lock is held. */
static uint32_t nr_of_user(struct jobs *jobs, uint32_t uid, bool on_thread)
{
	uint32_t n = 0;

	if (on_thread) {
		for (struct job *j = jobs->oldest; j; j = j->newer)
			n += j->on_thread && j->uid == uid;
	} else {
		for (struct job *j = jobs->queue; j; j = j->next)
			n += j->uid == uid;
	}
	return n;
}

/* The first queued job whose user is not at its share; its reference moves here. */
static struct job *take_locked(struct jobs *jobs)
{
	for (struct job **p = &jobs->queue, *job; (job = *p); p = &job->next) {
		if (nr_of_user(jobs, job->uid, true) >= JOB_THREADS_USER)
			continue;
		*p = job->next;
		if (!job->next)
			jobs->queue_end = p;
		job->next = NULL;
		job->on_thread = true;
		return job;
	}
	return NULL;
}

static void *job_thread(void *arg)
{
	struct job_thread *me = arg;
	struct jobs *jobs = me->jobs;
	struct job *job;

	pthread_mutex_lock(&jobs->lock);
	while (!jobs->stopping && (job = take_locked(jobs))) {
		pthread_mutex_unlock(&jobs->lock);
		job_run(job);
		pthread_mutex_lock(&jobs->lock);
		job->on_thread = false;
		job_unref(job);
	}
	jobs->nr_threads--;
	me->state = JOB_THREAD_ENDED;
	pthread_cond_signal(&jobs->idle);
	pthread_mutex_unlock(&jobs->lock);
	return NULL;
}

static struct job_thread *free_place(struct jobs *jobs)
{
	for (size_t i = 0; i < ARRAY_SIZE(jobs->threads); i++)
		if (jobs->threads[i].state == JOB_THREAD_NONE)
			return &jobs->threads[i];
	return NULL;
}

/* jobs->lock is held. */
static int start_thread(struct jobs *jobs)
{
	struct job_thread *t;
	sigset_t all, old;
	int rc;

	join_ended(jobs);
	t = free_place(jobs);
	if (!t)
		return -EAGAIN;
	t->jobs = jobs;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	rc = pthread_create(&t->id, NULL, job_thread, t);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (!rc)
		t->state = JOB_THREAD_RUNS;
	return -rc;
}

int job_run_detached(struct job *job)
{
	struct jobs *jobs = job->daemon->jobs;
	int rc = 0;

	pthread_mutex_lock(&jobs->lock);
	if (jobs->stopping)
		rc = -ECANCELED;
	else if (nr_of_user(jobs, job->uid, false) >= JOB_QUEUED_USER)
		rc = -EBUSY;
	else if (jobs->nr_threads < JOB_THREADS_MAX &&
		 nr_of_user(jobs, job->uid, true) < JOB_THREADS_USER) {
		rc = start_thread(jobs);
		if (!rc)
			jobs->nr_threads++;
		else if (jobs->nr_threads)
			rc = 0; /* a running thread takes it later */
	}
	if (!rc) {
		job->next = NULL;
		*jobs->queue_end = job_ref(job);
		jobs->queue_end = &job->next;
	}
	pthread_mutex_unlock(&jobs->lock);
	return rc;
}

/* ---- looking ---- */

struct job *job_find(struct daemon *d, uint64_t id)
{
	struct jobs *jobs = d->jobs;
	struct job *job;

	pthread_mutex_lock(&jobs->lock);
	for (job = jobs->newest; job && job->id != id; job = job->older)
		;
	if (job)
		job_ref(job);
	pthread_mutex_unlock(&jobs->lock);
	return job;
}

json_t *job_list_json(struct daemon *d, uint32_t uid)
{
	json_t *list = json_array();
	struct jobs *jobs = d->jobs;

	pthread_mutex_lock(&jobs->lock);
	for (struct job *job = jobs->newest; job; job = job->older)
		if (!uid || job->uid == uid)
			json_array_append_new(list, job_to_json(job));
	pthread_mutex_unlock(&jobs->lock);
	return list;
}

uint64_t job_count(struct daemon *d, enum job_kind kind, enum job_state state)
{
	uint64_t n = 0;

	if (job_state_ended(state))
		return atomic_load(&d->jobs->ended[kind][state]);
	pthread_mutex_lock(&d->jobs->lock);
	for (struct job *job = d->jobs->oldest; job; job = job->newer)
		n += job->kind == kind && job_state_of(job) == state;
	pthread_mutex_unlock(&d->jobs->lock);
	return n;
}
