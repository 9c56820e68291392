/* SPDX-License-Identifier: MIT */
/* pace: long work at a rate, that can be stopped.  One thread. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

struct pace {
	uint64_t rate_bytes; /* a second; 0: as fast as it goes */
	/* Asked at least every 50 ms: true ends the work.  May be NULL. */
	bool (*stop)(void *opaque, uint64_t done);
	void *opaque;
	uint64_t done;
	struct timespec start;
	bool started;
};

/* After so many bytes: wait until they are due.  True: stop. */
bool pace_step(struct pace *p, uint64_t bytes);
