/* SPDX-License-Identifier: MIT */
/* The service manager; see systemd.h. */
#include "snapd/core/systemd.h"

#include <errno.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#ifdef HAVE_SYSTEMD
#include <systemd/sd-daemon.h>
#endif

#include "snapd/core/daemon.h"

static struct loop_source timer = {.fd = -1};

#ifdef HAVE_SYSTEMD

void systemd_notify(const char *what)
{
	sd_notify(0, what);
}

int systemd_socket(const char *path, int type)
{
	int n = sd_listen_fds(0);

	for (int fd = SD_LISTEN_FDS_START; fd < SD_LISTEN_FDS_START + n; fd++)
		if (sd_is_socket_unix(fd, type, 1, path, 0) > 0)
			return fd;
	return -1;
}

static uint64_t watchdog_us(void)
{
	uint64_t us;

	return sd_watchdog_enabled(0, &us) > 0 ? us : 0;
}

#else

void systemd_notify(const char *what)
{
}

int systemd_socket(const char *path, int type)
{
	return -1;
}

static uint64_t watchdog_us(void)
{
	return 0;
}

#endif

static void on_timer(struct loop_source *src, uint32_t events)
{
	uint64_t n;

	if (read(src->fd, &n, sizeof(n)) == sizeof(n))
		systemd_notify("WATCHDOG=1");
}

int systemd_watchdog_start(struct daemon *d, struct err *e)
{
	uint64_t us = watchdog_us() / 2;
	struct itimerspec every = {
		.it_interval = {(time_t)(us / 1000000), (long)(us % 1000000) * 1000}};
	int rc;

	if (!us)
		return 0;
	every.it_value = every.it_interval;
	timer.fn = on_timer;
	timer.fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (timer.fd < 0 || timerfd_settime(timer.fd, 0, &every, NULL))
		return err_errno(e, errno, "watchdog timer");
	rc = loop_add(d, &timer, EPOLLIN);
	return rc ? err_errno(e, -rc, "watchdog timer") : 0;
}

void systemd_watchdog_stop(void)
{
	if (timer.fd >= 0)
		close(timer.fd);
	timer.fd = -1;
}
