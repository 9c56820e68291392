/* SPDX-License-Identifier: MIT */
/* A snapshot opened for reading; see contents.h.  Job threads. */
#include "snapd/core/contents.h"

#include <stdlib.h>
#include <string.h>

#include "include/snapd/protocol.h"
#include "snapd/util/cleanup.h"

int contents_pieces(const struct snapd_state_reader *r, const struct state_piece **ret, size_t *nr,
		    uint64_t *nr_pages, struct err *e)
{
	const struct state_piece *p;
	uint64_t end = 0, sum = 0;
	uint16_t version;
	size_t len;

	if (state_get(r, "pieces", 0, &version, (const void **)&p, &len))
		return err_set(e, E_CORRUPT, "the state has no \"pieces\" record");
	if (version != 1 || len % sizeof(*p) || !len)
		return err_set(e, E_CORRUPT, "the state's \"pieces\" record is malformed");
	for (size_t i = 0; i < len / sizeof(*p); i++) {
		if (!p[i].nr_pages || p[i].nr_pages > SNAPD_SHM_FRAMES - sum ||
		    p[i].home_gfn < end || p[i].home_gfn > UINT64_MAX / 65536 - p[i].nr_pages)
			return err_set(e, E_CORRUPT, "piece %zu of the state is malformed", i);
		end = p[i].home_gfn + p[i].nr_pages;
		sum += p[i].nr_pages;
	}
	*ret = p;
	*nr = len / sizeof(*p);
	*nr_pages = sum;
	return 0;
}

static int load(struct store *s, struct contents *c, bool with_map, struct err *e)
{
	int rc = store_state_load(s, c->snap.point, &c->state, &c->state_len, e);

	if (!rc)
		rc = state_reader_init(&c->reader, c->state, c->state_len, e);
	if (!rc)
		rc = contents_pieces(&c->reader, &c->pieces, &c->nr_pieces, &c->nr_pages, e);
	if (!rc && with_map)
		rc = store_map_load(s, c->snap.point, false, &c->map, e);
	return rc;
}

int contents_open(struct store *s, uint64_t snapshot, bool with_map, struct contents *ret,
		  struct err *e)
{
	struct err why = {0};
	int rc;

	*ret = (struct contents){0};
	rc = store_snapshot_get(s, snapshot, &ret->snap, e);
	if (!rc)
		rc = store_pin(s, ret->snap.point, e);
	if (rc)
		return rc;
	ret->store = s;
	rc = load(s, ret, with_map, &why);
	if (rc) {
		contents_deinit(ret);
		err_set(e, -rc, "snapshot %s@%llu: %s", ret->snap.vm_name,
			(unsigned long long)snapshot, why.code ? why.text : strerror(-rc));
	}
	return rc;
}

void contents_deinit(struct contents *c)
{
	free(c->state);
	c->state = NULL;
	if (c->map)
		pagemap_destroy(c->map);
	c->map = NULL;
	if (c->store)
		store_unpin(c->store, c->snap.point);
	c->store = NULL;
}

int contents_next(struct contents_walk *w, uint64_t *gfn, loc_t *loc, struct err *e)
{
	const struct contents *c = w->c;

	if (w->piece == c->nr_pieces)
		return 0;
	*gfn = c->pieces[w->piece].home_gfn + w->page;
	*loc = pagemap_get(c->map, *gfn);
	if (++w->page == c->pieces[w->piece].nr_pages) {
		w->piece++;
		w->page = 0;
	}
	if (loc_kind(*loc) == LOC_NONE)
		return err_set(e, E_CORRUPT, "snapshot %s@%llu: no page is recorded for GPA 0x%llx",
			       c->snap.vm_name, (unsigned long long)c->snap.id,
			       (unsigned long long)*gfn * c->snap.page_size);
	return 1;
}

bool contents_postmortem(const struct snapd_state_reader *r)
{
	const void *data;
	uint16_t version;
	size_t len;

	return !state_get(r, STATE_POSTMORTEM, 0, &version, &data, &len);
}
