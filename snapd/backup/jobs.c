/* SPDX-License-Identifier: MIT */
/* Jobs over backup repositories; see backup.h. */
#include "snapd/backup/backup.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/backup/check.h"
#include "snapd/backup/pull.h"
#include "snapd/backup/push.h"
#include "snapd/backup/session.h"
#include "snapd/daemon/daemon.h"
#include "snapd/daemon/upkeep.h"
#include "snapd/policy/keep.h"
#include "snapd/util/cleanup.h"

#define PREFIX_MIN   4
#define PUSH_WAIT_NS (100 * 1000000L)

static const char *arg_text(const struct job *job, const char *key)
{
	return json_string_value(json_object_get(job->args, key));
}

static json_t *name_json(const struct bk_name *name)
{
	char hex[BK_HEX_BYTES];

	return json_string(name_hex(name, hex));
}

/* ---- push ---- */

static json_t *pushed_json(uint64_t snapshot, const struct push_result *p)
{
	return json_pack("{sI so sb so sI sI sI sI sI sI}", "snapshot", (json_int_t)snapshot,
			 "name", name_json(&p->name), "already", p->already, "base",
			 p->has_base ? name_json(&p->base) : json_null(), "pages_read",
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
	const char *vm = arg_text(s->job, "vm"), *tag = arg_text(s->job, "tag");
	json_t *uid = json_object_get(s->job->args, "uid");
	_cleanup_free_ struct store_snapshot *list = NULL;
	size_t all = 0;
	int rc = store_snapshot_list(d->store, NULL, &list, &all, e);

	*nr = 0;
	if (rc)
		return rc;
	*ret = calloc(all + 1, sizeof(**ret));
	if (!*ret)
		return err_errno(e, ENOMEM, "push");
	for (size_t i = 0; i < all; i++)
		if (!strcmp(list[i].vm_name, vm) &&
		    (!uid || list[i].uid == json_integer_value(uid)) &&
		    (!tag || keep_has_tag(list[i].tags, tag)) &&
		    !backup_was_pushed(d, s->url, list[i].id))
			(*ret)[(*nr)++] = list[i].id;
	if (*nr && json_is_true(json_object_get(s->job->args, "newest"))) {
		(*ret)[0] = (*ret)[*nr - 1];
		*nr = 1;
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

static int forget_by_rules(struct session *s, json_t **lines, uint64_t *nr, struct err *e);

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
		rc = forget_by_rules(&s, &lines, &nr_forgotten, e);
	json_decref(lines);
	if (!rc)
		job->result = json_pack("{ss sO sI sI}", "repository", s.url, "pushed", p.list,
					"bytes_sent", (json_int_t)p.bytes_sent, "forgotten",
					(json_int_t)nr_forgotten);
	json_decref(p.list);
	session_close(&s);
	return rc;
}

/* ---- selectors ---- */

static bool is_prefix(const struct manifest *m, const char *text)
{
	char hex[BK_HEX_BYTES];
	size_t len = strlen(text);

	return len >= PREFIX_MIN && len < BK_HEX_BYTES &&
	       !memcmp(name_hex(&m->name, hex), text, len);
}

static bool selects(const struct manifest *m, const char *selector)
{
	const char *at = strchr(selector, '@');
	size_t len = at ? (size_t)(at - selector) : 0;

	if (!at)
		return is_prefix(m, selector);
	return strlen(m->m.vm) == len && !memcmp(m->m.vm, selector, len) &&
	       (!strcmp(m->m.name, at + 1) || is_prefix(m, at + 1));
}

static int find_snapshot(const struct repo_list *l, const char *selector,
			 const struct manifest **ret, struct err *e)
{
	const struct manifest *newest = NULL;

	*ret = NULL;
	for (size_t i = 0; i < l->nr; i++) {
		const struct manifest *m = &l->all[i];

		if (!strcmp(m->m.vm, selector))
			newest = m; /* by time */
		if (!selects(m, selector))
			continue;
		if (*ret)
			return err_set(e, EINVAL,
				       "%.80s is more than one snapshot: name its digits",
				       selector);
		*ret = m;
	}
	if (newest)
		*ret = newest;
	return *ret ? 0 : err_set(e, ENOENT, "the repository has no snapshot %.80s", selector);
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
		rc = find_snapshot(&list, arg_text(job, "snapshot"), &m, e);
	if (!rc)
		rc = pull_snapshot(job, s.repo, &list, m, arg_text(job, "vm"), &r, e);
	session_count(&s, BACKUP_PULL, rc);
	if (!rc)
		job->result = json_pack("{ss sI ss so sb sI sI sI sI}", "repository", s.url,
					"snapshot", (json_int_t)r.snapshot, "vm",
					arg_text(job, "vm") ? arg_text(job, "vm") : m->m.vm, "name",
					name_json(&m->name), "already", r.already, "base",
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
			 name_json(&m->name), "vm", m->m.vm, "arch", m->m.arch, "host", m->m.host,
			 "snapshot_name", m->m.name, "note", m->m.note, "tags", m->m.tags, "uid",
			 (json_int_t)m->m.uid, "taken_ns", (json_int_t)m->m.taken_ns, "pushed_ns",
			 (json_int_t)m->m.pushed_ns, "bytes",
			 (json_int_t)m->m.nr_pages * m->m.page_size, "bytes_sent",
			 (json_int_t)m->m.bytes_sent, "layers", (json_int_t)m->m.nr_layers,
			 "state_bytes", (json_int_t)m->m.state_bytes, "pinned",
			 m->m.flags & BK_SNAPSHOT_PINNED, "post_mortem",
			 m->m.flags & BK_SNAPSHOT_POSTMORTEM, "local", (json_int_t)local);
}

static json_t *bad_json(const struct repo_list *l)
{
	json_t *list = json_array();

	for (size_t i = 0; i < l->nr_bad; i++)
		json_array_append_new(list, json_pack("{so ss}", "name", name_json(&l->bad[i].name),
						      "text", l->bad[i].why.text));
	return list;
}

int backup_list_job(struct job *job, struct err *e)
{
	const char *vm = arg_text(job, "vm");
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

/* ---- forget ---- */

struct deciding {
	struct keep_snapshot *items; /* owned; of all of one VM */
	const struct manifest **of;  /* owned; by id */
	size_t nr;
};

static json_t *forget_line(const struct manifest *m, bool keep, const char *why)
{
	return json_pack("{so ss ss sI sb ss}", "name", name_json(&m->name), "vm", m->m.vm,
			 "snapshot_name", m->m.name, "taken_ns", (json_int_t)m->m.taken_ns, "keep",
			 keep, "why", why);
}

/* A VM is a name and an owner. */
static bool same_vm(const struct manifest *a, const struct manifest *b)
{
	return a->m.uid == b->m.uid && !strcmp(a->m.vm, b->m.vm);
}

/* The snapshots of the VM of `first` that the rules are about. */
static void gather_vm(struct session *s, const struct repo_list *l, const struct manifest *first,
		      struct deciding *d)
{
	const char *tag = arg_text(s->job, "tag");

	d->nr = 0;
	for (size_t i = 0; i < l->nr; i++) {
		const struct manifest *m = &l->all[i];

		if (!same_vm(m, first) || (tag && !keep_has_tag(m->m.tags, tag)))
			continue;
		d->of[i] = m;
		d->items[d->nr++] =
			(struct keep_snapshot){.id = i,
					       .taken_s = (int64_t)(m->m.taken_ns / 1000000000),
					       .tags = m->m.tags,
					       .pinned = m->m.flags & BK_SNAPSHOT_PINNED};
	}
}

static bool is_first_of_vm(const struct repo_list *l, size_t at)
{
	for (size_t i = 0; i < at; i++)
		if (same_vm(&l->all[i], &l->all[at]))
			return false;
	return true;
}

static int forget_vm(struct session *s, struct deciding *d, const struct keep_rules *rules,
		     const struct zone *zone, json_t *lines, uint64_t *nr, struct err *e)
{
	bool dry = json_is_true(json_object_get(s->job->args, "dry_run"));
	int rc = 0;

	keep_decide(rules, zone, d->items, d->nr);
	for (size_t i = 0; !rc && i < d->nr; i++) {
		const struct manifest *m = d->of[d->items[i].id];

		json_array_append_new(lines, forget_line(m, d->items[i].keep, d->items[i].why));
		if (d->items[i].keep || dry)
			continue;
		rc = repo_forget(s->repo, &m->name, e);
		*nr += !rc;
	}
	return rc;
}

static int forget_of_list(struct session *s, const struct repo_list *l,
			  const struct keep_rules *rules, const struct zone *zone, json_t *lines,
			  uint64_t *nr, struct err *e)
{
	const char *vm = arg_text(s->job, "vm");
	json_t *uid = json_object_get(s->job->args, "uid");
	struct deciding d = {.items = calloc(l->nr + 1, sizeof(*d.items)),
			     .of = calloc(l->nr + 1, sizeof(*d.of))};
	int rc = d.items && d.of ? 0 : err_errno(e, ENOMEM, "forget");

	for (size_t i = 0; !rc && i < l->nr; i++) {
		const struct manifest *m = &l->all[i];

		if ((vm && strcmp(vm, m->m.vm) != 0) ||
		    (uid && m->m.uid != json_integer_value(uid)) || !is_first_of_vm(l, i))
			continue;
		gather_vm(s, l, m, &d);
		rc = forget_vm(s, &d, rules, zone, lines, nr, e);
	}
	free(d.items);
	free(d.of);
	return rc;
}

static int forget_by_rules(struct session *s, json_t **lines, uint64_t *nr, struct err *e)
{
	_cleanup_(cleanup_zone) struct zone *zone = NULL;
	struct repo_list list = {0};
	struct keep_rules rules;
	int rc = keep_from_json(json_object_get(s->job->args, "keep"), &rules, e);

	*lines = json_array();
	if (!rc)
		rc = zone_open(arg_text(s->job, "zone"), &zone, e);
	if (!rc)
		rc = repo_list(s->repo, &list, e);
	if (!rc)
		rc = forget_of_list(s, &list, &rules, zone, *lines, nr, e);
	repo_list_deinit(&list);
	return rc;
}

/* All that are named, or none. */
static int forget_named(struct session *s, json_t **lines, uint64_t *nr, struct err *e)
{
	json_t *names = json_object_get(s->job->args, "snapshots"), *v;
	bool dry = json_is_true(json_object_get(s->job->args, "dry_run"));
	struct repo_list list = {0};
	const struct manifest *m;
	int rc = repo_list(s->repo, &list, e);
	size_t i;

	*lines = json_array();
	json_array_foreach(names, i, v)
	{
		if (!rc)
			rc = find_snapshot(&list, json_string_value(v), &m, e);
		if (!rc && m->m.flags & BK_SNAPSHOT_PINNED)
			rc = err_set(e, EBUSY, "%.80s was pinned when it was pushed",
				     json_string_value(v));
	}
	json_array_foreach(names, i, v)
	{
		if (!rc)
			rc = find_snapshot(&list, json_string_value(v), &m, e);
		if (!rc && !dry)
			rc = repo_forget(s->repo, &m->name, e);
		if (rc)
			break;
		*nr += !dry;
		json_array_append_new(*lines, forget_line(m, false, "named"));
	}
	repo_list_deinit(&list);
	return rc;
}

/* ---- prune ---- */

static bool prune_stop(void *opaque)
{
	struct job *job = opaque;

	return atomic_load(&job->cancel);
}

static int run_prune(struct session *s, json_t **ret, struct err *e)
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

int backup_forget_job(struct job *job, struct err *e)
{
	bool dry = json_is_true(json_object_get(job->args, "dry_run"));
	json_t *lines = NULL, *pruned = NULL;
	uint64_t nr = 0;
	struct session s;
	int rc = session_open(job, false, &s, e);

	if (!rc && json_object_get(job->args, "snapshots"))
		rc = forget_named(&s, &lines, &nr, e);
	else if (!rc)
		rc = forget_by_rules(&s, &lines, &nr, e);
	if (!rc && json_is_true(json_object_get(job->args, "prune")))
		rc = run_prune(&s, &pruned, e);
	if (!rc)
		job->result = json_pack("{ss sO sI sO* sb}", "repository", s.url, "snapshots",
					lines, "forgotten", (json_int_t)nr, "prune", pruned,
					"dry_run", dry);
	json_decref(lines);
	json_decref(pruned);
	session_close(&s);
	return rc;
}

int backup_prune_job(struct job *job, struct err *e)
{
	struct session s;
	int rc = session_open(job, false, &s, e);

	if (rc)
		session_count(&s, BACKUP_PRUNE, rc);
	else
		rc = run_prune(&s, &job->result, e);
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
	json_t *rooms = json_object();
	struct session s;
	char id[33];
	int rc = session_open(job, false, &s, e);

	for (int i = 0; !rc && i < REPO_NR_ROOMS; i++) {
		struct sums sums = {0};

		rc = repo_each(s.repo, (enum repo_room)i, add_object, &sums, e);
		json_object_set_new(rooms, labels[i], sums_json(&sums));
	}
	if (!rc) {
		for (int i = 0; i < 16; i++)
			sprintf(id + 2 * i, "%02x", s.repo->keys.repo[i]);
		job->result = json_pack("{ss ss sb sI sO}", "repository", s.url, "id", id,
					"encrypted", s.repo->keys.sealed, "grace_s",
					(json_int_t)s.repo->keys.grace_s, "rooms", rooms);
	}
	json_decref(rooms);
	session_close(&s);
	return rc;
}
