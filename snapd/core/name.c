/* SPDX-License-Identifier: MIT */
/* What people may call VMs and snapshots; see name.h. */
#include "snapd/core/name.h"

#include <ctype.h>
#include <string.h>

#include "include/snapd/protocol.h"

int name_check(const char *what, const char *name, struct err *e)
{
	size_t n = strlen(name);

	if (!n || n >= SNAPD_NAME_MAX)
		return err_set(e, EINVAL, "%s: 1 to %u characters", what, SNAPD_NAME_MAX - 1);
	for (const char *p = name; *p; p++)
		if ((unsigned char)*p > 126 || !isgraph((unsigned char)*p) || strchr("@/\"\\", *p))
			return err_set(e, EINVAL,
				       "%s: only ASCII without blanks, '@', '/', quotes, backslash",
				       what);
	if (strspn(name, "0123456789") == n)
		return err_set(e, EINVAL, "%s: not only digits, which would look like an id", what);
	return 0;
}
