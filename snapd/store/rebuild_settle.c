/* SPDX-License-Identifier: MIT */
/*
 * Records in the new index → those of epochs that are whole stay (R2 of rebuild.c), what
 * follows from them is set right, what is lost is told, and segments end behind their last
 * batch that is used.
 */
#include "snapd/store/rebuild_internal.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "snapd/store/manifest.h"
#include "snapd/store/point.h"

/* ---- which epochs are whole ---- */

static int gone_cmp(const void *key, const void *elem)
{
	const struct manifest_run *run = key;
	const struct gone *x = elem;

	return run->loc + run->len <= x->from ? -1 : run->loc >= x->from + x->len;
}

static struct found *find_pages(const struct rebuild *b, const struct manifest_run *run)
{
	struct batch_ref at = {loc_segment(run->loc), loc_block(run->loc)};
	struct found *x = rebuild_find(b, at);

	if (!x || loc_entry(run->loc) + run->len > x->nr_entries)
		return NULL;
	return b->nr_gone && bsearch(run, b->gone, b->nr_gone, sizeof(*b->gone), gone_cmp) ? NULL
											   : x;
}

/* A manifest or checkpoint: can it be read, and (R2) is all there that it names, older than
 * the record; use: everything of it is used.  -ENOMEM says nothing of it. */
static int map_is_whole(struct rebuild *b, const struct rec_blob *blob, enum batch_type type,
			uint64_t before, bool use)
{
	_cleanup_free_ void *bytes = NULL;
	struct manifest_reader reader;
	struct manifest_run run;
	int r;

	if (!blob->bytes)
		return 1;
	r = store_blob_read(b->s, blob, type, "map", NULL, &bytes, NULL);
	if (r)
		return r == -ENOMEM ? r : 0;
	manifest_reader_init(&reader, bytes, blob->bytes);
	while ((r = manifest_next(&reader, &run, NULL)) > 0) {
		struct found *x = loc_kind(run.loc) == LOC_PAGE ? find_pages(b, &run) : NULL;

		if (x && use)
			x->used = true;
		if (loc_kind(run.loc) == LOC_PAGE && !b->ret->journalled &&
		    (!x || x->seq >= before))
			return 0;
	}
	return !r;
}

static int state_is_whole(struct rebuild *b, const struct rec_blob *blob)
{
	_cleanup_free_ void *bytes = NULL;
	int r = blob->bytes ? store_blob_read(b->s, blob, BATCH_STATE, "state", NULL, &bytes, NULL)
			    : 0;

	return r == -ENOMEM ? r : !r;
}

static struct epoch_at *find_epoch(const struct rebuild *b, struct snapd_point at)
{
	return find_point(b->epochs, b->nr_epochs, sizeof(*b->epochs), at);
}

static int epoch_is_whole(struct rebuild *b, const struct rec_epoch *rec, bool use)
{
	const struct found *record = rebuild_find(b, rec->record);
	uint64_t before = record ? record->seq : UINT64_MAX;

	int r = map_is_whole(b, &rec->manifest, BATCH_MANIFEST, before, use);

	if (r > 0)
		r = map_is_whole(b, &rec->checkpoint, BATCH_CHECKPOINT, before, use);
	return r > 0 && !use ? state_is_whole(b, &rec->state) : r;
}

/* Parents come before: a fork has a higher number than what it forks from. */
static int look_at_epoch(struct rebuild *b, const struct ix_key *k, const struct rec_epoch *rec,
			 struct err *e)
{
	struct epoch_at x = {.at = {ix_be64(k->b), ix_be64(k->b + 8)}, .ancestor = rec->ancestor};
	const struct epoch_at *parent = rec->chain_epochs ? find_epoch(b, rec->parent) : NULL;

	int r = 0;

	if (!rec->chain_epochs || (parent && parent->valid))
		r = epoch_is_whole(b, rec, false);
	x.valid = r > 0;
	if (x.valid)
		r = epoch_is_whole(b, rec, true);
	if (r < 0)
		return rebuild_no_memory(e);
	if (x.valid) {
		rebuild_use_blob(b, rec->manifest.last);
		rebuild_use_blob(b, rec->checkpoint.last);
		rebuild_use_blob(b, rec->state.last);
	}
	if (array_grow(b->epochs, b->nr_epochs, b->cap_epochs))
		return rebuild_no_memory(e);
	b->epochs[b->nr_epochs++] = x;
	return 0;
}

int rebuild_look_at_epochs(struct rebuild *b, struct err *e)
{
	struct rec_epoch rec;
	struct ix_iter it;
	struct ix_txn t;
	struct ix_key k;
	int r;

	r = index_begin(b->s->index, &t, e);
	if (r)
		return r;
	r = index_iter_init(&it, &t, IX_EPOCHS, NULL, e);
	while (!r && (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0)
		r = look_at_epoch(b, &k, &rec, e);
	index_iter_deinit(&it);
	index_end(&t);
	return r;
}

/* ---- what follows from the records ---- */

/* A point and the records of its epoch: dropped, or its ancestor set right. */
static int settle_epoch(struct rebuild *b, struct ix_txn *t, const struct epoch_at *x,
			struct err *e)
{
	struct snapd_point ancestor = x->ancestor;
	struct ix_key k = ix_key_point(x->at);
	const struct epoch_at *a;
	struct rec_epoch rec;
	int r;

	if (!x->valid)
		return index_del(t, IX_EPOCHS, &k, e);
	while (ancestor.timeline && (!(a = find_epoch(b, ancestor)) || !a->valid))
		ancestor = a ? a->ancestor : (struct snapd_point){0};
	r = index_get(t, IX_EPOCHS, &k, &rec, sizeof(rec), NULL, NULL, e);
	if (r)
		return r;
	rec.ancestor = ancestor;
	/* What was deleted without a journal to tell. */
	if (rec.snapshot) {
		struct ix_key sk = ix_key_u64(rec.snapshot);
		struct rec_snapshot sn;

		if (index_get(t, IX_SNAPSHOTS, &sk, &sn, sizeof(sn), NULL, NULL, NULL))
			rec.snapshot = 0;
	}
	return index_put(t, IX_EPOCHS, &k, &rec, sizeof(rec), NULL, 0, e);
}

/* A timeline whose last epoch is lost goes on from the one before. */
static int settle_timelines(struct rebuild *b, struct ix_txn *t, struct err *e)
{
	for (size_t i = 0; i < b->nr_epochs; i++) {
		struct ix_key k = ix_key_u64(b->epochs[i].at.timeline);
		const struct epoch_at *x = &b->epochs[i];
		struct rec_timeline tl;
		int r;

		if (x->valid)
			continue;
		r = index_get(t, IX_TIMELINES, &k, &tl, sizeof(tl), NULL, NULL, e);
		if (r == -ENOENT || (!r && tl.last != x->at.epoch))
			continue;
		while (x > b->epochs && !x->valid && x[-1].at.timeline == x->at.timeline)
			x--;
		tl.last = x->valid ? x->at.epoch : 0;
		if (!r)
			r = index_put(t, IX_TIMELINES, &k, &tl, sizeof(tl), NULL, 0, e);
		if (r)
			return r;
	}
	return 0;
}

static int put_vm_names(struct ix_txn *t, struct err *e)
{
	struct rec_vm vm, other;
	struct ix_iter it;
	struct ix_key k;
	int r;

	r = index_iter_init(&it, t, IX_VMS, NULL, e);
	while (!r && (r = index_iter_next(&it, &k, &vm, sizeof(vm), e)) > 0) {
		uint32_t uid = __builtin_bswap32(vm.uid);
		struct ix_key nk = ix_key_name(&uid, sizeof(uid), vm.name), ok;
		struct rec_vmname name;

		r = index_get(t, IX_VMNAMES, &nk, &name, sizeof(name), NULL, NULL, e);
		ok = ix_key_id(name.vm);
		/* One that was removed, and came again: the newer has the name. */
		if (!r && !index_get(t, IX_VMS, &ok, &other, sizeof(other), NULL, NULL, NULL) &&
		    other.created_ns > vm.created_ns)
			continue;
		if (r && r != -ENOENT)
			break;
		memcpy(name.vm, k.b, sizeof(name.vm));
		name.head = (struct rec_head){0};
		r = index_put(t, IX_VMNAMES, &nk, &name, sizeof(name), NULL, 0, e);
	}
	index_iter_deinit(&it);
	return r;
}

struct row {
	uint64_t id;
	struct rec_snapshot rec;
};

static int list_snapshots(struct ix_txn *t, struct row **ret, size_t *nr, struct err *e)
{
	struct rec_snapshot rec;
	struct ix_iter it;
	struct ix_key k;
	size_t cap = 0;
	int r;

	r = index_iter_init(&it, t, IX_SNAPSHOTS, NULL, e);
	while (!r && (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0) {
		r = array_grow(*ret, *nr, cap) ? rebuild_no_memory(e) : 0;
		if (r)
			break;
		assert(*ret);
		(*ret)[(*nr)++] = (struct row){ix_be64(k.b), rec};
	}
	index_iter_deinit(&it);
	return r;
}

/* Its epoch is there, and the epoch's record says so, too. */
static bool is_whole(const struct rebuild *b, struct ix_txn *t, const struct row *row)
{
	const struct epoch_at *x = find_epoch(b, row->rec.point);
	struct ix_key k = ix_key_point(row->rec.point);
	struct rec_epoch rec;

	return x && x->valid && !index_get(t, IX_EPOCHS, &k, &rec, sizeof(rec), NULL, NULL, NULL) &&
	       rec.snapshot == row->id;
}

static int settle_snapshot(struct rebuild *b, struct ix_txn *t, struct row *row, struct err *e)
{
	struct ix_key k = ix_key_u64(row->id), nk;
	struct rec_snapname name = {.snapshot = row->id}, other;
	int r;

	if (!is_whole(b, t, row))
		return index_del(t, IX_SNAPSHOTS, &k, e);
	if (!row->rec.name[0])
		return 0;
	nk = ix_key_name(row->rec.vm, sizeof(row->rec.vm), row->rec.name);
	r = index_get(t, IX_SNAPNAMES, &nk, &other, sizeof(other), NULL, NULL, e);
	if (r == -ENOENT)
		return index_put(t, IX_SNAPNAMES, &nk, &name, sizeof(name), NULL, 0, e);
	/* Without a journal: it was renamed or deleted, and the name taken again. */
	memset(row->rec.name, 0, sizeof(row->rec.name));
	return r ? r : index_put(t, IX_SNAPSHOTS, &k, &row->rec, sizeof(row->rec), NULL, 0, e);
}

/* Newest first: who took a name later has it. */
static int settle_snapshots(struct rebuild *b, struct ix_txn *t, struct err *e)
{
	_cleanup_free_ struct row *rows = NULL;
	size_t nr = 0;
	int r = list_snapshots(t, &rows, &nr, e);

	for (size_t i = nr; !r && i-- > 0;)
		r = settle_snapshot(b, t, &rows[i], e);
	return r;
}

/* Behind the last batch that is used; pages up to there. */
void rebuild_find_tails(struct rebuild *b)
{
	uint64_t pages = 0;

	for (uint32_t i = 0; i < b->s->nr_segs; i++)
		if (b->s->segs[i])
			b->s->segs[i]->tail = 1;
	for (size_t i = 0; i < b->nr_found; i++) {
		const struct found *x = &b->found[i];
		struct seg *seg = b->s->segs[x->at.segment];

		if (i && x->at.segment != x[-1].at.segment)
			pages = 0;
		pages += x->nr_pages;
		if (!x->used)
			continue;
		seg->tail = x->at.block + x->blocks;
		seg->pages = pages;
	}
}

void rebuild_tell_gaps(struct rebuild *b)
{
	for (size_t i = 0; i < b->nr_gaps; i++) {
		const struct gap *x = &b->gaps[i];

		if (x->from >= b->s->segs[x->segment]->tail)
			continue;
		b->ret->damages++;
		rebuild_tell(b, "segment %08x blocks %u to %u: no batch can be read", x->segment,
			     x->from, x->to - 1);
	}
}

static int put_segments(struct rebuild *b, struct ix_txn *t, struct err *e)
{
	for (uint32_t i = 0; i < b->s->nr_segs; i++) {
		const struct seg *seg = b->s->segs[i];
		struct ix_key k = ix_key_u32(i);
		struct rec_segment rec;
		int r;

		if (!seg)
			continue;
		rec = (struct rec_segment){.generation = seg->generation,
					   .segment_bytes = seg->segment_bytes,
					   .tail = seg->tail,
					   .state = seg->tail > 1 ? SEG_SEALED : SEG_FREE,
					   .pages = seg->pages};
		r = index_put(t, IX_SEGMENTS, &k, &rec, sizeof(rec), NULL, 0, e);
		if (r)
			return r;
	}
	return 0;
}

int rebuild_settle(struct ix_txn *t, void *arg, struct err *e)
{
	static const struct ix_key key = {.b = "counters", .len = 8};
	struct rebuild *b = arg;
	int r = put_vm_names(t, e);

	if (!r)
		r = settle_snapshots(b, t, e);
	for (size_t i = 0; !r && i < b->nr_epochs; i++)
		r = settle_epoch(b, t, &b->epochs[i], e);
	if (!r)
		r = settle_timelines(b, t, e);
	if (!r)
		r = put_segments(b, t, e);
	return r ? r : index_put(t, IX_META, &key, &b->counters, sizeof(b->counters), NULL, 0, e);
}

/* ---- what is lost ---- */

/* Before they are dropped. */
int rebuild_tell_lost(struct rebuild *b, struct err *e)
{
	_cleanup_free_ struct row *rows = NULL;
	size_t nr = 0;
	struct ix_txn t;
	int r = index_begin(b->s->index, &t, e);

	if (r)
		return r;
	r = list_snapshots(&t, &rows, &nr, e);
	for (size_t i = 0; !r && i < nr; i++) {
		struct ix_key k = ix_key_id(rows[i].rec.vm);
		struct rec_vm vm = {.name = "?"};

		if (is_whole(b, &t, &rows[i]))
			continue;
		if (index_get(&t, IX_VMS, &k, &vm, sizeof(vm), NULL, NULL, NULL))
			vm.name[0] = '?';
		b->ret->lost_snapshots++;
		rebuild_tell(b,
			     b->ret->journalled
				     ? "snapshot %llu of %.63s is lost: its map or its state "
				       "can't be read"
				     : "snapshot %llu of %.63s is left out: it was deleted, or its "
				       "pages, its map or its state are lost",
			     (unsigned long long)rows[i].id, vm.name);
	}
	index_end(&t);
	return r;
}
