/* SPDX-License-Identifier: MIT */
/*
 * jobs: what the bodies of backup.h share: jobs.c (pull, list, verify, prune, status), jobs_push.c,
 * jobs_forget.c, selector.c.  Job threads.
 */
#pragma once

#include <jansson.h>

#include "snapd/backup/session.h"

/* An argument; NULL: not given. */
const char *job_text(const struct job *job, const char *key);
json_t *backup_name_json(const struct bk_name *name);
/* *ret: the one that `selector` (backup.h) names, in l.  -ENOENT, -EINVAL: several. */
int backup_select(const struct repo_list *l, const char *selector, const struct manifest **ret,
		  struct err *e);
/* By the job's "keep"; *lines (owned by the caller) tell of each snapshot. */
int backup_forget_by_rules(struct session *s, json_t **lines, uint64_t *nr, struct err *e);
/* *ret: what was done. */
int backup_run_prune(struct session *s, json_t **ret, struct err *e);
