/* SPDX-License-Identifier: MIT */
/*
 * api: the table of routes, and what belongs to no resource.  A path is here if
 * and only if it is in docs/openapi.yaml (tests/unit/test_api_routes.c).
 */
#include "snapd/api/request.h"

#include "snapd/util/cleanup.h"

const struct api_route api_routes[] = {
	{"GET", "/metrics", api_get_metrics},
	{"GET", "/v1/version", api_get_version},
	{"GET", "/v1/vms", api_get_vms},
	{"GET", "/v1/vms/{name}", api_get_vm},
	{"DELETE", "/v1/vms/{name}", api_delete_vm},
	{"GET", "/v1/vms/{name}/tags", api_get_tags},
	{"PATCH", "/v1/vms/{name}/tags", api_patch_tags},
	{"POST", "/v1/vms/{name}/snapshots", api_post_snapshot},
	{"POST", "/v1/vms/{name}/rollback", api_post_rollback},
	{"POST", "/v1/vms/{name}/self-check", api_post_self_check},
	{"GET", "/v1/snapshots", api_get_snapshots},
	{"GET", "/v1/snapshots/{snapshot}", api_get_snapshot},
	{"PATCH", "/v1/snapshots/{snapshot}", api_patch_snapshot},
	{"DELETE", "/v1/snapshots/{snapshot}", api_delete_snapshot},
	{"POST", "/v1/snapshots/{snapshot}/verify", api_post_verify},
	{"GET", "/v1/snapshots/{snapshot}/diff", api_get_diff},
	{"GET", "/v1/snapshots/{snapshot}/memory", api_get_memory},
	{"GET", "/v1/snapshots/{snapshot}/state", api_get_state},
	{"POST", "/v1/import", api_post_import},
	{"POST", "/v1/prune", api_post_prune},
	{"GET", "/v1/policies", api_get_policies},
	{"GET", "/v1/policies/{name}", api_get_policy},
	{"PUT", "/v1/policies/{name}", api_put_policy},
	{"PATCH", "/v1/policies/{name}", api_patch_policy},
	{"DELETE", "/v1/policies/{name}", api_delete_policy},
	{"POST", "/v1/policies/{name}/run", api_post_policy_run},
	{"GET", "/v1/jobs", api_get_jobs},
	{"GET", "/v1/jobs/{id}", api_get_job},
	{"DELETE", "/v1/jobs/{id}", api_delete_job},
	{"GET", "/v1/store/stats", api_get_store_stats},
	{"POST", "/v1/store/gc", api_post_gc},
	{"POST", "/v1/store/check", api_post_check},
	{"POST", "/v1/store/repair", api_post_repair},
	{"POST", "/v1/store/account", api_post_account},
	{"GET", "/v1/store/scrub", api_get_scrub},
	{"POST", "/v1/store/scrub", api_post_scrub},
	{"POST", "/v1/backup/push", api_post_backup_push},
	{"POST", "/v1/backup/pull", api_post_backup_pull},
	{"POST", "/v1/backup/list", api_post_backup_list},
	{"POST", "/v1/backup/verify", api_post_backup_verify},
	{"POST", "/v1/backup/forget", api_post_backup_forget},
	{"POST", "/v1/backup/prune", api_post_backup_prune},
	{"POST", "/v1/backup/status", api_post_backup_status},
};
const size_t api_nr_routes = ARRAY_SIZE(api_routes);

int api_get_version(struct api_request *req)
{
	return api_reply_json(req, 200,
			      json_pack("{ss ss si ss}", "name", "snapd", "version", SNAPD_VERSION,
					"api", 1, "agent_socket",
					req->daemon->config.agent_socket));
}
