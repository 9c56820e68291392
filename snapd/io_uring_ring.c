/* SPDX-License-Identifier: MIT */
/*
 * A ring: set up, or refused with a reason; see io_uring_ring.h.
 */
#include "snapd/io_uring_ring.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"

static int read_disabled_sysctl(void)
{
	_cleanup_fd_ int fd = open("/proc/sys/kernel/io_uring_disabled", O_RDONLY | O_CLOEXEC);
	char c = '0';

	if (fd < 0 || read(fd, &c, 1) != 1)
		return 0;
	return c - '0';
}

/* Why io_uring_setup() said no, and what a person can do about it. */
static int explain_setup(int code, struct err *e)
{
	int disabled = read_disabled_sysctl();

	switch (code) {
	case EPERM:
	case ENOSYS:
	case EACCES:
		if (disabled)
			return err_set(e, code,
				       "io_uring is switched off on this host "
				       "(kernel.io_uring_disabled is %d): run "
				       "`sysctl kernel.io_uring_disabled=0`, or with 1 add snapd's "
				       "group to kernel.io_uring_group",
				       disabled);
		return err_set(
			e, code,
			"io_uring is not allowed here (io_uring_setup: %s): a seccomp filter of "
			"the container or service forbids it, or the kernel lacks "
			"CONFIG_IO_URING; allow io_uring_setup, io_uring_enter and "
			"io_uring_register in the seccomp profile "
			"(podman/docker: --security-opt seccomp=PROFILE), and see that "
			"`sysctl kernel.io_uring_disabled` is 0",
			strerror(code));
	case ENOMEM:
		return err_set(
			e, code,
			"not enough lockable memory for io_uring: raise LimitMEMLOCK= of the "
			"unit (`ulimit -l`), or memory of the host is exhausted");
	default:
		return err_errno(e, code, "io_uring_setup");
	}
}

int ring_init(struct io_uring *ring, uint32_t depth, struct err *e)
{
	int r = io_uring_queue_init(depth, ring, IORING_SETUP_CLAMP);

	return r < 0 ? explain_setup(-r, e) : 0;
}

int ring_submit(struct io_uring *ring)
{
	uint32_t retries = 0;

	while (io_uring_sq_ready(ring)) {
		int r = io_uring_submit(ring);

		if (r > 0 || r == -EINTR)
			continue;
		if (r != 0 && r != -EAGAIN && r != -EBUSY && r != -ENOMEM)
			return r;
		if (++retries > RETRIES_MAX)
			return -EIO;
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	}
	return 0;
}

int ring_wait(struct io_uring *ring, struct io_uring_cqe **ret)
{
	int r;

	do
		r = io_uring_wait_cqe(ring, ret);
	while (r == -EINTR || r == -EAGAIN);
	return r;
}
