/* SPDX-License-Identifier: MIT */
/*
 * secretfile: read a file that nobody else may read.  In: a path; out: its bytes, by
 * read() only, so that no copy stays in a buffer of the C library.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "snapd/util/err.h"

/*
 * At most `size` bytes of the regular file `path`, called `what` in reasons.  It must
 * belong to us or to root, and its mode must shut others out (-EPERM); with `others` it
 * need not, and *others tells whether it does not.  Files in $CREDENTIALS_DIRECTORY are
 * systemd's, which guards them with modes of its own.
 */
int secret_file_read(const char *path, const char *what, void *buf, size_t size, size_t *ret_len,
		     bool *others, struct err *e);
