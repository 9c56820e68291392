/* SPDX-License-Identifier: MIT */
/* Samples for snapctl top: see top_sample.h. */
#include "tools/top_sample.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/util/cleanup.h"
#include "tools/client.h"
#include "tools/out.h"
#include "tools/snapctl.h"

static uint64_t now_ns(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

#define COPY(dst, text) snprintf(dst, sizeof(dst), "%s", text)

/* ---- what was answered ---- */

static void read_vm(struct top_vm *v, json_t *o)
{
	json_t *counters = json_object_get(o, "counters"), *epochs = json_object_get(o, "epochs");
	uint64_t page_size = get_u64(o, "page_size");

	COPY(v->name, get_text(o, "name"));
	COPY(v->state,
	     json_is_true(json_object_get(o, "broken")) ? "broken" : get_text(o, "state"));
	COPY(v->job, get_text(o, "job"));
	v->uid = get_u64(o, "uid");
	v->attached_ns = get_u64(o, "attached_ns");
	v->ram_bytes = get_u64(o, "ram_bytes");
	v->behind_bytes = get_u64(o, "dirty_frames") * page_size;
	v->pause_ns = get_u64(json_object_get(o, "last_pause"), "total_ns");
	v->dirtied_bytes = get_u64(counters, "published") * page_size;
	v->ring_full = get_u64(counters, "ring_full");
	v->paused_ns = get_u64(epochs, "paused_ns");
	v->epochs = get_u64(epochs, "durable");
	v->taken_ns = get_u64(epochs, "taken_ns");
	v->dirty_rate = v->still_share = v->epoch_rate = v->ring_full_rate = v->age_s = -1;
}

static int read_vms(struct top_sample *s, json_t *list)
{
	json_t *o;
	size_t i;

	s->vms = calloc(json_array_size(list) + 1, sizeof(*s->vms));
	if (!s->vms)
		return fail(EXIT_FAILED, "out of memory");
	json_array_foreach(list, i, o) read_vm(&s->vms[s->nr_vms++], o);
	return 0;
}

static void read_job(struct top_job *j, json_t *o)
{
	json_t *progress = json_object_get(o, "progress");

	j->id = get_u64(o, "id");
	COPY(j->kind, get_text(o, "kind"));
	COPY(j->phase,
	     !strcmp(get_text(o, "state"), "queued") ? "waits" : get_text(progress, "phase"));
	COPY(j->vm, get_text(json_object_get(o, "args"), "vm"));
	j->done = get_u64(progress, "done");
	j->total = get_u64(progress, "total");
	j->bytes = !strcmp(get_text(progress, "unit"), "bytes");
}

static int read_jobs(struct top_sample *s, json_t *list)
{
	json_t *o;
	size_t i;

	s->jobs = calloc(json_array_size(list) + 1, sizeof(*s->jobs));
	if (!s->jobs)
		return fail(EXIT_FAILED, "out of memory");
	json_array_foreach(list, i, o)
	{
		const char *state = get_text(o, "state");

		if (!strcmp(state, "running") || !strcmp(state, "queued"))
			read_job(&s->jobs[s->nr_jobs++], o);
	}
	return 0;
}

static void read_store(struct top_store *st, json_t *o)
{
	*st = (struct top_store){
		.disk_bytes = get_u64(o, "bytes_on_disk"),
		.limit_bytes = get_u64(o, "bytes_limit"),
		.used_bytes = get_u64(o, "bytes_used"),
		.logical_bytes = get_u64(o, "bytes_logical"),
		.snapshots = get_u64(o, "snapshots"),
	};
}

int top_sample_take(const struct args *a, struct top_sample *ret)
{
	_cleanup_(cleanup_json) json_t *vms = NULL, *store = NULL, *jobs = NULL;
	int rc;

	*ret = (struct top_sample){0};
	rc = call(a, "GET", NULL, &vms, "/v1/vms", NULL, NULL);
	ret->monotonic_ns = now_ns(CLOCK_MONOTONIC);
	ret->realtime_ns = now_ns(CLOCK_REALTIME);
	if (!rc)
		rc = call(a, "GET", NULL, &store, "/v1/store/stats", NULL, NULL);
	if (!rc)
		rc = call(a, "GET", NULL, &jobs, "/v1/jobs", NULL, NULL);
	if (!rc)
		rc = read_vms(ret, json_object_get(vms, "vms"));
	if (!rc)
		rc = read_jobs(ret, json_object_get(jobs, "jobs"));
	if (rc)
		return rc;
	read_store(&ret->store, store);
	for (size_t i = 0; i < ret->nr_vms; i++)
		if (ret->vms[i].taken_ns)
			ret->vms[i].age_s = (double)(ret->realtime_ns -
						     MIN(ret->realtime_ns, ret->vms[i].taken_ns)) /
					    1e9;
	return 0;
}

void top_sample_deinit(struct top_sample *s)
{
	free(s->vms);
	free(s->jobs);
	*s = (struct top_sample){0};
}

/* ---- two moments ---- */

static const struct top_vm *find_vm(const struct top_sample *s, const struct top_vm *like)
{
	for (size_t i = 0; i < s->nr_vms; i++)
		if (s->vms[i].uid == like->uid && s->vms[i].attached_ns == like->attached_ns &&
		    !strcmp(s->vms[i].name, like->name))
			return &s->vms[i];
	return NULL;
}

/* A counter that went back began anew. */
static double rate(uint64_t now, uint64_t before, double seconds)
{
	return (double)(now >= before ? now - before : now) / seconds;
}

void top_sample_compare(struct top_sample *now, const struct top_sample *before)
{
	double seconds = (double)(now->monotonic_ns - before->monotonic_ns) / 1e9;

	if (!before->monotonic_ns || seconds <= 0)
		return;
	for (size_t i = 0; i < now->nr_vms; i++) {
		struct top_vm *v = &now->vms[i];
		const struct top_vm *b = find_vm(before, v);

		if (!b)
			continue;
		v->dirty_rate = rate(v->dirtied_bytes, b->dirtied_bytes, seconds);
		v->still_share = MIN(1.0, rate(v->paused_ns, b->paused_ns, seconds) / 1e9);
		v->epoch_rate = rate(v->epochs, b->epochs, seconds);
		v->ring_full_rate = rate(v->ring_full, b->ring_full, seconds);
	}
	now->store.growth =
		((double)now->store.used_bytes - (double)before->store.used_bytes) / seconds;
}

/* ---- order ---- */

const struct top_key top_keys[] = {
	{'n', "name"},	{'s', "state"}, {'d', "dirty"},	 {'b', "behind"}, {'a', "age"},
	{'p', "pause"}, {'t', "still"}, {'e', "epochs"}, {'f', "full"},	  {0, NULL},
};

int top_key_find(const char *name)
{
	for (int i = 0; top_keys[i].name; i++)
		if (!strcmp(top_keys[i].name, name))
			return i;
	return -1;
}

static int by_number(double a, double b)
{
	return a < b ? 1 : a > b ? -1 : 0; /* the largest first */
}

static int compare_by(const struct top_vm *a, const struct top_vm *b, char letter)
{
	switch (letter) {
	case 's':
		return strcmp(a->state, b->state);
	case 'd':
		return by_number(a->dirty_rate, b->dirty_rate);
	case 'b':
		return by_number((double)a->behind_bytes, (double)b->behind_bytes);
	case 'a':
		return by_number(a->age_s, b->age_s);
	case 'p':
		return by_number((double)a->pause_ns, (double)b->pause_ns);
	case 't':
		return by_number(a->still_share, b->still_share);
	case 'e':
		return by_number(a->epoch_rate, b->epoch_rate);
	case 'f':
		return by_number(a->ring_full_rate, b->ring_full_rate);
	default:
		return 0;
	}
}

struct order {
	char letter;
	bool reverse;
};

static int compare_vms(const void *x, const void *y, void *arg)
{
	const struct order *o = arg;
	const struct top_vm *a = x, *b = y;
	int r = compare_by(a, b, o->letter);

	if (!r)
		r = strcmp(a->name, b->name);
	if (!r)
		r = a->uid < b->uid ? -1 : a->uid > b->uid;
	return o->reverse ? -r : r;
}

void top_sample_sort(struct top_sample *s, int key, bool reverse)
{
	struct order o = {top_keys[key].letter, reverse};

	if (s->nr_vms)
		qsort_r(s->vms, s->nr_vms, sizeof(*s->vms), compare_vms, &o);
}

/* ---- for scripts ---- */

static json_t *number_or_null(double v)
{
	return v < 0 ? json_null() : json_real(v);
}

static json_t *vm_json(const struct top_vm *v)
{
	return json_pack("{ss sI ss ss* sI so sI so sI so so so}", "name", v->name, "uid",
			 (json_int_t)v->uid, "state", v->state, "job", *v->job ? v->job : NULL,
			 "ram_bytes", (json_int_t)v->ram_bytes, "dirty_bytes_per_second",
			 number_or_null(v->dirty_rate), "behind_bytes", (json_int_t)v->behind_bytes,
			 "age_seconds", number_or_null(v->age_s), "pause_ns",
			 (json_int_t)v->pause_ns, "still_share", number_or_null(v->still_share),
			 "epochs_per_second", number_or_null(v->epoch_rate), "ring_full_per_second",
			 number_or_null(v->ring_full_rate));
}

json_t *top_sample_json(const struct top_sample *s)
{
	json_t *vms = json_array(), *jobs = json_array();

	for (size_t i = 0; i < s->nr_vms; i++)
		json_array_append_new(vms, vm_json(&s->vms[i]));
	for (size_t i = 0; i < s->nr_jobs; i++)
		json_array_append_new(
			jobs, json_pack("{sI ss ss ss sI sI}", "id", (json_int_t)s->jobs[i].id,
					"kind", s->jobs[i].kind, "vm", s->jobs[i].vm, "phase",
					s->jobs[i].phase, "done", (json_int_t)s->jobs[i].done,
					"total", (json_int_t)s->jobs[i].total));
	return json_pack("{sI so so s{sI sI sI sI sI sf}}", "realtime_ns",
			 (json_int_t)s->realtime_ns, "vms", vms, "jobs", jobs, "store",
			 "disk_bytes", (json_int_t)s->store.disk_bytes, "limit_bytes",
			 (json_int_t)s->store.limit_bytes, "used_bytes",
			 (json_int_t)s->store.used_bytes, "logical_bytes",
			 (json_int_t)s->store.logical_bytes, "snapshots",
			 (json_int_t)s->store.snapshots, "used_bytes_per_second", s->store.growth);
}
