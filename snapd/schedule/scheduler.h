/* SPDX-License-Identifier: MIT */
/*
 * scheduler: runs policies.  One thread; for each policy and each VM that it covers there is
 * a *line* with a state of its own, so that no VM's trouble delays another's: nothing here
 * waits for a snapshot, a hook or a prune, all are started and looked at.
 *
 *   IDLE ──due──► PRE_HOOK ──► SNAPSHOT ──► POST_HOOK ──► PRUNE ──► IDLE
 *
 * A line outlives its VM's attachment: what the VM misses meanwhile is made up for, or not,
 * as `missed` says.  Across restarts of the service a line's last run is the time of its
 * newest snapshot, the newest with the tag policy:NAME.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "snapd/util/err.h"

struct daemon;
struct vm;

/* After jobs_start(); reads the directory of policies (none: no policies).  A file that is
 * not right is logged and left out. */
int policies_start(struct daemon *d, struct err *e);
/* Read the directory anew: what is new or changed counts from now on, what is gone goes.  A
 * file that is not right any more leaves its policy as it was. */
void policies_reload(struct daemon *d);
/* Hooks that run are killed.  Before vm_stop_all(); accepts that start failed. */
void policies_stop(struct daemon *d);

/* Control thread.  `view` 0: all lines; else those of this user. */
json_t *policies_json(struct daemon *d, uint32_t view);
/* NULL: there is none. */
json_t *policy_json(struct daemon *d, const char *name, uint32_t view);

/* Replace or make one: `settings` {"every": "5m", ...}, texts as in the file, which is
 * written first.  -EINVAL with the reason. */
int policy_put(struct daemon *d, const char *name, json_t *settings, struct err *e);
/* Change one setting (paused). */
int policy_change(struct daemon *d, const char *name, const char *key, const char *value,
		  struct err *e);
/* Any thread.  The repository that a snapshot with these tags has to be in before it may be
 * pruned: ret and true. */
bool policies_hold(struct daemon *d, const char *tags, char ret[256]);
int policy_remove(struct daemon *d, const char *name, struct err *e);
/* Due at once: for one VM, or (NULL) for all that it covers; *nr: for how many. */
int policy_run_now(struct daemon *d, const char *name, const char *vm, unsigned int *nr,
		   struct err *e);
