/* SPDX-License-Identifier: MIT */
/*
 * replacements: a recorded command line for another VM: its disks and MAC addresses are exchanged,
 * and what only the process of then had is refused.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/qemu/cmdline_priv.h"
#include "adapters/qemu/props.h"
#include "snapd/util/cleanup.h"

static size_t replace_in(struct option *o, const char *const *keys, const struct replacement *r)
{
	const char *text = o->changed ? o->changed : o->given;
	size_t nr = 0;
	char *changed = props_replace(text, keys, r->from, r->to, &nr);

	free(o->changed);
	o->changed = changed;
	return nr;
}

static size_t replace_disk(struct option *o, const struct replacement *r)
{
	static const char *const keys[] = {"file", "filename", "file.filename", NULL};
	static const char *const whole[] = {"",	     "hda", "hdb",    "hdc", "hdd",
					    "cdrom", "fda", "pflash", "sd",  "mtdblock"};

	if (option_is(o, "drive") || option_is(o, "blockdev"))
		return replace_in(o, keys, r);
	for (size_t i = 0; i < ARRAY_SIZE(whole); i++)
		if (option_is(o, whole[i]) && !strcmp(o->given, r->from)) {
			free(o->changed);
			o->changed = must(strdup(r->to));
			return 1;
		}
	return 0;
}

static size_t replace_mac(struct option *o, const struct replacement *r)
{
	static const char *const keys[] = {"mac", "macaddr", NULL};

	return option_is(o, "device") || option_is(o, "nic") || option_is(o, "net")
		       ? replace_in(o, keys, r)
		       : 0;
}

static int replace_each(struct parsed *p, const struct replacement *r, size_t nr, const char *what,
			size_t (*replace)(struct option *o, const struct replacement *r),
			struct err *e)
{
	for (size_t i = 0; i < nr; i++) {
		size_t found = 0;

		for (size_t k = 0; k < p->n; k++)
			if (p->o[k].given && !p->o[k].gone)
				found += replace(&p->o[k], &r[i]);
		if (!found)
			return err_set(e, EINVAL, "the command line has no %s %s", what, r[i].from);
	}
	return 0;
}

int replacements_apply(struct parsed *p, const struct cmdline_request *req, struct err *e)
{
	int rc = replace_each(p, req->disks, req->nr_disks, "disk", replace_disk, e);

	return rc ? rc : replace_each(p, req->macs, req->nr_macs, "MAC address", replace_mac, e);
}

/* A descriptor is of the process that started QEMU then. */
int replacements_no_descriptors(const struct parsed *p, struct err *e)
{
	static const char *const keys[] = {"fd", "fds", "vhostfd", "vhostfds", "sock_fd"};

	for (size_t i = 0; i < p->n; i++)
		for (size_t k = 0; !p->o[i].gone && k < ARRAY_SIZE(keys); k++)
			if (*props_get(p->o[i].props, keys[k]))
				return err_set(e, EINVAL,
					       "%s %.200s: names a descriptor that another program "
					       "opened; --print shows the line to be edited",
					       p->o[i].text, p->o[i].given);
	return 0;
}
