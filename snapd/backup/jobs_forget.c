/* SPDX-License-Identifier: MIT */
/* Snapshots forgotten, by name or by rules, as a job; see backup.h. */
#include "snapd/backup/jobs.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/backup/backup.h"
#include "snapd/core/json.h"
#include "snapd/policy/keep.h"
#include "snapd/util/cleanup.h"

struct deciding {
	struct keep_snapshot *items; /* owned; of all of one VM */
	const struct manifest **of;  /* owned; by id */
	size_t nr;
};

static json_t *forget_line(const struct manifest *m, bool keep, const char *why)
{
	return json_pack("{so ss ss sI sb ss}", "name", backup_name_json(&m->name), "vm", m->m.vm,
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
	const char *tag = job_text(s->job, "tag");

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

	keep_decide(rules, zone, time(NULL), d->items, d->nr);
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
	const char *vm = job_text(s->job, "vm");
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

int backup_forget_by_rules(struct session *s, json_t **lines, uint64_t *nr, struct err *e)
{
	_cleanup_(cleanup_zone) struct zone *zone = NULL;
	struct repo_list list = {0};
	struct keep_rules rules;
	int rc = keep_from_json(json_object_get(s->job->args, "keep"), &rules, e);

	*lines = json_array();
	if (!rc)
		rc = zone_open(job_text(s->job, "zone"), &zone, e);
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
			rc = backup_select(&list, json_string_value(v), &m, e);
		if (!rc && m->m.flags & BK_SNAPSHOT_PINNED)
			rc = err_set(e, EBUSY, "%.80s was pinned when it was pushed",
				     json_string_value(v));
	}
	json_array_foreach(names, i, v)
	{
		if (!rc)
			rc = backup_select(&list, json_string_value(v), &m, e);
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
		rc = backup_forget_by_rules(&s, &lines, &nr, e);
	if (!rc && json_is_true(json_object_get(job->args, "prune")))
		rc = backup_run_prune(&s, &pruned, e);
	if (!rc)
		job->result = json_pack("{ss sO sI sO* sb}", "repository", s.url, "snapshots",
					lines, "forgotten", (json_int_t)nr, "prune", pruned,
					"dry_run", dry);
	json_decref(lines);
	json_decref(pruned);
	session_close(&s);
	return rc;
}
