/* SPDX-License-Identifier: MIT */
/* unixsock: the daemon's listening sockets.  Start-up only: it changes the umask. */
#pragma once

#include <stdbool.h>

#include "snapd/util/err.h"

/*
 * Listen on `path` (SOCK_STREAM or SOCK_SEQPACKET), non-blocking.  Everyone may
 * connect, or with `group` (may be NULL) only that group and root.  A socket file
 * that nobody answers on was left by a crash and is replaced.
 *
 * A socket on that path that the service manager listens on already is taken as it is, with
 * the permissions that it has; *inherited then says that the file is not ours to remove.
 *
 * -EADDRINUSE another service answers there, or it is not a socket; -EINVAL no such
 * group, or the path is too long.
 */
int unixsock_listen(const char *path, int type, const char *group, int *ret, bool *inherited,
		    struct err *e);
