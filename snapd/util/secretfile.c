/* SPDX-License-Identifier: MIT */
/* Files that hold secrets; see secretfile.h. */
#include "snapd/util/secretfile.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"

static bool is_credential(const char *path)
{
	const char *dir = getenv("CREDENTIALS_DIRECTORY");
	size_t len = dir ? strlen(dir) : 0;

	return len && !strncmp(path, dir, len) && path[len] == '/' && !strstr(path, "/../");
}

static int check_mode(int fd, const char *path, const char *what, bool *others, struct err *e)
{
	struct stat st;

	if (fstat(fd, &st))
		return err_errno(e, errno, "%s %s", what, path);
	if (!S_ISREG(st.st_mode))
		return err_set(e, EPERM, "%s %s is no regular file", what, path);
	if (is_credential(path))
		return 0;
	if (others && ((st.st_mode & 077) || (st.st_uid && st.st_uid != geteuid()))) {
		*others = true;
		return 0;
	}
	if (st.st_mode & 077)
		return err_set(e, EPERM, "%s %s: others may use it (mode %03o); chmod 600 it", what,
			       path, st.st_mode & 0777);
	if (st.st_uid && st.st_uid != geteuid())
		return err_set(e, EPERM, "%s %s belongs to user %u, neither root nor us", what,
			       path, st.st_uid);
	return 0;
}

int secret_file_read(const char *path, const char *what, void *buf, size_t size, size_t *ret_len,
		     bool *others, struct err *e)
{
	_cleanup_fd_ int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	int r;

	*ret_len = 0;
	if (others)
		*others = false;
	if (fd < 0)
		return err_errno(e, errno, "%s %s", what, path);
	r = check_mode(fd, path, what, others, e);
	while (!r && *ret_len < size) {
		ssize_t n = read(fd, (char *)buf + *ret_len, size - *ret_len);

		if (n < 0 && errno != EINTR)
			return err_errno(e, errno, "%s %s", what, path);
		if (!n)
			break;
		*ret_len += n > 0 ? (size_t)n : 0;
	}
	return r;
}
