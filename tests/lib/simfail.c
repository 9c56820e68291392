/* SPDX-License-Identifier: MIT */
/*
 * simfail: calls that may fail are counted, the n-th does; allocations, too, by
 * taking the place of malloc() and its relatives.  See simdisk.h.
 */
#include "tests/lib/simdisk_priv.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Under ASan its own allocator, else that of libc. */
extern void *__interceptor_malloc(size_t n) __attribute__((weak));
extern void *__interceptor_calloc(size_t n, size_t size) __attribute__((weak));
extern void *__interceptor_realloc(void *p, size_t n) __attribute__((weak));
extern void *__interceptor_aligned_alloc(size_t align, size_t n) __attribute__((weak));
extern void __interceptor_free(void *p) __attribute__((weak));
extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *p, size_t n);
extern void *__libc_memalign(size_t align, size_t n);
extern void __libc_free(void *p);

static struct {
	_Atomic bool armed;
	_Atomic uint64_t left; /* calls until the one that fails */
	enum disk_failure how;
	_Atomic bool hit;
	const char *_Atomic what;
	_Atomic long allocations;
} fail;

static _Thread_local bool late;
/* ASan's own start of a thread does not bear a malloc() that fails. */
static _Thread_local enum { BY_DEFAULT, EXEMPT, COUNTED } standing;

bool sim_done_all_the_same(void)
{
	return late;
}

void disk_fail(uint64_t n, enum disk_failure how)
{
	fail.how = how;
	fail.hit = false;
	fail.what = "";
	fail.left = n;
	fail.armed = n != 0;
}

bool disk_lift(const char **what)
{
	fail.armed = false;
	*what = fail.what;
	return fail.hit;
}

void disk_exempt(bool yes)
{
	standing = yes ? EXEMPT : COUNTED;
}

static bool is_exempt(void)
{
	return standing == EXEMPT || (standing == BY_DEFAULT && __interceptor_malloc);
}

static bool is_next(const char *what, bool writes)
{
	if (fail.how == FAIL_COMMIT && strcmp(what, "commit"))
		return false;
	if (fail.how == FAIL_SYNC && !strstr(what, "sync"))
		return false;
	if (!fail.armed || is_exempt() || !fail.left || (fail.how != FAIL_EIO && !writes) ||
	    atomic_fetch_sub(&fail.left, 1) != 1)
		return false;
	fail.what = what;
	fail.hit = true;
	return true;
}

int sim_may_fail(const char *what, bool writes, size_t *len)
{
	bool next = is_next(what, writes);

	late = next && writes && (fail.how == FAIL_STAY || fail.how == FAIL_COMMIT);
	if (!next)
		return fail.armed && fail.hit && !is_exempt() && writes && fail.how >= FAIL_STAY
			       ? EIO
			       : 0;
	if (fail.how == FAIL_SHORT && writes && len && *len > 1) {
		*len /= 2;
		return 0;
	}
	return fail.how == FAIL_ENOSPC && writes ? ENOSPC : EIO;
}

bool sim_no_memory(const char *what)
{
	return is_next(what, false);
}

/* ---- allocations ---- */

static void *counted(void *p)
{
	if (p && !__interceptor_malloc)
		atomic_fetch_add(&fail.allocations, 1);
	return p;
}

long disk_allocations(void)
{
	return fail.allocations;
}

static void *out_of_memory(void)
{
	errno = ENOMEM;
	return NULL;
}

void *malloc(size_t n)
{
	if (sim_no_memory("malloc"))
		return out_of_memory();
	return __interceptor_malloc ? __interceptor_malloc(n) : counted(__libc_malloc(n));
}

void *calloc(size_t n, size_t size)
{
	if (sim_no_memory("calloc"))
		return out_of_memory();
	return __interceptor_calloc ? __interceptor_calloc(n, size)
				    : counted(__libc_calloc(n, size));
}

void *realloc(void *p, size_t n)
{
	void *ret;

	if (sim_no_memory("realloc"))
		return out_of_memory();
	if (__interceptor_realloc)
		return __interceptor_realloc(p, n);
	ret = __libc_realloc(p, n);
	return p ? ret : counted(ret);
}

void *aligned_alloc(size_t align, size_t n)
{
	if (sim_no_memory("aligned_alloc"))
		return out_of_memory();
	return __interceptor_aligned_alloc ? __interceptor_aligned_alloc(align, n)
					   : counted(__libc_memalign(align, n));
}

int posix_memalign(void **ret, size_t align, size_t n)
{
	*ret = aligned_alloc(align, n);
	return *ret ? 0 : ENOMEM;
}

void free(void *p)
{
	if (__interceptor_free) {
		__interceptor_free(p);
		return;
	}
	if (p)
		atomic_fetch_sub(&fail.allocations, 1);
	__libc_free(p);
}
