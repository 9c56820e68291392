/* SPDX-License-Identifier: MIT */
/* One-line reasons for failures; see err.h. */
#include "snapd/util/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static void one_line(char *s)
{
	for (; *s; s++)
		if ((unsigned char)*s < ' ')
			*s = ' ';
}

void err_fill(struct err *e, int code, const char *fmt, ...)
{
	va_list ap;

	if (e && !e->code) {
		e->code = -code;
		va_start(ap, fmt);
		vsnprintf(e->text, sizeof(e->text), fmt, ap);
		va_end(ap);
		one_line(e->text);
	}
}

void err_fill_errno(struct err *e, int code, const char *fmt, ...)
{
	va_list ap;
	size_t n;

	if (e && !e->code) {
		e->code = -code;
		va_start(ap, fmt);
		vsnprintf(e->text, sizeof(e->text), fmt, ap);
		va_end(ap);
		n = strlen(e->text);
		snprintf(e->text + n, sizeof(e->text) - n, ": %s", strerror(code));
		one_line(e->text);
	}
}
