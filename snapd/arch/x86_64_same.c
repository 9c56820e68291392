/* SPDX-License-Identifier: MIT */
/*
 * x86_64_same: do two saved records mean the same state?  Two saves of one vCPU
 * that never ran in between differ in some bytes all the same:
 *   clocks     the TSC, the LAPIC timer's current count, kvmclock, the PIT
 *   xstate_bv  a component in its initial configuration may be reported as in use
 *              or not; KVM_GET_XSAVE fills its bytes in either way, so the bytes decide
 * Pure.
 */
#include <linux/kvm.h>
#include <string.h>

#include "snapd/arch/x86_64.h"

#define LAPIC_TIMER_COUNT 0x390
#define MSR_TSC		  0x10
#define MSR_TSC_DEADLINE  0x6e0
#define XSTATE_BV	  512 /* in an XSAVE image */

static bool same_msrs(const struct kvm_msr_entry *a, const struct kvm_msr_entry *b, size_t nr)
{
	for (size_t i = 0; i < nr; i++) {
		bool runs = a[i].index == MSR_TSC || a[i].index == MSR_TSC_DEADLINE;

		if (a[i].index != b[i].index || (a[i].data != b[i].data && !runs))
			return false;
	}
	return true;
}

static bool same_but(const uint8_t *a, const uint8_t *b, size_t len, size_t at, size_t n)
{
	if (len < at + n)
		return !memcmp(a, b, len);
	return !memcmp(a, b, at) && !memcmp(a + at + n, b + at + n, len - at - n);
}

bool x86_same(const char *name, const void *a, const void *b, size_t len)
{
	if (!strcmp(name, "x86.clock") || !strcmp(name, "x86.pit2"))
		return true;
	if (!strcmp(name, "x86.msrs"))
		return same_msrs(a, b, len / sizeof(struct kvm_msr_entry));
	if (!strcmp(name, "x86.lapic"))
		return same_but(a, b, len, LAPIC_TIMER_COUNT, 4);
	if (!strcmp(name, X86_RECORD_XSAVE))
		return same_but(a, b, len, XSTATE_BV, 8);
	return !memcmp(a, b, len);
}
