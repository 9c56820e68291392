/* SPDX-License-Identifier: MIT */
/* Line-at-a-time logging; see log.h.  Safe from any thread. */
#include "snapd/util/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static _Atomic int max_level = LOG_LVL_INFO;
static void (*sink)(void *, int, const char *);
static void *sink_opaque;

void log_set_level(enum log_level max)
{
	atomic_store(&max_level, max);
}

void log_set_sink(void (*fn)(void *, int, const char *), void *opaque)
{
	sink = fn;
	sink_opaque = opaque;
}

void log_at(enum log_level lvl, const char *fmt, ...)
{
	char line[1024];
	va_list ap;
	int n = 0;

	if ((int)lvl > atomic_load(&max_level))
		return;
	if (!sink && getenv("JOURNAL_STREAM"))
		n = snprintf(line, sizeof(line), "<%d>", lvl);
	va_start(ap, fmt);
	vsnprintf(line + n, sizeof(line) - n - 1, fmt, ap);
	va_end(ap);
	for (char *p = line; *p; p++)
		if ((unsigned char)*p < ' ')
			*p = ' ';
	if (sink) {
		sink(sink_opaque, lvl, line);
		return;
	}
	n = (int)strlen(line);
	line[n++] = '\n';
	(void)!write(STDERR_FILENO, line, (size_t)n);
}
