/* SPDX-License-Identifier: MIT */
/* A small file replaced as a whole; see savefile.h. */
#include "snapd/util/savefile.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"

static int write_all(int fd, const char *text, size_t len)
{
	while (len) {
		ssize_t n = write(fd, text, len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		text += n;
		len -= (size_t)n;
	}
	return fsync(fd) ? -errno : 0;
}

int savefile(const char *dir, const char *name, const char *text, struct err *e)
{
	_cleanup_fd_ int dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC), fd = -1;
	char temporary[NAME_MAX];
	int rc;

	if (snprintf(temporary, sizeof(temporary), ".new-%s", name) >= (int)sizeof(temporary))
		return err_errno(e, ENAMETOOLONG, "%s", name);
	if (dir_fd >= 0)
		fd = openat(dir_fd, temporary,
			    O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0)
		return err_errno(e, errno, "cannot write %s/%s", dir, temporary);
	rc = write_all(fd, text, strlen(text));
	if (!rc && (renameat(dir_fd, temporary, dir_fd, name) || fsync(dir_fd)))
		rc = -errno;
	if (rc)
		unlinkat(dir_fd, temporary, 0);
	return rc ? err_errno(e, -rc, "cannot write %s/%s", dir, name) : 0;
}
