/* SPDX-License-Identifier: MIT */
/* A queue of tasks and the threads that take from its front; see pool.h. */
#include "snapd/util/pool.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>

#include "snapd/util/cleanup.h"

#define POOL_MAX_THREADS 16
#define RANGES_MAX	 32

struct pool {
	pthread_mutex_t lock; /* everything below */
	pthread_cond_t more;  /* something is queued, or stopping */
	pthread_cond_t done;  /* some task is done */
	struct pool_task *head, *tail;
	bool stopping;
	/* fixed after create */
	pthread_t threads[POOL_MAX_THREADS];
	uint32_t nr_threads;
};

static void unlink_task(struct pool *p, struct pool_task *t)
{
	*(t->prev ? &t->prev->next : &p->head) = t->next;
	*(t->next ? &t->next->prev : &p->tail) = t->prev;
	t->prev = t->next = NULL;
}

/* Called and returns with the lock held. */
static void run_task(struct pool *p, struct pool_task *t)
{
	unlink_task(p, t);
	atomic_store(&t->state, POOL_RUNNING);
	pthread_mutex_unlock(&p->lock);
	t->fn(t);
	pthread_mutex_lock(&p->lock);
	/* After this store the owner may free the task. */
	atomic_store_explicit(&t->state, POOL_DONE, memory_order_release);
	pthread_cond_broadcast(&p->done);
}

static void *pool_thread(void *arg)
{
	struct pool *p = arg;

	pthread_mutex_lock(&p->lock);
	while (!p->stopping) {
		if (p->head)
			run_task(p, p->head);
		else
			pthread_cond_wait(&p->more, &p->lock);
	}
	pthread_mutex_unlock(&p->lock);
	return NULL;
}

static uint32_t usable_cores(void)
{
	cpu_set_t set;
	int n = sched_getaffinity(0, sizeof(set), &set) ? 1 : CPU_COUNT(&set);

	return MIN((uint32_t)n, (uint32_t)POOL_MAX_THREADS);
}

int pool_create(uint32_t nr_threads, struct pool **ret)
{
	struct pool *p = calloc(1, sizeof(*p));
	uint32_t want = nr_threads ? MIN(nr_threads, (uint32_t)POOL_MAX_THREADS) : usable_cores();
	int err = 0;

	if (!p)
		return -ENOMEM;
	pthread_mutex_init(&p->lock, NULL);
	pthread_cond_init(&p->more, NULL);
	pthread_cond_init(&p->done, NULL);
	while (p->nr_threads < want && !err) {
		err = pthread_create(&p->threads[p->nr_threads], NULL, pool_thread, p);
		p->nr_threads += !err;
	}
	if (err) {
		pool_destroy(p);
		return -err;
	}
	*ret = p;
	return 0;
}

void pool_destroy(struct pool *p)
{
	if (!p)
		return;
	pthread_mutex_lock(&p->lock);
	assert(!p->head);
	p->stopping = true;
	pthread_cond_broadcast(&p->more);
	pthread_mutex_unlock(&p->lock);
	for (uint32_t i = 0; i < p->nr_threads; i++)
		pthread_join(p->threads[i], NULL);
	pthread_cond_destroy(&p->done);
	pthread_cond_destroy(&p->more);
	pthread_mutex_destroy(&p->lock);
	free(p);
}

uint32_t pool_nr_threads(const struct pool *p)
{
	return p->nr_threads;
}

void pool_submit(struct pool *p, struct pool_task *t)
{
	pthread_mutex_lock(&p->lock);
	assert(t->state == POOL_IDLE || t->state == POOL_DONE);
	t->state = POOL_QUEUED;
	t->next = NULL;
	t->prev = p->tail;
	*(p->tail ? &p->tail->next : &p->head) = t;
	p->tail = t;
	pthread_cond_signal(&p->more);
	pthread_mutex_unlock(&p->lock);
}

void pool_wait(struct pool *p, struct pool_task *t)
{
	if (atomic_load_explicit(&t->state, memory_order_acquire) == POOL_DONE)
		return;
	pthread_mutex_lock(&p->lock);
	if (t->state == POOL_QUEUED)
		run_task(p, t);
	while (t->state == POOL_RUNNING)
		pthread_cond_wait(&p->done, &p->lock);
	pthread_mutex_unlock(&p->lock);
}

void pool_cancel(struct pool *p, struct pool_task *t)
{
	pthread_mutex_lock(&p->lock);
	if (t->state == POOL_QUEUED) {
		unlink_task(p, t);
		t->state = POOL_IDLE;
	}
	while (t->state == POOL_RUNNING)
		pthread_cond_wait(&p->done, &p->lock);
	pthread_mutex_unlock(&p->lock);
}

struct range {
	struct pool_task task;
	int (*fn)(void *arg, uint64_t first, uint64_t n);
	void *arg;
	uint64_t first, n;
	int err;
};

static void range_task(struct pool_task *task)
{
	struct range *r = (struct range *)((char *)task - offsetof(struct range, task));

	r->err = r->fn(r->arg, r->first, r->n);
}

int pool_ranges(struct pool *p, uint64_t nr, uint64_t parallel_min,
		int (*fn)(void *arg, uint64_t first, uint64_t n), void *arg)
{
	uint32_t parts = MIN(2 * p->nr_threads, (uint32_t)RANGES_MAX);
	struct range r[RANGES_MAX];
	uint64_t end = 0;
	int err = 0;

	if (nr < parallel_min || parts < 2)
		return fn(arg, 0, nr);
	for (uint32_t i = 0; i < parts; i++) {
		r[i] = (struct range){.task.fn = range_task, .fn = fn, .arg = arg, .first = end};
		end = nr * (i + 1) / parts;
		r[i].n = end - r[i].first;
		pool_submit(p, &r[i].task);
	}
	/* The threads take the first parts, so work from the last towards them. */
	for (uint32_t i = parts; i-- > 0;) {
		pool_wait(p, &r[i].task);
		err = r[i].err ? r[i].err : err;
	}
	return err;
}
