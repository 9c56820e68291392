/* SPDX-License-Identifier: MIT */
/* simkvm_internal: what simkvm.c (rings, ioctls), simkvm_slots.c (memory) and simkvm_cpu.c
 * (the CPU and its registers) share. */
#pragma once

#include <assert.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/types.h>

#include "vmm/simkvm.h"

#define SIM_SPACES	2u
#define SIM_SLOT_IDS	32764u
#define SIM_RING_PAGE	64u /* KVM_DIRTY_LOG_PAGE_OFFSET of x86 */
#define SIM_STATE_KINDS 6u

struct sim_slot {
	uint32_t id; /* as_id << 16 | id */
	uint32_t flags;
	uint64_t gfn, nr_pages;
	uint8_t *hva;
	/* A bit per page.  Set by vCPUs under their own lock, cleared under slots_lock. */
	_Atomic uint64_t *writable; /* a store needs no entry */
	_Atomic uint64_t *present;  /* a load needs none either */
	_Atomic uint64_t *backup;   /* written without a vCPU; NULL: not logged */
};

/* Slots in force.  Replaced as a whole; freed once no vCPU can be looking. */
struct sim_slots {
	uint32_t nr;
	struct sim_slot *slots[];
};

/* What a step has loaded: exactly the 4096 bytes of struct kvm_xsave. */
struct sim_log {
	uint64_t nr;
	uint64_t values[SIMKVM_STEP_LOADS];
};
static_assert(sizeof(struct sim_log) == sizeof(struct kvm_xsave), "travels as XSAVE");

enum sim_owed { OWED_NOTHING, OWED_LOAD, OWED_STORE };

struct simkvm_cpu {
	struct simkvm *sim;
	uint32_t id;
	dev_t dev;
	ino_t ino;
	struct kvm_run *run;	    /* our mapping of the vCPU's file */
	struct kvm_dirty_gfn *ring; /* likewise; NULL without rings */
	size_t map_bytes;
	/* Held over one access, from looking at the slot to the store: taking it once
	 * (cpus_synchronize()) is what a TLB flush is to a real CPU. */
	pthread_mutex_t lock;
	uint32_t dirty_index;	      /* lock */
	_Atomic uint32_t reset_index; /* slots_lock */
	/* the thread in KVM_RUN, or whoever gets and sets state while there is none */
	struct kvm_regs regs; /* rax: instructions of this step done */
	struct sim_log log;
	uint64_t at;	/* next instruction of the step */
	uint64_t loads; /* next entry of the log, while the step is run again */
	uint32_t space; /* address space of this part of the step */
	enum sim_owed owed;
	jmp_buf leave;
	void *state[SIM_STATE_KINDS]; /* blobs that are kept and never looked at */
	struct kvm_cpuid2 *cpuid;
	uint64_t next_step_ns;
};

struct simkvm {
	struct simkvm_config config;
	uint64_t page_size; /* the host's, as KVM's is */
	dev_t dev;
	ino_t kvm_ino, vm_ino;		   /* 0: not made */
	pthread_mutex_t slots_lock;	   /* memslots, RESET, vCPU creation */
	_Atomic(struct sim_slots *) slots; /* slots_lock to change, cpu.lock to look */
	uint32_t ring_entries;		   /* 0: rings off */
	bool keep_on_delete;		   /* SLOT_ZAP_ALL disabled */
	bool with_backup;		   /* backup bitmaps enabled */
	struct simkvm_cpu *cpus[SIMKVM_MAX_VCPUS];
	_Atomic uint32_t nr_cpus;
	uint32_t cut_entries, cut_unprotected; /* simkvm_interrupt_reset(); slots_lock */
};

/* simkvm.c */
bool sim_ring_soft_full(struct simkvm_cpu *cpu);
/* cpu->lock held.  -ENOSPC: no room. */
int sim_ring_push(struct simkvm_cpu *cpu, uint32_t slot, uint64_t offset);

/* simkvm_slots.c; all but sim_touch() under slots_lock */
enum sim_touch { TOUCH_LOAD, TOUCH_STORE };
/* cpu->lock held: the host address of gpa, after pushing what has to be pushed; NULL: no
 * such memory, or not for writing. */
void *sim_touch(struct simkvm_cpu *cpu, uint64_t gpa, enum sim_touch how);
void sim_synchronize(struct simkvm *sim); /* K2 */
int sim_set_memory_region(struct simkvm *sim, const struct kvm_userspace_memory_region *r);
int sim_get_dirty_log(struct simkvm *sim, const struct kvm_dirty_log *log);
/* The slot may be gone, or smaller than it was: then there is nothing to protect. */
void sim_protect_page(struct simkvm *sim, uint32_t slot, uint64_t offset);
void sim_slot_free(struct sim_slot *s); /* accepts NULL */

/* simkvm_cpu.c: 0.. or -errno. */
int sim_cpu_create(struct simkvm *sim, uint32_t id);
void sim_cpu_destroy(struct simkvm_cpu *cpu);
int sim_cpu_ioctl(struct simkvm_cpu *cpu, unsigned long request, void *arg);
int sim_cpuid_supported(struct kvm_cpuid2 *c);
