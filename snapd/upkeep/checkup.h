/* SPDX-License-Identifier: MIT */
/*
 * checkup: a check of the store as a job, and what it found as JSON.  On a job thread.
 */
#pragma once

#include "snapd/core/job.h"
#include "snapd/store/check.h"

/* args {"read_data": bool, "percent": 1-100, "rate": bytes a second}; result {"whole",
 * "damages": [{"kind","text"}], "nr_damages", "losses": [{"snapshot","vm","page_size",
 * "whole","pages","ranges":[[gpa,bytes]…]}], "nr_losses", "records", "segments", "batches",
 * "blobs", "pages_read", "bytes_read"}.  Damage is a result, not a failure. */
int check_job(struct job *job, struct err *e);
/* args {"dry_run": bool}: a check of every byte; then the snapshots that it tells as lost
 * are forgotten.  Result as above, and "dropped", "dry_run". */
int repair_job(struct job *job, struct err *e);
json_t *loss_json(const struct store_loss *l);
