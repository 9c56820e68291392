/* SPDX-License-Identifier: MIT */
/*
 * api_snapshots: what is in the store.  Control thread: lists and descriptions are
 * LMDB reads; everything that reads pages is a job.
 */
#include "snapd/api/request.h"

#include <stdlib.h>
#include <string.h>

#include "snapd/core/json.h"
#include "snapd/core/name.h"
#include "snapd/util/cleanup.h"
#include "snapd/upkeep/upkeep.h"
#include "snapd/upkeep/verify.h"

int api_find_snapshot(struct api_request *req, const char *selector, struct store_snapshot *ret)
{
	int rc = store_snapshot_find(req->daemon->store, selector, req->view, ret, &req->err);

	/* The store's own selector rules hide what is another user's; this is the net
	 * below them. */
	if (!rc && req->view && ret->uid != req->view)
		rc = -ENOENT;
	if (rc == -ENOENT && !req->err.code)
		err_set(&req->err, ENOENT, "no snapshot %.128s", selector);
	return rc;
}

/* ?vm=NAME: by name among those that this user may see. */
int api_get_snapshots(struct api_request *req)
{
	_cleanup_free_ struct store_snapshot *list = NULL;
	_cleanup_free_ char *vm = api_query(req, "vm");
	json_t *out = json_array();
	size_t nr = 0;
	int rc;

	rc = store_snapshot_list(req->daemon->store, NULL, &list, &nr, &req->err);
	if (rc) {
		json_decref(out);
		return rc;
	}
	for (size_t i = 0; i < nr; i++) {
		if (req->view && list[i].uid != req->view)
			continue;
		if (vm && strcmp(vm, list[i].vm_name) != 0)
			continue;
		json_array_append_new(out, snapshot_json(&list[i]));
	}
	return api_reply_json(req, 200, json_pack("{so}", "snapshots", out));
}

int api_get_snapshot(struct api_request *req)
{
	struct store_snapshot s;
	int rc = api_find_snapshot(req, req->seg[0], &s);

	if (rc)
		return rc;
	return api_reply_json(req, 200,
			      json_pack("{so so*}", "snapshot", snapshot_json(&s), "vm",
					snapshot_vm_json(req->daemon->store, &s)));
}

/* "VM" alone means its newest everywhere else; too easy a slip for a deletion. */
int api_delete_snapshot(struct api_request *req)
{
	const char *sel = req->seg[0];
	struct store_snapshot s;
	int rc;

	if (!strchr(sel, '@') && strspn(sel, "0123456789") != strlen(sel))
		return err_set(&req->err, EINVAL, "to delete, name one snapshot: ID or VM@NAME");
	rc = api_find_snapshot(req, sel, &s);
	if (rc)
		return rc;
	return api_start_job(req,
			     job_new(req->daemon, JOB_DELETE, req->uid,
				     json_pack("{sI}", "snapshot", (json_int_t)s.id), delete_job));
}

static bool add_text(struct api_request *req, json_t *args, const char *key, int *rc)
{
	const char *text;

	*rc = api_body_text(req, key, &text);
	if (!*rc && text)
		json_object_set_new(args, key, json_string(text));
	return !*rc;
}

/* What people say of it: name, note, tags, pin. */
int api_patch_snapshot(struct api_request *req)
{
	static const char *const keys[] = {"name", "note", "tags", "pinned", NULL};
	json_t *pinned = json_object_get(req->json, "pinned"), *args;
	const char *name = json_string_value(json_object_get(req->json, "name"));
	struct store_snapshot s;
	int rc = api_body_keys(req, keys);

	if (!rc && pinned && !json_is_boolean(pinned))
		rc = err_set(&req->err, EINVAL, "\"pinned\" is a boolean");
	if (!rc && name && *name)
		rc = name_check("name", name, &req->err);
	if (!rc)
		rc = api_find_snapshot(req, req->seg[0], &s);
	if (rc)
		return rc;
	args = json_pack("{sI sO*}", "snapshot", (json_int_t)s.id, "pinned", pinned);
	if (!args)
		return -ENOMEM;
	if (!add_text(req, args, "name", &rc) || !add_text(req, args, "note", &rc) ||
	    !add_text(req, args, "tags", &rc)) {
		json_decref(args);
		return rc;
	}
	return api_start_job(req, job_new(req->daemon, JOB_SET, req->uid, args, set_job));
}

int api_post_verify(struct api_request *req)
{
	static const char *const keys[] = {"digest", NULL};
	json_t *digest = json_object_get(req->json, "digest");
	struct store_snapshot s;
	int rc = api_body_keys(req, keys);

	if (rc)
		return rc;
	if (digest && !json_is_boolean(digest))
		return err_set(&req->err, EINVAL, "\"digest\" is a boolean");
	rc = api_find_snapshot(req, req->seg[0], &s);
	if (rc)
		return rc;
	return api_start_job(req, job_new(req->daemon, JOB_VERIFY, req->uid,
					  json_pack("{sI sb}", "snapshot", (json_int_t)s.id,
						    "digest", json_is_true(digest)),
					  verify_job));
}

int api_get_diff(struct api_request *req)
{
	_cleanup_free_ char *with = api_query(req, "with");
	struct store_snapshot a, b;
	int rc;

	if (!with)
		return err_set(&req->err, EINVAL, "diff needs ?with=SNAPSHOT");
	rc = api_find_snapshot(req, req->seg[0], &a);
	if (!rc)
		rc = api_find_snapshot(req, with, &b);
	if (rc)
		return rc;
	if (a.page_size != b.page_size)
		return err_set(&req->err, EINVAL, "the snapshots have pages of different sizes");
	return api_start_job(
		req, job_new(req->daemon, JOB_DIFF, req->uid,
			     json_pack("{sI sI}", "a", (json_int_t)a.id, "b", (json_int_t)b.id),
			     diff_job));
}
