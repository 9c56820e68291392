/* SPDX-License-Identifier: MIT */
/*
 * vmstate: vCPUs, VM, host, memory layout and devices of a VM that stands, as one blob in a
 * sealed memfd, and back.  On the connection thread; each vCPU's part on its own.
 *
 * A VMM that keeps all state itself (vmm_state) saves and loads with the slots not
 * frozen, since its threads change them then; a slot that changed between quiesce and the
 * layout's record spoils the snapshot.
 */
#include "agent/vm.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Nobody may run the VM from here on, whoever resumes it. */
int vmstate_undisturbed(struct snapd_vm *vm, struct err *e)
{
	if (!vm->vmm_state || !vcpus_intruded(vm))
		return 0;
	return err_set(e, EAGAIN, "the VM was resumed in the middle of it, by somebody else");
}

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
		r = vmstate_undisturbed(vm, e);
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
int vmstate_save(struct snapd_vm *vm, uint64_t *len_bytes, struct err *e)
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
int vmstate_load(struct snapd_vm *vm, int fd, uint64_t len, struct snapd_msg_loaded *out,
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
