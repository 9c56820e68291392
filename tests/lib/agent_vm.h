/* SPDX-License-Identifier: MIT */
/*
 * agent_vm: the small guest of kvm_guest.h under libsnapd-agent.
 *
 * Every call ends the test when something is not as it must be.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "snapd/agent.h"
#include "tests/lib/fake_service.h"
#include "tests/lib/kvm_guest.h"

#define AGENT_VM_SYS_SLOT  0
#define AGENT_VM_DATA_SLOT 1

struct agent_vcpu {
	struct agent_vm *vm;
	struct snapd_vcpu *v;
	pthread_t thread;
	uint32_t index;
	_Atomic uint64_t exits, interrupted;
	_Atomic bool leave;    /* at the next -EINTR: end the thread */
	_Atomic uint64_t told; /* value of the last guest_tell() */
	_Atomic int result;    /* of the run call that ended the thread */
	_Atomic bool running;  /* the thread is in its loop */
};

struct agent_vm {
	struct kvm_guest g;
	struct snapd_vm *vm;
	struct agent_vcpu vcpus[KVM_GUEST_MAX_VCPUS];
	char dir[64], socket[96];
	int listen_fd;
	/* set before start: what to do with an MMIO exit that is no guest_tell() */
	void (*mmio)(struct agent_vcpu *v, struct kvm_run *run);
};

struct agent_vm_config {
	uint32_t ring_entries;
	uint32_t harvest_us; /* both ends of the pacing; 0: default */
	uint64_t data_bytes;
	int data_fd;	/* as kvm_guest_config has it */
	uint32_t flags; /* SNAPD_ATTACH_* */
	uint32_t dirty; /* SNAPD_DIRTY_* */
	const char *restore;
	const struct snapd_vm_callbacks *callbacks;
	const struct snapd_kvm_ops *kvm;
	void *opaque;
	bool no_data_slot;
	bool no_sys_slot; /* the test makes it */
};

/* The ways of dirty tracking that a test can be run with. */
struct agent_backend {
	const char *name;
	uint32_t dirty, flags; /* SNAPD_DIRTY_*, SNAPD_ATTACH_* */
	bool hide_protect2;    /* the test's KVM has no MANUAL_DIRTY_LOG_PROTECT2 */
};
const struct agent_backend *agent_backend(const char *name); /* ends the test: unknown */

/* Skips the test without /dev/kvm. */
void agent_vm_create(struct agent_vm *a, const struct agent_vm_config *config);
/* Add a vCPU that will run fn(x, y, z, w). */
void agent_vm_add(struct agent_vm *a, void (*fn)(void), uint64_t x, uint64_t y, uint64_t z,
		  uint64_t w);
void agent_vm_start(struct agent_vm *a, uint32_t i); /* its thread */
void agent_vm_stop(struct agent_vm *a);		     /* all vCPU threads, joined */
void agent_vm_destroy(struct agent_vm *a);
/* Data pages [page, page + n) at DATA_GPA + page, or wherever. */
int agent_vm_slot(struct agent_vm *a, uint32_t slot, uint64_t gpa, uint64_t page, uint64_t n);
int agent_vm_unslot(struct agent_vm *a, uint32_t slot, uint16_t flags);
/* Wait up to 20 s for a condition. */
#define wait_until(cond)                                      \
	do {                                                  \
		for (int _i = 0; _i < 20000 && !(cond); _i++) \
			usleep(1000);                         \
		check(cond, "waited 20 s in vain");           \
	} while (0)

/* ---- the service's side, fake_service.h ---- */
/* Accept, read HELLO; no answer yet. */
void fake_accept(struct agent_vm *a, struct fake_service *s);
void fake_open(struct agent_vm *a, struct fake_service *s); /* to READY */
