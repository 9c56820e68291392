/* SPDX-License-Identifier: MIT */
/* Packs to the bucket, a few at a time; see upload.h. */
#include "snapd/backup/upload.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/util/cleanup.h"

#define REPORT_NS 200000000

enum slot_state { SLOT_FREE, SLOT_FILLING, SLOT_QUEUED, SLOT_SENDING };

struct slot {
	struct pack_builder b; /* whoever has it in its state */
	enum slot_state state; /* lock */
};

struct uploader {
	struct repo *repo; /* borrowed */
	pthread_t threads[UPLOAD_THREADS];
	uint32_t nr_threads;
	pthread_mutex_t lock; /* the rest, and the slots' states */
	pthread_cond_t changed;
	struct slot slots[UPLOAD_SLOTS];
	bool stopping;
	struct err err; /* the first failure */
	struct upload_state state;
	void (*report)(void *arg); /* on the thread that takes and sends */
	void *report_arg;
};

static int put_pack(struct uploader *u, struct pack_builder *b, struct err *e)
{
	struct iovec iov[2] = {{.iov_base = b->head, .iov_len = b->head_bytes},
			       {.iov_base = b->data, .iov_len = b->data_bytes}};
	char key[REPO_KEY_BYTES];
	int rc = objstore_put(u->repo->os, repo_key(REPO_PACKS, &b->name, key), iov, 2,
			      OBJSTORE_ONLY_IF_ABSENT, e);

	if (rc == -EEXIST) { /* ours: an answer was lost */
		err_clear(e);
		rc = 0;
	}
	return rc ? rc : cache_set_pack(u->repo->cache, &b->name, CACHE_SENT, e);
}

/* The lock is held. */
static struct slot *find_slot(struct uploader *u, enum slot_state state)
{
	for (int i = 0; i < UPLOAD_SLOTS; i++)
		if (u->slots[i].state == state)
			return &u->slots[i];
	return NULL;
}

static void count_pending(struct upload_state *st, const struct pack_builder *b)
{
	st->pending_pages += b->header.nr_pages;
	st->pending_bytes += b->head_bytes + b->data_bytes;
}

static void count_arrived(struct upload_state *st, const struct pack_builder *b)
{
	st->pending_pages -= b->header.nr_pages;
	st->pending_bytes -= b->head_bytes + b->data_bytes;
	st->arrived_bytes += b->head_bytes + b->data_bytes;
}

/* Until something changed, under the lock, which is let go to report. */
static void wait_and_report(struct uploader *u)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_nsec += REPORT_NS;
	until.tv_sec += until.tv_nsec / 1000000000;
	until.tv_nsec %= 1000000000;
	if (pthread_cond_clockwait(&u->changed, &u->lock, CLOCK_MONOTONIC, &until) != ETIMEDOUT)
		return;
	pthread_mutex_unlock(&u->lock);
	u->report(u->report_arg);
	pthread_mutex_lock(&u->lock);
}

static void *upload_thread(void *arg)
{
	struct uploader *u = arg;
	struct slot *s;

	pthread_mutex_lock(&u->lock);
	while (!u->stopping) {
		struct err e = {0};
		int rc = 0;

		s = find_slot(u, SLOT_QUEUED);
		if (!s) {
			pthread_cond_wait(&u->changed, &u->lock);
			continue;
		}
		s->state = SLOT_SENDING;
		pthread_mutex_unlock(&u->lock);
		rc = put_pack(u, &s->b, &e);
		pthread_mutex_lock(&u->lock);
		s->state = SLOT_FREE;
		if (!rc)
			count_arrived(&u->state, &s->b);
		else if (!u->err.code)
			err_set(&u->err, -rc, "%s", e.code ? e.text : strerror(-rc));
		pthread_cond_broadcast(&u->changed);
	}
	pthread_mutex_unlock(&u->lock);
	return NULL;
}

static int start(struct uploader *u)
{
	sigset_t all, old;
	int rc = 0;

	for (int i = 0; i < UPLOAD_SLOTS && !rc; i++)
		rc = pack_builder_init(&u->slots[i].b, &u->repo->keys);
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	while (!rc && u->nr_threads < UPLOAD_THREADS) {
		rc = -pthread_create(&u->threads[u->nr_threads], NULL, upload_thread, u);
		u->nr_threads += !rc;
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return rc;
}

int uploader_create(struct repo *r, void (*report)(void *arg), void *arg, struct uploader **ret,
		    struct err *e)
{
	struct uploader *u = calloc(1, sizeof(*u));
	int rc;

	if (!u)
		return err_errno(e, ENOMEM, "backup");
	u->repo = r;
	u->report = report;
	u->report_arg = arg;
	pthread_mutex_init(&u->lock, NULL);
	pthread_cond_init(&u->changed, NULL);
	rc = start(u);
	if (rc) {
		uploader_destroy(u);
		return err_errno(e, -rc, "backup: start uploads");
	}
	*ret = u;
	return 0;
}

void uploader_destroy(struct uploader *u)
{
	if (!u)
		return;
	pthread_mutex_lock(&u->lock);
	u->stopping = true;
	pthread_cond_broadcast(&u->changed);
	pthread_mutex_unlock(&u->lock);
	for (uint32_t i = 0; i < u->nr_threads; i++)
		pthread_join(u->threads[i], NULL);
	for (int i = 0; i < UPLOAD_SLOTS; i++)
		pack_builder_deinit(&u->slots[i].b);
	pthread_cond_destroy(&u->changed);
	pthread_mutex_destroy(&u->lock);
	free(u);
}

struct pack_builder *uploader_take(struct uploader *u)
{
	struct slot *s = NULL;

	pthread_mutex_lock(&u->lock);
	while (!u->err.code && !(s = find_slot(u, SLOT_FREE)))
		wait_and_report(u);
	if (s)
		s->state = SLOT_FILLING;
	pthread_mutex_unlock(&u->lock);
	return s ? &s->b : NULL;
}

static struct slot *slot_of(struct pack_builder *b)
{
	return (struct slot *)((char *)b - offsetof(struct slot, b));
}

int uploader_send(struct uploader *u, struct pack_builder *b, struct err *e)
{
	int rc = cache_put_pack(u->repo->cache, &b->name, CACHE_INTENDED, b->names,
				b->header.nr_pages, e);

	if (rc)
		return rc;
	pthread_mutex_lock(&u->lock);
	slot_of(b)->state = SLOT_QUEUED;
	count_pending(&u->state, b);
	pthread_cond_broadcast(&u->changed);
	pthread_mutex_unlock(&u->lock);
	return 0;
}

int uploader_finish(struct uploader *u, struct err *e)
{
	int rc;

	pthread_mutex_lock(&u->lock);
	while (!u->err.code && (find_slot(u, SLOT_QUEUED) || find_slot(u, SLOT_SENDING)))
		wait_and_report(u);
	rc = u->err.code;
	if (rc)
		err_set(e, -rc, "%s", u->err.text);
	pthread_mutex_unlock(&u->lock);
	return rc;
}

void uploader_state(struct uploader *u, struct upload_state *ret)
{
	pthread_mutex_lock(&u->lock);
	*ret = u->state;
	pthread_mutex_unlock(&u->lock);
}
