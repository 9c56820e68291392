/* SPDX-License-Identifier: MIT */
/*
 * harvest: dirty-ring entries → (address space, slot generation, offset) →
 * frame.  Pure: it works on the mapped ring and on a slot table, makes no system
 * call and takes no lock; the agent, the simulated KVM's tests and the property
 * tests link the same code.
 *
 * The ring (Documentation/virt/kvm/api.rst, "KVM_CAP_DIRTY_LOG_RING"): an array
 * of struct kvm_dirty_gfn {flags, slot, offset}, a power of two long.  An entry
 * goes  00 empty → 01 DIRTY (kernel) → 1X RESET (we) → 00 (kernel, at
 * KVM_RESET_DIRTY_RINGS).  We read entries in order, only where flags has DIRTY
 * and not RESET, with acquire, and answer with a release store.
 *
 * Slot generations.  `slot` in an entry is the *kernel's* id.  The agent gives
 * every memslot it adds a kernel id that no ring can still hold, so the table
 * maps (as_id, id) to one generation for as long as any entry may name it; a
 * deleted generation stays in the table, marked dead, until every ring was once
 * harvested to its end and reset after the deletion (slot_table_pass()).  No
 * order between draining and deleting can then go wrong (invariant I3).
 *
 * An entry is
 *   resolved     its generation is known and its offset is within it
 *   unresolved   anything else: an id never given out, an offset beyond the
 *                slot.  Information is lost, so the caller must take *all* frames
 *                for dirty; the entry is still handed back to the kernel.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct kvm_dirty_gfn;

/* Part of a slot: a run of frames of one piece (see snapd/protocol.h). */
struct slot_run {
	uint64_t offset; /* first page, relative to the slot, in pages */
	uint64_t nr_frames;
	uint64_t first_frame; /* bit in the sets */
};

struct slot_gen {
	uint64_t generation; /* unique for the VM's life; 0: entry unused */
	uint64_t nr_pages;
	uint32_t nr_runs;	    /* 1 for nearly every slot; 0: not tracked (ROM) */
	bool dead;		    /* deleted; entries may still be in rings */
	uint32_t next_dead;	    /* links the dead ones: id + 1; 0: last */
	uint64_t died_at;	    /* value of `pass` when it died */
	struct slot_run *runs;	    /* owned; ascending, covering 0..nr_pages */
	struct slot_run inline_run; /* where nr_runs is 1, runs points here */
};

#define SLOT_TABLE_SPACES 2 /* x86 has two address spaces, others one */

struct slot_table {
	struct slot_gen *gens[SLOT_TABLE_SPACES]; /* indexed by kernel id; owned */
	uint32_t nr_ids;			  /* per address space */
	uint32_t next_id[SLOT_TABLE_SPACES];	  /* where to look for a free id */
	uint32_t first_dead[SLOT_TABLE_SPACES];	  /* id + 1; 0: none */
	uint64_t next_generation;
	uint64_t pass; /* completed passes */
};

int slot_table_init(struct slot_table *t, uint32_t nr_ids);
void slot_table_deinit(struct slot_table *t);
/* Take a free kernel id and fill its generation in.  `runs` is copied.
 * Returns the id, or -ENOSPC when every id is in use or not yet passed. */
int slot_table_add(struct slot_table *t, uint32_t as_id, uint64_t nr_pages,
		   const struct slot_run *runs, uint32_t nr_runs);
/* The slot is gone from KVM; its entries may not be. */
void slot_table_kill(struct slot_table *t, uint32_t as_id, uint32_t id);
/* Give an id back at once: KVM refused to add the slot. */
void slot_table_cancel(struct slot_table *t, uint32_t as_id, uint32_t id);
#ifdef SNAPD_ABLATION_PUBLISH_BEFORE_DRAIN
/* What I3 forbids: `id` means the new slot at once, though rings hold old entries. */
int slot_table_overwrite(struct slot_table *t, uint32_t as_id, uint32_t id, uint64_t nr_pages,
			 const struct slot_run *runs, uint32_t nr_runs);
#endif
/* Every ring was harvested until empty and reset completely, by a harvest that
 * began after the kills so far: ids that were dead before it are free again. */
void slot_table_pass(struct slot_table *t);

enum slot_resolve { SLOT_RESOLVED = 0, SLOT_UNTRACKED = 1, SLOT_UNRESOLVED = 2 };
/* `slot` as in the entry: as_id in the upper 16 bits. */
enum slot_resolve slot_table_resolve(const struct slot_table *t, uint32_t slot, uint64_t offset,
				     uint64_t *frame);

struct harvest_ring {
	struct kvm_dirty_gfn *gfns; /* mapped; shared with the kernel */
	uint32_t nr;		    /* entries, a power of two */
	uint32_t next;		    /* first entry not yet collected, free-running */
	bool ahead;		    /* KVM is, by entries that it wrote over (harvest_overrun()) */
	uint32_t ahead_until;	    /* those that it left empty begin here at the latest */
};

struct harvest_result {
	uint64_t collected; /* entries marked for RESET: the sum RESET must return */
	uint64_t resolved;  /* frames written out */
	uint64_t unresolved;
};

/*
 * Collect from one ring: at most ring->nr entries, and no more than `max`
 * frames.  frames[] gets the frame of each resolved entry, repeats included.
 * Adds to *res.  Returns how many frames were written.
 *
 * The caller must not publish these frames before RESET handed back every entry
 * collected so far (invariant I1).
 */
size_t harvest_ring(struct harvest_ring *ring, const struct slot_table *t, uint64_t *frames,
		    size_t max, struct harvest_result *res);
/*
 * KVM looks whether a ring is full only before it enters the guest, and where it emulates
 * instructions it may have pushed thousands of entries by then: more than the few that it
 * keeps free, so that it writes over the oldest.  What those named is lost.  Afterwards KVM's
 * own index is ahead of all that it seems to have pushed: as many entries as it wrote over
 * stay empty, and KVM goes on behind them; counted as used, they would keep the
 * vCPU out of the guest, and those behind them would not be found.  So they are handed back like
 * any others.
 *
 * To be called before each harvest_ring().  True: entries are lost; all that is in any slot must
 * be taken for dirty, and for writable.  While `ahead` is set, entries may be waiting unseen.
 */
bool harvest_overrun(struct harvest_ring *ring, struct harvest_result *res);
/* KVM says that the ring is full, and there is nothing in it. */
void harvest_ahead(struct harvest_ring *ring);
/* KVM wrote over entries from `from` on that were collected, and so does not find them handed
 * back: hand them back once more.  True: there were such; lost as above. */
bool harvest_remark(struct harvest_ring *ring, uint32_t from);
/* Entries that could be collected now, looking no further than `max`. */
uint32_t harvest_ready(const struct harvest_ring *ring, uint32_t max);
