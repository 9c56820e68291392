/* SPDX-License-Identifier: MIT */
/*
 * inifile: a file of 'name = value' lines, read with inih, which has a buffer of fixed size and
 * goes on with the next line after an error.  Here a line that does not fit, and the first that
 * is refused, end it: a value that was cut off, or a continuation taken for a setting, would be in
 * force without anybody knowing.  Blanks before a name mean nothing; a value has one line.  Any
 * thread.
 */
#pragma once

#include "snapd/util/err.h"

#define INIFILE_LINE_MAX 198 /* bytes of a line, without its end */

/* 0, or -errno with *e set. */
typedef int (*inifile_fn)(void *arg, const char *section, const char *key, const char *value,
			  struct err *e);

/* -ENOENT and what else opening and reading say; -EINVAL: the file and the line, and why. */
int inifile_read(const char *path, inifile_fn fn, void *arg, struct err *e);
