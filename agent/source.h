/* SPDX-License-Identifier: MIT */
/*
 * source: whatever tells which frames were written.  The rest of the agent asks
 * "the sources" and does not know which there are.
 *
 *   ring.c      KVM's dirty rings, one per vCPU
 *   dirtylog.c  KVM's dirty bitmaps, one per memslot
 *   pagemap.c   the kernel's page tables, by PAGEMAP_SCAN
 *
 * vm.sources[0] sees what vCPUs write; those after it see more, such as what the VMM's
 * devices write.  A frame is dirty when any source says so.
 *
 * Life, and what is held at each call.  A member that is NULL has nothing to do.
 *
 *   attach        no vCPU, no slot yet.  -ENOTSUP: not on this host
 *   vcpu_attach   the vCPU is in no list yet, and has not run
 *   slot_adding   slots_lock; KVM gets the slot right after, and from then on vCPUs may
 *                 write through it: a harvest must know of the slot before it exists
 *   slot_cancelled  slots_lock; KVM did not take the slot, or a source did not
 *   slot_deleting slots_lock; KVM still has the slot.  Read what would go with it.
 *   slot_deleted  slots_lock; with what KVM said.  Follows slot_deleting always, in the
 *                 reverse order of the sources
 *   ram_adding, ram_gone  slots_lock; a block of RAM, whatever of it slots show
 *   frames_gone   slots_lock; the frames are nobody's any more, and a harvest was: none that it
 *                 would tell of again may be left
 *   look          harvest_lock; how full, in eighths of where a harvest is due; none of
 *                 the sources has it: nobody looks
 *   harvest       harvest_lock, vCPUs may run: all that was written before it began is in
 *                 every set when it returns, and whatever is written after its frame was
 *                 set will be told again (I1).  0, -errno, or HARVEST_PARTIAL
 *   pause         slots_lock and harvest_lock; vCPUs and devices stopped: as harvest, and
 *                 with it what is safe only then.  NULL: harvest is good enough.  After a
 *                 LOAD too, once slots are what the snapshot had
 *   full          a vCPU's own thread, no lock: KVM said that the vCPU cannot go on before
 *                 a harvest.  0, or -errno: it never can
 *   vcpu_detach, detach   accept what was never attached
 *
 * A harvest that fails has to set every frame.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "include/snapd/agent.h"

struct err;
struct ram;
struct view;

/* The source keeps entries back, so slot ids must not be used again yet. */
#define HARVEST_PARTIAL 1
#define SOURCES_MAX	4u

struct dirty_ops {
	enum snapd_dirty backend;
	int (*attach)(struct snapd_vm *vm, struct err *e);
	void (*detach)(struct snapd_vm *vm);
	int (*vcpu_attach)(struct snapd_vcpu *v, struct err *e);
	void (*vcpu_detach)(struct snapd_vcpu *v);
	int (*slot_adding)(struct snapd_vm *vm, const struct view *v, struct err *e);
	void (*slot_cancelled)(struct snapd_vm *vm, const struct view *v);
	void (*slot_deleting)(struct snapd_vm *vm, const struct view *v);
	void (*slot_deleted)(struct snapd_vm *vm, const struct view *v, int result);
	int (*ram_adding)(struct snapd_vm *vm, const struct ram *r, struct err *e);
	void (*ram_gone)(struct snapd_vm *vm, const struct ram *r);
	void (*frames_gone)(struct snapd_vm *vm, uint64_t first, uint64_t n);
	uint32_t (*look)(struct snapd_vm *vm);
	int (*harvest)(struct snapd_vm *vm);
	int (*pause)(struct snapd_vm *vm);
	int (*full)(struct snapd_vcpu *v);
};

extern const struct dirty_ops ring_ops, log_ops, pagemap_ops;

/* source.c.  attach makes vm.sources from what the configuration wants. */
bool dirty_is_known(uint32_t backend); /* SNAPD_DIRTY_*, AUTO among them */
/* Each call to all sources, under what is said above. */
int sources_attach(struct snapd_vm *vm, struct err *e);
void sources_detach(struct snapd_vm *vm);
int sources_vcpu_attach(struct snapd_vcpu *v, struct err *e);
void sources_vcpu_detach(struct snapd_vcpu *v);
int sources_slot_adding(struct snapd_vm *vm, const struct view *v, struct err *e);
void sources_slot_cancelled(struct snapd_vm *vm, const struct view *v);
void sources_slot_deleting(struct snapd_vm *vm, const struct view *v);
void sources_slot_deleted(struct snapd_vm *vm, const struct view *v, int result);
int sources_ram_adding(struct snapd_vm *vm, const struct ram *r, struct err *e);
void sources_ram_gone(struct snapd_vm *vm, const struct ram *r);
void sources_frames_gone(struct snapd_vm *vm, uint64_t first, uint64_t n);
/* The fullest of them. */
uint32_t sources_look(struct snapd_vm *vm);
bool sources_can_fill(const struct snapd_vm *vm);
int sources_harvest(struct snapd_vm *vm, bool stopped);
int sources_full(struct snapd_vcpu *v);
