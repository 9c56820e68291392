/* SPDX-License-Identifier: MIT */
/*
 * hazards: the state of the campaign in hazards.c, and its steps.  A step is op_*(): it draws from
 * the campaign's random numbers and from nothing else.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "snapd/agent.h"

#include "snapd/util/ablation.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/rand.h"
#include "tests/lib/fake_service.h"
#include "tests/prop/images.h"

#define PAGE	    FAKE_PAGE
#define LOG_PAGE    4096u /* of a device's log, whatever the host's is */
#define LOW_PAGES   16u
#define CHUNK_PAGES 32u
#define CHUNKS	    8u
#define MAIN_PAGES  (CHUNKS * CHUNK_PAGES)
#define SMRAM_PAGES 16u
#define DIMM_PAGES  32u
#define MAIN_GPA    0x400000ull /* chunk 0's is SMRAM's in address space 1 */
#define WINDOW	    0x10000000ull
#define DIMM_GPA    0x20000000ull
#define GPA_END	    0x30000000ull
#define RING	    (PAGE <= 4096 ? 256u : (uint32_t)(PAGE / 16)) /* entries: a page at least */
#define VCPUS	    2u
#define MAX_STORES  (2 * RING)
#define CONSUMERS   3u
#define MAX_SLOTS   40u
#define LOW_SLOT    100u /* and above: not in the lottery of ids */

enum mem_id { LOW, MAIN, SMRAM, DIMM0, DIMM1, NR_MEMS };

struct mem {
	int fd; /* -1: not there */
	uint8_t *hva;
	uint64_t pages;
	uint64_t first, nr; /* those that are written; the rest is the guest's own */
	bool in_saved;	    /* was there at the saved snapshot */
};

struct consumer {
	struct snapd_consumer *c; /* NULL: none */
	struct image im;
};

struct store {
	uint32_t as_id;
	uint64_t gpa, value;
};

struct campaign;

/* The KVM below, and who runs vCPUs: hazards_sim.c or hazards_kvm.c, one a program. */
struct hazard_host {
	uint32_t spaces;      /* address spaces */
	bool replays;	      /* nothing happens on its own: a seed makes the same run again */
	const char *backends; /* a word for argv[1]; NULL: there is one only */
	/* agent, listen_fd, host and mem[LOW], which begins at GPA 0; `backend` or NULL. */
	void (*create)(struct campaign *c, const char *backend);
	void (*destroy)(struct campaign *c);
	/* Have vCPU i store c->stores[i], while the campaign goes on where it can. */
	void (*begin)(struct campaign *c, uint32_t i, uint32_t nr);
	void (*join)(struct campaign *c, uint32_t i);
	/* KVM itself writes, with no vCPU; NULL: this one does not. */
	void (*write)(struct campaign *c, uint32_t as_id, uint64_t gpa, uint64_t value);
	/* The next RESET ends early and leaves pages unprotected; NULL: this one can't be made to.
	 */
	void (*cut_reset)(struct campaign *c, uint32_t entries, uint32_t unprotected);
};
extern const struct hazard_host hazard_host;

struct campaign {
	struct snapd_vm *agent;
	int listen_fd;
	void *host;    /* hazard_host's */
	bool unmarked; /* the agent finds what the VMM writes to memory that is seen */
	struct fake_service s;
	struct rand r;
	struct mem mem[NR_MEMS];
	struct snapd_memslot slots[MAX_SLOTS];
	uint32_t nr_slots;
	struct store stores[VCPUS][MAX_STORES];
	struct snapd_devlog *log;
	struct snapd_devlog_mem log_mem;
	struct live_pieces live;
	struct image kept;
	struct consumer consumers[CONSUMERS];
	/* a snapshot to go back to */
	struct image saved;
	struct snapd_memslot saved_slots[MAX_SLOTS];
	uint32_t nr_saved_slots;
	int saved_state; /* -1: none */
	uint64_t saved_len;
	uint64_t counter; /* value of the last write */
	uint64_t hash;	  /* over all that was reported */
	uint64_t epochs, reported, changed, rollbacks, reconnects, discards, checks;
};

static inline void trace(struct campaign *c, uint64_t v)
{
	c->hash = (c->hash ^ v) * 0x100000001b3ull;
}

static inline uint64_t below(struct campaign *c, uint64_t n)
{
	return rand_below(&c->r, n);
}

/* A space to look through. */
static inline uint32_t any_space(struct campaign *c)
{
	return (uint32_t)below(c, hazard_host.spaces);
}

/* hazards_slots.c: memory that comes and goes, and its slots */
void mem_create(struct campaign *c, enum mem_id id, uint64_t pages);
void mem_destroy(struct mem *m);
enum mem_id mem_of(const struct campaign *c, const struct snapd_memslot *s);
void slot_add(struct campaign *c, uint32_t id, uint32_t as_id, uint64_t gpa, enum mem_id mem,
	      uint64_t first, uint64_t n);
void forget_saved(struct campaign *c);
void op_slot_add(struct campaign *c);
void op_slot_delete(struct campaign *c);
void op_smram(struct campaign *c);
void op_dimm(struct campaign *c);

/* hazards_writers.c: whoever writes */
const struct snapd_memslot *slot_seen(const struct campaign *c, uint32_t as_id, uint64_t gpa);
/* On a vCPU's thread: a store hit no memory. */
void on_hole(struct campaign *c, const struct store *st);
void op_vcpus(struct campaign *c);
void op_no_vcpu(struct campaign *c);
void op_cut_reset(struct campaign *c);
void host_write(struct campaign *c, bool by_file);
void op_mark(struct campaign *c);
void device_write(struct campaign *c);
void op_device(struct campaign *c);
void op_discard(struct campaign *c);

/* hazards_service.c: whoever reads, and the oracle */
void op_early(struct campaign *c);
void op_epoch(struct campaign *c);
void op_rollback(struct campaign *c);
void op_reconnect(struct campaign *c);
void op_consumer(struct campaign *c);
extern const struct snapd_vm_callbacks hazard_callbacks;
