/* SPDX-License-Identifier: MIT */
/*
 * account: whose are the bytes in the segments?  Exact, page by page, for what was
 * committed when it began: a stored page is
 *
 *   unique   needed by one snapshot only: deleting that one frees it
 *   shared   needed by several snapshots, or by one and a running VM
 *   live     needed by running VMs only, for the snapshots that they take next
 *   dead     needed by nothing
 *
 * Costs one pass over all manifests (and more of them when there are more pages than
 * ACCOUNT_PAGES in the store: memory stays bounded) and one over all batch headers.
 * Runs beside everything else; any thread.
 */
#pragma once

#include "snapd/store.h"

struct account_snapshot {
	uint64_t id;
	uint64_t bytes_logical; /* RAM, zero pages not counted */
	uint64_t bytes_unique;	/* as stored */
	uint64_t pages_unique;
};

struct store_account {
	struct account_snapshot *snapshots; /* owned; ascending by id */
	size_t nr_snapshots;
	uint64_t bytes_unique, bytes_shared, bytes_live, bytes_dead; /* of pages, as stored */
	uint64_t pages_unique, pages_shared, pages_live, pages_dead;
	uint64_t bytes_headers; /* of batches; manifests, checkpoints, states, records */
};

struct account_config {
	store_live_fn live; /* as for store_gc(); may be NULL */
	void *live_opaque;
	/* Between steps: of so many epochs so many are done; true: stop.  May be NULL. */
	bool (*step)(void *opaque, uint64_t done, uint64_t total);
	void *opaque;
	uint32_t pages_at_once; /* 0: ACCOUNT_PAGES; tests take less */
};

#define ACCOUNT_PAGES (4u << 20)

void store_account_deinit(struct store_account *a);
/* -ECANCELED; -EUCLEAN: something that it needs can't be read. */
int store_account(struct store *s, const struct account_config *c, struct store_account *ret,
		  struct err *e);
