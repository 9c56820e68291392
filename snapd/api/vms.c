/* SPDX-License-Identifier: MIT */
/*
 * api_vms: attached VMs: list, look, snapshot, roll back.  Control thread; the
 * work itself is a job on the VM's own thread.
 */
#include "snapd/api/request.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/core/name.h"
#include "snapd/core/tags.h"
#include "snapd/policy/keep.h"
#include "snapd/store/codec.h"
#include "snapd/upkeep/upkeep.h"
#include "snapd/util/cleanup.h"
#include "snapd/vm/vm.h"

#define NOTE_MAX 255 /* struct store_snapshot */

static void cleanup_vm(struct vm **vm)
{
	if (*vm)
		vm_unref(*vm);
}

int api_get_vms(struct api_request *req)
{
	_cleanup_free_ char *tag = api_query(req, "tag");
	json_t *vms = vm_list_json(req->daemon, req->view);

	for (size_t i = json_array_size(vms); tag && i-- > 0;)
		if (!keep_has_tag(
			    json_string_value(json_object_get(json_array_get(vms, i), "tags")),
			    tag))
			json_array_remove(vms, i);
	return api_reply_json(req, 200, vms ? json_pack("{so}", "vms", vms) : NULL);
}

static struct vm *find_vm(struct api_request *req)
{
	struct vm *vm = vm_find(req->daemon, req->seg[0], req->view);

	if (!vm)
		err_set(&req->err, ENOENT, "no VM named %.64s is attached", req->seg[0]);
	return vm;
}

int api_get_vm(struct api_request *req)
{
	_cleanup_(cleanup_vm) struct vm *vm = find_vm(req);
	json_t *o;

	if (!vm)
		return -ENOENT;
	o = vm_describe(vm);
	return api_reply_json(req, 200, o ? json_pack("{so}", "vm", o) : NULL);
}

static int submit(struct api_request *req, struct vm *vm, struct job *job)
{
	int rc;

	if (!job)
		return -ENOMEM;
	rc = vm_submit(vm, job);
	if (rc == -ENOTCONN)
		err_set(&req->err, ENOTCONN, "VM %.64s is not ready: its VMM is not connected",
			req->seg[0]);
	else if (rc)
		err_set(&req->err, -rc, "VM %.64s has too many jobs queued already", req->seg[0]);
	if (rc)
		job_fail(job, -rc, "%s", req->err.text);
	else
		rc = api_reply_job(req, 202, job);
	job_unref(job);
	return rc;
}

int api_body_text(struct api_request *req, const char *key, const char **ret)
{
	json_t *v = json_object_get(req->json, key);

	*ret = NULL;
	if (!v || json_is_null(v))
		return 0;
	if (!json_is_string(v) || json_string_length(v) > NOTE_MAX)
		return err_set(&req->err, EINVAL, "%s: a text of at most %d bytes", key, NOTE_MAX);
	for (const char *p = json_string_value(v); *p; p++)
		if (iscntrl((unsigned char)*p))
			return err_set(&req->err, EINVAL, "%s: no control characters", key);
	*ret = json_string_value(v);
	return 0;
}

int api_post_snapshot(struct api_request *req)
{
	static const char *const keys[] = {"name",	 "note",	"tags", "pinned",
					   "self_check", "compression", NULL};
	json_t *check = json_object_get(req->json, "self_check");
	json_t *pinned = json_object_get(req->json, "pinned");
	_cleanup_(cleanup_vm) struct vm *vm = NULL;
	const char *name, *note, *tags, *how;
	struct codec_policy policy;
	int rc;

	rc = api_body_keys(req, keys);
	if (!rc && check && !json_is_boolean(check))
		rc = err_set(&req->err, EINVAL, "\"self_check\" is a boolean");
	if (!rc)
		rc = api_body_text(req, "name", &name);
	if (!rc)
		rc = api_body_text(req, "note", &note);
	if (!rc)
		rc = api_body_text(req, "tags", &tags);
	if (!rc)
		rc = api_body_text(req, "compression", &how);
	if (!rc && how)
		rc = codec_parse(how, &policy, &req->err);
	if (!rc && name)
		rc = name_check("name", name, &req->err);
	if (!rc && pinned && !json_is_boolean(pinned))
		rc = err_set(&req->err, EINVAL, "\"pinned\" is a boolean");
	if (rc)
		return rc;
	vm = find_vm(req);
	if (!vm)
		return -ENOENT;
	return submit(req, vm,
		      job_new(req->daemon, JOB_SNAPSHOT, req->uid,
			      json_pack("{ss ss* ss* ss* ss* sb sb}", "vm", req->seg[0],
					"compression", how, "name", name, "note", note, "tags",
					tags, "self_check", json_is_true(check), "pinned",
					json_is_true(pinned)),
			      snapshot_job));
}

int api_post_self_check(struct api_request *req)
{
	static const char *const keys[] = {NULL};
	_cleanup_(cleanup_vm) struct vm *vm = NULL;
	int rc = api_body_keys(req, keys);

	if (rc)
		return rc;
	vm = find_vm(req);
	if (!vm)
		return -ENOENT;
	return submit(req, vm,
		      job_new(req->daemon, JOB_SELF_CHECK, req->uid,
			      json_pack("{ss}", "vm", req->seg[0]), self_check_job));
}

/* "SNAP" of a rollback may be short for "VM@SNAP". */
static int find_target(struct api_request *req, const char *selector, struct store_snapshot *ret)
{
	_cleanup_free_ char *full = NULL;
	struct err ignored = {0};

	if (!strchr(selector, '@') && asprintf(&full, "%s@%s", req->seg[0], selector) < 0)
		return -ENOMEM;
	if (full && !store_snapshot_find(req->daemon->store, full, req->view, ret, &ignored))
		return 0;
	return api_find_snapshot(req, selector, ret);
}

/* A number that is one off must not turn a VM into another. */
static int check_own(struct api_request *req, const struct vm *vm, const struct store_snapshot *s)
{
	if (vm_is(vm, s->vm_name, s->uid))
		return 0;
	return err_set(
		&req->err, EBUSY,
		"snapshot %llu is one of %.64s, not of %.64s: --other-vm (\"other_vm\") takes "
		"it all the same",
		(unsigned long long)s->id, s->vm_name, req->seg[0]);
}

int api_post_rollback(struct api_request *req)
{
	static const char *const keys[] = {"snapshot", "check", "other_vm", NULL};
	json_t *sel = json_object_get(req->json, "snapshot");
	json_t *check = json_object_get(req->json, "check");
	json_t *other_vm = json_object_get(req->json, "other_vm");
	_cleanup_(cleanup_vm) struct vm *vm = NULL;
	struct store_snapshot target;
	char id[24];
	int rc;

	rc = api_body_keys(req, keys);
	if (rc)
		return rc;
	if (!json_is_string(sel) || (check && !json_is_boolean(check)) ||
	    (other_vm && !json_is_boolean(other_vm)))
		return err_set(&req->err, EINVAL,
			       "a rollback needs \"snapshot\", a selector; \"check\" and "
			       "\"other_vm\" are booleans");
	vm = find_vm(req);
	if (!vm)
		return -ENOENT;
	rc = find_target(req, json_string_value(sel), &target);
	if (!rc && !json_is_true(other_vm))
		rc = check_own(req, vm, &target);
	if (rc)
		return rc;
	snprintf(id, sizeof(id), "%llu", (unsigned long long)target.id);
	return submit(req, vm,
		      job_new(req->daemon, JOB_ROLLBACK, req->uid,
			      json_pack("{ss ss sb}", "vm", req->seg[0], "snapshot", id, "check",
					json_is_true(check)),
			      rollback_job));
}

/* "UID/NAME" where several owners use the name; else of the asker, or the only one. */
static int stored_vm(struct api_request *req, const char **name, uint32_t *uid)
{
	const char *slash = strchr(req->seg[0], '/');
	_cleanup_free_ struct store_snapshot *list = NULL;
	uint8_t id[16];
	size_t nr;
	int rc;

	*name = slash && !req->view ? slash + 1 : req->seg[0];
	*uid = slash && !req->view ? (uint32_t)strtoul(req->seg[0], NULL, 10) : req->uid;
	rc = store_vm_find(req->daemon->store, *name, *uid, id, NULL);
	if (rc != -ENOENT || req->view || slash)
		return rc == -ENOENT ? err_set(&req->err, ENOENT, "there is no VM %.64s", *name)
				     : rc;
	rc = store_snapshot_list(req->daemon->store, NULL, &list, &nr, &req->err);
	for (size_t i = 0; !rc && i < nr; i++)
		if (!strcmp(list[i].vm_name, *name)) {
			*uid = list[i].uid;
			return 0;
		}
	return rc ? rc : err_set(&req->err, ENOENT, "there is no VM %.64s", *name);
}

static int reply_tags(struct api_request *req, const char *vm, uint32_t uid)
{
	char tags[VM_TAGS_MAX], set[VM_TAGS_MAX];

	vm_tags_of(req->daemon->tags, vm, uid, tags);
	vm_tags_set_ones(req->daemon->tags, vm, uid, set);
	return api_reply_json(req, 200,
			      json_pack("{ss sI ss ss}", "vm", vm, "uid", (json_int_t)uid, "tags",
					tags, "set", set));
}

int api_get_tags(struct api_request *req)
{
	const char *name;
	uint32_t uid;
	int rc = stored_vm(req, &name, &uid);

	return rc ? rc : reply_tags(req, name, uid);
}

int api_patch_tags(struct api_request *req)
{
	static const char *const keys[] = {"tags", "add", "remove", NULL};
	const char *name, *tags, *add, *remove;
	uint32_t uid;
	int rc = api_body_keys(req, keys);

	if (!rc)
		rc = api_body_text(req, "tags", &tags);
	if (!rc)
		rc = api_body_text(req, "add", &add);
	if (!rc)
		rc = api_body_text(req, "remove", &remove);
	if (!rc)
		rc = stored_vm(req, &name, &uid);
	if (!rc)
		rc = vm_tags_change(req->daemon->tags, name, uid, tags, add, remove, &req->err);
	return rc ? rc : reply_tags(req, name, uid);
}

int api_delete_vm(struct api_request *req)
{
	const char *name;
	uint32_t uid;
	int rc = stored_vm(req, &name, &uid);

	if (rc)
		return rc;
	return api_start_job(req, job_new(req->daemon, JOB_REMOVE, req->uid,
					  json_pack("{ss sI}", "vm", name, "uid", (json_int_t)uid),
					  remove_vm_job));
}
