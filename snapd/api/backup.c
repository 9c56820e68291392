/* SPDX-License-Identifier: MIT */
/*
 * api_backup: backup repositories, as jobs.  Control thread.  Root only: the credentials and
 * the key are the service's, and a repository has everyone's snapshots.
 */
#include "snapd/api/request.h"

#include <string.h>

#include "snapd/backup/backup.h"
#include "snapd/core/json.h"
#include "snapd/core/name.h"
#include "snapd/policy/keep.h"
#include "snapd/util/cleanup.h"

#define URL_MAX	     1024
#define PUSH_AT_ONCE 1000

static bool is_url(const char *text)
{
	return strlen(text) <= URL_MAX &&
	       (!strncmp(text, "s3://", 5) || !strncmp(text, "file:///", 8));
}

/* What all have; *args with the repository, where one is named. */
static int begin(struct api_request *req, const char *const *keys, json_t **args)
{
	json_t *url = json_object_get(req->json, "repository");
	int rc = api_body_keys(req, keys);

	if (!rc)
		rc = api_root_only(req, "use backups");
	if (!rc && url && (!json_is_string(url) || !is_url(json_string_value(url))))
		rc = err_set(&req->err, EINVAL,
			     "\"repository\" is s3://BUCKET/PREFIX or file:///PATH");
	if (!rc && !url && !req->daemon->config.backup)
		rc = err_set(&req->err, EINVAL,
			     "name a repository, or set `backup` in the service's configuration");
	if (rc)
		return rc;
	*args = json_pack("{sO*}", "repository", url);
	return *args ? 0 : -ENOMEM;
}

static int start(struct api_request *req, enum job_kind kind, json_t *args_stolen, int rc,
		 int (*fn)(struct job *, struct err *))
{
	if (!rc)
		return api_start_job(req, job_new(req->daemon, kind, req->uid, args_stolen, fn));
	json_decref(args_stolen);
	return rc;
}

/* A text into args, where it is there. */
static int copy_text(struct api_request *req, const char *key, json_t *args)
{
	const char *text;
	int rc = api_body_text(req, key, &text);

	if (!rc && text)
		json_object_set_new(args, key, json_string(text));
	return rc;
}

static int copy_bool(struct api_request *req, const char *key, json_t *args)
{
	json_t *v = json_object_get(req->json, key);

	if (v && !json_is_boolean(v))
		return err_set(&req->err, EINVAL, "\"%s\" is a boolean", key);
	if (v)
		json_object_set(args, key, v);
	return 0;
}

/* Selectors of local snapshots → ids. */
static int local_ids(struct api_request *req, json_t *args)
{
	json_t *list = json_object_get(req->json, "snapshots"), *ids = json_array(), *v;
	struct store_snapshot s;
	size_t i;
	int rc = 0;

	json_object_set_new(args, "snapshots", ids);
	if (!json_array_size(list) || json_array_size(list) > PUSH_AT_ONCE)
		return err_set(&req->err, EINVAL, "\"snapshots\" is an array of 1 to %d snapshots",
			       PUSH_AT_ONCE);
	json_array_foreach(list, i, v)
	{
		if (!rc && !json_is_string(v))
			rc = err_set(&req->err, EINVAL, "\"snapshots\" are texts");
		if (!rc)
			rc = api_find_snapshot(req, json_string_value(v), &s);
		if (!rc)
			json_array_append_new(ids, json_integer((json_int_t)s.id));
	}
	return rc;
}

int api_post_backup_push(struct api_request *req)
{
	static const char *const keys[] = {"repository", "snapshots", NULL};
	json_t *args = NULL;
	int rc = begin(req, keys, &args);

	if (!rc)
		rc = local_ids(req, args);
	return start(req, JOB_BACKUP_PUSH, args, rc, backup_push_job);
}

int api_post_backup_pull(struct api_request *req)
{
	static const char *const keys[] = {"repository", "snapshot", "vm", NULL};
	json_t *args = NULL;
	int rc = begin(req, keys, &args);

	if (!rc)
		rc = copy_text(req, "snapshot", args);
	if (!rc)
		rc = copy_text(req, "vm", args);
	if (!rc && !json_object_get(args, "snapshot"))
		rc = err_set(&req->err, EINVAL, "pull needs \"snapshot\"");
	if (!rc && json_object_get(args, "vm"))
		rc = name_check("vm", json_string_value(json_object_get(args, "vm")), &req->err);
	return start(req, JOB_BACKUP_PULL, args, rc, backup_pull_job);
}

int api_post_backup_list(struct api_request *req)
{
	static const char *const keys[] = {"repository", "vm", NULL};
	json_t *args = NULL;
	int rc = begin(req, keys, &args);

	if (!rc)
		rc = copy_text(req, "vm", args);
	return start(req, JOB_BACKUP_LIST, args, rc, backup_list_job);
}

int api_post_backup_verify(struct api_request *req)
{
	static const char *const keys[] = {"repository", "percent", NULL};
	json_t *percent = json_object_get(req->json, "percent"), *args = NULL;
	int rc = begin(req, keys, &args);

	if (!rc && percent &&
	    (!json_is_integer(percent) || json_integer_value(percent) < 0 ||
	     json_integer_value(percent) > 100))
		rc = err_set(&req->err, EINVAL, "\"percent\" is a number from 0 to 100");
	if (!rc && percent)
		json_object_set(args, "percent", percent);
	return start(req, JOB_BACKUP_VERIFY, args, rc, backup_verify_job);
}

/* Either names, or rules. */
static int what_to_forget(struct api_request *req, json_t *args)
{
	json_t *list = json_object_get(req->json, "snapshots"), *v;
	json_t *keep = json_object_get(req->json, "keep");
	struct keep_rules rules;
	size_t i;

	if (!list == !keep || (list && !json_array_size(list)) || (keep && !json_is_object(keep)))
		return err_set(&req->err, EINVAL,
			       "forget needs \"snapshots\", an array of names, or \"keep\", an "
			       "object of rules");
	json_array_foreach(list, i, v) if (!json_is_string(v)) return err_set(
		&req->err, EINVAL, "\"snapshots\" are texts");
	json_object_set(args, list ? "snapshots" : "keep", list ? list : keep);
	return keep ? keep_from_json(keep, &rules, &req->err) : 0;
}

int api_post_backup_forget(struct api_request *req)
{
	static const char *const keys[] = {"repository", "snapshots", "keep",  "vm",
					   "tag",	 "dry_run",   "prune", NULL};
	json_t *args = NULL;
	int rc = begin(req, keys, &args);

	if (!rc)
		rc = what_to_forget(req, args);
	if (!rc)
		rc = copy_text(req, "vm", args);
	if (!rc)
		rc = copy_text(req, "tag", args);
	if (!rc)
		rc = copy_bool(req, "dry_run", args);
	if (!rc)
		rc = copy_bool(req, "prune", args);
	return start(req, JOB_BACKUP_FORGET, args, rc, backup_forget_job);
}

int api_post_backup_prune(struct api_request *req)
{
	static const char *const keys[] = {"repository", "dry_run", NULL};
	json_t *args = NULL;
	int rc = begin(req, keys, &args);

	if (!rc)
		rc = copy_bool(req, "dry_run", args);
	return start(req, JOB_BACKUP_PRUNE, args, rc, backup_prune_job);
}

int api_post_backup_status(struct api_request *req)
{
	static const char *const keys[] = {"repository", "brief", NULL};
	json_t *args = NULL;
	int rc = begin(req, keys, &args);

	if (!rc)
		rc = copy_bool(req, "brief", args);
	return start(req, JOB_BACKUP_STATUS, args, rc, backup_status_job);
}
