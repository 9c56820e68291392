/* SPDX-License-Identifier: MIT */
/*
 * refs: how many epochs of the index name each place in the segments: a page, or a
 * blob's part.  In: what epochs that came or went name; out: records that say, for each
 * segment, which places are needed.
 *
 *   F1 An epoch is *counted* or it is not; the record that says so and the counts change
 *      in one transaction.
 *   F2 Counts are derived: they can be made again from the epochs.  They are when they
 *      contradict the index: an epoch that was counted has no record, a segment is in
 *      another life, a count falls below zero (-ESTALE).
 *   F3 Only gc changes them, and one gc at a time.
 *
 * One thread: gc's.
 */
#pragma once

#include "snapd/store/index.h"

/* Places of segment s are s << 32 | block << 12 | entry; a blob's part has entry 0xfff. */
#define REF_BLOB 0xfffu

struct ref_delta {
	uint64_t at;
	uint32_t len; /* places, counting up by one entry */
	int32_t n;
};

struct ref_log {
	struct ref_delta *v; /* owned */
	size_t nr, cap;
};
void ref_log_deinit(struct ref_log *l);
int ref_log_add(struct ref_log *l, loc_t first, uint64_t len, int32_t n); /* -ENOMEM */
int ref_log_add_part(struct ref_log *l, struct batch_ref at, int32_t n);
int ref_log_add_all(struct ref_log *l, const struct ref_log *from);

struct ref_run { /* on disk, too */
	uint32_t at, len;
	uint32_t count; /* not 0 */
};

/* Of one segment. */
struct seg_counts {
	uint32_t segment, nr;
	struct ref_run *runs; /* owned; ascending, disjoint */
	uint64_t generation;
	uint64_t pages;	 /* places in the runs that are pages */
	uint64_t places; /* all */
	uint64_t high;	 /* most places since it was last looked through for space */
	uint64_t looks;
};
void seg_counts_deinit(struct seg_counts *c);
/* -ENOENT: nothing in it is named. */
int refs_get(struct ix_txn *t, uint32_t segment, struct seg_counts *ret, struct err *e);
int refs_put(struct ix_txn *t, struct seg_counts *c, struct err *e); /* none left: removed */
/* Is the place named?  Ascending places are found fastest. */
bool refs_has(const struct seg_counts *c, uint32_t at);

struct ref_changes {
	struct seg_counts *v; /* owned; ascending */
	size_t nr, cap;
};
void ref_changes_deinit(struct ref_changes *c);
/* What the counts will be; sorts the log.  -ESTALE (F2). */
int refs_change(struct ix_txn *t, struct ref_log *l, struct ref_changes *ret, struct err *e);
int refs_put_all(struct ix_txn *t, struct ref_changes *c, struct err *e);
