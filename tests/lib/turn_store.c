/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"
#include "tests/lib/turn_store.h"

struct objstore world;
struct rand rng;
bool alive[NR_ACTORS];

static pthread_mutex_t turn_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn_changed = PTHREAD_COND_INITIALIZER;
static int turn = -1; /* -1: the main thread; under turn_lock */
static _Thread_local int self = -1;

static void wait_turn(void)
{
	pthread_mutex_lock(&turn_lock);
	while (turn != self)
		pthread_cond_wait(&turn_changed, &turn_lock);
	pthread_mutex_unlock(&turn_lock);
}

static void give_turn(int to)
{
	pthread_mutex_lock(&turn_lock);
	turn = to;
	pthread_cond_broadcast(&turn_changed);
	pthread_mutex_unlock(&turn_lock);
}

static int pick_alive(void)
{
	int list[NR_ACTORS], nr = 0;

	for (int i = 0; i < NR_ACTORS; i++)
		if (alive[i])
			list[nr++] = i;
	return nr ? list[rand_below(&rng, (uint64_t)nr)] : -1;
}

/* Time goes on: mostly a little, at times for longer than any window. */
static void pass_time(void)
{
	uint64_t dice = rand_below(&rng, 100);

	if (dice < 60)
		world.now_ms += (int64_t)rand_below(&rng, 300);
	else if (dice < 90)
		world.now_ms += (int64_t)rand_below(&rng, 2000);
	else
		world.now_ms += (int64_t)rand_below(&rng, GRACE_S * 1000 / 3);
}

/* In front of each call to the store. */
static void step(void)
{
	if (self < 0)
		return;
	pass_time();
	give_turn(pick_alive());
	wait_turn();
}

void begin_turns(int actor)
{
	self = actor;
	wait_turn();
}

void pass_turn(void)
{
	give_turn(pick_alive());
}

/* ---- objstore.h ---- */

struct object *find_object(const char *key)
{
	for (size_t i = 0; i < world.nr; i++)
		if (world.all[i].there && !strcmp(world.all[i].key, key))
			return &world.all[i];
	return NULL;
}

const char *objstore_url(const struct objstore *s)
{
	return "mem://";
}

int64_t objstore_clock(const struct objstore *s)
{
	return world.now_ms / 1000;
}

int objstore_put(struct objstore *s, const char *key, const struct iovec *iov, int nr_iov,
		 unsigned int flags, struct err *e)
{
	struct object *o;
	int64_t sent_ms = world.now_ms;
	size_t at = 0;

	step();
	if (world.now_ms - sent_ms >= TOO_LONG_MS && !strncmp(key, "snapshots/", 10))
		return -ETIMEDOUT;
	if (find_object(key))
		return flags & OBJSTORE_ONLY_IF_ABSENT ? -EEXIST : -EINVAL;
	CHECK(world.nr < MAX_OBJECTS);
	o = &world.all[world.nr++];
	snprintf(o->key, sizeof(o->key), "%s", key);
	for (int i = 0; i < nr_iov; i++)
		o->len += iov[i].iov_len;
	o->bytes = malloc(o->len + 1);
	for (int i = 0; i < nr_iov; at += iov[i++].iov_len)
		memcpy(o->bytes + at, iov[i].iov_base, iov[i].iov_len);
	o->mtime_s = world.now_ms / 1000;
	o->there = true;
	return 0;
}

int objstore_get(struct objstore *s, const char *key, uint64_t offset, void *buf, size_t len,
		 size_t *ret_len, struct err *e)
{
	struct object *o;

	step();
	o = find_object(key);
	if (!o)
		return err_set(e, ENOENT, "%s: missing", key);
	*ret_len = offset >= o->len ? 0 : MIN(len, o->len - offset);
	memcpy(buf, o->bytes + offset, *ret_len);
	return 0;
}

int objstore_head(struct objstore *s, const char *key, struct objstore_info *ret, struct err *e)
{
	const struct object *o;

	step();
	o = find_object(key);
	if (!o)
		return -ENOENT;
	*ret = (struct objstore_info){.size = o->len, .mtime_s = o->mtime_s};
	if (s->after_head)
		s->after_head(key);
	return 0;
}

int objstore_delete(struct objstore *s, const char *key, struct err *e)
{
	struct object *o;

	step();
	o = find_object(key);
	if (o) {
		o->there = false;
		free(o->bytes);
		o->bytes = NULL;
		s->nr_deleted++;
	}
	if (s->after_delete)
		s->after_delete();
	return 0;
}

static int compare_keys(const void *a, const void *b)
{
	return strcmp(*(const char *const *)a, *(const char *const *)b);
}

int objstore_list(struct objstore *s, const char *prefix, const char *start_after,
		  objstore_list_fn fn, void *arg, struct err *e)
{
	_cleanup_free_ const char **keys = calloc(MAX_OBJECTS, sizeof(*keys));
	int64_t began_ms = world.now_ms;
	size_t nr = 0;
	int rc = 0;

	step();
	for (size_t i = 0; i < world.nr; i++)
		if (world.all[i].there && !strncmp(world.all[i].key, prefix, strlen(prefix)))
			keys[nr++] = world.all[i].key;
	qsort(keys, nr, sizeof(*keys), compare_keys);
	for (size_t i = 0; !rc && i < nr; i++) {
		const struct object *o;

		if (i % 3 == 2)
			step();
		o = find_object(keys[i]);
		if (o)
			rc = fn(arg, o->key,
				&(struct objstore_info){.size = o->len, .mtime_s = o->mtime_s});
	}
	return !rc && world.now_ms - began_ms >= TOO_LONG_MS ? -ETIMEDOUT : rc;
}

void clear_world(void)
{
	for (size_t i = 0; i < world.nr; i++)
		free(world.all[i].bytes);
	memset(world.all, 0, sizeof(world.all));
	world.nr = 0;
	world.now_ms = 1000000;
	world.after_head = NULL;
}
