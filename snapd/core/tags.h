/* SPDX-License-Identifier: MIT */
/*
 * tags: words by which VMs are chosen together: "production", "eu".  In: a file that people
 * write, and what was set over the API; out: the tags of a VM.  Any thread.
 *
 *   VM-TAGS.conf         [tags]
 *                        web*    = production, eu     a glob of names
 *                        1000/db = nightly            of one owner's VMs only
 *   STORE/vm-tags.json   {"1000/db": "nightly,eu"}    written here, on each change, as a whole
 *
 * All that fit add up.  A VM needs not be attached to have tags; it loses those that were set
 * when it is removed from the store.
 */
#pragma once

#include <stdint.h>

#include "snapd/util/err.h"

#define VM_TAGS_MAX 512 /* bytes of all tags of a VM, with the NUL */

struct vm_tags;

/* `file` and `store_dir` are copied; neither file has to be there.  -EINVAL: one of them is not
 * right, with file and line. */
int vm_tags_open(const char *file, const char *store_dir, struct vm_tags **ret, struct err *e);
void vm_tags_close(struct vm_tags *t); /* accepts NULL */
/* Read the people's file anew; on failure what it said before goes on to count. */
int vm_tags_reload(struct vm_tags *t, struct err *e);

/* Separated by commas, each once; "" none.  `t` may be NULL: no VM has any. */
void vm_tags_of(struct vm_tags *t, const char *vm, uint32_t uid, char ret[VM_TAGS_MAX]);
/* Those that were set over the API. */
void vm_tags_set_ones(struct vm_tags *t, const char *vm, uint32_t uid, char ret[VM_TAGS_MAX]);

/* What is set becomes `tags` (NULL: what it was), and `add`, without `remove` (each may be NULL).
 * Durable when it returns 0.  -EINVAL: not tags, or too many. */
int vm_tags_change(struct vm_tags *t, const char *vm, uint32_t uid, const char *tags,
		   const char *add, const char *remove, struct err *e);
