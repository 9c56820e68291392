/* SPDX-License-Identifier: MIT */
/*
 * metrics: GET /metrics, for Prometheus.  Control thread.  A user sees its own VMs and their
 * lines of policies and backups; figures of the store, the jobs and the process are sums and are
 * everyone's.
 *
 * docs/monitoring.md tells what each is for; tests/e2e/metrics.py holds the document, the
 * alert rules, the dashboard and this file together.
 */
#include "snapd/api/request.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include "snapd/api/exposition.h"
#include "snapd/backup/session.h"
#include "snapd/upkeep/room.h"
#include "snapd/upkeep/scrub.h"
#include "snapd/core/job.h"
#include "snapd/schedule/scheduler.h"
#include "snapd/util/cleanup.h"

/* ---- VMs ---- */

enum scale { PLAIN, PAGES_AS_BYTES };

static const struct vm_metric {
	const char *name;
	enum metric_type type;
	enum scale scale;
	size_t at; /* of a uint64_t in struct vm_figures */
	const char *help;
} vm_metrics[] = {
#define AT(f) offsetof(struct vm_figures, f)
	{"snapd_vm_ready", METRIC_GAUGE, PLAIN, AT(ready),
	 "1 when snapshots of the VM can be taken."},
	{"snapd_vm_broken", METRIC_GAUGE, PLAIN, AT(broken),
	 "1 when a rollback failed half way: the VM is paused until another one succeeds."},
	{"snapd_vm_vcpus", METRIC_GAUGE, PLAIN, AT(nr_vcpus), "vCPUs of the VM."},
	{"snapd_vm_ram_bytes", METRIC_GAUGE, PLAIN, AT(ram_bytes), "Memory of the VM."},
	{"snapd_vm_dirty_bytes", METRIC_GAUGE, PAGES_AS_BYTES, AT(agent.dirty_frames),
	 "Memory known to be written since the newest epoch."},
	{"snapd_vm_pending_entries", METRIC_GAUGE, PLAIN, AT(agent.pending),
	 "Ring entries harvested and not yet reset and published."},
	{"snapd_vm_dirtied_bytes_total", METRIC_COUNTER, PAGES_AS_BYTES, AT(agent.published),
	 "Memory reported as written, a page once in each harvest; its rate is the dirty rate."},
	{"snapd_vm_harvested_entries_total", METRIC_COUNTER, PLAIN, AT(agent.harvested),
	 "Entries collected from dirty rings."},
	{"snapd_vm_reset_entries_total", METRIC_COUNTER, PLAIN, AT(agent.reset),
	 "Ring entries whose pages KVM protects again."},
	{"snapd_vm_unresolved_entries_total", METRIC_COUNTER, PLAIN, AT(agent.unresolved),
	 "Ring entries that named no memslot in force."},
	{"snapd_vm_ring_full_total", METRIC_COUNTER, PLAIN, AT(agent.ring_full),
	 "Exits of a vCPU because its dirty ring was full."},
	{"snapd_vm_host_marked_pages_total", METRIC_COUNTER, PLAIN, AT(agent.host_marks),
	 "Pages that the VMM itself reported as written."},
	{"snapd_vm_kicks_total", METRIC_COUNTER, PLAIN, AT(agent.kicks),
	 "Times a vCPU was kicked out of the guest."},
	{"snapd_vm_agent_pauses_total", METRIC_COUNTER, PLAIN, AT(agent.pauses),
	 "Pauses of the VM, for whatever reason."},
	{"snapd_vm_reconnects_total", METRIC_COUNTER, PLAIN, AT(agent.reconnects),
	 "Times that the agent connected again."},
	{"snapd_vm_slot_changes_total", METRIC_COUNTER, PLAIN, AT(agent.slot_changes),
	 "Memslots made, moved and deleted."},
	{"snapd_vm_jobs_queued", METRIC_GAUGE, PLAIN, AT(nr_queued), "Jobs that wait for the VM."},
	{"snapd_vm_epochs_total", METRIC_COUNTER, PLAIN, AT(epochs.nr),
	 "Epochs made durable, since the agent connected."},
	{"snapd_vm_snapshots_total", METRIC_COUNTER, PLAIN, AT(snapshots),
	 "Snapshots taken, since the agent connected."},
	{"snapd_vm_snapshot_failures_total", METRIC_COUNTER, PLAIN, AT(failures),
	 "Snapshots and self-checks that failed, since the agent connected."},
	{"snapd_vm_self_checks_total", METRIC_COUNTER, PLAIN, AT(self_checks),
	 "Self-checks done, since the agent connected."},
	{"snapd_vm_missed_pages_total", METRIC_COUNTER, PLAIN, AT(missed_pages),
	 "Pages that a self-check found written and never reported. Anything above 0 is a bug."},
	{"snapd_vm_stored_pages_total", METRIC_COUNTER, PLAIN, AT(epochs.pages_stored),
	 "Pages of epochs that the store did not have."},
	{"snapd_vm_written_bytes_total", METRIC_COUNTER, PLAIN, AT(epochs.bytes_written),
	 "Bytes written to segments for the VM's epochs, headers included."},
#undef AT
};

struct vms {
	struct vm_figures *list; /* owned */
	size_t nr;
	uint64_t now_ns; /* CLOCK_REALTIME */
};

static const char *labels_of(const struct vm_figures *v, char buf[LABELS_MAX])
{
	char uid[16];

	snprintf(uid, sizeof(uid), "%u", v->uid);
	return metric_labels(buf, "vm", v->name, "uid", uid, NULL);
}

static void print_vm_metric(FILE *f, const struct vms *vms, const struct vm_metric *m)
{
	char labels[LABELS_MAX];

	metric_family(f, m->name, m->type, m->help);
	for (size_t i = 0; i < vms->nr; i++) {
		const struct vm_figures *v = &vms->list[i];
		uint64_t value = *(const uint64_t *)((const char *)v + m->at);

		if (m->scale == PAGES_AS_BYTES)
			value *= v->page_size;
		metric_u64(f, m->name, labels_of(v, labels), value);
	}
}

static void print_harvests(FILE *f, const struct vms *vms)
{
	char labels[LABELS_MAX];

	metric_family(f, "snapd_vm_harvest_seconds", METRIC_SUMMARY,
		      "Time to harvest the rings, reset them and publish the pages.");
	for (size_t i = 0; i < vms->nr; i++) {
		labels_of(&vms->list[i], labels);
		metric_seconds(f, "snapd_vm_harvest_seconds_sum", labels,
			       vms->list[i].agent.harvest_ns);
		metric_u64(f, "snapd_vm_harvest_seconds_count", labels,
			   vms->list[i].agent.harvests);
	}
}

static void print_losses(FILE *f, const struct vms *vms)
{
	char labels[LABELS_MAX];

	metric_family(f, "snapd_vm_lost_seconds_total", METRIC_COUNTER,
		      "What the guest lost to pauses, full rings and write faults, an estimate.");
	for (size_t i = 0; i < vms->nr; i++)
		metric_seconds(f, "snapd_vm_lost_seconds_total", labels_of(&vms->list[i], labels),
			       vms->list[i].lost_ns);
}

static void print_histograms(FILE *f, const struct vms *vms)
{
	char labels[LABELS_MAX];

	metric_family(f, "snapd_vm_pause_seconds", METRIC_HISTOGRAM,
		      "How long the VM stood still for an epoch.");
	for (size_t i = 0; i < vms->nr; i++)
		metric_histogram(f, "snapd_vm_pause_seconds", labels_of(&vms->list[i], labels),
				 &vms->list[i].epochs.pause_ns, pause_bounds_ns, true);
	metric_family(f, "snapd_vm_commit_seconds", METRIC_HISTOGRAM,
		      "From the end of the pause until the epoch was durable.");
	for (size_t i = 0; i < vms->nr; i++)
		metric_histogram(f, "snapd_vm_commit_seconds", labels_of(&vms->list[i], labels),
				 &vms->list[i].epochs.commit_ns, commit_bounds_ns, true);
	metric_family(f, "snapd_vm_epoch_bytes", METRIC_HISTOGRAM, "Memory that an epoch changed.");
	for (size_t i = 0; i < vms->nr; i++)
		metric_histogram(f, "snapd_vm_epoch_bytes", labels_of(&vms->list[i], labels),
				 &vms->list[i].epochs.epoch_bytes, epoch_bounds_bytes, false);
}

/* Parts that do not overlap. */
static void print_last_pause(FILE *f, const struct vms *vms)
{
	static const struct {
		const char *name;
		size_t at;
	} parts[] = {
		{"stop", offsetof(struct vm_pause, stop_ns)},
		{"state", offsetof(struct vm_pause, state_ns)},
		{"harvest", offsetof(struct vm_pause, harvest_ns)},
		{"copy", offsetof(struct vm_pause, copy_ns)},
	};
	char labels[LABELS_MAX], uid[16];

	metric_family(f, "snapd_vm_last_pause_seconds", METRIC_GAUGE,
		      "Parts of the last pause: stop the vCPUs, save state, harvest, copy pages.");
	for (size_t i = 0; i < vms->nr; i++)
		for (size_t p = 0; p < ARRAY_SIZE(parts); p++) {
			const struct vm_figures *v = &vms->list[i];

			snprintf(uid, sizeof(uid), "%u", v->uid);
			metric_labels(labels, "vm", v->name, "uid", uid, "part", parts[p].name,
				      NULL);
			metric_seconds(f, "snapd_vm_last_pause_seconds", labels,
				       *(const uint64_t *)((const char *)&v->pause + parts[p].at));
		}
}

/* A VM that has no point in the store yet has no lag. */
static void print_lag(FILE *f, const struct vms *vms)
{
	char labels[LABELS_MAX];

	metric_family(f, "snapd_vm_capture_lag_seconds", METRIC_GAUGE,
		      "Age of the newest point in the store: what would be lost with the VM now.");
	for (size_t i = 0; i < vms->nr; i++) {
		uint64_t taken_ns = vms->list[i].epochs.taken_ns;

		if (taken_ns)
			metric_seconds(f, "snapd_vm_capture_lag_seconds",
				       labels_of(&vms->list[i], labels),
				       vms->now_ns - MIN(vms->now_ns, taken_ns));
	}
	metric_family(f, "snapd_vm_last_epoch_timestamp_seconds", METRIC_GAUGE,
		      "When the newest point in the store was taken.");
	for (size_t i = 0; i < vms->nr; i++)
		if (vms->list[i].epochs.taken_ns)
			metric_seconds(f, "snapd_vm_last_epoch_timestamp_seconds",
				       labels_of(&vms->list[i], labels),
				       vms->list[i].epochs.taken_ns);
}

static int print_vms(FILE *f, struct api_request *req)
{
	_cleanup_free_ struct vm_figures *list = NULL;
	struct vms vms = {0};
	struct timespec ts;
	int rc = vm_list_figures(req->daemon, req->view, &list, &vms.nr);

	if (rc)
		return rc;
	clock_gettime(CLOCK_REALTIME, &ts);
	vms.now_ns = (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
	vms.list = list;
	metric_family(f, "snapd_vms", METRIC_GAUGE, "Attached VMs.");
	metric_u64(f, "snapd_vms", "", vms.nr);
	for (size_t i = 0; i < ARRAY_SIZE(vm_metrics); i++)
		print_vm_metric(f, &vms, &vm_metrics[i]);
	print_harvests(f, &vms);
	print_losses(f, &vms);
	print_histograms(f, &vms);
	print_last_pause(f, &vms);
	print_lag(f, &vms);
	return 0;
}

/* ---- the store ---- */

struct gauge {
	const char *name;
	uint64_t value;
	const char *help;
};

static void print_gauges(FILE *f, const struct gauge *rows, size_t nr)
{
	for (size_t i = 0; i < nr; i++) {
		metric_family(f, rows[i].name, METRIC_GAUGE, rows[i].help);
		metric_u64(f, rows[i].name, "", rows[i].value);
	}
}

static void print_store(FILE *f, struct daemon *d)
{
	struct statvfs fs = {0};
	struct store_stats s;

	if (store_get_stats(d->store, &s, NULL) || statvfs(d->config.store_dir, &fs))
		return;
	const struct gauge rows[] = {
		{"snapd_store_vms", s.vms, "VMs that the store knows."},
		{"snapd_store_timelines", s.timelines, "Lines of epochs."},
		{"snapd_store_epochs", s.epochs, "Epochs, with and without a snapshot."},
		{"snapd_store_snapshots", s.snapshots, "Snapshots."},
		{"snapd_store_segments", s.segments, "Segment files, free ones included."},
		{"snapd_store_free_segments", s.segments_free,
		 "Segment files that wait to be used."},
		{"snapd_store_pages", s.pages_stored, "Pages in segments."},
		{"snapd_store_disk_bytes", s.bytes_on_disk, "What the store takes on disk."},
		{"snapd_store_used_bytes", s.bytes_used, "Of that, written parts of segments."},
		{"snapd_store_index_bytes", s.bytes_index, "Of that, the index."},
		{"snapd_store_logical_bytes", s.bytes_logical,
		 "Memory of all snapshots if each were stored by itself, without zero pages."},
		{"snapd_store_limit_bytes", d->config.store_max_bytes,
		 "Limit set by store_max; 0: none."},
		{"snapd_store_soft_limit_bytes", d->config.store_soft_bytes,
		 "Limit set by store_soft_max; 0: none."},
		{"snapd_store_over_soft_limit", room_is_short(d),
		 "1: more than that is in use, and policies leave out every second point."},
		{"snapd_store_filesystem_free_bytes", (uint64_t)fs.f_bavail * fs.f_frsize,
		 "What is free on the store's file system."},
		{"snapd_store_filesystem_size_bytes", (uint64_t)fs.f_blocks * fs.f_frsize,
		 "Size of the store's file system."},
		{"snapd_store_dedup_entries", s.dedup_entries, "Pages in the table of duplicates."},
		{"snapd_store_dedup_memory_bytes", s.dedup_bytes, "Memory of that table."},
	};

	print_gauges(f, rows, ARRAY_SIZE(rows));
}

static void print_scrub(FILE *f, struct daemon *d)
{
	struct scrub_figures s;

	scrub_figures(d->scrub, &s);
	const struct gauge rows[] = {
		{"snapd_scrub_running", s.running, "1: a scrub reads the store."},
		{"snapd_scrub_paused", s.paused, "1: scrubs are paused."},
		{"snapd_scrub_period_seconds", s.period_s,
		 "How often all is to be read, scrub_period; 0: only when asked for."},
		{"snapd_scrub_damages", s.damages,
		 "Damages that the newest scrub found, or the one under way if those are more."},
		{"snapd_scrub_last_end_timestamp_seconds", s.ended_s,
		 "When a scrub last came to its end; 0: never."},
	};

	print_gauges(f, rows, ARRAY_SIZE(rows));
	metric_family(f, "snapd_scrub_read_bytes_total", METRIC_COUNTER,
		      "Bytes that scrubs read and checked.");
	metric_u64(f, "snapd_scrub_read_bytes_total", "", s.bytes_read);
	metric_family(f, "snapd_scrub_passes_total", METRIC_COUNTER,
		      "Scrubs that came to their end.");
	metric_u64(f, "snapd_scrub_passes_total", "", s.passes);
}

/* ---- policies ---- */

static const struct {
	const char *name, *key;
	enum metric_type type;
	const char *help;
} line_metrics[] = {
	{"snapd_policy_runs_total", "runs", METRIC_COUNTER, "Runs of a policy on a VM."},
	{"snapd_policy_failures_total", "failures", METRIC_COUNTER,
	 "Runs in which anything went wrong."},
	{"snapd_policy_skipped_total", "skipped", METRIC_COUNTER, "Points that were left out."},
	{"snapd_policy_pruned_snapshots_total", "pruned", METRIC_COUNTER,
	 "Snapshots that the policy deleted."},
	{"snapd_policy_backoff", "backoff", METRIC_GAUGE,
	 "n: 2^n - 1 points are left out after each run, since pauses were over the bounds."},
	{"snapd_policy_last_run_timestamp_seconds", "last_s", METRIC_GAUGE,
	 "When the last run began; 0: never since the service started."},
};

static void print_lines(FILE *f, json_t *policies, size_t m)
{
	char labels[LABELS_MAX], uid[16];
	json_t *policy, *line;
	size_t i, k;

	metric_family(f, line_metrics[m].name, line_metrics[m].type, line_metrics[m].help);
	json_array_foreach(policies, i, policy)
	{
		json_array_foreach(json_object_get(policy, "lines"), k, line)
		{
			snprintf(uid, sizeof(uid), "%lld",
				 json_integer_value(json_object_get(line, "uid")));
			metric_labels(labels, "policy",
				      json_string_value(json_object_get(policy, "name")), "vm",
				      json_string_value(json_object_get(line, "vm")), "uid", uid,
				      NULL);
			metric_u64(f, line_metrics[m].name, labels,
				   (uint64_t)json_integer_value(
					   json_object_get(line, line_metrics[m].key)));
		}
	}
}

static void print_policies(FILE *f, json_t *policies)
{
	char labels[LABELS_MAX];
	json_t *policy;
	size_t i;

	metric_family(f, "snapd_policy_paused", METRIC_GAUGE, "1 when the policy is paused.");
	json_array_foreach(policies, i, policy)
		metric_u64(f, "snapd_policy_paused",
			   metric_labels(labels, "policy",
					 json_string_value(json_object_get(policy, "name")), NULL),
			   json_is_true(json_object_get(policy, "paused")));
	for (size_t m = 0; m < ARRAY_SIZE(line_metrics); m++)
		print_lines(f, policies, m);
}

/* ---- backups ---- */

static const struct {
	const char *name;
	size_t at; /* of an _Atomic uint64_t in struct backups */
	const char *help;
} backup_counters[] = {
#define AT(f) offsetof(struct backups, f)
	{"snapd_backup_sent_bytes_total", AT(bytes_sent),
	 "Bytes sent to repositories, by jobs that ended; headers included."},
	{"snapd_backup_received_bytes_total", AT(bytes_received),
	 "Bytes received from repositories, by jobs that ended; headers included."},
	{"snapd_backup_requests_total", AT(requests), "Requests, tries that failed included."},
	{"snapd_backup_retries_total", AT(retries), "Of those, repeated ones."},
	{"snapd_backup_pages_sent_total", AT(pages_sent),
	 "Pages that pushes sent since the repository did not have them."},
	{"snapd_backup_pages_known_total", AT(pages_known),
	 "Pages that pushes did not send since the repository had them."},
	{"snapd_backup_packs_sent_total", AT(packs_sent), "Objects full of pages that were sent."},
#undef AT
};

static void print_operations(FILE *f, struct backups *b)
{
	char labels[LABELS_MAX];

	metric_family(f, "snapd_backup_operations_total", METRIC_COUNTER,
		      "Pushes, pulls, verifications and prunes that ended and were not cancelled.");
	for (int i = 0; i < BACKUP_NR_OPS; i++) {
		metric_labels(labels, "operation", backup_op_names[i], "result", "done", NULL);
		metric_u64(f, "snapd_backup_operations_total", labels, atomic_load(&b->done[i]));
		metric_labels(labels, "operation", backup_op_names[i], "result", "failed", NULL);
		metric_u64(f, "snapd_backup_operations_total", labels, atomic_load(&b->failed[i]));
	}
	metric_family(f, "snapd_backup_request_failures_total", METRIC_COUNTER,
		      "Tries of requests that failed, and why.");
	for (int i = 0; i < NR_OBJSTORE_FAILURES; i++)
		metric_u64(f, "snapd_backup_request_failures_total",
			   metric_labels(labels, "reason", objstore_failure_names[i], NULL),
			   atomic_load(&b->failures[i]));
}

/* Of `view`'s VMs, or all; `at` a uint64_t in struct backup_last. */
static void print_last_pushes(FILE *f, const struct backups *b, uid_t view, const char *name,
			      size_t at, const char *help)
{
	char labels[LABELS_MAX], uid[16];

	metric_family(f, name, METRIC_GAUGE, help);
	for (const struct backup_last *l = b->last; l; l = l->next) {
		if (view && l->uid != view)
			continue;
		snprintf(uid, sizeof(uid), "%u", l->uid);
		metric_u64(f, name, metric_labels(labels, "vm", l->vm, "uid", uid, NULL),
			   *(const uint64_t *)((const char *)l + at));
	}
}

/* Repositories are the administrator's. */
static void print_found(FILE *f, const struct backups *b, uid_t view)
{
	char labels[LABELS_MAX];

	metric_family(f, "snapd_backup_damaged_objects", METRIC_GAUGE,
		      "Objects of the repository that its last verification found damaged.");
	for (const struct backup_found *x = b->found; x && !view; x = x->next)
		metric_u64(f, "snapd_backup_damaged_objects",
			   metric_labels(labels, "repository", x->url, NULL), x->damages);
	metric_family(f, "snapd_backup_verified_timestamp_seconds", METRIC_GAUGE,
		      "When the repository was last verified, since the service started.");
	for (const struct backup_found *x = b->found; x && !view; x = x->next)
		metric_u64(f, "snapd_backup_verified_timestamp_seconds",
			   metric_labels(labels, "repository", x->url, NULL), x->verified_s);
}

static void print_backups(FILE *f, struct backups *b, uid_t view)
{
	print_operations(f, b);
	for (size_t i = 0; i < ARRAY_SIZE(backup_counters); i++) {
		_Atomic uint64_t *value = (_Atomic uint64_t *)((char *)b + backup_counters[i].at);

		metric_family(f, backup_counters[i].name, METRIC_COUNTER, backup_counters[i].help);
		metric_u64(f, backup_counters[i].name, "", atomic_load(value));
	}
	pthread_mutex_lock(&b->lock);
	print_last_pushes(f, b, view, "snapd_backup_last_push_timestamp_seconds",
			  offsetof(struct backup_last, pushed_s),
			  "When a snapshot of the VM was last pushed, since the service started.");
	print_last_pushes(f, b, view, "snapd_backup_last_point_timestamp_seconds",
			  offsetof(struct backup_last, taken_s),
			  "When the newest snapshot pushed since then was taken.");
	print_found(f, b, view);
	pthread_mutex_unlock(&b->lock);
}

/* ---- jobs, the process ---- */

static void print_job_states(FILE *f, struct daemon *d, const char *name, int from, int to)
{
	char labels[LABELS_MAX];

	for (int k = 0; k < JOB_NR_KINDS; k++)
		for (int s = from; s <= to; s++)
			metric_u64(f, name,
				   metric_labels(labels, "kind", job_kind_names[k], "state",
						 job_state_names[s], NULL),
				   job_count(d, k, s));
}

static void print_jobs(FILE *f, struct daemon *d)
{
	metric_family(f, "snapd_jobs", METRIC_GAUGE, "Jobs that wait or run.");
	print_job_states(f, d, "snapd_jobs", JOB_QUEUED, JOB_RUNNING);
	metric_family(f, "snapd_jobs_ended_total", METRIC_COUNTER, "Jobs that ended, and how.");
	print_job_states(f, d, "snapd_jobs_ended_total", JOB_DONE, JOB_NR_STATES - 1);
}

static void print_process(FILE *f)
{
	unsigned long long pages = 0;
	FILE *statm = fopen("/proc/self/statm", "re");
	struct rusage use;
	char labels[LABELS_MAX];

	metric_family(f, "snapd_build_info", METRIC_GAUGE, "1; the version is a label.");
	metric_u64(f, "snapd_build_info", metric_labels(labels, "version", SNAPD_VERSION, NULL), 1);
	getrusage(RUSAGE_SELF, &use);
	metric_family(f, "snapd_process_cpu_seconds_total", METRIC_COUNTER,
		      "CPU time of the service, user and system.");
	metric_double(f, "snapd_process_cpu_seconds_total", "",
		      (double)(use.ru_utime.tv_sec + use.ru_stime.tv_sec) +
			      (double)(use.ru_utime.tv_usec + use.ru_stime.tv_usec) / 1e6);
	if (!statm)
		return;
	if (fscanf(statm, "%*u %llu", &pages) == 1) {
		metric_family(f, "snapd_process_resident_memory_bytes", METRIC_GAUGE,
			      "Resident memory of the service, VMs' mapped memory included.");
		metric_u64(f, "snapd_process_resident_memory_bytes", "",
			   pages * (uint64_t)sysconf(_SC_PAGESIZE));
	}
	fclose(statm);
}

int api_get_metrics(struct api_request *req)
{
	json_t *policies = policies_json(req->daemon, req->view);
	char *text = NULL;
	size_t len;
	FILE *f = open_memstream(&text, &len);
	int rc = f && policies ? 0 : -ENOMEM;

	if (!rc)
		rc = print_vms(f, req);
	if (!rc) {
		print_store(f, req->daemon);
		print_scrub(f, req->daemon);
		print_policies(f, policies);
		print_backups(f, req->daemon->backups, req->view);
		print_jobs(f, req->daemon);
		print_process(f);
	}
	json_decref(policies);
	if (f && fclose(f) && !rc)
		rc = -ENOMEM;
	if (rc) {
		free(text);
		return rc;
	}
	return api_reply_text(req, "text/plain; version=0.0.4; charset=utf-8", text);
}
