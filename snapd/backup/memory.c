/* SPDX-License-Identifier: MIT */
/* Layers of a snapshot laid over each other; see memory.h. */
#include "snapd/backup/memory.h"

#include <errno.h>
#include <stdlib.h>

#include "snapd/util/cleanup.h"

struct loading {
	struct pagemap *map;
	memory_gone_fn gone;
	void *arg;
};

static int lay_run(void *arg, const struct layer_run *run, struct err *e)
{
	struct loading *l = arg;
	loc_t loc = 0;
	int rc = 0;

	if (run->kind == LAYER_ZERO)
		loc = LOC_ZERO_PAGE;
	else if (run->kind == LAYER_PAGES)
		loc = ref_make(run->pack, run->entry);
	else if (l->gone)
		rc = l->gone(l->arg, run->gfn, run->nr, e);
	if (rc)
		return rc;
	rc = pagemap_set_run(l->map, run->gfn, run->nr, loc);
	if (rc == -ENOMEM)
		return err_errno(e, ENOMEM, "backup");
	return rc ? err_set(e, E_CORRUPT, "the map is larger than any memory") : 0;
}

static int lay_map(struct repo *r, const struct bk_name *name, struct packset *packs,
		   struct loading *l, struct err *e)
{
	_cleanup_free_ uint8_t *payload = NULL;
	char key[REPO_KEY_BYTES];
	struct err why = {0};
	size_t len;
	int rc = repo_get_blob(r, REPO_BLOBS, BK_MAP, name, &payload, &len, e);

	if (rc)
		return rc;
	rc = layer_decode(payload, len, packs, lay_run, l, &why);
	return rc ? err_set(e, -rc, "%s: %s", repo_key(REPO_BLOBS, name, key), why.text) : 0;
}

int memory_load(struct repo *r, const struct manifest *m, uint32_t first, struct packset *packs,
		struct pagemap *map, memory_gone_fn gone, void *arg, struct err *e)
{
	struct loading l = {.map = map, .gone = gone, .arg = arg};
	uint32_t at = 0;
	int rc = 0;

	for (uint32_t i = 0; !rc && i < m->m.nr_layers; i++)
		for (uint32_t k = 0; !rc && k < m->layers[i].nr_maps; k++, at++)
			if (i >= first)
				rc = lay_map(r, &m->maps[at], packs, &l, e);
	return rc;
}
