/* SPDX-License-Identifier: MIT */
/*
 * postmortem: the memory of a VM whose VMM is dead, as a snapshot without vCPUs.
 * On the VM's thread, after its connection was lost and its process has ended.
 *
 * What the VMM knew and nobody was told died with it: entries that its rings still
 * held, frames collected and not yet published, writes of its devices on the way to
 * their mark.  The first are read from the rings, through the vCPUs' descriptors (rings.c).
 * The others are in no ring.  But the RAM files are here, and nothing writes them any more (a
 * pidfd becomes readable when every thread, and with them every KVM_RUN and every
 * io_uring, has ended), so what is not in the sets then is compared with the store, page
 * by page: complete, whoever wrote.
 *
 * Not made of: a VMM that said BYE, one that speaks a protocol without it, a VM
 * whose memory was half rewritten by a rollback.
 */
#include <stdio.h>
#include <string.h>

#include "snapd/state.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/vm/capture.h"
#include "snapd/vm/priv.h"
#include "snapd/vm/selfcheck.h"

#define MINOR_OF_BYE 1

struct postmortem {
	struct vm *vm;
	uint64_t timeline;
	struct selfcheck *check;	 /* owned */
	struct epoch *ep;		 /* owned until committed or aborted */
	struct snapd_state_writer state; /* owned */
	struct rings_found rings;
	struct epoch_stats stored;
	uint64_t id;
};

bool postmortem_wanted(const struct vm *vm)
{
	return vm->d->config.post_mortem && !vm->said_bye && vm->peer_fd >= 0 &&
	       vm->hello.minor >= MINOR_OF_BYE && vm->mem.nr_pieces;
}

/* What the memory consists of, and what this is. */
static int describe(struct postmortem *pm, struct err *e)
{
	const struct vm_mem *m = &pm->vm->mem;
	struct state_postmortem what = {.died_ns = now_ns(CLOCK_REALTIME), .pid = pm->vm->pid};
	_cleanup_free_ struct state_piece *pieces = calloc(m->nr_pieces, sizeof(*pieces));
	int err = pieces ? state_writer_init(&pm->state) : -ENOMEM;

	for (uint32_t i = 0; !err && i < m->nr_pieces; i++) {
		const struct snapd_piece *p = &m->by_gfn[i].p;

		pieces[i] = (struct state_piece){.home_gfn = p->home_gfn,
						 .nr_pages = p->nr_frames,
						 .block = p->block,
						 .block_page = p->block_page};
	}
	if (!err)
		err = state_put(&pm->state, "pieces", 0, 1, pieces, m->nr_pieces * sizeof(*pieces));
	if (!err)
		err = state_put(&pm->state, STATE_POSTMORTEM, 0, 1, &what, sizeof(what));
	return err ? err_errno(e, -err, "describe the memory") : 0;
}

static int begin(struct postmortem *pm, struct err *e)
{
	struct vm *vm = pm->vm;
	int err;

	/* The VMM may have died between a bit and its summary. */
	if (vm_shm_merge(&vm->shm, vm->mem.frames_end, true) || rings_drain(vm, &pm->rings))
		return err_set(e, EFAULT, "the VM's shared memory is gone");
	err = vm->capture ? 0 : capture_create(vm, &vm->capture, e);
	if (!err)
		err = selfcheck_create(vm, &pm->check, e);
	if (!err)
		err = selfcheck_prepare(pm->check, NULL, e);
	pm->timeline = vm->point.timeline;
	if (!err && !pm->timeline)
		err = store_timeline_create(vm->d->store, vm->id, (struct snapd_point){},
					    &pm->timeline, e);
	if (err)
		return err;
	vm_keep_timeline(vm, pm->timeline);
	return epoch_begin(vm->d->store, vm->id, pm->timeline, vm->mem.page_size, vm->live, &pm->ep,
			   e);
}

static int capture_all(struct postmortem *pm, struct err *e)
{
	struct capture *c = pm->vm->capture;
	int err;

	capture_begin(c, pm->ep, pm->check);
	err = capture_dead(c, e);
	capture_end(c, NULL);
	return err;
}

static int commit(struct postmortem *pm, struct err *e)
{
	char note[128];
	struct snapshot_meta meta = {.note = note, .post_mortem = true};
	struct snapd_point point;
	const void *state;
	size_t len;
	int err = state_writer_finish(&pm->state, &state, &len);

	if (err)
		return err_errno(e, -err, "describe the memory");
	snprintf(note, sizeof(note),
		 "memory at the death of pid %u; no vCPU state; ring_pages %llu, missed_pages %llu",
		 pm->vm->pid, (unsigned long long)pm->rings.pages,
		 (unsigned long long)selfcheck_missed(pm->check));
	err = epoch_commit(pm->ep, state, len, &meta, &point, &pm->id, &pm->stored, e);
	if (!err)
		pm->ep = NULL;
	return err;
}

void postmortem(struct vm *vm)
{
	struct postmortem pm = {.vm = vm};
	struct err e = {};
	int err;

	if (vm->broken) {
		log_warn("%s: the VMM is dead, and memory half rewritten: it is not kept",
			 vm->name);
		return;
	}
	err = describe(&pm, &e);
	if (!err)
		err = begin(&pm, &e);
	if (!err)
		err = capture_all(&pm, &e);
	if (!err)
		err = commit(&pm, &e);
	epoch_abort(pm.ep);
	if (err && pm.timeline && pm.timeline != vm->point.timeline)
		store_timeline_drop(vm->d->store, pm.timeline, NULL);
	log_about()->snapshot = err ? 0 : pm.id;
	if (err)
		log_event(LOG_POST_MORTEM, LOG_LVL_ERR,
			  "%s: the VMM is dead, and its memory cannot be kept: %s", vm->name,
			  e.text);
	else
		log_event(LOG_POST_MORTEM, LOG_LVL_NOTICE,
			  "%s: the VMM is dead: snapshot %llu has its memory: %llu pages changed, "
			  "of %llu only its rings told (%llu entries), of %llu nobody",
			  vm->name, (unsigned long long)pm.id,
			  (unsigned long long)pm.stored.pages_in,
			  (unsigned long long)pm.rings.pages, (unsigned long long)pm.rings.entries,
			  (unsigned long long)selfcheck_missed(pm.check));
	log_about()->snapshot = 0;
	selfcheck_destroy(pm.check);
	state_writer_deinit(&pm.state);
	vm_keep_timeline(vm, 0);
}
