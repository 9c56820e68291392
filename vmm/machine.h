/* SPDX-License-Identifier: MIT */
/*
 * machine: snapvm's one VM: RAM blocks, memslots, vCPUs, puncher, device.
 *
 * Threads: main (options, signals, status), one per vCPU, the puncher, the device,
 * and the agent's own, on which the callbacks of callbacks.c run.
 *
 * Guest memory is written by vCPUs; by the host threads under `write_lock`, which the
 * quiesce callback holds while the VM is paused; and by vCPU threads that apply a
 * store which hit a hole, which a pause waits for anyway.  Nobody holds `write_lock`
 * across snapd_vm_memslot(), since that waits for the end of a pause.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "include/snapd/agent.h"
#include "snapd/util/cleanup.h"
#include "vmm/guest/guest.h"
#include "vmm/options.h"

#define AREA_SLOT_IDS 16u
enum slot_id {
	SLOT_LOW = 0,
	SLOT_DIMM = 1,
	SLOT_SMRAM = 2, /* these three in address space 1 */
	SLOT_SMM_LOW = 3,
	SLOT_SMM_MAIN = 4,
	SLOT_AREA0 = 16, /* area i: SLOT_AREA0 + i * AREA_SLOT_IDS … */
};

struct ram_block {
	int fd;	   /* memfd, sealed against resizing; owned; -1 when there is none */
	void *hva; /* MAP_SHARED mapping of all of it; owned */
	size_t len_bytes;
};

/* A part of the main block that can be punched, moved and replaced by itself. */
struct area {
	uint64_t gpa;	     /* home */
	uint64_t window_gpa; /* where it is seen when moved */
	uint64_t nr_pages;
	pthread_mutex_t lock;	   /* backing, against stores into the hole while it is replaced */
	struct ram_block *backing; /* main or `own` */
	uint64_t backing_offset;   /* bytes */
	struct ram_block own;	   /* what replaced its part of the main block; else fd -1 */
	/* puncher's thread */
	uint64_t synced; /* layout_gen for which `ids` is true */
	uint32_t ids;	 /* bit i: slot id i of this area exists */
	uint32_t next_id;
};

struct vcpu {
	struct machine *machine;
	uint32_t index;
	int fd;
	struct snapd_vcpu *agent;
	pthread_t thread;
	bool started;
	_Atomic bool done;	     /* reached --writes */
	_Atomic uint64_t hole_loads; /* of this vCPU, done by the VMM */
	_Atomic uint64_t hole_stores;
};

#define SPARE_PAGES 64u
#define SMRAM_PAGES 16u
#define SMRAM_GPA   0x3fe00000ull /* there is nothing in address space 0 */

struct puncher;
struct device;
struct spare;
struct mirror;
struct epochs;
struct lockstep;
struct simkvm;

struct machine {
	const struct options *opt; /* borrowed */
	uint64_t page_size;	   /* the host's: what slots, marks and digests count in */
	bool restoring;		   /* memory and registers come from a snapshot */
	int kvm_fd, vm_fd;
	struct snapd_vm *agent;
	struct simkvm *sim;	  /* NULL on the kernel's KVM */
	struct snapd_kvm_ops kvm; /* what this file's own ioctls go through */

	struct ram_block low, main, dimm, smram;
	uint64_t spare_gpa; /* SPARE_PAGES of the low block, and one more */
	struct area areas[GUEST_MAX_AREAS];
	uint32_t nr_areas;
	struct guest_params params; /* as written to the guest */
	struct vcpu vcpus[GUEST_MAX_VCPUS];

	pthread_mutex_t write_lock;
	_Atomic uint64_t layout_gen; /* counts loads: rollbacks and restores */
	_Atomic bool started;	     /* every thread runs */
	_Atomic bool stopping;
	_Atomic bool live;  /* host threads may write guest memory: false until a restore is done */
	_Atomic bool fatal; /* see machine_fail() */
	pthread_mutex_t fail_lock;
	char failure[256]; /* first one counts; fail_lock */

	struct puncher *puncher;
	struct device *device;
	struct spare *spare;
	struct mirror *mirror;
	struct epochs *epochs;
	struct lockstep *lockstep;
};

/* machine.c */
int machine_create(struct machine *m, const struct options *opt);
int machine_start(struct machine *m);
void machine_stop(struct machine *m); /* every thread has ended when it returns */
void machine_destroy(struct machine *m);
/* Any thread: the guest or the VMM broke; remembered, and the main loop ends. */
void machine_fail(struct machine *m, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
int machine_ioctl(struct machine *m, int fd, unsigned long request, void *arg);

/* ram.c: blocks, memslots, and what lies behind an address. */
int ram_create(struct machine *m);
void ram_destroy(struct machine *m);
int ram_block_create(struct ram_block *b, const char *name, size_t len_bytes,
		     enum ram_backing backing);
void ram_block_destroy(struct ram_block *b);
int ram_map_slot(struct machine *m, uint32_t as_id, uint32_t slot, uint64_t gpa,
		 const struct ram_block *b, uint64_t offset, uint64_t len_bytes);
int ram_unmap_slot(struct machine *m, uint32_t slot, uint32_t flags);
/* A u64 of the low block, as the guest sees it. */
_Atomic uint64_t *ram_word(struct machine *m, uint64_t gpa);
/* Host threads: store a u64 of the low block and tell the agent; takes write_lock. */
void ram_store_marked(struct machine *m, uint64_t gpa, uint64_t value);
/* vCPU threads: do an access that hit a hole.  -EFAULT: nothing was ever there. */
int ram_hole_load(struct machine *m, uint64_t gpa, void *data, size_t len);
int ram_hole_store(struct machine *m, uint64_t gpa, const void *data, size_t len);
struct area *ram_area_of(struct machine *m, uint64_t gpa, uint64_t *offset);
/* What the guest has in a struct guest_ctl of its own, for reports. */
uint64_t ram_ctl(struct machine *m, uint32_t vcpu, size_t field);
#define MACHINE_CTL(m, vcpu, field) ram_ctl(m, vcpu, offsetof(struct guest_ctl, field))

/* guest_load.c: program, page tables, parameters into RAM; registers of a vCPU. */
int guest_load(struct machine *m);
int guest_set_vcpu(struct machine *m, struct vcpu *v);

/* vcpu.c */
int vcpu_create(struct machine *m, uint32_t index);
int vcpu_start(struct vcpu *v);
void vcpu_join(struct vcpu *v);

/* punch.c */
struct punch_stats {
	uint64_t ops[PUNCH_NR_PATTERNS];
	uint64_t total;
};
int punch_start(struct machine *m); /* nothing to do without --punch */
void punch_stop(struct machine *m);
void punch_get_stats(struct machine *m, struct punch_stats *ret);
/* vCPU 0's thread, at the guest's call: what must be done in one piece. */
void punch_on_call(struct machine *m);
void punch_on_eject(struct machine *m);
void punch_on_plug(struct machine *m);
int punch_save(struct machine *m, struct snapd_state_writer *w);
int punch_load(struct machine *m, const struct snapd_state_reader *r);
/* Agent's thread: the memslots are these now. */
void punch_layout(struct machine *m, const struct snapd_memslot *slots, size_t nr);

void punch_step(struct machine *m); /* --lockstep: one change, or a part of one */

/* device.c */
int device_start(struct machine *m); /* nothing to do without --device */
void device_stop(struct machine *m);
void device_step(struct machine *m); /* one page; no --device: nothing */
uint64_t device_writes(struct machine *m);
int device_save(struct machine *m, struct snapd_state_writer *w);
int device_load(struct machine *m, const struct snapd_state_reader *r);

/* spare.c */
int spare_start(struct machine *m); /* nothing to do without --vhost, --balloon, --disk */
void spare_stop(struct machine *m);
void spare_step(struct machine *m); /* one page of one kind */
void spare_get(struct machine *m, uint64_t *writes, uint64_t *discards);
int spare_save_tables(struct machine *m);

/* mirror.c */
int mirror_start(struct machine *m); /* nothing to do without --mirror */
void mirror_stop(struct machine *m);
void mirror_destroy(struct machine *m);
uint64_t mirror_checks(struct machine *m);

/* epochs.c */
int epochs_start(struct machine *m); /* nothing to do without --epoch-ms */
void epochs_stop(struct machine *m);
void epochs_get(struct machine *m, uint64_t *nr, uint64_t *pages);

/* lockstep.c */
int lockstep_start(struct machine *m); /* nothing to do without --lockstep */
void lockstep_stop(struct machine *m);
/* Moves made so far: what stands for the time. */
uint64_t lockstep_clock(struct machine *m);
/* vCPU threads: may it begin a step; it has ended one. */
bool lockstep_may_step(struct machine *m, uint32_t vcpu);
void lockstep_stepped(struct machine *m, uint32_t vcpu);

/* digest.c: SHA-256 over all RAM, as snapd/upkeep/verify.h defines it. */
int digest_save(struct machine *m, struct snapd_state_writer *w);

/* callbacks.c */
extern const struct snapd_vm_callbacks machine_callbacks;

/* report.c */
int report_status(struct machine *m, const char *path, double seconds);
void report_final(struct machine *m, double seconds);
