/* SPDX-License-Identifier: MIT */
/*
 * pull: a snapshot of a repository into the local store, as a snapshot on a timeline of its
 * own.  Job threads; blocks.
 *
 * Where an ancestor is in the store already (pushed from it, or pulled before), the timeline
 * forks from that and only the layers above it are fetched; else all.  Pages are fetched by a few
 * threads, pack by pack, in ranges that leave out what is not needed, and each is checked
 * against its name before the store gets it.  Nothing is visible before everything is there.
 */
#pragma once

#include "snapd/backup/repo.h"

struct job;

struct pull_result {
	uint64_t snapshot;
	bool already;  /* nothing was to do */
	uint64_t base; /* snapshot that it builds on; 0: none */
	uint64_t pages, pages_fetched, bytes_received;
};

/* vm: another name for the VM, or NULL.  -EEXIST: the VM has a snapshot of that name. */
int pull_snapshot(struct job *job, struct repo *r, const struct repo_list *list,
		  const struct manifest *m, const char *vm, struct pull_result *ret, struct err *e);
