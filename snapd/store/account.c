/* SPDX-License-Identifier: MIT */
/*
 * Who needs which page; see account.h.
 *
 * The epochs are a forest: each is its parent's map with its manifest applied; one
 * whose parent gc took begins a tree with its checkpoint.  A walk over a tree, depth
 * first, keeps the map of the epoch at hand.  Roots (snapshots, heads of running VMs)
 * are numbered as the walk meets them.  An entry of the map that came when `seen` roots
 * had been met and is replaced, or left behind, when more have, was in the maps of just
 * those between: so each entry costs the same however many snapshots hold it.
 *
 *   A1 An entry's stamp is the number of roots met when it came into the map.  Entries
 *      are closed before they change, and opened again with a new stamp when the walk
 *      goes back over a side branch.
 *   A2 The largest branch of a fork is walked last, and not gone back over: what must be
 *      remembered for going back is at most the changes of the smaller ones.
 *   A3 Parents come before their children in the order of (timeline, epoch).
 *
 * Who needs a loc is kept in a table: nobody, one root, or several.  When there are more
 * pages than fit, segments are taken in ranges, each with a walk of its own.
 */
#include "snapd/store/account_internal.h"

#include <string.h>

#include "snapd/store/manifest.h"
#include "snapd/store/walk.h"

static void account_deinit(struct account *a)
{
	free(a->nodes);
	free(a->roots);
	pagemap_destroy(a->map);
	free(a->undo);
	free(a->stack);
	free(a->table.locs);
	free(a->table.owners);
}

void store_account_deinit(struct store_account *a)
{
	free(a->snapshots);
	a->snapshots = NULL;
}

int account_no_memory(struct err *e)
{
	return err_errno(e, ENOMEM, "accounting");
}

static int step(struct account *a, struct err *e)
{
	a->steps++;
	if (a->c->step && a->c->step(a->c->opaque, a->steps, a->total))
		return err_set(e, ECANCELED, "accounting was cancelled");
	return 0;
}

/* ---- the walk ---- */

static uint64_t stamp(const struct account *a)
{
	return a->nr_roots + 1;
}

/* An entry leaves the map: who had it? (A1) */
static int close_entry(struct account *a, uint64_t gfn, loc_t loc)
{
	uint64_t since = pagemap_fp(a->map, gfn) - 1, n = a->nr_roots - since;
	uint32_t segment = loc_segment(loc);

	if (loc_kind(loc) != LOC_PAGE || !n || segment < a->seg_from || segment >= a->seg_end)
		return 0;
	return owner_table_add(&a->table, loc, n > 1 ? SEVERAL : a->roots[since]);
}

static int push_undo(struct account *a, uint64_t gfn, loc_t loc)
{
	if (a->nr_undo == a->cap_undo) {
		size_t cap = a->cap_undo ? a->cap_undo * 2 : 1024;
		struct undo *p = realloc(a->undo, cap * sizeof(*p));

		if (!p)
			return -ENOMEM;
		a->undo = p;
		a->cap_undo = cap;
	}
	a->undo[a->nr_undo++] = (struct undo){gfn, loc};
	return 0;
}

static int set_entry(struct account *a, uint64_t gfn, loc_t loc, bool undo)
{
	loc_t old = pagemap_get(a->map, gfn);
	int r = close_entry(a, gfn, old);

	if (!r && undo)
		r = push_undo(a, gfn, old);
	if (r)
		return r;
	return pagemap_set(a->map, gfn, loc_kind(loc) == LOC_PAGE ? loc : 0, stamp(a));
}

static int set_run(struct account *a, const struct manifest_run *run, bool undo)
{
	bool pages = loc_kind(run->loc) == LOC_PAGE;
	int r = 0;

	for (uint64_t i = 0; !r && i < run->len; i++)
		r = set_entry(a, run->gfn + i, pages ? run->loc + i : 0, undo);
	return r;
}

/* gc took it meanwhile, or merged its manifest with others. */
static bool is_stale(struct account *a, const struct node *n)
{
	struct ix_key k = ix_key_point(n->at);
	const struct rec_blob *now;
	struct rec_epoch rec;
	struct ix_txn t;
	int r;

	if (index_begin(a->s->index, &t, NULL))
		return false;
	r = index_get(&t, IX_EPOCHS, &k, &rec, sizeof(rec), NULL, NULL, NULL);
	index_end(&t);
	now = n->whole ? &rec.checkpoint : &rec.manifest;
	return r == -ENOENT || (!r && memcmp(now, &n->manifest, sizeof(*now)) != 0);
}

static int apply(struct account *a, const struct node *n, bool undo, struct err *e)
{
	_cleanup_free_ void *bytes = NULL;
	struct manifest_reader reader;
	struct manifest_run run;
	struct err why = {0};
	int r;

	if (!n->manifest.bytes)
		return 0;
	r = store_blob_read(a->s, &n->manifest, n->whole ? BATCH_CHECKPOINT : BATCH_MANIFEST,
			    n->whole ? "checkpoint" : "manifest", NULL, &bytes, &why);
	if (r)
		return is_stale(a, n) ? -ESTALE : err_set(e, -r, "%s", why.text);
	manifest_reader_init(&reader, bytes, n->manifest.bytes);
	while ((r = manifest_next(&reader, &run, e)) > 0) {
		r = set_run(a, &run, undo);
		if (r)
			return err_errno(e, -r, "accounting");
	}
	return r;
}

static int enter(struct account *a, uint32_t node, bool undo, struct err *e)
{
	struct node *n = &a->nodes[node];
	struct frame f = {
		.node = node, .next_child = n->child, .undo_mark = a->nr_undo, .undo = undo};
	int r;

	if (a->nr_stack == a->cap_stack) {
		size_t cap = a->cap_stack ? a->cap_stack * 2 : 256;
		struct frame *p = realloc(a->stack, cap * sizeof(*p));

		if (!p)
			return account_no_memory(e);
		a->stack = p;
		a->cap_stack = cap;
	}
	r = apply(a, n, undo, e);
	if (r)
		return r;
	if (n->snapshot != NOBODY)
		a->roots[a->nr_roots++] = n->snapshot;
	if (n->head)
		a->roots[a->nr_roots++] = (uint32_t)a->ret->nr_snapshots;
	a->stack[a->nr_stack++] = f;
	return step(a, e);
}

/* Back to what the map was before this node, newest change first. */
static int leave(struct account *a, struct err *e)
{
	struct frame f = a->stack[--a->nr_stack];
	int r = 0;

	while (!r && f.undo && a->nr_undo > f.undo_mark) {
		struct undo u = a->undo[--a->nr_undo];

		r = close_entry(a, u.gfn, pagemap_get(a->map, u.gfn));
		if (!r)
			r = pagemap_set(a->map, u.gfn, u.loc, stamp(a));
	}
	return r ? err_errno(e, -r, "accounting") : 0;
}

static int close_all(struct account *a, struct err *e)
{
	struct pagemap_iter it;
	uint64_t gfn;
	loc_t loc;
	int r = pagemap_iter_init(&it, a->map);

	if (r)
		return account_no_memory(e);
	while (!r && pagemap_iter_next(&it, &gfn, &loc))
		r = close_entry(a, gfn, loc);
	pagemap_iter_deinit(&it);
	return r ? err_errno(e, -r, "accounting") : 0;
}

static int walk_tree(struct account *a, uint32_t first, struct err *e)
{
	int r;

	pagemap_destroy(a->map);
	a->map = NULL;
	if (pagemap_create(true, &a->map))
		return account_no_memory(e);
	a->nr_undo = 0;
	r = enter(a, first, false, e);
	while (!r && a->nr_stack) {
		struct frame *f = &a->stack[a->nr_stack - 1];
		uint32_t child = f->next_child;

		if (child == NO_NODE) {
			r = leave(a, e);
			continue;
		}
		f->next_child = a->nodes[child].sibling;
		r = enter(a, child, f->undo || f->next_child != NO_NODE, e);
	}
	return r ? r : close_all(a, e);
}

static int walk_forest(struct account *a, struct err *e)
{
	int r = 0;

	a->nr_roots = 0;
	for (uint32_t i = 0; !r && i < a->nr_nodes; i++)
		if (a->nodes[i].first)
			r = walk_tree(a, i, e);
	return r;
}

/* ---- the pages themselves ---- */

static void count_page(struct account *a, uint32_t owner, uint64_t bytes)
{
	struct store_account *ret = a->ret;

	if (owner == NOBODY) {
		ret->bytes_dead += bytes;
		ret->pages_dead++;
	} else if (owner == SEVERAL) {
		ret->bytes_shared += bytes;
		ret->pages_shared++;
	} else if (owner == ret->nr_snapshots) {
		ret->bytes_live += bytes;
		ret->pages_live++;
	} else {
		ret->bytes_unique += bytes;
		ret->pages_unique++;
		ret->snapshots[owner].bytes_unique += bytes;
		ret->snapshots[owner].pages_unique++;
	}
}

static int count_batches(struct account *a, struct seg_walk *w, struct err *e)
{
	const struct batch_header *h;
	const struct batch_page *p;
	uint32_t at;
	int r;

	while ((r = seg_walk_next(w, &at, &h, &p, e)) > 0) {
		a->ret->bytes_headers += h->header_bytes + (p ? 0 : h->payload_bytes);
		for (uint32_t i = 0; p && i < h->nr_entries; i++)
			if (!page_is_gone(&p[i]))
				count_page(a,
					   owner_table_get(&a->table,
							   loc_make(h->segment, h->block, i)),
					   p[i].len_codec >> 8);
	}
	return r;
}

static int count_segment(struct account *a, uint32_t id, uint32_t tail, struct err *e)
{
	_cleanup_(seg_walk_deinit) struct seg_walk w = {.buf = NULL};
	struct seg_ident ident;
	struct seg *seg;
	int fd, r;

	r = seg_open(a->s, id, &seg, &fd, &ident, e);
	if (r)
		return r;
	r = seg_walk_init(&w, fd, &ident, tail) ? account_no_memory(e) : count_batches(a, &w, e);
	seg_close(a->s, seg);
	return r;
}

struct seg_size {
	uint32_t tail;
	uint64_t pages;
};

/* As they are now: batches of later epochs are not counted. */
static int list_segments(struct account *a, struct seg_size **ret, uint32_t *nr, struct err *e)
{
	scoped_lock(&a->s->segments_lock);

	*nr = a->s->nr_segs;
	*ret = calloc(*nr + 1u, sizeof(**ret));
	if (!*ret)
		return account_no_memory(e);
	for (uint32_t i = 0; i < *nr; i++) {
		const struct seg *seg = a->s->segs[i];

		if (seg && seg->state != SEG_FREE && seg->indexed)
			(*ret)[i] = (struct seg_size){seg->tail, seg->pages};
	}
	return 0;
}

/* Segments from seg_from on, as many as have pages_at_once. */
static int account_range(struct account *a, const struct seg_size *segs, uint32_t nr, struct err *e)
{
	uint64_t max = a->c->pages_at_once ? a->c->pages_at_once : ACCOUNT_PAGES, pages = 0;
	int r;

	a->seg_end = a->seg_from;
	while (a->seg_end < nr && (!pages || pages + segs[a->seg_end].pages <= max))
		pages += segs[a->seg_end++].pages;
	free(a->table.locs);
	free(a->table.owners);
	if (owner_table_init(&a->table, pages))
		return account_no_memory(e);
	r = walk_forest(a, e);
	for (uint32_t i = a->seg_from; !r && i < a->seg_end; i++)
		if (segs[i].tail > 1)
			r = count_segment(a, i, segs[i].tail, e);
	a->seg_from = a->seg_end;
	return r;
}

static int account_once(struct store *s, const struct account_config *c, struct store_account *ret,
			struct err *e)
{
	_cleanup_(account_deinit) struct account a = {.s = s, .c = c, .ret = ret};
	_cleanup_free_ struct seg_size *segs = NULL;
	uint32_t nr = 0;
	int r;

	*ret = (struct store_account){0};
	/* Segments first: what is committed after the forest was read counts as nobody's
	 * only if it lies in front of a tail that was read before. */
	r = list_segments(&a, &segs, &nr, e);
	if (!r)
		r = account_load_forest(&a, e);
	a.total = a.nr_nodes;
	while (!r && a.seg_from < nr)
		r = account_range(&a, segs, nr, e);
	if (r)
		store_account_deinit(ret);
	return r;
}

int store_account(struct store *s, const struct account_config *c, struct store_account *ret,
		  struct err *e)
{
	int r = -ESTALE;

	for (uint32_t i = 0; r == -ESTALE && i < MERGES_MAX; i++)
		r = account_once(s, c, ret, e);
	return r == -ESTALE ? err_set(e, EBUSY, "accounting: space is being reclaimed all the time")
			    : r;
}
