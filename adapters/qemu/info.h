/* SPDX-License-Identifier: MIT */
/*
 * info: what a QEMU is (version, machine, CPU, RAM blocks, command line) as a JSON object, which
 * travels with each snapshot; and whether another one can become what a snapshot was of.
 */
#pragma once

#include <stdbool.h>

#include <jansson.h>

#include "adapters/qemu/qmp.h"

/* Name of the record in a snapshot's state; version 1: the text of the object. */
#define QEMU_INFO_RECORD  "dev.qemu.info"
/* Of the device state stream (version 1), loaded by qmp_load(). */
#define QEMU_STATE_RECORD "dev.qemu.state"

/*
 * {"version": "7.2.22", "package": "Debian …", "machine": "pc-q35-7.2", "cpu": "host-x86_64-cpu",
 *  "cpu_features": {"0x1:ECX": N, …}, "ram": [{"id": "…", "bytes": N}, …],
 *  "disks": [{"file": "…", "format": "…"}, …], "argv": ["…", …]}
 *
 * `disks` are those that the guest can write.  cpu_features is missing where this QEMU does not
 * tell; `argv` is the process's own command line.  The caller's.
 */
int qemu_info_read(struct qmp *q, json_t **ret, struct err *e);

/* May `now` load a snapshot of `then`?  -EINVAL with what differs: QEMU's version, the machine
 * type, the CPU model, or its features. */
int qemu_info_compatible(const json_t *then, const json_t *now, struct err *e);
