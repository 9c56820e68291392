/* SPDX-License-Identifier: MIT */
/*
 * arch: saving and loading what KVM knows of a VM and its vCPUs.
 *
 * To add an architecture:
 *   1. write snapd/arch/NAME.c with one `const struct arch_ops arch_NAME`;
 *   2. add it to arch_host() below and to snapd/meson.build;
 *   3. choose record names "NAME.what" (state.h) and describe each payload and
 *      its version in docs/format.md;
 *   4. give tests/unit/test_arch.c a script of the ioctls in the order that the
 *      kernel wants, and tests/kvm the round trip on real hardware.
 *
 * Every op: 0 or -errno with the reason in *e.  vcpu_save and vcpu_load run on
 * the vCPU's own thread with the vCPU out of KVM_RUN; the others run on the
 * agent's thread with every vCPU stopped.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "include/snapd/agent.h"
#include "snapd/state.h"
#include "snapd/util/err.h"

struct kvm_run;

/* A device inside KVM whose state only its own descriptor gives. */
struct arch_device {
	uint32_t type; /* KVM_DEV_TYPE_* */
	int fd;	       /* borrowed: the VMM's */
};

struct arch_vm {
	const struct snapd_kvm_ops *kvm; /* never NULL here */
	int kvm_fd;
	int vm_fd;
	/* for vm_save and vm_load; borrowed */
	const int *vcpu_fds; /* by index */
	uint32_t nr_vcpus;
	const struct arch_device *devices; /* in the order in which the VMM told of them */
	uint32_t nr_devices;
};

struct arch_ops {
	const char *name;	   /* "x86_64" */
	uint32_t address_spaces;   /* that KVM may number here: 2 on x86 (SMM) */
	uint32_t ring_page_offset; /* of the dirty ring in the vCPU fd, in pages */
	const uint32_t *devices;   /* KVM_DEV_TYPE_* that it saves and loads; borrowed */
	uint32_t nr_devices;

	/* Describe the host: "host.*" records.  The same for all the VM's life, and slow
	 * (CPUID traps under nested virtualisation): not to be done in a pause. */
	int (*host_save)(const struct arch_vm *vm, struct snapd_state_writer *w, struct err *e);
	/* Can this host run that state?  -ENOTSUP and the reason if not.  `here` is what
	 * host_save() wrote on this host, which spares the asking; NULL: KVM is asked. */
	int (*host_check)(const struct arch_vm *vm, const struct snapd_state_reader *here,
			  const struct snapd_state_reader *r, struct err *e);
	int (*vm_save)(const struct arch_vm *vm, struct snapd_state_writer *w, struct err *e);
	int (*vm_load)(const struct arch_vm *vm, const struct snapd_state_reader *r, struct err *e);
	/* -EAGAIN: see arch_complete_pending(), which it calls first. */
	int (*vcpu_save)(const struct arch_vm *vm, int vcpu_fd, struct kvm_run *run, uint32_t index,
			 struct snapd_state_writer *w, struct err *e);
	int (*vcpu_load)(const struct arch_vm *vm, int vcpu_fd, struct kvm_run *run, uint32_t index,
			 const struct snapd_state_reader *r, struct err *e);
	/* Does KVM translate through tables made from the guest's own, so that rewriting
	 * guest memory behind its back leaves stale ones?  False where the hardware walks
	 * the guest's tables itself (EPT, NPT, stage 2) and the guest has no nested VMs.
	 * NULL for the state: does it for every guest? */
	bool (*shadows)(const struct arch_vm *vm, const struct snapd_state_reader *r);
	/* Do two payloads of one record, of equal length, mean the same state?  What runs
	 * by itself (clocks, current timer counts) is left out. */
	bool (*same)(const char *name, const void *a, const void *b, size_t len_bytes);
};

extern const struct arch_ops arch_x86_64;
extern const struct arch_ops arch_aarch64;

/* The one of the machine this was compiled for. */
const struct arch_ops *arch_host(void);

/* The real kernel's calls: what arch_vm.kvm points to where the VMM gave none. */
extern const struct snapd_kvm_ops arch_kvm_kernel;

/* KVM calls of a VM, through its ops; 0.. as ioctl(2), or -errno. */
int arch_ioctl(const struct arch_vm *vm, int fd, unsigned long request, void *arg);
/* The same for calls whose argument is a number. */
int arch_ioctl_value(const struct arch_vm *vm, int fd, unsigned long request, unsigned long value);
/* KVM_CHECK_EXTENSION on the VM; 0 where KVM does not know it. */
int arch_cap(const struct arch_vm *vm, uint32_t cap);

/*
 * An MMIO or PIO read is finished by the KVM_RUN that follows it; until then the
 * registers are those of before the instruction.  Finish it, without running
 * further (immediate_exit), on the vCPU's thread.  0: the vCPU is at an
 * instruction boundary.  -EAGAIN: the instruction has another exit, now in *run,
 * which the VMM has to handle first, as any other exit.
 */
int arch_complete_pending(const struct arch_vm *vm, int vcpu_fd, struct kvm_run *run,
			  uint32_t index, struct err *e);
/* The same where the vCPU's state is about to be replaced: whatever its half-done
 * instruction still asks for does not matter, only that nothing stays pending. */
int arch_discard_pending(const struct arch_vm *vm, int vcpu_fd, struct kvm_run *run, uint32_t index,
			 struct err *e);
