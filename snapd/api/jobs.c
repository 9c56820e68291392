/* SPDX-License-Identifier: MIT */
/* api_jobs: jobs as resources.  Control thread. */
#include "snapd/api/request.h"

#include <stdlib.h>
#include <string.h>

#include "snapd/core/job.h"
#include "snapd/util/cleanup.h"

int api_reply_job(struct api_request *req, unsigned int status, struct job *job)
{
	json_t *o = job_to_json(job);

	return api_reply_json(req, status, o ? json_pack("{so}", "job", o) : NULL);
}

int api_start_job(struct api_request *req, struct job *job_stolen)
{
	int rc;

	if (!job_stolen)
		return -ENOMEM;
	rc = job_run_detached(job_stolen);
	if (rc == -EBUSY)
		err_set(&req->err, EBUSY, "too many jobs of yours are queued; try later");
	if (rc)
		job_fail(job_stolen, -rc, "%s", req->err.code ? req->err.text : strerror(-rc));
	else
		rc = api_reply_job(req, 202, job_stolen);
	job_unref(job_stolen);
	return rc;
}

int api_get_jobs(struct api_request *req)
{
	return api_reply_json(req, 200,
			      json_pack("{so}", "jobs", job_list_json(req->daemon, req->view)));
}

/* req->job, if this user may see it; another's is as if it were not there. */
static int find_job(struct api_request *req)
{
	const char *text = req->seg[0];
	char *end;
	uint64_t id = strtoull(text, &end, 10);

	if (*text >= '0' && *text <= '9' && !*end)
		req->job = job_find(req->daemon, id);
	if (req->job && (!req->view || req->job->uid == req->view))
		return 0;
	job_unref(req->job);
	req->job = NULL;
	return err_set(&req->err, ENOENT, "no job %.32s", text);
}

static bool job_changed(struct api_request *req)
{
	return (int)job_state_of(req->job) != req->job_state_seen;
}

bool api_job_ended(struct api_request *req)
{
	return job_state_ended(job_state_of(req->job));
}

static int reply_now(struct api_request *req)
{
	return api_reply_job(req, 200, req->job);
}

/* With ?wait=MS the answer comes when the job's state changes, or after that long. */
int api_get_job(struct api_request *req)
{
	uint64_t wait_ms;
	int rc = find_job(req);

	if (!rc)
		rc = api_query_u64(req, "wait", 0, &wait_ms);
	if (rc)
		return rc;
	req->job_state_seen = (int)job_state_of(req->job);
	if (!wait_ms || job_state_ended((enum job_state)req->job_state_seen))
		return reply_now(req);
	return api_park(req, job_changed, reply_now, (uint32_t)MIN(wait_ms, API_WAIT_MS_MAX));
}

int api_delete_job(struct api_request *req)
{
	int rc = find_job(req);

	if (rc)
		return rc;
	if (api_job_ended(req))
		return err_set(&req->err, EBUSY, "job %s has ended already", req->seg[0]);
	job_cancel(req->job);
	return api_reply_job(req, 202, req->job);
}
