/* SPDX-License-Identifier: MIT */
/*
 * guest: what snapvm and its guest program agree upon: where things lie in guest
 * physical memory, and the structs there.  Everything that the guest knows lies in
 * its RAM, so a rollback takes all of it back at once.
 *
 *   0                 low block: never punched
 *     CODE            the flat guest program
 *     PT              PML4, PDPT, one PD per GiB: identity, 2 MiB pages, user bit
 *     PARAMS          struct guest_params: written before the first run
 *     SHARED          struct guest_shared: requests of the host, answers
 *     CTL             struct guest_ctl, one page per vCPU
 *     STACK           one stack per vCPU
 *     TABLE           u64 per data page: the counter of its last write
 *     (table end)     device table, then device pages
 *   MMIO              never backed: doorbells
 *   MAIN              main block, in areas that can be punched and moved
 *   DIMM              may be unplugged
 *   WINDOW            where a moved area is seen
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define GUEST_PAGE	  4096ull
#define GUEST_GIB	  (1ull << 30)
#define GUEST_CODE_GPA	  0x10000ull
#define GUEST_CODE_BYTES  0x10000ull
#define GUEST_PT_GPA	  0x20000ull
#define GUEST_MAX_GIB	  128ull
#define GUEST_PARAMS_GPA  0x100000ull
#define GUEST_SHARED_GPA  0x101000ull
#define GUEST_CTL_GPA	  0x102000ull
#define GUEST_MAX_VCPUS	  64u
#define GUEST_STACK_GPA	  0x180000ull
#define GUEST_STACK_BYTES 0x4000ull
#define GUEST_TABLE_GPA	  0x400000ull
#define GUEST_MMIO_GPA	  0x3ff00000ull
#define GUEST_MAIN_GPA	  0x40000000ull
#define GUEST_MAX_AREAS	  8u

/* Doorbells: u64 stores to GUEST_MMIO_GPA + these; the value is the vCPU. */
enum guest_doorbell {
	GUEST_BELL_ERROR = 0x00, /* guest_ctl.error and the fields behind it say what */
	GUEST_BELL_DONE = 0x08,	 /* guest_params.max_writes reached; rung again and again */
	GUEST_BELL_CALL = 0x10,	 /* answer to guest_shared.call: host code may run now */
	GUEST_BELL_EJECT = 0x18, /* no vCPU uses the DIMM any more */
	GUEST_BELL_PLUG = 0x20,	 /* the guest is ready for a DIMM */
};

enum guest_workload {
	GUEST_SEQUENTIAL,
	GUEST_RANDOM,
	GUEST_HOTCOLD,
	GUEST_MIX, /* half hot, a quarter sequential, a quarter random */
	GUEST_NR_WORKLOADS
};

enum guest_error {
	GUEST_OK,
	GUEST_ERR_FRESH,    /* a page never written is not empty */
	GUEST_ERR_MAGIC,    /* the page is not one of ours any more */
	GUEST_ERR_INDEX,    /* the page is another page */
	GUEST_ERR_COUNTER,  /* the page is older or newer than the table says */
	GUEST_ERR_CHECKSUM, /* header torn */
	GUEST_ERR_PAYLOAD,  /* header right, payload word not */
	GUEST_ERR_DEVICE,   /* a device page does not agree with the device table */
	GUEST_NR_ERRORS
};

struct guest_params {
	uint64_t workload; /* enum guest_workload */
	uint64_t plain;	   /* write one word and check nothing: for measuring */
	uint64_t nr_vcpus;
	uint64_t max_writes;  /* per vCPU, 0: no limit */
	uint64_t hot_pages;   /* per vCPU */
	uint64_t hot_percent; /* of writes that go to the hot pages */
	uint64_t pace_ticks;  /* from one write to the next, in TSC ticks; 0: none */
	uint64_t main_pages;  /* data pages in the main block */
	uint64_t area_pages;
	uint64_t dimm_gpa;
	uint64_t dimm_pages; /* 0: none */
	uint64_t device_table_gpa;
	uint64_t device_gpa;
	uint64_t device_pages; /* 0: none */
};

struct guest_shared {
	uint64_t call;			    /* host: not 0 asks for GUEST_BELL_CALL */
	uint64_t dimm_want;		    /* host: 0 wants the DIMM out, 1 in */
	uint64_t dimm_on;		    /* it may be used by a vCPU whose dimm_seen is 1 */
	uint64_t area_gpa[GUEST_MAX_AREAS]; /* host: where each area is seen now */
};

struct guest_ctl {
	uint64_t counter; /* writes done; the number of the last one */
	uint64_t rng;
	uint64_t cursor;    /* sequential walk */
	uint64_t pass;	    /* times the walk came round */
	uint64_t verified;  /* pages found as the table says */
	uint64_t device_ok; /* device pages found right */
	uint64_t dimm_seen; /* answer to dimm_want */
	uint64_t error;	    /* enum guest_error */
	uint64_t error_gpa;
	uint64_t error_expected;
	uint64_t error_found;
};

/* A data page: these words, then payload words from GUEST_PAYLOAD_WORD on, of
 * which each write changes one. */
enum guest_page_word {
	GUEST_WORD_MAGIC,
	GUEST_WORD_INDEX,
	GUEST_WORD_VCPU,
	GUEST_WORD_COUNTER,
	GUEST_WORD_CHECKSUM,
	GUEST_PAYLOAD_WORD = 8
};
#define GUEST_PAGE_WORDS 512u
#define GUEST_PAGE_MAGIC 0x70616d7473736e70ull

/* A device page: sequence (odd while the device writes), index, counter, checksum. */
enum guest_device_word { GUEST_DEV_SEQ, GUEST_DEV_INDEX, GUEST_DEV_COUNTER, GUEST_DEV_CHECKSUM };

static inline uint64_t guest_mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

static inline uint64_t guest_checksum(uint64_t index, uint64_t vcpu, uint64_t counter)
{
	return guest_mix(index ^ guest_mix(vcpu ^ guest_mix(counter ^ GUEST_PAGE_MAGIC)));
}

static inline uint64_t guest_payload_word(uint64_t counter)
{
	return GUEST_PAYLOAD_WORD + guest_mix(counter) % (GUEST_PAGE_WORDS - GUEST_PAYLOAD_WORD);
}

static inline uint64_t guest_rng_next(uint64_t x)
{
	x ^= x << 13;
	x ^= x >> 7;
	return x ^ x << 17;
}

static inline uint64_t guest_ctl_gpa(uint64_t vcpu)
{
	return GUEST_CTL_GPA + vcpu * GUEST_PAGE;
}
