/* SPDX-License-Identifier: MIT */
/*
 * simdisk: the calls by which a process changes files, taken over in a test program:
 * those of its own code and of liblmdb by symbols of the same name, io_uring as a
 * ring that is carried out in the process (simring.c).  Files are real, in a fast
 * directory.  Two uses, one at a time:
 *
 * Recording: each change below one directory goes to a log, with its bytes, in
 * order; syncs too, each with what it makes durable.  cutdisk.h makes from it what a
 * power cut may leave.
 *
 * Failing: calls (and allocations) are counted, and the n-th fails.
 *
 * Linked into the program itself, as sources: symbols of a program come before
 * those of libraries.  Threads: any.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- recording ---- */

enum disk_op_kind {
	DISK_WRITE,   /* bytes at an offset of a file */
	DISK_SIZE,    /* a file's new size */
	DISK_LINK,    /* a new entry of a directory */
	DISK_UNLINK,  /* an entry less */
	DISK_RENAME,  /* an entry's new name in the same directory, and an end to what had it:
		       * both or neither */
	DISK_SYNC,    /* of a file: its writes and sizes that were complete when it began */
	DISK_DIRSYNC, /* of a directory: its entries */
	DISK_LOST,    /* a sync of a file failed: what it was to cover is gone */
	DISK_MARK,    /* the test's */
};

struct disk_op {
	enum disk_op_kind kind;
	uint32_t node;	 /* file; LINK, UNLINK, RENAME: what the entry names */
	uint32_t dir;	 /* LINK, UNLINK, RENAME, DIRSYNC */
	uint64_t offset; /* WRITE; SIZE: the size; MARK: its argument */
	size_t len;	 /* WRITE */
	uint8_t *data;	 /* WRITE; owned */
	char name[32];	 /* LINK, UNLINK; RENAME: the new one */
	uint64_t done;	 /* clock when complete; 0: under way */
	uint64_t began;	 /* clock when issued */
	bool alone;	 /* SYNC: of the one write that `began` then (O_DSYNC) */
	bool is_dir;	 /* LINK, RENAME */
	uint32_t over;	 /* RENAME: the node that had the name; 0: none */
};

#define DISK_ROOT 0u /* node of the directory that is recorded */

struct disk_log {
	struct disk_op *ops; /* owned */
	size_t nr, cap;
	size_t start;	   /* operations before this one made what was there */
	uint32_t nr_nodes; /* nodes are 0 … nr_nodes - 1 */
};

/* What a recording takes for not done, to see that a test notices. */
enum disk_ablation {
	ABLATE_NONE,
	ABLATE_SEGMENT_SYNC, /* fdatasync of segments */
	ABLATE_DIR_SYNC,     /* fsync of directories */
	ABLATE_INDEX_SYNC,   /* fdatasync of the index before its meta page */
	ABLATE_COMMIT_FIRST, /* writes to segments reach the disk after the next commit */
	ABLATE_NEW_SYNC,     /* fsync of a file that will take another one's place */
	ABLATE_RENAME_SYNC,  /* fsync of the directory after that */
	NR_ABLATIONS
};

/* From here on.  What is below `root` now is durable; the log begins with it. */
void disk_record(const char *root, enum disk_ablation ablation);
void disk_mark(uint64_t arg);
void disk_stop(struct disk_log *ret); /* the caller frees it */
void disk_log_deinit(struct disk_log *log);

/* ---- failing ---- */

enum disk_failure {
	FAIL_EIO, /* any call, with EIO or ENOMEM; the others only what changes the disk: */
	FAIL_ENOSPC,
	FAIL_SHORT,  /* half is written; where there is no half, EIO */
	FAIL_STAY,   /* EIO, although it is done; all that follow fail, and are not done */
	FAIL_COMMIT, /* as FAIL_STAY; only writes through O_DSYNC, LMDB's commits, count */
	NR_FAILURES,
	FAIL_SYNC /* EIO; only syncs count; for recordings: see DISK_LOST */
};

/* The n-th call of that kind from now on, in any thread that is not exempt, fails. */
void disk_fail(uint64_t n, enum disk_failure how);
/* Lift it; true when a call failed.  *what (static) names it. */
bool disk_lift(const char **what);
/* The calling thread; those that never said so count, except under ASan. */
void disk_exempt(bool yes);
/* Allocations minus frees of this process so far; 0 always under ASan, which has
 * its own eyes. */
long disk_allocations(void);

/* Another order of the ring's completions. */
void disk_ring_seed(uint64_t seed);
