/* SPDX-License-Identifier: MIT */
/*
 * systemd: what a service manager hands over and wants to hear: sockets, READY and STOPPING,
 * and a sign of life while the control loop goes round.  Without a manager, or built without
 * libsystemd, each is a no-op.
 */
#pragma once

struct daemon;
struct err;

/* "READY=1" and the like. */
void systemd_notify(const char *what);

/* A socket that listens on `path` and was handed over, to be closed by the caller but not
 * unlinked; -1: none. */
int systemd_socket(const char *path, int type);

/* Send WATCHDOG=1 twice in the time that was agreed on, from the control loop. */
int systemd_watchdog_start(struct daemon *d, struct err *e);
void systemd_watchdog_stop(void); /* accepts never started */
