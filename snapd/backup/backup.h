/* SPDX-License-Identifier: MIT */
/*
 * backup: jobs over backup repositories.  Each opens its repository, does its work and closes
 * it again: credentials that change count from the next job on, and a cancelled job ends its
 * own requests only.  What it learned stays in the cache (STORE/backup).  Bodies for job
 * threads; arguments were checked by the API, or come from a policy.
 *
 * A *selector* names a snapshot of a repository: the first 4 or more hex digits of its name,
 * VM@NAME, VM@HEX, or VM for the VM's newest.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include <jansson.h>

#include "snapd/util/err.h"

struct daemon;
struct job;

/* All have args {"repository"?: URL, else the setting `backup`}. */

/* args {"snapshots": [ids]}, or {"vm", "uid", "tag": push what of it is not pushed yet, oldest
 * first, "newest": only the newest, and where there is "keep": forget by it, "zone"}.
 * Result {"repository", "pushed": [Pushed], "bytes_sent", "forgotten"}. */
int backup_push_job(struct job *job, struct err *e);
/* args {"snapshot": selector, "vm"?: another name}: result {"snapshot": id, "vm", …}. */
int backup_pull_job(struct job *job, struct err *e);
/* args {"vm"?}: result {"repository", "snapshots": [BackupSnapshot], "damaged"}. */
int backup_list_job(struct job *job, struct err *e);
/* args {"percent"}: result {"whole", "damages", …}. */
int backup_verify_job(struct job *job, struct err *e);
/* args {"snapshots": [selectors]} or {"keep", "vm"?, "tag"?, "zone"?}; "dry_run", "prune". */
int backup_forget_job(struct job *job, struct err *e);
/* args {"dry_run"}. */
int backup_prune_job(struct job *job, struct err *e);
/* args {"brief"}: what the repository is, how far its clock is ahead of ours, and, unless brief,
 * what it has. */
int backup_status_job(struct job *job, struct err *e);

/* Was this snapshot of the store pushed to that repository?  False when that is not known. */
bool backup_was_pushed(struct daemon *d, const char *repository, uint64_t snapshot);
/* It is gone from the store. */
void backup_forget_pushed(struct daemon *d, const char *repository, uint64_t snapshot);

/* What was done to a repository, and when. */
enum backup_op { BACKUP_PUSH, BACKUP_PULL, BACKUP_VERIFY, BACKUP_PRUNE, BACKUP_NR_OPS };
/* When a VERIFY or PRUNE was last done from here; Unix time, 0: not known. */
uint64_t backup_last_done(struct daemon *d, const char *repository, enum backup_op op);
void backup_set_last_done(struct daemon *d, const char *repository, enum backup_op op,
			  uint64_t time_s);

struct backups;
int backup_start(struct daemon *d, struct err *e);
void backup_stop(struct daemon *d); /* after the jobs; accepts that start failed */
