/* SPDX-License-Identifier: MIT */
/*
 * adapter: the inside of libsnapd-qemu.so, which is preloaded into a stock QEMU and makes of
 * its KVM calls calls of libsnapd-agent.
 *
 *   preload.c  the libc calls that QEMU makes and this library answers
 *   kvm.c      KVM's ioctls: VM, vCPUs, capabilities, the dirty log
 *   slots.c    memslots: what is behind them, which of them QEMU has logged
 *   blocks.c   host addresses → RAM files; discards; memory that goes
 *   control.c  the monitor: its thread, and the agent's callbacks
 *
 * Who is who in memory.  A page that QEMU maps MAP_SHARED of a file is told to the service as
 * RAM, and left out of QEMU's own device state (x-ignore-shared); every other page is in
 * the device state and not told.  So each is in a snapshot once.
 *
 * Nothing here may harm QEMU: what cannot be snapshotted is *refused*, with the reason in
 * `snapctl vms` and on stderr, and QEMU runs on as without this library.
 *
 * Threads: QEMU's, in any call of preload.c; the agent's connection thread, in the callbacks;
 * the control thread.  Locks: slots.c's, then the agent's own; blocks.c's inside of both,
 * and nothing is called under it; control.c's by itself.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include <linux/kvm.h>

#include "include/snapd/agent.h"

/* The next library's, past this one's. */
int real_ioctl(int fd, unsigned long request, void *arg);
int real_munmap(void *addr, size_t len);

/* ---- kvm.c ---- */
int kvm_call(int fd, unsigned long request, void *arg); /* as ioctl(2) */
struct snapd_vm *adapter_vm(void);			/* NULL: nothing attached */
/* This VM cannot be snapshotted, and never will: said once for each reason; the first stands. */
void adapter_refuse(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void adapter_log(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* ---- slots.c ---- */
/* KVM_SET_USER_MEMORY_REGION; 0, or -errno. */
int slots_set(struct snapd_vm *vm, const struct kvm_userspace_memory_region *r);
/* KVM_GET_DIRTY_LOG from the consumer's set; 0, or -errno. */
int slots_dirty_log(struct snapd_consumer *log, const struct kvm_dirty_log *d);

/* ---- blocks.c ---- */
struct ram_block {
	char *hva;
	uint64_t size_bytes;
	uint64_t fd_offset;
	int fd; /* owned */
};
/* The block that [hva, hva + len) is in, told to the agent if that was not done yet; `gpa` is
 * where its byte at `hva` is shown.  -ENOENT: memory that no file is behind. Other
 * errors: why it cannot be snapshotted, in `why`. */
int blocks_find(struct snapd_vm *vm, char *hva, uint64_t len, uint64_t gpa, struct ram_block *ret,
		char *why, size_t why_bytes);
/* Is RAM told at all; is this its file? */
bool blocks_any(void);
bool blocks_has_file(int fd);
void blocks_unmapped(struct snapd_vm *vm, const char *addr, size_t len);
void blocks_removed(struct snapd_vm *vm, const char *addr, size_t len); /* MADV_REMOVE */

/* ---- control.c ---- */
extern const struct snapd_vm_callbacks control_callbacks;
/* Begin to talk to the monitor that `where` (SNAPD_QEMU_ENV_QMP) names. */
int control_start(struct snapd_vm *vm, const char *where);
void control_refuse(const char *reason);
/* QEMU is about to end: no request is to wait any more. */
void control_end(void);
