/* SPDX-License-Identifier: MIT */
/*
 * store: the directory of segments and the LMDB index as one thing: VMs,
 * timelines, epochs, snapshots, pages.  Thread-safe, except that one epoch or
 * one reader handle belongs to one thread at a time.
 *
 * A *timeline* is a line of epochs of one VM; it starts empty or forks from a
 * point (timeline, epoch) of another.  An *epoch* is a durable set of page
 * changes plus state; epoch numbers of a timeline count up from 1.  A *snapshot*
 * names an epoch.  Point {t, 0} of a fork is its parent point.
 *
 * Commit order (I7), the only way anything becomes visible:
 *   S1 page batches, state, manifest, epoch record are written to segments whose
 *      directory entries are durable;
 *   S2 fdatasync of each segment written;
 *   S3 one LMDB transaction (synchronous): the epoch, the snapshot, the
 *      segments' new tails.
 * Before S3 ends nothing of the epoch is visible to anyone, and another epoch
 * never refers to its pages.  After a crash the bytes behind the tails are free.
 *
 * Everything read from disk is checked: corrupt data gives -EUCLEAN and a reason
 * that names segment, offset, and where known snapshot and GPA (I8).
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "include/snapd/format.h"
#include "snapd/store/pageid.h"
#include "snapd/store/pagemap.h"
#include "snapd/util/err.h"

struct store;
struct epoch;
struct pool;

/* Whose equal pages are stored once. */
enum store_dedup {
	STORE_DEDUP_OWNER, /* all VMs of a uid */
	STORE_DEDUP_VM,	   /* each VM on its own, all its timelines */
	STORE_DEDUP_STORE, /* everyone: who attaches a VM can find out what others store */
	STORE_DEDUP_OFF,
};

struct store_config {
	const char *dir;
	bool create;		/* make it when it does not exist */
	bool read_only;		/* beside a running daemon; no lock taken */
	uint32_t segment_bytes; /* of new segments; 0: default */
	uint64_t max_bytes;	/* hard limit of segments on disk; 0: none */
	enum store_dedup dedup;
	uint64_t dedup_bytes;	       /* memory of the table of duplicates; 0: default */
	uint32_t dedup_pages_per_read; /* bench only: another limit of fragmentation; 0: default */
	/* How new pages are stored, from now on: "none", "lz4", "zstd:LEVEL"; NULL: as
	 * the store says, where a new store says lz4. */
	const char *compression;
	/* The key of an encrypted store (seal.h); a store that is made with one is
	 * encrypted.  -ENOKEY: needed; -EKEYREJECTED: another; -EPERM: others may read it. */
	const char *key_file;
	/* A commit failed so that nobody knows whether it will be there after the next start
	 * (docs/crash.md, C8).  Until the store is opened again every call fails.  From any
	 * thread, perhaps more than once; it may not call the store.  NULL: none. */
	void (*in_doubt)(void *opaque);
	void *in_doubt_opaque;
	struct pool *pool; /* compresses; borrowed; NULL: the thread that puts pages */
	bool no_prove;	   /* bench only: trust hashes */
	/* Tests: as struct writer_config */
	int (*fault)(void *opaque, int fd, uint64_t offset, size_t len);
	void *fault_opaque;
};

/* -ENOENT no store there; -EBUSY another process has it; -EUCLEAN damaged (the
 * reason says what to run); -EPROTO made by a newer version. */
int store_open(const struct store_config *config, struct store **ret, struct err *e);
void store_close(struct store *s);
/* Change the key file of an encrypted store that nobody uses.  No page is written. */
int store_rekey(const char *dir, const char *key_file, const char *new_key_file, struct err *e);
const uint8_t *store_uuid(const struct store *s); /* 16 bytes */
const struct page_secret *store_secret(const struct store *s);

/* ---- VMs ---- */
struct store_vm {
	uint8_t id[16]; /* given by the store, stable for a name and owner */
	char name[SNAPD_NAME_MAX];
	uint32_t uid; /* owner */
	char arch[16];
	uint32_t page_size;
	uint64_t created_ns; /* CLOCK_REALTIME */
	char *cmdline;	     /* of the last attach, NUL-separated; owned by the struct */
	size_t cmdline_len;
};
void store_vm_deinit(struct store_vm *vm);
/* Find by (name, uid) or add; updates arch, page size, cmdline. */
int store_vm_register(struct store *s, struct store_vm *vm, struct err *e);
int store_vm_get(struct store *s, const uint8_t id[16], struct store_vm *ret, struct err *e);

/* ---- timelines ---- */
struct store_timeline {
	uint64_t id;
	uint8_t vm[16];
	struct snapd_point parent; /* {0,0}: starts empty */
	uint64_t head;		   /* last epoch, 0 none yet */
	uint64_t created_ns;
};
int store_timeline_create(struct store *s, const uint8_t vm[16], struct snapd_point parent,
			  uint64_t *ret, struct err *e);
/* Take one back that nothing was committed to: a failed first epoch, a failed fork.
 * One that has epochs, or is gone already, is left as it is. */
int store_timeline_drop(struct store *s, uint64_t id, struct err *e);
int store_timeline_get(struct store *s, uint64_t id, struct store_timeline *ret, struct err *e);

/* ---- writing an epoch ---- */
struct epoch_page {
	uint64_t gfn;
	const void *bytes; /* page_size; borrowed during the call; must not change */
	struct pageid id;  /* of these bytes */
};
struct epoch_stats {
	uint64_t pages_in; /* given to epoch_put */
	uint64_t zero, unchanged, duplicate, stored;
	uint64_t declined; /* of stored: duplicates that would have cost a restore too many reads */
	uint64_t collisions;	/* equal hash, other bytes: stored apart */
	uint64_t read_back;	/* pages read from disk for a proof */
	uint64_t bytes_written; /* to segments, headers and blobs included */
};

/*
 * Begin the epoch after `parent` on `timeline`.  `live` is the map at `parent`
 * (borrowed until commit or abort, not changed before commit).
 */
int epoch_begin(struct store *s, const uint8_t vm[16], uint64_t timeline, uint32_t page_size,
		struct pagemap *live, struct epoch **ret, struct err *e);
/* Store its pages in this way ("none", "lz4", "zstd:LEVEL"), not in the store's; before the
 * first of them.  -EINVAL. */
int epoch_compress(struct epoch *ep, const char *how, struct err *e);
/* Pages best come in ascending gfn.  A gfn given twice: the later bytes count. */
int epoch_put(struct epoch *ep, const struct epoch_page *pages, size_t nr, struct err *e);
/* Memory unplugged: these frames are no longer part of the VM. */
int epoch_gone(struct epoch *ep, uint64_t gfn, uint64_t n, struct err *e);
/* What a snapshot is; strings borrowed during the call. */
struct snapshot_meta {
	const char *name; /* NULL or unique for the VM */
	const char *note; /* may be NULL */
	const char *tags; /* comma-separated, may be NULL */
	bool pinned;
	bool post_mortem; /* the state has no vCPUs: STATE_POSTMORTEM */
	uint64_t pause_ns;
	uint64_t taken_ns; /* CLOCK_REALTIME of the paused instant; 0: now */
};
/* Durable and visible, *live brought up to date, *ep freed; or the error, *live
 * as before, and *ep still there for epoch_abort().  -EEXIST: the name is taken.
 * -ENOSPC: disk or limit full.
 * `meta` NULL: the epoch is no snapshot, only the timeline's new head, which the next
 * epoch builds on; nothing names it, *ret_snapshot is 0, and store_gc() may drop it
 * once it is no running VM's head. */
int epoch_commit(struct epoch *ep, const void *state, size_t state_len,
		 const struct snapshot_meta *meta, struct snapd_point *ret_point,
		 uint64_t *ret_snapshot, struct epoch_stats *ret_stats, struct err *e);
void epoch_abort(struct epoch *ep); /* accepts NULL */

/* ---- snapshots ---- */
struct store_snapshot {
	uint64_t id; /* never reused; shown as decimal */
	uint8_t vm[16];
	char vm_name[SNAPD_NAME_MAX];
	uint32_t uid;
	uint32_t page_size;
	struct snapd_point point;
	struct snapd_point parent; /* point of the epoch before, across forks; {0,0} none */
	uint64_t parent_snapshot;  /* nearest ancestor snapshot that still exists; 0 none */
	uint64_t taken_ns, pause_ns;
	uint64_t state_bytes;
	uint64_t nr_changed; /* pages in its manifest */
	struct epoch_stats stats;
	char name[SNAPD_NAME_MAX]; /* "" when none */
	char note[256];
	char tags[256];
	bool pinned;	  /* neither deleted nor pruned */
	bool post_mortem; /* memory of a VM whose VMM was dead: no vCPUs */
};
int store_snapshot_get(struct store *s, uint64_t id, struct store_snapshot *ret, struct err *e);
/* "ID", "VM@ID", "VM@NAME", or "VM" (its newest); uid != 0 sees only its own.  -ENOENT. */
int store_snapshot_find(struct store *s, const char *selector, uint32_t uid,
			struct store_snapshot *ret, struct err *e);
/* When the VM's newest snapshot was taken; 0: it has none.  Costs by how many others' are newer. */
int store_snapshot_newest(struct store *s, const uint8_t vm[16], uint64_t *taken_ns, struct err *e);
/* All (of one VM when vm is not NULL), ascending by id, in a malloc()ed array. */
int store_snapshot_list(struct store *s, const uint8_t *vm, struct store_snapshot **ret, size_t *nr,
			struct err *e);
/* Forget snapshots, all or none; their pages stay as long as anything needs them.
 * -ENOENT; -EBUSY one is pinned. */
int store_snapshot_delete(struct store *s, uint64_t id, struct err *e);
int store_snapshots_delete(struct store *s, const uint64_t *ids, size_t nr, struct err *e);
/* What is not NULL replaces what it has; name "": none. */
struct snapshot_change {
	const char *name, *note, *tags;
	enum { SNAPSHOT_PIN_KEEP, SNAPSHOT_PIN_SET, SNAPSHOT_PIN_CLEAR } pin;
};
/* -ENOENT; -EEXIST the name is another's; -EINVAL. */
int store_snapshot_change(struct store *s, uint64_t id, const struct snapshot_change *c,
			  struct err *e);
/* Forget a VM and all its snapshots; *nr_snapshots says how many.  What other VMs'
 * snapshots need stays.  The caller knows that it is not attached.  -ENOENT; -EBUSY a
 * snapshot of it is pinned, or an epoch of it is in flight. */
int store_vm_remove(struct store *s, const uint8_t id[16], uint64_t *nr_snapshots, struct err *e);
/* By name and owner.  -ENOENT. */
int store_vm_find(struct store *s, const char *name, uint32_t uid, uint8_t ret[16], struct err *e);

/* ---- reading ---- */
/* The whole map at a point; the caller destroys it. */
int store_map_load(struct store *s, struct snapd_point at, bool with_fp, struct pagemap **ret,
		   struct err *e);
int store_state_load(struct store *s, struct snapd_point at, void **ret, size_t *len,
		     struct err *e); /* malloc()ed */

struct page_read {
	uint64_t gfn; /* for error texts */
	loc_t loc;
	void *dst;	  /* page_size bytes; NULL: no page is read, only its identity */
	struct pageid id; /* out, when dst is NULL: as its record has it; {0,0} a zero page */
	int err;	  /* 0 or -errno */
};
struct store_reader; /* an io_uring and buffers; one thread; the store's pool helps */
int store_reader_create(struct store *s, uint32_t page_size, struct store_reader **ret,
			struct err *e);
void store_reader_destroy(struct store_reader *r);
/* Read, check, and place pages; few large reads where locs are neighbours.  The
 * array is reordered by loc.  Returns the first error, every req has its own. */
int store_read_pages(struct store_reader *r, struct page_read *reqs, size_t nr, struct err *e);

struct page_at {
	uint64_t gfn;
	loc_t loc;
};
struct placed_page {
	uint64_t gfn;
	void *bytes; /* the reader's, during the call: a page, checked */
};
/* A few MiB of pages, by loc; bytes of neighbours lie one after the other.  On any thread
 * of the store's pool, or the reader's; several may run at once.  0 or -errno with *e. */
typedef int store_place_fn(void *arg, const struct placed_page *pages, size_t nr, struct err *e);
/* Read and check pages in the order given, ascending by loc, into the reader's memory, and
 * have them put in their place.  The first error ends it; which pages were placed by then
 * is not told. */
int store_place_pages(struct store_reader *r, const struct page_at *pages, size_t nr,
		      store_place_fn *place, void *arg, struct err *e);

/* ---- figures ---- */
struct store_stats {
	uint64_t vms, timelines, epochs, snapshots;
	uint64_t segments, segments_free;
	uint64_t bytes_on_disk; /* segments, allocated, and index */
	uint64_t bytes_used;	/* segments up to their tails */
	uint64_t bytes_index;
	uint64_t bytes_logical; /* sum over snapshots of their RAM, zero pages not counted */
	uint64_t pages_stored;	/* page records in segments up to their tails */
	uint64_t dedup_entries, dedup_bytes;
};
int store_get_stats(struct store *s, struct store_stats *ret, struct err *e);
uint64_t store_bytes_in_use(struct store *s); /* files of segments that are not free */
/*
 * Keep what the map and the state at a point refer to, although its snapshot may be
 * deleted and store_gc() run: pin before store_map_load(), unpin when the last page
 * was read.  Heads of running VMs need no pin, store_gc() asks for them; nor does
 * an epoch's parent between begin and commit.  -ENOENT.  Any thread; counted.
 */
int store_pin(struct store *s, struct snapd_point at, struct err *e);
void store_unpin(struct store *s, struct snapd_point at);

/*
 * Drop what no snapshot, timeline head or fork point needs: whole segments, and, where a
 * quarter of one or more is dead, that part of it.  *freed bytes given back or free for new
 * pages.  Runs beside everything else;
 * -EBUSY beside another store_gc().  When something cannot be read, nothing is dropped.
 *
 * `live` lists the timelines of running VMs, whose heads stay (*ret malloc()ed; 0 or
 * -errno).  It is called once, without locks of the store, when each pin, epoch and
 * timeline from then on is already noted: so whatever is listed before its pin is taken
 * back, or before its epoch is committed, stays.  NULL: none.
 */
typedef int (*store_live_fn)(void *opaque, uint64_t **ret, size_t *nr);
int store_gc(struct store *s, store_live_fn live, void *opaque, uint64_t *freed, struct err *e);

/* The same at a rate, and to be stopped (-ECANCELED): what was given back by then is in
 * *freed, and the next run goes on. */
struct gc_config {
	store_live_fn live;
	void *live_opaque;
	uint64_t rate_bytes; /* read and written, a second; 0: as fast as it goes */
	bool (*stop)(void *opaque, uint64_t bytes);
	void *opaque;
};
int store_gc_paced(struct store *s, const struct gc_config *c, uint64_t *freed, struct err *e);
