/* SPDX-License-Identifier: MIT */
/*
 * x86_64: what its files share.  x86_64.c saves and loads a VM's state;
 * x86_64_host.c describes the host and judges whether it can run a snapshot;
 * x86_64_same.c compares records.
 */
#pragma once

#include <linux/kvm.h>
#include <stdint.h>
#include <stddef.h>

#include "snapd/arch/arch.h"

#define X86_CPUID_MAX 256  /* KVM_MAX_CPUID_ENTRIES */
#define X86_MSRS_MAX  4096 /* far above what any KVM lists */

#define X86_RECORD_CPUID   "x86.cpuid"
#define X86_RECORD_TSC_KHZ "x86.tsc_khz"
#define X86_RECORD_XSAVE   "x86.xsave"

bool x86_shadows(const struct arch_vm *vm, const struct snapd_state_reader *r);
bool x86_same(const char *name, const void *a, const void *b, size_t len);

/* One CPUID leaf in "x86.cpuid" and "host.x86.cpuid". */
struct x86_cpuid_entry {
	uint32_t function;
	uint32_t index;
	uint32_t flags; /* KVM_CPUID_FLAG_* */
	uint32_t eax, ebx, ecx, edx;
};
static_assert(sizeof(struct x86_cpuid_entry) == 28, "disk format");

static inline struct x86_cpuid_entry x86_cpuid_pack(const struct kvm_cpuid_entry2 *k)
{
	return (struct x86_cpuid_entry){k->function, k->index, k->flags, k->eax,
					k->ebx,	     k->ecx,   k->edx};
}

static inline void x86_cpuid_unpack(const struct x86_cpuid_entry *p, struct kvm_cpuid_entry2 *k)
{
	*k = (struct kvm_cpuid_entry2){.function = p->function,
				       .index = p->index,
				       .flags = p->flags,
				       .eax = p->eax,
				       .ebx = p->ebx,
				       .ecx = p->ecx,
				       .edx = p->edx};
}

/* Clear what KVM itself keeps up to date while the guest runs (OSXSAVE follows
 * CR4, for one), so that two CPUIDs may be compared. */
void x86_cpuid_clear_runtime(struct x86_cpuid_entry *p);

int x86_host_save(const struct arch_vm *vm, struct snapd_state_writer *w, struct err *e);
int x86_host_check(const struct arch_vm *vm, const struct snapd_state_reader *here,
		   const struct snapd_state_reader *r, struct err *e);
