/* SPDX-License-Identifier: MIT */
/* Long work at a rate; see pace.h. */
#include "snapd/store/pace.h"

#include "snapd/util/cleanup.h"

#define NAP_NS	 50000000.0
#define CLOSE_NS 1000000.0 /* not worth a nap */

static double ns_since(const struct timespec *t)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)(now.tv_sec - t->tv_sec) * 1e9 + (double)(now.tv_nsec - t->tv_nsec);
}

bool pace_step(struct pace *p, uint64_t bytes)
{
	if (!p->started)
		clock_gettime(CLOCK_MONOTONIC, &p->start);
	p->started = true;
	p->done += bytes;
	for (;;) {
		double due = p->rate_bytes ? (double)p->done * 1e9 / (double)p->rate_bytes : 0;
		double ahead = due - ns_since(&p->start);
		struct timespec nap = {.tv_nsec = (long)MIN(ahead, NAP_NS)};

		if (p->stop && p->stop(p->opaque, p->done))
			return true;
		if (ahead < CLOSE_NS)
			return false;
		nanosleep(&nap, NULL);
	}
}
