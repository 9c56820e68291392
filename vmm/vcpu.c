/* SPDX-License-Identifier: MIT */
/*
 * vcpu: one thread per vCPU: run, look why it came back, go on.
 *
 * A vCPU comes back by MMIO only: at a doorbell (guest.h), or because it touched
 * memory in a hole.  Such a load or store is done here on what lies behind the hole;
 * KVM counts a store as done, so nobody else would do it.
 */
#include <errno.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "vmm/machine.h"

static const char *const error_names[GUEST_NR_ERRORS] = {
	[GUEST_OK] = "no error",
	[GUEST_ERR_FRESH] = "a page never written is not empty",
	[GUEST_ERR_MAGIC] = "page lost its mark",
	[GUEST_ERR_INDEX] = "page is another page",
	[GUEST_ERR_COUNTER] = "page is not the one last written",
	[GUEST_ERR_CHECKSUM] = "page header is torn",
	[GUEST_ERR_PAYLOAD] = "page payload is not what was last written",
	[GUEST_ERR_DEVICE] = "device page does not agree with the device's table",
};

static void report_guest_error(struct vcpu *v)
{
	struct machine *m = v->machine;
	uint64_t error = MACHINE_CTL(m, v->index, error);

	machine_fail(m, "guest: vCPU %u, write %llu: %s: gpa 0x%llx, expected 0x%llx, found 0x%llx",
		     v->index, (unsigned long long)MACHINE_CTL(m, v->index, counter) + 1,
		     error < GUEST_NR_ERRORS ? error_names[error] : "unknown error",
		     (unsigned long long)MACHINE_CTL(m, v->index, error_gpa),
		     (unsigned long long)MACHINE_CTL(m, v->index, error_expected),
		     (unsigned long long)MACHINE_CTL(m, v->index, error_found));
}

static void on_doorbell(struct vcpu *v, uint64_t bell)
{
	const struct timespec rest = {.tv_nsec = 1000000};

	switch ((enum guest_doorbell)bell) {
	case GUEST_BELL_ERROR:
		report_guest_error(v);
		break;
	case GUEST_BELL_DONE:
		/* It stays a vCPU that can be paused and rolled back: then it goes on. */
		atomic_store(&v->done, true);
		nanosleep(&rest, NULL);
		break;
	case GUEST_BELL_CALL:
		punch_on_call(v->machine);
		break;
	case GUEST_BELL_EJECT:
		punch_on_eject(v->machine);
		break;
	case GUEST_BELL_PLUG:
		punch_on_plug(v->machine);
		break;
	}
}

static void on_mmio(struct vcpu *v, struct kvm_run *run)
{
	uint64_t gpa = run->mmio.phys_addr;
	int rc;

	if (gpa - GUEST_MMIO_GPA < GUEST_PAGE) {
		if (run->mmio.is_write)
			on_doorbell(v, gpa - GUEST_MMIO_GPA);
		return;
	}
	if (run->mmio.is_write) {
		rc = ram_hole_store(v->machine, gpa, run->mmio.data, run->mmio.len);
		atomic_fetch_add(&v->hole_stores, 1);
	} else {
		rc = ram_hole_load(v->machine, gpa, run->mmio.data, run->mmio.len);
		atomic_fetch_add(&v->hole_loads, 1);
	}
	if (rc)
		machine_fail(v->machine,
			     "vCPU %u: access to gpa 0x%llx, where there never was memory",
			     v->index, (unsigned long long)gpa);
}

static void on_exit_reason(struct vcpu *v, struct kvm_run *run)
{
	if (run->exit_reason == KVM_EXIT_MMIO)
		on_mmio(v, run);
	else if (run->exit_reason == KVM_EXIT_INTERNAL_ERROR)
		machine_fail(v->machine, "vCPU %u: KVM internal error %u", v->index,
			     run->internal.suberror);
	else
		machine_fail(v->machine, "vCPU %u: unexpected exit, reason %u", v->index,
			     run->exit_reason);
}

static void *vcpu_thread(void *arg)
{
	struct vcpu *v = arg;
	struct machine *m = v->machine;
	struct kvm_run *run = snapd_vcpu_kvm_run(v->agent);
	int rc;

	for (;;) {
		rc = snapd_vcpu_run(v->agent);
		if (rc == -ECANCELED)
			break;
		if (rc == 0)
			on_exit_reason(v, run);
		else if (rc != -EINTR && rc != -EAGAIN)
			machine_fail(m, "vCPU %u: run: %s: %s", v->index, strerror(-rc),
				     snapd_vm_error(m->agent));
		if (atomic_load(&m->fatal))
			break;
	}
	return NULL;
}

int vcpu_create(struct machine *m, uint32_t index)
{
	struct vcpu *v = &m->vcpus[index];
	int rc;

	v->machine = m;
	v->index = index;
	/* NOLINTNEXTLINE(performance-no-int-to-ptr): the ioctl takes a number */
	v->fd = machine_ioctl(m, m->vm_fd, KVM_CREATE_VCPU, (void *)(uintptr_t)index);
	if (v->fd < 0) {
		fprintf(stderr, "snapvm: cannot create vCPU %u: %s\n", index, strerror(-v->fd));
		return v->fd;
	}
	rc = snapd_vcpu_attach(m->agent, v->fd, index, &v->agent);
	if (rc) {
		fprintf(stderr, "snapvm: cannot attach vCPU %u: %s\n", index,
			snapd_vm_error(m->agent));
		return rc;
	}
	return 0;
}

int vcpu_start(struct vcpu *v)
{
	int rc = pthread_create(&v->thread, NULL, vcpu_thread, v);
	char name[16];

	v->started = rc == 0;
	if (v->started) {
		snprintf(name, sizeof(name), "vcpu%u", v->index);
		pthread_setname_np(v->thread, name);
	}
	return -rc;
}

void vcpu_join(struct vcpu *v)
{
	if (v->started)
		pthread_join(v->thread, NULL);
	v->started = false;
}
