/* SPDX-License-Identifier: MIT */
/*
 * request: what the service asks of a VM.  On the connection thread, one request
 * at a time; every request gets one answer, but REWRITE none.
 *
 *   RUNNING ──PAUSE──► PAUSED ──REWRITE──► REWRITING ──LOAD──► LOADED
 *      ▲                  │                    │ connection lost   │
 *      │◄─RESUME──────────┘                    └─► stays, and says so in HELLO
 *      │◄─connection lost, lease over                              │
 *      └◄─────────────────────────────────────────────────RESUME───┘
 *
 * In one step each: PAUSE with REWRITE goes to REWRITING, LOAD with RESUME to RUNNING.
 * RESUME with UNTOUCHED goes back from REWRITING, as long as nobody can have written:
 * not after REWRITE or LOAD, nor on another connection.
 *
 * A VM that waits to be restored (RESTORING) takes LOAD at once, pausing itself;
 * should the connection be lost then, the next one begins the restore anew.
 * REWRITING lasts until RESUME, not LOADED: before the service has set `base` the
 * sets do not tell what it wrote.
 *
 * The order of a pause: vCPUs stop; the VMM's devices stop; vCPU state on the
 * vCPUs' own threads, VM, host, memory layout, devices; then the last harvest,
 * since all of that may write guest memory; then PAUSED.
 *
 * A VMM that keeps all state itself (vmm_state) also stops its vCPUs, in quiesce; who comes to
 * run one after that waits, and has spoilt the snapshot.
 */
#include "agent/vm.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

static void fail(struct snapd_vm *vm, uint64_t req, const struct err *e)
{
	struct snapd_msg_error m = {.h = {.type = SNAPD_MSG_FAILED, .req = req}, .code = -e->code};

	memcpy(m.text, e->text, sizeof(m.text) - 1);
	vm_log(vm, SNAPD_LOG_WARN, "request failed: %s", e->text);
	conn_send(vm, &m, sizeof(m), -1);
}

/* ---- pause and resume ---- */

static void release(struct snapd_vm *vm)
{
	bool held = vm->service_paused && (!vm->vmm_state || vm->quiesced);

	slots_freeze(vm, false);
	/* The thread that is to start a VMM's vCPUs may wait for one that waits here. */
	if (held && vm->vmm_state)
		vcpus_release(vm);
	if (vm->quiesced && vm->cb.unquiesce)
		vm->cb.unquiesce(vm->opaque);
	vm->quiesced = false;
	if (held && !vm->vmm_state)
		vcpus_release(vm);
	vm->service_paused = vm->rewriting = vm->loaded = false;
	vm->untouched = vm->cured = false;
}

/* How long the VM stood. */
static uint64_t resume(struct snapd_vm *vm)
{
	release(vm);
	if (atomic_exchange(&vm->restore_wait, false))
		vcpus_release(vm);
	return (vm->vmm_state ? now_ns() : vcpus_wait_left(vm)) - vm->paused_at_ns;
}

void request_abandon(struct snapd_vm *vm)
{
	if (!vm->service_paused)
		return;
	vm->untouched = false; /* by the next connection's knowledge */
	if (vm->rewriting && !atomic_load(&vm->restore_wait)) {
		vm->loaded = false;
		vm_log(vm, SNAPD_LOG_WARN,
		       "guest memory is half rewritten: the VM stays paused until the service "
		       "is back");
		return;
	}
	release(vm);
}

void request_end(struct snapd_vm *vm)
{
	if (vm->service_paused)
		release(vm);
}

uint64_t request_lease_end(const struct snapd_vm *vm)
{
	if (!vm->service_paused || vm->rewriting || atomic_load(&vm->restore_wait))
		return UINT64_MAX;
	return vm->lease_end_ns;
}

static int prepare(struct snapd_vm *vm, struct err *e)
{
	int r = vm->cb.prepare ? vm->cb.prepare(vm->opaque) : 0;

	return r < 0 ? callback_failed(vm, r, "the VMM cannot be stopped now", e) : 0;
}

static int quiesce(struct snapd_vm *vm, struct err *e)
{
	int r = vm->cb.quiesce ? vm->cb.quiesce(vm->opaque) : 0;

	return r < 0 ? callback_failed(vm, r, "the VMM did not stop", e) : 0;
}

static int hold_all(struct snapd_vm *vm, uint32_t timeout_ms, struct err *e)
{
	int r;

	vcpus_hold(vm);
	r = vcpus_wait_stopped(vm, timeout_ms, e);
	if (ABLATED(LOG_BEFORE_QUIESCE))
		devlogs_collect(vm);
	if (r < 0)
		return r;
	vm->quiesced = true;
	return quiesce(vm, e);
}

static int hold_vmm(struct snapd_vm *vm, struct err *e)
{
	int r = quiesce(vm, e);

	if (r < 0)
		return r;
	vm->quiesced = true;
	vcpus_hold(vm);
	vm->slots_at = atomic_load(&vm->shm->slot_changes);
	return vmstate_undisturbed(vm, e);
}

/* Stop vCPUs and devices. */
static int hold(struct snapd_vm *vm, uint32_t timeout_ms, struct err *e)
{
	int r;

	vm->paused_at_ns = now_ns();
	vm->service_paused = true;
	r = vm->vmm_state ? hold_vmm(vm, e) : hold_all(vm, timeout_ms, e);
	if (r < 0) {
		release(vm);
		return r;
	}
	if (!vm->vmm_state)
		slots_freeze(vm, true); /* not before: quiesce may wait for who changes slots */
	count(&vm->shm->pauses, 1);
	return 0;
}

/* Before anything else can come of the connection, its loss included. */
static void rewrite_begin(struct snapd_vm *vm, struct snapd_point to)
{
	vm->rewriting = true;
	vm->loaded = vm->untouched = false;
	vm->rewrite_to = to;
}

/* *begin: the VM ran until then. */
static int pause_begin(struct snapd_vm *vm, uint32_t timeout_ms, uint64_t *begin, struct err *e)
{
	int r = about_refusal(vm, e) ?: prepare(vm, e);

	*begin = now_ns();
	return r < 0 ? r : hold(vm, timeout_ms, e);
}

static void on_pause(struct snapd_vm *vm, const struct snapd_msg_pause *m)
{
	struct snapd_msg_paused out = {.h = {.type = SNAPD_MSG_PAUSED, .req = m->h.req}};
	uint64_t begin = now_ns(), stopped, saved;
	bool was_paused = vm->service_paused;
	_cleanup_fd_ int fd = -1;
	struct err e = {0};
	int r = 0;

	if (m->flags & SNAPD_PAUSE_REWRITE && m->h.len < sizeof(*m)) {
		conn_drop(vm, "it sent too short a message");
		return;
	}
	if (vm->service_paused && !vm->rewriting)
		r = err_set(&e, EBUSY, "the VM is paused already");
	else if (!vm->service_paused)
		r = pause_begin(vm, m->timeout_ms, &begin, &e);
	stopped = now_ns();
	if (ABLATED(BACKUP_BEFORE_STATE))
		(void)backup_collect(vm);
	if (r >= 0 && !(m->flags & SNAPD_PAUSE_NO_STATE)) {
		fd = vmstate_save(vm, &out.state_bytes, &e);
		r = fd;
		if (r < 0 && !vm->rewriting)
			release(vm);
	}
	if (r < 0) {
		fail(vm, m->h.req, &e);
		return;
	}
	saved = now_ns();
	/* A dead ring has made everything dirty: what is copied now is whole. */
	reap_last(vm);
	vm->lease_end_ns = now_ns() + PAUSE_LEASE_NS;
	out.stop_ns = stopped - begin;
	out.state_ns = saved - stopped;
	out.harvest_ns = now_ns() - saved;
	out.publish_seq = atomic_load(&vm->shm->publish_seq);
	if (conn_tell(vm) < 0 || conn_send(vm, &out, sizeof(out), fd) < 0)
		return;
	if (m->flags & SNAPD_PAUSE_REWRITE) {
		rewrite_begin(vm, m->to);
		vm->untouched = !was_paused;
		layout_cure_ahead(vm);
	}
}

static void on_sync(struct snapd_vm *vm, const struct snapd_msg_sync *m)
{
	struct snapd_msg_synced out = {.h = {.type = SNAPD_MSG_SYNCED, .req = m->h.req}};
	uint64_t begin = now_ns(), before = atomic_load(&vm->shm->reset);

	devlogs_collect(vm);
	reap(vm);
	out.publish_seq = atomic_load(&vm->shm->publish_seq);
	out.reset_entries = atomic_load(&vm->shm->reset) - before;
	out.took_ns = now_ns() - begin;
	if (conn_tell(vm) >= 0)
		conn_send(vm, &out, sizeof(out), -1);
}

/* May LOAD come now?  A VM that waits to be restored is paused for it here. */
static int load_begin(struct snapd_vm *vm, struct err *e)
{
	if (vm->service_paused && (vm->rewriting || atomic_load(&vm->restore_wait)))
		return 0;
	if (!atomic_load(&vm->restore_wait))
		return err_set(e, EPROTO, "LOAD without PAUSE and REWRITE");
	return hold(vm, 0, e);
}

static void on_load(struct snapd_vm *vm, const struct snapd_msg_load *m, int fd)
{
	struct snapd_msg_loaded out = {.h = {.type = SNAPD_MSG_LOADED, .req = m->h.req}};
	struct err e = {0};
	int r = load_begin(vm, &e);

	vm->untouched = false;
	vm->runs_on = m->h.len >= sizeof(*m) && m->flags & SNAPD_LOAD_RESUME;
	if (r >= 0)
		r = vmstate_load(vm, fd, m->state_bytes, &out, &e);
	if (r < 0) {
		fail(vm, m->h.req, &e);
		if (atomic_load(&vm->restore_wait))
			vcpus_refuse(vm, -EREMOTEIO);
		return;
	}
	/* Entries of before belong to memory that is no more; and whoever else keeps
	 * a set never saw what the service wrote. */
	reap_last(vm);
	consumers_add_all(vm);
	vm->loaded = true;
	/* What the load changed is told before the VMM's threads can change more: the
	 * service forgets what it was told gone before LOADED. */
	if (conn_tell(vm) < 0)
		return;
	if (vm->runs_on)
		out.paused_ns = resume(vm);
	conn_send(vm, &out, sizeof(out), -1);
}

static void on_check(struct snapd_vm *vm, const struct snapd_msg_check *m, int fd)
{
	struct snapd_msg_checked out = {.h = {.type = SNAPD_MSG_CHECKED, .req = m->h.req}};
	struct err e = {0};

	if (vmstate_load(vm, fd, m->state_bytes, NULL, &e) < 0)
		fail(vm, m->h.req, &e);
	else
		conn_send(vm, &out, sizeof(out), -1);
}

static void on_rewrite(struct snapd_vm *vm, const struct snapd_msg_rewrite *m)
{
	if (!vm->service_paused && !atomic_load(&vm->restore_wait)) {
		conn_drop(vm, "it sent REWRITE to a VM that runs");
		return;
	}
	rewrite_begin(vm, m->to);
}

static void on_resume(struct snapd_vm *vm, const struct snapd_msg_resume *m)
{
	struct snapd_msg_resumed out = {.h = {.type = SNAPD_MSG_RESUMED, .req = m->h.req}};
	bool untouched = m->h.len >= sizeof(*m) && m->flags & SNAPD_RESUME_UNTOUCHED;
	struct err e = {0};
	int r;

	if (!vm->service_paused) {
		err_set(&e, EPROTO, "RESUME without PAUSE");
		fail(vm, m->h.req, &e);
		return;
	}
	if (untouched && vm->untouched)
		vm->rewriting = false;
	if ((vm->rewriting || atomic_load(&vm->restore_wait)) && !vm->loaded) {
		err_set(&e, EBUSY, "guest memory is half rewritten: LOAD first");
		fail(vm, m->h.req, &e);
		return;
	}
	r = atomic_load(&vm->restore_wait) ? 0 : vmstate_undisturbed(vm, &e);
	out.paused_ns = resume(vm);
	if (r < 0) { /* and what was copied is no point in time */
		fail(vm, m->h.req, &e);
		return;
	}
	conn_send(vm, &out, sizeof(out), -1);
}

void request_handle(struct snapd_vm *vm, const struct snapd_msg *h, int *fd)
{
	switch (h->type) {
	case SNAPD_MSG_SYNC:
		on_sync(vm, (const void *)h);
		break;
	case SNAPD_MSG_PAUSE:
		on_pause(vm, (const void *)h);
		break;
	case SNAPD_MSG_REWRITE:
		on_rewrite(vm, (const void *)h);
		break;
	case SNAPD_MSG_CHECK:
		on_check(vm, (const void *)h, *fd);
		break;
	case SNAPD_MSG_LOAD:
		on_load(vm, (const void *)h, *fd);
		break;
	case SNAPD_MSG_RESUME:
		on_resume(vm, (const void *)h);
		break;
	default: /* checked by conn.c */
		break;
	}
}
