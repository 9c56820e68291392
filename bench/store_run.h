/* SPDX-License-Identifier: MIT */
/*
 * store_run: a store in a directory of its own, with one VM whose RAM is an array
 * of 4 KiB pages; its epochs are taken as the service takes them: copy, zero test
 * and hash into staging memory, epoch_put(), epoch_commit().  One thread.  Every
 * failure ends the program.
 */
#pragma once

#include "snapd/store.h"

#define RUN_PAGE 4096u

struct store_run {
	struct store *store;
	struct store_vm vm;
	uint8_t *staging; /* owned */
	uint64_t timeline;
	struct pagemap *live; /* owned */
	char *dir;	      /* owned */
};

/* Ends the program with e's reason when r < 0. */
void run_check(int r, const struct err *e);
/* A directory PREFIX-XXXXXX below $SNAPD_BENCH_DIR, removed at exit; not to be freed. */
const char *run_dir(const char *prefix);
/* Opens a new store at `config->dir` (borrowed during the call). */
void store_run_init(struct store_run *s, const struct store_config *config);
/* Closes it, and opens it, or what was moved to another `config->dir`, as the same VM on
 * the same timeline. */
void store_run_reopen(struct store_run *s, const struct store_config *config);
/* From now on it is about a VM called `name`, which is registered, with a timeline that is
 * empty. */
void store_run_add_vm(struct store_run *s, const char *name);
/* Removes the store, too. */
void store_run_deinit(struct store_run *s);

struct epoch *run_begin(struct store_run *s);
/* Pages index[0, nr) of RAM (NULL: the first nr of them). */
void run_put(struct store_run *s, struct epoch *ep, const uint8_t *ram, const uint32_t *index,
	     uint32_t nr);
/* As a snapshot; the id.  *ret may be NULL. */
uint64_t run_commit(struct epoch *ep, struct epoch_stats *ret);
/* The three of them; seconds from begin until the epoch is durable. */
double run_epoch(struct store_run *s, const uint8_t *ram, const uint32_t *index, uint32_t nr,
		 struct epoch_stats *ret);
/* A snapshot of nr of nr_pages pages, at random, that a word was written to; its id. */
uint64_t run_scattered(struct store_run *s, uint8_t *ram, uint32_t nr, uint32_t nr_pages,
		       uint64_t *seed);
/* Every page of a point into ram (nr_pages), few large reads; frames without a page stay as
 * they are.  Seconds, with the loading of the map. */
double run_restore(struct store_run *s, struct snapd_point at, uint8_t *ram, uint32_t nr_pages);
