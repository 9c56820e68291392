/* SPDX-License-Identifier: MIT */
/* Jobs over backup repositories; see backup.h. */
#include "snapd/backup/jobs.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/backup/backup.h"
#include "snapd/backup/check.h"
#include "snapd/backup/pull.h"
#include "snapd/core/daemon.h"

const char *job_text(const struct job *job, const char *key)
{
	return json_string_value(json_object_get(job->args, key));
}

json_t *backup_name_json(const struct bk_name *name)
{
	char hex[BK_HEX_BYTES];

	return json_string(name_hex(name, hex));
}

/* ---- pull ---- */

int backup_pull_job(struct job *job, struct err *e)
{
	const struct manifest *m;
	struct repo_list list = {0};
	struct pull_result r = {0};
	struct session s;
	int rc = session_open(job, false, &s, e);

	if (!rc)
		rc = repo_list(s.repo, &list, e);
	if (!rc)
		rc = backup_select(&list, job_text(job, "snapshot"), &m, e);
	if (!rc)
		rc = pull_snapshot(job, s.repo, &list, m, job_text(job, "vm"), &r, e);
	session_count(&s, BACKUP_PULL, rc);
	if (!rc)
		job->result = json_pack("{ss sI ss so sb sI sI sI sI}", "repository", s.url,
					"snapshot", (json_int_t)r.snapshot, "vm",
					job_text(job, "vm") ? job_text(job, "vm") : m->m.vm, "name",
					backup_name_json(&m->name), "already", r.already, "base",
					(json_int_t)r.base, "pages", (json_int_t)r.pages,
					"pages_fetched", (json_int_t)r.pages_fetched,
					"bytes_received", (json_int_t)r.bytes_received);
	repo_list_deinit(&list);
	session_close(&s);
	return rc;
}

/* ---- list ---- */

static json_t *snapshot_json_of(const struct session *s, const struct manifest *m)
{
	struct store *store = s->job->daemon->store;
	bool ours = !memcmp(m->m.store, store_uuid(store), 16);
	uint64_t local = ours ? m->m.snapshot : cache_local(s->repo->cache, &m->name);
	struct store_snapshot snap;

	if (local && store_snapshot_get(store, local, &snap, NULL))
		local = 0;
	return json_pack("{so ss ss ss ss ss ss sI sI sI sI sI sI sI sb sb sI}", "name",
			 backup_name_json(&m->name), "vm", m->m.vm, "arch", m->m.arch, "host",
			 m->m.host, "snapshot_name", m->m.name, "note", m->m.note, "tags",
			 m->m.tags, "uid", (json_int_t)m->m.uid, "taken_ns",
			 (json_int_t)m->m.taken_ns, "pushed_ns", (json_int_t)m->m.pushed_ns,
			 "bytes", (json_int_t)m->m.nr_pages * m->m.page_size, "bytes_sent",
			 (json_int_t)m->m.bytes_sent, "layers", (json_int_t)m->m.nr_layers,
			 "state_bytes", (json_int_t)m->m.state_bytes, "pinned",
			 m->m.flags & BK_SNAPSHOT_PINNED, "post_mortem",
			 m->m.flags & BK_SNAPSHOT_POSTMORTEM, "local", (json_int_t)local);
}

static json_t *bad_json(const struct repo_list *l)
{
	json_t *list = json_array();

	for (size_t i = 0; i < l->nr_bad; i++)
		json_array_append_new(list, json_pack("{so ss}", "name",
						      backup_name_json(&l->bad[i].name), "text",
						      l->bad[i].why.text));
	return list;
}

int backup_list_job(struct job *job, struct err *e)
{
	const char *vm = job_text(job, "vm");
	struct repo_list list = {0};
	json_t *out = json_array();
	struct session s;
	int rc = session_open(job, false, &s, e);

	if (!rc)
		rc = repo_list(s.repo, &list, e);
	for (size_t i = 0; !rc && i < list.nr; i++)
		if (!vm || !strcmp(vm, list.all[i].m.vm))
			json_array_append_new(out, snapshot_json_of(&s, &list.all[i]));
	if (!rc)
		job->result = json_pack("{ss sO so}", "repository", s.url, "snapshots", out,
					"damaged", bad_json(&list));
	json_decref(out);
	repo_list_deinit(&list);
	session_close(&s);
	return rc;
}

/* ---- verify ---- */

int backup_verify_job(struct job *job, struct err *e)
{
	uint32_t percent = (uint32_t)json_integer_value(json_object_get(job->args, "percent"));
	struct check_result r = {0};
	struct session s;
	int rc = session_open(job, false, &s, e);

	if (!rc)
		rc = repo_check(job, s.repo, percent, &r, e);
	session_count(&s, BACKUP_VERIFY, rc);
	if (!rc)
		session_note_damages(&s, r.damages);
	if (!rc)
		job->result = json_pack("{ss sb sO sI sI sI sI sI}", "repository", s.url, "whole",
					!json_array_size(r.damages), "damages", r.damages,
					"snapshots", (json_int_t)r.snapshots, "packs",
					(json_int_t)r.packs, "blobs", (json_int_t)r.blobs,
					"packs_read", (json_int_t)r.packs_read, "bytes_read",
					(json_int_t)r.bytes_read);
	json_decref(r.damages);
	session_close(&s);
	return rc;
}

/* ---- prune ---- */

static bool prune_stop(void *opaque)
{
	struct job *job = opaque;

	return atomic_load(&job->cancel);
}

int backup_run_prune(struct session *s, json_t **ret, struct err *e)
{
	bool dry = json_is_true(json_object_get(s->job->args, "dry_run"));
	struct prune_stats p;
	int rc;

	atomic_store(&s->job->phase, "pruning");
	rc = repo_prune(s->repo, dry, prune_stop, s->job, &p, e);
	if (!dry)
		session_count(s, BACKUP_PRUNE, rc);
	if (rc)
		return rc;
	*ret = json_pack("{sI sI sI sI sI sI sI sI sI sI sb}", "snapshots", (json_int_t)p.snapshots,
			 "packs", (json_int_t)p.packs, "blobs", (json_int_t)p.blobs,
			 "snapshots_deleted", (json_int_t)p.snapshots_deleted, "packs_deleted",
			 (json_int_t)p.packs_deleted, "blobs_deleted", (json_int_t)p.blobs_deleted,
			 "bytes_deleted", (json_int_t)p.bytes_deleted, "marked",
			 (json_int_t)p.marked, "waiting", (json_int_t)p.waiting, "grace_s",
			 (json_int_t)s->repo->keys.grace_s, "dry_run", dry);
	return 0;
}

int backup_prune_job(struct job *job, struct err *e)
{
	struct session s;
	int rc = session_open(job, false, &s, e);

	if (rc)
		session_count(&s, BACKUP_PRUNE, rc);
	else
		rc = backup_run_prune(&s, &job->result, e);
	if (!rc)
		json_object_set_new(job->result, "repository", json_string(s.url));
	session_close(&s);
	return rc;
}

/* ---- status ---- */

struct sums {
	uint64_t nr, bytes;
};

static int add_object(void *arg, const struct bk_name *name, const struct objstore_info *info)
{
	struct sums *s = arg;

	s->nr++;
	s->bytes += info->size;
	return 0;
}

static json_t *sums_json(const struct sums *s)
{
	return json_pack("{sI sI}", "objects", (json_int_t)s->nr, "bytes", (json_int_t)s->bytes);
}

int backup_status_job(struct job *job, struct err *e)
{
	static const char *const labels[REPO_NR_ROOMS] = {"packs", "blobs", "snapshots",
							  "forgotten", "marks"};
	bool brief = json_is_true(json_object_get(job->args, "brief"));
	json_t *rooms = json_object();
	struct session s;
	char id[33];
	int rc = session_open(job, false, &s, e);

	for (int i = 0; !rc && !brief && i < REPO_NR_ROOMS; i++) {
		struct sums sums = {0};

		rc = repo_each(s.repo, (enum repo_room)i, add_object, &sums, e);
		json_object_set_new(rooms, labels[i], sums_json(&sums));
	}
	if (!rc) {
		for (int i = 0; i < 16; i++)
			sprintf(id + 2 * i, "%02x", s.repo->keys.repo[i]);
		job->result = json_pack("{ss ss sb sI sI sO}", "repository", s.url, "id", id,
					"encrypted", s.repo->keys.sealed, "grace_s",
					(json_int_t)s.repo->keys.grace_s, "clock_ahead_s",
					(json_int_t)(objstore_clock(s.os) - time(NULL)), "rooms",
					rooms);
	}
	json_decref(rooms);
	session_close(&s);
	return rc;
}
