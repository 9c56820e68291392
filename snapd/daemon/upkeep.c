/* SPDX-License-Identifier: MIT */
/*
 * Looking after snapshots: set, delete, prune, remove a VM, gc; see upkeep.h.
 *
 * prune takes one list of the snapshots, decides for each VM apart, and deletes in
 * one transaction: either every line of its answer is true, or nothing happened.
 */
#include "snapd/daemon/upkeep.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/api/json.h"
#include "snapd/backup/backup.h"
#include "snapd/daemon/daemon.h"
#include "snapd/policy/scheduler.h"
#include "snapd/daemon/tags.h"
#include "snapd/store/account.h"
#include "snapd/util/cleanup.h"
#include "snapd/vm/vm.h"

static uint64_t arg_u64(const struct job *job, const char *key)
{
	return (uint64_t)json_integer_value(json_object_get(job->args, key));
}

static const char *arg_text(const struct job *job, const char *key)
{
	return json_string_value(json_object_get(job->args, key));
}

int set_job(struct job *job, struct err *e)
{
	struct store *s = job->daemon->store;
	json_t *pinned = json_object_get(job->args, "pinned");
	struct snapshot_change c = {.name = arg_text(job, "name"),
				    .note = arg_text(job, "note"),
				    .tags = arg_text(job, "tags")};
	uint64_t id = arg_u64(job, "snapshot");
	struct store_snapshot snap;
	int rc;

	if (pinned)
		c.pin = json_is_true(pinned) ? SNAPSHOT_PIN_SET : SNAPSHOT_PIN_CLEAR;
	rc = store_snapshot_change(s, id, &c, e);
	if (!rc)
		rc = store_snapshot_get(s, id, &snap, e);
	if (rc)
		return rc;
	job->result = json_pack("{so}", "snapshot", snapshot_json(&snap));
	return job->result ? 0 : err_errno(e, ENOMEM, "set");
}

int delete_job(struct job *job, struct err *e)
{
	uint64_t id = arg_u64(job, "snapshot");
	int rc = store_snapshot_delete(job->daemon->store, id, e);

	if (rc)
		return rc;
	job->result = json_pack("{sI}", "snapshot", (json_int_t)id);
	return 0;
}

int remove_vm_job(struct job *job, struct err *e)
{
	struct daemon *d = job->daemon;
	const char *name = arg_text(job, "vm");
	uint32_t uid = (uint32_t)arg_u64(job, "uid");
	char owned[SNAPD_NAME_MAX + 16];
	uint64_t nr_snapshots;
	struct vm *attached;
	uint8_t id[16];
	int rc = store_vm_find(d->store, name, uid, id, e);

	if (rc)
		return rc;
	snprintf(owned, sizeof(owned), "%u/%s", uid, name);
	attached = vm_find(d, owned, 0);
	if (attached) {
		vm_unref(attached);
		return err_set(e, EBUSY, "VM %s is attached: end its VMM first", name);
	}
	rc = store_vm_remove(d->store, id, &nr_snapshots, e);
	if (!rc && d->tags)
		rc = vm_tags_change(d->tags, name, uid, "", NULL, NULL, e);
	if (rc)
		return rc;
	job->result = json_pack("{ss sI}", "vm", name, "snapshots", (json_int_t)nr_snapshots);
	return job->result ? 0 : err_errno(e, ENOMEM, "remove");
}

/* ---- prune ---- */

int keep_from_json(json_t *keep, struct keep_rules *ret, struct err *e)
{
	const char *key;
	json_t *v;

	*ret = (struct keep_rules){0};
	json_object_foreach(keep, key, v)
	{
		char number[24];
		int rc;

		snprintf(number, sizeof(number), "%lld", (long long)json_integer_value(v));
		if (!json_is_string(v) && !json_is_integer(v))
			return err_set(e, EINVAL, "keep %.40s: neither a text nor a number", key);
		rc = keep_set(ret, key, json_is_integer(v) ? number : json_string_value(v), e);
		if (rc)
			return rc;
	}
	/* Nothing to keep is more likely a slip than a wish. */
	if (!keep_has_rules(ret))
		return err_set(e, EINVAL,
			       "no rule says what to keep: want at least one, such as last or grid "
			       "(--keep-last N, --keep-grid STEPS)");
	return 0;
}

struct pruning {
	struct store_snapshot *list; /* owned; by VM, then newest first */
	struct keep_snapshot *items; /* owned; of list, in its order */
	size_t nr;
	uint64_t *ids; /* owned; to be deleted */
	size_t nr_ids;
};

static void pruning_deinit(struct pruning *p)
{
	free(p->list);
	free(p->items);
	free(p->ids);
}

/* As keep_decide() has them. */
static int newest_first_by_vm(const void *a, const void *b)
{
	const struct store_snapshot *x = a, *y = b;
	int vm = memcmp(x->vm, y->vm, sizeof(x->vm));

	if (vm)
		return vm;
	if (x->taken_ns != y->taken_ns)
		return x->taken_ns < y->taken_ns ? 1 : -1;
	return x->id < y->id ? 1 : x->id > y->id ? -1 : 0;
}

static int prune_list(struct job *job, struct pruning *p, struct err *e)
{
	json_t *owner = json_object_get(job->args, "owner");
	uint32_t view = (uint32_t)arg_u64(job, "view");
	const char *vm = arg_text(job, "vm"), *tag = arg_text(job, "tag");
	size_t all = 0;
	int rc = store_snapshot_list(job->daemon->store, NULL, &p->list, &all, e);

	if (rc)
		return rc;
	for (size_t i = 0; i < all; i++)
		if ((!view || p->list[i].uid == view) && (!vm || !strcmp(vm, p->list[i].vm_name)) &&
		    (!owner || p->list[i].uid == json_integer_value(owner)) &&
		    (!tag || keep_has_tag(p->list[i].tags, tag)))
			p->list[p->nr++] = p->list[i];
	if (vm && !tag && !p->nr)
		return err_set(e, ENOENT, "there is no snapshot of a VM %s", vm);
	qsort(p->list, p->nr, sizeof(*p->list), newest_first_by_vm);
	p->items = calloc(p->nr + 1, sizeof(*p->items));
	p->ids = calloc(p->nr + 1, sizeof(*p->ids));
	if (!p->items || !p->ids)
		return err_errno(e, ENOMEM, "prune");
	for (size_t i = 0; i < p->nr; i++)
		p->items[i] = (struct keep_snapshot){
			.id = p->list[i].id,
			.taken_s = (int64_t)(p->list[i].taken_ns / 1000000000),
			.tags = p->list[i].tags,
			.pinned = p->list[i].pinned};
	return 0;
}

/* What its policy has not backed up yet must not go. */
static void prune_hold(struct job *job, struct pruning *p)
{
	char repository[256];

	if (json_is_true(json_object_get(job->args, "unbacked")))
		return;
	for (size_t i = 0; i < p->nr; i++)
		p->items[i].held = policies_hold(job->daemon, p->list[i].tags, repository) &&
				   !backup_was_pushed(job->daemon, repository, p->list[i].id);
}

/* Nothing needs to know any more where they were pushed. */
static void prune_forget(struct job *job, const struct pruning *p)
{
	char repository[256];

	for (size_t i = 0; i < p->nr; i++)
		if (!p->items[i].keep && policies_hold(job->daemon, p->items[i].tags, repository))
			backup_forget_pushed(job->daemon, repository, p->items[i].id);
}

static void prune_decide(struct pruning *p, const struct keep_rules *rules, const struct zone *zone)
{
	for (size_t i = 0, n; i < p->nr; i += n) {
		for (n = 1; i + n < p->nr && !memcmp(p->list[i].vm, p->list[i + n].vm, 16); n++)
			;
		keep_decide(rules, zone, time(NULL), p->items + i, n);
	}
	for (size_t i = 0; i < p->nr; i++)
		if (!p->items[i].keep)
			p->ids[p->nr_ids++] = p->items[i].id;
}

static json_t *prune_line(const struct store_snapshot *s, const struct keep_snapshot *verdict)
{
	return json_pack("{sI ss ss sI sb ss}", "id", (json_int_t)s->id, "vm", s->vm_name, "name",
			 s->name, "taken_ns", (json_int_t)s->taken_ns, "keep", verdict->keep, "why",
			 verdict->why);
}

int prune_job(struct job *job, struct err *e)
{
	_cleanup_(pruning_deinit) struct pruning p = {0};
	bool dry = json_is_true(json_object_get(job->args, "dry_run"));
	_cleanup_(cleanup_zone) struct zone *zone = NULL;
	struct keep_rules rules;
	json_t *lines;
	int rc = keep_from_json(json_object_get(job->args, "keep"), &rules, e);

	if (!rc)
		rc = zone_open(arg_text(job, "zone"), &zone, e);
	if (!rc)
		rc = prune_list(job, &p, e);
	if (rc)
		return rc;
	prune_hold(job, &p);
	prune_decide(&p, &rules, zone);
	if (!dry && p.nr_ids)
		rc = store_snapshots_delete(job->daemon->store, p.ids, p.nr_ids, e);
	if (rc)
		return rc;
	if (!dry)
		prune_forget(job, &p);
	lines = json_array();
	for (size_t i = 0; i < p.nr; i++)
		json_array_append_new(lines, prune_line(&p.list[i], &p.items[i]));
	job->result = json_pack("{so sI sb}", "snapshots", lines, "deleted",
				(json_int_t)(dry ? 0 : p.nr_ids), "dry_run", dry);
	return job->result ? 0 : err_errno(e, ENOMEM, "prune");
}

/* ---- gc ---- */

static int live_timelines(void *daemon, uint64_t **ret, size_t *nr)
{
	return vm_live_timelines(daemon, ret, nr);
}

static bool gc_stop(void *opaque, uint64_t bytes_read)
{
	struct job *job = opaque;

	atomic_store(&job->done, bytes_read);
	return atomic_load(&job->cancel);
}

int gc_job(struct job *job, struct err *e)
{
	struct gc_config c = {.live = live_timelines,
			      .live_opaque = job->daemon,
			      .rate_bytes = arg_u64(job, "rate"),
			      .stop = gc_stop,
			      .opaque = job};
	uint64_t freed = 0;
	int rc;

	job->unit = "bytes";
	atomic_store(&job->phase, "reading manifests");
	rc = store_gc_paced(job->daemon->store, &c, &freed, e);
	if (rc)
		return rc;
	job->result = json_pack("{sI}", "bytes_freed", (json_int_t)freed);
	return 0;
}

/* ---- whose the bytes are ---- */

static bool account_step(void *opaque, uint64_t done, uint64_t total)
{
	struct job *job = opaque;

	atomic_store(&job->total, total);
	atomic_store(&job->done, done);
	return atomic_load(&job->cancel);
}

static json_t *account_json(const struct store_account *a)
{
	json_t *list = json_array();

	for (size_t i = 0; i < a->nr_snapshots; i++) {
		const struct account_snapshot *s = &a->snapshots[i];

		json_array_append_new(list, json_pack("{sI sI sI sI}", "id", (json_int_t)s->id,
						      "bytes_logical", (json_int_t)s->bytes_logical,
						      "bytes_unique", (json_int_t)s->bytes_unique,
						      "pages_unique", (json_int_t)s->pages_unique));
	}
	return json_pack("{so sI sI sI sI sI sI sI sI sI}", "snapshots", list, "bytes_unique",
			 (json_int_t)a->bytes_unique, "bytes_shared", (json_int_t)a->bytes_shared,
			 "bytes_live", (json_int_t)a->bytes_live, "bytes_dead",
			 (json_int_t)a->bytes_dead, "bytes_headers", (json_int_t)a->bytes_headers,
			 "pages_unique", (json_int_t)a->pages_unique, "pages_shared",
			 (json_int_t)a->pages_shared, "pages_live", (json_int_t)a->pages_live,
			 "pages_dead", (json_int_t)a->pages_dead);
}

int account_job(struct job *job, struct err *e)
{
	struct account_config c = {.live = live_timelines,
				   .live_opaque = job->daemon,
				   .step = account_step,
				   .opaque = job};
	struct store_account a;
	int rc;

	job->unit = "epochs";
	atomic_store(&job->phase, "reading manifests");
	rc = store_account(job->daemon->store, &c, &a, e);
	if (rc)
		return rc;
	job->result = account_json(&a);
	store_account_deinit(&a);
	return job->result ? 0 : err_errno(e, ENOMEM, "accounting");
}
