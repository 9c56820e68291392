/* SPDX-License-Identifier: MIT */
/* aarch64: what the files of this architecture share. */
#pragma once

#include <linux/kvm.h>
#include <stdint.h>

#include "snapd/arch/arch.h"

/* The uapi headers of Linux 6.1 lack these (6.4). */
#ifndef KVM_CAP_COUNTER_OFFSET
#define KVM_CAP_COUNTER_OFFSET 227
#endif
#ifndef KVM_ARM_SET_COUNTER_OFFSET
struct kvm_arm_counter_offset {
	uint64_t counter_offset;
	uint64_t reserved;
};
#define KVM_ARM_SET_COUNTER_OFFSET _IOW(KVMIO, 0xb5, struct kvm_arm_counter_offset)
#endif

#define REG_MPIDR_EL1	    ARM64_SYS_REG(3, 0, 0, 0, 5)
#define REG_ID_AA64PFR1_EL1 ARM64_SYS_REG(3, 0, 0, 4, 1)

/* aarch64.c: KVM_GET_ONE_REG, KVM_SET_ONE_REG; 0 or -errno. */
int arm_reg_call(const struct arch_vm *vm, int vcpu_fd, unsigned long request, uint64_t id,
		 void *value);

/*
 * aarch64_vgic.c: the interrupt controllers, on the agent's thread with every vCPU
 * stopped.  Saving writes guest memory (ITS and pending tables) without a vCPU: KVM
 * logs that in the slots' bitmaps, which the last harvest of a pause collects after
 * it.  A VM without an in-kernel GIC has nothing to save; one whose GIC's descriptor
 * was not handed over is refused.
 */
int vgic_save(const struct arch_vm *vm, struct snapd_state_writer *w, struct err *e);
/* Guest memory is what it was, vCPUs exist. */
int vgic_load(const struct arch_vm *vm, const struct snapd_state_reader *r, struct err *e);
