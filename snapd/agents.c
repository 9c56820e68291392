/* SPDX-License-Identifier: MIT */
/*
 * The agents' socket: SOCK_SEQPACKET, accepted here, served by VM threads.
 *
 * Whoever may connect may attach VMs of its own, and sees no others; so the socket
 * is open to all users, unless socket_group narrows it.  When descriptors run out, a
 * spare one serves to turn the connection away, since one that waits would keep
 * the loop awake.
 */
#include "snapd/agents.h"

#include <fcntl.h>
#include <grp.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/vm.h"

#define BACKLOG 64

static struct agents {
	struct loop_source src; /* first: the loop hands it back */
	struct daemon *d;
	int spare_fd; /* given up to accept, and refuse, when no other is left */
} agents = {.src.fd = -1, .spare_fd = -1};

static int address(const char *path, struct sockaddr_un *un, struct err *e)
{
	*un = (struct sockaddr_un){.sun_family = AF_UNIX};
	if (strlen(path) >= sizeof(un->sun_path))
		return err_set(e, EINVAL, "socket path %s is too long", path);
	memcpy(un->sun_path, path, strlen(path));
	return 0;
}

/* Left over from a service that was killed: nobody answers. */
static int remove_stale(const struct sockaddr_un *un, struct err *e)
{
	_cleanup_fd_ int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	struct stat st;

	if (fd < 0)
		return err_errno(e, errno, "socket");
	if (lstat(un->sun_path, &st))
		return errno == ENOENT ? 0 : err_errno(e, errno, "%s", un->sun_path);
	if (!S_ISSOCK(st.st_mode))
		return err_set(e, EADDRINUSE, "%s is there and is not a socket", un->sun_path);
	if (!connect(fd, (const struct sockaddr *)un, sizeof(*un)))
		return err_set(e, EADDRINUSE, "another service answers on %s", un->sun_path);
	return unlink(un->sun_path) ? err_errno(e, errno, "remove %s", un->sun_path) : 0;
}

static int permit(const char *path, const char *group, struct err *e)
{
	struct group *g;

	if (!group)
		return chmod(path, 0666) ? err_errno(e, errno, "chmod %s", path) : 0;
	g = getgrnam(group);
	if (!g)
		return err_set(e, EINVAL, "no group '%s'", group);
	if (chown(path, (uid_t)-1, g->gr_gid) || chmod(path, 0660))
		return err_errno(e, errno, "give %s to group %s", path, group);
	return 0;
}

static int listen_on(const struct daemon_config *c, struct err *e)
{
	_cleanup_fd_ int fd = -1;
	struct sockaddr_un un;
	mode_t mask;
	int err = address(c->agent_socket, &un, e);

	if (!err)
		err = remove_stale(&un, e);
	if (err)
		return err;
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return err_errno(e, errno, "socket");
	mask = umask(0177); /* nobody, until permit() */
	err = bind(fd, (struct sockaddr *)&un, sizeof(un)) ? errno : 0;
	umask(mask);
	if (err)
		return err_errno(e, err, "cannot listen on %s", c->agent_socket);
	err = permit(c->agent_socket, c->socket_group, e);
	if (!err && listen(fd, BACKLOG))
		err = err_errno(e, errno, "cannot listen on %s", c->agent_socket);
	if (err) {
		unlink(c->agent_socket);
		return err;
	}
	return steal_fd(&fd);
}

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
	int fd = listen_on(&d->config, e), err;

	if (fd < 0)
		return fd;
	agents = (struct agents){.src = {.fd = fd, .fn = on_connection},
				 .d = d,
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
	unlink(d->config.agent_socket);
}
