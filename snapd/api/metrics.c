/* SPDX-License-Identifier: MIT */
/*
 * metrics: GET /metrics, the Prometheus text format (version 0.0.4).  Control
 * thread.  A user sees its own VMs; figures of the store and the jobs are sums and
 * are everyone's.
 *
 * Every number in a VM's description becomes a metric, so that a new counter needs
 * no change here.  Lines of one metric have to stand together: they are gathered
 * by name first.
 */
#include "snapd/api/request.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/daemon/job.h"
#include "snapd/util/cleanup.h"
#include "snapd/vm/vm.h"

/* What only ever counts up, of a VM's figures; the others are gauges. */
static const char *const vm_counters[] = {
	"harvested",  "reset",	   "published", "ring_full",   "unresolved",
	"host_marks", "kicks",	   "pauses",	"reconnects",  "slot_changes",
	"harvest_ns", "snapshots", "failures",	"self_checks", "missed_pages",
};
/* Names of things, not amounts. */
static const char *const vm_not_metrics[] = {"uid", "pid", "point", "head_snapshot", "attached_ns"};

static bool one_of(const char *name, const char *const *list, size_t nr)
{
	for (size_t i = 0; i < nr; i++)
		if (!strcmp(name, list[i]))
			return true;
	return false;
}

static void add_vm_number(json_t *by_name, const char *vm, json_int_t uid, const char *key,
			  json_t *value)
{
	json_t *lines = json_object_get(by_name, key);
	char line[256];

	if (!lines) {
		lines = json_array();
		json_object_set_new(by_name, key, lines);
	}
	snprintf(line, sizeof(line), "{vm=\"%s\",uid=\"%lld\"} %.17g\n", vm, (long long)uid,
		 json_number_value(value));
	json_array_append_new(lines, json_string(line));
}

/* Numbers of `o`, and of objects in it under "outer_inner". */
static void gather(json_t *by_name, const char *vm, json_int_t uid, const char *prefix, json_t *o)
{
	char name[96];
	const char *key;
	json_t *v;

	json_object_foreach(o, key, v)
	{
		snprintf(name, sizeof(name), "%s%s%s", prefix, *prefix ? "_" : "", key);
		if (json_is_object(v) && !*prefix &&
		    !one_of(key, vm_not_metrics, ARRAY_SIZE(vm_not_metrics)))
			gather(by_name, vm, uid, strcmp(key, "counters") ? key : "", v);
		else if (json_is_number(v) &&
			 !one_of(key, vm_not_metrics, ARRAY_SIZE(vm_not_metrics)))
			add_vm_number(by_name, vm, uid, name, v);
	}
}

static void print_vms(FILE *f, json_t *vms)
{
	json_t *by_name = json_object(), *vm, *lines, *line;
	const char *key;
	size_t i;

	json_array_foreach(vms, i, vm)
		gather(by_name, json_string_value(json_object_get(vm, "name")),
		       json_integer_value(json_object_get(vm, "uid")), "", vm);
	fprintf(f, "# TYPE snapd_vms gauge\nsnapd_vms %zu\n", json_array_size(vms));
	json_object_foreach(by_name, key, lines)
	{
		bool counter = one_of(key, vm_counters, ARRAY_SIZE(vm_counters));

		fprintf(f, "# TYPE snapd_vm_%s%s %s\n", key, counter ? "_total" : "",
			counter ? "counter" : "gauge");
		json_array_foreach(lines, i, line)
			fprintf(f, "snapd_vm_%s%s%s", key, counter ? "_total" : "",
				json_string_value(line));
	}
	json_decref(by_name);
}

static void print_store(FILE *f, struct daemon *d)
{
	struct store_stats s;

	if (store_get_stats(d->store, &s, NULL))
		return;
	const struct {
		const char *name;
		uint64_t value;
	} rows[] = {
		{"vms", s.vms},
		{"timelines", s.timelines},
		{"epochs", s.epochs},
		{"snapshots", s.snapshots},
		{"segments", s.segments},
		{"segments_free", s.segments_free},
		{"disk_bytes", s.bytes_on_disk},
		{"used_bytes", s.bytes_used},
		{"index_bytes", s.bytes_index},
		{"logical_bytes", s.bytes_logical},
		{"pages", s.pages_stored},
		{"dedup_entries", s.dedup_entries},
		{"limit_bytes", d->config.store_max_bytes},
	};

	for (size_t i = 0; i < ARRAY_SIZE(rows); i++)
		fprintf(f, "# TYPE snapd_store_%s gauge\nsnapd_store_%s %llu\n", rows[i].name,
			rows[i].name, (unsigned long long)rows[i].value);
}

static void print_jobs(FILE *f, struct daemon *d)
{
	fprintf(f, "# TYPE snapd_jobs gauge\n");
	for (int k = 0; k < JOB_NR_KINDS; k++)
		for (int s = JOB_QUEUED; s <= JOB_RUNNING; s++)
			fprintf(f, "snapd_jobs{kind=\"%s\",state=\"%s\"} %llu\n", job_kind_names[k],
				job_state_names[s], (unsigned long long)job_count(d, k, s));
	fprintf(f, "# TYPE snapd_jobs_ended_total counter\n");
	for (int k = 0; k < JOB_NR_KINDS; k++)
		for (int s = JOB_DONE; s < JOB_NR_STATES; s++)
			fprintf(f, "snapd_jobs_ended_total{kind=\"%s\",state=\"%s\"} %llu\n",
				job_kind_names[k], job_state_names[s],
				(unsigned long long)job_count(d, k, s));
}

int api_get_metrics(struct api_request *req)
{
	json_t *vms = vm_list_json(req->daemon, req->view);
	char *text = NULL;
	size_t len;
	FILE *f = open_memstream(&text, &len);

	if (!f || !vms) {
		json_decref(vms);
		if (f)
			fclose(f);
		free(text);
		return -ENOMEM;
	}
	fprintf(f, "# TYPE snapd_info gauge\nsnapd_info{version=\"%s\"} 1\n", SNAPD_VERSION);
	print_vms(f, vms);
	print_store(f, req->daemon);
	print_jobs(f, req->daemon);
	json_decref(vms);
	fclose(f);
	return api_reply_text(req, "text/plain; version=0.0.4", text);
}
