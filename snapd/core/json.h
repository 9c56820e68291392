/* SPDX-License-Identifier: MIT */
/* json: things of the store as JSON objects, and rules out of them; any thread.  New
 * references, or NULL. */
#pragma once

#include <jansson.h>

#include "snapd/policy/keep.h"
#include "snapd/store.h"

/* As json_dumps(), which writes half a text when it has no memory half way (jansson 2.14 drops
 * errors of keys).  malloc()ed; NULL. */
char *json_text(json_t *o, size_t flags);

json_t *snapshot_json(const struct store_snapshot *s);
/* The VM as the store remembers it, with the command line of its VMM. */
json_t *snapshot_vm_json(struct store *store, const struct store_snapshot *s);
/* What `keep` of a request says.  -EINVAL. */
int keep_from_json(json_t *keep, struct keep_rules *ret, struct err *e);
