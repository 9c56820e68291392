/* SPDX-License-Identifier: MIT */
/* A bounded ring of bytes between a client and a job; see stream.h. */
#include "snapd/core/stream.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/core/daemon.h"
#include "snapd/util/cleanup.h"

#define STREAM_BYTES	  (4u << 20)
/* Wake the other side for no less: a context switch per packet would cost more
 * than the copy. */
#define STREAM_WAKE_BYTES (STREAM_BYTES / 4)

struct stream {
	struct daemon *daemon;
	pthread_mutex_t lock; /* everything below */
	pthread_cond_t cond;  /* for the job's side */
	size_t head, len;
	bool gone[2];
	bool ended; /* by the writer */
	bool client_waits;
	uint8_t data[STREAM_BYTES];
};

int stream_create(struct daemon *d, struct stream **ret)
{
	struct stream *s = malloc(sizeof(*s));
	pthread_condattr_t attr;

	if (!s)
		return -ENOMEM;
	memset(s, 0, offsetof(struct stream, data));
	s->daemon = d;
	pthread_mutex_init(&s->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&s->cond, &attr);
	pthread_condattr_destroy(&attr);
	*ret = s;
	return 0;
}

static void wake_client(struct stream *s)
{
	if (!s->client_waits)
		return;
	s->client_waits = false;
	daemon_wake(s->daemon);
}

void stream_unref(struct stream *s, enum stream_side side)
{
	bool last;

	if (!s)
		return;
	pthread_mutex_lock(&s->lock);
	s->gone[side] = true;
	last = s->gone[!side];
	pthread_cond_signal(&s->cond);
	wake_client(s);
	pthread_mutex_unlock(&s->lock);
	if (!last)
		return;
	pthread_cond_destroy(&s->cond);
	pthread_mutex_destroy(&s->lock);
	free(s);
}

void stream_end(struct stream *s)
{
	pthread_mutex_lock(&s->lock);
	s->ended = true;
	pthread_cond_signal(&s->cond);
	wake_client(s);
	pthread_mutex_unlock(&s->lock);
}

static size_t put(struct stream *s, const uint8_t *src, size_t len)
{
	size_t tail = (s->head + s->len) % STREAM_BYTES;
	size_t n = MIN(len, STREAM_BYTES - s->len), first = MIN(n, STREAM_BYTES - tail);

	memcpy(s->data + tail, src, first);
	memcpy(s->data, src + first, n - first);
	s->len += n;
	return n;
}

static size_t get(struct stream *s, uint8_t *dst, size_t len)
{
	size_t n = MIN(len, s->len), first = MIN(n, STREAM_BYTES - s->head);

	memcpy(dst, s->data + s->head, first);
	memcpy(dst + first, s->data, n - first);
	s->head = (s->head + n) % STREAM_BYTES;
	s->len -= n;
	return n;
}

/* One wait of the job's side, a fifth of a second at most: nobody signals a
 * job's cancel flag here. */
static int wait_a_little(struct stream *s, struct job *job)
{
	struct timespec until;

	if (atomic_load(&job->cancel))
		return -ECANCELED;
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_nsec += 200000000;
	until.tv_sec += until.tv_nsec / 1000000000;
	until.tv_nsec %= 1000000000;
	pthread_cond_timedwait(&s->cond, &s->lock, &until);
	return 0;
}

int stream_job_read(struct stream *s, struct job *job, void *dst, size_t len)
{
	uint8_t *p = dst;
	int rc = 0;

	pthread_mutex_lock(&s->lock);
	while (!rc && len) {
		size_t n = get(s, p, len);

		p += n;
		len -= n;
		if (STREAM_BYTES - s->len >= STREAM_WAKE_BYTES)
			wake_client(s);
		if (!len)
			break;
		if (s->ended)
			rc = -ENODATA;
		else if (s->gone[STREAM_CLIENT])
			rc = -EPIPE;
		else
			rc = wait_a_little(s, job);
	}
	pthread_mutex_unlock(&s->lock);
	return rc;
}

int stream_job_write(struct stream *s, struct job *job, const void *src, size_t len)
{
	const uint8_t *p = src;
	int rc = 0;

	pthread_mutex_lock(&s->lock);
	while (!rc && len) {
		size_t n = put(s, p, len);

		p += n;
		len -= n;
		if (s->len >= STREAM_WAKE_BYTES)
			wake_client(s);
		if (s->gone[STREAM_CLIENT])
			rc = -EPIPE;
		else if (len)
			rc = wait_a_little(s, job);
	}
	pthread_mutex_unlock(&s->lock);
	return rc;
}

size_t stream_client_write(struct stream *s, const void *src, size_t len)
{
	size_t n;

	pthread_mutex_lock(&s->lock);
	n = s->gone[STREAM_JOB] ? len : put(s, src, len);
	s->client_waits = n < len;
	pthread_cond_signal(&s->cond);
	pthread_mutex_unlock(&s->lock);
	return n;
}

long stream_client_read(struct stream *s, void *dst, size_t len)
{
	long n;

	pthread_mutex_lock(&s->lock);
	n = (long)get(s, dst, len);
	if (!n && s->ended)
		n = -1;
	else if (!n && s->gone[STREAM_JOB])
		n = -2;
	s->client_waits = !n;
	if (STREAM_BYTES - s->len >= STREAM_WAKE_BYTES)
		pthread_cond_signal(&s->cond);
	pthread_mutex_unlock(&s->lock);
	return n;
}

bool stream_client_ready(struct stream *s)
{
	bool ready;

	pthread_mutex_lock(&s->lock);
	ready = !s->client_waits;
	pthread_mutex_unlock(&s->lock);
	return ready;
}
