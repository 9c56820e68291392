/* SPDX-License-Identifier: MIT */
/*
 * capture: dirty sets → stable page bytes with their identity → an epoch of the
 * store.  On the VM's thread, with the pool's help.  The argument why no write can
 * be lost is in capture.c.
 *
 *   capture_begin ──► capture_early ──► [PAUSE] capture_paused [RESUME]
 *                 ──► capture_drain ──► capture_end
 *
 * capture_end() may follow any of them, and must follow begin.  It does not touch
 * the shared sets: what happens to `inflight` depends on the commit.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "snapd/store.h"
#include "snapd/util/err.h"

struct capture;
struct job;
struct selfcheck;
struct vm;

struct capture_stats {
	uint64_t early_pages; /* copied while the guest ran, repeats included */
	uint64_t hot_pages;   /* came back dirty, and waited for the pause */
	uint64_t paused_pages;
	uint32_t rounds; /* of early capture */
	uint64_t early_ns, copy_ns, drain_ns;
};

int capture_create(struct vm *vm, struct capture **ret, struct err *e);
void capture_destroy(struct capture *c); /* accepts NULL */

/* `ep`, and `check` (NULL: none), are borrowed until capture_end(). */
void capture_begin(struct capture *c, struct epoch *ep, struct selfcheck *check);
/* While the guest runs; also gets the staging memory ready.  Job may be NULL. */
int capture_early(struct capture *c, struct job *job, struct err *e);
/* The VM is paused: take the rest, and what the check finds, and copy it to staging
 * memory.  No I/O.  -ENOBUFS: it does not fit. */
int capture_paused(struct capture *c, struct err *e);
/* The guest runs again: identify what was staged and hand it to the store. */
int capture_drain(struct capture *c, struct job *job, struct err *e);
/* The VMM is dead and nothing changes any more: all of the set, and what the check
 * finds beyond it, straight from memory.  In place of the three above. */
int capture_dead(struct capture *c, struct err *e);
/* How many of vm->gone, from the first, this epoch was told. */
size_t capture_gone_told(const struct capture *c);
void capture_end(struct capture *c, struct capture_stats *ret);
