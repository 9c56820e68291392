/* SPDX-License-Identifier: MIT */
/*
 * The agents' socket: SOCK_SEQPACKET, accepted here, served by VM threads.
 *
 * Whoever may connect may attach VMs of its own, and sees no others; so the socket
 * is open to all users, unless socket_group narrows it.  When descriptors run out, a
 * spare one serves to turn the connection away, since one that waits would keep
 * the loop awake.
 */
#include "snapd/daemon/agents.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "snapd/core/unixsock.h"
#include "snapd/util/log.h"
#include "snapd/vm/vm.h"

#define BACKLOG 64

static struct agents {
	struct loop_source src; /* first: the loop hands it back */
	struct daemon *d;
	bool inherited; /* the socket file is the service manager's */
	int spare_fd;	/* given up to accept, and refuse, when no other is left */
} agents = {.src.fd = -1, .spare_fd = -1};

/* Take a connection only to close it. */
static void turn_away(struct agents *a)
{
	int fd;

	if (a->spare_fd >= 0)
		close(a->spare_fd);
	fd = accept4(a->src.fd, NULL, NULL, SOCK_CLOEXEC);
	if (fd >= 0)
		close(fd);
	a->spare_fd = fcntl(a->d->wake_fd, F_DUPFD_CLOEXEC, 0);
	log_warn("out of file descriptors: a VMM was turned away");
}

static void on_connection(struct loop_source *src, uint32_t events)
{
	struct agents *a = (struct agents *)src;

	for (int i = 0; i < BACKLOG; i++) {
		int fd = accept4(src->fd, NULL, NULL, SOCK_CLOEXEC);

		if (fd >= 0)
			vm_accept(a->d, fd);
		else if (errno == EMFILE || errno == ENFILE)
			turn_away(a);
		else if (errno != EINTR && errno != ECONNABORTED)
			return;
	}
}

int agents_start(struct daemon *d, struct err *e)
{
	bool inherited;
	int fd, err;

	err = unixsock_listen(d->config.agent_socket, SOCK_SEQPACKET, d->config.socket_group, &fd,
			      &inherited, e);
	if (err)
		return err;
	agents = (struct agents){.src = {.fd = fd, .fn = on_connection},
				 .d = d,
				 .inherited = inherited,
				 .spare_fd = fcntl(d->wake_fd, F_DUPFD_CLOEXEC, 0)};
	err = loop_add(d, &agents.src, EPOLLIN);
	if (err) {
		agents_stop(d);
		return err_errno(e, -err, "watch %s", d->config.agent_socket);
	}
	return 0;
}

void agents_stop(struct daemon *d)
{
	if (agents.src.fd < 0)
		return;
	loop_del(d, &agents.src);
	close(agents.src.fd);
	if (agents.spare_fd >= 0)
		close(agents.spare_fd);
	agents.src.fd = agents.spare_fd = -1;
	if (!agents.inherited)
		unlink(d->config.agent_socket);
}
