/* SPDX-License-Identifier: MIT */
/*
 * state: everything of a snapshot that is not guest RAM, as named, versioned,
 * self-describing records in one blob.  Pure.  The blob is what the agent sends
 * with PAUSED, what the store keeps, what LOAD carries and what `snapctl export`
 * shows; docs/format.md has the bytes.
 *
 *   struct state_header, then records: struct state_record, payload, zero padding
 *   to 8 bytes.  Valid if and only if magic and major match, total_bytes is the
 *   length, the hash is right, and nr_records records fill it exactly.
 *
 * Names: "host.*" what the machine was; "layout" memslots; "x86.*", "arm64.*"
 * VM and vCPU state of the architecture (instance = vCPU index); "dev.*" the
 * VMM's devices; "note.*" remarks such as note.ram-sha256.  A record's payload is
 * described by (name, version); a loader that does not know a record's version
 * refuses, one that meets an unknown name ignores it unless the name ends in '!'.
 */
#pragma once

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#include "snapd/util/err.h"

#define STATE_MAGIC	"SNPSTATE"
#define STATE_MAJOR	1
#define STATE_MAX_BYTES (64u << 20)
#define STATE_NAME_MAX	32

struct state_header {
	char magic[8];
	uint16_t major;
	uint16_t minor;
	uint32_t nr_records;
	uint64_t total_bytes; /* header included */
	uint64_t hash;	      /* XXH3-64 of everything behind the header */
};
static_assert(sizeof(struct state_header) == 32, "disk format");

struct state_record {
	char name[STATE_NAME_MAX]; /* NUL-padded */
	uint32_t instance;
	uint16_t version;
	uint16_t reserved;
	uint64_t len_bytes; /* of the payload, without padding */
};
static_assert(sizeof(struct state_record) == 48, "disk format");

/* One memslot in the "layout" record (version 1: an array of these). */
struct state_slot {
	uint32_t slot; /* the VMM's id */
	uint16_t as_id;
	uint16_t flags; /* SNAPD_SLOT_READONLY */
	uint64_t gpa;
	uint64_t nr_pages;
	uint64_t home_gfn; /* of its first page; ~0: not tracked (ROM) */
};
static_assert(sizeof(struct state_slot) == 32, "disk format");

/* Beside each entry of "layout", in "note.slots" (version 1: an array): which life of
 * the slot it was.  For reports; never loaded. */
struct state_slot_note {
	uint64_t generation;
	uint32_t kernel_id;
	uint32_t reserved;
};
static_assert(sizeof(struct state_slot_note) == 16, "disk format");

/* The record "post-mortem!" (version 1): memory of a VM whose VMM was dead.  There are
 * no vCPUs and no devices; no VM can become that. */
#define STATE_POSTMORTEM "post-mortem!"
struct state_postmortem {
	uint64_t died_ns; /* CLOCK_REALTIME; when it was noticed */
	uint32_t pid;	  /* of the VMM */
	uint32_t reserved;
};
static_assert(sizeof(struct state_postmortem) == 16, "disk format");

/* The record "vmm-state!" (version 1): vCPUs and memslots are in what the VMM put there
 * ("dev.*"), and only a VMM of that kind can become that. */
#define STATE_VMM "vmm-state!"
struct state_vmm {
	uint32_t nr_vcpus;
	uint32_t reserved;
};
static_assert(sizeof(struct state_vmm) == 8, "disk format");

/* One run of tracked memory in the "pieces" record (version 1: an array),
 * ascending by home_gfn: what the snapshot's RAM consists of, mapped or not. */
struct state_piece {
	uint64_t home_gfn;
	uint64_t nr_pages;
	uint32_t block;
	uint32_t reserved;
	uint64_t block_page;
};
static_assert(sizeof(struct state_piece) == 32, "disk format");

struct snapd_state_writer {
	uint8_t *buf; /* owned */
	size_t len, cap;
	uint32_t nr_records;
	int error; /* first failure, sticky: -ENOMEM, -E2BIG, -EINVAL (name) */
};

int state_writer_init(struct snapd_state_writer *w);
void state_writer_deinit(struct snapd_state_writer *w);
int state_put(struct snapd_state_writer *w, const char *name, uint32_t instance, uint16_t version,
	      const void *data, size_t len_bytes);
/* Close the blob: *ret borrows the writer's buffer. */
int state_writer_finish(struct snapd_state_writer *w, const void **ret, size_t *ret_len);

struct snapd_state_reader {
	const uint8_t *buf; /* borrowed */
	size_t len;
	uint32_t nr_records;
};

/* -EUCLEAN with the reason in *e unless the blob is valid; -EINVAL unless `buf`
 * is 8-byte aligned (malloc, mmap are).  The reader borrows `buf`. */
int state_reader_init(struct snapd_state_reader *r, const void *buf, size_t len, struct err *e);
/* -ENOENT when there is none; of several the first.  *data is borrowed from the blob, 8-aligned if
 * the blob is. */
int state_get(const struct snapd_state_reader *r, const char *name, uint32_t instance,
	      uint16_t *version, const void **data, size_t *len_bytes);
/* Walk: start with prev = NULL; NULL at the end.  The payload follows the record. */
const struct state_record *state_next(const struct snapd_state_reader *r,
				      const struct state_record *prev);
