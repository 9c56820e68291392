/* SPDX-License-Identifier: MIT */
/*
 * What damage costs: each snapshot's map against the places that are lost.
 */
#include "snapd/store/check_internal.h"

#include <string.h>

#include "snapd/store/point.h"

static int compare_locs(const void *a, const void *b)
{
	loc_t x = *(const loc_t *)a, y = *(const loc_t *)b;

	return x < y ? -1 : x > y;
}

static bool page_is_lost(const struct check *k, loc_t loc)
{
	const struct batch_at *b = check_find_batch(k, loc_segment(loc), loc_block(loc));

	if (!b || batch_lacks(b, loc_entry(loc)))
		return true;
	return k->nr_pages &&
	       bsearch(&loc, k->pages, k->nr_pages, sizeof(loc), compare_locs) != NULL;
}

static void add_lost(struct store_loss *l, uint64_t gfn)
{
	uint64_t *last = l->nr_ranges ? l->ranges[l->nr_ranges - 1] : NULL;

	l->nr_pages++;
	if (last && last[0] + last[1] == gfn) {
		last[1]++;
	} else if (l->nr_ranges < LOSS_RANGES_MAX) {
		l->ranges[l->nr_ranges][0] = gfn;
		l->ranges[l->nr_ranges++][1] = 1;
	}
}

static int loss_of(struct check *k, const struct store_snapshot *sn, struct store_loss *l,
		   struct err *e)
{
	_cleanup_free_ void *state = NULL;
	struct pagemap_iter it;
	struct pagemap *m;
	uint64_t gfn;
	size_t len;
	loc_t loc;
	int r;

	l->whole = store_state_load(k->s, sn->point, &state, &len, NULL) != 0;
	r = store_map_load(k->s, sn->point, false, &m, NULL);
	l->whole |= r != 0;
	if (r)
		return r == -ENOMEM ? err_errno(e, ENOMEM, "check") : 0;
	r = pagemap_iter_init(&it, m);
	while (!r && pagemap_iter_next(&it, &gfn, &loc))
		if (loc_kind(loc) == LOC_PAGE && page_is_lost(k, loc))
			add_lost(l, gfn);
	if (!r)
		pagemap_iter_deinit(&it);
	pagemap_destroy(m);
	return r ? err_errno(e, ENOMEM, "check") : 0;
}

/* One that is newer than the list is not in what was walked. */
static bool is_listed(const struct check *k, struct snapd_point at)
{
	return find_point(k->epochs, k->nr_epochs, sizeof(*k->epochs), at) != NULL;
}

static int tell_loss(struct check *k, uint64_t id, const struct rec_snapshot *rec, struct err *e)
{
	struct store_snapshot sn = {.id = id, .point = rec->point, .page_size = FMT_BLOCK};
	struct store_loss l = {.snapshot = id};
	struct err why = {0};
	int r = store_snapshot_get(k->s, id, &sn, &why);

	if (r == -ENOENT)
		return 0;
	memcpy(l.vm_name, sn.vm_name, sizeof(l.vm_name));
	l.page_size = sn.page_size;
	if (r || !is_listed(k, sn.point))
		l.whole = r != 0;
	else
		r = loss_of(k, &sn, &l, e);
	if (r && !l.whole)
		return r;
	if (!l.whole && !l.nr_pages)
		return 0;
	k->ret->losses++;
	if (k->c->loss)
		k->c->loss(k->c->opaque, &l);
	return check_step(k, 0, e);
}

struct snapshot_row {
	uint64_t id;
	struct rec_snapshot rec;
};

static int list_snapshots(struct check *k, struct snapshot_row **ret, size_t *nr, struct err *e)
{
	struct rec_snapshot rec;
	struct ix_iter it;
	struct ix_key key;
	struct ix_txn t;
	size_t cap = 0;
	int r = index_begin(k->s->index, &t, e);

	if (r)
		return r;
	r = index_iter_init(&it, &t, IX_SNAPSHOTS, NULL, e);
	while (!r) {
		r = index_iter_next(&it, &key, &rec, sizeof(rec), NULL);
		if (!r)
			break;
		if (r > 0 && array_grow(*ret, *nr, cap)) {
			r = err_errno(e, ENOMEM, "check");
			break;
		}
		if (r > 0)
			(*ret)[(*nr)++] = (struct snapshot_row){ix_be64(key.b), rec};
		r = 0;
	}
	index_iter_deinit(&it);
	index_end(&t);
	return r;
}

int check_tell_losses(struct check *k, struct err *e)
{
	_cleanup_free_ struct snapshot_row *rows = NULL;
	size_t nr = 0;
	int r = list_snapshots(k, &rows, &nr, e);

	if (k->nr_pages)
		qsort(k->pages, k->nr_pages, sizeof(*k->pages), compare_locs);
	for (size_t i = 0; !r && i < nr; i++)
		r = tell_loss(k, rows[i].id, &rows[i].rec, e);
	return r;
}
