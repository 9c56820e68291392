/* SPDX-License-Identifier: MIT */
/*
 * host: the "host.machine" and "host.caps" records that every architecture
 * writes the same way: what machine a snapshot was taken on.
 */
#pragma once

#include <assert.h>
#include <stdint.h>

#include "snapd/arch/arch.h"

/* "host.machine" version 1. */
struct host_machine {
	char arch[16];	    /* arch_ops.name, NUL-padded */
	uint32_t page_size; /* bytes */
	uint32_t reserved;
	char kernel[64]; /* uname release, for people */
};
static_assert(sizeof(struct host_machine) == 88, "disk format");

/* "host.caps" version 1: an array of these, for people and bug reports. */
struct host_cap {
	uint32_t cap;  /* KVM_CAP_* */
	int32_t value; /* of KVM_CHECK_EXTENSION on the VM */
};
static_assert(sizeof(struct host_cap) == 8, "disk format");

int host_machine_save(const struct arch_vm *vm, const uint32_t *caps, size_t nr_caps,
		      struct snapd_state_writer *w, struct err *e);
/* -ENOTSUP if architecture or page size differ, or a record must be understood that
 * this version does not know; -EUCLEAN if the record is bad. */
int host_machine_check(const struct snapd_state_reader *r, struct err *e);
