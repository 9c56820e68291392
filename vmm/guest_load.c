/* SPDX-License-Identifier: MIT */
/*
 * guest_load: what lies in the guest's memory and registers before it first runs.
 *
 * The vCPU starts in 64-bit mode at CPL 3 over identity page tables: user code runs
 * natively on every KVM, also on those that emulate kernel code.  The simulated CPU
 * takes RDI from the same calls and has no use for the rest.
 */
#include <errno.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>

#include "vmm/machine.h"

static void load_params(struct machine *m, uint64_t tsc_hz)
{
	const struct options *opt = m->opt;
	struct guest_params *p = &m->params;

	p->workload = opt->workload;
	p->plain = opt->plain;
	p->nr_vcpus = opt->nr_vcpus;
	p->max_writes = opt->max_writes;
	p->hot_pages = MAX(opt->hot_pages / opt->nr_vcpus, (uint64_t)1);
	p->hot_percent = opt->hot_percent;
	p->pace_ticks = opt->rate ? tsc_hz / opt->rate : 0;
	memcpy((char *)m->low.hva + GUEST_PARAMS_GPA, p, sizeof(*p));
}

static void load_state(struct machine *m)
{
	struct guest_shared *shared = (void *)((char *)m->low.hva + GUEST_SHARED_GPA);
	uint32_t i;

	shared->dimm_want = shared->dimm_on = m->params.dimm_pages > 0;
	for (i = 0; i < m->nr_areas; i++)
		shared->area_gpa[i] = m->areas[i].gpa;
	for (i = 0; i < m->opt->nr_vcpus; i++) {
		struct guest_ctl *ctl = (void *)((char *)m->low.hva + guest_ctl_gpa(i));

		ctl->rng = guest_mix(m->opt->seed + i + 1) | 1;
		ctl->dimm_seen = shared->dimm_want;
	}
}

extern const char guest_blob[], guest_blob_end[];

#define PTE_PRESENT 0x1ull
#define PTE_WRITE   0x2ull
#define PTE_USER    0x4ull
#define PTE_LARGE   0x80ull
#define PTE_TABLE   (PTE_PRESENT | PTE_WRITE | PTE_USER)

/* Identity, 2 MiB pages; accessed and dirty are preset so that the processor does not
 * write to the tables. */
static void load_page_tables(struct machine *m)
{
	uint64_t *pml4 = (uint64_t *)((char *)m->low.hva + GUEST_PT_GPA);
	uint64_t *pdpt = pml4 + 512, *pd = pml4 + 1024;
	uint64_t i;

	pml4[0] = (GUEST_PT_GPA + GUEST_PAGE) | PTE_TABLE | 0x20;
	for (i = 0; i < GUEST_MAX_GIB; i++)
		pdpt[i] = (GUEST_PT_GPA + (2 + i) * GUEST_PAGE) | PTE_TABLE | 0x20;
	for (i = 0; i < GUEST_MAX_GIB * 512; i++)
		pd[i] = i << 21 | PTE_TABLE | PTE_LARGE | 0x60;
}

static int load_program(struct machine *m, uint64_t *tsc_hz)
{
	int khz;

	memcpy((char *)m->low.hva + GUEST_CODE_GPA, guest_blob,
	       (size_t)(guest_blob_end - guest_blob));
	load_page_tables(m);
	khz = machine_ioctl(m, m->vcpus[0].fd, KVM_GET_TSC_KHZ, NULL);
	*tsc_hz = khz > 0 ? khz * 1000ull : 1000000000ull;
	return 0;
}

static int set_cpuid(struct machine *m, struct vcpu *v)
{
	const uint32_t max = 256;
	_cleanup_free_ struct kvm_cpuid2 *cpuid =
		calloc(1, sizeof(*cpuid) + max * sizeof(cpuid->entries[0]));
	int rc;

	if (!cpuid)
		return -ENOMEM;
	cpuid->nent = max;
	rc = machine_ioctl(m, m->kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid);
	return rc < 0 ? rc : machine_ioctl(m, v->fd, KVM_SET_CPUID2, cpuid);
}

static void user_segments(struct kvm_sregs *s)
{
	const struct kvm_segment data = {.limit = 0xffffffff,
					 .selector = 0x2b,
					 .type = 3,
					 .present = 1,
					 .dpl = 3,
					 .db = 1,
					 .s = 1,
					 .g = 1};

	s->cs = (struct kvm_segment){.limit = 0xffffffff,
				     .selector = 0x33,
				     .type = 11,
				     .present = 1,
				     .dpl = 3,
				     .s = 1,
				     .l = 1,
				     .g = 1};
	s->ds = s->es = s->ss = s->fs = s->gs = data;
	s->tr = (struct kvm_segment){.limit = 0x67, .type = 11, .present = 1};
	s->ldt = (struct kvm_segment){.type = 2, .unusable = 1};
	s->cr0 = 0x80050033; /* PG AM WP NE ET MP PE */
	s->cr3 = GUEST_PT_GPA;
	s->cr4 = 0x20;	 /* PAE */
	s->efer = 0xd01; /* NXE LMA LME SCE */
}

int guest_set_vcpu(struct machine *m, struct vcpu *v)
{
	struct kvm_regs regs = {.rip = GUEST_CODE_GPA,
				.rsp = GUEST_STACK_GPA + (v->index + 1) * GUEST_STACK_BYTES - 8,
				.rdi = v->index,
				.rflags = 2};
	struct kvm_sregs sregs;
	int rc = set_cpuid(m, v);

	if (rc == 0)
		rc = machine_ioctl(m, v->fd, KVM_GET_SREGS, &sregs);
	if (rc == 0) {
		user_segments(&sregs);
		rc = machine_ioctl(m, v->fd, KVM_SET_SREGS, &sregs);
	}
	if (rc == 0)
		rc = machine_ioctl(m, v->fd, KVM_SET_REGS, &regs);
	if (rc)
		fprintf(stderr, "snapvm: cannot set up vCPU %u: %s\n", v->index, strerror(-rc));
	return rc;
}

int guest_load(struct machine *m)
{
	uint64_t tsc_hz;
	int rc = load_program(m, &tsc_hz);

	if (rc == 0) {
		load_params(m, tsc_hz);
		load_state(m);
	}
	return rc;
}
