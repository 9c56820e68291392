/* SPDX-License-Identifier: MIT */
/*
 * chores: what a policy does to its repository by the calendar: prune it, verify it.  Of the
 * policy, not of its VMs; beside everything else, one job of each at a time.  A point that passed
 * while the service was down is made up for once.  When each was last done, by whomever, is
 * kept with the backups (backup.h), so that a new start changes nothing.  What fails is tried
 * again in an hour.  Under the scheduler's lock; nothing here waits.
 */
#pragma once

#include <stdint.h>

#include <jansson.h>

struct daemon;
struct job;
struct policy;

enum chore_kind { CHORE_PRUNE, CHORE_VERIFY, NR_CHORES };

struct chore {
	struct job *job; /* a reference; NULL: none is under way */
	int64_t retry_s; /* not before */
	char said[192];	 /* about the last; "" all is well */
};

struct chores {
	struct chore all[NR_CHORES];
};

void chores_step(struct chores *c, struct daemon *d, const struct policy *p, int64_t now_s);
void chores_stop(struct chores *c);
/* What is scheduled, by kind. */
json_t *chores_json(const struct chores *c, struct daemon *d, const struct policy *p,
		    int64_t now_s);
