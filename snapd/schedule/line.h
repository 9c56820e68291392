/* SPDX-License-Identifier: MIT */
/*
 * line: one policy and one VM: when it runs next, what it is doing, how the last run went.
 * All under the scheduler's lock; nothing here blocks.
 *
 * A run that can't be (the VM is not there, the disk is nearly full, nothing is dirty) is
 * *skipped* and its reason shown; one in which anything went wrong has *failed*, whether there is
 * a snapshot or not.  Either way the next point comes as if it had been; only a VM that is not
 * there leaves its point open.  Pruning depends on neither: what was held or kept until now may
 * be what makes room.
 *
 * A policy with a recovery point has no points in time: its line begins an epoch whenever the
 * newest point would else become too old (policy_next_epoch()), on a monotonic clock, and prunes
 * every CONTINUOUS_PRUNE_NS.  What that costs the guest is counted in windows of ten seconds.
 *
 * Backing off: after a pause that is over the policy's bounds the line leaves out 1, 3, 7, …
 * at most 63 points, and half as many after each run that is within them.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "include/snapd/protocol.h"
#include "snapd/schedule/hook.h"
#include "snapd/schedule/line_backup.h"
#include "snapd/policy/policy.h"

struct daemon;
struct job;

/* What the epochs of a while cost. */
struct line_cost {
	uint64_t since_ns, until_ns; /* CLOCK_MONOTONIC */
	uint64_t epochs, paused_ns, pages_stored;
	uint64_t lost_ns, of_ns; /* as policy_cost has them, summed up */
	uint64_t exposed_ns;	 /* the oldest that the newest point became */
};

/* Of a policy with a recovery point; nanoseconds are CLOCK_MONOTONIC. */
struct line_continuous {
	uint64_t next_ns;  /* when the next epoch begins */
	uint64_t point_ns; /* the newest durable one; 0: none */
	uint64_t cost_ns;  /* an epoch, lately */
	struct line_cost now, last;
};

/* How the last run that somebody asked for ended. */
struct line_asked {
	uint64_t ended; /* so many have */
	uint64_t snapshot, pause_ns;
	char said[192]; /* "" all is well */
};

#define LINE_BUSY_MS  20    /* how often to look at one in the middle of something */
#define LINE_FORGET_S 86400 /* how long to remember a VM that is not there */

enum line_state {
	LINE_IDLE,
	LINE_PRE_HOOK,
	LINE_SNAPSHOT,
	LINE_POST_HOOK,
	LINE_PRUNE,
	LINE_NR_STATES
};
extern const char *const line_state_names[LINE_NR_STATES];

struct line {
	char vm[SNAPD_NAME_MAX];
	uint32_t uid;
	bool attached;	 /* the scheduler's: it looks at each step */
	int64_t there_s; /* when it was last */
	bool wanted;	 /* somebody asked for a run now */
	bool is_asked;	 /* this run is what was asked for */
	struct line_asked asked;
	enum line_state state;
	int64_t last_s, due_s; /* as policy_due() has them */
	int64_t began_s;       /* of this run, or the last */
	uint64_t began_ns,
		interval_ns; /* CLOCK_MONOTONIC; between the beginnings of the last two */
	uint64_t pruned_ns;  /* CLOCK_MONOTONIC */
	struct line_continuous cont;
	struct line_backup backup;
	struct job *job;    /* SNAPSHOT, PRUNE: a reference */
	struct hook hook;   /* PRE_HOOK, POST_HOOK */
	bool failed;	    /* this run has no snapshot */
	bool counts;	    /* this run is one; else it was skipped, and only prunes */
	uint32_t unchecked; /* snapshots until the next self-check, modulo how many it is every */
	bool left_one;	    /* the store is over its soft limit, and the last point was left out */
	uint32_t backoff;   /* times that the bounds were exceeded, less those that not */
	uint32_t leave_out; /* points */
	/* for people */
	char said[192]; /* about the last run; "" all is well */
	uint64_t snapshot, pause_ns;
	uint64_t runs, failures, skipped, pruned;
};

/* A VM seen for the first time.  Looks for its newest snapshot with the policy's tag. */
void line_init(struct line *l, struct daemon *d, const struct policy *p, const char *vm,
	       uint32_t uid, int64_t now_s);
/* Begin what is due, go on with what has ended. */
void line_step(struct line *l, struct daemon *d, const struct policy *p, int64_t now_s);
/* How long nothing can be due for, in milliseconds: UINT32_MAX: it does not know. */
uint32_t line_sleep_ms(const struct line *l, const struct policy *p);
/* Has it nothing more to do, and its VM not been there for LINE_FORGET_S? */
bool line_is_over(const struct line *l, const struct policy *p, int64_t now_s);
/* Let go of its hook and job. */
void line_stop(struct line *l);
json_t *line_json(const struct line *l);
