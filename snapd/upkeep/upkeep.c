/* SPDX-License-Identifier: MIT */
/* Looking after snapshots: set, delete, remove a VM, gc, account; see upkeep.h. */
#include "snapd/upkeep/upkeep.h"

#include <stdio.h>

#include "snapd/core/daemon.h"
#include "snapd/core/json.h"
#include "snapd/core/tags.h"
#include "snapd/store/account.h"
#include "snapd/util/cleanup.h"
#include "snapd/vm/vm.h"

int set_job(struct job *job, struct err *e)
{
	struct store *s = job->daemon->store;
	json_t *pinned = json_object_get(job->args, "pinned");
	struct snapshot_change c = {.name = job_arg_text(job, "name"),
				    .note = job_arg_text(job, "note"),
				    .tags = job_arg_text(job, "tags")};
	uint64_t id = job_arg_u64(job, "snapshot");
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
	uint64_t id = job_arg_u64(job, "snapshot");
	int rc = store_snapshot_delete(job->daemon->store, id, e);

	if (rc)
		return rc;
	job->result = json_pack("{sI}", "snapshot", (json_int_t)id);
	return 0;
}

int remove_vm_job(struct job *job, struct err *e)
{
	struct daemon *d = job->daemon;
	const char *name = job_arg_text(job, "vm");
	uint32_t uid = (uint32_t)job_arg_u64(job, "uid");
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
			      .rate_bytes = job_arg_u64(job, "rate"),
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
