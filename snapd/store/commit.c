/* SPDX-License-Identifier: MIT */
/*
 * The commit of an epoch: changes → manifest; now and then the whole map → a
 * checkpoint; the state; a copy of the index records; fdatasync; one LMDB
 * transaction (S1 to S3 of store.h).  Only then are the live map and the segments'
 * tails brought up to date, and with the tails the new pages can be duplicates of
 * others'.  That can't fail: what it takes was reserved before.
 *
 * A checkpoint is written when the pages in the manifests since the last one
 * reach half a map, or their number CHAIN_EPOCHS_MIN and one per 16 Ki pages of
 * the map: so loading a map costs O(map), and writing checkpoints costs a bounded
 * share of what is written, at any depth (I9).
 *
 * Threads: the epoch's.
 */
#include "snapd/store/internal.h"

#include <string.h>

#include "snapd/store/manifest.h"
#include "snapd/store/reclog.h"
#include "snapd/util/log.h"

#define CHAIN_EPOCHS_MIN 64u
#define CHAIN_EPOCHS_MAX 1024u

struct commit {
	struct epoch *ep;
	const struct snapshot_meta *meta; /* NULL: no snapshot */
	struct pagemap *map;		  /* owned: the whole map afterwards, when one is needed */
	struct rec_epoch rec;
	struct rec_snapshot snapshot;
	uint64_t snapshot_id;
};

static void commit_deinit(struct commit *c)
{
	pagemap_destroy(c->map);
}

/* ---- the manifest ---- */

static int compare_gone(const void *a, const void *b)
{
	const struct gone_range *x = a, *y = b;

	return x->gfn < y->gfn ? -1 : x->gfn > y->gfn;
}

/* Ascending, disjoint. */
static void normalize_gone(struct epoch *ep)
{
	size_t nr = 0;

	if (ep->nr_gone < 2)
		return;
	qsort(ep->gone, ep->nr_gone, sizeof(*ep->gone), compare_gone);
	for (size_t i = 1; i < ep->nr_gone; i++) {
		if (ep->gone[i].gfn <= ep->gone[nr].end)
			ep->gone[nr].end = MAX(ep->gone[nr].end, ep->gone[i].end);
		else
			ep->gone[++nr] = ep->gone[i];
	}
	ep->nr_gone = nr + 1;
}

/* Gone frames below `limit` that were not written yet; `at` is the first frame of
 * range *i that still counts. */
static void write_gone(const struct epoch *ep, struct manifest_writer *w, size_t *i, uint64_t *at,
		       uint64_t limit)
{
	while (*i < ep->nr_gone && ep->gone[*i].gfn < limit) {
		uint64_t from = MAX(ep->gone[*i].gfn, *at), to = MIN(ep->gone[*i].end, limit);

		if (from < to)
			manifest_add_run(w, from, to - from, MANIFEST_GONE);
		*at = to;
		if (ep->gone[*i].end > limit)
			return;
		(*i)++;
	}
}

static void write_changes(const struct epoch *ep, struct manifest_writer *w)
{
	const struct changes *c = &ep->scratch->changes;
	size_t gone = 0;
	uint64_t at = 0;

	for (size_t i = 0; i < c->nr; i++) {
		write_gone(ep, w, &gone, &at, c->v[i].gfn);
		manifest_add(w, c->v[i].gfn, c->v[i].loc);
		at = c->v[i].gfn + 1;
	}
	write_gone(ep, w, &gone, &at, MANIFEST_GFN_MAX);
}

/* The live map with the changes in it, nothing gone. */
static int write_merged(const struct epoch *ep, struct manifest_writer *w)
{
	const struct changes *c = &ep->scratch->changes;
	struct pagemap_iter it;
	uint64_t gfn;
	size_t i = 0;
	loc_t loc;
	int r;

	r = pagemap_iter_init(&it, ep->live);
	if (r)
		return r;
	while (pagemap_iter_next(&it, &gfn, &loc)) {
		for (; i < c->nr && c->v[i].gfn < gfn; i++)
			manifest_add(w, c->v[i].gfn, c->v[i].loc);
		if (i < c->nr && c->v[i].gfn == gfn)
			loc = c->v[i++].loc;
		manifest_add(w, gfn, loc);
	}
	for (; i < c->nr; i++)
		manifest_add(w, c->v[i].gfn, c->v[i].loc);
	pagemap_iter_deinit(&it);
	return 0;
}

static int write_map(const struct pagemap *m, struct manifest_writer *w)
{
	struct pagemap_iter it;
	uint64_t gfn;
	loc_t loc;
	int r;

	r = pagemap_iter_init(&it, m);
	if (r)
		return r;
	while (pagemap_iter_next(&it, &gfn, &loc))
		manifest_add(w, gfn, loc);
	pagemap_iter_deinit(&it);
	return 0;
}

static int write_checkpoint(const struct commit *c, struct manifest_writer *w)
{
	return c->map ? write_map(c->map, w) : write_merged(c->ep, w);
}

/* The changes of the epoch, or the whole map after it, as a blob. */
static int append_manifest(struct commit *c, enum batch_type type, struct rec_blob *ret,
			   struct err *e)
{
	struct manifest_writer *w = &c->ep->scratch->manifest;
	const uint8_t *bytes;
	size_t len;
	int r;

	r = manifest_writer_init(w);
	if (!r && type == BATCH_CHECKPOINT)
		r = write_checkpoint(c, w);
	else if (!r)
		write_changes(c->ep, w);
	if (!r)
		r = manifest_finish(w, &bytes, &len);
	if (r)
		return err_errno(e, -r, "encoding a manifest");
	return append_blob(&c->ep->append, type, bytes, len, ret, e);
}

/* ---- the live map ---- */

/* So that apply_changes() can't fail. */
static int reserve_changes(const struct epoch *ep, struct pagemap *m)
{
	const struct changes *c = &ep->scratch->changes;
	int r = 0;

	for (size_t i = 0; !r && i < c->nr; i++)
		if (!i ||
		    c->v[i].gfn / PAGEMAP_CHUNK_FRAMES != c->v[i - 1].gfn / PAGEMAP_CHUNK_FRAMES)
			r = pagemap_reserve(m, c->v[i].gfn);
	return r;
}

static void apply_changes(const struct epoch *ep, struct pagemap *m)
{
	const struct changes *c = &ep->scratch->changes;

	for (size_t i = 0; i < ep->nr_gone; i++)
		pagemap_set_run(m, ep->gone[i].gfn, ep->gone[i].end - ep->gone[i].gfn, 0);
	for (size_t i = 0; i < c->nr; i++)
		if (pagemap_set(m, c->v[i].gfn, c->v[i].loc, pagemap_fp_of(c->v[i].fp)))
			assert(!"room was reserved");
}

/* Frames and pages of the map afterwards, c->map if it was made. */
static void count_pages(struct commit *c, uint64_t *frames, uint64_t *pages)
{
	const struct pagemap *m = c->map ? c->map : c->ep->live;
	const struct changes *ch = &c->ep->scratch->changes;

	*frames = pagemap_nr(m);
	*pages = pagemap_nr_pages(m);
	for (size_t i = 0; !c->map && i < ch->nr; i++) {
		enum loc_kind was = loc_kind(pagemap_get(m, ch->v[i].gfn));

		*frames += was == LOC_NONE;
		*pages += loc_kind(ch->v[i].loc) == LOC_PAGE;
		*pages -= was == LOC_PAGE;
	}
}

/* ---- what is written before the transaction (S1) ---- */

static bool wants_checkpoint(const struct rec_epoch *rec, uint64_t map_frames)
{
	uint64_t max = MIN(map_frames / 16384, (uint64_t)CHAIN_EPOCHS_MAX);

	max = MAX(max, (uint64_t)CHAIN_EPOCHS_MIN);
	return rec->chain_pages * 2 >= map_frames || rec->chain_epochs >= max;
}

static int append_maps(struct commit *c, struct err *e)
{
	struct epoch *ep = c->ep;
	const struct rec_epoch *parent = &ep->parent_rec;
	struct rec_epoch *rec = &c->rec;
	bool first = !ep->parent.timeline;
	uint64_t frames;
	int r;

	r = append_manifest(c, BATCH_MANIFEST, &rec->manifest, e);
	if (r)
		return r;
	rec->nr_changed = ep->scratch->changes.nr;
	rec->chain_epochs = first ? 0 : parent->chain_epochs + 1;
	rec->chain_pages = first ? 0 : parent->chain_pages + rec->nr_changed;
	rec->chain_bytes = first ? 0 : parent->chain_bytes + rec->manifest.bytes;
	/* Counting frames that went would be as much work. */
	if (ep->nr_gone) {
		if (pagemap_clone(ep->live, &c->map) || reserve_changes(ep, c->map))
			return err_errno(e, ENOMEM, "building a map");
		apply_changes(ep, c->map);
	}
	count_pages(c, &frames, &rec->map_pages);
	if (first || !frames || !wants_checkpoint(rec, pagemap_nr(ep->live)))
		return 0;
	rec->chain_epochs = 0;
	rec->chain_pages = rec->chain_bytes = 0;
	return append_manifest(c, BATCH_CHECKPOINT, &rec->checkpoint, e);
}

/* ---- the index records ---- */

static void fill_stats(const struct epoch *ep, struct rec_epoch *rec)
{
	rec->pages_in = ep->stats.pages_in;
	rec->zero = ep->stats.zero;
	rec->unchanged = ep->stats.unchanged;
	rec->duplicate = ep->stats.duplicate;
	rec->stored = ep->stats.stored;
	rec->collisions = ep->stats.collisions;
	rec->read_back = ep->stats.read_back;
	rec->bytes_written = ep->append.bytes_written;
}

static void fill_snapshot(struct commit *c)
{
	struct rec_snapshot *sn = &c->snapshot;
	const struct snapshot_meta *m = c->meta;

	*sn = (struct rec_snapshot){.point = c->ep->point,
				    .taken_ns = m->taken_ns ? m->taken_ns : store_now_ns(),
				    .pause_ns = m->pause_ns};
	memcpy(sn->vm, c->ep->vm, sizeof(sn->vm));
	rec_string(sn->name, m->name ? m->name : "");
	rec_string(sn->note, m->note ? m->note : "");
	rec_string(sn->tags, m->tags ? m->tags : "");
	sn->head.flags = (m->pinned ? REC_SNAPSHOT_PINNED : 0) |
			 (m->post_mortem ? REC_SNAPSHOT_POSTMORTEM : 0);
}

static int log_record(const struct index *ix, struct reclog *l, enum index_db db,
		      const struct ix_key *k, void *rec, size_t rec_size, const void *tail,
		      size_t tail_len)
{
	index_seal(ix, db, k, rec, rec_size, tail, tail_len);
	return reclog_add(l, db, k->b, k->len, rec, rec_size, tail, tail_len);
}

/* The VM and the timeline, as the commit will leave them. */
static int log_context(struct commit *c, struct reclog *l, struct err *e)
{
	struct epoch *ep = c->ep;
	struct ix_key vk = ix_key_id(ep->vm), tk = ix_key_u64(ep->point.timeline);
	struct rec_timeline tl;
	struct rec_vm vm;
	const void *tail;
	size_t tail_len;
	struct ix_txn t;
	int r;

	r = index_begin(ep->s->index, &t, e);
	if (r)
		return r;
	r = journal_begin(ep->s, &t, false, l, e);
	if (!r)
		r = index_get(&t, IX_VMS, &vk, &vm, sizeof(vm), &tail, &tail_len, e);
	if (!r)
		r = log_record(ep->s->index, l, IX_VMS, &vk, &vm, sizeof(vm), tail, tail_len);
	if (!r)
		r = index_get(&t, IX_TIMELINES, &tk, &tl, sizeof(tl), NULL, NULL, e);
	if (!r && tl.last + 1 != ep->point.epoch)
		r = -EBUSY; /* its batch would be taken for the later one's */
	if (!r) {
		tl.last = ep->point.epoch;
		r = log_record(ep->s->index, l, IX_TIMELINES, &tk, &tl, sizeof(tl), NULL, 0);
	}
	index_end(&t);
	return r ? err_errno(e, -r, "reading the epoch's VM and timeline") : 0;
}

static int log_records(struct commit *c, struct reclog *l, struct err *e)
{
	struct epoch *ep = c->ep;
	struct ix_key ek = ix_key_point(ep->point), nk = ix_key_u64(c->snapshot_id);
	int r = log_context(c, l, e);

	if (r)
		return r;
	if (log_record(ep->s->index, l, IX_EPOCHS, &ek, &c->rec, sizeof(c->rec), NULL, 0) ||
	    (c->meta && log_record(ep->s->index, l, IX_SNAPSHOTS, &nk, &c->snapshot,
				   sizeof(c->snapshot), NULL, 0)))
		return err_errno(e, ENOMEM, "epoch");
	return 0;
}

/* So that the index can be made again from the segments alone. */
static int append_record(struct commit *c, struct err *e)
{
	struct reclog log = {0};
	struct rec_blob blob = {0};
	int r;

	r = log_records(c, &log, e);
	if (!r)
		r = append_blob(&c->ep->append, BATCH_EPOCH, log.bytes, log.len, &blob, e);
	c->rec.record = blob.last;
	reclog_deinit(&log);
	return r;
}

/* ---- the transaction (S3) ---- */

static int advance_timeline(struct ix_txn *t, const struct epoch *ep, struct err *e)
{
	struct ix_key k = ix_key_u64(ep->point.timeline);
	struct rec_timeline tl;
	int r;

	r = index_get(t, IX_TIMELINES, &k, &tl, sizeof(tl), NULL, NULL, e);
	if (r == -ENOENT || (!r && tl.last + 1 != ep->point.epoch))
		return err_set(e, EBUSY, "timeline %llu went on without this epoch",
			       (unsigned long long)ep->point.timeline);
	if (r)
		return r;
	tl.last = ep->point.epoch;
	return index_put(t, IX_TIMELINES, &k, &tl, sizeof(tl), NULL, 0, e);
}

static int name_snapshot(struct ix_txn *t, const struct commit *c, struct err *e)
{
	struct ix_key k = ix_key_name(c->ep->vm, sizeof(c->ep->vm), c->snapshot.name);
	struct rec_snapname name = {.snapshot = c->snapshot_id};
	struct rec_snapname other;
	int r;

	if (!c->snapshot.name[0])
		return 0;
	r = index_get(t, IX_SNAPNAMES, &k, &other, sizeof(other), NULL, NULL, e);
	if (!r)
		return err_set(e, EEXIST, "snapshot %llu of this VM has the name \"%s\"",
			       (unsigned long long)other.snapshot, c->snapshot.name);
	if (r != -ENOENT)
		return r;
	return index_put(t, IX_SNAPNAMES, &k, &name, sizeof(name), NULL, 0, e);
}

int commit_put_counters(struct ix_txn *t, const struct store *s, struct err *e)
{
	struct ix_key k = {.b = "counters", .len = 8};
	struct rec_counters rec;
	int r;

	r = index_get(t, IX_META, &k, &rec, sizeof(rec), NULL, NULL, e);
	if (r)
		return r;
	rec.next_seq = atomic_load(&s->next_seq);
	rec.next_snapshot = atomic_load(&s->next_snapshot);
	return index_put(t, IX_META, &k, &rec, sizeof(rec), NULL, 0, e);
}

static enum seg_state state_after(const struct append_seg *x)
{
	return x->ident.segment_bytes / FMT_BLOCK < x->tail + SEG_TAIL_MIN_BLOCKS ? SEG_SEALED
										  : SEG_OPEN;
}

/* The epoch is the only one to change its segments: no lock. */
int commit_put_tails(struct ix_txn *t, const struct appender *a, struct err *e)
{
	for (size_t i = 0; i < a->nr_segs; i++) {
		const struct append_seg *x = &a->segs[i];
		struct ix_key k = ix_key_u32(x->ident.segment);
		struct rec_segment rec = {.generation = x->ident.generation,
					  .segment_bytes = x->ident.segment_bytes,
					  .tail = x->tail,
					  .state = state_after(x),
					  .pages = x->seg->pages + x->pages};
		int r = index_put(t, IX_SEGMENTS, &k, &rec, sizeof(rec), NULL, 0, e);

		if (r)
			return r;
	}
	return 0;
}

static int commit_txn(struct ix_txn *t, void *arg, struct err *e)
{
	struct commit *c = arg;
	struct epoch *ep = c->ep;
	struct ix_key ek = ix_key_point(ep->point), sk = ix_key_u64(c->snapshot_id);
	int r;

	r = advance_timeline(t, ep, e);
	if (!r)
		r = index_put(t, IX_EPOCHS, &ek, &c->rec, sizeof(c->rec), NULL, 0, e);
	if (!r && c->meta)
		r = name_snapshot(t, c, e);
	if (!r && c->meta)
		r = index_put(t, IX_SNAPSHOTS, &sk, &c->snapshot, sizeof(c->snapshot), NULL, 0, e);
	if (!r)
		r = commit_put_tails(t, &ep->append, e);
	return r ? r : commit_put_counters(t, ep->s, e);
}

/* ---- afterwards ---- */

void commit_publish_tails(struct appender *a)
{
	scoped_lock(&a->s->segments_lock);

	a->record = (struct batch_ref){0};
	for (size_t i = 0; i < a->nr_segs; i++) {
		struct append_seg *x = &a->segs[i];

		x->seg->tail = x->tail;
		x->seg->state = state_after(x);
		x->seg->pages += x->pages;
		x->seg->indexed = true;
		x->seg->commit = ++a->s->commits;
		x->start = x->tail;
		x->pages = 0;
	}
}

/* While gc runs, it must learn what this epoch refers to; it stays in flight (its
 * refs count) until epoch_abort() takes it off the list. */
static void publish_refs(struct epoch *ep)
{
	scoped_lock(&ep->s->roots_lock);

	if (!ep->s->gc_active)
		return;
	pthread_mutex_lock(&ep->s->segments_lock);
	if (seg_refs_merge(&ep->s->gc_refs, &ep->refs))
		ep->s->gc_spoiled = true;
	pthread_mutex_unlock(&ep->s->segments_lock);
	if (gc_note_root(ep->s, ep->point))
		ep->s->gc_spoiled = true;
}

static void publish(struct epoch *ep)
{
	commit_publish_tails(&ep->append);
	publish_refs(ep);
	apply_changes(ep, ep->live);
}

/* ---- epoch_commit ---- */

/* Early, before anything is written; the transaction looks again. */
static int check_name_free(const struct epoch *ep, const struct snapshot_meta *m, struct err *e)
{
	struct rec_snapname rec;
	struct ix_txn t;
	struct ix_key k;
	int r;

	if (!m || !m->name)
		return 0;
	k = ix_key_name(ep->vm, sizeof(ep->vm), m->name);
	r = index_begin(ep->s->index, &t, e);
	if (r)
		return r;
	r = index_get(&t, IX_SNAPNAMES, &k, &rec, sizeof(rec), NULL, NULL, e);
	index_end(&t);
	if (!r)
		return err_set(e, EEXIST, "snapshot %llu of this VM has the name \"%s\"",
			       (unsigned long long)rec.snapshot, m->name);
	return r == -ENOENT ? 0 : r;
}

static int prepare(struct commit *c, const void *state, size_t state_len, struct err *e)
{
	struct epoch *ep = c->ep;
	int r;

	r = epoch_settle(ep, e);
	if (!r && changes_sort(&ep->scratch->changes))
		r = err_errno(e, ENOMEM, "epoch");
	if (r)
		return r;
	normalize_gone(ep);
	c->rec = (struct rec_epoch){.parent = ep->parent,
				    .ancestor = ep->parent,
				    .page_size = ep->page_size,
				    .created_ns = store_now_ns()};
	memcpy(c->rec.vm, ep->vm, sizeof(c->rec.vm));
	if (c->meta) {
		c->snapshot_id = atomic_fetch_add(&ep->s->next_snapshot, 1);
		c->rec.snapshot = c->snapshot_id;
		fill_snapshot(c);
	}
	/* Once the epoch is durable, nothing may fail any more. */
	r = reserve_changes(ep, ep->live);
	if (r)
		return err_errno(e, -r, "growing the map of the VM");
	r = append_maps(c, e);
	if (!r)
		r = append_blob(&ep->append, BATCH_STATE, state, state_len, &c->rec.state, e);
	if (r)
		return r;
	fill_stats(ep, &c->rec);
	r = append_record(c, e);
	return r ? r : append_sync(&ep->append, e);
}

int epoch_commit(struct epoch *ep, const void *state, size_t state_len,
		 const struct snapshot_meta *meta, struct snapd_point *ret_point,
		 uint64_t *ret_snapshot, struct epoch_stats *ret_stats, struct err *e)
{
	_cleanup_(commit_deinit) struct commit c = {.ep = ep, .meta = meta};
	int r;

	if (ep->failed)
		return err_set(e, -ep->failed, "this epoch has failed before");
	r = meta ? snapshot_check_texts(meta->name, meta->note, meta->tags, e) : 0;
	if (!r)
		r = check_name_free(ep, meta, e);
	if (r)
		return r;
	r = prepare(&c, state, state_len, e);
	if (!r)
		r = index_update(ep->s->index, commit_txn, &c, e);
	if (r) {
		ep->failed = r;
		if (index_in_doubt(ep->s->index))
			append_abandon(&ep->append);
		return r;
	}
	publish(ep);
	ep->stats.bytes_written = ep->append.bytes_written;
	*ret_point = ep->point;
	if (ret_snapshot)
		*ret_snapshot = c.snapshot_id;
	if (ret_stats)
		*ret_stats = ep->stats;
	epoch_finish(ep);
	return 0;
}
