/* SPDX-License-Identifier: MIT */
/* name: what people may call VMs and snapshots.  Pure. */
#pragma once

#include "snapd/util/err.h"

/* Selectors are "ID", "VM@ID", "VM@NAME", "VM": so no blanks, '@', '/' or quotes,
 * not only digits; shorter than SNAPD_NAME_MAX.  `what` opens the reason. */
int name_check(const char *what, const char *name, struct err *e);
