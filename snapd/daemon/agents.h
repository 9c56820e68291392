/* SPDX-License-Identifier: MIT */
/* agents: the socket on which VMMs connect; on the control thread. */
#pragma once

#include "snapd/core/daemon.h"

/* -EADDRINUSE: another service answers there. */
int agents_start(struct daemon *d, struct err *e);
void agents_stop(struct daemon *d); /* removes the socket; accepts never started */
