/* SPDX-License-Identifier: MIT */
/*
 * The index from the segments; see rebuild.h.
 *
 *   superblocks → which segments are the store's, in which life
 *   batches     → tails, page counts, where index records are
 *   records     → in the order of seq into a new index
 *   epochs      → those whose manifests and states can be read stay
 *
 * Records come from EPOCH and INDEX batches (journal.c).  The newest image counts, then:
 *
 *   R1 an INDEX batch, if it is newer than the image;
 *   R2 an EPOCH batch, if it is newer, or its timeline is in the image with an earlier
 *      epoch for its last one: it was on its way while the image was made.
 *   R3 In a store without a journal, an epoch one of whose pages is not where its manifest
 *      says, in a batch older than its record, is one that gc took, and is left out.
 *
 * Only batches that were committed are found: what a crash or a failure left is cleared
 * before anything else is written (J2 of journal.c).  The one exception is an epoch in
 * doubt when the index was lost: it is there, or not.
 *
 * All segments are sealed, their tails behind the last batch that something leads to.
 */
#include "snapd/store/rebuild.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "snapd/store/internal.h"
#include "snapd/store/manifest.h"
#include "snapd/store/point.h"
#include "snapd/store/reclog.h"
#include "snapd/store/walk.h"

/* A batch. */
struct found {
	struct batch_ref at, prev;
	uint32_t blocks, nr_entries; /* entries: of PAGES */
	enum batch_type type;
	bool followed; /* a blob's part, and not its last one */
	bool used;     /* something leads to it */
	uint64_t seq;
};

/* Blocks [from, to) hold no batch, and one follows. */
struct gap {
	uint32_t segment, from, to;
};

struct records { /* of a batch */
	uint64_t seq;
	enum batch_type type;
	bool image;
	void *bytes; /* owned */
	size_t len;
};

struct epoch_at {
	struct snapd_point at, ancestor;
	bool valid;
};

struct rebuild {
	struct store *s;
	const struct rebuild_config *c;
	struct rebuild_result *ret;
	struct found *found; /* owned; by place */
	size_t nr_found, cap_found;
	struct gap *gaps; /* owned */
	size_t nr_gaps, cap_gaps;
	struct records *records; /* owned, with their bytes; by seq */
	size_t nr_records, cap_records;
	const struct records *image; /* the newest; NULL: none */
	struct epoch_at *epochs;     /* owned; ascending */
	size_t nr_epochs, cap_epochs;
	struct rec_counters counters; /* at least */
	uint32_t codecs;	      /* bits: enum page_codec */
	bool replayed;
};

static void rebuild_deinit(struct rebuild *b)
{
	for (size_t i = 0; i < b->nr_records; i++)
		free(b->records[i].bytes);
	free(b->records);
	free(b->found);
	free(b->gaps);
	free(b->epochs);
	store_close(b->s);
}

__attribute__((format(printf, 2, 3))) static void tell(const struct rebuild *b, const char *fmt,
						       ...)
{
	char line[480];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	if (b->c->tell)
		b->c->tell(b->c->opaque, line);
}

static int no_memory(struct err *e)
{
	return err_errno(e, ENOMEM, "rebuilding the index");
}

/* ---- superblocks ---- */

static int open_segment(const struct rebuild *b, uint32_t id, uint64_t *bytes)
{
	char name[16];
	struct stat st;
	int fd;

	seg_path(id, name);
	fd = openat(b->s->segments_fd, name, O_RDONLY | O_CLOEXEC);
	if (fd >= 0 && fstat(fd, &st)) {
		close(fd);
		return -1;
	}
	*bytes = fd < 0 ? 0 : (uint64_t)st.st_size / FMT_BLOCK * FMT_BLOCK;
	return fd;
}

/* Its superblock; 1: that can't be used. */
static int read_super(const struct rebuild *b, uint32_t id, struct seg_ident *ret)
{
	_Alignas(FMT_BLOCK) uint8_t block[FMT_BLOCK];
	uint64_t bytes;
	_cleanup_fd_ int fd = open_segment(b, id, &bytes);

	if (fd < 0 || pread(fd, block, sizeof(block), 0) != sizeof(block) ||
	    seg_super_decode(block, ret, NULL) || ret->segment != id)
		return 1;
	return 0;
}

/* Whose the store is: the UUID of most superblocks. */
static int find_uuid(struct rebuild *b, const uint32_t *ids, size_t nr, struct err *e)
{
	uint32_t best = 0;

	if (b->s->seal) {
		memcpy(b->s->uuid, seal_uuid(b->s->seal), sizeof(b->s->uuid));
		return 0;
	}
	for (size_t i = 0; i < nr; i++) {
		struct seg_ident x, y;
		uint32_t same = 0;

		if (read_super(b, ids[i], &x) || !memcmp(x.store, b->s->uuid, sizeof(x.store)))
			continue;
		for (size_t k = i; k < nr; k++)
			same += !read_super(b, ids[k], &y) &&
				!memcmp(x.store, y.store, sizeof(x.store));
		if (same > best) {
			best = same;
			memcpy(b->s->uuid, x.store, sizeof(x.store));
		}
	}
	return best ? 0
		    : err_set(e, ENOENT,
			      "store %s: no segment has a superblock: there is nothing "
			      "to make an index of",
			      b->s->dir);
}

/* Behind a superblock that is damaged: the life that its first batch tells of. */
static int find_generation(const struct rebuild *b, struct seg_ident *ident)
{
	_cleanup_free_ uint8_t *buf = aligned_alloc(FMT_BLOCK, batch_header_max(b->s->seal));
	_cleanup_fd_ int fd = open_segment(b, ident->segment, &ident->segment_bytes);

	if (!buf || fd < 0)
		return 1;
	for (uint64_t block = 1; block < ident->segment_bytes / FMT_BLOCK; block++) {
		const struct batch_header *h = (const struct batch_header *)buf;
		const struct batch_page *pages;
		ssize_t n =
			pread(fd, buf, batch_header_max(b->s->seal), (off_t)(block * FMT_BLOCK));

		if (n < (ssize_t)sizeof(*h) || h->magic != BATCH_MAGIC)
			continue;
		ident->generation = h->generation;
		if (!batch_decode(buf, (size_t)n, ident, (uint32_t)block, &h, &pages, NULL))
			return 0;
	}
	return 1;
}

static int add_segment(struct rebuild *b, uint32_t id, struct err *e)
{
	struct seg_ident ident = {.segment = id}, want = {.segment = id, .seal = b->s->seal};
	struct seg *seg;

	memcpy(want.store, b->s->uuid, sizeof(want.store));
	if (read_super(b, id, &ident)) {
		b->ret->damages++;
		if (find_generation(b, &want)) {
			tell(b, "segment %08x: neither its superblock nor a batch can be read", id);
			return 0;
		}
		tell(b, "segment %08x: its superblock is damaged, its batches are used", id);
		ident = want;
	} else if (memcmp(ident.store, want.store, sizeof(want.store)) != 0) {
		b->ret->damages++;
		tell(b, "segment %08x: the file is one of another store", id);
		return 0;
	}
	if (id > SEG_ID_MAX || ident.segment_bytes < SEG_BYTES_MIN ||
	    ident.segment_bytes > SEG_BYTES_MAX || ident.segment_bytes % FMT_BLOCK) {
		b->ret->damages++;
		tell(b, "segment %08x: it can't have %llu bytes", id,
		     (unsigned long long)ident.segment_bytes);
		return 0;
	}
	if (seg_add(b->s, id, &seg))
		return no_memory(e);
	seg->generation = ident.generation;
	seg->segment_bytes = ident.segment_bytes;
	seg->tail = (uint32_t)(ident.segment_bytes / FMT_BLOCK);
	seg->state = SEG_SEALED;
	b->ret->segments++;
	return 0;
}

static int find_segments(struct rebuild *b, struct err *e)
{
	_cleanup_free_ uint32_t *ids = NULL;
	size_t nr = 0;
	int r = space_list(b->s, &ids, &nr, e);

	if (!r)
		r = find_uuid(b, ids, nr, e);
	for (size_t i = 0; !r && i < nr; i++)
		r = add_segment(b, ids[i], e);
	return r;
}

/* ---- batches ---- */

static int note_batch(struct rebuild *b, const struct batch_header *h,
		      const struct batch_page *pages, struct err *e)
{
	if (array_grow(b->found, b->nr_found, b->cap_found))
		return no_memory(e);
	b->found[b->nr_found++] = (struct found){.at = {h->segment, h->block},
						 .prev = pages ? (struct batch_ref){0} : h->prev,
						 .blocks = batch_blocks(h),
						 .nr_entries = pages ? h->nr_entries : 0,
						 .type = h->type,
						 .seq = h->seq};
	b->ret->batches++;
	b->counters.next_seq = MAX(b->counters.next_seq, h->seq + 1);
	for (uint32_t i = 0; pages && i < h->nr_entries; i++)
		b->codecs |= 1u << page_codec(&pages[i]);
	return 0;
}

static int walk_segment(struct rebuild *b, const struct seg *seg, struct seg_walk *w, struct err *e)
{
	struct gap gap = {.segment = seg->id};

	for (;;) {
		const struct batch_page *pages;
		const struct batch_header *h;
		uint32_t at;
		int r = seg_walk_next(w, &at, &h, &pages, NULL);

		if (!r)
			return 0;
		if (r < 0) {
			gap.from = at;
			gap.to = w->block;
			continue;
		}
		if (gap.to && array_grow(b->gaps, b->nr_gaps, b->cap_gaps))
			return no_memory(e);
		if (gap.to)
			b->gaps[b->nr_gaps++] = gap;
		gap.to = 0;
		r = note_batch(b, h, pages, e);
		if (r)
			return r;
	}
}

static int walk_segments(struct rebuild *b, struct err *e)
{
	for (uint32_t i = 0; i < b->s->nr_segs; i++) {
		_cleanup_(seg_walk_deinit) struct seg_walk w = {0};
		struct seg_ident ident;
		struct seg *seg;
		int fd, r;

		if (!b->s->segs[i])
			continue;
		r = seg_open(b->s, i, &seg, &fd, &ident, e);
		if (r)
			return r;
		r = seg_walk_init(&w, fd, &ident, (uint32_t)(ident.segment_bytes / FMT_BLOCK))
			    ? no_memory(e)
			    : walk_segment(b, seg, &w, e);
		seg_close(b->s, seg);
		if (r)
			return r;
	}
	return 0;
}

/* ---- records ---- */

static uint64_t place(struct batch_ref at)
{
	return (uint64_t)at.segment << 32 | at.block;
}

static int compare_found(const void *a, const void *b)
{
	uint64_t x = place(((const struct found *)a)->at), y = place(((const struct found *)b)->at);

	return x < y ? -1 : x > y;
}

static struct found *find(const struct rebuild *b, struct batch_ref at)
{
	struct found key = {.at = at};

	if (!at.block || !b->nr_found)
		return NULL;
	return bsearch(&key, b->found, b->nr_found, sizeof(key), compare_found);
}

static bool has_records(const struct found *x)
{
	return x->type == BATCH_EPOCH || x->type == BATCH_INDEX;
}

static void find_last_parts(struct rebuild *b)
{
	for (size_t i = 0; i < b->nr_found; i++) {
		struct found *before = has_records(&b->found[i]) ? find(b, b->found[i].prev) : NULL;

		if (before)
			before->followed = true;
	}
}

/* All parts of a blob; each was written before the one that leads to it. */
static void use_blob(struct rebuild *b, struct batch_ref at)
{
	struct found *x = find(b, at);

	for (uint64_t seq = UINT64_MAX; x && x->seq < seq; x = find(b, x->prev)) {
		x->used = true;
		seq = x->seq;
	}
}

/* Intact to its end, and whether it is an image. */
static int look_through(struct rebuild *b, struct records *x, struct err *e)
{
	struct reclog_reader reader;
	struct reclog_record rec;
	struct rec_journal kind;
	int r;

	reclog_reader_init(&reader, x->bytes, x->len);
	while ((r = reclog_next(&reader, &rec, e)) > 0) {
		if (rec.db != IX_META || rec.removed || rec.key_len != 7 ||
		    memcmp(rec.key, "journal", 7) != 0)
			continue;
		b->ret->journalled = true;
		if (rec.len >= sizeof(kind)) {
			memcpy(&kind, rec.value, sizeof(kind));
			x->image = x->type == BATCH_INDEX && kind.image;
		}
	}
	return r;
}

static int compare_records(const void *a, const void *b)
{
	const struct records *x = a, *y = b;

	return x->seq < y->seq ? -1 : x->seq > y->seq;
}

static int read_records(struct rebuild *b, struct err *e)
{
	find_last_parts(b);
	for (size_t i = 0; i < b->nr_found; i++) {
		const struct found *p = &b->found[i];
		struct records x = {.seq = p->seq, .type = p->type};
		struct err why = {0};
		int r;

		if (!has_records(p) || p->followed)
			continue;
		r = store_blob_read_from(b->s, p->at, p->type, &x.bytes, &x.len, &why);
		if (!r)
			r = look_through(b, &x, &why);
		if (r == -ENOMEM || (!r && array_grow(b->records, b->nr_records, b->cap_records))) {
			free(x.bytes);
			return no_memory(e);
		}
		if (r) {
			b->ret->damages++;
			tell(b, "segment %08x block %u: index records can't be read: %s",
			     p->at.segment, p->at.block, why.text);
			free(x.bytes);
			continue;
		}
		use_blob(b, p->at);
		b->records[b->nr_records++] = x;
		b->ret->records++;
	}
	if (!b->nr_records)
		return err_set(e, ENOENT,
			       "store %s: no epoch was ever committed to its segments, or none can "
			       "be read: there is nothing to make an index of",
			       b->s->dir);
	qsort(b->records, b->nr_records, sizeof(*b->records), compare_records);
	for (size_t i = 0; i < b->nr_records; i++)
		if (b->records[i].image)
			b->image = &b->records[i];
	return 0;
}

/* ---- identity ---- */

static struct ix_key key_of(const struct reclog_record *rec)
{
	struct ix_key k = {.len = rec->key_len};

	memcpy(k.b, rec->key, rec->key_len); /* reclog_next() looked at its length */
	return k;
}

static bool is_meta(const struct reclog_record *rec, const char *name)
{
	return rec->db == IX_META && !rec->removed && rec->key_len == strlen(name) &&
	       !memcmp(rec->key, name, rec->key_len);
}

/* The newest record of that name that is valid.  -ENOENT. */
static int newest_meta(struct rebuild *b, const char *name, void *rec, size_t size,
		       const void **tail, size_t *tail_len)
{
	for (size_t i = b->nr_records; i-- > 0;) {
		struct reclog_reader reader;
		struct reclog_record x;

		reclog_reader_init(&reader, b->records[i].bytes, b->records[i].len);
		while (reclog_next(&reader, &x, NULL) > 0) {
			struct ix_key k = key_of(&x);

			if (is_meta(&x, name) &&
			    !index_unpack(b->s->index, IX_META, &k, x.value, x.len, rec, size, tail,
					  tail_len, NULL))
				return 0;
		}
	}
	return -ENOENT;
}

static int find_identity(struct rebuild *b, struct err *e)
{
	struct rec_store *store = &b->s->record;

	if (newest_meta(b, "store", store, sizeof(*store), NULL, NULL))
		return err_set(e, E_CORRUPT, "store %s: no record of its identity can be read",
			       b->s->dir);
	if (store->major != FMT_MAJOR)
		return err_set(e, EPROTO, "store %s has format %u.%u; this snapd knows %u.x",
			       b->s->dir, store->major, store->minor, FMT_MAJOR);
	if (memcmp(store->uuid, b->s->uuid, sizeof(store->uuid)) != 0)
		return err_set(e, E_CORRUPT, "store %s: its records are of another store",
			       b->s->dir);
	if (b->s->seal)
		seal_page_secret(b->s->seal, &b->s->secret);
	else
		memcpy(b->s->secret.b, store->secret, sizeof(b->s->secret.b));
	return 0;
}

/* As they were; of a store that has no journal, from what was found. */
static int put_features(struct rebuild *b, struct ix_txn *t, struct err *e)
{
	static const struct ix_key key = {.b = "features", .len = 8};
	struct store *s = b->s;
	struct rec_features rec;
	const void *names;
	size_t len;

	if (!newest_meta(b, "features", &rec, sizeof(rec), &names, &len))
		return index_put(t, IX_META, &key, &rec, sizeof(rec), names, len, e);
	s->features = s->seal ? 1u << FEATURE_SEALED : 0;
	s->features |= b->codecs & 1u << CODEC_LZ4 ? 1u << FEATURE_LZ4 : 0;
	s->features |= b->codecs & 1u << CODEC_ZSTD ? 1u << FEATURE_ZSTD : 0;
	s->policy = (struct codec_policy){.codec = CODEC_RAW};
	if (b->codecs & 1u << CODEC_LZ4)
		s->policy.codec = CODEC_LZ4;
	return features_put(t, s, e);
}

/* ---- into the new index ---- */

union any_record {
	struct rec_head head;
	struct rec_vm vm;
	struct rec_timeline timeline;
	struct rec_epoch epoch;
	struct rec_snapshot snapshot;
};

static size_t size_of(uint32_t db)
{
	switch (db) {
	case IX_VMS:
		return sizeof(struct rec_vm);
	case IX_TIMELINES:
		return sizeof(struct rec_timeline);
	case IX_EPOCHS:
		return sizeof(struct rec_epoch);
	case IX_SNAPSHOTS:
		return sizeof(struct rec_snapshot);
	default:
		return 0;
	}
}

static size_t key_size_of(uint32_t db)
{
	return db == IX_VMS || db == IX_EPOCHS ? 16 : 8;
}

static void raise_counters(struct rebuild *b, const struct reclog_record *rec,
			   const struct ix_key *k)
{
	struct rec_counters c;

	if (is_meta(rec, "counters") && !index_unpack(b->s->index, IX_META, k, rec->value, rec->len,
						      &c, sizeof(c), NULL, NULL, NULL)) {
		b->counters.next_timeline = MAX(b->counters.next_timeline, c.next_timeline);
		b->counters.next_snapshot = MAX(b->counters.next_snapshot, c.next_snapshot);
	} else if (rec->db == IX_TIMELINES) {
		b->counters.next_timeline = MAX(b->counters.next_timeline, ix_be64(k->b) + 1);
	} else if (rec->db == IX_SNAPSHOTS) {
		b->counters.next_snapshot = MAX(b->counters.next_snapshot, ix_be64(k->b) + 1);
	}
}

static int apply_one(struct rebuild *b, struct ix_txn *t, const struct reclog_record *x,
		     struct err *e)
{
	struct ix_key k = key_of(x);
	union any_record rec;
	const void *tail;
	size_t tail_len;
	int r;

	if (size_of(x->db) && x->key_len != key_size_of(x->db))
		return err_set(e, E_CORRUPT, "an index record has an impossible key");
	raise_counters(b, x, &k);
	if (!size_of(x->db))
		return 0;
	if (x->removed)
		return index_del(t, x->db, &k, e);
	r = index_unpack(b->s->index, x->db, &k, x->value, x->len, &rec, size_of(x->db), &tail,
			 &tail_len, e);
	return r ? r : index_put(t, x->db, &k, &rec, size_of(x->db), tail, tail_len, e);
}

/* R2 */
static int is_wanted(struct rebuild *b, struct ix_txn *t, const struct records *x)
{
	struct reclog_reader reader;
	struct reclog_record rec;

	if (!b->image || x->seq > b->image->seq)
		return true;
	if (x->type == BATCH_INDEX)
		return false; /* R1 */
	reclog_reader_init(&reader, x->bytes, x->len);
	while (reclog_next(&reader, &rec, NULL) > 0) {
		struct rec_timeline known;
		struct ix_key k;

		if (rec.db != IX_EPOCHS || rec.removed || rec.key_len != 16)
			continue;
		k = ix_key_u64(ix_be64(rec.key));
		return !index_get(t, IX_TIMELINES, &k, &known, sizeof(known), NULL, NULL, NULL) &&
		       ix_be64((const uint8_t *)rec.key + 8) > known.last;
	}
	return false;
}

static int apply(struct rebuild *b, struct ix_txn *t, const struct records *x, struct err *e)
{
	struct reclog_reader reader;
	struct reclog_record rec;
	int r;

	reclog_reader_init(&reader, x->bytes, x->len);
	while ((r = reclog_next(&reader, &rec, e)) > 0) {
		struct err why = {0};

		r = apply_one(b, t, &rec, &why);
		if (r == -E_CORRUPT || r == -EPROTO) {
			if (b->replayed)
				continue;
			b->ret->damages++;
			tell(b, "batch %llu: %s", (unsigned long long)x->seq, why.text);
		} else if (r) {
			return err_set(e, -r, "%s", why.text);
		}
	}
	return r;
}

/* May run several times, when the map grows; what is damaged is told once. */
static int replay_txn(struct ix_txn *t, void *arg, struct err *e)
{
	static const struct ix_key key = {.b = "store", .len = 5};
	struct rebuild *b = arg;
	int r = index_put(t, IX_META, &key, &b->s->record, sizeof(b->s->record), NULL, 0, e);

	if (!r)
		r = put_features(b, t, e);
	if (!r && b->image)
		r = apply(b, t, b->image, e);
	for (size_t i = 0; !r && i < b->nr_records; i++)
		if (&b->records[i] != b->image && is_wanted(b, t, &b->records[i]))
			r = apply(b, t, &b->records[i], e);
	b->replayed = true;
	return r;
}

/* ---- which epochs are whole ---- */

static struct found *find_pages(const struct rebuild *b, const struct manifest_run *run)
{
	struct batch_ref at = {loc_segment(run->loc), loc_block(run->loc)};
	struct found *x = find(b, at);

	return x && loc_entry(run->loc) + run->len <= x->nr_entries ? x : NULL;
}

/* A manifest or checkpoint: can it be read, and (R3) is all there that it names, older than
 * the record; use: everything of it is used. */
static bool map_is_whole(struct rebuild *b, const struct rec_blob *blob, enum batch_type type,
			 uint64_t before, bool use)
{
	_cleanup_free_ void *bytes = NULL;
	struct manifest_reader reader;
	struct manifest_run run;
	int r;

	if (!blob->bytes)
		return true;
	if (store_blob_read(b->s, blob, type, "map", NULL, &bytes, NULL))
		return false;
	manifest_reader_init(&reader, bytes, blob->bytes);
	while ((r = manifest_next(&reader, &run, NULL)) > 0) {
		struct found *x = loc_kind(run.loc) == LOC_PAGE ? find_pages(b, &run) : NULL;

		if (x && use)
			x->used = true;
		if (loc_kind(run.loc) == LOC_PAGE && !b->ret->journalled &&
		    (!x || x->seq >= before))
			return false;
	}
	return !r;
}

static bool state_is_whole(struct rebuild *b, const struct rec_blob *blob)
{
	_cleanup_free_ void *bytes = NULL;

	return !blob->bytes ||
	       !store_blob_read(b->s, blob, BATCH_STATE, "state", NULL, &bytes, NULL);
}

static struct epoch_at *find_epoch(const struct rebuild *b, struct snapd_point at)
{
	return find_point(b->epochs, b->nr_epochs, sizeof(*b->epochs), at);
}

static bool epoch_is_whole(struct rebuild *b, const struct rec_epoch *rec, bool use)
{
	const struct found *record = find(b, rec->record);
	uint64_t before = record ? record->seq : UINT64_MAX;

	return map_is_whole(b, &rec->manifest, BATCH_MANIFEST, before, use) &&
	       map_is_whole(b, &rec->checkpoint, BATCH_CHECKPOINT, before, use) &&
	       (use || state_is_whole(b, &rec->state));
}

/* Parents come before: a fork has a higher number than what it forks from. */
static int look_at_epoch(struct rebuild *b, const struct ix_key *k, const struct rec_epoch *rec,
			 struct err *e)
{
	struct epoch_at x = {.at = {ix_be64(k->b), ix_be64(k->b + 8)}, .ancestor = rec->ancestor};
	const struct epoch_at *parent = rec->chain_epochs ? find_epoch(b, rec->parent) : NULL;

	x.valid = (!rec->chain_epochs || (parent && parent->valid)) &&
		  epoch_is_whole(b, rec, false);
	if (x.valid) {
		epoch_is_whole(b, rec, true);
		use_blob(b, rec->manifest.last);
		use_blob(b, rec->checkpoint.last);
		use_blob(b, rec->state.last);
		use_blob(b, rec->record);
	}
	if (array_grow(b->epochs, b->nr_epochs, b->cap_epochs))
		return no_memory(e);
	b->epochs[b->nr_epochs++] = x;
	return 0;
}

static int look_at_epochs(struct rebuild *b, struct err *e)
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
		r = array_grow(*ret, *nr, cap) ? no_memory(e) : 0;
		if (!r)
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
static void find_tails(struct rebuild *b)
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
		pages += x->nr_entries;
		if (!x->used)
			continue;
		seg->tail = x->at.block + x->blocks;
		seg->pages = pages;
	}
}

static void tell_gaps(struct rebuild *b)
{
	for (size_t i = 0; i < b->nr_gaps; i++) {
		const struct gap *x = &b->gaps[i];

		if (x->from >= b->s->segs[x->segment]->tail)
			continue;
		b->ret->damages++;
		tell(b, "segment %08x blocks %u to %u: no batch can be read", x->segment, x->from,
		     x->to - 1);
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

static int settle_txn(struct ix_txn *t, void *arg, struct err *e)
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

/* Before they are dropped. */
static int tell_lost(struct rebuild *b, struct err *e)
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
		tell(b,
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

static int count(struct rebuild *b, struct err *e)
{
	struct ix_txn t;
	int r = index_begin(b->s->index, &t, e);

	if (r)
		return r;
	r = index_count(&t, IX_VMS, &b->ret->vms, e);
	if (!r)
		r = index_count(&t, IX_TIMELINES, &b->ret->timelines, e);
	if (!r)
		r = index_count(&t, IX_EPOCHS, &b->ret->epochs, e);
	if (!r)
		r = index_count(&t, IX_SNAPSHOTS, &b->ret->snapshots, e);
	index_end(&t);
	return r;
}

static int fill(struct store *s, void *arg, struct err *e)
{
	struct rebuild *b = arg;
	int r = find_identity(b, e);

	if (!r)
		r = index_update(s->index, replay_txn, b, e);
	if (!r)
		r = look_at_epochs(b, e);
	if (!r)
		r = tell_lost(b, e);
	if (!r) {
		find_tails(b);
		tell_gaps(b);
	}
	if (!r)
		r = index_update(s->index, settle_txn, b, e);
	return r ? r : count(b, e);
}

int store_rebuild_index(const struct rebuild_config *c, struct rebuild_result *ret, struct err *e)
{
	_cleanup_(rebuild_deinit) struct rebuild b = {
		.c = c,
		.ret = ret,
		.counters = {.next_timeline = 1, .next_snapshot = 1, .next_seq = 1}};
	int r;

	*ret = (struct rebuild_result){0};
	r = store_open_bare(c->dir, c->key_file, &b.s, e);
	if (!r)
		r = find_segments(&b, e);
	if (!r)
		r = walk_segments(&b, e);
	if (!r)
		r = read_records(&b, e);
	if (!r)
		r = store_make_index(b.s, fill, &b, e);
	if (!r)
		r = store_swap_index(b.s, e);
	if (!r && !ret->journalled)
		tell(&b, "this store has no journal: names, notes, tags and pins are as when the "
			 "snapshots were taken, and what was deleted may be back");
	return r;
}
