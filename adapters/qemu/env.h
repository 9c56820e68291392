/* SPDX-License-Identifier: MIT */
/*
 * What the launcher (snapd-qemu) tells the adapter (libsnapd-qemu.so), by way of QEMU's
 * environment.  SNAPD_VM_NAME, SNAPD_AGENT_SOCKET and SNAPD_RESTORE are the agent's own
 * (include/snapd/agent.h).
 *
 * Without SNAPD_QEMU_QMP the adapter does nothing: what QEMU starts inherits LD_PRELOAD.
 */
#pragma once

/*
 * "fd:N": a stream socket whose other end is the monitor (-chardev socket,id=snapd-qmp,fd=M):
 * both ends of a socketpair are in QEMU's process, so there is no file to protect and nothing
 * that security modules have to allow.  Else the path of a Unix socket.  The adapter takes
 * the variable out of the environment and sets CLOEXEC on both descriptors.
 */
#define SNAPD_QEMU_ENV_QMP "SNAPD_QEMU_QMP"

/* Set: a snapshot of another QEMU version, machine type or CPU is loaded all the same. */
#define SNAPD_QEMU_ENV_ANY "SNAPD_QEMU_ANY"

/* With SNAPD_RESTORE the launcher adds `-incoming defer`: QEMU makes its devices and waits. */

/* Ids of what the launcher adds to the command line begin so; a recorded command line is
 * freed of them before it is completed anew. */
#define SNAPD_QEMU_ID_PREFIX "snapd-"
#define SNAPD_QEMU_ID_QMP    "snapd-qmp" /* chardev, and the monitor on it */
#define SNAPD_QEMU_ID_RAM    "snapd-ram" /* memory-backend-memfd in place of -m's private RAM */
