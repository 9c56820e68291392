/* SPDX-License-Identifier: MIT */
/*
 * verify, diff: job bodies that read what the store has; on job threads.
 *
 * verify args {"snapshot": id, "digest": bool}: reads and checks every page and
 * the state; with digest also SHA-256 over RAM: for each page of each piece in
 * ascending home GFN, the GFN as 8 bytes little-endian, then the page's bytes.
 * Result: {"pages","bytes","zero","digest","recorded_digest","digest_matches"};
 * recorded_digest is the state record "note.ram-sha256" (32 bytes), if the VMM
 * left one; a mismatch is -EUCLEAN.
 * diff args {"a": id, "b": id}: result {"pages","bytes","ranges":[[gpa,len]…],
 * "truncated"}.
 */
#pragma once

#include "snapd/core/job.h"

int verify_job(struct job *job, struct err *e);
int diff_job(struct job *job, struct err *e);
