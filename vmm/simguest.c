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

static void step(struct simkvm_cpu *cpu, uint64_t rdi, void *opaque)
{
	workload_step(cpu, rdi);
}

int simguest_open(struct machine *m)
{
	const struct simkvm_config config = {
		.step = step,
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
