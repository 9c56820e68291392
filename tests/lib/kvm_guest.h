/* SPDX-License-Identifier: MIT */
/*
 * kvm_guest: a small real guest for tests: 64-bit code at CPL 3 in long mode,
 * which runs natively on every kind of x86 KVM, also on one without VMX or SVM.
 *
 * The guest's code is C in the test itself: functions marked GUEST_FN land in a
 * section of their own, which is copied into the guest.  They may call each
 * other, but touch no global data and call nothing else (not even a memcpy that
 * the compiler makes up: write through volatile).  A guest function gets up to
 * four numbers, has a small stack, and must never return; it talks to the host
 * by MMIO:
 *
 *   guest_tell(v)   a store: kvm_guest_run() returns, kvm_guest_told() has v
 *   guest_ask()     a load: kvm_guest_answer() before the next run gives it
 *
 * Guest-physical memory, all identity mapped up to 12 GiB:
 *   0 .. 2 MiB      page tables, code, stacks: slot SYS, never dirty-logged, so
 *                   that rings hold nothing but what a test is about
 *   DATA_GPA ..     config.data_bytes of a memfd; the test makes slots over it
 *   EXIT_GPA        no memory: MMIO
 * Accessed and dirty bits are set in advance: walks write no page tables.
 */
#pragma once

#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
#include <stddef.h>

#define KVM_GUEST_SYS_SLOT  500
#define KVM_GUEST_SYS_BYTES (2ull << 20)
#define KVM_GUEST_CODE_GPA  0x10000ull
#define KVM_GUEST_PML4_GPA  0x1000ull
#define KVM_GUEST_MAP_GIB   12ull /* page tables end where the code begins */
#define KVM_GUEST_DATA_GPA  0x10000000ull
#define KVM_GUEST_EXIT_GPA  0xd0000000ull
#define KVM_GUEST_MAX_VCPUS 4
#define KVM_GUEST_PAGE	    4096ull

#if defined(__clang__)
#define GUEST_NO_SAN no_sanitize("address", "undefined", "thread")
#else
#define GUEST_NO_SAN no_sanitize("address"), no_sanitize("undefined"), no_sanitize("thread")
#endif
#define GUEST_FN \
	__attribute__((section("guest_text"), noinline, used, no_stack_protector, GUEST_NO_SAN))
#define guest_tell(v)	    (*(volatile uint64_t *)KVM_GUEST_EXIT_GPA = (v))
#define guest_ask()	    (*(volatile uint64_t *)KVM_GUEST_EXIT_GPA)
#define guest_write(gpa, v) (*(volatile uint64_t *)(gpa) = (v))
#define guest_read(gpa)	    (*(volatile uint64_t *)(gpa))

struct kvm_guest_config {
	uint32_t ring_entries; /* per vCPU; 0: no ring */
	uint64_t data_bytes;   /* 0: no data memory */
	int data_fd;	       /* behind it, borrowed; 0: a file of its own */
	bool irqchip;	       /* in-kernel interrupt controller and timer */
	bool no_slots;	       /* the test makes SYS's slot, too */
};

struct kvm_guest_vcpu {
	int fd;
	struct kvm_run *run;	    /* mapped */
	struct kvm_dirty_gfn *ring; /* mapped; NULL without rings */
	uint32_t next;		    /* first entry of the ring not yet looked at */
};

struct kvm_guest {
	int kvm_fd, vm_fd;
	int sys_fd;    /* memfd behind `sys` */
	int data_fd;   /* memfd behind `data`; -1 without */
	uint8_t *sys;  /* MAP_SHARED mapping of sys_fd */
	uint8_t *data; /* MAP_SHARED mapping of data_fd */
	uint64_t data_bytes;
	uint32_t ring_entries;
	int run_bytes;
	uint32_t nr_vcpus;
	struct kvm_guest_vcpu vcpus[KVM_GUEST_MAX_VCPUS];
};

/* All of these: 0 (or what is said) or -errno. */

/* -ENODEV without a usable /dev/kvm; -ENOTSUP: no ring of that size. */
int kvm_guest_create(struct kvm_guest *g, const struct kvm_guest_config *config);
void kvm_guest_destroy(struct kvm_guest *g);
/* KVM_SET_USER_MEMORY_REGION as it is. */
int kvm_guest_slot(struct kvm_guest *g, uint32_t slot, uint32_t flags, uint64_t gpa,
		   uint64_t size_bytes, void *hva);
/* The next vCPU, ready to run fn(a, b, c, d); returns its index. */
int kvm_guest_add_vcpu(struct kvm_guest *g, void (*fn)(void), uint64_t a, uint64_t b, uint64_t c,
		       uint64_t d);
/* Let vCPU i begin fn(a, b, c, d), wherever it stood.  GUEST_CALL casts. */
int kvm_guest_start(struct kvm_guest *g, uint32_t i, void (*fn)(void), uint64_t a, uint64_t b,
		    uint64_t c, uint64_t d);
#define GUEST_CODE(fn) ((void (*)(void))(fn))
/* KVM_RUN: the exit reason, or -errno. */
int kvm_guest_run(struct kvm_guest *g, uint32_t i);
/* Was the last exit a guest_tell()? */
bool kvm_guest_told(const struct kvm_guest *g, uint32_t i, uint64_t *value);
bool kvm_guest_asked(const struct kvm_guest *g, uint32_t i);
void kvm_guest_answer(struct kvm_guest *g, uint32_t i, uint64_t value);

/* Mark the vCPU's dirty entries harvested, copying at most `max` to out[] (which
 * may be NULL); returns how many. */
uint32_t kvm_guest_harvest(struct kvm_guest *g, uint32_t i, struct kvm_dirty_gfn *out,
			   uint32_t max);
/* KVM_RESET_DIRTY_RINGS once: the count that it returns. */
int kvm_guest_reset_rings(struct kvm_guest *g);
/* KVM_CHECK_EXTENSION on the VM. */
int kvm_guest_cap(struct kvm_guest *g, uint32_t cap);
