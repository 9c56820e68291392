/* SPDX-License-Identifier: MIT */
/* What job.c, one job, and jobs.c, all of them, share; nobody else includes it. */
#pragma once

#include "snapd/core/job.h"

#define JOB_THREADS_MAX 16

/* ENDED: to be joined.  Under jobs->lock. */
struct job_thread {
	struct jobs *jobs;
	pthread_t id;
	enum { JOB_THREAD_NONE, JOB_THREAD_RUNS, JOB_THREAD_ENDED } state;
};

struct jobs {
	pthread_mutex_t lock;
	pthread_cond_t idle; /* nr_threads fell */
	struct job *oldest, *newest;
	uint32_t nr;
	uint64_t next_id;
	struct job *queue, **queue_end; /* a reference each */
	struct job_thread threads[JOB_THREADS_MAX];
	uint32_t nr_threads; /* that run */
	bool stopping;
	_Atomic uint64_t ended[JOB_NR_KINDS][JOB_NR_STATES];
};

/* The registry's reference is job->refs' second one. */
void jobs_register(struct jobs *jobs, struct job *job);
