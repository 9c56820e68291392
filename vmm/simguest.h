/* SPDX-License-Identifier: MIT */
/*
 * simguest: snapvm's workload as a program of the simulated CPU (--accel sim).
 */
#pragma once

struct machine;

/* Sets machine.sim, machine.kvm and machine.kvm_fd. */
int simguest_open(struct machine *m);
/* After every descriptor of the VM was closed.  Does nothing on the kernel's KVM. */
void simguest_close(struct machine *m);
