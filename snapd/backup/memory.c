/* SPDX-License-Identifier: MIT */
/* Layers of a snapshot laid over each other; see memory.h. */
#include "snapd/backup/memory.h"

#include <errno.h>
#include <stdlib.h>

#include "snapd/store/overlay.h"
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

/* ---- as a sequence ---- */

/* The maps of a layer, one after the other. */
struct layer_source {
	struct memory_stream *s;
	const struct bk_name *maps; /* borrowed */
	uint32_t nr, at;
	uint8_t *payload; /* owned; of the one at hand */
	struct layer_reader reader;
	uint64_t end; /* of its last run */
};

struct memory_stream {
	struct repo *r;
	struct packset *packs;	      /* borrowed */
	struct layer_source *sources; /* owned; newest first */
	uint32_t nr;
	struct overlay overlay;
};

static void drop_map(struct layer_source *x)
{
	layer_reader_deinit(&x->reader);
	free(x->payload);
	x->payload = NULL;
}

static int of_map(const struct layer_source *x, int rc, const struct err *why, struct err *e)
{
	char key[REPO_KEY_BYTES];

	return err_set(e, -rc, "%s: %s", repo_key(REPO_BLOBS, &x->maps[x->at - 1], key), why->text);
}

static int next_map(struct layer_source *x, struct err *e)
{
	struct err why = {0};
	size_t len;
	int rc;

	drop_map(x);
	rc = repo_get_blob(x->s->r, REPO_BLOBS, BK_MAP, &x->maps[x->at++], &x->payload, &len, e);
	if (rc)
		return rc;
	rc = layer_reader_init(&x->reader, x->payload, len, x->s->packs, &why);
	return rc ? of_map(x, rc, &why, e) : 0;
}

static int next_run(void *arg, struct manifest_run *ret, struct err *e)
{
	struct layer_source *x = arg;
	struct layer_run run;
	struct err why = {0};
	int rc = 0;

	while (!x->payload || !(rc = layer_next(&x->reader, &run, &why))) {
		if (x->at == x->nr)
			return 0;
		rc = next_map(x, e);
		if (rc)
			return rc;
	}
	if (rc == 1 && run.gfn < x->end)
		rc = err_set(&why, E_CORRUPT, "the map begins before the one before it ends");
	if (rc < 0)
		return of_map(x, rc, &why, e);
	x->end = run.gfn + run.nr;
	*ret = (struct manifest_run){.gfn = run.gfn,
				     .len = run.nr,
				     .loc = run.kind == LAYER_PAGES  ? ref_make(run.pack, run.entry)
					    : run.kind == LAYER_ZERO ? LOC_ZERO_PAGE
								     : MANIFEST_GONE};
	return 1;
}

static int begin_layers(struct memory_stream *s, const struct manifest *m, struct err *e)
{
	_cleanup_free_ void **layers = calloc(m->m.nr_layers + 1, sizeof(*layers));
	uint32_t at = 0;

	s->nr = m->m.nr_layers;
	s->sources = calloc(s->nr + 1, sizeof(*s->sources));
	if (!layers || !s->sources)
		return err_errno(e, ENOMEM, "backup");
	for (uint32_t i = 0; i < s->nr; i++) {
		struct layer_source *x = &s->sources[s->nr - 1 - i];

		*x = (struct layer_source){
			.s = s, .maps = &m->maps[at], .nr = m->layers[i].nr_maps};
		layers[s->nr - 1 - i] = x;
		at += m->layers[i].nr_maps;
	}
	return overlay_init(&s->overlay, next_run, layers, s->nr, e);
}

int memory_stream_open(struct repo *r, const struct manifest *m, struct packset *packs,
		       struct memory_stream **ret, struct err *e)
{
	struct memory_stream *s = calloc(1, sizeof(*s));
	int rc;

	if (!s)
		return err_errno(e, ENOMEM, "backup");
	s->r = r;
	s->packs = packs;
	rc = begin_layers(s, m, e);
	if (rc)
		memory_stream_close(s);
	else
		*ret = s;
	return rc;
}

void memory_stream_close(struct memory_stream *s)
{
	if (!s)
		return;
	overlay_deinit(&s->overlay);
	for (uint32_t i = 0; s->sources && i < s->nr; i++)
		drop_map(&s->sources[i]);
	free(s->sources);
	free(s);
}

int memory_stream_next(struct memory_stream *s, struct manifest_run *ret, struct err *e)
{
	return overlay_next(&s->overlay, ret, e);
}
