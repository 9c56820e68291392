/* SPDX-License-Identifier: MIT */
/*
 * transfer: a snapshot as a stream of bytes, out of a store and into one.
 *
 * The memory stream: extents, ascending by address and apart, each a struct
 * xfer_extent and `len` bytes; then one whose gpa is XFER_END with the XXH3-128 of
 * all bytes before it.  Pages of the snapshot's pieces that no extent covers are
 * zero.  Valid if and only if every gpa and len is a multiple of the page size,
 * every extent lies in a piece of the state, the hash is right, and nothing follows.
 *
 * An import is one line of JSON, the state blob (state.h), and a memory stream:
 *   {"vm","arch","page_size","state_bytes", and where wanted "name","note","tags",
 *    "taken_ns","cmdline":[…]}
 *
 * All integers little-endian.
 */
#pragma once

#include <assert.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "snapd/core/job.h"
#include "snapd/core/stream.h"

#define XFER_END	 (~0ull)
#define XFER_EXTENT_MAX	 (1u << 20)
#define XFER_HEADER_MAX	 (64u << 10)
#define XFER_MEMORY_TYPE "application/vnd.snapd.memory"
#define XFER_IMPORT_TYPE "application/vnd.snapd.import"

struct xfer_extent {
	uint64_t gpa;
	uint64_t len;
};
static_assert(sizeof(struct xfer_extent) == 16, "wire");

struct xfer_end {
	struct xfer_extent extent; /* XFER_END, 16 */
	uint64_t hash_lo, hash_hi;
};
static_assert(sizeof(struct xfer_end) == 32, "wire");

/* job->ctx of the three job bodies below; made by the control thread. */
struct transfer {
	struct stream *stream; /* the job's reference, until its end; NULL for state_job */
	_Atomic bool prepared; /* export: total_bytes is known, bytes follow */
	_Atomic uint64_t total_bytes;
	char *text;	   /* state_job: the answer; owned; after the job's end */
	bool with_payload; /* state_job */
};
struct transfer *transfer_new(struct stream *stream_stolen);
void transfer_free(void *transfer);
/* job->over: let go of the stream; the rest of an upload is dropped. */
void transfer_over(struct job *job);
/* What the stream's error is to the job; returns it. */
int transfer_failed(int rc, struct err *e);

/* args {"snapshot": id}: write its memory stream. */
int export_job(struct job *job, struct err *e);
/* args {"snapshot": id}: state and description as JSON text. */
int state_job(struct job *job, struct err *e);
/* args {}: read an import; result {"snapshot": id, "vm": name}. */
int import_job(struct job *job, struct err *e);
