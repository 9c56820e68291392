/* SPDX-License-Identifier: MIT */
/* savefile: a small file replaced as a whole, durably, or left as it was.  Any thread. */
#pragma once

#include "snapd/util/err.h"

/* DIR/NAME has `text` from now on, mode 0600; a crash leaves the old or the new.  Two
 * threads may not write the same file at once. */
int savefile(const char *dir, const char *name, const char *text, struct err *e);
