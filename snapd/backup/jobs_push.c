/* SPDX-License-Identifier: MIT */
/* Snapshots into a repository, as a job; see backup.h. */
#include "snapd/backup/jobs.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/backup/backup.h"
#include "snapd/backup/push.h"
#include "snapd/core/daemon.h"
#include "snapd/policy/keep.h"
#include "snapd/util/cleanup.h"

#define PUSH_WAIT_NS (100 * 1000000L)

static json_t *pushed_json(uint64_t snapshot, const struct push_result *p)
{
	return json_pack("{sI so sb so sI sI sI sI sI sI}", "snapshot", (json_int_t)snapshot,
			 "name", backup_name_json(&p->name), "already", p->already, "base",
			 p->has_base ? backup_name_json(&p->base) : json_null(), "pages_read",
			 (json_int_t)p->pages_read, "pages_zero", (json_int_t)p->pages_zero,
			 "pages_known", (json_int_t)p->pages_known, "pages_sent",
			 (json_int_t)p->pages_sent, "packs_sent", (json_int_t)p->packs_sent,
			 "bytes_sent", (json_int_t)p->bytes_sent);
}

/* Two pushes of one host to one repository would send the same twice. */
static int wait_for_turn(struct session *s, struct err *e)
{
	const struct timespec a_little = {.tv_nsec = PUSH_WAIT_NS};

	atomic_store(&s->job->phase, "waiting for another push");
	while (!cache_try_push(s->repo->cache)) {
		if (atomic_load(&s->job->cancel))
			return err_set(e, ECANCELED, "the push was cancelled");
		nanosleep(&a_little, NULL);
	}
	return 0;
}

struct pushing {
	json_t *list; /* owned */
	uint64_t bytes_sent;
};

static int push_one(struct session *s, uint64_t id, struct pushing *ret, struct err *e)
{
	struct backups *b = s->job->daemon->backups;
	struct store_snapshot snap;
	struct push_result r;
	struct err why = {0};
	int rc = store_snapshot_get(s->job->daemon->store, id, &snap, e);

	if (rc)
		return rc;
	rc = push_snapshot(s->job, s->repo, id, &r, &why);
	session_count(s, BACKUP_PUSH, rc);
	atomic_fetch_add(&b->pages_sent, r.pages_sent);
	atomic_fetch_add(&b->pages_known, r.pages_known);
	atomic_fetch_add(&b->packs_sent, r.packs_sent);
	if (rc)
		return err_set(e, -rc, "%s@%llu: %s", snap.vm_name, (unsigned long long)id,
			       why.code ? why.text : strerror(-rc));
	session_note_pushed(s, id, snap.vm_name, snap.uid, snap.taken_ns);
	ret->bytes_sent += r.bytes_sent;
	json_array_append_new(ret->list, pushed_json(id, &r));
	return 0;
}

/* Of a VM: what has the tag and is not pushed yet. */
static int pending(struct session *s, uint64_t **ret, size_t *nr, struct err *e)
{
	struct daemon *d = s->job->daemon;
	const char *vm = job_text(s->job, "vm"), *tag = job_text(s->job, "tag");
	json_t *uid = json_object_get(s->job->args, "uid");
	_cleanup_free_ struct store_snapshot *list = NULL;
	bool newest = json_is_true(json_object_get(s->job->args, "newest")), pushed;
	size_t all = 0;
	int rc = store_snapshot_list(d->store, NULL, &list, &all, e);

	*nr = 0;
	if (rc)
		return rc;
	*ret = calloc(all + 1, sizeof(**ret));
	if (!*ret)
		return err_errno(e, ENOMEM, "push");
	for (size_t i = 0; i < all; i++) {
		if (strcmp(list[i].vm_name, vm) != 0 ||
		    (uid && list[i].uid != json_integer_value(uid)) ||
		    (tag && !keep_has_tag(list[i].tags, tag)))
			continue;
		pushed = backup_was_pushed(d, s->url, list[i].id);
		if (newest) /* this one instead of those before, or none if it was */
			*nr = 0;
		if (!pushed)
			(*ret)[(*nr)++] = list[i].id;
	}
	return 0;
}

static int push_listed(struct session *s, struct pushing *ret, struct err *e)
{
	_cleanup_free_ uint64_t *ids = NULL;
	json_t *list = json_object_get(s->job->args, "snapshots"), *v;
	size_t i, nr = 0;
	int rc = 0;

	json_array_foreach(list, i, v)
	{
		rc = push_one(s, (uint64_t)json_integer_value(v), ret, e);
		if (rc)
			return rc;
	}
	if (!list)
		rc = pending(s, &ids, &nr, e);
	for (i = 0; !rc && i < nr; i++) {
		rc = push_one(s, ids[i], ret, e);
		if (rc == -ENOENT) { /* pruned since */
			err_clear(e);
			rc = 0;
		}
	}
	return rc;
}

int backup_push_job(struct job *job, struct err *e)
{
	struct pushing p = {.list = json_array()};
	uint64_t nr_forgotten = 0;
	json_t *lines = NULL;
	struct session s;
	int rc;

	job->unit = "bytes";
	rc = session_open(job, true, &s, e);
	if (!rc)
		rc = wait_for_turn(&s, e);
	if (rc) {
		session_count(&s, BACKUP_PUSH, rc);
	} else {
		rc = push_listed(&s, &p, e);
		cache_end_push(s.repo->cache);
	}
	if (!rc && json_object_get(job->args, "keep"))
		rc = backup_forget_by_rules(&s, &lines, &nr_forgotten, e);
	json_decref(lines);
	if (!rc)
		job->result = json_pack("{ss sO sI sI}", "repository", s.url, "pushed", p.list,
					"bytes_sent", (json_int_t)p.bytes_sent, "forgotten",
					(json_int_t)nr_forgotten);
	json_decref(p.list);
	session_close(&s);
	return rc;
}
