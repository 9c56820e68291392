/* SPDX-License-Identifier: MIT */
/*
 * check: is what the store has whole?  Every kind of damage is found and named,
 * and what it costs is told: which snapshots, and which of their pages.
 *
 *   structure  every index record and what it refers to; every segment file, its
 *              superblock and each batch header up to the tail; manifests,
 *              checkpoints and states of every epoch; every loc that they name
 *   data       besides, the bytes of pages, all or a share of the batches
 *
 * Runs beside captures, readers and gc: what gc took away meanwhile is no damage.
 * Any thread; several may run.
 */
#pragma once

#include "snapd/store.h"

enum damage_kind {
	DAMAGE_RECORD,	/* an index record */
	DAMAGE_LINK,	/* a record refers to one that is not there, or not back to it */
	DAMAGE_SEGMENT, /* the file is missing, cut off, or another's */
	DAMAGE_BATCH,	/* blocks of a segment hold no valid batch */
	DAMAGE_COUNT,	/* a record's figure is not what lies there */
	DAMAGE_BLOB,	/* a manifest, checkpoint or state */
	DAMAGE_LOC,	/* a manifest names a page that is not there */
	DAMAGE_PAGE,	/* the bytes of a page */
	DAMAGE_NR_KINDS
};
extern const char *const damage_kind_names[DAMAGE_NR_KINDS];

struct store_damage {
	enum damage_kind kind;
	char text[480]; /* one line: what, where, why */
};

#define LOSS_RANGES_MAX 64u

/* What the damage means for a snapshot. */
struct store_loss {
	uint64_t snapshot;
	char vm_name[SNAPD_NAME_MAX];
	uint32_t page_size;
	bool whole;	    /* its map or its state can't be read: nothing of it is left */
	uint64_t nr_pages;  /* else: pages that are lost */
	uint32_t nr_ranges; /* first ranges of them */
	uint64_t ranges[LOSS_RANGES_MAX][2]; /* gfn, pages */
};

struct store_check_config {
	bool read_data;
	uint32_t percent;    /* of the batches, with read_data; 0: all */
	uint64_t rate_bytes; /* a second; 0: as fast as it goes */
	/* Between steps, bytes read of those in use; true: stop.  May be NULL. */
	bool (*step)(void *opaque, uint64_t done, uint64_t total);
	void (*damage)(void *opaque, const struct store_damage *d);
	void (*loss)(void *opaque, const struct store_loss *l);
	void *opaque;
};

struct store_check_result {
	uint64_t records, segments, batches, blobs;
	uint64_t pages_read, bytes_read;
	uint64_t damages, losses; /* how many of each were told */
};

/* 0: it ran to its end (whole if and only if there were no damages); -ECANCELED; errors
 * that are not damage. */
int store_check(struct store *s, const struct store_check_config *c, struct store_check_result *ret,
		struct err *e);

/*
 * A step of a scrub: one segment with every byte of its batches, the first in use from
 * `from` on; from 0 on, the records of the index as well.  *next is where to go on; 0:
 * that was the last.  As store_check() with read_data, without losses: each batch is
 * judged by itself, so that a step needs no more memory than a segment's list of them.
 */
int store_scrub_step(struct store *s, const struct store_check_config *c, uint32_t from,
		     uint32_t *next, struct store_check_result *ret, struct err *e);
