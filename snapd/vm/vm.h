/* SPDX-License-Identifier: MIT */
/*
 * vm: one attached VM.  Its thread owns everything here but what is marked; other
 * threads see it through vm_submit(), vm_describe() and the atomics.
 *
 * States:
 *   HELLO     connected, not yet WELCOMEd
 *   TELLING   blocks and pieces arrive
 *   READY     snapshots and rollbacks may run; jobs run one after another
 *   LOST      connection gone; the agent may come back (same instance id) for
 *             a while: the struct is kept with its live map, jobs fail at once
 *   GONE      the VMM is dead or detached; about to be freed
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "include/snapd/protocol.h"
#include "snapd/gpaset.h"
#include "snapd/core/job.h"
#include "snapd/store.h"

struct daemon;
struct vm;

enum vm_state { VM_HELLO, VM_TELLING, VM_READY, VM_LOST, VM_GONE, VM_NR_STATES };
extern const char *const vm_state_names[VM_NR_STATES];

/* Control thread: a connection was accepted; takes the fd.  Starts the thread. */
int vm_accept(struct daemon *d, int fd);
/* Find an attached VM by name that `uid` may see (0: all); a new reference or NULL.
 * Several owners may use one name: uid 0 then gets "UID/NAME" as well. */
struct vm *vm_find(struct daemon *d, const char *name, uint32_t uid);
/* Is that what it is called, and whose it is? */
bool vm_is(const struct vm *vm, const char *name, uint32_t uid);
/* All that are READY; *ret is malloc()ed.  Any thread. */
struct vm_name {
	char name[SNAPD_NAME_MAX];
	uint32_t uid;
};
int vm_list_ready(struct daemon *d, struct vm_name **ret, size_t *nr);
/* About how many frames are known to be dirty, or wait in rings to become so. */
uint64_t vm_dirty_frames(struct vm *vm);
struct vm *vm_ref(struct vm *vm);
void vm_unref(struct vm *vm);
/* Queue a job on the VM's thread; job->fn gets the VM by vm_of_job().  -EBUSY when
 * eight are queued already; -ENOTCONN when the VM is not READY. */
int vm_submit(struct vm *vm, struct job *job);
struct vm *vm_of_job(struct job *job);
/* Any thread: name, state, owner, RAM, vCPUs, head snapshot, dirty frames, last
 * pause, all counters of the shared page. */
json_t *vm_describe(struct vm *vm);
json_t *vm_list_json(struct daemon *d, uint32_t uid);
/* Heads, and forks under way, of all attached VMs: what store_gc() must keep; *ret
 * is malloc()ed.  Control thread and job threads. */
int vm_live_timelines(struct daemon *d, uint64_t **ret, size_t *nr);
/* Stop every VM thread: epochs under way are abandoned, VMs resumed. */
void vm_stop_all(struct daemon *d);

/* snapshot.c, rollback.c: bodies of jobs, on the VM's thread.
 * args: snapshot {"name","note","tags","self_check"}: result {"snapshot": {…as in GET…}, figures}.
 * rollback {"snapshot": number as text, "check": bool}: with check, after LOADED and
 * before RESUME, all RAM is compared with the store byte by byte, and PAUSE is sent again
 * (the agent answers it while paused) to compare its state with the snapshot's, clocks
 * apart (recheck.c); a difference fails the job with E_CORRUPT and leaves the VM paused;
 * result has "checked": true. */
int snapshot_job(struct job *job, struct err *e);
/* An epoch without a snapshot, whose pause compares all memory (selfcheck.h); no args.
 * Result {"self_check": {...}}, done also when pages were missed: they are healed.  A
 * snapshot with "self_check": true does the same. */
int self_check_job(struct job *job, struct err *e);
int rollback_job(struct job *job, struct err *e);
