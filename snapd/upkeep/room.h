/* SPDX-License-Identifier: MIT */
/*
 * room: is the store over its soft limit, store_soft_max?  Above it everything still works,
 * and what can wait does: policies leave out every second point.  The hard limit,
 * store_max, is the store's own: there an epoch ends with an error.
 */
#pragma once

#include <stdbool.h>

struct daemon;

/* Of segments in use, as of at most a second ago; a change is an event in the log.  Any
 * thread; not under locks of the store. */
bool room_is_short(struct daemon *d);
