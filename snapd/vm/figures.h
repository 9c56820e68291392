/* SPDX-License-Identifier: MIT */
/*
 * figures: what a VM's epochs were like since its agent connected, and what its agent counts,
 * as plain numbers for metrics and people.  Written by the VM's thread under vm.lock.
 */
#pragma once

#include <stdint.h>

#include "snapd/vm/mem.h"

struct daemon;

/* How many values were at most bounds[i], and more than the bound before; the last: above all. */
#define HISTOGRAM_BOUNDS 12
struct histogram {
	uint64_t count[HISTOGRAM_BOUNDS + 1];
	uint64_t sum;
};
extern const uint64_t pause_bounds_ns[HISTOGRAM_BOUNDS];
extern const uint64_t commit_bounds_ns[HISTOGRAM_BOUNDS];
extern const uint64_t epoch_bounds_bytes[HISTOGRAM_BOUNDS];

void histogram_add(struct histogram *h, const uint64_t bounds[HISTOGRAM_BOUNDS], uint64_t value);
uint64_t histogram_count(const struct histogram *h);

struct vm_epochs {
	struct histogram pause_ns;    /* by epoch, also one that failed later */
	struct histogram commit_ns;   /* the guest runs again → durable */
	struct histogram epoch_bytes; /* what changed */
	uint64_t nr;		      /* durable */
	uint64_t pages_stored, bytes_written;
	uint64_t taken_ns; /* CLOCK_REALTIME of the pause of the newest; 0: none in the store */
};

/* Of the last pause, nanoseconds. */
struct vm_pause {
	uint64_t total_ns;			/* the agent: asked → vCPUs let go */
	uint64_t stop_ns, state_ns, harvest_ns; /* the agent's parts */
	uint64_t copy_ns;			/* take the set and copy it, here */
	uint64_t service_ns;			/* PAUSED received → RESUME sent, here */
	uint64_t pages;				/* copied in the pause */
};

/*
 * What snapshots cost the guest, as far as it can be told from outside, added up since its agent
 * connected: the pauses; a harvest by a vCPU whenever its ring was full; and a write fault for each
 * page that was reported, the first write to it after a RESET, taken to cost `fault_ns`.  What one
 * vCPU loses is a part of what the guest does, as many as there are.  Not told: what the harvest
 * thread takes from the guest where there are no processors left.
 */
struct vm_loss {
	uint64_t at_ns; /* CLOCK_MONOTONIC; 0: never looked */
	uint64_t paused_ns, published, ring_full, harvest_ns, harvests;
};

/* From look to look; 0 when the agent counted anew between them. */
uint64_t vm_loss_ns(const struct vm_loss *from, const struct vm_loss *to, uint32_t nr_vcpus,
		    uint64_t fault_ns);

struct vm_figures {
	char name[SNAPD_NAME_MAX];
	uint32_t uid;
	uint64_t ready, broken; /* 0 or 1 */
	uint64_t nr_vcpus, page_size, nr_queued, ram_bytes;
	uint64_t snapshots, failures, self_checks, missed_pages;
	struct vm_pause pause;
	struct vm_epochs epochs;
	uint64_t lost_ns; /* vm_loss_ns(), from epoch to epoch */
	struct vm_shm_stats agent;
};

/* Of all attached VMs that `view` may see (0: all); *ret is malloc()ed.  Any thread. */
int vm_list_figures(struct daemon *d, uint32_t view, struct vm_figures **ret, size_t *nr);
