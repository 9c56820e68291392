/* SPDX-License-Identifier: MIT */
/*
 * api_policies: policies and how their lines are.  Control thread.  Hooks run as the service
 * does, so only root makes or changes a policy; everyone sees the lines of their own VMs.
 */
#include "snapd/api/request.h"

#include "snapd/schedule/scheduler.h"
#include "snapd/util/cleanup.h"

int api_get_policies(struct api_request *req)
{
	return api_reply_json(req, 200,
			      json_pack("{so}", "policies", policies_json(req->daemon, req->view)));
}

static int reply_policy(struct api_request *req)
{
	json_t *one = policy_json(req->daemon, req->seg[0], req->view);

	if (!one)
		return err_set(&req->err, ENOENT, "there is no policy %.64s", req->seg[0]);
	return api_reply_json(req, 200, json_pack("{so}", "policy", one));
}

int api_get_policy(struct api_request *req)
{
	return reply_policy(req);
}

int api_put_policy(struct api_request *req)
{
	static const char *const keys[] = {"settings", NULL};
	json_t *settings = json_object_get(req->json, "settings");
	int rc = api_root_only(req, "make policies");

	if (!rc)
		rc = api_body_keys(req, keys);
	if (!rc && !json_is_object(settings))
		rc = err_set(&req->err, EINVAL, "a policy needs \"settings\", an object of texts");
	if (!rc)
		rc = policy_put(req->daemon, req->seg[0], settings, &req->err);
	return rc ? rc : reply_policy(req);
}

int api_patch_policy(struct api_request *req)
{
	static const char *const keys[] = {"paused", NULL};
	json_t *paused = json_object_get(req->json, "paused");
	int rc = api_root_only(req, "change policies");

	if (!rc)
		rc = api_body_keys(req, keys);
	if (!rc && !json_is_boolean(paused))
		rc = err_set(&req->err, EINVAL, "\"paused\" is a boolean");
	if (!rc)
		rc = policy_change(req->daemon, req->seg[0], "paused",
				   json_is_true(paused) ? "yes" : "no", &req->err);
	return rc ? rc : reply_policy(req);
}

int api_delete_policy(struct api_request *req)
{
	int rc = api_root_only(req, "remove policies");

	if (!rc)
		rc = policy_remove(req->daemon, req->seg[0], &req->err);
	return rc ? rc : api_reply_json(req, 200, json_pack("{ss}", "removed", req->seg[0]));
}

int api_post_policy_run(struct api_request *req)
{
	static const char *const keys[] = {"vm", NULL};
	unsigned int nr;
	const char *vm;
	int rc = api_root_only(req, "run policies");

	if (!rc)
		rc = api_body_keys(req, keys);
	if (!rc)
		rc = api_body_text(req, "vm", &vm);
	if (!rc)
		rc = policy_run_now(req->daemon, req->seg[0], vm, &nr, &req->err);
	return rc ? rc : api_reply_json(req, 200, json_pack("{sI}", "lines", (json_int_t)nr));
}
