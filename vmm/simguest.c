/* SPDX-License-Identifier: MIT */
/*
 * simguest: the guest's workload, compiled as host code for the simulated CPU.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "vmm/machine.h"
#include "vmm/simguest.h"
#include "vmm/simkvm.h"

#define WL_CPU		     struct simkvm_cpu *cpu
#define WL_CPU_ARG	     cpu,
#define WL_LOAD(gpa)	     simkvm_load(cpu, gpa)
#define WL_STORE(gpa, value) simkvm_store(cpu, gpa, value)
#include "vmm/guest/workload.h"

/* Some steps are in SMM: the same work by the other address space, and a word of SMRAM. */
static void step(struct simkvm_cpu *cpu, uint64_t rdi, void *opaque)
{
	struct machine *m = opaque;
	const struct options *opt = m->opt;
	uint64_t n;

	if (opt->smm) {
		n = simkvm_load(cpu, guest_ctl_gpa(rdi) + offsetof(struct guest_ctl, counter));
		if (n % opt->smm == 0) {
			simkvm_enter_space(cpu, 1);
			simkvm_store(cpu,
				     SMRAM_GPA + (n + rdi) % SMRAM_PAGES * GUEST_PAGE + rdi * 8, n);
		}
	}
	workload_step(cpu, rdi);
	lockstep_stepped(m, (uint32_t)rdi); /* a step that left is not at its end */
}

static bool may_step(uint64_t rdi, void *opaque)
{
	return lockstep_may_step(opaque, (uint32_t)rdi);
}

int simguest_open(struct machine *m)
{
	const struct simkvm_config config = {
		.step = step,
		.opaque = m,
		.may_step = m->opt->lockstep ? may_step : NULL,
		.backup_bitmap = true,
		.period_ns = m->opt->rate ? 1000000000u / m->opt->rate : 0,
	};
	int rc = simkvm_create(&config, &m->sim);

	if (rc == 0) {
		simkvm_get_ops(m->sim, &m->kvm);
		m->kvm_fd = simkvm_open(m->sim);
		rc = MIN(m->kvm_fd, 0);
	}
	if (rc)
		fprintf(stderr, "snapvm: simulated KVM: %s\n", strerror(-rc));
	return rc;
}

void simguest_close(struct machine *m)
{
	simkvm_destroy(m->sim);
	m->sim = NULL;
}
