/* SPDX-License-Identifier: MIT */
/* The soft limit of the store; see room.h. */
#include "snapd/upkeep/room.h"

#include <time.h>

#include "snapd/core/daemon.h"
#include "snapd/util/log.h"

static uint64_t monotonic_s(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec + 1;
}

bool room_is_short(struct daemon *d)
{
	uint64_t limit = d->config.store_soft_bytes, now_s = monotonic_s(), used;
	bool over;

	if (!limit)
		return false;
	if (atomic_exchange(&d->room_looked_s, now_s) == now_s)
		return atomic_load(&d->room_short);
	used = store_bytes_in_use(d->store);
	over = used > limit;
	if (atomic_exchange(&d->room_short, over) != over)
		log_event(LOG_STORE_FILLING, over ? LOG_LVL_WARN : LOG_LVL_NOTICE,
			  "store %s: %llu MiB in use, %s store_soft_max", d->config.store_dir,
			  (unsigned long long)used >> 20, over ? "over" : "no more over");
	return over;
}
