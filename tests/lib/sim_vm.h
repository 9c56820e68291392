/* SPDX-License-Identifier: MIT */
/*
 * sim_vm: a VM on the simulated KVM under libsnapd-agent, driven by a test.  A vCPU
 * does what it is given, a list of stores, on a thread that lasts as long as the list;
 * so with one list at a time everything that happens is repeatable.
 *
 * Every call ends the test when something is not as it must be.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include <linux/kvm.h>

#include "snapd/agent.h"
#include "vmm/simkvm.h"

#define SIM_VM_VCPUS 8u

struct sim_store {
	uint32_t as_id;
	uint64_t gpa, value;
};

struct sim_vm;
struct sim_vcpu {
	struct sim_vm *vm;
	struct snapd_vcpu *agent;
	int fd;
	pthread_t thread;
	/* its thread, while there is one */
	const struct sim_store *stores; /* borrowed until sim_vm_join() */
	uint32_t nr, at;
};

struct sim_vm_config {
	uint32_t nr_vcpus, ring_entries;
	uint32_t harvest_us; /* both ends of the pacing */
	bool backup_bitmap;
	const struct snapd_vm_callbacks *callbacks;
	void *opaque;
	/* On the vCPU's thread: a store hit no memory. */
	void (*mmio)(struct sim_vm *vm, const struct sim_store *store);
};

struct sim_vm {
	struct simkvm *sim;
	struct snapd_kvm_ops ops;
	int kvm_fd, vm_fd, listen_fd;
	char dir[64], socket[96];
	struct snapd_vm *agent;
	struct sim_vm_config config;
	struct sim_vcpu vcpus[SIM_VM_VCPUS];
};

void sim_vm_create(struct sim_vm *vm, const struct sim_vm_config *config);
void sim_vm_destroy(struct sim_vm *vm);
/* Have vCPU `i` do `nr` stores: begin, and wait for the end; run: both. */
void sim_vm_begin(struct sim_vm *vm, uint32_t i, const struct sim_store *stores, uint32_t nr);
void sim_vm_join(struct sim_vm *vm, uint32_t i);
void sim_vm_run(struct sim_vm *vm, uint32_t i, const struct sim_store *stores, uint32_t nr);
