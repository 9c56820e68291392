/* SPDX-License-Identifier: MIT */
/* The maps of a push: one layer over the base's, or all as one; see push.h. */
#include "snapd/backup/push_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/store/overlay.h"
#include "snapd/util/cleanup.h"

#define CHAIN_MAX 32u /* layers of a snapshot */

static int end_map(struct push *p, struct err *e)
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

static int put_run(struct push *p, const struct layer_run *run, struct err *e)
{
	int rc = layer_put(&p->layer, run);

	if (rc)
		return err_errno(e, -rc, "push");
	return layer_bytes(&p->layer) >= MAP_TARGET ? end_map(p, e) : 0;
}

/* ---- all layers as one, in place of a chain that got long ---- */

static int put_ref_run(struct push *p, const struct manifest_run *run, struct err *e)
{
	bool page = loc_kind(run->loc) == LOC_PAGE;
	struct layer_run r = {.gfn = run->gfn,
			      .nr = run->len,
			      .kind = page ? LAYER_PAGES : LAYER_ZERO,
			      .pack = page ? ref_pack(run->loc) : 0,
			      .entry = page ? ref_entry(run->loc) : 0};

	return run->loc == MANIFEST_GONE ? 0 : put_run(p, &r, e);
}

/* What the base has of frames below `gfn`, and was not replaced. */
static int put_base_until(struct push *p, uint64_t gfn, struct err *e)
{
	struct manifest_run *run = &p->whole_run;
	int rc = 0;

	for (;;) {
		struct manifest_run part;

		if (!run->len) {
			rc = memory_stream_next(p->whole, run, e);
			if (rc <= 0)
				return rc;
		}
		if (run->gfn >= gfn)
			return 0;
		part = *run;
		part.len = MIN(run->len, gfn - run->gfn);
		*run = run_from(*run, run->gfn + part.len);
		rc = put_ref_run(p, &part, e);
		if (rc)
			return rc;
	}
}

/* What the base has of frames below `gfn` is replaced. */
static int skip_base_until(struct push *p, uint64_t gfn, struct err *e)
{
	struct manifest_run *run = &p->whole_run;
	int rc = 0;

	while (run->len && run->gfn < gfn) {
		*run = run_from(*run, MIN(gfn, run->gfn + run->len));
		if (!run->len)
			rc = memory_stream_next(p->whole, run, e);
		if (rc < 0)
			return rc;
	}
	return 0;
}

int push_note_run(struct push *p, const struct layer_run *run, struct err *e)
{
	int rc;

	if (!p->whole)
		return put_run(p, run, e);
	rc = put_base_until(p, run->gfn, e);
	if (!rc)
		rc = skip_base_until(p, run->gfn + run->nr, e);
	return rc || run->kind == LAYER_GONE ? rc : put_run(p, run, e);
}

static bool chain_is_long(const struct push *p)
{
	return p->base->m.nr_layers >= CHAIN_MAX ||
	       (manifest_frames(p->base, 1) + p->nr_frames) * 2 > p->c.nr_pages;
}

int push_begin_layers(struct push *p, struct err *e)
{
	int rc = 0;

	layer_writer_init(&p->layer, &p->packs);
	if (!p->base)
		return 0;
	if (chain_is_long(p))
		return memory_stream_open(p->r, p->base, &p->packs, &p->whole, e);
	p->m.m.nr_layers = p->base->m.nr_layers;
	memcpy(p->m.layers, p->base->layers, sizeof(p->m.layers));
	for (uint32_t i = 0; !rc && i < p->base->m.nr_maps; i++)
		rc = manifest_add_map(&p->m, &p->base->maps[i]);
	return rc ? err_errno(e, -rc, "push") : 0;
}

int push_end_layers(struct push *p, struct err *e)
{
	int rc = p->whole ? put_base_until(p, UINT64_MAX, e) : 0;

	/* An empty map is one, too: each layer has some. */
	if (!rc && (!p->nr_maps || p->layer.nr_frames))
		rc = end_map(p, e);
	if (rc)
		return rc;
	p->m.layers[p->m.m.nr_layers++] = p->new_layer;
	for (uint32_t i = 0; !rc && i < p->nr_maps; i++)
		rc = manifest_add_map(&p->m, &p->maps[i]);
	return rc ? err_errno(e, -rc, "push") : 0;
}
