/* SPDX-License-Identifier: MIT */
/*
 * top_view: a sample as lines of text for a screen of a given size.  Pure; no escape sequences.
 *
 *   snapd: 3 VMs, 2 ready, 1.2 GiB of 10 GiB, …       what there is
 *   VM  STATE  DIRTY/S  BEHIND  AGE  PAUSE  STILL …   the head
 *   …                                                 VMs, as many as fit
 *   …                                                 jobs, in at most a quarter of the lines
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "tools/top_sample.h"

struct top_view {
	int cols, rows;
	int key; /* of top_keys */
	bool reverse;
	size_t first;	     /* VM at the top; lowered when that is too far down */
	const char *trouble; /* shown in place of the line of keys; NULL: none */
	bool keys;	     /* show which keys there are */
};

struct top_lines {
	char **text;  /* owned */
	int nr, head; /* which line is the head */
};

/* rows 0: as many as it takes. */
void top_view_lines(struct top_view *v, const struct top_sample *s, struct top_lines *ret);
void top_lines_deinit(struct top_lines *l);
