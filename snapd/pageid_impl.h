/* SPDX-License-Identifier: MIT */
/*
 * pageid_impl: the page kernels, compiled once per instruction set.  Included by
 * pageid.c (what every CPU of the architecture has) and pageid_x86.c (AVX2 and
 * AVX-512, by compiler flags).  PAGEID_OPS names the ops table that this copy
 * defines; XXH_INLINE_ALL makes xxhash.h pick the same instruction set.
 *
 * The vectors are 64 bytes in GCC's generic form: one AVX-512 register, two of
 * AVX2, four of SSE2 or NEON.
 */
#pragma once

#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/pageid_ops.h"

typedef uint64_t vec __attribute__((vector_size(64)));
typedef uint64_t vec_unaligned __attribute__((vector_size(64), aligned(1)));

static inline bool vec_is_zero(const vec *v)
{
	const vec w = *v;

	return !(w[0] | w[1] | w[2] | w[3] | w[4] | w[5] | w[6] | w[7]);
}

static bool bytes_zero(const void *page, size_t len)
{
	const vec_unaligned *p = page;
	vec any = p[0];

	/* Pages that are not zero mostly show it in their first line. */
	for (size_t i = 1; vec_is_zero(&any) && i < len / sizeof(vec); i++)
		any |= p[i];
	return vec_is_zero(&any);
}

static struct pageid hash_bytes(const struct page_secret *s, const void *page, size_t len)
{
	XXH128_hash_t h = XXH3_128bits_withSecret(page, len, s->b, sizeof(s->b));
	struct pageid id = {.lo = h.low64, .hi = h.high64};

	if (pageid_is_zero(id))
		id.hi = 1; /* 0,0 means zero page, and this one is not */
	return id;
}

/* Copy and say whether any bit was set, of what was stored, not of a second load. */
static bool copy_any(void *dst, const void *src, size_t len)
{
	const vec_unaligned *from = src;
	vec *to = dst;
	vec any = {0};

	for (size_t i = 0; i < len / sizeof(vec); i++) {
		vec v = from[i];

		to[i] = v;
		any |= v;
	}
	return !vec_is_zero(&any);
}

static struct pageid impl_of(const struct page_secret *s, const void *page, size_t len)
{
	return bytes_zero(page, len) ? (struct pageid){0} : hash_bytes(s, page, len);
}

static struct pageid impl_copy(const struct page_secret *s, void *dst, const void *src, size_t len)
{
	return copy_any(dst, src, len) ? hash_bytes(s, dst, len) : (struct pageid){0};
}

const struct pageid_ops PAGEID_OPS = {
	.name = PAGEID_NAME,
	.of = impl_of,
	.copy = impl_copy,
	.zero = bytes_zero,
};
