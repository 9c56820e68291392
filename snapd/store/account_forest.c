/* SPDX-License-Identifier: MIT */
/* Index records → the forest of epochs, with who is a root in it (A2, A3 of account.c).
 * One thread. */
#include "snapd/store/account_internal.h"

#include "snapd/store/point.h"

static struct node *find_node(struct account *a, struct snapd_point at)
{
	return find_point(a->nodes, a->nr_nodes, sizeof(*a->nodes), at);
}

/* In the order of the index: the parent is there already, if it is at all (A3). */
static int add_node(struct account *a, struct snapd_point at, const struct rec_epoch *rec,
		    struct err *e)
{
	struct node n = {.at = at,
			 .manifest = rec->manifest,
			 .child = NO_NODE,
			 .sibling = NO_NODE,
			 .nr_below = 1,
			 .snapshot = NOBODY};

	if (a->nr_nodes == a->cap_nodes) {
		uint32_t cap = a->cap_nodes ? a->cap_nodes * 2 : 256;
		struct node *p = realloc(a->nodes, cap * sizeof(*p));

		if (!p)
			return account_no_memory(e);
		a->nodes = p;
		a->cap_nodes = cap;
	}
	n.first = !rec->parent.timeline || !find_node(a, rec->parent);
	if (n.first && rec->chain_epochs)
		return err_set(e, E_CORRUPT, "epoch %llu of timeline %llu: its parent is missing",
			       (unsigned long long)at.epoch, (unsigned long long)at.timeline);
	if (n.first && rec->checkpoint.bytes) {
		n.manifest = rec->checkpoint;
		n.whole = true;
	}
	a->nodes[a->nr_nodes++] = n;
	return 0;
}

static int list_epochs(struct account *a, struct ix_txn *t, struct snapd_point **parents,
		       struct err *e)
{
	struct rec_epoch rec;
	struct ix_iter it;
	struct ix_key k;
	uint64_t all, i = 0;
	int r = index_count(t, IX_EPOCHS, &all, e);

	if (r)
		return r;
	*parents = calloc(all + 1, sizeof(**parents));
	if (!*parents)
		return account_no_memory(e);
	r = index_iter_init(&it, t, IX_EPOCHS, NULL, e);
	while (!r && i < all && (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0) {
		(*parents)[i++] = rec.parent;
		r = add_node(a, (struct snapd_point){ix_be64(k.b), ix_be64(k.b + 8)}, &rec, e);
	}
	index_iter_deinit(&it);
	return r < 0 ? r : 0;
}

/* Children under their parents, the largest last (A2). */
static void link_nodes(struct account *a, const struct snapd_point *parents)
{
	for (uint32_t i = a->nr_nodes; i--;) {
		struct node *n = &a->nodes[i], *p = n->first ? NULL : find_node(a, parents[i]);
		uint32_t *at;

		if (!p)
			continue;
		p->nr_below += n->nr_below;
		for (at = &p->child; *at != NO_NODE && a->nodes[*at].nr_below < n->nr_below;)
			at = &a->nodes[*at].sibling;
		n->sibling = *at;
		*at = i;
	}
}

static int list_snapshots(struct account *a, struct ix_txn *t, struct err *e)
{
	struct store_account *ret = a->ret;
	struct rec_snapshot rec;
	struct rec_epoch epoch;
	struct ix_iter it;
	struct ix_key k;
	uint64_t all;
	int r = index_count(t, IX_SNAPSHOTS, &all, e);

	if (r)
		return r;
	ret->snapshots = calloc(all + 1, sizeof(*ret->snapshots));
	a->roots = calloc(all + a->nr_nodes + 1, sizeof(*a->roots));
	if (!ret->snapshots || !a->roots)
		return account_no_memory(e);
	r = index_iter_init(&it, t, IX_SNAPSHOTS, NULL, e);
	while (!r && ret->nr_snapshots < all &&
	       (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0) {
		struct node *n = find_node(a, rec.point);
		struct ix_key ek = ix_key_point(rec.point);

		r = index_get(t, IX_EPOCHS, &ek, &epoch, sizeof(epoch), NULL, NULL, e);
		if (r || !n) {
			r = err_set(e, E_CORRUPT, "snapshot %llu: its epoch is missing",
				    (unsigned long long)ix_be64(k.b));
			break;
		}
		n->snapshot = (uint32_t)ret->nr_snapshots;
		ret->snapshots[ret->nr_snapshots++] = (struct account_snapshot){
			.id = ix_be64(k.b), .bytes_logical = epoch.map_pages * epoch.page_size};
	}
	index_iter_deinit(&it);
	return r < 0 ? r : 0;
}

static int list_heads(struct account *a, struct ix_txn *t, const uint64_t *live, size_t nr,
		      struct err *e)
{
	for (size_t i = 0; i < nr; i++) {
		struct ix_key k = ix_key_u64(live[i]);
		struct rec_timeline tl;
		struct snapd_point at;
		struct node *n;
		int r = index_get(t, IX_TIMELINES, &k, &tl, sizeof(tl), NULL, NULL, e);

		if (r && r != -ENOENT)
			return r;
		if (r)
			continue;
		at = tl.last ? (struct snapd_point){live[i], tl.last} : tl.parent;
		n = find_node(a, at);
		if (n)
			n->head = true;
	}
	return 0;
}

int account_load_forest(struct account *a, struct err *e)
{
	_cleanup_free_ struct snapd_point *parents = NULL;
	_cleanup_free_ uint64_t *live = NULL;
	size_t nr_live = 0;
	struct ix_txn t;
	int r = a->c->live ? a->c->live(a->c->live_opaque, &live, &nr_live) : 0;

	if (r)
		return err_errno(e, -r, "listing the timelines in use");
	r = index_begin(a->s->index, &t, e);
	if (r)
		return r;
	r = list_epochs(a, &t, &parents, e);
	if (!r)
		r = list_snapshots(a, &t, e);
	if (!r)
		r = list_heads(a, &t, live, nr_live, e);
	index_end(&t);
	if (!r)
		link_nodes(a, parents);
	return r;
}
