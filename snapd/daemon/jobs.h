/* SPDX-License-Identifier: MIT */
/* What job.c, one job, and jobs.c, all of them, share; nobody else includes it. */
#pragma once

#include "snapd/daemon/job.h"

struct jobs {
	pthread_mutex_t lock;
	pthread_cond_t idle; /* nr_threads fell */
	struct job *oldest, *newest;
	uint32_t nr;
	uint64_t next_id;
	struct job *queue, **queue_end; /* a reference each */
	uint32_t nr_threads;
	bool stopping;
	_Atomic uint64_t ended[JOB_NR_KINDS][JOB_NR_STATES];
};

/* The registry's reference is job->refs' second one. */
void jobs_register(struct jobs *jobs, struct job *job);
