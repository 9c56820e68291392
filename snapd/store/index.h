/* SPDX-License-Identifier: MIT */
/*
 * index: the LMDB environment under STORE/index: the small transactional root of
 * the store.  Typed records in, typed records out; what they mean is store.c's.
 *
 * Every record is a packed little-endian struct that starts with struct rec_head
 * and may be followed by a tail of bytes.  rec_head.hash covers database, key and
 * value, so a flipped bit in LMDB's data is found when the record is read; the
 * structure of the file itself is checked by index_check.h before LMDB opens it.
 *
 * Threads: any, at the same time.  Writers wait for each other (LMDB).  No caller
 * may hold a read transaction while it calls index_update() or index_begin(): the
 * map could not grow.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include <lmdb.h>

#include "include/snapd/format.h"
#include "snapd/util/err.h"

enum index_db {
	IX_META,      /* "store", "counters", "features", "journal" */
	IX_VMS,	      /* id[16] */
	IX_VMNAMES,   /* uid be32, name */
	IX_TIMELINES, /* id be64 */
	IX_EPOCHS,    /* timeline be64, epoch be64 */
	IX_SNAPSHOTS, /* id be64 */
	IX_SNAPNAMES, /* vm[16], name */
	IX_SEGMENTS,  /* id be32 */
	IX_REFS,      /* id be32 of a segment; derived, see refs.h */
	IX_COUNTED,   /* timeline be64, epoch be64; derived */
	IX_NR_DBS,
};

struct rec_head {
	uint16_t version; /* 1 */
	uint16_t size;	  /* of the struct, without the tail */
	uint32_t flags;	  /* those of the database, below; on disk REC_KEYED as well */
	uint64_t hash;	  /* of key and value, this field as 0: XXH3-64 with seed enum index_db;
			   * keyed: 8 bytes of BLAKE2b with the store's index key */
};
static_assert(sizeof(struct rec_head) == 16, "disk format");
#define REC_KEYED 0x80000000u /* of an encrypted store; not seen outside record.c */

struct rec_store {
	struct rec_head head;
	uint8_t uuid[16];
	uint32_t major, minor;
	uint64_t created_ns;
	uint8_t secret[192];
};
static_assert(sizeof(struct rec_store) == 240, "disk format");

struct rec_counters {
	struct rec_head head;
	uint64_t next_timeline, next_snapshot;
	uint64_t next_seq; /* of batches */
};
static_assert(sizeof(struct rec_counters) == 40, "disk format");

struct rec_features { /* tail: names of what a reader must know, each with its NUL */
	struct rec_head head;
	uint32_t codec; /* enum page_codec of new pages */
	int32_t level;	/* zstd; else 0 */
};
static_assert(sizeof(struct rec_features) == 24, "disk format");

struct rec_journal { /* tail: the segments (u32) that the journal's batches lie in */
	struct rec_head head;
	uint32_t nr;	/* INDEX batches since the last image */
	uint32_t image; /* in an INDEX batch: it holds all records; in the index: the next one must
			 */
};
static_assert(sizeof(struct rec_journal) == 24, "disk format");

struct rec_vm { /* tail: command line */
	struct rec_head head;
	char name[64];
	char arch[16];
	uint32_t uid, page_size;
	uint64_t created_ns;
};
static_assert(sizeof(struct rec_vm) == 112, "disk format");

struct rec_vmname {
	struct rec_head head;
	uint8_t vm[16];
};
static_assert(sizeof(struct rec_vmname) == 32, "disk format");

struct rec_timeline {
	struct rec_head head;
	uint8_t vm[16];
	struct snapd_point parent;
	uint64_t last; /* head epoch */
	uint64_t created_ns;
};
static_assert(sizeof(struct rec_timeline) == 64, "disk format");

struct rec_blob {
	struct batch_ref last; /* {0,0}: none */
	uint64_t bytes;
	uint64_t hash; /* XXH3-64 of the whole blob */
	uint32_t parts;
	uint32_t reserved;
};
static_assert(sizeof(struct rec_blob) == 32, "disk format");

struct rec_epoch {
	struct rec_head head;
	uint8_t vm[16];
	struct snapd_point parent;   /* {0,0}: none; an epoch, across forks */
	struct snapd_point ancestor; /* the nearest that gc left; for the tree of snapshots */
	struct rec_blob manifest, checkpoint, state;
	struct batch_ref record; /* the EPOCH batch; {0,0} in that batch itself */
	uint64_t snapshot;	 /* 0: none, or deleted */
	uint64_t created_ns;
	uint32_t page_size;
	uint32_t chain_epochs; /* manifests to apply since the checkpoint; 0: is one */
	uint64_t chain_bytes, chain_pages;
	uint64_t nr_changed; /* entries of the manifest */
	uint64_t map_pages;  /* pages of the whole map that are not zero */
	uint64_t pages_in, zero, unchanged, duplicate, stored, collisions, read_back;
	uint64_t bytes_written;
};
static_assert(sizeof(struct rec_epoch) == 288, "disk format");

#define REC_SNAPSHOT_PINNED	1u /* head.flags: neither deleted nor pruned */
#define REC_SNAPSHOT_POSTMORTEM 2u /* memory of a VM whose VMM was dead */

struct rec_snapshot {
	struct rec_head head;
	uint8_t vm[16];
	struct snapd_point point;
	uint64_t taken_ns, pause_ns;
	char name[64];
	char note[256];
	char tags[256];
};
static_assert(sizeof(struct rec_snapshot) == 640, "disk format");

struct rec_snapname {
	struct rec_head head;
	uint64_t snapshot;
};
static_assert(sizeof(struct rec_snapname) == 24, "disk format");

enum seg_state { SEG_OPEN = 1, SEG_SEALED = 2, SEG_FREE = 3 };
struct rec_segment {
	struct rec_head head;
	uint64_t generation;
	uint64_t segment_bytes;
	uint32_t tail;	/* committed blocks, superblock included */
	uint32_t state; /* enum seg_state */
	uint64_t pages; /* page records up to the tail */
};
static_assert(sizeof(struct rec_segment) == 48, "disk format");

struct rec_refs { /* tail: struct ref_run each */
	struct rec_head head;
	uint64_t generation; /* of the segment */
	uint64_t pages;	     /* that are named */
	uint64_t places;     /* pages and parts of blobs that are named */
	uint64_t high;	     /* most of them since it was last looked through for space */
	uint64_t looks;	     /* how often it was */
};
static_assert(sizeof(struct rec_refs) == 56, "disk format");

struct rec_counted {
	struct rec_head head;
};
static_assert(sizeof(struct rec_counted) == 16, "disk format");

struct index;
struct reclog;
struct index_config {
	const char *dir;
	bool create, read_only;
	const uint8_t *key; /* SEAL_INDEX_KEY_BYTES, borrowed until close; NULL: not encrypted */
	size_t map_bytes;   /* first size of the memory map, 0: default; it grows by itself */
};
int index_open(const struct index_config *config, struct index **ret, struct err *e);
void index_close(struct index *ix); /* accepts NULL */
uint64_t index_bytes(struct index *ix);

struct ix_txn {
	struct index *ix;
	MDB_txn *txn;
	bool map_full; /* a put met a full map: index_update() will grow it and try again */
	/* What is put and removed is added here, for the journal; NULL: not.  Borrowed. */
	struct reclog *log;
};

/* A consistent view; index_end() accepts one that was never begun. */
int index_begin(struct index *ix, struct ix_txn *t, struct err *e);
void index_end(struct ix_txn *t);

/* Run fn in a write transaction and make it durable.  fn may run more than once
 * (the map grew) and must not change anything but through its transaction until
 * it is known that index_update() returned 0. */
int index_update(struct index *ix, int (*fn)(struct ix_txn *t, void *arg, struct err *e), void *arg,
		 struct err *e);
/* A commit failed so that nobody knows whether it will be there after a restart: LMDB
 * refuses everything until then, and what the commit names must not be touched. */
bool index_in_doubt(struct index *ix);
/* Call fn on the thread whose commit it is, before index_update() returns; it may come
 * from several at once.  Before there are any. */
void index_on_doubt(struct index *ix, void (*fn)(void *opaque), void *opaque);

struct ix_key {
	uint8_t b[96];
	size_t len;
};
/* Copy a string into a record's field: NUL-terminated, rest 0. */
#define rec_string(field, s) rec_string_copy((field), sizeof(field), (s))
void rec_string_copy(char *field, size_t size, const char *s);

struct ix_key ix_key_u32(uint32_t v);
struct ix_key ix_key_u64(uint64_t v);
struct ix_key ix_key_point(struct snapd_point p);
struct ix_key ix_key_id(const uint8_t id[16]);
/* head: id[16] or be32; name without its NUL, at most 63 bytes. */
struct ix_key ix_key_name(const void *head, size_t head_len, const char *name);

/* 0, -ENOENT (no reason set), -EUCLEAN, -EPROTO.  The tail, when asked for, is
 * valid until the transaction ends or writes. */
int index_get(struct ix_txn *t, enum index_db db, const struct ix_key *k, void *rec,
	      size_t rec_size, const void **tail, size_t *tail_len, struct err *e);
/* Fills in rec's head, but for its flags. */
int index_put(struct ix_txn *t, enum index_db db, const struct ix_key *k, void *rec,
	      size_t rec_size, const void *tail, size_t tail_len, struct err *e);
/* Of a record that exists or not. */
int index_del(struct ix_txn *t, enum index_db db, const struct ix_key *k, struct err *e);
/* Set the head as index_put() does; for records that are also kept elsewhere. */
void index_seal(const struct index *ix, enum index_db db, const struct ix_key *k, void *rec,
		size_t rec_size, const void *tail, size_t tail_len);
/* The reverse of index_seal(), as index_get() does it.  -EUCLEAN, -EPROTO. */
int index_unpack(struct index *ix, enum index_db db, const struct ix_key *k, const void *value,
		 size_t len, void *rec, size_t rec_size, const void **tail, size_t *tail_len,
		 struct err *e);
/* Is there a record, whatever is in it? */
bool index_has(struct ix_txn *t, enum index_db db, const struct ix_key *k);
/* Remove all records of a derived database. */
int index_clear(struct ix_txn *t, enum index_db db, struct err *e);
/* All records of `db` that the journal is for, as they are, added to `log`. */
int index_dump(struct ix_txn *t, enum index_db db, struct reclog *log, struct err *e);
int index_count(struct ix_txn *t, enum index_db db, uint64_t *ret, struct err *e);

/* Records whose key starts with `prefix` (may be NULL), ascending. */
struct ix_iter {
	struct ix_txn *t;
	enum index_db db;
	MDB_cursor *cursor;
	struct ix_key prefix;
	bool backwards; /* set it before the first; without a prefix: descending */
	bool started;
};
int index_iter_init(struct ix_iter *it, struct ix_txn *t, enum index_db db,
		    const struct ix_key *prefix, struct err *e);
/* 1 and the next record; 0 at the end; or an error. */
int index_iter_next(struct ix_iter *it, struct ix_key *k, void *rec, size_t rec_size,
		    struct err *e);
void index_iter_deinit(struct ix_iter *it);

/* Big-endian fields of keys. */
static inline uint64_t ix_be64(const uint8_t *p)
{
	uint64_t v;

	__builtin_memcpy(&v, p, sizeof(v));
	return __builtin_bswap64(v);
}

static inline uint32_t ix_be32(const uint8_t *p)
{
	uint32_t v;

	__builtin_memcpy(&v, p, sizeof(v));
	return __builtin_bswap32(v);
}
