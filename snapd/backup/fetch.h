/* SPDX-License-Identifier: MIT */
/*
 * fetch: pages of packs out of the bucket, by a few threads: header and table of a pack, then
 * the runs that are needed in as few ranges as possible; each page checked against its name.
 * Memory: a range and a table for each thread.
 */
#pragma once

#include "snapd/backup/memory.h"

struct fetch_page {
	loc_t ref; /* memory.h */
	uint64_t gfn;
};

struct fetch {
	struct repo *r;
	const struct packset *packs;
	struct fetch_page *pages; /* sorted by fetch_run() */
	size_t nr;
	uint32_t page_size; /* that all packs must have */
	/* A page, checked; several threads at once.  `bytes` are valid during the call. */
	int (*fn)(void *arg, uint64_t gfn, const uint8_t *bytes, struct err *e);
	/* The pages of a run are through; may be NULL.  The same thread. */
	int (*flush)(void *arg, struct err *e);
	void *(*worker)(void *arg, int i); /* what fn and flush get on thread i; NULL: arg */
	void *arg;
	bool (*stop)(void *arg);
	_Atomic uint64_t bytes; /* out: received */
};

#define FETCH_THREADS 4
int fetch_run(struct fetch *f, struct err *e);
