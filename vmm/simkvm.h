/* SPDX-License-Identifier: MIT */
/*
 * simkvm: a KVM in user space, for hosts without /dev/kvm and for what a given KVM
 * cannot do: a second address space, writes without a vCPU, RESETs cut short.  It stands behind
 * struct snapd_kvm_ops, and produces real dirty rings (struct kvm_dirty_gfn) from real threads.
 *
 * Its CPU runs a *program*: a C function that does one step of work through
 * simkvm_load() and simkvm_store(), each of them one instruction.  KVM_RUN calls it
 * again and again on the calling thread.  The CPU can leave before any instruction
 * (immediate_exit, ring full) or at one (MMIO), as a real one can; what the step had
 * loaded so far is part of its registers, and at re-entry the step runs again with
 * these values up to where it left.  So a program must depend on its arguments and on
 * what it loads only, and keep nothing elsewhere.
 *
 * Registers, through the ioctls of x86_64: RDI is the program's argument; RAX counts the
 * instructions of the current step that are done; the XSAVE area holds what they loaded.
 *
 * What it does as the kernel does (simkvm.c has the mechanism):
 *   - first write to a page of a logged slot since it was added, write-protected or
 *     zapped: one entry; a first read after zapping, too (over-approximation);
 *   - ring full is reported at the entry to the guest, 64 entries before the end;
 *   - RESET gives back harvested entries in order: flags cleared, then the page
 *     protected, in every vCPU, before it returns; entries of slots that are gone or
 *     shrunk are counted and otherwise ignored;
 *   - memslot errors, deletion zaps everything unless SLOT_ZAP_ALL is disabled.
 * What it leaves out: interrupts, instructions, page tables, signals as such (a kick
 * must set immediate_exit, as every user of KVM does to be free of races).
 *
 * One VM per struct simkvm.  Descriptors are memfds; they can be duplicated, passed
 * and mapped, and are known by inode.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "include/snapd/agent.h"

#define SIMKVM_MAX_VCPUS     64u
#define SIMKVM_RING_RESERVED 64u  /* entries between soft full and full */
#define SIMKVM_STEP_LOADS    511u /* loads of one step at most */

struct simkvm;	   /* made by simkvm_create() */
struct simkvm_cpu; /* valid during a step */

struct simkvm_config {
	/* One step of the vCPU's program. */
	void (*step)(struct simkvm_cpu *cpu, uint64_t rdi, void *opaque);
	void *opaque;
	/* May its next step begin?  Asked again and again while not, on the vCPU's thread;
	 * NULL: always. */
	bool (*may_step)(uint64_t rdi, void *opaque);
	uint64_t period_ns;	 /* from step to step; 0: none */
	uint32_t ring_bytes_max; /* what KVM_CAP_DIRTY_LOG_RING says; 0: 1 MiB */
	bool backup_bitmap;	 /* offers KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP */
};

/* 0 or -errno. */
int simkvm_create(const struct simkvm_config *config, struct simkvm **ret);
/* No vCPU may be running.  Does not close descriptors that were handed out. */
void simkvm_destroy(struct simkvm *sim);
/* Stands for open("/dev/kvm"); the caller's to close. */
int simkvm_open(struct simkvm *sim);
/* Filled in with the calls of this KVM; valid until simkvm_destroy(). */
void simkvm_get_ops(struct simkvm *sim, struct snapd_kvm_ops *ret);

/* Within a step only; may not return (see above).  gpa must be a multiple of 8. */
uint64_t simkvm_load(struct simkvm_cpu *cpu, uint64_t gpa);
void simkvm_store(struct simkvm_cpu *cpu, uint64_t gpa, uint64_t value);
/* The rest of the step sees address space `as_id`, as a CPU in SMM does. */
void simkvm_enter_space(struct simkvm_cpu *cpu, uint32_t as_id);
/* Leave the guest before the next instruction, as at a signal for the VMM. */
void simkvm_leave(struct simkvm_cpu *cpu);

/* Any thread: KVM itself writes guest memory, in no vCPU's context, as arm64 does when
 * the tables of its interrupt controller are saved.  Logged in the slot's backup bitmap.
 * -EFAULT: no such memory. */
int simkvm_write(struct simkvm *sim, uint32_t as_id, uint64_t gpa, uint64_t value);

/* ---- for tests ---- */

/* Push an entry as KVM would; `slot` has the address space in its upper half.  The vCPU
 * must not be running.  -ENOSPC: the ring is full. */
int simkvm_push(struct simkvm *sim, uint32_t vcpu, uint32_t slot, uint64_t offset);
/* The next RESET of more than `entries` returns after them, the last `unprotected` of which
 * stay writable: what Linux 6.16 and later do when a signal is pending. */
void simkvm_interrupt_reset(struct simkvm *sim, uint32_t entries, uint32_t unprotected);
