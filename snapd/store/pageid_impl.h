/* SPDX-License-Identifier: MIT */
/*
 * pageid_impl: the page kernels, compiled once per instruction set.  Included by
 * pageid.c (what every CPU of the architecture has) and pageid_x86.c (AVX2 and
 * AVX-512, by compiler flags).  PAGEID_OPS names the ops table that this copy
 * defines; XXH_INLINE_ALL makes xxhash.h pick the same instruction set.
 *
 * Vectors are GCC's generic ones, as wide as one register: GCC takes wider ones
 * apart into scalars.
 *
 * The next page is fetched while this one is hashed: hardware prefetch stops at
 * page borders, so each scattered page would begin with a full memory latency.  To
 * L2 only, since L1 has too few buffers for a page's worth of misses; after the
 * copy, whose own misses would wait behind these otherwise; all of it, as parts
 * helped less (bench capture: 0.80 of memcpy without, 1.1 with).
 */
#pragma once

#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/store/pageid_ops.h"

#if defined(__AVX512F__)
#define VEC_BYTES 64
#elif defined(__AVX2__)
#define VEC_BYTES 32
#else
#define VEC_BYTES 16
#endif
typedef uint64_t vec __attribute__((vector_size(VEC_BYTES)));
typedef uint64_t vec_unaligned __attribute__((vector_size(VEC_BYTES), aligned(1)));

#define LINE_BYTES 64

static inline bool vec_is_zero(const vec *v)
{
	uint64_t any = 0;

	for (int i = 0; i < VEC_BYTES / 8; i++)
		any |= (*v)[i];
	return !any;
}

static bool bytes_zero(const void *page, size_t len)
{
	const vec_unaligned *p = page;
	size_t nr = len / sizeof(vec), per_line = LINE_BYTES / sizeof(vec);

	/* Line by line: a page that is not zero mostly shows it in its first. */
	for (size_t i = 0; i < nr; i += per_line) {
		vec any = p[i];

		for (size_t k = 1; k < per_line; k++)
			any |= p[i + k];
		if (!vec_is_zero(&any))
			return false;
	}
	return true;
}

static struct pageid hash_bytes(const struct page_secret *s, const void *page, size_t len)
{
	XXH128_hash_t h = XXH3_128bits_withSecret(page, len, s->b, sizeof(s->b));
	struct pageid id = {.lo = h.low64, .hi = h.high64};

	if (pageid_is_zero(id))
		id.hi = 1; /* 0,0 means zero page, and this one is not */
	return id;
}

/* Copy, and say whether any bit was set.  Each byte is loaded once (volatile): the
 * guest may write src meanwhile, and the answer must be about what was stored. */
static inline bool copy_any(void *dst, const void *src, size_t len)
{
	const volatile vec_unaligned *from = src;
	vec *to = dst;
	vec any = {0};

	for (size_t i = 0; i < len / sizeof(vec); i++) {
		vec v = from[i];

		to[i] = v;
		any |= v;
	}
	return !vec_is_zero(&any);
}

static inline void prefetch_page(const void *page, size_t len)
{
	for (size_t i = 0; i < len; i += LINE_BYTES)
		__builtin_prefetch((const char *)page + i, 0, 2);
}

static struct pageid impl_of(const struct page_secret *s, const void *page, size_t len)
{
	return bytes_zero(page, len) ? (struct pageid){0} : hash_bytes(s, page, len);
}

static struct pageid impl_copy(const struct page_secret *s, void *dst, const void *src,
			       const void *next, size_t len)
{
	bool any = copy_any(dst, src, len);

	if (next)
		prefetch_page(next, len);
	return any ? hash_bytes(s, dst, len) : (struct pageid){0};
}

const struct pageid_ops PAGEID_OPS = {
	.name = PAGEID_NAME,
	.of = impl_of,
	.copy = impl_copy,
	.zero = bytes_zero,
};
