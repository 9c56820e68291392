/* SPDX-License-Identifier: MIT */
/*
 * cmdline: a command line of QEMU's enters, the one under which the adapter can do its work
 * leaves, or the reason why there is none.  Pure, but for asking which file system a file lies
 * on; out of memory ends the program.
 *
 *   added      a monitor on a descriptor; `-accel kvm` where no accelerator is named; a
 *              memory-backend-memfd where -m alone would make private RAM
 *   changed    share=on for memfd backends; memory-backend-ram becomes -memfd
 *   taken out  what an earlier run of ours added (ids that begin with "snapd-");
 *              dirty-ring-size, since the ring is the adapter's; for a restore -incoming, -loadvm
 *   refused    what writes guest memory unseen by the adapter, or memory it cannot share: hugetlb,
 *              files mapped private, or on a disk, VFIO, vhost-user, vhost-vdpa, ivshmem,
 * confidential guests, no KVM passed     questions (-version, help of any option, -machine none),
 * unchanged
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "snapd/util/err.h"

struct strv {
	char **v; /* NULL-terminated once anything was added; owned, like the texts */
	size_t n;
};
void strv_add(struct strv *s, const char *text);
void strv_deinit(struct strv *s);

struct replacement {
	const char *from, *to;
};

struct cmdline_request {
	int monitor_fd; /* QEMU's end */
	bool restore;	/* wait for a stream in place of booting */
	bool recorded;	/* of a QEMU that was: descriptors it names were that process's */
	const struct replacement *disks;
	size_t nr_disks;
	const struct replacement *macs;
	size_t nr_macs;
};

struct cmdline {
	struct strv argv;
	struct strv notes; /* for people: what was changed */
	char *guest;	   /* of -name; NULL: none; owned */
};
void cmdline_deinit(struct cmdline *c);

#define CMDLINE_PASS 1

/* argv[0] is QEMU.  0, CMDLINE_PASS, or -EINVAL. */
int cmdline_complete(const struct cmdline_request *req, char *const *argv, struct cmdline *ret,
		     struct err *e);
