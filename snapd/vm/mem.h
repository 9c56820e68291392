/* SPDX-License-Identifier: MIT */
/*
 * vm_mem: what an agent told about guest memory, checked: RAM blocks mapped
 * here, pieces of them, and the shared page with the dirty sets.  Owned by the
 * VM's thread; no store, no socket.
 *
 * Everything comes from an untrusted process.  What holds after a call that
 * returned 0:
 *   M1  every piece lies inside its block's mapping, and the block is a tmpfs or
 *       hugetlbfs file (a file system of the client's own could block us);
 *   M2  live pieces overlap neither in frames nor in home GFNs, and their frames
 *       lie below the capacity of the sets;
 *   M3  the sets lie inside a tmpfs file that can neither shrink nor grow.
 * A block's file may still be truncated at any time: reads and writes through
 * these mappings belong inside busguard_run().
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "include/snapd/protocol.h"
#include "snapd/gpaset.h"
#include "snapd/util/err.h"

#define VM_MAX_BLOCKS 1024u
#define VM_MAX_PIECES 32768u
#define VM_GFN_END    (1ull << 52)

struct vm_block {
	int fd;	      /* owned; -1: not told */
	uint8_t *map; /* owned; MAP_SHARED, read-write, whole */
	uint64_t size_bytes;
	bool is_tmpfs; /* 4 KiB holes can be found and punched */
};

struct vm_piece {
	struct snapd_piece p;
	uint8_t *mem;		      /* first page; borrowed from the block */
	const struct vm_block *block; /* borrowed */
};

struct vm_mem {
	uint32_t page_size;
	struct vm_block *blocks;	    /* VM_MAX_BLOCKS, owned */
	struct vm_piece *by_frame, *by_gfn; /* the same live pieces, in two orders; owned */
	uint32_t nr_pieces;
	int64_t last_piece;  /* ids only grow */
	uint64_t frames_end; /* end of the highest frame run ever told */
	uint64_t max_frames; /* capacity of the sets */
	uint64_t ram_frames; /* of live pieces */
	uint64_t nr_removed; /* pieces ever removed: lists of frames made earlier are stale */
};

int vm_mem_init(struct vm_mem *m, uint32_t page_size, uint64_t max_frames);
void vm_mem_deinit(struct vm_mem *m); /* accepts a zeroed struct */
/* Takes fd, also on failure. */
int vm_mem_add_block(struct vm_mem *m, const struct snapd_msg_block *msg, int fd, struct err *e);
int vm_mem_add_piece(struct vm_mem *m, const struct snapd_piece *p, struct err *e);
/* *ret: what was removed. */
int vm_mem_remove_piece(struct vm_mem *m, uint32_t id, struct snapd_piece *ret, struct err *e);
/* The live piece with that frame or home GFN, or NULL.  Valid until the next change. */
const struct vm_piece *vm_mem_by_frame(const struct vm_mem *m, uint64_t frame);
const struct vm_piece *vm_mem_by_gfn(const struct vm_mem *m, uint64_t gfn);

static inline uint8_t *vm_piece_page(const struct vm_mem *m, const struct vm_piece *p,
				     uint64_t frame)
{
	return p->mem + (frame - p->p.first_frame) * m->page_size;
}

static inline bool vm_piece_has_frame(const struct vm_piece *p, uint64_t frame)
{
	return p && frame - p->p.first_frame < p->p.nr_frames;
}

static inline bool vm_piece_has_gfn(const struct vm_piece *p, uint64_t gfn)
{
	return p && gfn - p->p.home_gfn < p->p.nr_frames;
}

/*
 * The shared page and sets.  Calls that touch them return -EFAULT when the
 * memory behind them is gone.
 */
struct vm_shm {
	struct snapd_shm *map; /* owned; NULL: none */
	size_t map_bytes;
	uint64_t nr_frames;
	struct gpaset dirty, inflight;
	struct gpaset discarded;	    /* nr_frames 0: the agent has no such set */
	const struct snapd_shm_slot *slots; /* [2][nr_slots]; NULL: the agent has no such table */
	uint64_t nr_slots;
};

/* fd is borrowed.  Sizes are read once and checked; what the page says later about
 * itself is not looked at again. */
int vm_shm_map(struct vm_shm *s, int fd, uint64_t told_bytes, struct err *e);
void vm_shm_unmap(struct vm_shm *s);

struct vm_base {
	uint8_t store[16];
	struct snapd_point point; /* {0,0}: all memory is dirty */
};
int vm_shm_get_base(struct vm_shm *s, struct vm_base *ret);
/* At no instant does the page show a point that mixes old and new. */
int vm_shm_set_base(struct vm_shm *s, const struct vm_base *base);
int vm_shm_clear(struct vm_shm *s, struct gpaset *set, uint64_t limit);
int vm_shm_clear_range(struct vm_shm *s, struct gpaset *set, uint64_t first, uint64_t n);
int vm_shm_add_range(struct vm_shm *s, struct gpaset *set, uint64_t first, uint64_t n);
int vm_shm_add(struct vm_shm *s, struct gpaset *set, const uint64_t *frames, size_t nr);
/* inflight back to dirty; with `rebuild` also the summaries, after a crash of the service. */
int vm_shm_merge(struct vm_shm *s, uint64_t limit, bool rebuild);
int vm_shm_count(struct vm_shm *s, uint64_t limit, uint64_t *ret);
/* Through gpaset_take() with inflight, or gpaset_peek() on dirty. */
int vm_shm_take(struct vm_shm *s, uint64_t limit, uint64_t *cursor, uint64_t *frames, size_t max,
		size_t *ret);
int vm_shm_peek(struct vm_shm *s, const struct gpaset *set, uint64_t limit, uint64_t *cursor,
		uint64_t *frames, size_t max, size_t *ret);

/* Which of the frames may be holes of their file: the VMM gave them back once. */
int vm_shm_hints(struct vm_shm *s, const uint64_t *frames, size_t nr, bool *hints);

/* Figures that the agent keeps in the shared page. */
struct vm_shm_stats {
	uint64_t harvested, reset, published, ring_full, unresolved, host_marks, kicks, pauses,
		reconnects, slot_changes, pending, harvest_ns, harvests, dirty_frames;
};
int vm_shm_stats(struct vm_shm *s, uint64_t limit, struct vm_shm_stats *ret);
