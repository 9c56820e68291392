/* SPDX-License-Identifier: MIT */
/* Points in the order of the index: by timeline, then by epoch.  Pure. */
#pragma once

#include <stdlib.h>

#include "include/snapd/protocol.h"

/* For bsearch() and qsort(): of points, or of structs that begin with one. */
static inline int compare_points(const void *a, const void *b)
{
	const struct snapd_point *x = a, *y = b;

	if (x->timeline != y->timeline)
		return x->timeline < y->timeline ? -1 : 1;
	return x->epoch < y->epoch ? -1 : x->epoch > y->epoch;
}

/* In an array that is sorted so, which may be NULL when it has none. */
static inline void *find_point(const void *array, size_t nr, size_t size, struct snapd_point at)
{
	return nr ? bsearch(&at, array, nr, size, compare_points) : NULL;
}
