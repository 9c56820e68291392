/* SPDX-License-Identifier: MIT */
/*
 * x86_kvm: a scripted KVM with everything that x86_64 state asks for, and the MSRs and the
 * CPUID behind it.  One VM with one vCPU, whose descriptors are 4 and 5; one thread.
 */
#pragma once

#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "snapd/arch/arch.h"
#include "snapd/arch/host.h"
#include "tests/lib/scripted_kvm.h"

#define KHZ	2500000
#define NR_MSRS 7u

extern struct scripted_kvm kvm;
extern struct kvm_run run;
extern const struct arch_vm vm;
extern uint8_t filler[SCRIPT_BYTES]; /* of every fixed record */
extern struct kvm_cpuid2 *vcpu_cpuid, *host_cpuid;
extern struct fake_msr {
	uint32_t index;
	uint64_t value;
	bool no_get, no_set;
} msrs[NR_MSRS];
extern uint32_t set_log[64]; /* MSRs in the order in which they were set */
extern size_t nr_set_log;

#define FIXED(name, type)                                                       \
	do {                                                                    \
		scripted_answer(&kvm, KVM_GET_##name, 0, filler, sizeof(type)); \
		scripted_answer(&kvm, KVM_SET_##name, 0, NULL, 0);              \
	} while (0)

void x86_kvm_init(void); /* first; deinit: last */
void x86_kvm_deinit(void);
long msr_find(uint32_t index); /* in msrs[]; -1: unknown */
int irqchip_get(void *opaque, void *arg);
/* A KVM with everything, anew. */
void script_everything(void);
int save(struct snapd_state_writer *w, struct err *e);
int load(struct snapd_state_writer *w, struct err *e);
int host_check(struct snapd_state_writer *w, struct err *e);
/* Save on a whole KVM, into *w. */
void saved(struct snapd_state_writer *w);
/* r is `want`, and the reason has the word. */
void expect_refused(int r, int want, const struct err *e, const char *word);
