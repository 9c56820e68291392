/* SPDX-License-Identifier: MIT */
/*
 * What the files of a rebuild share; nobody else includes it.
 *
 *   rebuild.c          the order of things; rules
 *   rebuild_scan.c     segment files → segments, batches, gaps
 *   rebuild_records.c  their records → a new index
 *   rebuild_settle.c   epochs that are whole → what stays in it
 */
#pragma once

#include "snapd/store/internal.h"
#include "snapd/store/rebuild.h"

/* A batch. */
struct found {
	struct batch_ref at, prev;
	uint32_t blocks, nr_entries; /* entries: of PAGES */
	uint32_t nr_pages;	     /* those of them that were not reclaimed */
	enum batch_type type;
	bool followed; /* a blob's part, and not its last one */
	bool used;     /* something leads to it */
	uint64_t seq;
};

/* Blocks [from, to) hold no batch, and one follows. */
struct gap {
	uint32_t segment, from, to;
};

/* Entries [from, from + len) of a batch were taken out of it: nothing named them any more. */
struct gone {
	loc_t from;
	uint32_t len;
};

struct records {	     /* of a batch */
	struct batch_ref at; /* its last part */
	uint64_t seq;
	enum batch_type type;
	bool image;
	void *bytes; /* owned */
	size_t len;
};

struct epoch_at {
	struct snapd_point at, ancestor;
	bool valid;
};

struct rebuild {
	struct store *s;
	const struct rebuild_config *c;
	struct rebuild_result *ret;
	struct found *found; /* owned; by place */
	size_t nr_found, cap_found;
	struct gap *gaps; /* owned */
	size_t nr_gaps, cap_gaps;
	struct gone *gone; /* owned; by place */
	size_t nr_gone, cap_gone;
	struct records *records; /* owned, with their bytes; by seq */
	size_t nr_records, cap_records;
	const struct records *image; /* the newest; NULL: none */
	struct epoch_at *epochs;     /* owned; ascending */
	size_t nr_epochs, cap_epochs;
	struct rec_counters counters; /* at least */
	uint32_t codecs;	      /* bits: enum page_codec */
	bool holes;		      /* a segment was written again */
	bool replayed;
};

__attribute__((format(printf, 2, 3))) void rebuild_tell(const struct rebuild *b, const char *fmt,
							...);
int rebuild_no_memory(struct err *e);

/* ---- rebuild_scan.c ---- */

int rebuild_find_segments(struct rebuild *b, struct err *e);
int rebuild_walk_segments(struct rebuild *b, struct err *e);
/* Bits: enum feature; what a reader must know of, by what is in the segments. */
uint32_t rebuild_features_found(const struct rebuild *b);
/* Of those found; NULL: none is there. */
struct found *rebuild_find(const struct rebuild *b, struct batch_ref at);
/* All parts of a blob are used. */
void rebuild_use_blob(struct rebuild *b, struct batch_ref at);

/* ---- rebuild_records.c ---- */

int rebuild_read_records(struct rebuild *b, struct err *e);
int rebuild_find_identity(struct rebuild *b, struct err *e);
/* A transaction that fills the index; arg: the rebuild. */
int rebuild_replay(struct ix_txn *t, void *arg, struct err *e);

/* ---- rebuild_settle.c ---- */

int rebuild_look_at_epochs(struct rebuild *b, struct err *e);
/* Before they are dropped. */
int rebuild_tell_lost(struct rebuild *b, struct err *e);
void rebuild_find_tails(struct rebuild *b);
void rebuild_tell_gaps(struct rebuild *b);
/* A transaction that drops what is lost; arg: the rebuild. */
int rebuild_settle(struct ix_txn *t, void *arg, struct err *e);
