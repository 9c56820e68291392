/* SPDX-License-Identifier: MIT */
/*
 * manifest: a snapshot of the repository: what people say of it, where its state and the
 * layers of its memory are.  Pure.  An object of its own; the snapshot is there if and only if
 * that is.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "snapd/backup/layout.h"
#include "snapd/util/err.h"

struct manifest {
	struct bk_name name; /* of the object */
	struct bk_manifest m;
	struct bk_layer layers[BK_LAYERS_MAX];
	struct bk_name *maps; /* owned; m.nr_maps */
	char *cmdline;	      /* owned; m.cmdline_bytes, each argument with its NUL */
};

void manifest_deinit(struct manifest *m);
/* *ret malloc()ed.  -ENOMEM. */
int manifest_encode(const struct manifest *m, uint8_t **ret, size_t *ret_len);
/* The name is the caller's to set.  -EUCLEAN, -ENOMEM. */
int manifest_decode(const uint8_t *payload, size_t len, struct manifest *ret, struct err *e);
/* -ENOMEM. */
int manifest_add_map(struct manifest *m, const struct bk_name *name);
uint64_t manifest_frames(const struct manifest *m, uint32_t first_layer);
