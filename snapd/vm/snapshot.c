/* SPDX-License-Identifier: MIT */
/*
 * A snapshot of a running VM: the steps of docs/architecture.md "An epoch", in
 * order, as a job on the VM's thread; and a self-check, which is the same with all
 * memory compared in the pause, and no name for the epoch at the end.
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

#include "include/snapd/agent.h"
#include "snapd/core/json.h"
#include "snapd/vm/capture.h"
#include "snapd/core/name.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/vm/priv.h"
#include "snapd/vm/selfcheck.h"

struct snapshot {
	struct vm *vm;
	struct job *job;
	uint64_t timeline;
	struct epoch *ep; /* owned until committed or aborted */
	bool capturing;
	bool unnamed;		 /* only the timeline's new head */
	struct selfcheck *check; /* owned; NULL: none */
	void *state;		 /* owned */
	size_t state_len;
	const char *compression; /* of the job's; NULL: the store's */
	struct snapshot_meta meta;
	struct vm_pause pause;
	struct capture_stats captured;
	struct epoch_stats stored;
	uint64_t lost_ns,
		lost_of_ns; /* what the guest lost since the epoch before, of which time */
	struct snapd_point point;
	uint64_t id;
	uint64_t runs_again_ns; /* CLOCK_MONOTONIC */
};

static int check_args(struct vm *vm, struct snapshot_meta *meta, int *self_check,
		      const char **compression, json_t *args, struct err *e)
{
	char selector[2 * SNAPD_NAME_MAX];
	struct store_snapshot found;
	json_error_t why;
	int pinned = 0;

	if (json_unpack_ex(args, &why, 0, "{s?s,s?s,s?s,s?b,s?b,s?s}", "name", &meta->name, "note",
			   &meta->note, "tags", &meta->tags, "self_check", self_check, "pinned",
			   &pinned, "compression", compression))
		return err_set(e, EINVAL, "snapshot: %s", why.text);
	meta->pinned = pinned;
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

	s->job->phase = "reading the store";
	if (!err && s->check)
		err = selfcheck_prepare(s->check, s->job, e);
	s->timeline = vm->point.timeline;
	if (!err && !s->timeline)
		err = store_timeline_create(vm->d->store, vm->id, (struct snapd_point){},
					    &s->timeline, e);
	if (!err)
		err = epoch_begin(vm->d->store, vm->id, s->timeline, vm->mem.page_size, vm->live,
				  &s->ep, e);
	if (!err && s->compression)
		err = epoch_compress(s->ep, s->compression, e);
	if (err)
		return err;
	vm_keep_timeline(vm, s->timeline);
	capture_begin(vm->capture, s->ep, s->check);
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
	s->runs_again_ns = now_ns(CLOCK_MONOTONIC);
	s->meta.pause_ns = s->pause.total_ns;
	if (err == -EFAULT && vm->sock >= 0)
		vm_say_error(vm, SNAPD_MSG_ERROR, e);
	return err ? err : resume;
}

static int commit(struct snapshot *s, struct err *e)
{
	struct vm *vm = s->vm;
	size_t told = capture_gone_told(vm->capture);
	int err = epoch_commit(s->ep, s->state, s->state_len, s->unnamed ? NULL : &s->meta,
			       &s->point, &s->id, &s->stored, e);

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
	if (s->check && selfcheck_complete(s->check))
		vm->sound_at = s->point.epoch;
	return 0;
}

static int run(struct snapshot *s, struct err *e)
{
	_cleanup_fd_ int state_fd = -1;
	uint64_t state_len = 0;
	int err = begin(s, e);

	s->job->phase = "early capture";
	/* Found by scans that may not protect before the pause: all would come again in it. */
	if (!err && s->vm->hello.dirty_backend != SNAPD_DIRTY_PAGEMAP)
		err = capture_early(s->vm->capture, s->job, e);
	if (!err)
		err = vm_interrupted(s->vm, s->job, e);
	s->job->phase = "paused";
	if (!err)
		err = pause_and_copy(s, &state_fd, &state_len, e);
	s->job->phase = "storing";
	if (!err)
		err = vm_read_state(state_fd, state_len, &s->state, e);
	if (!err && s->check)
		selfcheck_locate(s->check, s->state, state_len, s->vm->point.epoch + 1);
	if (!err)
		err = capture_drain(s->vm->capture, s->job, e);
	if (!err)
		err = vm_interrupted(s->vm, s->job, e);
	s->job->phase = "committing";
	s->state_len = state_len;
	return err ? err : commit(s, e);
}

/* Under vm.lock. */
static void count_epoch(const struct snapshot *s, struct vm_epochs *ep, bool durable)
{
	if (s->pause.total_ns)
		histogram_add(&ep->pause_ns, pause_bounds_ns, s->pause.total_ns);
	if (!durable)
		return;
	histogram_add(&ep->commit_ns, commit_bounds_ns, now_ns(CLOCK_MONOTONIC) - s->runs_again_ns);
	histogram_add(&ep->epoch_bytes, epoch_bounds_bytes,
		      (s->stored.pages_in - s->stored.unchanged) * s->vm->mem.page_size);
	ep->nr++;
	ep->pages_stored += s->stored.stored;
	ep->bytes_written += s->stored.bytes_written;
	ep->taken_ns = s->meta.taken_ns;
}

/* Under vm.lock: since the epoch before; nothing for the first one. */
static void count_loss(struct snapshot *s)
{
	struct vm *vm = s->vm;
	struct vm_shm_stats agent = {0};
	struct vm_loss now = {.at_ns = now_ns(CLOCK_MONOTONIC),
			      .paused_ns = vm->pub.epochs.pause_ns.sum};

	if (!vm->shm.map || vm_shm_stats(&vm->shm, vm->mem.frames_end, &agent))
		return;
	now.published = agent.published;
	now.ring_full = agent.ring_full;
	now.harvest_ns = agent.harvest_ns;
	now.harvests = agent.harvests;
	if (vm->loss.at_ns) {
		s->lost_of_ns = now.at_ns - vm->loss.at_ns;
		s->lost_ns = vm_loss_ns(&vm->loss, &now, vm->hello.nr_vcpus,
					vm->d->config.write_fault_ns);
		vm->pub.lost_ns += s->lost_ns;
	}
	vm->loss = now;
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
	if (err && s->timeline && s->timeline != vm->point.timeline)
		store_timeline_drop(vm->d->store, s->timeline, NULL);
	if (err && vm->shm.map && vm_shm_merge(&vm->shm, vm->mem.frames_end, false))
		vm_disconnect(vm);
	vm_keep_timeline(vm, 0);
	pthread_mutex_lock(&vm->lock);
	vm->pub.snapshots += !err && !s->unnamed;
	vm->pub.failures += !!err;
	count_epoch(s, &vm->pub.epochs, !err);
	count_loss(s);
	if (s->check) {
		vm->pub.self_checks += !err;
		vm->pub.missed_pages += selfcheck_missed(s->check);
	}
	if (s->pause.total_ns)
		vm->pub.pause = s->pause;
	if (!err && !s->unnamed)
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
		"{s:o,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:i,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:{s:I,s:I}}",
		"snapshot", made_json(s), "pages", (json_int_t)s->stored.pages_in, "zero",
		(json_int_t)s->stored.zero, "unchanged", (json_int_t)s->stored.unchanged, "stored",
		(json_int_t)s->stored.stored, "early_pages", (json_int_t)s->captured.early_pages,
		"hot_pages", (json_int_t)s->captured.hot_pages, "paused_pages",
		(json_int_t)s->captured.paused_pages, "early_ns", (json_int_t)s->captured.early_ns,
		"rounds", (int)s->captured.rounds, "pause_ns", (json_int_t)s->pause.total_ns,
		"stop_ns", (json_int_t)s->pause.stop_ns, "state_ns", (json_int_t)s->pause.state_ns,
		"harvest_ns", (json_int_t)s->pause.harvest_ns, "copy_ns",
		(json_int_t)s->captured.copy_ns, "service_ns", (json_int_t)s->pause.service_ns,
		"drain_ns", (json_int_t)s->captured.drain_ns, "lost", "lost_ns",
		(json_int_t)s->lost_ns, "of_ns", (json_int_t)s->lost_of_ns);
}

static int take(struct snapshot *s, bool self_check, struct err *e)
{
	int err = 0;

	if (s->vm->broken)
		return err_set(e, EBUSY,
			       "the last rollback of %s failed half way: roll it back "
			       "again, to any snapshot",
			       s->vm->name);
	if (self_check)
		err = selfcheck_create(s->vm, &s->check, e);
	if (err)
		return err;
	s->job->unit = "pages";
	err = run(s, e);
	finish(s, err);
	log_about()->snapshot = s->id;
	if (err)
		log_event(LOG_SNAPSHOT_FAILED, LOG_LVL_WARN, "%s: %s failed: %s", s->vm->name,
			  s->unnamed ? "self-check" : "snapshot", e->text);
	else
		log_event(LOG_SNAPSHOT_TAKEN, LOG_LVL_INFO,
			  "%s: %s %llu: %llu pages, %llu stored, paused %llu us", s->vm->name,
			  s->unnamed ? "self-check, epoch" : "snapshot",
			  (unsigned long long)(s->unnamed ? s->point.epoch : s->id),
			  (unsigned long long)s->stored.pages_in,
			  (unsigned long long)s->stored.stored,
			  (unsigned long long)s->pause.total_ns / 1000);
	log_about()->snapshot = 0;
	return err;
}

int snapshot_job(struct job *job, struct err *e)
{
	struct snapshot s = {.vm = vm_of_job(job), .job = job};
	int self_check = false;
	int err = check_args(s.vm, &s.meta, &self_check, &s.compression, job->args, e);

	if (!err)
		err = take(&s, self_check, e);
	if (!err)
		job->result = result(&s);
	if (!err && s.check)
		json_object_set_new(job->result, "self_check", selfcheck_json(s.check));
	selfcheck_destroy(s.check);
	return err;
}

int self_check_job(struct job *job, struct err *e)
{
	struct snapshot s = {.vm = vm_of_job(job), .job = job, .unnamed = true};
	int err = take(&s, true, e);

	if (!err)
		job->result = json_pack("{s:s,s:{s:I,s:I},s:I,s:I,s:o}", "vm", s.vm->name, "point",
					"timeline", (json_int_t)s.point.timeline, "epoch",
					(json_int_t)s.point.epoch, "pages",
					(json_int_t)s.stored.pages_in, "pause_ns",
					(json_int_t)s.pause.total_ns, "self_check",
					selfcheck_json(s.check));
	selfcheck_destroy(s.check);
	return err;
}
