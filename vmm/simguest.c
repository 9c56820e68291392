/* SPDX-License-Identifier: MIT */
/* simguest: this build runs guests on the kernel's KVM only. */
#include <errno.h>
#include <stdio.h>

#include "vmm/machine.h"
#include "vmm/simguest.h"

int simguest_open(struct machine *m)
{
	fprintf(stderr, "snapvm: built without the simulated KVM\n");
	return -ENOTSUP;
}

void simguest_close(struct machine *m)
{
}
