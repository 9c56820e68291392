/* SPDX-License-Identifier: MIT */
/*
 * Checking a store; see check.h.  The order makes it safe beside everything else:
 *
 *   C1 epochs are listed first, segments walked next, locs looked up last: what a
 *      listed epoch names was committed before its segment was walked;
 *   C2 what looks damaged is looked at again in the index: a segment that gc took
 *      since then, or an epoch whose record is gone, is not told.
 *
 * Each damage is told once, where it lies: blobs and locs in blocks that are known to
 * be bad already add no line.  What is lost by it is worked out only when something
 * is: then every snapshot's map is compared with the set of lost places.
 *
 * Threads: the caller's.
 */
#include "snapd/store/check.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "snapd/store/internal.h"
#include "snapd/store/manifest.h"
#include "snapd/store/pace.h"
#include "snapd/store/point.h"
#include "snapd/store/walk.h"

const char *const damage_kind_names[DAMAGE_NR_KINDS] = {
	[DAMAGE_RECORD] = "record", [DAMAGE_LINK] = "link",   [DAMAGE_SEGMENT] = "segment",
	[DAMAGE_BATCH] = "batch",   [DAMAGE_COUNT] = "count", [DAMAGE_BLOB] = "blob",
	[DAMAGE_LOC] = "loc",	    [DAMAGE_PAGE] = "page",
};

/* Blocks [from, to) of a segment hold nothing that can be used. */
struct bad_blocks {
	uint32_t segment, from, to;
};

struct batch_at {
	uint32_t block, nr_entries; /* 0 entries: a blob */
};

struct seg_map {		  /* what a walk found */
	struct batch_at *batches; /* owned; ascending */
	size_t nr, cap;
	bool walked, bad; /* bad: nothing in it can be used */
};

struct known_epoch {
	struct snapd_point at;
	struct rec_epoch rec;
};

struct check {
	struct store *s;
	const struct store_check_config *c;
	struct store_check_result *ret;
	struct pace pace;
	uint64_t total;
	struct known_epoch *epochs; /* owned; ascending */
	size_t nr_epochs, cap_epochs;
	struct seg_map *segs; /* owned; by number */
	uint32_t nr_segs;
	struct bad_blocks *blocks; /* owned */
	size_t nr_blocks, cap_blocks;
	loc_t *pages; /* owned; pages whose bytes are wrong */
	size_t nr_pages, cap_pages;
	bool blobs_bad;
};

static void check_deinit(struct check *k)
{
	for (uint32_t i = 0; i < k->nr_segs; i++)
		free(k->segs[i].batches);
	free(k->segs);
	free(k->epochs);
	free(k->blocks);
	free(k->pages);
}

__attribute__((format(printf, 3, 4))) static void tell(struct check *k, enum damage_kind kind,
						       const char *fmt, ...)
{
	struct store_damage d = {.kind = kind};
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(d.text, sizeof(d.text), fmt, ap);
	va_end(ap);
	k->ret->damages++;
	if (k->c->damage)
		k->c->damage(k->c->opaque, &d);
}

/* ---- pace ---- */

static bool stop_check(void *opaque, uint64_t done)
{
	const struct check *k = opaque;

	return k->c->step && k->c->step(k->c->opaque, done, k->total);
}

/* After reading: count, wait as the rate wants, ask whether to go on. */
static int step(struct check *k, uint64_t bytes, struct err *e)
{
	k->ret->bytes_read += bytes;
	if (pace_step(&k->pace, bytes))
		return err_set(e, ECANCELED, "the check was cancelled");
	return 0;
}

/* ---- what is bad already ---- */

static bool in_bad_blocks(const struct check *k, uint32_t segment, uint32_t block)
{
	if (segment < k->nr_segs && k->segs[segment].bad)
		return true;
	for (size_t i = 0; i < k->nr_blocks; i++)
		if (k->blocks[i].segment == segment && block >= k->blocks[i].from &&
		    block < k->blocks[i].to)
			return true;
	return false;
}

static const struct batch_at *find_batch(const struct check *k, uint32_t segment, uint32_t block)
{
	const struct seg_map *m = segment < k->nr_segs ? &k->segs[segment] : NULL;
	size_t lo = 0, hi = m ? m->nr : 0;

	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (m->batches[mid].block == block)
			return &m->batches[mid];
		if (m->batches[mid].block < block)
			lo = mid + 1;
		else
			hi = mid;
	}
	return NULL;
}

static int compare_locs(const void *a, const void *b)
{
	loc_t x = *(const loc_t *)a, y = *(const loc_t *)b;

	return x < y ? -1 : x > y;
}

static bool page_is_lost(const struct check *k, loc_t loc)
{
	const struct batch_at *b = find_batch(k, loc_segment(loc), loc_block(loc));

	if (!b || loc_entry(loc) >= b->nr_entries)
		return true;
	return k->nr_pages &&
	       bsearch(&loc, k->pages, k->nr_pages, sizeof(loc), compare_locs) != NULL;
}

/* ---- the index: each record by itself ---- */

static const struct {
	enum index_db db;
	size_t size;
} record_sizes[] = {
	{IX_VMS, sizeof(struct rec_vm)},
	{IX_VMNAMES, sizeof(struct rec_vmname)},
	{IX_TIMELINES, sizeof(struct rec_timeline)},
	{IX_EPOCHS, sizeof(struct rec_epoch)},
	{IX_SNAPSHOTS, sizeof(struct rec_snapshot)},
	{IX_SNAPNAMES, sizeof(struct rec_snapname)},
	{IX_SEGMENTS, sizeof(struct rec_segment)},
};

union any_record {
	struct rec_store store;
	struct rec_vm vm;
	struct rec_vmname vmname;
	struct rec_timeline timeline;
	struct rec_epoch epoch;
	struct rec_snapshot snapshot;
	struct rec_snapname snapname;
	struct rec_segment segment;
};

/* A reference from one record to another: false when that one is not there.  One that is
 * damaged is told as itself. */
static bool there(struct ix_txn *t, enum index_db db, struct ix_key k, void *rec, size_t size)
{
	return index_get(t, db, &k, rec, size, NULL, NULL, NULL) != -ENOENT;
}

static void check_vm_links(struct check *k, struct ix_txn *t, const struct rec_vm *vm)
{
	uint32_t be = __builtin_bswap32(vm->uid);
	struct rec_vmname name;

	if (!there(t, IX_VMNAMES, ix_key_name(&be, sizeof(be), vm->name), &name, sizeof(name)))
		tell(k, DAMAGE_LINK, "VM %.63s of user %u: its name leads nowhere", vm->name,
		     vm->uid);
}

static void check_timeline_links(struct check *k, uint64_t id, const struct rec_timeline *tl)
{
	if (tl->parent.timeline >= id)
		tell(k, DAMAGE_LINK, "timeline %llu forks from timeline %llu, which is later",
		     (unsigned long long)id, (unsigned long long)tl->parent.timeline);
}

static void check_snapshot_links(struct check *k, struct ix_txn *t, uint64_t id,
				 const struct rec_snapshot *sn)
{
	struct rec_snapname name;
	struct rec_epoch ep;
	struct rec_vm vm;
	int r;

	if (!there(t, IX_VMS, ix_key_id(sn->vm), &vm, sizeof(vm)))
		tell(k, DAMAGE_LINK, "snapshot %llu: its VM is not in the index",
		     (unsigned long long)id);
	if (sn->name[0] && !there(t, IX_SNAPNAMES, ix_key_name(sn->vm, sizeof(sn->vm), sn->name),
				  &name, sizeof(name)))
		tell(k, DAMAGE_LINK, "snapshot %llu: its name \"%.63s\" leads nowhere",
		     (unsigned long long)id, sn->name);
	struct ix_key key = ix_key_point(sn->point);

	r = index_get(t, IX_EPOCHS, &key, &ep, sizeof(ep), NULL, NULL, NULL);
	if (r == -ENOENT)
		tell(k, DAMAGE_LINK,
		     "snapshot %llu: epoch %llu of timeline %llu is not in the index",
		     (unsigned long long)id, (unsigned long long)sn->point.epoch,
		     (unsigned long long)sn->point.timeline);
	else if (!r && ep.snapshot != id)
		tell(k, DAMAGE_LINK,
		     "snapshot %llu: its epoch %llu of timeline %llu is snapshot %llu's",
		     (unsigned long long)id, (unsigned long long)sn->point.epoch,
		     (unsigned long long)sn->point.timeline, (unsigned long long)ep.snapshot);
}

static void check_epoch_links(struct check *k, struct ix_txn *t, struct snapd_point at,
			      const struct rec_epoch *ep)
{
	struct rec_timeline tl;
	struct rec_epoch parent;
	struct rec_snapshot sn;

	if (!there(t, IX_TIMELINES, ix_key_u64(at.timeline), &tl, sizeof(tl)))
		tell(k, DAMAGE_LINK,
		     "epoch %llu of timeline %llu: the timeline is not in the index",
		     (unsigned long long)at.epoch, (unsigned long long)at.timeline);
	if (ep->chain_epochs &&
	    !there(t, IX_EPOCHS, ix_key_point(ep->parent), &parent, sizeof(parent)))
		tell(k, DAMAGE_LINK,
		     "epoch %llu of timeline %llu builds on epoch %llu of timeline %llu, which is "
		     "not in the index",
		     (unsigned long long)at.epoch, (unsigned long long)at.timeline,
		     (unsigned long long)ep->parent.epoch, (unsigned long long)ep->parent.timeline);
	if (ep->snapshot && !there(t, IX_SNAPSHOTS, ix_key_u64(ep->snapshot), &sn, sizeof(sn)))
		tell(k, DAMAGE_LINK,
		     "epoch %llu of timeline %llu: its snapshot %llu is not in the index",
		     (unsigned long long)at.epoch, (unsigned long long)at.timeline,
		     (unsigned long long)ep->snapshot);
}

static void check_name_links(struct check *k, struct ix_txn *t, const struct ix_key *key,
			     const struct rec_snapname *name)
{
	struct rec_snapshot sn;

	if (!there(t, IX_SNAPSHOTS, ix_key_u64(name->snapshot), &sn, sizeof(sn)))
		tell(k, DAMAGE_LINK, "the name \"%.*s\" leads to snapshot %llu, which is not there",
		     (int)(key->len - 16), (const char *)key->b + 16,
		     (unsigned long long)name->snapshot);
}

static void check_links(struct check *k, struct ix_txn *t, enum index_db db,
			const struct ix_key *key, const union any_record *rec)
{
	struct rec_vm vm;

	switch (db) {
	case IX_VMS:
		check_vm_links(k, t, &rec->vm);
		break;
	case IX_VMNAMES:
		if (!there(t, IX_VMS, ix_key_id(rec->vmname.vm), &vm, sizeof(vm)))
			tell(k, DAMAGE_LINK, "the VM name \"%.*s\" leads nowhere",
			     (int)(key->len - 4), (const char *)key->b + 4);
		break;
	case IX_TIMELINES:
		check_timeline_links(k, ix_be64(key->b), &rec->timeline);
		break;
	case IX_EPOCHS:
		check_epoch_links(k, t, (struct snapd_point){ix_be64(key->b), ix_be64(key->b + 8)},
				  &rec->epoch);
		break;
	case IX_SNAPSHOTS:
		check_snapshot_links(k, t, ix_be64(key->b), &rec->snapshot);
		break;
	case IX_SNAPNAMES:
		check_name_links(k, t, key, &rec->snapname);
		break;
	default:
		break;
	}
}

static int note_epoch(struct check *k, const struct ix_key *key, const struct rec_epoch *rec,
		      struct err *e)
{
	if (array_grow(k->epochs, k->nr_epochs, k->cap_epochs))
		return err_errno(e, ENOMEM, "check");
	k->epochs[k->nr_epochs++] =
		(struct known_epoch){{ix_be64(key->b), ix_be64(key->b + 8)}, *rec};
	return 0;
}

static int check_db(struct check *k, struct ix_txn *t, enum index_db db, size_t size, struct err *e)
{
	union any_record rec;
	struct ix_iter it;
	struct ix_key key;
	int r;

	r = index_iter_init(&it, t, db, NULL, e);
	while (!r) {
		struct err why = {0};

		r = index_iter_next(&it, &key, &rec, size, &why);
		if (!r)
			break;
		k->ret->records++;
		if (r == -E_CORRUPT || r == -EPROTO) {
			tell(k, DAMAGE_RECORD, "%s", why.text);
			r = 0;
			continue;
		}
		if (r < 0) {
			r = err_set(e, -r, "%s", why.text);
			break;
		}
		check_links(k, t, db, &key, &rec);
		r = db == IX_EPOCHS ? note_epoch(k, &key, &rec.epoch, e) : 0;
	}
	index_iter_deinit(&it);
	return r;
}

static int check_index(struct check *k, struct err *e)
{
	struct ix_txn t;
	int r = index_begin(k->s->index, &t, e);

	if (r)
		return r;
	for (size_t i = 0; !r && i < ARRAY_SIZE(record_sizes); i++)
		r = check_db(k, &t, record_sizes[i].db, record_sizes[i].size, e);
	index_end(&t);
	return r;
}

/* ---- segments ---- */

/* C2: is it still the segment that was looked at? */
static bool still_there(struct check *k, const struct seg_ident *id)
{
	scoped_lock(&k->s->segments_lock);
	const struct seg *seg = seg_find(k->s, id->segment);

	return seg && seg->state != SEG_FREE && seg->generation == id->generation &&
	       !seg->condemned;
}

static int note_blocks(struct check *k, uint32_t segment, uint32_t from, uint32_t to, struct err *e)
{
	if (array_grow(k->blocks, k->nr_blocks, k->cap_blocks))
		return err_errno(e, ENOMEM, "check");
	k->blocks[k->nr_blocks++] = (struct bad_blocks){segment, from, to};
	return 0;
}

static int note_page(struct check *k, loc_t loc, struct err *e)
{
	if (array_grow(k->pages, k->nr_pages, k->cap_pages))
		return err_errno(e, ENOMEM, "check");
	k->pages[k->nr_pages++] = loc;
	return 0;
}

/* The same batches each time, spread evenly. */
static bool is_sampled(const struct check *k, const struct batch_header *h)
{
	uint32_t percent = k->c->percent ? k->c->percent : 100;

	return h->seq * 0x9e3779b97f4a7c15u >> 32 < (uint64_t)percent * (1ull << 32) / 100;
}

/* quiet: what the file lacks was told already; only note which pages it costs. */
static int read_batch(struct check *k, const struct batch_header *h, const struct batch_page *pages,
		      bool quiet, struct err *e)
{
	uint32_t page_size = 1u << h->page_shift;
	_cleanup_free_ struct page_read *reads = calloc(h->nr_entries, sizeof(*reads));
	_cleanup_free_ uint8_t *bytes = aligned_alloc(FMT_BLOCK, (size_t)h->nr_entries * page_size);
	struct store_reader *reader;
	struct err why = {0};
	int r;

	if (!reads || !bytes)
		return err_errno(e, ENOMEM, "check");
	for (uint32_t i = 0; i < h->nr_entries; i++)
		reads[i] = (struct page_read){.gfn = pages[i].gfn,
					      .loc = loc_make(h->segment, h->block, i),
					      .dst = bytes + (size_t)i * page_size};
	r = store_reader_get(k->s, page_size, &reader, e);
	if (r)
		return r;
	/* Without what it remembers of headers: they are checked, too. */
	reader_forget(reader);
	r = store_read_pages(reader, reads, h->nr_entries, &why);
	store_reader_put(k->s, reader, true);
	k->ret->pages_read += h->nr_entries;
	if (r && r != -E_CORRUPT && r != -EIO)
		return err_set(e, -r, "%s", why.text);
	for (uint32_t i = 0; i < h->nr_entries; i++) {
		if (!reads[i].err)
			continue;
		if (!quiet)
			tell(k, DAMAGE_PAGE,
			     "segment %08x block %u entry %u: the bytes of a page first stored "
			     "for address %#llx are damaged",
			     h->segment, h->block, loc_entry(reads[i].loc),
			     (unsigned long long)reads[i].gfn << h->page_shift);
		r = note_page(k, reads[i].loc, e);
		if (r)
			return r;
	}
	return 0;
}

static int note_batch(struct check *k, const struct batch_header *h, struct err *e)
{
	struct seg_map *m = &k->segs[h->segment];

	if (array_grow(m->batches, m->nr, m->cap))
		return err_errno(e, ENOMEM, "check");
	m->batches[m->nr++] =
		(struct batch_at){h->block, h->type == BATCH_PAGES ? h->nr_entries : 0};
	k->ret->batches++;
	return 0;
}

static int check_batches(struct check *k, struct seg_walk *w, uint64_t file_blocks,
			 uint64_t *nr_pages, struct err *e)
{
	for (;;) {
		const struct batch_header *h;
		const struct batch_page *pages;
		struct batch_header copy;
		struct err why = {0};
		uint32_t at;
		int r = seg_walk_next(w, &at, &h, &pages, &why);

		if (!r)
			return 0;
		if (r < 0) {
			if (!still_there(k, &w->ident))
				return 0;
			tell(k, DAMAGE_BATCH, "segment %08x blocks %u to %u: %s", w->ident.segment,
			     at, w->block - 1, why.text);
			r = note_blocks(k, w->ident.segment, at, w->block, e);
			if (r)
				return r;
			continue;
		}
		copy = *h;
		*nr_pages += pages ? h->nr_entries : 0;
		r = note_batch(k, h, e);
		if (!r && pages && w->block > file_blocks)
			r = read_batch(k, h, pages, true, e);
		else if (!r && pages && k->c->read_data && is_sampled(k, h))
			r = read_batch(k, h, pages, false, e);
		if (!r)
			r = step(k, copy.header_bytes + (k->c->read_data ? copy.payload_bytes : 0),
				 e);
		if (r)
			return r;
	}
}

/* Its file and superblock; *blocks: how many it has. */
static int check_file(struct check *k, int fd, const struct seg_ident *want, uint64_t *blocks)
{
	_Alignas(FMT_BLOCK) uint8_t block[FMT_BLOCK];
	struct seg_ident got;
	struct err why = {0};
	struct stat st;
	ssize_t n;

	if (fstat(fd, &st))
		return -errno;
	*blocks = (uint64_t)st.st_size / FMT_BLOCK;
	n = pread(fd, block, sizeof(block), 0);
	if (n == sizeof(block) && !seg_super_decode(block, &got, &why)) {
		if (memcmp(got.store, want->store, sizeof(got.store)) != 0)
			tell(k, DAMAGE_SEGMENT, "segment %08x: the file is one of another store",
			     want->segment);
		else if (got.segment != want->segment)
			tell(k, DAMAGE_SEGMENT, "segment %08x: the file is that of segment %08x",
			     want->segment, got.segment);
		else if (got.generation != want->generation)
			tell(k, DAMAGE_SEGMENT,
			     "segment %08x: the file is of generation %llu, not %llu",
			     want->segment, (unsigned long long)got.generation,
			     (unsigned long long)want->generation);
	} else {
		tell(k, DAMAGE_SEGMENT, "segment %08x: %s", want->segment,
		     n < 0		  ? strerror(errno)
		     : n != sizeof(block) ? "the file is empty"
					  : why.text);
	}
	if ((uint64_t)st.st_size < want->segment_bytes)
		tell(k, DAMAGE_SEGMENT, "segment %08x: cut off: %lld of %llu bytes", want->segment,
		     (long long)st.st_size, (unsigned long long)want->segment_bytes);
	return 0;
}

struct seg_view {
	struct seg_ident ident;
	uint32_t tail;
	uint64_t pages;
	bool used;
};

static struct seg_view view_segment(struct check *k, uint32_t id)
{
	scoped_lock(&k->s->segments_lock);
	const struct seg *seg = seg_find(k->s, id);
	struct seg_view v = {.used = seg && seg->state != SEG_FREE && seg->indexed &&
				     seg->tail > 1};

	if (!v.used)
		return v;
	v.ident = (struct seg_ident){
		.segment = id, .generation = seg->generation, .segment_bytes = seg->segment_bytes};
	memcpy(v.ident.store, k->s->uuid, sizeof(v.ident.store));
	v.tail = seg->tail;
	v.pages = seg->pages;
	return v;
}

/* Every header up to the tail, with the data if asked for. */
static int walk_segment(struct check *k, const struct seg_view *v, int fd, uint64_t file_blocks,
			struct err *e)
{
	_cleanup_(seg_walk_deinit) struct seg_walk w;
	uint64_t before = k->ret->damages, nr_pages = 0;
	int r;

	if (seg_walk_init(&w, fd, &v->ident, v->tail))
		return err_errno(e, ENOMEM, "check");
	r = check_batches(k, &w, file_blocks, &nr_pages, e);
	if (!r && k->ret->damages == before && nr_pages != v->pages && still_there(k, &v->ident))
		tell(k, DAMAGE_COUNT,
		     "segment %08x: %llu pages up to its tail, its record says %llu",
		     v->ident.segment, (unsigned long long)nr_pages, (unsigned long long)v->pages);
	return r;
}

static int check_segment(struct check *k, uint32_t id, struct err *e)
{
	struct seg_view v = view_segment(k, id);
	struct seg_ident ident;
	uint64_t file_blocks = 0;
	struct err why = {0};
	struct seg *seg;
	int fd, r;

	if (!v.used)
		return 0;
	k->segs[id].walked = true;
	k->ret->segments++;
	r = seg_open(k->s, id, &seg, &fd, &ident, &why);
	if (r) {
		if (r != -E_CORRUPT && r != -EIO && r != -EACCES)
			return err_set(e, -r, "%s", why.text);
		if (!still_there(k, &v.ident))
			return 0;
		k->segs[id].bad = true;
		tell(k, DAMAGE_SEGMENT, "segment %08x: %s", id,
		     r == -E_CORRUPT ? "the file is missing" : why.text);
		return 0;
	}
	if (ident.generation == v.ident.generation) {
		v.ident = ident; /* with what it takes to decrypt */
		r = check_file(k, fd, &v.ident, &file_blocks);
		r = r ? err_errno(e, -r, "segment %08x", id)
		      : walk_segment(k, &v, fd, file_blocks, e);
	}
	seg_close(k->s, seg);
	return r;
}

static uint64_t bytes_in_use(struct store *s, bool with_data)
{
	scoped_lock(&s->segments_lock);
	uint64_t sum = 0;

	for (uint32_t i = 0; i < s->nr_segs; i++)
		if (s->segs[i] && s->segs[i]->state != SEG_FREE)
			sum += (uint64_t)s->segs[i]->tail * FMT_BLOCK;
	return with_data ? sum : sum / 32;
}

static uint32_t count_slots(struct store *s)
{
	scoped_lock(&s->segments_lock);
	return s->nr_segs;
}

static int check_init(struct check *k, struct err *e)
{
	*k->ret = (struct store_check_result){0};
	k->pace = (struct pace){.rate_bytes = k->c->rate_bytes, .stop = stop_check, .opaque = k};
	k->total = bytes_in_use(k->s, k->c->read_data);
	/* Segments that come while it runs belong to epochs that it did not list. */
	k->nr_segs = count_slots(k->s);
	k->segs = calloc(k->nr_segs + 1, sizeof(*k->segs));
	return k->segs ? 0 : err_errno(e, ENOMEM, "check");
}

/* ---- epochs: their blobs, and what those name ---- */

static bool epoch_is_there(struct check *k, struct snapd_point at)
{
	struct ix_key key = ix_key_point(at);
	struct rec_epoch rec;
	struct ix_txn t;
	int r;

	if (index_begin(k->s->index, &t, NULL))
		return true;
	r = index_get(&t, IX_EPOCHS, &key, &rec, sizeof(rec), NULL, NULL, NULL);
	index_end(&t);
	return r != -ENOENT;
}

static void check_locs(struct check *k, const void *bytes, size_t len, const char *what)
{
	uint64_t nr_bad = 0, first_gfn = 0;
	struct manifest_reader reader;
	struct manifest_run run;
	struct err why = {0};
	loc_t first = 0;
	int r;

	manifest_reader_init(&reader, bytes, len);
	while ((r = manifest_next(&reader, &run, &why)) > 0) {
		const struct batch_at *b;

		if (loc_kind(run.loc) != LOC_PAGE)
			continue;
		b = find_batch(k, loc_segment(run.loc), loc_block(run.loc));
		if ((b && loc_entry(run.loc) + run.len <= b->nr_entries) ||
		    in_bad_blocks(k, loc_segment(run.loc), loc_block(run.loc)))
			continue;
		if (!nr_bad) {
			first = run.loc;
			first_gfn = run.gfn;
		}
		nr_bad += run.len;
	}
	if (r < 0)
		tell(k, DAMAGE_BLOB, "%s: %s", what, why.text);
	if (nr_bad)
		tell(k, DAMAGE_LOC,
		     "%s: %llu pages are not where it says, first frame %#llx: segment %08x block "
		     "%u entry %u",
		     what, (unsigned long long)nr_bad, (unsigned long long)first_gfn,
		     loc_segment(first), loc_block(first), loc_entry(first));
}

static int check_blob(struct check *k, const struct known_epoch *x, const struct rec_blob *blob,
		      enum batch_type type, const char *name, struct err *e)
{
	_cleanup_free_ void *bytes = NULL;
	struct err why = {0};
	char what[96];
	int r;

	if (!blob->bytes)
		return 0;
	snprintf(what, sizeof(what), "%s of epoch %llu of timeline %llu", name,
		 (unsigned long long)x->at.epoch, (unsigned long long)x->at.timeline);
	k->ret->blobs++;
	r = store_blob_read(k->s, blob, type, what, NULL, &bytes, &why);
	if (r == -ENOMEM)
		return err_errno(e, ENOMEM, "check");
	if (r && !epoch_is_there(k, x->at))
		return 0;
	if (r) {
		k->blobs_bad = true;
		if (!in_bad_blocks(k, blob->last.segment, blob->last.block))
			tell(k, DAMAGE_BLOB, "%s", why.text);
	} else if (type != BATCH_STATE && epoch_is_there(k, x->at)) {
		check_locs(k, bytes, blob->bytes, what);
	}
	return step(k, blob->bytes, e);
}

static int check_epochs(struct check *k, struct err *e)
{
	int r = 0;

	for (size_t i = 0; !r && i < k->nr_epochs; i++) {
		const struct known_epoch *x = &k->epochs[i];

		r = check_blob(k, x, &x->rec.manifest, BATCH_MANIFEST, "manifest", e);
		if (!r)
			r = check_blob(k, x, &x->rec.checkpoint, BATCH_CHECKPOINT, "checkpoint", e);
		if (!r)
			r = check_blob(k, x, &x->rec.state, BATCH_STATE, "state", e);
	}
	return r;
}

/* ---- what it costs ---- */

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
	return step(k, 0, e);
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

static int tell_losses(struct check *k, struct err *e)
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

/* ---- all of it ---- */

int store_check(struct store *s, const struct store_check_config *c, struct store_check_result *ret,
		struct err *e)
{
	_cleanup_(check_deinit) struct check k = {.s = s, .c = c, .ret = ret};
	int r = check_init(&k, e);

	if (!r)
		r = check_index(&k, e);
	for (uint32_t i = 0; !r && i < k.nr_segs; i++)
		r = check_segment(&k, i, e);
	if (!r)
		r = check_epochs(&k, e);
	return r || !ret->damages ? r : tell_losses(&k, e);
}

int store_scrub_step(struct store *s, const struct store_check_config *c, uint32_t from,
		     uint32_t *next, struct store_check_result *ret, struct err *e)
{
	_cleanup_(check_deinit) struct check k = {.s = s, .c = c, .ret = ret};
	int r = check_init(&k, e);

	while (!r && from < k.nr_segs && !view_segment(&k, from).used)
		from++;
	if (!r && from < k.nr_segs)
		r = check_segment(&k, from, e);
	*next = from + 1 < k.nr_segs ? from + 1 : 0;
	return r;
}
