/* SPDX-License-Identifier: MIT */
/* prune: snapshots that no rule keeps are deleted.  A body for job threads; arguments were
 * checked by the API or by the policy. */
#pragma once

#include "snapd/core/job.h"

/* args {"view": uid, "owner"?: uid, "vm"?, "tag"?: only those, "zone"?, "keep": {…as in the API},
 * "dry_run"}: result {"snapshots":
 * [{id, vm, name, taken_ns, keep, why}], "deleted", "dry_run"}. */
int prune_job(struct job *job, struct err *e);
