/* SPDX-License-Identifier: MIT */
/*
 * pageid: what a page *is*: all zero, or a 128-bit keyed hash of its bytes; and
 * the one pass over a scattered page that copies, tests for zero and hashes it.
 * Pure.  Compiled once per instruction set (pageid_x86.c with AVX2, AVX-512) and
 * chosen at start, since XXH3 from a generic shared library costs three times as
 * much per page.
 *
 * The hash is XXH3-128 with the store's 192-byte secret: a guest that does not
 * know the secret cannot steer collisions; and a hash never decides that two
 * pages are equal, bytes do (I8).
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGEID_SECRET_BYTES 192

struct pageid {
	uint64_t lo, hi; /* XXH3-128; 0,0 for a zero page */
};

struct page_secret {
	_Alignas(64) uint8_t b[PAGEID_SECRET_BYTES];
};

static inline bool pageid_is_zero(struct pageid id)
{
	return !(id.lo | id.hi);
}

static inline bool pageid_equal(struct pageid a, struct pageid b)
{
	return a.lo == b.lo && a.hi == b.hi;
}

/* Identify `len` bytes (a multiple of 64, at most 64 KiB). */
struct pageid pageid_of(const struct page_secret *s, const void *page, size_t len);
/* Copy src to dst (64-aligned, not overlapping) and identify what was copied:
 * the id is of dst's bytes even if src changes underneath. */
struct pageid pageid_copy(const struct page_secret *s, void *dst, const void *src, size_t len);
/* The same, and memory begins to fetch `next`, the page that is copied next, meanwhile:
 * a third faster on scattered pages.  next is not read; it may be NULL. */
struct pageid pageid_copy_ahead(const struct page_secret *s, void *dst, const void *src,
				const void *next, size_t len);
bool pageid_bytes_zero(const void *page, size_t len);
/* Name of the variant in use: "avx512", "avx2", "generic". */
const char *pageid_variant(void);
