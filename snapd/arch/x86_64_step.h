/* SPDX-License-Identifier: MIT */
/*
 * x86_step: one kind of record of x86_64 state, and how it is got and set.  The tables of
 * steps are in x86_64.c; this is for the files that have their functions.
 *
 * Save and load of a step: 0 or -errno with the reason in *e.  A save without a record is a
 * success: this KVM, or this VM, has nothing to get.
 */
#pragma once

#include <assert.h>
#include <linux/kvm.h>
#include <stdbool.h>

#include "snapd/arch/arch.h"
#include "snapd/arch/x86_64.h"
#include "snapd/util/cleanup.h"

/* Where a step works: the VM, or one vCPU. */
struct x86_target {
	const struct arch_vm *vm;
	int fd;		     /* of the VM or of the vCPU */
	struct kvm_run *run; /* NULL for the VM */
	uint32_t instance;   /* vCPU index */
	char who[16];	     /* "VM" or "vCPU 3", for reasons */
};

struct x86_step {
	const char *record;
	const char *what; /* as in KVM_GET_<what> */
	unsigned long get, set;
	uint32_t cap;	     /* offered if this capability is > 0; 0: always tried */
	uint32_t unless_cap; /* a newer call replaces it */
	size_t len_bytes;    /* fixed length; 0: has functions of its own */
	bool may_lack;	     /* a VM may be built without: ENXIO, EINVAL mean so */
	bool required;	     /* no vCPU without it, here or in a snapshot */
	int (*save)(const struct x86_target *t, const struct x86_step *s,
		    struct snapd_state_writer *w, struct err *e);
	int (*load)(const struct x86_target *t, const struct x86_step *s,
		    const struct snapd_state_reader *r, struct err *e);
};

/* Does this failure of a GET say that there is nothing to get? */
bool x86_is_lacking(const struct x86_step *s, int r);
int x86_put(const struct x86_target *t, const struct x86_step *s, uint32_t instance,
	    const void *data, size_t len_bytes, struct snapd_state_writer *w, struct err *e);
/* 1 and *data, *len_bytes, borrowed from the reader, when the record is there and its version
 * known; 0: none. */
int x86_find(const struct x86_target *t, const struct x86_step *s, uint32_t instance,
	     const struct snapd_state_reader *r, const void **data, size_t *len_bytes,
	     struct err *e);
/* The snapshot says nothing of this device: then this VM must not have it.  `scratch` has room
 * for what GET answers. */
int x86_check_lacking(const struct x86_target *t, const struct x86_step *s, void *scratch,
		      struct err *e);
int x86_get_failed(const struct x86_target *t, const struct x86_step *s, int r, struct err *e);
int x86_set_failed(const struct x86_target *t, const struct x86_step *s, int r, struct err *e);
int x86_bad_length(const struct x86_target *t, const struct x86_step *s, size_t len_bytes,
		   struct err *e);

#define X86_SAVE(name)                                                              \
	int x86_##name##_save(const struct x86_target *t, const struct x86_step *s, \
			      struct snapd_state_writer *w, struct err *e)
#define X86_LOAD(name)                                                              \
	int x86_##name##_load(const struct x86_target *t, const struct x86_step *s, \
			      const struct snapd_state_reader *reader, struct err *e)
X86_SAVE(fixed); /* len_bytes */
X86_LOAD(fixed);
/* x86_64_cpu.c */
X86_SAVE(cpuid);
X86_LOAD(cpuid);
X86_SAVE(tsc_khz);
X86_LOAD(tsc_khz);
X86_SAVE(xsave);
X86_LOAD(xsave);
X86_SAVE(nested);
X86_LOAD(nested);
/* x86_64_msr.c */
X86_SAVE(msrs);
X86_LOAD(msrs);
#undef X86_SAVE
#undef X86_LOAD
