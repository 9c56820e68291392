/* SPDX-License-Identifier: MIT */
/* loop: the control loop, on the main thread. */
#pragma once

#include "snapd/core/daemon.h"

int loop_run(struct daemon *d); /* until d->stopping; -errno */
