/* SPDX-License-Identifier: MIT */
/*
 * api_store: what concerns the store as a whole: figures, space, what is pruned.
 * Control thread.
 */
#include "snapd/api/request.h"

#include <stdlib.h>
#include <string.h>

#include "snapd/core/job.h"
#include "snapd/core/json.h"
#include "snapd/policy/keep.h"
#include "snapd/schedule/prune.h"
#include "snapd/upkeep/checkup.h"
#include "snapd/upkeep/room.h"
#include "snapd/upkeep/scrub.h"
#include "snapd/upkeep/upkeep.h"
#include "snapd/util/cleanup.h"

#define RATE_MAX (1ull << 40)

int api_root_only(struct api_request *req, const char *what)
{
	return req->view ? err_set(&req->err, EPERM, "only root may %s", what) : 0;
}

/* A number from 0 on, absent: 0. */
static int body_u64(struct api_request *req, const char *key, uint64_t max, uint64_t *ret)
{
	json_t *v = json_object_get(req->json, key);

	*ret = (uint64_t)json_integer_value(v);
	if (v && (!json_is_integer(v) || json_integer_value(v) < 0 || *ret > max))
		return err_set(&req->err, EINVAL, "\"%s\" is a number from 0 to %llu", key,
			       (unsigned long long)max);
	return 0;
}

int api_post_gc(struct api_request *req)
{
	static const char *const keys[] = {"rate", NULL};
	uint64_t rate;
	int rc = api_body_keys(req, keys);

	if (!rc)
		rc = body_u64(req, "rate", RATE_MAX, &rate);
	if (!rc)
		rc = api_root_only(req, "collect garbage");
	if (rc)
		return rc;
	return api_start_job(req, job_new(req->daemon, JOB_GC, req->uid,
					  json_pack("{sI}", "rate", (json_int_t)rate), gc_job));
}

int api_get_store_stats(struct api_request *req)
{
	struct daemon *d = req->daemon;
	struct scrub_figures scrubbed;
	struct store_stats s;
	int rc = store_get_stats(req->daemon->store, &s, &req->err);

	if (rc)
		return rc;
	scrub_figures(d->scrub, &scrubbed);
	return api_reply_json(
		req, 200,
		json_pack("{sI sI sI sI sI sI sI sI sI sI sI sI sI sI sb sI sI}", "vms",
			  (json_int_t)s.vms, "timelines", (json_int_t)s.timelines, "epochs",
			  (json_int_t)s.epochs, "snapshots", (json_int_t)s.snapshots, "segments",
			  (json_int_t)s.segments, "segments_free", (json_int_t)s.segments_free,
			  "bytes_on_disk", (json_int_t)s.bytes_on_disk, "bytes_used",
			  (json_int_t)s.bytes_used, "bytes_index", (json_int_t)s.bytes_index,
			  "bytes_logical", (json_int_t)s.bytes_logical, "pages_stored",
			  (json_int_t)s.pages_stored, "dedup_entries", (json_int_t)s.dedup_entries,
			  "bytes_limit", (json_int_t)d->config.store_max_bytes, "bytes_soft_limit",
			  (json_int_t)d->config.store_soft_bytes, "over_soft_limit",
			  room_is_short(d), "scrub_damages", (json_int_t)scrubbed.damages,
			  "scrub_ended_s", (json_int_t)scrubbed.ended_s));
}

int api_post_account(struct api_request *req)
{
	static const char *const keys[] = {NULL};
	int rc = api_body_keys(req, keys);

	if (!rc)
		rc = api_root_only(req, "see whose the bytes are");
	if (rc)
		return rc;
	return api_start_job(req, job_new(req->daemon, JOB_ACCOUNT, req->uid, json_object(),
					  account_job));
}

int api_post_check(struct api_request *req)
{
	static const char *const keys[] = {"read_data", "percent", "rate", NULL};
	json_t *read_data = json_object_get(req->json, "read_data");
	uint64_t percent, rate;
	int rc = api_body_keys(req, keys);

	if (!rc && read_data && !json_is_boolean(read_data))
		rc = err_set(&req->err, EINVAL, "\"read_data\" is a boolean");
	if (!rc)
		rc = body_u64(req, "percent", 100, &percent);
	if (!rc)
		rc = body_u64(req, "rate", RATE_MAX, &rate);
	if (!rc)
		rc = api_root_only(req, "check the store");
	if (rc)
		return rc;
	return api_start_job(req, job_new(req->daemon, JOB_CHECK, req->uid,
					  json_pack("{sb sI sI}", "read_data",
						    json_is_true(read_data), "percent",
						    (json_int_t)percent, "rate", (json_int_t)rate),
					  check_job));
}

static int reply_scrub(struct api_request *req)
{
	json_t *o = scrub_json(req->daemon->scrub);

	return o ? api_reply_json(req, 200, o) : err_errno(&req->err, ENOMEM, "scrub");
}

int api_get_scrub(struct api_request *req)
{
	return reply_scrub(req);
}

int api_post_scrub(struct api_request *req)
{
	static const char *const keys[] = {"action", NULL};
	const char *action = json_string_value(json_object_get(req->json, "action"));
	int rc = api_body_keys(req, keys), i = 0;

	while (!rc && i < SCRUB_NR_ACTIONS &&
	       (!action || strcmp(action, scrub_action_names[i]) != 0))
		i++;
	if (!rc && i == SCRUB_NR_ACTIONS)
		rc = err_set(&req->err, EINVAL, "\"action\" is one of now, pause, resume, cancel");
	if (!rc)
		rc = api_root_only(req, "scrub the store");
	if (!rc)
		rc = scrub_act(req->daemon->scrub, (enum scrub_action)i, &req->err);
	return rc ? rc : reply_scrub(req);
}

int api_post_repair(struct api_request *req)
{
	static const char *const keys[] = {"dry_run", NULL};
	json_t *dry = json_object_get(req->json, "dry_run");
	int rc = api_body_keys(req, keys);

	if (!rc && dry && !json_is_boolean(dry))
		rc = err_set(&req->err, EINVAL, "\"dry_run\" is a boolean");
	if (!rc)
		rc = api_root_only(req, "repair the store");
	if (rc)
		return rc;
	return api_start_job(req,
			     job_new(req->daemon, JOB_REPAIR, req->uid,
				     json_pack("{sb}", "dry_run", json_is_true(dry)), repair_job));
}

int api_post_prune(struct api_request *req)
{
	static const char *const keys[] = {"vm", "keep", "dry_run", "unbacked", NULL};
	json_t *keep = json_object_get(req->json, "keep"), *args;
	json_t *vm = json_object_get(req->json, "vm");
	json_t *dry = json_object_get(req->json, "dry_run");
	json_t *unbacked = json_object_get(req->json, "unbacked");
	struct keep_rules rules;
	int rc = api_body_keys(req, keys);

	if (rc)
		return rc;
	if (!json_is_object(keep) || (vm && !json_is_string(vm)) ||
	    (dry && !json_is_boolean(dry)) || (unbacked && !json_is_boolean(unbacked)))
		return err_set(&req->err, EINVAL,
			       "prune needs \"keep\", an object of rules; \"vm\" is a text, "
			       "\"dry_run\" and \"unbacked\" are booleans");
	rc = keep_from_json(keep, &rules, &req->err);
	if (rc)
		return rc;
	args = json_pack("{sI sO sO* sb sb}", "view", (json_int_t)req->view, "keep", keep, "vm", vm,
			 "dry_run", json_is_true(dry), "unbacked", json_is_true(unbacked));
	return api_start_job(req, job_new(req->daemon, JOB_PRUNE, req->uid, args, prune_job));
}
