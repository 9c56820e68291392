/* SPDX-License-Identifier: MIT */
/*
 * scripted_kvm: KVM calls that a test answers.  The test says what each request
 * returns; every call is logged, and what a call handed in is kept, so that the
 * test can tell in which order the kernel was asked, and for what.  A request
 * without an answer is ENOTTY, as from a kernel that does not know it.
 * KVM_CHECK_EXTENSION is answered from a table of its own and not logged.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "include/snapd/agent.h"

#define SCRIPT_MAX     64
#define SCRIPT_LOG_MAX 2048
#define SCRIPT_BYTES   4096

struct script_answer {
	unsigned long request;
	int result;	 /* as ioctl's, or -errno */
	const void *out; /* copied to the argument where result >= 0; NULL: nothing */
	size_t out_bytes;
	/* Answers instead of the above, where set. */
	int (*call)(void *opaque, void *arg);
	uint8_t in[SCRIPT_BYTES]; /* what the last call handed in, by _IOC_SIZE */
};

struct scripted_kvm {
	struct snapd_kvm_ops ops;
	struct script_answer answers[SCRIPT_MAX];
	size_t nr_answers;
	struct {
		uint32_t cap;
		int value;
	} caps[SCRIPT_MAX];
	size_t nr_caps;
	unsigned long log[SCRIPT_LOG_MAX]; /* requests in order */
	size_t nr_log;
};

void scripted_kvm_init(struct scripted_kvm *k);
/* Replaces an earlier answer to the same request. */
struct script_answer *scripted_answer(struct scripted_kvm *k, unsigned long request, int result,
				      const void *out, size_t out_bytes);
struct script_answer *scripted_call(struct scripted_kvm *k, unsigned long request,
				    int (*call)(void *opaque, void *arg));
/* Forget the answer: ENOTTY from now on. */
void scripted_forget(struct scripted_kvm *k, unsigned long request);
void scripted_cap(struct scripted_kvm *k, uint32_t cap, int value);
/* Position of the n-th (from 0) such request in the log, or -1. */
long scripted_at(const struct scripted_kvm *k, unsigned long request, size_t n);
