/* SPDX-License-Identifier: MIT */
/*
 * vmstate: a device state stream enters, a qcow2 image (version 3) that holds it as the VM
 * state of its only internal snapshot leaves, for `snapshot-load`.  Pure, but for the memfd.
 *
 * QEMU can load device state into a VM that has run only from an internal snapshot
 * (migration/savevm.c, load_snapshot()), and the format of that state is that of a
 * migration.  So no second save is needed, and what is stored fits both.
 *
 * Clusters of 64 KiB, big-endian:
 *
 *   0 header   1 refcount table   2 refcount block   3 L1 (active)   4 L1 (snapshot)
 *   5 snapshot table   6 L2 × nr_l2   6 + nr_l2 … stream, the last cluster padded with zeros
 *
 * The disk has one cluster, never written; the VM state begins behind what its L1 entry
 * could map (docs/interop/qcow2.txt, "VM state").
 */
#pragma once

#include <stddef.h>

#include "snapd/util/err.h"

#define VMSTATE_TAG "snapd"

/* *ret: a new memfd with the image; its offset is of no account. */
int vmstate_image(const void *stream, size_t len, int *ret, struct err *e);
