/* SPDX-License-Identifier: MIT */
/*
 * top_sample: what the API says of VMs, store and jobs at one moment, and what two moments say of
 * the time between them.  Pure but for top_sample_take(), which asks.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "include/snapd/protocol.h"

struct args;

struct top_vm {
	char name[SNAPD_NAME_MAX], state[16], job[16];
	uint64_t uid, attached_ns, ram_bytes, behind_bytes, pause_ns, taken_ns;
	/* as counted */
	uint64_t dirtied_bytes, paused_ns, epochs, ring_full;
	/* since the sample before; below 0: there is none to compare with */
	double dirty_rate, still_share, epoch_rate, ring_full_rate;
	double age_s; /* of the newest point in the store; below 0: none */
};

struct top_store {
	uint64_t disk_bytes, limit_bytes, used_bytes, logical_bytes, snapshots;
	double growth; /* bytes a second, of used_bytes */
};

struct top_job {
	uint64_t id, done, total;
	char kind[16], phase[32], vm[SNAPD_NAME_MAX];
	bool bytes; /* else pages or the like */
};

struct top_sample {
	uint64_t monotonic_ns, realtime_ns;
	struct top_vm *vms; /* owned */
	size_t nr_vms;
	struct top_store store;
	struct top_job *jobs; /* that run or wait; owned */
	size_t nr_jobs;
};

/* Ask; an exit code.  *ret is to be freed also after a failure. */
int top_sample_take(const struct args *a, struct top_sample *ret);
void top_sample_deinit(struct top_sample *s);

/* Rates of `now` against `before`. */
void top_sample_compare(struct top_sample *now, const struct top_sample *before);

/* The keys by which VMs are sorted, in the order of the columns; NULL ends. */
struct top_key {
	char letter;
	const char *name;
};
extern const struct top_key top_keys[];
/* Index in top_keys by name, or -1. */
int top_key_find(const char *name);
void top_sample_sort(struct top_sample *s, int key, bool reverse);

json_t *top_sample_json(const struct top_sample *s);
