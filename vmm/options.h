/* SPDX-License-Identifier: MIT */
/* options: snapvm's command line.  In: argv.  Out: struct options, checked. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "vmm/guest/guest.h"

enum punch_pattern {
	PUNCH_HOLE,	    /* a part of an area vanishes, until the next change there */
	PUNCH_RESIZE,	    /* the area comes back as several slots */
	PUNCH_NEWID,	    /* the same slot under another id */
	PUNCH_MERGE,	    /* the area comes back as one slot at its home */
	PUNCH_MOVE,	    /* the area is seen at another address */
	PUNCH_ALIAS,	    /* the area is seen at two addresses */
	PUNCH_OTHERBACKING, /* other memory takes the area's place for good */
	PUNCH_REMOVE,	    /* the DIMM is unplugged for good, and another one plugged in */
	PUNCH_NR_PATTERNS
};
/* How the agent finds what vCPUs write. */
enum tracking {
	TRACK_AUTO,
	TRACK_RING,
	TRACK_LOG,
	TRACK_LOG_INITIALLY_SET, /* the same, where a new slot is dirty as a whole */
	TRACK_LOG_GET_CLEARS,	 /* the same, as on a KVM without MANUAL_DIRTY_LOG_PROTECT2 */
	TRACK_PAGEMAP,
	TRACK_NR
};
extern const char *const tracking_names[TRACK_NR];
extern const char *const punch_names[PUNCH_NR_PATTERNS];
extern const char *const workload_names[GUEST_NR_WORKLOADS];

/* The kind of file behind guest memory. */
enum ram_backing { RAM_MEMFD, RAM_SHM, RAM_HUGETLB, RAM_NR_BACKINGS };
extern const char *const backing_names[RAM_NR_BACKINGS];

struct options {
	uint64_t mem_bytes;
	uint64_t dimm_bytes;
	enum ram_backing backing;
	uint32_t nr_vcpus;
	enum guest_workload workload;
	bool plain;
	uint64_t hot_pages; /* of all vCPUs together */
	uint32_t hot_percent;
	uint64_t rate; /* writes per second and vCPU, 0: as fast as it goes */
	uint64_t seed;
	uint64_t max_writes; /* per vCPU, 0: no limit */
	double duration_s;   /* 0: until a signal comes */
	const char *name;
	const char *socket;
	const char *restore;
	const char *status; /* file, rewritten now and then */
	const char *run_dir;
	enum tracking tracking;
	bool track_host;
	uint32_t ring_entries;
	double punch_rate;	 /* changes per second, 0: none */
	uint32_t punch_patterns; /* bit enum punch_pattern */
	bool punch_paused;
	double device_rate;  /* pages per second, 0: no device */
	double vhost_rate;   /* of a back end with a dirty log, 0: none */
	double disk_rate;    /* pages per second read with O_DIRECT, 0: no disk */
	double balloon_rate; /* pages filled or given back per second, 0: none */
	uint32_t mirror_ms;  /* between two looks of a consumer with a copy, 0: none */
	uint32_t smm;	     /* every n-th step is in address space 1, 0: none */
	uint32_t epoch_ms;   /* between two emptyings of a set of dirty pages, 0: none */
	uint32_t harvest_us; /* slowest harvest, 0: the agent's own */
	bool digest;
	bool sim;
	bool lockstep;
	bool require_service;
	bool no_log; /* bench: memslots without dirty logging */
	bool json;
	bool quiet;
};

/* 0 go on; 1 all done (--help, --version); -EINVAL after a message on stderr. */
int options_parse(struct options *opt, int argc, char **argv);
