/* SPDX-License-Identifier: MIT */
/* Line-at-a-time logging; see log.h.  Safe from any thread. */
#include "snapd/util/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LINE_MAX_BYTES 1024

static _Atomic int max_level = LOG_LVL_INFO;
static void (*_Atomic writer)(const struct log_record *r);
static _Thread_local struct log_about about;

void log_set_level(enum log_level max)
{
	atomic_store(&max_level, max);
}

void log_set_writer(void (*fn)(const struct log_record *r))
{
	atomic_store(&writer, fn);
}

struct log_about *log_about(void)
{
	return &about;
}

static void write_stderr(const struct log_record *r)
{
	char line[LINE_MAX_BYTES + 8];
	int n = 0;

	if (getenv("JOURNAL_STREAM"))
		n = snprintf(line, sizeof(line), "<%d>", r->level);
	n += snprintf(line + n, sizeof(line) - n, "%s\n", r->text);
	(void)!write(STDERR_FILENO, line, (size_t)n);
}

static void log_va(enum log_event event, enum log_level lvl, const char *fmt, va_list ap)
{
	void (*fn)(const struct log_record *) = atomic_load(&writer);
	char text[LINE_MAX_BYTES];
	struct log_record r = {
		.level = lvl, .event = event, .format = fmt, .text = text, .about = about};

	vsnprintf(text, sizeof(text), fmt, ap);
	for (char *p = text; *p; p++)
		if ((unsigned char)*p < ' ' || *p == 0x7f)
			*p = ' ';
	(fn ? fn : write_stderr)(&r);
}

void log_at(enum log_level lvl, const char *fmt, ...)
{
	va_list ap;

	if ((int)lvl > atomic_load(&max_level))
		return;
	va_start(ap, fmt);
	log_va(LOG_NO_EVENT, lvl, fmt, ap);
	va_end(ap);
}

void log_event(enum log_event event, enum log_level lvl, const char *fmt, ...)
{
	va_list ap;

	if ((int)lvl > atomic_load(&max_level))
		return;
	va_start(ap, fmt);
	log_va(event, lvl, fmt, ap);
	va_end(ap);
}
