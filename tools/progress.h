/* SPDX-License-Identifier: MIT */
/* progress: one line on a terminal's stderr: bar, amount, rate, time left. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct args;

/* Draw, at most ten times a second; nothing where stderr is no terminal or the
 * user wants none.  A new `what` starts a new rate.  total 0: not known. */
void progress_show(const struct args *a, const char *what, uint64_t done, uint64_t total,
		   bool bytes);
/* Take the line away, before anything else is printed. */
void progress_clear(void);
