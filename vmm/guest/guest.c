/* SPDX-License-Identifier: MIT */
/*
 * guest: the program that snapvm's vCPUs run: freestanding 64-bit C at CPL 3 over
 * identity page tables, no interrupts, no system calls.  It leaves the guest only by
 * stores to GUEST_MMIO_GPA, and by touching memory that is not there.
 *
 * In: RDI = vCPU index, RSP = top of its stack; everything else is in guest RAM.
 */
#define WL_CPU		     int cpu
#define WL_CPU_ARG	     0,
#define WL_LOAD(gpa)	     (*(volatile uint64_t *)(gpa))
#define WL_STORE(gpa, value) (*(volatile uint64_t *)(gpa) = (value))
#include "workload.h"

static uint64_t ticks(void)
{
	uint32_t lo, hi;

	__asm__ volatile("rdtsc" : "=a"(lo), "=d"(hi));
	return (uint64_t)hi << 32 | lo;
}

/* Wait until `due`; returns when the next step is due.  A clock that jumped (restored
 * elsewhere, or stopped for long) starts the pace anew. */
static uint64_t pace(uint64_t due, uint64_t period)
{
	uint64_t now = ticks();

	if (due - now > period)
		return now + period;
	while (due - now <= period) {
		__asm__ volatile("pause");
		now = ticks();
	}
	return due + period;
}

__attribute__((noreturn, section(".text.entry"))) void guest_entry(uint64_t vcpu)
{
	uint64_t period = WL_PARAM(pace_ticks), due = 0;

	for (;;) {
		workload_step(0, vcpu);
		if (period)
			due = pace(due, period);
	}
}
