/* SPDX-License-Identifier: MIT */
/* verbs_admin: store, jobs, cancel, version. */
#include <string.h>

#include "snapd/util/cleanup.h"
#include "tools/client.h"
#include "tools/human.h"
#include "tools/out.h"
#include "tools/snapctl.h"

static int store_stats(const struct args *a)
{
	static const struct {
		const char *key, *label;
		bool bytes;
	} rows[] = {
		{"snapshots", "snapshots", false},
		{"vms", "VMs", false},
		{"timelines", "timelines", false},
		{"epochs", "epochs", false},
		{"segments", "segments", false},
		{"segments_free", "  of them free", false},
		{"bytes_on_disk", "on disk", true},
		{"bytes_used", "  used", true},
		{"bytes_index", "  index", true},
		{"bytes_limit", "limit", true},
		{"bytes_logical", "memory in snapshots", true},
		{"pages_stored", "pages stored", false},
		{"dedup_entries", "known for dedup", false},
	};
	_cleanup_(cleanup_json) json_t *o = NULL;
	char text[24];
	int rc = call(a, "GET", NULL, &o, "/v1/store/stats", NULL, NULL);

	if (rc || a->json)
		return rc ? rc : print_json(o);
	for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
		uint64_t v = get_u64(o, rows[i].key);

		if (v || strcmp(rows[i].key, "bytes_limit") != 0)
			printf("%-20s %10s\n", rows[i].label,
			       human_amount(text, sizeof(text), v, rows[i].bytes));
	}
	return EXIT_DONE;
}

static int store_gc(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *r = NULL;
	char text[24];
	int rc = run_job(a, "POST", NULL, &r, "/v1/store/gc", NULL, NULL);

	if (rc || a->json)
		return rc ? rc : print_json(r);
	printf("%s given back\n", human_bytes(text, sizeof(text), get_u64(r, "bytes_freed")));
	return EXIT_DONE;
}

int verb_store(const struct args *a)
{
	if (!strcmp(a->pos[0], "stats"))
		return store_stats(a);
	if (!strcmp(a->pos[0], "gc"))
		return store_gc(a);
	return fail(EXIT_USAGE, "unknown: store %s: stats or gc", a->pos[0]);
}

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
