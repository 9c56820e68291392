/* SPDX-License-Identifier: MIT */
/*
 * Segments in part dead, written again.  In: a segment, condemned, and which of its
 * places are named.  Out: the same segment in a new file in which each batch lies where
 * it lay, with the same number of entries, but holds only the pages that are named; where
 * nothing is left there is a hole.  So no loc, no manifest and no record changes: what
 * the index says of a page is true before and after.
 *
 *   W1 The new file is complete and durable before it gets the name of the old one, by
 *      one rename(): a crash leaves the one or the other.  Both have all that is named.
 *      The index says what the new one has only after its name is durable, too.
 *   W2 A page's stored bytes are copied, not compressed again; in an encrypted store they
 *      get the nonce of the new batch: no nonce is used for two contents.
 *   W3 Whoever has the old file open reads on in it (seg_replace()).  Headers are cached
 *      by segment_ident.rewrites, too, since offsets in the payload differ.
 *   W4 A segment in which anything can't be read stays as it is.
 *   W5 The feature "holes" is in the index before the first file has one.
 *
 * A segment is looked through when a share of what was named has gone (gc.c), and written
 * again when a quarter of what it takes, or more, would come back: so a byte that dies
 * costs at most three that are copied, and what is dead and stays is bounded.
 *
 * One thread: gc's.
 */
#include "snapd/store/gc.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "snapd/store/walk.h"
#include "snapd/util/log.h"

#define DEAD_SHARE 4u /* one part in so many */

struct rewrite {
	struct gc *g;
	struct store *s;
	struct seg *seg; /* open */
	struct seg_ident ident;
	int from;
	uint32_t tail;
	struct seg_counts counts;     /* owned */
	bool journal;		      /* INDEX batches in it are needed */
	int to;			      /* owned; -1 */
	uint8_t *in, *out;	      /* owned, BATCH_BYTES_MAX each */
	uint64_t blocks, kept_blocks; /* of all batches; of what would be left of them */
	uint64_t records, pages;      /* of pages; of those that would be left */
	uint64_t pages_after;	      /* for its record */
	bool swapped;		      /* the new file has the name, and g->rewritten has room */
};

static void rewrite_deinit(struct rewrite *w)
{
	if (w->to >= 0)
		close(w->to);
	if (w->seg)
		seg_close(w->s, w->seg);
	seg_counts_deinit(&w->counts);
	free(w->in);
	free(w->out);
}

/* ---- what is needed ---- */

static bool page_is_named(const struct rewrite *w, const struct batch_header *h, uint32_t entry)
{
	return refs_has(&w->counts, h->block << 12 | entry);
}

/* Of EPOCH batches only the last part is counted; all of them say whose they are. */
static int epoch_is_there(const struct rewrite *w, const struct batch_header *h, struct err *e)
{
	struct ix_key k = ix_key_point(h->point);
	struct ix_txn t;
	int r = index_begin(w->s->index, &t, e);

	if (r)
		return r;
	r = index_has(&t, IX_EPOCHS, &k);
	index_end(&t);
	return r;
}

/* 1: a blob's part that stays. */
static int blob_stays(const struct rewrite *w, const struct batch_header *h, struct err *e)
{
	if (h->type == BATCH_INDEX)
		return w->journal;
	if (h->type == BATCH_EPOCH)
		return epoch_is_there(w, h, e);
	return refs_has(&w->counts, h->block << 12 | REF_BLOB);
}

struct keep {
	uint32_t nr, raw; /* pages, and those not compressed */
	uint64_t raw_bytes, packed_bytes;
};

static struct keep what_stays(const struct rewrite *w, const struct batch_header *h,
			      const struct batch_page *p)
{
	struct keep k = {0};

	for (uint32_t i = 0; i < h->nr_entries; i++) {
		if (page_is_gone(&p[i]) || !page_is_named(w, h, i))
			continue;
		k.nr++;
		if (page_codec(&p[i]) == CODEC_RAW)
			k.raw_bytes += page_stored_bytes(&p[i]);
		else
			k.packed_bytes += page_stored_bytes(&p[i]);
	}
	return k;
}

static uint32_t nr_records(const struct batch_header *h, const struct batch_page *p)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < h->nr_entries; i++)
		n += !page_is_gone(&p[i]);
	return n;
}

/* ---- the look ---- */

static int look_at(struct rewrite *w, const struct batch_header *h, const struct batch_page *p,
		   struct err *e)
{
	uint32_t blocks = batch_blocks(h);
	struct keep k;
	int r;

	w->blocks += blocks;
	if (!p) {
		r = blob_stays(w, h, e);
		w->kept_blocks += r > 0 ? blocks : 0;
		return MIN(r, 0);
	}
	k = what_stays(w, h, p);
	w->pages += k.nr;
	w->records += nr_records(h, p);
	if (k.nr)
		w->kept_blocks +=
			(h->header_bytes + ALIGN_UP(k.raw_bytes + k.packed_bytes, FMT_BLOCK)) /
			FMT_BLOCK;
	return 0;
}

static int each_batch(struct rewrite *w,
		      int (*fn)(struct rewrite *w, const struct batch_header *h,
				const struct batch_page *p, struct err *e),
		      struct err *e)
{
	_cleanup_(seg_walk_deinit) struct seg_walk walk = {0};
	const struct batch_header *h;
	const struct batch_page *p;
	uint32_t at;
	int r;

	if (seg_walk_init(&walk, w->from, &w->ident, w->tail))
		return err_errno(e, ENOMEM, "gc");
	while ((r = seg_walk_next(&walk, &at, &h, &p, e)) > 0) {
		uint64_t bytes = h->header_bytes;

		r = fn(w, h, p, e);
		if (!r)
			r = gc_pace(w->g, bytes, e);
		if (r)
			break;
	}
	return r;
}

/* ---- the new file ---- */

static int put(struct rewrite *w, uint32_t block, const void *bytes, uint32_t len, struct err *e)
{
	off_t at = (off_t)block * FMT_BLOCK;
	int r = w->s->fault ? w->s->fault(w->s->fault_opaque, w->to, (uint64_t)at, len) : 0;
	ssize_t n;

	if (r < 0)
		return err_errno(e, -r, "writing segment %08x again", w->ident.segment);
	n = pwrite(w->to, bytes, len, at);
	if (n != (ssize_t)len)
		return err_errno(e, n < 0 ? errno : ENOSPC, "writing segment %08x again",
				 w->ident.segment);
	return gc_pace(w->g, 2 * (uint64_t)len, e); /* it was read, too */
}

/* Its stored bytes, decrypted, to `to`. */
static int take_page(const struct rewrite *w, const struct batch_header *h,
		     const struct batch_page *p, uint32_t entry, uint8_t *to, struct err *e)
{
	const uint8_t *stored = w->in + h->header_bytes + p->offset;

	if (!w->s->seal)
		memcpy(to, stored, page_stored_bytes(p));
	else if (!unseal_page(w->s->seal, h, entry, to, stored, page_stored_bytes(p)))
		return err_set(e, E_CORRUPT, "segment %08x block %u entry %u: not authentic",
			       h->segment, h->block, entry);
	return 0;
}

static void seal_again(const struct rewrite *w, struct batch_header *h)
{
	const struct batch_page *p = batch_pages(h);

	seal_begin(h);
	for (uint32_t i = 0; i < h->nr_entries; i++)
		if (!page_is_gone(&p[i]))
			seal_page(w->s->seal, h, i, (uint8_t *)h + h->header_bytes + p[i].offset,
				  page_stored_bytes(&p[i]));
	seal_records(w->s->seal, h);
}

/* The same batch with the pages that stay, raw ones first. */
static int put_part(struct rewrite *w, const struct batch_header *h, const struct batch_page *p,
		    struct keep k, struct err *e)
{
	struct batch_header *to = (struct batch_header *)w->out;
	struct batch_page *records;
	uint64_t raw = 0, packed = k.raw_bytes;
	uint32_t len;
	int r = 0;

	memset(w->out, 0, BATCH_BYTES_MAX);
	*to = *h;
	to->hash = 0;
	to->payload_bytes = k.raw_bytes + k.packed_bytes;
	records = (struct batch_page *)batch_pages(to);
	for (uint32_t i = 0; !r && i < h->nr_entries; i++) {
		uint64_t *at = page_codec(&p[i]) == CODEC_RAW ? &raw : &packed;

		if (page_is_gone(&p[i]) || !page_is_named(w, h, i))
			continue;
		records[i] = p[i];
		records[i].offset = (uint32_t)*at;
		*at += page_stored_bytes(&p[i]);
		r = take_page(w, h, &p[i], i, w->out + h->header_bytes + records[i].offset, e);
	}
	if (r)
		return r;
	if (w->s->seal)
		seal_again(w, to);
	batch_seal(to);
	len = batch_blocks(to) * FMT_BLOCK;
	return put(w, h->block, w->out, len, e);
}

static int copy_batch(struct rewrite *w, const struct batch_header *h, const struct batch_page *p,
		      struct err *e)
{
	uint32_t len = batch_blocks(h) * FMT_BLOCK;
	struct keep k = {0};
	ssize_t n;
	int r = 1;

	if (p)
		k = what_stays(w, h, p);
	else
		r = blob_stays(w, h, e);
	if (r <= 0 || (p && !k.nr))
		return MIN(r, 0);
	n = pread(w->from, w->in, len, (off_t)h->block * FMT_BLOCK);
	if (n != (ssize_t)len)
		return err_errno(e, n < 0 ? errno : EIO, "reading segment %08x block %u",
				 h->segment, h->block);
	if (p && k.nr < nr_records(h, p))
		return put_part(w, h, p, k, e);
	return put(w, h->block, w->in, len, e);
}

static int make_file(struct rewrite *w, const char *name, struct err *e)
{
	_Alignas(FMT_BLOCK) uint8_t block[FMT_BLOCK];
	struct seg_ident ident = w->ident;
	int r;

	unlinkat(w->s->segments_fd, name, 0);
	w->to = seg_file_open(w->s, name, O_RDWR | O_CREAT | O_EXCL);
	if (w->to < 0 || ftruncate(w->to, (off_t)ident.segment_bytes))
		return err_errno(e, errno, "%s/segments/%s", w->s->dir, name);
	ident.rewrites++;
	seg_super_encode(block, &ident);
	r = put(w, 0, block, sizeof(block), e);
	if (!r)
		r = each_batch(w, copy_batch, e);
	if (!r && fsync(w->to))
		r = err_errno(e, errno, "syncing %s/segments/%s", w->s->dir, name);
	return r;
}

static int sync_names(struct store *s, struct err *e)
{
	s->names_unsynced = true;
	if (fsync(s->segments_fd))
		return err_errno(e, errno, "%s/segments", s->dir);
	s->names_unsynced = false;
	return 0;
}

/* W1: from the rename on the new file is the segment, and nobody may go on with the other,
 * whether or not its name is durable yet: only then can the index say what it has. */
static int swap_files(struct rewrite *w, const char *unfinished, struct err *e)
{
	_cleanup_free_ struct seg *with = calloc(1, sizeof(*with));
	uint64_t had = w->seg->disk_bytes, has;
	char name[16];
	struct stat st;

	if (!with || array_grow(w->g->rewritten.v, w->g->rewritten.nr, w->g->rewritten.cap))
		return err_errno(e, ENOMEM, "gc");
	if (fstat(w->to, &st))
		return err_errno(e, errno, "%s/segments/%s", w->s->dir, unfinished);
	seg_path(w->ident.segment, name);
	if (renameat(w->s->segments_fd, unfinished, w->s->segments_fd, name))
		return err_errno(e, errno, "%s/segments/%s", w->s->dir, name);
	has = MIN((uint64_t)st.st_blocks * 512, w->ident.segment_bytes);
	*with = (struct seg){.fd = steal_fd(&w->to),
			     .rewrites = w->ident.rewrites + 1,
			     .pages = w->pages,
			     .disk_bytes = has};
	seg_replace(w->s, w->seg, steal_ptr(&with));
	w->swapped = true;
	w->g->freed += had - MIN(had, has);
	return sync_names(w->s, e);
}

/* ---- the record ---- */

static int get_record(const struct rewrite *w, struct ix_txn *t, struct rec_segment *ret,
		      struct err *e)
{
	struct ix_key k = ix_key_u32(w->ident.segment);
	int r = index_get(t, IX_SEGMENTS, &k, ret, sizeof(*ret), NULL, NULL, e);

	return r == -ENOENT ? err_set(e, E_CORRUPT, "segment %08x has no record", w->ident.segment)
			    : r;
}

static int put_record(const struct rewrite *w, struct ix_txn *t, struct rec_segment *rec,
		      struct err *e)
{
	struct ix_key k = ix_key_u32(w->ident.segment);

	return index_put(t, IX_SEGMENTS, &k, rec, sizeof(*rec), NULL, 0, e);
}

/* Nothing is appended to it any more. */
static int before_txn(struct ix_txn *t, void *arg, struct err *e)
{
	struct rewrite *w = arg;
	struct rec_segment rec;
	int r = get_record(w, t, &rec, e);

	rec.state = SEG_SEALED;
	return r ? r : put_record(w, t, &rec, e);
}

/* What is in it, and that it was looked through. */
static int after_txn(struct ix_txn *t, void *arg, struct err *e)
{
	struct rewrite *w = arg;
	struct rec_segment rec;
	int r = get_record(w, t, &rec, e);

	rec.pages = w->pages_after;
	if (!r)
		r = put_record(w, t, &rec, e);
	return r ? r : refs_put(t, &w->counts, e);
}

static int record(struct rewrite *w, struct err *e)
{
	struct ref_changes one = {.v = &w->counts, .nr = 1};
	int r;

	r = w->s->names_unsynced ? sync_names(w->s, e) : 0;
	w->counts.looks++;
	w->counts.high = w->counts.places;
	if (!r)
		r = index_update(w->s->index, after_txn, w, e);
	if (!r)
		gc_learn(w->g, &one);
	return r;
}

/* ---- one segment ---- */

static int open_segment(struct rewrite *w, uint32_t id, struct err *e)
{
	struct ix_txn t;
	int r = index_begin(w->s->index, &t, e);

	if (r)
		return r;
	r = refs_get(&t, id, &w->counts, e);
	index_end(&t);
	if (!r)
		r = seg_open(w->s, id, &w->seg, &w->from, &w->ident, e);
	w->in = aligned_alloc(FMT_BLOCK, BATCH_BYTES_MAX);
	w->out = aligned_alloc(FMT_BLOCK, BATCH_BYTES_MAX);
	if (!r && (!w->in || !w->out))
		r = err_errno(e, ENOMEM, "gc");
	if (r)
		return r;
	scoped_lock(&w->s->segments_lock);
	w->tail = w->seg->tail;
	w->journal = seg_refs_has(&w->s->journal_refs, id);
	return 0;
}

static bool is_worth_it(const struct rewrite *w)
{
	uint64_t dead = w->blocks - w->kept_blocks;

	return dead && dead * DEAD_SHARE >= w->blocks;
}

/* Here, when hardly anything can fail any more: else an open one stays open. */
static int seal_segment(struct rewrite *w, struct err *e)
{
	int r = index_update(w->s->index, before_txn, w, e);

	if (r)
		return r;
	scoped_lock(&w->s->segments_lock);
	w->seg->state = SEG_SEALED;
	return 0;
}

static int write_again(struct rewrite *w, struct err *e)
{
	char name[16];
	int r;

	snprintf(name, sizeof(name), "%08x.new", w->ident.segment);
	r = features_add(w->s, 1u << FEATURE_HOLES, e);
	if (!r)
		r = make_file(w, name, e);
	if (!r)
		r = seal_segment(w, e);
	if (!r)
		r = swap_files(w, name, e);
	if (r)
		unlinkat(w->s->segments_fd, name, 0);
	return r;
}

static struct seg_counts steal_counts(struct seg_counts *c)
{
	struct seg_counts taken = *c;

	*c = (struct seg_counts){0};
	return taken;
}

static int rewrite_segment(struct gc *g, uint32_t id, struct err *e)
{
	_cleanup_(rewrite_deinit) struct rewrite w = {.g = g, .s = g->s, .to = -1};
	int r = open_segment(&w, id, e);
	bool worth;

	if (!r)
		r = each_batch(&w, look_at, e);
	worth = !r && is_worth_it(&w);
	w.pages_after = worth ? w.pages : w.records;
	if (worth)
		r = write_again(&w, e);
	if (!r)
		r = record(&w, e);
	if (w.swapped) /* whatever failed since: these pages are gone */
		g->rewritten.v[g->rewritten.nr++] = steal_counts(&w.counts);
	return r;
}

static int compare_segments(const void *key, const void *elem)
{
	uint32_t id = *(const uint32_t *)key, other = ((const struct seg_counts *)elem)->segment;

	return id < other ? -1 : id > other;
}

static bool keep_named(void *opaque, loc_t loc)
{
	const struct gc *g = opaque;
	uint32_t id = loc_segment(loc);
	const struct seg_counts *c = bsearch(&id, g->rewritten.v, g->rewritten.nr,
					     sizeof(*g->rewritten.v), compare_segments);

	return !c || refs_has(c, (uint32_t)loc);
}

int gc_rewrite(struct gc *g, struct err *e)
{
	int r = 0;

	for (uint32_t i = 0; !r && i < g->victims.nr; i++) {
		struct err why = {0};

		if (!seg_refs_has(&g->victims, i))
			continue;
		r = rewrite_segment(g, i, &why);
		if (r == -ECANCELED || r == -ENOMEM) {
			err_set(e, -r, "%s", why.text);
		} else if (r) {
			log_warn("store %s: segment %08x keeps what is dead in it: %s", g->s->dir,
				 i, why.text);
			r = 0;
		}
	}
	if (g->rewritten.nr)
		dedup_filter(&g->s->dedup, keep_named, g);
	return r;
}
