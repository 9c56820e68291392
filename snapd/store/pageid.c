/* SPDX-License-Identifier: MIT */
/*
 * pageid: choose the variant of the page kernels for this CPU, once, before
 * main(); and the variant that every CPU of the architecture runs.  Pure; any
 * thread.
 */
#define PAGEID_OPS  pageid_ops_generic
#define PAGEID_NAME "generic"
#include "snapd/store/pageid_impl.h"

static const struct pageid_ops *variants[4]; /* best first, NULL at the end */

__attribute__((constructor)) static void choose_variants(void)
{
	size_t nr = 0;

#ifdef __x86_64__
	__builtin_cpu_init();
	if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
	    __builtin_cpu_supports("avx512vl"))
		variants[nr++] = &pageid_ops_avx512;
	if (__builtin_cpu_supports("avx2"))
		variants[nr++] = &pageid_ops_avx2;
#endif
	variants[nr] = &pageid_ops_generic;
}

const struct pageid_ops *pageid_ops_at(size_t i)
{
	return i < sizeof(variants) / sizeof(variants[0]) ? variants[i] : NULL;
}

struct pageid pageid_of(const struct page_secret *s, const void *page, size_t len)
{
	return variants[0]->of(s, page, len);
}

struct pageid pageid_copy(const struct page_secret *s, void *dst, const void *src, size_t len)
{
	return variants[0]->copy(s, dst, src, NULL, len);
}

struct pageid pageid_copy_ahead(const struct page_secret *s, void *dst, const void *src,
				const void *next, size_t len)
{
	return variants[0]->copy(s, dst, src, next, len);
}

bool pageid_bytes_zero(const void *page, size_t len)
{
	return variants[0]->zero(page, len);
}

const char *pageid_variant(void)
{
	return variants[0]->name;
}
