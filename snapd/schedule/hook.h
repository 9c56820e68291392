/* SPDX-License-Identifier: MIT */
/*
 * hook: a command of a policy, as a child process that nobody waits for: started, looked at,
 * and killed with all its children when its time is over.  One thread per hook.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "snapd/util/err.h"

struct hook {
	pid_t pid; /* 0: none */
	int pid_fd;
	uint64_t deadline_ns; /* CLOCK_MONOTONIC; 0: over, it was killed */
};

#define HOOK_ENV_MAX 5

/* `env`: "NAME=value" texts, NULL-terminated, besides PATH.  The child has no descriptors of
 * ours, /dev/null as input, our standard error as its output. */
int hook_start(struct hook *h, const char *command, const char *const *env, uint64_t timeout_s,
	       struct err *e);

/* -EAGAIN: it runs; 0: it succeeded; else it failed, with the reason.  A hook past its time
 * is killed, and fails with -ETIMEDOUT when that has come to effect. */
int hook_look(struct hook *h, struct err *e);

/* Kill it, if there is one, and wait for its end. */
void hook_kill(struct hook *h);
