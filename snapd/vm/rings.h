/* SPDX-License-Identifier: MIT */
/*
 * rings: the dirty rings of a VM's vCPUs, through descriptors that its agent passed.  What they
 * held when the VMM died is known to nobody else.  On the VM's thread.
 *
 * Kept only where a dead VM's memory is (post_mortem), and not touched while the VMM lives: the
 * agent alone collects and RESETs.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "include/snapd/protocol.h"
#include "snapd/util/err.h"

#define VM_MAX_RINGS 1024u

struct vm;

struct vm_ring {
	int fd; /* owned; the vCPU's */
	uint32_t nr_entries;
	uint64_t offset;
};

struct rings {
	struct vm_ring *v; /* owned */
	uint32_t nr;
};

struct rings_found {
	uint64_t entries; /* that were in the rings */
	uint64_t pages;	  /* that they name, of memory that is there, and no set had */
};

bool rings_wanted(const struct vm *vm);
/* Takes fd, -1 none, also on failure. */
int rings_add(struct vm *vm, const struct snapd_msg_vcpu *msg, int fd, struct err *e);
void rings_deinit(struct rings *r);
/* The VMM is dead: all that the rings hold, into `dirty`.  -EFAULT: the sets are gone.  A
 * ring that cannot be read, or whose entries mean nothing, is left to who compares memory. */
int rings_drain(struct vm *vm, struct rings_found *ret);
