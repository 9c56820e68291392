/* SPDX-License-Identifier: MIT */
/*
 * vm_priv: the inside of a VM, for the files that run on its thread: vm.c (life,
 * jobs, list), claim.c (its name), describe.c (what others see), vm/msg.c (socket), vm/attach.c
 * (HELLO to READY), capture.c, snapshot.c, rollback.c, restore.c.
 *
 * Life of the struct, and who may look:
 *
 *   vm_accept() makes it and lists it, and its thread runs until the end:
 *     connected ──► LOST (the agent is gone; live map kept) ──► ended
 *                     └─ VMM dead ──► post-mortem ───────────────┘
 *   A new connection of the same VM *supersedes* a LOST one: it waits until that
 *   one's thread has ended, and takes the live map over.  The control thread joins
 *   ended threads (vm_reap()) and drops the list's reference.
 *
 * Point and base.  `point` is what RAM and `live` are, up to dirty ∪ inflight;
 * {0,0} while everything is dirty.  The shared page's base is set to it after
 * each change, in the order that vm_mem.h and docs/architecture.md give.
 */
#pragma once

#include <pthread.h>

#include "snapd/core/daemon.h"
#include "snapd/vm/staging.h"
#include "snapd/vm/vm.h"
#include "snapd/vm/figures.h"
#include "snapd/vm/mem.h"
#include "snapd/vm/rings.h"

#define VM_QUEUE_MAX	      8
#define VM_MAX_CONNECTIONS    512
#define VM_MAX_PER_UID	      128
#define VM_HELLO_TIMEOUT_MS   5000
#define VM_REQUEST_TIMEOUT_MS 20000
#define VM_LOAD_TIMEOUT_MS    120000
#define VM_LINGER_MS	      30000

struct capture;

struct gfn_run {
	uint64_t gfn, n;
};

struct vm {
	struct daemon *d;
	_Atomic int refs;
	_Atomic int state; /* enum vm_state; written by the VM's thread */
	_Atomic bool stop; /* end soon: the daemon stops, or superseded */

	/* vms_lock */
	struct vm *next;
	pthread_t thread;
	bool ended;	/* thread is about to return; live and point may be taken */
	bool claimed;	/* name, instance below count for others */
	uint32_t heirs; /* that take over from it: it stays listed, and its timeline live */

	/* fixed once claimed */
	uint32_t uid; /* of the peer; from accept on */
	uint32_t pid;
	char name[SNAPD_NAME_MAX];
	char arch[16];
	uint8_t instance[16];
	uint8_t id[16];	      /* in the store */
	uint64_t attached_ns; /* CLOCK_REALTIME */

	pthread_mutex_t lock;
	/* lock */
	struct job *queue, **queue_tail;
	uint32_t nr_queued;
	struct job *running; /* borrowed */
	struct vm_pub {
		uint32_t nr_vcpus, ring_entries, page_size;
		uint32_t dirty_backend; /* SNAPD_DIRTY_*, as the agent says */
		uint64_t ram_frames, frames_end;
		struct snapd_point point;
		uint64_t fork;		/* timeline made, not yet `point`; 0 none */
		uint64_t head_snapshot; /* 0 none since attach */
		uint64_t snapshots, failures;
		uint64_t self_checks, missed_pages;
		struct vm_pause pause;
		struct vm_epochs epochs;
		uint64_t lost_ns; /* as in vm_figures */
		bool broken;
		json_t *about;	   /* owned; NULL: nothing said */
		char refusal[320]; /* why it cannot be snapshotted; "": it can */
	} pub;
	struct vm_shm shm; /* the VM's thread uses it; mapped, unmapped under lock */

	/* the VM's thread */
	int sock;     /* -1: connection lost */
	int event_fd; /* fixed; written by anyone: jobs, stop */
	int peer_fd;  /* pidfd of the VMM, or -1 */
	uint64_t next_req;
	struct snapd_msg_hello hello;
	struct vm_mem mem;
	struct pagemap *live; /* owned; at `point`, with fingerprints */
	struct snapd_point point;
	struct vm_loss loss;	 /* at the end of the last epoch */
	bool told;		 /* first READY seen */
	bool broken;		 /* a rollback failed half way: only another may run */
	bool said_bye;		 /* the VMM detaches of its own will */
	bool ready;		 /* a READY came and is not acted on */
	bool few_vcpus;		 /* to be restored, and has fewer vCPUs than the snapshot yet */
	uint64_t vcpus_until_ns; /* CLOCK_MONOTONIC: no more are waited for; 0: not asked */
	struct gfn_run *gone;	 /* unplugged since the last epoch; owned */
	size_t nr_gone;
	uint64_t check_next;	 /* frame where the next self-check begins */
	uint64_t sound_at;	 /* epoch of the last self-check of all memory; 0: none */
	struct capture *capture; /* owned; made at the first epoch */
	struct staging staging;
	struct rings rings;
	int in_fd; /* descriptor of the message in `in`; -1 none */
	_Alignas(8) uint8_t in[SNAPD_MSG_MAX];
};

/* ---- vm.c ---- */
uint64_t now_ns(clockid_t clock);
/* Between steps of a job (NULL: none): -ECANCELED with the reason. */
int vm_interrupted(struct vm *vm, struct job *job, struct err *e);
/* Control thread: join threads that ended. */
void vm_reap(struct daemon *d);
/* From anyone: it looks at its jobs, and whether it is to stop. */
void vm_wake(struct vm *vm);
bool vm_process_is_dead(const struct vm *vm);

/* ---- describe.c ---- */
void vm_publish(struct vm *vm); /* thread → pub */
/* A timeline that is made for what runs now: store_gc() must keep it.  0: none. */
void vm_keep_timeline(struct vm *vm, uint64_t timeline);

/* ---- claim.c ---- */
/* Make name and instance of vm->hello this VM's, once nobody else has them.  Takes
 * over what an earlier connection of the same instance knew: *live (or NULL), *at. */
int vm_claim(struct vm *vm, struct pagemap **live, struct snapd_point *at, struct err *e);

/* ---- vm/msg.c ---- */
/* Next message into vm->in and vm->in_fd: 1, 0 on timeout, -errno with the
 * connection closed. */
int vm_recv(struct vm *vm, int timeout_ms, struct err *e);
/* `fd` is borrowed, -1 none.  On failure the connection is closed. */
int vm_send(struct vm *vm, void *msg, size_t len, uint16_t type, int fd, struct err *e);
/* REJECT, ERROR: a last word, then the connection is closed. */
void vm_say_error(struct vm *vm, uint16_t type, const struct err *e);
void vm_disconnect(struct vm *vm);
/* -EPROTO unless the message in vm->in has at least `len` bytes. */
int vm_check_len(struct vm *vm, size_t len, struct err *e);
/*
 * Send a request and wait for `answer`, which then is in vm->in; what comes in
 * between is handled by vm_told().  -ENOTCONN, -ETIMEDOUT, -EPROTO: connection
 * lost.  Others: the agent refused, in its words, and the VM is as it was.
 */
int vm_request(struct vm *vm, void *msg, size_t len, uint16_t type, int fd, uint16_t answer,
	       size_t answer_len, int timeout_ms, struct err *e);

/* ---- vm/attach.c ---- */
/* First message to WELCOME.  On failure the reason was sent. */
int vm_hello(struct vm *vm);
/* BLOCK, PIECE, GONE, READY (noted only).  -EPROTO etc.: the connection was closed. */
int vm_told(struct vm *vm);
/* Act on READY: the sets after a reconnect, a rollback to finish, a restore. */
int vm_on_ready(struct vm *vm, struct err *e);
/* Everything is dirty from now on; live is empty. */
int vm_make_fresh(struct vm *vm, struct err *e);
/* RAM is `at` now, sets and base say so; takes `live`. */
int vm_set_point(struct vm *vm, struct snapd_point at, struct pagemap *live, struct err *e);

/* ---- requests that several files make ---- */
#define REWRITE_MINOR 2 /* PAUSE with REWRITE, LOAD with RESUME, UNTOUCHED */
#define CHECK_MINOR   3 /* CHECK */
/* Does the agent know what came with minor version `minor`? */
/* Its VMM stops, saves and loads vCPUs itself. */
static inline bool vm_keeps_state(const struct vm *vm)
{
	return vm->hello.flags & SNAPD_HELLO_VMM_STATE;
}

static inline bool vm_speaks(const struct vm *vm, uint16_t minor)
{
	return vm->hello.minor >= minor;
}
int vm_sync(struct vm *vm, struct err *e);
/* *state_fd is the caller's. */
int vm_pause(struct vm *vm, int *state_fd, uint64_t *state_bytes, struct vm_pause *p,
	     struct err *e);
/*
 * Without state, for a rollback.  An agent that vm_speaks(REWRITE_MINOR) is, when this succeeds,
 * as after REWRITE: only vm_resume_untouched(), before RAM is written, or LOAD lets the
 * VM go on.  An older one is still to be sent REWRITE.
 */
int vm_pause_to_rewrite(struct vm *vm, struct snapd_point to, struct vm_pause *p, struct err *e);
int vm_resume_untouched(struct vm *vm, struct err *e);
/* The state that came with PAUSED, copied out of a file that its sender may still
 * change, and checked; malloc()ed. */
int vm_read_state(int fd, uint64_t len, void **ret, struct err *e);
int vm_resume(struct vm *vm, struct vm_pause *p, struct err *e);

/* ---- rollback.c, restore.c ---- */
/* Finish the rollback that an earlier service began. */
int rollback_redo(struct vm *vm, struct err *e);
/* READY came from a VM that wants to be restored: it runs after this. */
int restore_vm(struct vm *vm, struct err *e);

/* ---- postmortem.c ---- */
/* Is the VM's memory to be kept until its VMM has come back or ended? */
bool postmortem_wanted(const struct vm *vm);
/* The VMM is dead: its memory becomes a snapshot. */
void postmortem(struct vm *vm);

/* ---- goal.c: a point of the store to which a VM's memory is to be brought ---- */
struct goal {
	struct snapd_point at;
	struct store *store; /* where `at` is pinned; NULL: nowhere */
	struct pagemap *map; /* owned; with fingerprints */
	void *state;	     /* owned */
	size_t state_len;
	int state_fd;			  /* owned; a sealed memfd of the state, for LOAD */
	const struct state_piece *pieces; /* what its memory consists of; borrowed from state */
	size_t nr_pieces;
	uint64_t fork; /* the timeline that starts there, until the VM is on it; 0: none */
};
#define GOAL_NONE ((struct goal){.state_fd = -1})
/*
 * Load what is at `at`, and check that this VM can become it: the same page size
 * and number of vCPUs, and all its memory is there.  Until goal_deinit() the store
 * keeps its pages, whatever is deleted.  -ENOENT: the VM's owner may
 * not see it, or it is not there; -EINVAL: and what does not fit.
 */
int goal_load(struct vm *vm, struct snapd_point at, struct goal *g, struct err *e);
void goal_deinit(struct goal *g);
bool goal_has(const struct goal *g, uint64_t gfn);
/* Ask the agent, which may know more of its VM, before anything is touched. */
int goal_check(struct vm *vm, const struct goal *g, struct err *e);
/* Start the timeline. */
int goal_fork(struct vm *vm, struct goal *g, struct err *e);
/*
 * RAM is complete, the VM is paused: empty the sets, LOAD, and RAM is at the
 * goal's fork from then on (takes the map).  What the VM has beyond the goal's
 * memory is dirty.  On failure everything is dirty, and vm->broken is set.
 * `runs_on`: the agent, which vm_speaks(REWRITE_MINOR), resumes the VM as part of LOAD.
 */
int goal_enter(struct vm *vm, struct goal *g, bool runs_on, struct snapd_msg_loaded *ret,
	       struct err *e);
/* recheck.c, after goal_enter(): -EUCLEAN and what differs. */
int goal_recheck(struct vm *vm, const struct goal *g, struct err *e);
