/* SPDX-License-Identifier: MIT */
/* The maps of a push: one layer over the base's, or all as one; see push.h. */
#include "snapd/backup/push_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/backup/memory.h"
#include "snapd/util/cleanup.h"

#define CHAIN_MAX 32u /* layers of a snapshot */

int push_end_map(struct push *p, struct err *e)
{
	struct bk_name *maps = realloc(p->maps, (p->nr_maps + 1) * sizeof(*maps));
	_cleanup_free_ uint8_t *payload = NULL;
	uint64_t frames;
	size_t len;
	int rc;

	if (!maps)
		return err_errno(e, ENOMEM, "push");
	p->maps = maps;
	rc = push_send_pack(p, e); /* the map has its name */
	if (rc)
		return rc;
	rc = layer_finish(&p->layer, &payload, &len, &frames);
	if (rc)
		return err_errno(e, -rc, "push");
	rc = repo_put_blob(p->r, REPO_BLOBS, BK_MAP, payload, len, &maps[p->nr_maps],
			   &p->blob_bytes, e);
	if (rc)
		return rc;
	p->nr_maps++;
	p->new_layer.nr_maps++;
	p->new_layer.nr_frames += frames;
	return 0;
}

int push_note_frame(struct push *p, uint64_t gfn, enum layer_kind kind, uint32_t pack,
		    uint32_t entry, struct err *e)
{
	loc_t ref = kind == LAYER_PAGES	 ? ref_make(pack, entry)
		    : kind == LAYER_ZERO ? LOC_ZERO_PAGE
					 : 0;
	int rc = p->whole ? pagemap_set(p->whole, gfn, ref, 0)
			  : layer_put(&p->layer, gfn, kind, pack, entry);

	return rc ? err_errno(e, -rc, "push") : 0;
}

/* All layers as one: in place of a chain that got long. */
static int write_whole(struct push *p, struct err *e)
{
	struct pagemap_iter it;
	uint64_t gfn;
	loc_t ref;
	int rc = push_send_pack(p, e);

	if (rc)
		return rc;
	if (pagemap_iter_init(&it, p->whole))
		return err_errno(e, ENOMEM, "push");
	while (!rc && pagemap_iter_next(&it, &gfn, &ref)) {
		bool page = loc_kind(ref) == LOC_PAGE;

		rc = layer_put(&p->layer, gfn, page ? LAYER_PAGES : LAYER_ZERO, ref_pack(ref),
			       ref_entry(ref));
		if (rc)
			err_errno(e, -rc, "push");
		if (!rc && layer_bytes(&p->layer) >= MAP_TARGET)
			rc = push_end_map(p, e);
	}
	pagemap_iter_deinit(&it);
	return rc;
}

static bool chain_is_long(const struct push *p)
{
	return p->base->m.nr_layers >= CHAIN_MAX ||
	       (manifest_frames(p->base, 1) + p->nr_changed) * 2 > p->c.nr_pages;
}

int push_begin_layers(struct push *p, struct err *e)
{
	int rc = 0;

	layer_writer_init(&p->layer, &p->packs);
	if (!p->base)
		return 0;
	if (chain_is_long(p)) {
		rc = pagemap_create(false, &p->whole);
		return rc ? err_errno(e, -rc, "push")
			  : memory_load(p->r, p->base, 0, &p->packs, p->whole, NULL, NULL, e);
	}
	p->m.m.nr_layers = p->base->m.nr_layers;
	memcpy(p->m.layers, p->base->layers, sizeof(p->m.layers));
	for (uint32_t i = 0; !rc && i < p->base->m.nr_maps; i++)
		rc = manifest_add_map(&p->m, &p->base->maps[i]);
	return rc ? err_errno(e, -rc, "push") : 0;
}

int push_end_layers(struct push *p, struct err *e)
{
	int rc = p->whole ? write_whole(p, e) : 0;

	/* An empty map is one, too: each layer has some. */
	if (!rc && (!p->nr_maps || p->layer.nr_frames))
		rc = push_end_map(p, e);
	if (rc)
		return rc;
	p->m.layers[p->m.m.nr_layers++] = p->new_layer;
	for (uint32_t i = 0; !rc && i < p->nr_maps; i++)
		rc = manifest_add_map(&p->m, &p->maps[i]);
	return rc ? err_errno(e, -rc, "push") : 0;
}
