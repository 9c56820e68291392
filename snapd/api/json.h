/* SPDX-License-Identifier: MIT */
/* api_json: things of the store as JSON objects; any thread.  New references, or NULL. */
#pragma once

#include <jansson.h>

#include "snapd/store.h"

json_t *snapshot_json(const struct store_snapshot *s);
/* The VM as the store remembers it, with the command line of its VMM. */
json_t *snapshot_vm_json(struct store *store, const struct store_snapshot *s);
