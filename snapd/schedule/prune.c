/* SPDX-License-Identifier: MIT */
/*
 * prune: takes one list of the snapshots, decides for each VM apart, and deletes in
 * one transaction: either every line of its answer is true, or nothing happened.
 */
#include "snapd/schedule/prune.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/backup/backup.h"
#include "snapd/core/daemon.h"
#include "snapd/core/json.h"
#include "snapd/policy/keep.h"
#include "snapd/policy/zone.h"
#include "snapd/schedule/scheduler.h"
#include "snapd/util/cleanup.h"

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
	uint32_t view = (uint32_t)job_arg_u64(job, "view");
	const char *vm = job_arg_text(job, "vm"), *tag = job_arg_text(job, "tag");
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
		rc = zone_open(job_arg_text(job, "zone"), &zone, e);
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
