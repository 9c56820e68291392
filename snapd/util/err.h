/* SPDX-License-Identifier: MIT */
/*
 * Errors: functions return 0 or -errno; expected outcomes are named positive
 * codes of the function's own.  Where a person will read the reason, the
 * function also takes a `struct err *` (may be NULL) and fills in one line
 * that says what failed, on what, and what to do about it.
 *
 * Corrupt data is always -EUCLEAN (E_CORRUPT), so that the top can map it to
 * its own exit code; full disks are -ENOSPC, conflicts -EBUSY, unknown names
 * -ENOENT.
 */
#pragma once

#include <errno.h>

#define E_CORRUPT EUCLEAN

struct err {
	int code;	/* negative errno, 0 when unset */
	char text[512]; /* one line, no newline */
};

/* What the macros below call. */
void err_fill(struct err *e, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
void err_fill_errno(struct err *e, int code, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));

/* Compilers and analyzers have to see that what a failure returns is negative:
 * else each "if (r) return r;" seems to let one through with nothing set.  A
 * library that failed without setting errno counts as an I/O error. */
#define err_return_(fill, e, code, ...)                                  \
	({                                                               \
		const int err_given_ = (code);                           \
		const int err_code_ = err_given_ > 0 ? err_given_ : EIO; \
		fill((e), err_code_, __VA_ARGS__);                       \
		-err_code_;                                              \
	})

/* Set *e (if not NULL) and return -code; `code` is a positive errno.  The
 * first reason is kept: a caller up the stack does not overwrite it. */
#define err_set(e, code, ...) err_return_(err_fill, e, code, __VA_ARGS__)

/* As err_set(), with ": strerror(code)" appended. */
#define err_errno(e, code, ...) err_return_(err_fill_errno, e, code, __VA_ARGS__)

static inline void err_clear(struct err *e)
{
	if (e) {
		e->code = 0;
		e->text[0] = '\0';
	}
}
