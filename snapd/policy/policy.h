/* SPDX-License-Identifier: MIT */
/*
 * policy: which VMs are snapshotted when, how, and what stays: one file DIR/NAME.conf, or
 * the same words over the API.  Pure but for reading and writing that file; immutable once
 * read.
 *
 *   [policy]
 *   vms = web*, db            globs of names, separated by commas (default *)
 *   vm_tags = production, eu  only VMs that have one of these (core/tags.h)
 *   owner = 1000              only VMs of this uid
 *   every = 5m                one of these three: a period; or
 *   schedule = Mon..Fri 02:30 a calendar event (calendar.h); or
 *   recovery_point = 1s       so much is lost at most: epochs are made all the time
 *   jitter = 30s              so much later at most, by policy and VM, always the same
 *   timezone = Europe/Berlin  of schedule and of keep_daily and its like
 *   missed = run | skip       points that passed while the service or the VM was down:
 *                             once as soon as possible (default), or not at all
 *   skip_unchanged = yes      not while no page is dirty
 *   self_check_every = 100    every so many snapshots one with all memory compared
 *   tags = a,b                besides policy:NAME, which all of its snapshots have
 *   pre_hook, post_hook       commands run by /bin/sh before and after, with SNAPD_POLICY,
 *   hook_timeout = 10s        SNAPD_VM, SNAPD_PHASE and, after, SNAPD_SNAPSHOT
 *   consistency = crash | quiesce   quiesce: no snapshot when pre_hook fails
 *   min_free = 10G            none while the store's file system has less
 *   compression = zstd:3      of what its snapshots store; else as the service is set
 *   max_pause = 50ms          when pauses are longer, or
 *   max_paused = 2%           the VM stands still for more of the time, or
 *   max_overhead = 5%         loses more of it, by pauses, full rings and write faults, it backs
 * off keep_last, keep_hourly … keep_within, keep_tags, keep_grid   see keep.h; its own only backup
 * = s3://bucket/prefix | file:///path   push each snapshot there backup_hold = yes | no    none is
 * pruned before it is pushed (default), or only the newest is pushed, and nothing waits for it
 *   backup_keep_last, …       what stays there; as keep_last and so on
 *   backup_prune = weekly     calendar event: take out of the repository what is forgotten
 *   backup_verify = monthly   calendar event: is the repository whole
 *   backup_verify_data = 10%  and read so much of it, by chance; all of it is 100%
 *   paused = yes              not now
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "snapd/policy/calendar.h"
#include "snapd/policy/keep.h"
#include "snapd/policy/zone.h"
#include "snapd/util/err.h"

#define POLICY_NAME_MAX	   64
#define POLICY_VALUE_MAX   256
#define POLICY_TAG_PREFIX  "policy:"
#define POLICY_BACKUP_KEEP "backup_keep_"
#define POLICY_NR_SETTINGS 45

struct policy {
	char name[POLICY_NAME_MAX];
	char text[POLICY_NR_SETTINGS][POLICY_VALUE_MAX]; /* as given; "" not set */
	int64_t owner;					 /* -1: any */
	uint64_t every_s;				 /* 0: by the calendar */
	uint64_t recovery_point_ns;			 /* 0: not continuous */
	struct calendar calendar;
	uint64_t jitter_s;
	struct zone *zone; /* owned */
	bool catch_up;
	bool skip_unchanged;
	uint32_t self_check_every;
	uint64_t hook_timeout_s;
	bool quiesce;
	uint64_t min_free_bytes;
	uint64_t max_pause_us;				     /* 0: no bound */
	uint32_t max_paused_permille, max_overhead_permille; /* 0: no bound */
	struct keep_rules keep, backup_keep;
	bool backup_hold;
	struct calendar backup_prune, backup_verify; /* of those that are set */
	uint32_t backup_verify_percent;
	bool paused;
};

/* The words, in the order in which they are shown; NULL after the last. */
const char *policy_setting(size_t i);

/* A policy without settings; policy_set() them, then policy_finish(). */
int policy_new(const char *name, struct policy **ret, struct err *e);
int policy_set(struct policy *p, const char *key, const char *value, struct err *e);
/* Are they a policy together?  -EINVAL with what is missing or too much. */
int policy_finish(struct policy *p, struct err *e);
void policy_free(struct policy *p); /* accepts NULL */

static inline void cleanup_policy(struct policy **p)
{
	policy_free(*p);
}

const char *policy_text(const struct policy *p, const char *key);
/* `vm_tags`: separated by commas. */
bool policy_covers(const struct policy *p, const char *vm, uint32_t uid, const char *vm_tags);

/* DIR/NAME.conf; errors name file and line.  Writing replaces the file as a whole. */
int policy_read(const char *dir, const char *name, struct policy **ret, struct err *e);
int policy_write(const char *dir, const struct policy *p, struct err *e);

/* ---- when ---- */

/*
 * The next run after one that was due at *last_s (Unix time; for a line that never ran: the
 * time it was first seen), as told at `now_s`.  Not later than now: it is due.  With
 * `missed = skip` a point that passed more than POLICY_LATE_S ago is not waited for any more.
 * A clock put back is no reason to wait until it has caught up: *last_s is put back, too.
 * INT64_MAX: never.
 */
#define POLICY_LATE_S 60
int64_t policy_due(const struct policy *p, const char *vm, int64_t *last_s, int64_t now_s);

/* What *last_s is from now on for a run that was due at `due_s` and begins now: the point
 * itself, so that periods don't drift; or now, when the next one has come already. */
int64_t policy_ran(const struct policy *p, const char *vm, int64_t due_s, int64_t now_s);

/*
 * With a recovery point: when the next epoch is to begin, so that it is durable when the newest
 * point is that old.  All on one monotonic clock: `point_ns` when the newest was taken,
 * `cost_ns` how long an epoch is expected to take until it is durable.  Not before now.
 */
uint64_t policy_next_epoch(const struct policy *p, uint64_t point_ns, uint64_t cost_ns,
			   uint64_t now_ns);

/* ---- how dear ---- */

/* What a snapshot cost the guest. */
struct policy_cost {
	uint64_t pause_ns;
	uint64_t interval_ns;	 /* since the run before began; 0: there was none */
	uint64_t lost_ns, of_ns; /* vm/figures.h: what it lost of which time; of_ns 0: not known */
};

/* Is that over one of the policy's bounds? */
bool policy_is_over(const struct policy *p, const struct policy_cost *c);
