/* SPDX-License-Identifier: MIT */
/* unixsock: the daemon's listening sockets.  Start-up only: it changes the umask. */
#pragma once

#include "snapd/util/err.h"

/*
 * Listen on `path` (SOCK_STREAM or SOCK_SEQPACKET), non-blocking.  Everyone may
 * connect, or with `group` (may be NULL) only that group and root.  A socket file
 * that nobody answers on was left by a crash and is replaced.
 *
 * -EADDRINUSE another service answers there, or it is not a socket; -EINVAL no such
 * group, or the path is too long.
 */
int unixsock_listen(const char *path, int type, const char *group, int *ret, struct err *e);
