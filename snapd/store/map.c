/* SPDX-License-Identifier: MIT */
/*
 * Manifests and checkpoints → whole maps.
 *
 * A map at a point is the nearest checkpoint on the way back (through the forks),
 * and the manifests since, applied in order.  epoch_commit() writes a checkpoint
 * whenever that way gets long, so the cost does not depend on depth (I9).  They are read
 * together, so that the disk's latency counts once, and not for every manifest.
 *
 * The dedup table is rebuilt at start from the headers of all page batches, 32
 * segments at a time, without reading a page.
 *
 * Threads: any.
 */
#include "snapd/store/internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/store/manifest.h"
#include "snapd/store/walk.h"
#include "snapd/util/log.h"

#define CHAIN_MAX 65536u /* epochs without a checkpoint; commit allows far fewer */
#define AHEAD_MAX 32u	 /* manifests read together */

/* ---- points ---- */

int store_epoch_record(struct ix_txn *t, struct snapd_point *at, struct rec_epoch *ret,
		       struct err *e)
{
	struct rec_timeline tl;
	struct ix_key k;
	int r;

	/* A fork of a fork at its own beginning: each step goes to an older timeline. */
	while (!at->epoch) {
		if (!at->timeline)
			return 1;
		k = ix_key_u64(at->timeline);
		r = index_get(t, IX_TIMELINES, &k, &tl, sizeof(tl), NULL, NULL, e);
		if (r == -ENOENT)
			return err_set(e, ENOENT, "there is no timeline %llu",
				       (unsigned long long)at->timeline);
		if (r)
			return r;
		if (tl.parent.timeline >= at->timeline)
			return err_set(e, E_CORRUPT, "timeline %llu forks from a later one",
				       (unsigned long long)at->timeline);
		*at = tl.parent;
	}
	k = ix_key_point(*at);
	r = index_get(t, IX_EPOCHS, &k, ret, sizeof(*ret), NULL, NULL, e);
	if (r == -ENOENT)
		return err_set(e, ENOENT, "there is no epoch %llu of timeline %llu",
			       (unsigned long long)at->epoch, (unsigned long long)at->timeline);
	return r;
}

/* ---- maps ---- */

static bool same_blob(const struct rec_blob *a, const struct rec_blob *b)
{
	return a->last.segment == b->last.segment && a->last.block == b->last.block &&
	       a->bytes == b->bytes && a->hash == b->hash;
}

bool epoch_same_maps(const struct rec_epoch *a, const struct rec_epoch *b)
{
	return same_blob(&a->manifest, &b->manifest) && same_blob(&a->checkpoint, &b->checkpoint);
}

int store_map_apply(struct pagemap *m, const void *bytes, size_t len, struct err *e)
{
	struct manifest_reader reader;
	struct manifest_run run;
	int r;

	manifest_reader_init(&reader, bytes, len);
	while ((r = manifest_next(&reader, &run, e)) > 0) {
		r = pagemap_set_run(m, run.gfn, run.len, run.loc);
		if (r)
			return err_errno(e, -r, "building a map");
	}
	return r;
}

struct chain {
	struct rec_epoch *records;  /* owned; newest first, the last one has the checkpoint */
	struct snapd_point *points; /* owned */
	size_t nr, cap;
};

static void chain_deinit(struct chain *c)
{
	free(c->records);
	free(c->points);
}

static int chain_push(struct chain *c, const struct rec_epoch *rec, struct snapd_point at)
{
	if (c->nr == c->cap) {
		size_t cap = c->cap ? c->cap * 2 : 16;
		struct rec_epoch *records = realloc(c->records, cap * sizeof(*records));
		struct snapd_point *points;

		if (!records)
			return -ENOMEM;
		c->records = records;
		points = realloc(c->points, cap * sizeof(*points));
		if (!points)
			return -ENOMEM;
		c->points = points;
		c->cap = cap;
	}
	c->points[c->nr] = at;
	c->records[c->nr++] = *rec;
	return 0;
}

/* Records from `at` back to the nearest checkpoint, or to the empty beginning. */
static int chain_load(struct ix_txn *t, struct snapd_point at, struct chain *c, struct err *e)
{
	for (;;) {
		struct rec_epoch rec;
		int r = store_epoch_record(t, &at, &rec, e);

		if (r)
			return r < 0 ? r : 0;
		if (c->nr >= CHAIN_MAX)
			return err_set(e, E_CORRUPT, "timeline %llu: no checkpoint in %u epochs",
				       (unsigned long long)at.timeline, CHAIN_MAX);
		if (chain_push(c, &rec, at))
			return err_errno(e, ENOMEM, "loading a map");
		if (!rec.chain_epochs)
			return 0;
		at = rec.parent;
	}
}

/* The checkpoint, or what the epoch changed. */
static const struct rec_blob *blob_of(const struct rec_epoch *rec, enum batch_type *type)
{
	bool own = !rec->chain_epochs && rec->checkpoint.bytes;

	*type = own ? BATCH_CHECKPOINT : BATCH_MANIFEST;
	return own ? &rec->checkpoint : &rec->manifest;
}

static int apply_record(struct store *s, struct pagemap *m, const struct rec_epoch *rec,
			struct snapd_point at, const struct blob_ahead *ahead, struct err *e)
{
	_cleanup_free_ void *bytes = NULL;
	enum batch_type type;
	const struct rec_blob *blob = blob_of(rec, &type);
	struct err why = {0};
	char what[96];
	int r;

	snprintf(what, sizeof(what), "%s of epoch %llu of timeline %llu",
		 type == BATCH_CHECKPOINT ? "checkpoint" : "manifest", (unsigned long long)at.epoch,
		 (unsigned long long)at.timeline);
	if (!blob->bytes)
		return 0;
	r = store_blob_read(s, blob, type, what, ahead, &bytes, e);
	if (!r)
		r = store_map_apply(m, bytes, blob->bytes, &why);
	return why.code ? err_set(e, -r, "%s: %s", what, why.text) : r;
}

/* Oldest first. */
static int apply_chain(struct store *s, struct pagemap *m, const struct chain *c, struct err *e)
{
	struct blob_ahead ahead[AHEAD_MAX];
	enum batch_type type;
	int r = 0;

	for (size_t left = c->nr, n; !r && left; left -= n) {
		_cleanup_free_ uint8_t *memory = NULL;

		n = MIN(left, (size_t)AHEAD_MAX);
		for (size_t i = 0; i < n; i++)
			ahead[i].blob = blob_of(&c->records[left - 1 - i], &type);
		store_blobs_ahead(s, ahead, n, &memory);
		for (size_t i = 0; !r && i < n; i++)
			r = apply_record(s, m, &c->records[left - 1 - i], c->points[left - 1 - i],
					 &ahead[i], e);
	}
	return r;
}

static int chain_find(struct store *s, struct snapd_point at, struct chain *c, struct err *e)
{
	struct ix_txn t;
	int r = index_begin(s->index, &t, e);

	if (r)
		return r;
	c->nr = 0;
	r = chain_load(&t, at, c, e);
	index_end(&t);
	return r;
}

static bool chain_is(const struct chain *a, const struct chain *b)
{
	for (size_t i = 0; a->nr == b->nr && i < a->nr; i++)
		if (!epoch_same_maps(&a->records[i], &b->records[i]))
			return false;
	return a->nr == b->nr;
}

static int map_of_chain(struct store *s, const struct chain *c, bool with_fp, struct pagemap **ret,
			struct err *e)
{
	struct pagemap *m;
	int r;

	if (pagemap_create(with_fp, &m))
		return err_errno(e, ENOMEM, "loading a map");
	r = apply_chain(s, m, c, e);
	if (r)
		pagemap_destroy(m);
	else
		*ret = m;
	return r;
}

/* Without a pin, gc, in another process perhaps, may merge manifests meanwhile (merge.c): then
 * the way is another one. */
int store_map_load(struct store *s, struct snapd_point at, bool with_fp, struct pagemap **ret,
		   struct err *e)
{
	_cleanup_(chain_deinit) struct chain now = {0}, next = {0};
	struct err why = {0};
	int r = chain_find(s, at, &now, &why);

	for (uint32_t i = 0; !r && i < MERGES_MAX; i++) {
		struct chain was;

		r = map_of_chain(s, &now, with_fp, ret, &why);
		if (!r || r == -ENOMEM || chain_find(s, at, &next, NULL) || chain_is(&now, &next))
			break;
		was = now;
		now = next;
		next = was;
		if (i + 1 == MERGES_MAX)
			break;
		err_clear(&why);
		r = 0;
	}
	return why.code ? err_set(e, -r, "%s", why.text) : r;
}

int store_state_load(struct store *s, struct snapd_point at, void **ret, size_t *len, struct err *e)
{
	struct rec_epoch rec;
	struct ix_txn t;
	char what[96];
	int r;

	r = index_begin(s->index, &t, e);
	if (r)
		return r;
	r = store_epoch_record(&t, &at, &rec, e);
	index_end(&t);
	if (r)
		return r < 0 ? r : err_set(e, ENOENT, "an empty timeline has no state");
	snprintf(what, sizeof(what), "state of epoch %llu of timeline %llu",
		 (unsigned long long)at.epoch, (unsigned long long)at.timeline);
	r = store_blob_read(s, &rec.state, BATCH_STATE, what, NULL, ret, e);
	if (!r)
		*len = rec.state.bytes;
	return r;
}

/* ---- the dedup table ---- */

uint64_t store_dedup_domain(const struct store *s, const uint8_t vm[16], uint32_t uid)
{
	switch (s->dedup_domain) {
	case STORE_DEDUP_VM:
		return XXH3_64bits(vm, 16);
	case STORE_DEDUP_OWNER:
		return (uint64_t)uid + 1;
	default:
		return 0;
	}
}

#define SCAN_SEGMENTS 32u
#define SCAN_BYTES    (3u * FMT_BLOCK) /* the largest header of either kind */
#define VM_CACHE      64u
#define PUT_AHEAD     8u /* entries: a start waits for lines of the table, and for little else */

struct scan_seg {
	struct seg *seg; /* open */
	struct seg_ident ident;
	int fd;
	uint32_t block, tail;
	uint8_t *buf; /* borrowed */
};

struct scan {
	struct store *s;
	struct reader *io;
	uint8_t *bufs;
	struct scan_seg segs[SCAN_SEGMENTS];
	uint32_t nr;
	uint32_t next_id;
	/* Owners, as the index knows them. */
	uint8_t vms[VM_CACHE][16];
	uint32_t uids[VM_CACHE];
	uint32_t nr_vms;
};

static bool owner_of(struct scan *sc, const uint8_t vm[16], uint32_t *uid)
{
	struct ix_key k = ix_key_id(vm);
	struct rec_vm rec;
	struct ix_txn t;
	int r;

	for (uint32_t i = 0; i < sc->nr_vms; i++)
		if (!memcmp(sc->vms[i], vm, 16)) {
			*uid = sc->uids[i];
			return true;
		}
	if (index_begin(sc->s->index, &t, NULL))
		return false;
	r = index_get(&t, IX_VMS, &k, &rec, sizeof(rec), NULL, NULL, NULL);
	index_end(&t);
	if (r)
		return false;
	if (sc->nr_vms < VM_CACHE) {
		memcpy(sc->vms[sc->nr_vms], vm, 16);
		sc->uids[sc->nr_vms++] = rec.uid;
	}
	*uid = rec.uid;
	return true;
}

static void scan_batch(struct scan *sc, const struct batch_header *h, const struct batch_page *p)
{
	uint64_t domain;
	uint32_t uid;

	if (!p || !owner_of(sc, h->vm, &uid))
		return;
	domain = store_dedup_domain(sc->s, h->vm, uid);
	for (uint32_t i = 0; i < h->nr_entries; i++) {
		if (i + PUT_AHEAD < h->nr_entries)
			dedup_prefetch(&sc->s->dedup,
				       dedup_key(p[i + PUT_AHEAD].id_lo, domain, h->page_shift));
		if (page_is_gone(&p[i]))
			continue;
		dedup_put(&sc->s->dedup, dedup_key(p[i].id_lo, domain, h->page_shift),
			  loc_make(h->segment, h->block, i));
	}
}

/* The next segment with data into slot `x`; false when there is none. */
static bool scan_open(struct scan *sc, struct scan_seg *x)
{
	struct store *s = sc->s;

	while (sc->next_id < s->nr_segs) {
		uint32_t id = sc->next_id++;
		const struct seg *seg = s->segs[id];

		if (!seg || seg->state == SEG_FREE || seg->tail <= 1 || seg->damaged)
			continue;
		x->tail = seg->tail;
		if (seg_open(s, id, &x->seg, &x->fd, &x->ident, NULL))
			continue;
		x->block = seg_skip_hole(x->fd, &x->ident, 1);
		if (x->block < x->tail)
			return true;
		seg_close(s, x->seg);
	}
	return false;
}

/* A header arrived: use it, step over its batch; false at the segment's end. */
static bool scan_step(struct scan *sc, struct scan_seg *x, int res)
{
	const struct batch_header *h;
	const struct batch_page *p;
	struct err why = {0};

	if (res >= (int)FMT_BLOCK && seg_block_is_hole(&x->ident, x->buf)) {
		x->block = seg_skip_hole(x->fd, &x->ident, x->block + 1);
		return x->block < x->tail;
	}
	if (res < 0 || batch_decode(x->buf, (size_t)res, &x->ident, x->block, &h, &p, &why)) {
		log_warn("store %s: segment %08x is not readable from block %u on: %s", sc->s->dir,
			 x->ident.segment, x->block, res < 0 ? strerror(-res) : why.text);
		return false;
	}
	scan_batch(sc, h, p);
	x->block = seg_skip_hole(x->fd, &x->ident, x->block + batch_blocks(h));
	return x->block < x->tail;
}

static int scan_round(struct scan *sc, struct err *e)
{
	struct read_req reqs[SCAN_SEGMENTS];
	int r;

	for (uint32_t i = 0; i < sc->nr; i++) {
		struct scan_seg *x = &sc->segs[i];
		uint64_t at = (uint64_t)x->block * FMT_BLOCK;

		reqs[i] = (struct read_req){.fd = x->fd,
					    .offset = at,
					    .dst = x->buf,
					    .len = MIN((uint64_t)SCAN_BYTES,
						       x->ident.segment_bytes - at)};
	}
	r = reader_run(sc->io, reqs, sc->nr);
	if (r)
		return err_errno(e, -r, "reading segments of %s", sc->s->dir);
	for (uint32_t i = sc->nr; i-- > 0;) {
		struct scan_seg *x = &sc->segs[i];
		uint8_t *buf = x->buf;

		if (scan_step(sc, x, reqs[i].res))
			continue;
		seg_close(sc->s, x->seg);
		if (scan_open(sc, x))
			continue;
		*x = sc->segs[--sc->nr];
		sc->segs[sc->nr].buf = buf;
	}
	return 0;
}

static int scan_all(struct scan *sc, struct err *e)
{
	int r = 0;

	for (; sc->nr < SCAN_SEGMENTS; sc->nr++) {
		struct scan_seg *x = &sc->segs[sc->nr];

		x->buf = sc->bufs + (size_t)sc->nr * SCAN_BYTES;
		if (!scan_open(sc, x))
			break;
	}
	while (!r && sc->nr)
		r = scan_round(sc, e);
	for (uint32_t i = 0; i < sc->nr; i++)
		seg_close(sc->s, sc->segs[i].seg);
	return r;
}

int store_dedup_rebuild(struct store *s, struct err *e)
{
	_cleanup_free_ struct scan *sc = calloc(1, sizeof(*sc));
	_cleanup_free_ uint8_t *bufs = aligned_alloc(FMT_BLOCK, SCAN_SEGMENTS * SCAN_BYTES);
	int r;

	if (!sc || !bufs)
		return err_errno(e, ENOMEM, "store %s", s->dir);
	sc->s = s;
	sc->bufs = bufs;
	r = reader_create(SCAN_SEGMENTS, &sc->io, e);
	if (r)
		return r;
	r = scan_all(sc, e);
	reader_destroy(sc->io);
	return r;
}
