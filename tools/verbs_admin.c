/* SPDX-License-Identifier: MIT */
/* verbs_admin: jobs, cancel, version. */
#include <string.h>

#include "snapd/util/cleanup.h"
#include "tools/client.h"
#include "tools/human.h"
#include "tools/out.h"
#include "tools/snapctl.h"

static void percent(char *buf, size_t len, json_t *progress)
{
	uint64_t done = get_u64(progress, "done"), total = get_u64(progress, "total");

	if (total)
		snprintf(buf, len, "%llu %%",
			 (unsigned long long)(MIN(done, total) * 100.0 / total));
	else
		snprintf(buf, len, "-");
}

int verb_jobs(const struct args *a)
{
	static const char *const heads[] = {"JOB", "KIND", "STATE", "DONE", "ASKED FOR", "REASON"};
	static const bool right[] = {true, false, false, true, false, false};
	_cleanup_(cleanup_json) json_t *o = NULL;
	json_t *job;
	size_t i;
	int rc = call(a, "GET", NULL, &o, "/v1/jobs", NULL, NULL);

	if (rc || a->json)
		return rc ? rc : print_json(o);
	struct table *t = table_new(heads, right, ARRAY_SIZE(heads));

	json_array_foreach(json_object_get(o, "jobs"), i, job)
	{
		char id[24], done[24], when[32];

		percent(done, sizeof(done), json_object_get(job, "progress"));
		table_row(t, (const char *const[]){
				     text_u64(id, sizeof(id), get_u64(job, "id")),
				     get_text(job, "kind"), get_text(job, "state"), done,
				     human_time(when, sizeof(when), get_u64(job, "created_ns")),
				     get_text(json_object_get(job, "error"), "text")});
	}
	table_print(t);
	return EXIT_DONE;
}

int verb_cancel(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *o = NULL;
	json_t *job;
	int rc = call(a, "DELETE", NULL, &o, "/v1/jobs/%s", a->pos[0], NULL);

	if (rc || a->json)
		return rc ? rc : print_json(o);
	job = json_object_get(o, "job");
	printf("job %llu (%s): asked to stop\n", (unsigned long long)get_u64(job, "id"),
	       get_text(job, "kind"));
	return EXIT_DONE;
}

int verb_version(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *o = NULL;
	int rc;

	if (!a->json) {
		printf("snapctl %s\n", SNAPD_VERSION);
		fflush(stdout);
	}
	rc = call(a, "GET", NULL, &o, "/v1/version", NULL, NULL);
	if (rc)
		return rc;
	json_object_set_new(o, "snapctl", json_string(SNAPD_VERSION));
	if (a->json)
		return print_json(o);
	printf("snapd %s on %s\n", get_text(o, "version"), a->socket);
	return EXIT_DONE;
}
