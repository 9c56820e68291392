/* SPDX-License-Identifier: MIT */
/*
 * A snapshot of a running VM: the steps of docs/architecture.md "An epoch", in
 * order, as a job on the VM's thread.
 *
 *   epoch_begin ► early capture ► PAUSE ► copy the rest ► RESUME ► identify, store
 *   ► commit ► base := new point ► inflight := ∅
 *
 * On any failure: the VM is resumed (or it is the connection that is gone), what
 * was inflight is dirty again, the epoch is dropped.  A crash after the commit
 * finds base one epoch behind, which vm/attach.c knows how to read.
 */
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "snapd/api/json.h"
#include "snapd/vm/capture.h"
#include "snapd/daemon/name.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/vm/priv.h"

struct snapshot {
	struct vm *vm;
	struct job *job;
	uint64_t timeline;
	struct epoch *ep; /* owned until committed or aborted */
	bool capturing;
	void *state; /* owned */
	size_t state_len;
	struct snapshot_meta meta;
	struct vm_pause pause;
	struct capture_stats captured;
	struct epoch_stats stored;
	struct snapd_point point;
	uint64_t id;
};

static int check_args(struct vm *vm, struct snapshot_meta *meta, json_t *args, struct err *e)
{
	char selector[2 * SNAPD_NAME_MAX];
	struct store_snapshot found;
	json_error_t why;

	if (json_unpack_ex(args, &why, 0, "{s?s,s?s,s?s}", "name", &meta->name, "note", &meta->note,
			   "tags", &meta->tags))
		return err_set(e, EINVAL, "snapshot: %s", why.text);
	if (meta->name && !*meta->name)
		meta->name = NULL;
	if (meta->name && name_check("snapshot name", meta->name, e))
		return -EINVAL;
	if (!meta->name)
		return 0;
	/* The commit decides; this only saves the work when it is plain already. */
	snprintf(selector, sizeof(selector), "%s@%s", vm->name, meta->name);
	if (!store_snapshot_find(vm->d->store, selector, vm->uid, &found, NULL) &&
	    !memcmp(found.vm, vm->id, sizeof(vm->id)))
		return err_set(e, EEXIST, "%s has a snapshot named '%s' already", vm->name,
			       meta->name);
	return 0;
}

static int begin(struct snapshot *s, struct err *e)
{
	struct vm *vm = s->vm;
	int err = vm->capture ? 0 : capture_create(vm, &vm->capture, e);

	s->timeline = vm->point.timeline;
	if (!err && !s->timeline)
		err = store_timeline_create(vm->d->store, vm->id, (struct snapd_point){},
					    &s->timeline, e);
	if (!err)
		err = epoch_begin(vm->d->store, vm->id, s->timeline, vm->mem.page_size, vm->live,
				  &s->ep, e);
	if (err)
		return err;
	vm_keep_timeline(vm, s->timeline);
	capture_begin(vm->capture, s->ep);
	s->capturing = true;
	return 0;
}

/*
 * From PAUSE to RESUME.  Nothing here may wait for anything but the agent.  The
 * agent resumes by itself when the connection ends.
 */
static int pause_and_copy(struct snapshot *s, int *state_fd, uint64_t *state_len, struct err *e)
{
	struct vm *vm = s->vm;
	struct err resume_err = {};
	uint64_t paused_at;
	int err = vm_pause(vm, state_fd, state_len, &s->pause, e), resume;

	if (err)
		return err;
	paused_at = now_ns(CLOCK_MONOTONIC);
	s->meta.taken_ns = now_ns(CLOCK_REALTIME);
	err = capture_paused(vm->capture, e);
	s->pause.service_ns = now_ns(CLOCK_MONOTONIC) - paused_at;
	resume = vm_resume(vm, &s->pause, err ? &resume_err : e);
	s->meta.pause_ns = s->pause.total_ns;
	if (err == -EFAULT && vm->sock >= 0)
		vm_say_error(vm, SNAPD_MSG_ERROR, e);
	return err ? err : resume;
}

static int commit(struct snapshot *s, struct err *e)
{
	struct vm *vm = s->vm;
	size_t told = capture_gone_told(vm->capture);
	int err = epoch_commit(s->ep, s->state, s->state_len, &s->meta, &s->point, &s->id,
			       &s->stored, e);

	if (err)
		return err;
	s->ep = NULL;
	vm->nr_gone -= told;
	if (told)
		memmove(vm->gone, vm->gone + told, vm->nr_gone * sizeof(*vm->gone));
	/* It is durable: a shared page that is gone now is the VM's loss, not its. */
	if (vm_set_point(vm, s->point, vm->live, NULL) ||
	    vm_shm_clear(&vm->shm, &vm->shm.inflight, vm->mem.frames_end))
		vm_disconnect(vm);
	return 0;
}

static int run(struct snapshot *s, struct err *e)
{
	_cleanup_fd_ int state_fd = -1;
	uint64_t state_len = 0;
	int err = begin(s, e);

	s->job->phase = "early capture";
	if (!err)
		err = capture_early(s->vm->capture, s->job, e);
	if (!err)
		err = vm_interrupted(s->vm, s->job, e);
	s->job->phase = "paused";
	if (!err)
		err = pause_and_copy(s, &state_fd, &state_len, e);
	s->job->phase = "storing";
	if (!err)
		err = vm_read_state(state_fd, state_len, &s->state, e);
	if (!err)
		err = capture_drain(s->vm->capture, s->job, e);
	if (!err)
		err = vm_interrupted(s->vm, s->job, e);
	s->job->phase = "committing";
	s->state_len = state_len;
	return err ? err : commit(s, e);
}

static void finish(struct snapshot *s, int err)
{
	struct vm *vm = s->vm;

	if (s->capturing)
		capture_end(vm->capture, &s->captured);
	s->pause.copy_ns = s->captured.copy_ns;
	s->pause.pages = s->captured.paused_pages;
	epoch_abort(s->ep);
	free(s->state);
	if (err && vm->shm.map && vm_shm_merge(&vm->shm, vm->mem.frames_end, false))
		vm_disconnect(vm);
	vm_keep_timeline(vm, 0);
	pthread_mutex_lock(&vm->lock);
	vm->pub.snapshots += !err;
	vm->pub.failures += !!err;
	if (s->pause.total_ns)
		vm->pub.pause = s->pause;
	if (!err)
		vm->pub.head_snapshot = s->id;
	pthread_mutex_unlock(&vm->lock);
}

/* It may be deleted already: then what is left to say is which it was. */
static json_t *made_json(const struct snapshot *s)
{
	struct store_snapshot snap;

	if (store_snapshot_get(s->vm->d->store, s->id, &snap, NULL))
		return json_pack("{s:I,s:s}", "id", (json_int_t)s->id, "vm", s->vm->name);
	return snapshot_json(&snap);
}

static json_t *result(const struct snapshot *s)
{
	return json_pack(
		"{s:o,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:i,s:I,s:I,s:I,s:I,s:I,s:I,s:I}", "snapshot",
		made_json(s), "pages", (json_int_t)s->stored.pages_in, "zero",
		(json_int_t)s->stored.zero, "stored", (json_int_t)s->stored.stored, "early_pages",
		(json_int_t)s->captured.early_pages, "hot_pages", (json_int_t)s->captured.hot_pages,
		"paused_pages", (json_int_t)s->captured.paused_pages, "early_ns",
		(json_int_t)s->captured.early_ns, "rounds", (int)s->captured.rounds, "pause_ns",
		(json_int_t)s->pause.total_ns, "stop_ns", (json_int_t)s->pause.stop_ns, "state_ns",
		(json_int_t)s->pause.state_ns, "harvest_ns", (json_int_t)s->pause.harvest_ns,
		"copy_ns", (json_int_t)s->captured.copy_ns, "service_ns",
		(json_int_t)s->pause.service_ns, "drain_ns", (json_int_t)s->captured.drain_ns);
}

int snapshot_job(struct job *job, struct err *e)
{
	struct snapshot s = {.vm = vm_of_job(job), .job = job};
	int err = check_args(s.vm, &s.meta, job->args, e);

	if (!err && s.vm->broken)
		err = err_set(e, EBUSY,
			      "the last rollback of %s failed half way: roll it back "
			      "again, to any snapshot",
			      s.vm->name);
	if (err)
		return err;
	job->unit = "pages";
	err = run(&s, e);
	finish(&s, err);
	if (err) {
		log_warn("%s: snapshot failed: %s", s.vm->name, e->text);
		return err;
	}
	job->result = result(&s);
	log_info("%s: snapshot %llu: %llu pages, %llu stored, paused %llu us", s.vm->name,
		 (unsigned long long)s.id, (unsigned long long)s.stored.pages_in,
		 (unsigned long long)s.stored.stored, (unsigned long long)s.pause.total_ns / 1000);
	return 0;
}
