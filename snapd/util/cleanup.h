/* SPDX-License-Identifier: MIT */
/*
 * Scope-based clean-up, after systemd and drgn: a local that owns something
 * says so in its declaration, every return path then gives it back, and
 * taking ownership out is explicit (steal_fd(), steal_ptr()).
 */
#pragma once

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static inline void cleanup_fd(int *fd)
{
	if (*fd >= 0) {
		int saved = errno;

		close(*fd);
		errno = saved;
	}
}

static inline void cleanup_free(void *p)
{
	free(*(void **)p);
}

#define _cleanup_(f)   __attribute__((cleanup(f)))
#define _cleanup_fd_   _cleanup_(cleanup_fd)
#define _cleanup_free_ _cleanup_(cleanup_free)

/* Take the descriptor out of its owning variable. */
static inline int steal_fd(int *fd)
{
	int v = *fd;

	*fd = -1;
	return v;
}

#define steal_ptr(pp)                         \
	({                                    \
		__typeof__(*(pp)) _v = *(pp); \
		*(pp) = NULL;                 \
		_v;                           \
	})

#define ARRAY_SIZE(a)	   (sizeof(a) / sizeof((a)[0]))
#define DIV_ROUND_UP(n, d) (((n) + (d)-1) / (d))
#define ALIGN_UP(n, a)	   (((n) + (a)-1) / (a) * (a))
#define MIN(a, b)                       \
	({                              \
		__typeof__(a) _a = (a); \
		__typeof__(b) _b = (b); \
		_a < _b ? _a : _b;      \
	})
#define MAX(a, b)                       \
	({                              \
		__typeof__(a) _a = (a); \
		__typeof__(b) _b = (b); \
		_a > _b ? _a : _b;      \
	})
/* Room for one more of a malloc()ed array: 0 or -ENOMEM. */
#define array_grow(array, nr, cap)                                            \
	({                                                                    \
		int r_ = 0;                                                   \
		if ((nr) == (cap)) {                                          \
			size_t cap_ = (cap) ? (cap)*2 : 16;                   \
			void *p_ = realloc((array), cap_ * sizeof(*(array))); \
			if (p_) {                                             \
				(array) = p_;                                 \
				(cap) = cap_;                                 \
			}                                                     \
			r_ = p_ ? 0 : -ENOMEM;                                \
		}                                                             \
		r_;                                                           \
	})
