/* SPDX-License-Identifier: MIT */
/*
 * selfcheck: is all of a paused VM's memory what the store would restore?  The
 * dirty set of the epoch says which pages changed; every other page is compared
 * with its stored identity.  A page that differs was *missed*: somebody wrote it
 * and no mark came.  It is reported, and made part of this very epoch, which so is
 * right again.
 *
 *   selfcheck_create ──► selfcheck_prepare ──► [capture: selfcheck_copied …]
 *                    ──► [paused] selfcheck_run ──► selfcheck_locate ──► _destroy
 *
 * On the VM's thread; selfcheck_run() with the pool's help.
 */
#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "snapd/gpaset.h"
#include "snapd/store/pageid.h"
#include "snapd/util/err.h"

struct selfcheck;
struct job;
struct vm;

int selfcheck_create(struct vm *vm, struct selfcheck **ret, struct err *e);
void selfcheck_destroy(struct selfcheck *s); /* accepts NULL */
/* Before the epoch begins, while the guest runs: identities of all stored pages are read
 * from the store, a header for 255.  -EUCLEAN: one there is damaged. */
int selfcheck_prepare(struct selfcheck *s, struct job *job, struct err *e);
/* This epoch has a copy of the page that is this. */
void selfcheck_copied(struct selfcheck *s, uint64_t gfn, struct pageid id);
/*
 * The VM is paused and `late` is what is copied in this pause.  Missed frames are
 * added to it, and to `inflight`: should the epoch fail they are dirty again.  Ends
 * after max_ns, or when the VM's thread has to.  -EFAULT: memory is gone.
 */
int selfcheck_run(struct selfcheck *s, struct gpaset *late, uint64_t max_ns, struct err *e);
/* Where the missed pages are, from the state that was saved in the same pause; log
 * each.  `epoch` is the one that heals them. */
void selfcheck_locate(struct selfcheck *s, const void *state, size_t len, uint64_t epoch);
uint64_t selfcheck_missed(const struct selfcheck *s);
/* All memory was compared, not only as much as the time allowed. */
bool selfcheck_complete(const struct selfcheck *s);
/* {checked, total, missed, complete, ns, pages: [{home_gfn, gpa, as_id, slot,
 * generation, epoch, sound_at}]}; a new object. */
json_t *selfcheck_json(const struct selfcheck *s);
