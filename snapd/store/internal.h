/* SPDX-License-Identifier: MIT */
/*
 * What the store's files share; nobody else includes it.
 *
 *   store.c         open, recovery, the index in its place
 *   store/vms.c     VMs as records; so store/timeline.c
 *   store/stats.c   figures
 *   store/snapshot.c  snapshots as records: found, changed, deleted
 *   store/segtable.c  the table of segments: found, in sets, opened
 *   store/space.c   segment files: made, recycled, lent to epochs
 *   store/segfiles.c  segment files at start: which mean nothing, which are damaged
 *   store/features.c  what a reader must know; how new pages are stored
 *   store/journal.c what the index learns, in the segments as well
 *   store/append.c  pages and blobs → batches → a segment's tail
 *   store/read.c    locs → headers → few large reads → checked pages; store/round.c a part
 *   store/headers.c batches of a reader, and their headers, cached
 *   store/blob.c    manifests, checkpoints, states: parts in batches → bytes
 *   store/map.c     epoch records → whole maps; rebuilding the dedup table
 *   store/mapstream.c  the same as sequences, in bounded memory
 *   store/overlay.c  layers of runs → one sequence                            (pure)
 *   store/epoch.c   one epoch, from its begin to its end
 *   store/intake.c  its pages: what to store, and whether it is stored already
 *   store/commit.c  its manifest, checkpoint and records; the commit
 *   store/prove.c   candidates waiting for their proof
 *   store/changes.c what an epoch changes, sorted                             (pure)
 *   store/gc.c      roots in, what nothing needs dropped
 *   store/condemn.c  what becomes of each segment; store/prune.c: of each record
 *   store/merge.c   manifests of epochs that go, into those that build on them
 *   store/mark.c    what roots need, and how many name it
 *   store/refs.c    those counts: how many epochs name a place
 *   store/rewrite.c segments in part dead, written again
 *   store/pin.c     what must stay while gc runs
 *
 * Locks, outermost first: roots_lock → LMDB's writer lock → segments_lock, which is
 * held to open files, and for one superblock's first check, not across other I/O.
 * A thread that makes the next segment lives from seg_reserve_ahead() until it is
 * done; space_close() waits for it.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>

#include "snapd/store/changes.h"
#include "snapd/store/codec.h"
#include "snapd/store/dedup.h"
#include "snapd/store/index.h"
#include "snapd/io_uring_reader.h"
#include "snapd/io_uring_writer.h"
#include "snapd/store/manifest.h"
#include "snapd/store/packer.h"
#include "snapd/store/segment.h"
#include "snapd/store.h"
#include "snapd/util/cleanup.h"

#define SEG_ID_MAX	    ((1u << 28) - 1)
#define SEG_TAIL_MIN_BLOCKS 16u /* less room than this: the segment is sealed */

/* What the index names in a segment, as gc counted it. */
struct seg_named {
	uint64_t pages, places, high, looks; /* struct seg_counts */
};

struct seg {
	uint32_t id; /* constant */
	/* segments_lock: */
	uint64_t generation;
	uint64_t segment_bytes;
	uint64_t disk_bytes; /* allocated: fewer once it was rewritten */
	uint64_t rewrites;   /* as its superblock says; of the file that fd is */
	uint64_t commit;     /* the last one to it, see store.commits */
	uint64_t pages;	     /* page records up to the tail */
	struct seg_named named;
	uint32_t tail; /* committed, in blocks */
	enum seg_state state;
	bool busy;	/* an epoch appends to it */
	bool indexed;	/* the index has its record */
	bool damaged;	/* missing, short, or its tail in doubt: never appended to */
	bool ready;	/* FREE, and its superblock is durable: nothing to do to append */
	bool proven;	/* superblock read or written in this process */
	bool condemned; /* gc drops it, or rewrites it: no new reference to its pages */
	bool probed;	/* `rewrites` is known */
	bool orphan;	/* not in the table: its file was replaced; goes with its last user */
	int fd;		/* -1, or open for `users` */
	uint32_t users;
};

/* A set of segments. */
struct seg_refs {
	uint8_t *bits; /* owned; under segments_lock */
	uint32_t nr;
};

struct pin {
	struct pin *next;
	struct snapd_point at;
};

struct store {
	/* Constant after open. */
	char *dir;
	int dir_fd, segments_fd, lock_fd;
	bool read_only, no_prove;
	uint32_t segment_bytes;
	uint64_t max_bytes;
	int (*fault)(void *opaque, int fd, uint64_t offset, size_t len);
	void *fault_opaque;
	uint8_t uuid[16];
	struct page_secret secret;
	struct rec_store record;
	struct seal *seal; /* owned; NULL: not encrypted */
	struct index *index;
	_Atomic uint32_t features; /* bits: enum feature; those recorded, once it is open */
	struct codec_policy policy;
	struct pool *pool;   /* borrowed; may be NULL */
	_Atomic bool direct; /* O_DIRECT works here, as far as we know */

	struct dedup dedup;	       /* locks of its own */
	enum store_dedup dedup_domain; /* constant */
	uint32_t dedup_pages_per_read; /* constant */
	struct codec_list codecs;      /* likewise */

	_Atomic uint64_t next_seq, next_snapshot;

	pthread_mutex_t segments_lock;
	struct seg **segs; /* by id; NULL: no such segment */
	uint32_t nr_segs;  /* slots */
	uint64_t bytes_segments;
	uint32_t nr_open_fds;
	bool making_ahead;   /* `maker` is at work */
	bool has_maker;	     /* `maker` is to be joined */
	pthread_t maker;     /* makes the next segment before it is needed */
	pthread_cond_t made; /* making_ahead was cleared */
	struct epoch_scratch *idle_scratch[64];
	struct writer *idle_writers[64];
	struct store_reader *idle_readers[64];
	uint32_t nr_idle_writers, nr_idle_readers, nr_idle_scratch, max_idle;

	/* What gc must not miss while it runs. */
	pthread_mutex_t roots_lock; /* gc's last step against new references */
	struct pin *pins;	    /* roots_lock */
	struct epoch *epochs;	    /* in flight; roots_lock */
	bool gc_active;		    /* roots_lock */
	bool gc_spoiled;	    /* no memory to note something: gc gives up; roots_lock */
	struct snapd_point *gc_new; /* roots that came while gc runs; roots_lock */
	size_t nr_gc_new, cap_gc_new;
	bool counts_known;	      /* struct seg has what the index counts; the running gc's */
	bool names_unsynced;	      /* a segment's rename may not be durable; the running gc's */
	uint64_t commits;	      /* to segments; segments_lock */
	uint64_t first_generation;    /* of files that are made; segments_lock */
	struct seg_refs gc_refs;      /* by commits while gc runs; segments_lock */
	struct seg_refs journal_refs; /* owned; where INDEX batches lie; segments_lock */
	size_t journal_txn;	      /* of which transaction that is; segments_lock */
	_Atomic bool journal_stale;   /* the last batch of it found no room */
	uint64_t gc_first_timeline;   /* timelines from this id on are newer than gc */
};

/* ---- store.c ---- */

int store_random(void *buf, size_t len); /* -errno */
/* Locked, with its key, and without an index: only store_close() and what is said to
 * work without one. */
int store_open_bare(const char *dir, const char *key_file, struct store **ret, struct err *e);
/* Make INDEX_UNFINISHED, durable, filled by fn while it is s->index. */
int store_make_index(struct store *s, int (*fn)(struct store *s, void *arg, struct err *e),
		     void *arg, struct err *e);
/* Put it in the index's place, which becomes INDEX_OLD unless there is one. */
int store_swap_index(struct store *s, struct err *e);
#define INDEX_UNFINISHED "index.new"
#define INDEX_OLD	 "index.old"

/* ---- store/features.c ---- */

enum feature {
	FEATURE_LZ4,
	FEATURE_ZSTD,
	FEATURE_SEALED,
	FEATURE_JOURNAL,
	FEATURE_HOLES,
	NR_FEATURES
};
int features_load(struct store *s, struct err *e); /* -EPROTO: one that we don't know */
int features_put(struct ix_txn *t, void *store, struct err *e);
int features_log(const struct store *s, struct reclog *log); /* the same record */
/* Recorded from now on.  Durable. */
int features_add(struct store *s, uint32_t features, struct err *e); /* bits */
/* How new pages are stored; features_put() records it. */
int features_choose(struct store *s, const char *compression, struct err *e);
/* The same, and recorded when it differs. */
int features_switch(struct store *s, const char *compression, struct err *e);
/* Before the first page that is stored so; any thread. */
int features_need(struct store *s, struct codec_policy policy, struct err *e);

/* ---- store/segtable.c ---- */

int seg_add(struct store *s, uint32_t id, struct seg **ret); /* segments_lock held */
struct seg *seg_find(const struct store *s, uint32_t id);    /* segments_lock held */
/* A page that others committed is about to be referred to: false when it is not
 * there (any more); else its segment is in *refs, and gc leaves it alone. */
bool seg_ref(struct store *s, struct seg_refs *refs, loc_t loc);
/* Open for reading or writing; *ident as of now.  -EUCLEAN when there is none. */
int seg_open(struct store *s, uint32_t id, struct seg **ret, int *fd, struct seg_ident *ident,
	     struct err *e);
void seg_close(struct store *s, struct seg *seg);
/* Put another file in the segment's place: fd, rewrites, pages and disk_bytes are those of
 * *with, which is the table's from now on (malloc()ed).  Whoever has the old one open keeps
 * it.  Can't fail: the file has its name already. */
void seg_replace(struct store *s, struct seg *seg, struct seg *with);
/* The same, segments_lock held: users goes up, the file is open. */
int seg_use(struct store *s, struct seg *seg, struct err *e);
int seg_file_open(struct store *s, const char *name, int flags); /* -1 and errno */
int seg_fd_open(struct store *s, uint32_t id, int flags);	 /* likewise */
int seg_refs_add(struct seg_refs *refs, uint32_t id);
int seg_refs_merge(struct seg_refs *to, const struct seg_refs *from); /* segments_lock held */
bool seg_refs_has(const struct seg_refs *refs, uint32_t id);	      /* segments_lock held */
void seg_path(uint32_t id, char name[16]);

/* ---- store/space.c ---- */

/* A segment to append to, marked busy, its file open; superblock durable. */
int seg_take(struct store *s, struct seg **ret, struct err *e);
void seg_return(struct store *s, struct seg *seg);
/* Have a segment made in the background, unless there is one for the next seg_take(). */
void seg_reserve_ahead(struct store *s);
void space_close(struct store *s);
/* Make sure that no batch in a free segment is valid any more. */
void seg_retire(struct store *s, uint32_t id);
/* gc: remove the file of a free segment and forget it; segments_lock held. */
void seg_drop(struct store *s, struct seg *seg);

/* ---- store/segfiles.c ---- */

/* Remove files that the index does not name; find out which are damaged. */
int space_recover(struct store *s, struct err *e);
/* Numbers of the segment files, ascending, malloc()ed. */
int space_list(struct store *s, uint32_t **ret, size_t *nr, struct err *e);
/* -EUCLEAN when there are segment files. */
int space_is_empty(struct store *s, struct err *e);

/* ---- store/append.c ---- */

#define RECENT_MAX 12u

/* A segment that this epoch appends to. */
struct append_seg {
	struct seg *seg; /* taken */
	int fd;		 /* borrowed from seg */
	struct seg_ident ident;
	uint32_t start, tail; /* blocks; start is the committed tail */
	uint64_t pages;
	bool followed; /* the next segment was asked for */
};

struct append_recent {
	struct wbuf *buf; /* pinned */
	uint32_t segment, block;
	struct batch_header *plain; /* owned; of a sealed batch: its header before that */
};

struct appender {
	struct store *s;
	struct writer *w;
	uint8_t vm[16];
	struct snapd_point point;
	uint32_t page_shift;
	struct append_seg *segs; /* owned; the last one is in use */
	size_t nr_segs, cap_segs;
	bool packing; /* `packer` is there */
	struct packer packer;
	uint8_t *packed; /* owned, BATCH_BYTES_MAX: compressed pages of the batch being filled */
	uint8_t *page;	 /* owned: the last one decompressed for a proof */
	uint8_t *opened; /* owned: its stored bytes, decrypted */
	/* The batch being filled, when buf is set. */
	struct wbuf *buf;
	uint32_t header_bytes;	/* room left for the header */
	uint32_t payload_bytes; /* room for the payload */
	uint32_t raw_bytes, packed_bytes;
	uint32_t nr_pages, max_pages;
	struct append_recent recent[RECENT_MAX];
	uint32_t nr_recent, next_recent;
	uint64_t bytes_written;
	bool unsynced;
	struct batch_ref record; /* of index records, not committed yet; {0,0}: none */
};

int append_init(struct appender *a, struct store *s, const uint8_t vm[16], struct snapd_point point,
		uint32_t page_shift, struct err *e);
/* How its pages are stored, in place of the store's way; before the first of them. */
int append_compress(struct appender *a, struct codec_policy policy, struct err *e);
/* Gives segments and writer back; what was written stays behind the tails unless
 * the caller moved them. */
void append_deinit(struct appender *a);
/* Whether what was written is committed will only be known after a restart: nobody may
 * write to these segments until then. */
void append_abandon(struct appender *a);
int append_page(struct appender *a, uint64_t gfn, struct pageid id, const void *bytes, loc_t *ret,
		struct err *e);
int append_blob(struct appender *a, enum batch_type type, const void *bytes, size_t len,
		struct rec_blob *ret, struct err *e);
/* What was submitted can be read back; the batch being filled goes on. */
int append_settle(struct appender *a, struct err *e);
/* Everything so far is on stable storage. */
int append_sync(struct appender *a, struct err *e);
/* Bytes of a page that this appender wrote lately, or NULL; valid until the next call. */
const void *append_recent(struct appender *a, loc_t loc);
bool append_owns(const struct appender *a, loc_t loc);

/* ---- store/read.c ---- */

int store_reader_get(struct store *s, uint32_t page_size, struct store_reader **ret, struct err *e);
void store_reader_put(struct store *s, struct store_reader *r, bool forget);

enum probe_result { PROBE_EQUAL, PROBE_DIFFERENT, PROBE_COLLISION, PROBE_UNREADABLE };
struct page_probe {
	loc_t loc;
	struct pageid id;
	const void *bytes;
	enum probe_result result;
	uint32_t index; /* the caller's */
};
/* Is what lies at loc the page `bytes`?  Sorts the array by loc.  Damage is a
 * result, not an error. */
int reader_probe(struct store_reader *r, struct page_probe *probes, size_t nr, struct err *e);
void reader_forget(struct store_reader *r);
struct reader *reader_ring(struct store_reader *r); /* while it reads no pages */
/* The header of loc's batch, if the reader has it; borrowed until it reads again. */
bool reader_batch(struct store_reader *r, loc_t loc, const struct batch_header **ret,
		  const struct batch_page **pages);

/* ---- store/blob.c ---- */

/* The last part of a blob, read before it is asked for. */
struct blob_ahead {
	const struct rec_blob *blob; /* borrowed */
	uint8_t *bytes;		     /* in the call's memory */
	uint64_t got;		     /* 0: nothing */
	struct seg *seg;
	struct seg_ident ident;
};
/* Of a[0, nr), whose blobs are set; *memory is the caller's to free.  Best effort. */
void store_blobs_ahead(struct store *s, struct blob_ahead *a, size_t nr, uint8_t **memory);
/* malloc()ed, checked.  `ahead` of that blob, or NULL. */
int store_blob_read(struct store *s, const struct rec_blob *blob, enum batch_type type,
		    const char *what, const struct blob_ahead *ahead, void **ret, struct err *e);
/* A blob of which only the last part's place is known; malloc()ed. */
int store_blob_read_from(struct store *s, struct batch_ref at, enum batch_type type, void **ret,
			 size_t *len, struct err *e);
/* Part `index` of a blob, checked, at *payload in `part`: BATCH_BYTES_MAX bytes, aligned to
 * FMT_BLOCK. */
int store_blob_read_part(struct store *s, struct batch_ref at, enum batch_type type, uint32_t index,
			 uint8_t *part, const uint8_t **payload, uint64_t *bytes, struct err *e);
/* Step from a part of a blob to the one before; *payload: bytes in this one. */
int store_blob_part(struct store *s, struct batch_ref *at, uint64_t *payload, struct err *e);
/* Of a whole blob, for its record: with the store's secret where that is one. */
uint64_t store_blob_hash(const struct store *s, const void *bytes, size_t len);

/* ---- store/map.c ---- */

/* The record of a point; {t, 0} of a fork resolves to its parent.  1: the point is
 * an empty beginning. */
int store_epoch_record(struct ix_txn *t, struct snapd_point *at, struct rec_epoch *ret,
		       struct err *e);
/* gc has not given the epoch other manifests between these two (merge.c). */
bool epoch_same_maps(const struct rec_epoch *a, const struct rec_epoch *b);
#define MERGES_MAX 16u /* so often a reader begins again for that */
int store_map_apply(struct pagemap *m, const void *bytes, size_t len, struct err *e);
int store_dedup_rebuild(struct store *s, struct err *e);
uint64_t store_dedup_domain(const struct store *s, const uint8_t vm[16], uint32_t uid);

/* ---- store/prove.c ---- */

#define PENDING_BYTES (4u << 20)
#define PENDING_MAX   (PENDING_BYTES / 4096u)

/* A page that may be stored already, until bytes decide. */
struct pending {
	uint64_t gfn;
	struct pageid id;
	loc_t live, dup;	  /* candidates; 0: none */
	const uint8_t *bytes;	  /* in the queue's arena */
	enum probe_result result; /* of the last probe */
	bool settled;
};

struct prover {
	struct pending *entries;   /* owned, PENDING_MAX */
	uint8_t *arena;		   /* owned, PENDING_BYTES */
	struct page_probe *probes; /* owned, PENDING_MAX */
	uint64_t *gfns;		   /* owned; hash set of the entries' gfn + 1 */
	struct prover_dup *dups;   /* owned, PENDING_MAX; for prover_limit() */
	uint32_t nr, max;
	uint32_t page_size;
};
int prover_init(struct prover *p, uint32_t page_size);
void prover_deinit(struct prover *p);
bool prover_has(const struct prover *p, uint64_t gfn);
bool prover_full(const struct prover *p);
void prover_add(struct prover *p, const struct epoch_page *page, loc_t live, loc_t dup);
/* Let at most `reads` extents of other epochs' pages be candidates, those with the
 * most pages; returns how many are.  The other candidates are dropped, and counted. */
uint64_t prover_limit(struct prover *p, const struct appender *a, uint64_t reads,
		      uint64_t *declined);
void prover_reset(struct prover *p);

/* ---- store/epoch.c ---- */

/* E5: what duplicates may cost a restore; docs/benchmarks.md has the measurement. */
#define DEDUP_PAGES_PER_READ 16u
#define DEDUP_READS_FREE     16u

struct gone_range {
	uint64_t gfn, end;
};

/* Memory that each epoch needs, kept for the next one: fresh pages cost a fault each. */
struct epoch_scratch {
	uint32_t page_size;
	struct changes changes;
	struct prover prover;
	struct manifest_writer manifest;
};
#define SCRATCH_CHANGES_KEPT  (1u << 16)
#define SCRATCH_MANIFEST_KEPT (1u << 20) /* bytes */
int scratch_get(struct store *s, uint32_t page_size, struct epoch_scratch **ret);
void scratch_put(struct store *s, struct epoch_scratch *x); /* accepts NULL */
void scratch_destroy(struct epoch_scratch *x);

struct epoch {
	struct store *s;
	struct epoch *next; /* roots_lock */
	uint8_t vm[16];
	uint64_t domain; /* of duplicates */
	uint32_t page_size, page_shift;
	struct snapd_point point;
	struct snapd_point parent; /* {0,0}: none */
	struct rec_epoch parent_rec;
	struct pagemap *live;	       /* borrowed */
	struct epoch_scratch *scratch; /* lent by the store */
	struct gone_range *gone;       /* owned, in the order given */
	size_t nr_gone, cap_gone;
	struct appender append;
	struct store_reader *reader; /* lent by the store when first needed */
	struct seg_refs refs;
	struct epoch_stats stats;
	uint64_t neighbours[64]; /* batches whose pages were put back into the table */
	uint64_t dedup_reads;	 /* extents that a restore reads for its duplicates */
	int failed;		 /* -errno of a put; only abort is left */
};
/* As epoch_abort(), of an epoch that was committed. */
void epoch_finish(struct epoch *ep);

/* ---- store/intake.c ---- */

/* Decide all pages that wait for a proof. */
int epoch_settle(struct epoch *ep, struct err *e);

/* ---- store/journal.c ---- */

/* As index_update(), and what fn puts and removes is in the journal. */
int store_update(struct store *s, int (*fn)(struct ix_txn *t, void *arg, struct err *e), void *arg,
		 struct err *e);
/* The same with an image of the whole index; fn may be NULL. */
int store_update_image(struct store *s, int (*fn)(struct ix_txn *t, void *arg, struct err *e),
		       void *arg, struct err *e);
/* As store_update(); -ENOSPC where there is no room for the journal. */
int store_update_whole(struct store *s, int (*fn)(struct ix_txn *t, void *arg, struct err *e),
		       void *arg, struct err *e);
/* What every batch with records begins with. */
int journal_begin(struct store *s, struct ix_txn *t, bool image, struct reclog *log, struct err *e);
/* There is no INDEX batch, and nothing that one would be needed for. */
int journal_put_empty(struct ix_txn *t, struct err *e);
/* Learn where it is; make it, where there is none yet. */
int journal_open(struct store *s, struct err *e);

/* ---- store/commit.c ---- */

int commit_put_tails(struct ix_txn *t, const struct appender *a, struct err *e);
int commit_put_counters(struct ix_txn *t, const struct store *s, struct err *e);
/* After the transaction. */
void commit_publish_tails(struct appender *a);

/* ---- store/snapshot.c ---- */

/* Each may be NULL. */
int snapshot_check_texts(const char *name, const char *note, const char *tags, struct err *e);

/* ---- store/pin.c ---- */

/* A point becomes needed; roots_lock held. */
int gc_note_root(struct store *s, struct snapd_point at);

uint64_t store_now_ns(void);
void store_unlock(pthread_mutex_t **lock);
#define scoped_lock(l)                                                                       \
	_cleanup_(store_unlock) __attribute__((unused)) pthread_mutex_t *scoped_lock_ = (l); \
	pthread_mutex_lock(l)
