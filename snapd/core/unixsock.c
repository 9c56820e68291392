/* SPDX-License-Identifier: MIT */
/* Listening Unix sockets; see unixsock.h. */
#include "snapd/core/unixsock.h"

#include <fcntl.h>
#include <grp.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "snapd/core/systemd.h"
#include "snapd/util/cleanup.h"

#define BACKLOG 128

static int address(const char *path, struct sockaddr_un *un, struct err *e)
{
	*un = (struct sockaddr_un){.sun_family = AF_UNIX};
	if (strlen(path) >= sizeof(un->sun_path))
		return err_set(e, EINVAL, "%s: a socket's path has at most %zu bytes", path,
			       sizeof(un->sun_path) - 1);
	memcpy(un->sun_path, path, strlen(path));
	return 0;
}

/* Left over from a service that was killed: nobody answers. */
static int remove_stale(const struct sockaddr_un *un, int type, struct err *e)
{
	_cleanup_fd_ int fd = -1;
	struct stat st;

	if (lstat(un->sun_path, &st))
		return errno == ENOENT ? 0 : err_errno(e, errno, "%s", un->sun_path);
	if (!S_ISSOCK(st.st_mode))
		return err_set(e, EADDRINUSE, "%s is there and is not a socket", un->sun_path);
	fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return err_errno(e, errno, "socket");
	/* EAGAIN: its queue is full, so somebody listens; EPROTOTYPE: somebody else. */
	if (!connect(fd, (const struct sockaddr *)un, sizeof(*un)) || errno == EAGAIN ||
	    errno == EPROTOTYPE)
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

static int take_over(int fd, struct err *e)
{
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) || fcntl(fd, F_SETFD, FD_CLOEXEC))
		return err_errno(e, errno, "socket of the service manager");
	return 0;
}

int unixsock_listen(const char *path, int type, const char *group, int *ret, bool *inherited,
		    struct err *e)
{
	_cleanup_fd_ int fd = -1;
	struct sockaddr_un un;
	mode_t mask;
	int rc = address(path, &un, e);

	*ret = systemd_socket(path, type);
	*inherited = *ret >= 0;
	if (*inherited)
		return take_over(*ret, e);

	if (!rc)
		rc = remove_stale(&un, type, e);
	if (rc)
		return rc;
	fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return err_errno(e, errno, "socket");
	mask = umask(0177); /* nobody, until permit() */
	rc = bind(fd, (struct sockaddr *)&un, sizeof(un)) ? errno : 0;
	umask(mask);
	if (rc)
		return err_errno(e, rc, "cannot listen on %s", path);
	rc = permit(path, group, e);
	if (!rc && listen(fd, BACKLOG))
		rc = err_errno(e, errno, "cannot listen on %s", path);
	if (rc) {
		unlink(path);
		return rc;
	}
	*ret = steal_fd(&fd);
	return 0;
}
