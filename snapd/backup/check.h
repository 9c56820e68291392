/* SPDX-License-Identifier: MIT */
/*
 * check: is a repository whole?  Structure: every manifest, state and map, and of every pack
 * that one of them names that it is there, of the right length, with a sound table, and
 * has the entries that are referred to.  Data: also every run of a share of the packs, each
 * page against its name.  One thread; damage does not end it.
 */
#pragma once

#include <jansson.h>

#include "snapd/backup/repo.h"

struct job;

struct check_result {
	/* [{"kind": "missing" | "corrupt", "object", "snapshots": ["VM@NAME or id", …], "text"}] */
	json_t *damages; /* owned */
	uint64_t snapshots, packs, blobs, packs_read, bytes_read;
};

/* percent 0: structure only. */
int repo_check(struct job *job, struct repo *r, uint32_t percent, struct check_result *ret,
	       struct err *e);
