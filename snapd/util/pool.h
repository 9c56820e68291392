/* SPDX-License-Identifier: MIT */
/*
 * pool: a few threads, one per core, that all VMs share for work that is pure
 * CPU: copying and hashing pages.  A task never blocks and never waits for
 * another task.
 *
 * The thread that needs a result never waits for a task that nobody has begun:
 * pool_wait() then runs it itself.  So a VM goes on at its own thread's speed
 * when the pool is busy with others, and a pool of no threads is merely slow.
 */
#pragma once

#include <stdatomic.h>
#include <stdint.h>

struct pool;

enum pool_task_state { POOL_IDLE, POOL_QUEUED, POOL_RUNNING, POOL_DONE };

struct pool_task {
	void (*fn)(struct pool_task *task);
	/* the pool's, under its lock; `state` may be read by the owner at any time */
	_Atomic int state; /* enum pool_task_state; DONE is stored with release */
	struct pool_task *prev, *next;
};

/* nr_threads 0: one per core that this process may use, at most 16. */
int pool_create(uint32_t nr_threads, struct pool **ret);
void pool_destroy(struct pool *p); /* no task may be queued; accepts NULL */
uint32_t pool_nr_threads(const struct pool *p);

/* The task stays the caller's, who must wait for it before it reuses or frees it. */
void pool_submit(struct pool *p, struct pool_task *task);
/* Until the task is done; runs it here if nobody has begun it. */
void pool_wait(struct pool *p, struct pool_task *task);
/* Take it out of the queue, or wait until it is done. */
void pool_cancel(struct pool *p, struct pool_task *task);

/*
 * fn(arg, first, n) over [0, nr) in a few parts, on this thread and, from
 * parallel_min on, on whatever pool threads are free.  Returns when all is done,
 * with one of the errors, if any part had one.
 */
int pool_ranges(struct pool *p, uint64_t nr, uint64_t parallel_min,
		int (*fn)(void *arg, uint64_t first, uint64_t n), void *arg);
