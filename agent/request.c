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
 * run one after that waits, and has spoilt the snapshot.  Its state is saved and loaded
 * with the slots not frozen, since its threads change them then; a slot that
 * changed between quiesce and the layout's record spoils the snapshot, too.
 */
#include "agent/vm.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
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

/* Nobody may run the VM from here on, whoever resumes it. */
static int check_undisturbed(struct snapd_vm *vm, struct err *e)
{
	if (!vm->vmm_state || !vcpus_intruded(vm))
		return 0;
	return err_set(e, EAGAIN, "the VM was resumed in the middle of it, by somebody else");
}

static int hold_vmm(struct snapd_vm *vm, struct err *e)
{
	int r = quiesce(vm, e);

	if (r < 0)
		return r;
	vm->quiesced = true;
	vcpus_hold(vm);
	vm->slots_at = atomic_load(&vm->shm->slot_changes);
	return check_undisturbed(vm, e);
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

/* ---- state out ---- */

static int vcpu_save(struct snapd_vcpu *v, struct err *e)
{
	int r = state_writer_init(&v->save);

	if (r < 0)
		return err_set(e, ENOMEM, "no memory for vCPU state");
	return v->vm->arch->vcpu_save(&v->vm->kvm, v->fd, v->run, v->index, &v->save, e);
}

/* Each vCPU wrote a blob of its own, all at once, and the host has one; here they
 * become one. */
static int append_saved(struct snapd_state_writer *saved, struct snapd_state_writer *w,
			const char *whose, struct err *e)
{
	const struct state_record *rec = NULL;
	struct snapd_state_reader reader;
	const void *blob;
	size_t len;
	int r = state_writer_finish(saved, &blob, &len);

	if (r < 0)
		return err_errno(e, -r, "state of %s", whose);
	r = state_reader_init(&reader, blob, len, e);
	while (r >= 0 && (rec = state_next(&reader, rec))) {
		r = state_put(w, rec->name, rec->instance, rec->version, rec + 1, rec->len_bytes);
		if (r < 0)
			err_errno(e, -r, "state of %s", whose);
	}
	return r;
}

static int save_vcpus(struct snapd_vm *vm, struct snapd_state_writer *w, struct err *e)
{
	uint32_t n = atomic_load(&vm->nr_vcpus);
	int r = vcpus_do(vm, vcpu_save, n, e);

	for (uint32_t i = 0; i < n; i++) {
		if (r >= 0)
			r = append_saved(&vm->vcpus[i]->save, w, "a vCPU", e);
		state_writer_deinit(&vm->vcpus[i]->save);
	}
	return r;
}

static int save_devices(struct snapd_vm *vm, struct snapd_state_writer *w, struct err *e)
{
	int r = vm->cb.save ? vm->cb.save(vm->opaque, w) : 0;

	return r < 0 ? callback_failed(vm, r, "the VMM could not save its devices", e) : 0;
}

static int freeze_as_saved(struct snapd_vm *vm, struct err *e)
{
	slots_freeze(vm, true);
	if (atomic_load(&vm->shm->slot_changes) == vm->slots_at)
		return 0;
	return err_set(e, EAGAIN, "memory slots changed while the VMM saved its state");
}

static int save_vmm(struct snapd_vm *vm, struct snapd_state_writer *w, struct err *e)
{
	const struct state_vmm what = {.nr_vcpus = atomic_load(&vm->nr_vcpus)};
	int r = state_put(w, STATE_VMM, 0, 1, &what, sizeof(what));

	if (r < 0)
		return err_errno(e, -r, "the state");
	r = save_devices(vm, w, e);
	if (r >= 0)
		r = check_undisturbed(vm, e);
	if (r >= 0)
		r = freeze_as_saved(vm, e);
	if (r >= 0)
		r = append_saved(&vm->host, w, "the host", e);
	return r < 0 ? r : layout_save(vm, w, e);
}

static int save_all(struct snapd_vm *vm, struct snapd_state_writer *w, struct err *e)
{
	const struct arch_vm whole = arch_vm_whole(vm);
	int r = save_vcpus(vm, w, e);

	if (r >= 0)
		r = vm->arch->vm_save(&whole, w, e);
	if (r >= 0)
		r = append_saved(&vm->host, w, "the host", e);
	if (r >= 0)
		r = layout_save(vm, w, e);
	if (r >= 0)
		r = save_devices(vm, w, e);
	return r;
}

static int write_all(int fd, const uint8_t *p, size_t len)
{
	while (len) {
		ssize_t n = write(fd, p, len);

		if (n < 0 && errno != EINTR)
			return -errno;
		p += MAX(n, (ssize_t)0);
		len -= (size_t)MAX(n, (ssize_t)0);
	}
	return 0;
}

/* The blob as a sealed memfd: the service maps it without fear of us. */
static int blob_fd(struct snapd_state_writer *w, uint64_t *len_bytes, struct err *e)
{
	_cleanup_fd_ int fd = memfd_create("snapd-state", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	const void *blob;
	size_t len;
	int r = state_writer_finish(w, &blob, &len);

	if (r < 0)
		return err_errno(e, -r, "cannot close the state");
	if (fd < 0)
		return err_errno(e, errno, "cannot make a memfd for the state");
	r = write_all(fd, blob, len);
	if (r >= 0 &&
	    fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL) < 0)
		r = -errno;
	if (r < 0)
		return err_errno(e, -r, "cannot write the state");
	*len_bytes = len;
	return steal_fd(&fd);
}

/* The state's descriptor. */
static int save_state(struct snapd_vm *vm, uint64_t *len_bytes, struct err *e)
{
	struct snapd_state_writer w;
	int r = state_writer_init(&w);

	if (r < 0)
		return err_set(e, ENOMEM, "no memory for the state");
	r = vm->vmm_state ? save_vmm(vm, &w, e) : save_all(vm, &w, e);
	if (r >= 0)
		r = blob_fd(&w, len_bytes, e);
	state_writer_deinit(&w);
	return r;
}

/* Before anything else can come of the connection, its loss included. */
static void rewrite_begin(struct snapd_vm *vm, struct snapd_point to)
{
	vm->rewriting = true;
	vm->loaded = vm->untouched = false;
	vm->rewrite_to = to;
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
		r = about_refusal(vm, &e) ?: hold(vm, m->timeout_ms, &e);
	stopped = now_ns();
	if (ABLATED(BACKUP_BEFORE_STATE))
		(void)backup_collect(vm);
	if (r >= 0 && !(m->flags & SNAPD_PAUSE_NO_STATE)) {
		fd = save_state(vm, &out.state_bytes, &e);
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

/* ---- state in ---- */

static int vcpu_load(struct snapd_vcpu *v, struct err *e)
{
	if (v->vm->runs_on)
		vcpus_stay_awake(v->vm);
	v->io_pending = false;
	return v->vm->arch->vcpu_load(&v->vm->kvm, v->fd, v->run, v->index, v->load, e);
}

static int load_vcpus(struct snapd_vm *vm, const struct snapd_state_reader *r, struct err *e)
{
	uint32_t n = atomic_load(&vm->nr_vcpus);

	for (uint32_t i = 0; i < n; i++)
		vm->vcpus[i]->load = r;
	return vcpus_do(vm, vcpu_load, n, e);
}

static int load_devices(struct snapd_vm *vm, const struct snapd_state_reader *r, struct err *e)
{
	int ret = vm->cb.load ? vm->cb.load(vm->opaque, r) : 0;

	return ret < 0 ? callback_failed(vm, ret, "the VMM could not load its devices", e) : 0;
}

static int check_devices(struct snapd_vm *vm, const struct snapd_state_reader *r, struct err *e)
{
	int ret = vm->cb.check ? vm->cb.check(vm->opaque, r) : 0;

	return ret < 0 ? callback_failed(vm, ret, "the VMM cannot load this state", e) : 0;
}

static bool is_of_vmm(const struct snapd_state_reader *r)
{
	uint16_t version;
	const void *what;
	size_t len;

	return !state_get(r, STATE_VMM, 0, &version, &what, &len);
}

static int load_vmm(struct snapd_vm *vm, const struct snapd_state_reader *r,
		    struct snapd_msg_loaded *out, struct err *e)
{
	uint64_t begin = now_ns();
	int ret;

	slots_freeze(vm, false);
	ret = load_devices(vm, r, e);
	out->load_ns = now_ns() - begin;
	vm->slots_at = atomic_load(&vm->shm->slot_changes);
	return ret < 0 ? ret : layout_load(vm, r, &out->layout_ns, &out->cure_ns, e);
}

/* What may refuse a state, with nothing changed. */
static int check_all(struct snapd_vm *vm, const struct snapd_state_reader *r, struct err *e)
{
	int ret = vm->arch->host_check(&vm->kvm, &vm->host_said, r, e);

	if (ret >= 0 && is_of_vmm(r) != vm->vmm_state)
		ret = err_set(e, EINVAL, "the snapshot is%s of a VMM that saves vCPUs itself",
			      vm->vmm_state ? " not" : "");
	/* Such a VMM makes its memslots itself. */
	if (ret >= 0 && !vm->vmm_state)
		ret = layout_check(vm, r, e);
	return ret < 0 ? ret : check_devices(vm, r, e);
}

/* All that may refuse comes before all that changes anything, where it can. */
static int load_all(struct snapd_vm *vm, const struct snapd_state_reader *r,
		    struct snapd_msg_loaded *out, struct err *e)
{
	const struct arch_vm whole = arch_vm_whole(vm);
	int ret = check_all(vm, r, e);
	uint64_t begin;

	if (ret >= 0 && vm->vmm_state)
		return load_vmm(vm, r, out, e);
	if (ret >= 0)
		ret = layout_load(vm, r, &out->layout_ns, &out->cure_ns, e);
	begin = now_ns();
	if (ret >= 0)
		ret = vm->arch->vm_load(&whole, r, e);
	if (ret >= 0)
		ret = load_vcpus(vm, r, e);
	if (ret >= 0)
		ret = load_devices(vm, r, e);
	out->load_ns = now_ns() - begin;
	return ret;
}

/* The blob into memory of our own: the service could change or truncate it. */
static int read_blob(int fd, uint64_t len, void **ret, struct err *e)
{
	_cleanup_free_ uint8_t *buf = NULL;
	uint64_t at = 0;

	if (fd < 0)
		return err_set(e, EPROTO, "LOAD came without a descriptor");
	if (len > STATE_MAX_BYTES)
		return err_set(e, E2BIG, "state of %" PRIu64 " bytes", len);
	buf = malloc(len ? len : 1);
	if (!buf)
		return err_set(e, ENOMEM, "no memory for a state of %" PRIu64 " bytes", len);
	while (at < len) {
		ssize_t n = pread(fd, buf + at, len - at, (off_t)at);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return err_set(e, n ? errno : EPROTO, "cannot read the state");
		at += (uint64_t)n;
	}
	*ret = steal_ptr(&buf);
	return 0;
}

/* `out` NULL: only look whether it could be loaded. */
static int load_state(struct snapd_vm *vm, int fd, uint64_t len, struct snapd_msg_loaded *out,
		      struct err *e)
{
	_cleanup_free_ void *blob = NULL;
	struct snapd_state_reader reader;
	int r = read_blob(fd, len, &blob, e);

	if (r >= 0)
		r = state_reader_init(&reader, blob, len, e);
	if (r >= 0)
		r = out ? load_all(vm, &reader, out, e) : check_all(vm, &reader, e);
	return r;
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
		r = load_state(vm, fd, m->state_bytes, &out, &e);
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

	if (load_state(vm, fd, m->state_bytes, NULL, &e) < 0)
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
	r = atomic_load(&vm->restore_wait) ? 0 : check_undisturbed(vm, &e);
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
