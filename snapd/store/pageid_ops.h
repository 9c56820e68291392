/* SPDX-License-Identifier: MIT */
/*
 * pageid_ops: the variants of pageid.h's functions, for pageid.c, tests and
 * benches; everyone else calls pageid.h.
 */
#pragma once

#include "snapd/store/pageid.h"

struct pageid_ops {
	const char *name;
	struct pageid (*of)(const struct page_secret *s, const void *page, size_t len);
	struct pageid (*copy)(const struct page_secret *s, void *dst, const void *src,
			      const void *next, size_t len); /* next may be NULL */
	bool (*zero)(const void *page, size_t len);
};

extern const struct pageid_ops pageid_ops_generic;
extern const struct pageid_ops pageid_ops_avx2, pageid_ops_avx512; /* x86-64 only */

/* The variants that this CPU can run, best first; NULL beyond the last. */
const struct pageid_ops *pageid_ops_at(size_t i);
