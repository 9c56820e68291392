/* SPDX-License-Identifier: MIT */
/*
 * staging: private memory into which pages are copied while a VM is paused.  A
 * page fault there would be part of the guest's pause, so what will be needed is
 * filled in ahead, and kept from one snapshot to the next.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

struct staging {
	uint8_t *mem; /* owned; address space for max_bytes */
	size_t max_bytes;
	size_t ready_bytes; /* from the start: filled in */
};

int staging_init(struct staging *s, size_t max_bytes); /* only address space */
void staging_deinit(struct staging *s);		       /* accepts a zeroed struct */
/* Fill in at least `bytes` (cut to max_bytes).  Failure only makes the pause longer. */
void staging_prepare(struct staging *s, size_t bytes);
/* Give back what is beyond `keep_bytes`, in time. */
void staging_trim(struct staging *s, size_t keep_bytes);
