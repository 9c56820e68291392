/* SPDX-License-Identifier: MIT */
/* A job's repository, and figures over all; see session.h. */
#include "snapd/backup/session.h"

#include <errno.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "snapd/backup/backup.h"
#include "snapd/core/daemon.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"

#define DAMAGES_LOGGED 16 /* each; then how many more */

const char *const backup_op_names[BACKUP_NR_OPS] = {
	[BACKUP_PUSH] = "push",
	[BACKUP_PULL] = "pull",
	[BACKUP_VERIFY] = "verify",
	[BACKUP_PRUNE] = "prune",
};

static int cache_path(const struct daemon *d, const char *sub, char *ret, size_t size,
		      struct err *e)
{
	if (snprintf(ret, size, "%s/backup%s", d->config.store_dir, sub) >= (int)size)
		return err_set(e, ENAMETOOLONG, "%s: too long", d->config.store_dir);
	return 0;
}

int backup_start(struct daemon *d, struct err *e)
{
	struct backups *b = calloc(1, sizeof(*b));

	if (!b)
		return err_errno(e, ENOMEM, "backup");
	pthread_mutex_init(&b->lock, NULL);
	d->backups = b;
	return 0;
}

void backup_stop(struct daemon *d)
{
	struct backups *b = d->backups;
	struct backup_found *found;
	struct backup_last *last;

	if (!b)
		return;
	while ((last = b->last)) {
		b->last = last->next;
		free(last);
	}
	cache_close(b->pushed);
	while ((found = b->found)) {
		b->found = found->next;
		free(found->url);
		free(found);
	}
	pthread_mutex_destroy(&b->lock);
	free(b);
	d->backups = NULL;
}

/* Opened when there is a first thing to note or to ask. */
static struct cache *pushed_cache(struct daemon *d)
{
	struct backups *b = d->backups;
	struct cache *c = NULL;
	char path[4096];
	struct err why = {0};
	int rc;

	pthread_mutex_lock(&b->lock);
	rc = b->pushed ? 0 : cache_path(d, "", path, sizeof(path), &why);
	if (!rc && !b->pushed && mkdir(path, 0700) && errno != EEXIST)
		rc = err_errno(&why, errno, "cannot make %s", path);
	if (!rc && !b->pushed)
		rc = cache_path(d, "/pushed", path, sizeof(path), &why);
	if (!rc && !b->pushed)
		rc = cache_open(path, &b->pushed, &why);
	if (rc)
		log_warn("backup: %s", why.text);
	c = b->pushed;
	pthread_mutex_unlock(&b->lock);
	return c;
}

static void pushed_key(const char *url, uint64_t snapshot, struct bk_name *ret)
{
	crypto_generichash_blake2b_state s;

	crypto_generichash_blake2b_init(&s, NULL, 0, sizeof(ret->b));
	crypto_generichash_blake2b_update(&s, (const void *)&snapshot, sizeof(snapshot));
	crypto_generichash_blake2b_update(&s, (const void *)url, strlen(url));
	crypto_generichash_blake2b_final(&s, ret->b, sizeof(ret->b));
}

bool backup_was_pushed(struct daemon *d, const char *repository, uint64_t snapshot)
{
	struct cache *c = pushed_cache(d);
	struct bk_name key;

	pushed_key(repository, snapshot, &key);
	return c && cache_local(c, &key) == snapshot;
}

void backup_forget_pushed(struct daemon *d, const char *repository, uint64_t snapshot)
{
	struct cache *c = pushed_cache(d);
	struct bk_name key;

	pushed_key(repository, snapshot, &key);
	if (c)
		cache_set_local(c, &key, 0, NULL);
}

/* Among the numbers of snapshots, which count up from 1. */
static uint64_t op_number(enum backup_op op)
{
	return UINT64_MAX - op;
}

uint64_t backup_last_done(struct daemon *d, const char *repository, enum backup_op op)
{
	struct cache *c = pushed_cache(d);
	struct bk_name key;

	pushed_key(repository, op_number(op), &key);
	return c ? cache_local(c, &key) : 0;
}

void backup_set_last_done(struct daemon *d, const char *repository, enum backup_op op,
			  uint64_t time_s)
{
	struct cache *c = pushed_cache(d);
	struct bk_name key;

	pushed_key(repository, op_number(op), &key);
	if (c)
		cache_set_local(c, &key, time_s, NULL);
}

/* The lock is held.  NULL: no memory. */
static struct backup_found *found_of(struct backups *b, const char *url)
{
	struct backup_found *f;

	for (f = b->found; f; f = f->next)
		if (!strcmp(f->url, url))
			return f;
	f = calloc(1, sizeof(*f));
	if (!f || !(f->url = strdup(url))) {
		free(f);
		return NULL;
	}
	f->next = b->found;
	b->found = f;
	return f;
}

void session_note_damages(struct session *s, const json_t *damages)
{
	struct backups *b = s->job->daemon->backups;
	struct backup_found *f;
	const json_t *v;
	size_t i;

	pthread_mutex_lock(&b->lock);
	f = found_of(b, s->url);
	if (f) {
		f->damages = json_array_size(damages);
		f->verified_s = (uint64_t)time(NULL);
	}
	pthread_mutex_unlock(&b->lock);
	json_array_foreach(damages, i, v)
	{
		if (i == DAMAGES_LOGGED)
			break;
		log_event(LOG_BACKUP_DAMAGED, LOG_LVL_ERR, "backup %s is damaged: %s", s->url,
			  json_string_value(json_object_get(v, "text")));
	}
	if (i < json_array_size(damages))
		log_err("backup %s is damaged in %zu objects more", s->url,
			json_array_size(damages) - i);
}

static void note_last(struct backups *b, const char *vm, uint32_t uid, uint64_t taken_ns)
{
	struct backup_last *l;

	pthread_mutex_lock(&b->lock);
	for (l = b->last; l && (l->uid != uid || strcmp(l->vm, vm) != 0); l = l->next)
		;
	if (!l && (l = calloc(1, sizeof(*l)))) {
		snprintf(l->vm, sizeof(l->vm), "%s", vm);
		l->uid = uid;
		l->next = b->last;
		b->last = l;
	}
	if (l) {
		l->taken_s = MAX(l->taken_s, taken_ns / 1000000000);
		l->pushed_s = (uint64_t)time(NULL);
	}
	pthread_mutex_unlock(&b->lock);
}

void session_note_pushed(struct session *s, uint64_t snapshot, const char *vm, uint32_t uid,
			 uint64_t taken_ns)
{
	struct cache *c = pushed_cache(s->job->daemon);
	struct bk_name key;

	pushed_key(s->url, snapshot, &key);
	if (c)
		cache_set_local(c, &key, snapshot, NULL);
	note_last(s->job->daemon->backups, vm, uid, taken_ns);
}

/* ---- sessions ---- */

static bool is_cancelled(void *job)
{
	return atomic_load(&((struct job *)job)->cancel);
}

static int open_store(struct session *s, bool create, struct err *e)
{
	const struct daemon_config *c = &s->job->daemon->config;
	struct objstore_opts opts = {
		.endpoint = c->backup_endpoint,
		.region = c->backup_region,
		.style = c->backup_style,
		.credentials_file = c->backup_credentials,
		.profile = c->backup_profile,
		.ca_file = c->backup_ca,
		.create = create,
		.rate_limit = c->backup_rate,
		.cancelled = is_cancelled,
		.cancelled_arg = s->job,
	};

	return objstore_open(&s->os, s->url, &opts, e);
}

static int open_repo(struct session *s, bool create, struct err *e)
{
	const struct daemon *d = s->job->daemon;
	char path[4096];
	struct repo_config c = {.os = s->os,
				.key_file = d->config.backup_key,
				.cache_dir = path,
				.create = create,
				.grace_s = d->config.backup_grace_s};
	int rc = cache_path(d, "", path, sizeof(path), e);

	return rc ? rc : repo_open(&c, &s->repo, e);
}

int session_open(struct job *job, bool create, struct session *ret, struct err *e)
{
	const char *url = json_string_value(json_object_get(job->args, "repository"));
	int rc;

	*ret = (struct session){.job = job, .url = url ? url : job->daemon->config.backup};
	if (!ret->url)
		return err_set(e, EINVAL,
			       "name a repository, or set `backup` in the service's configuration");
	atomic_store(&job->phase, "opening");
	rc = open_store(ret, create, e);
	if (!rc)
		rc = open_repo(ret, create, e);
	if (rc)
		session_close(ret);
	return rc;
}

static void add_counters(struct session *s)
{
	struct backups *b = s->job->daemon->backups;
	struct objstore_counters c;

	objstore_counters(s->os, &c);
	atomic_fetch_add(&b->bytes_sent, c.bytes_sent);
	atomic_fetch_add(&b->bytes_received, c.bytes_received);
	atomic_fetch_add(&b->requests, c.requests);
	atomic_fetch_add(&b->retries, c.retries);
	for (int i = 0; i < NR_OBJSTORE_FAILURES; i++)
		atomic_fetch_add(&b->failures[i], c.failures[i]);
}

void session_close(struct session *s)
{
	repo_close(s->repo);
	if (s->os)
		add_counters(s);
	objstore_close(s->os);
	s->repo = NULL;
	s->os = NULL;
}

void session_count(struct session *s, enum backup_op op, int rc)
{
	struct backups *b = s->job->daemon->backups;

	if (rc != -ECANCELED)
		atomic_fetch_add(rc ? &b->failed[op] : &b->done[op], 1);
	if (!rc && (op == BACKUP_VERIFY || op == BACKUP_PRUNE))
		backup_set_last_done(s->job->daemon, s->url, op, (uint64_t)time(NULL));
}
