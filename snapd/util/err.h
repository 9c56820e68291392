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
#include <stdarg.h>

#define E_CORRUPT EUCLEAN

struct err {
	int code;	/* negative errno, 0 when unset */
	char text[512]; /* one line, no newline */
};

/* Set *e (if not NULL) and return -code; `code` is a positive errno.  The
 * first reason is kept: a caller up the stack does not overwrite it. */
int err_set(struct err *e, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* As err_set(), with ": strerror(code)" appended. */
int err_errno(struct err *e, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

static inline void err_clear(struct err *e)
{
	if (e) {
		e->code = 0;
		e->text[0] = '\0';
	}
}
