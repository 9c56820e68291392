/* SPDX-License-Identifier: MIT */
/*
 * The control loop: wait, dispatch, then what every wake-up asks for: join VM
 * threads that ended, tell the API that jobs changed.  On the main thread.
 */
#include "snapd/daemon/loop.h"

#include <errno.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "snapd/api/api.h"
#include "snapd/vm/priv.h"

#define EVENTS_MAX 64

static void woken(struct daemon *d)
{
	uint64_t n;

	(void)!read(d->wake_fd, &n, sizeof(n));
	vm_reap(d);
	if (d->api)
		api_wake(d);
}

/* A source that is deleted by the one before it in the same batch is still called
 * once: sources are deleted by their own function or when the loop has ended. */
int loop_run(struct daemon *d)
{
	struct epoll_event ev[EVENTS_MAX];

	while (!d->stopping) {
		int n = epoll_wait(d->epoll_fd, ev, EVENTS_MAX, -1);

		if (n < 0 && errno != EINTR)
			return -errno;
		for (int i = 0; i < n; i++) {
			struct loop_source *src = ev[i].data.ptr;

			if (src)
				src->fn(src, ev[i].events);
			else
				woken(d);
		}
	}
	return 0;
}
