/* SPDX-License-Identifier: MIT */
/*
 * upkeep: jobs that look after the store: what is said of snapshots, what is
 * deleted and reclaimed.  Bodies for job threads; arguments were checked by
 * the API.
 */
#pragma once

#include "snapd/core/job.h"

/* args {"snapshot": id, "name"?, "note"?, "tags"?, "pinned"?}: result {"snapshot": Snapshot}. */
int set_job(struct job *job, struct err *e);
/* args {"snapshot": id}: result the same. */
int delete_job(struct job *job, struct err *e);
/* args {"vm": name, "uid": owner}: result {"vm", "snapshots": how many}.  -EBUSY: attached. */
int remove_vm_job(struct job *job, struct err *e);
/* args {"rate": bytes a second}: result {"bytes_freed"}. */
int gc_job(struct job *job, struct err *e);
/* Result {"snapshots": [{id, bytes_logical, bytes_unique, pages_unique}], and bytes_ and
 * pages_ unique, shared, live, dead; bytes_headers}. */
int account_job(struct job *job, struct err *e);
