/* SPDX-License-Identifier: MIT */
/*
 * Batches with records → the records, in the order of seq, into a new index: R1 of
 * rebuild.c.
 */
#include "snapd/store/rebuild_internal.h"

#include <stdio.h>
#include <string.h>

#include "snapd/store/reclog.h"

/* ---- found and read ---- */

static bool has_records(const struct found *x)
{
	return x->type == BATCH_EPOCH || x->type == BATCH_INDEX;
}

static void find_last_parts(struct rebuild *b)
{
	for (size_t i = 0; i < b->nr_found; i++) {
		struct found *before = has_records(&b->found[i]) ? rebuild_find(b, b->found[i].prev)
								 : NULL;

		if (before)
			before->followed = true;
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

int rebuild_read_records(struct rebuild *b, struct err *e)
{
	find_last_parts(b);
	for (size_t i = 0; i < b->nr_found; i++) {
		const struct found *p = &b->found[i];
		struct records x = {.at = p->at, .seq = p->seq, .type = p->type};
		struct err why = {0};
		int r;

		if (!has_records(p) || p->followed)
			continue;
		r = store_blob_read_from(b->s, p->at, p->type, &x.bytes, &x.len, &why);
		if (!r)
			r = look_through(b, &x, &why);
		if (r == -ENOMEM || (!r && array_grow(b->records, b->nr_records, b->cap_records))) {
			free(x.bytes);
			return rebuild_no_memory(e);
		}
		if (r) {
			b->ret->damages++;
			rebuild_tell(b, "segment %08x block %u: index records can't be read: %s",
				     p->at.segment, p->at.block, why.text);
			free(x.bytes);
			continue;
		}
		rebuild_use_blob(b, p->at);
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

int rebuild_find_identity(struct rebuild *b, struct err *e)
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

/* As they were; of a store that has none, from what was found. */
static int put_features(struct rebuild *b, struct ix_txn *t, struct err *e)
{
	static const struct ix_key key = {.b = "features", .len = 8};
	struct store *s = b->s;
	struct rec_features rec;
	const void *names;
	size_t len;

	if (!newest_meta(b, "features", &rec, sizeof(rec), &names, &len))
		return index_put(t, IX_META, &key, &rec, sizeof(rec), names, len, e);
	s->features = rebuild_features_found(b) | (s->seal ? 1u << FEATURE_SEALED : 0);
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

static int apply_one(struct rebuild *b, struct ix_txn *t, const struct records *from,
		     const struct reclog_record *x, struct err *e)
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
	if (!r && x->db == IX_EPOCHS && from->type == BATCH_EPOCH)
		rec.epoch.record = from->at; /* its own place is not in a batch */
	return r ? r : index_put(t, x->db, &k, &rec, size_of(x->db), tail, tail_len, e);
}

/* R1 */
static bool is_wanted(struct rebuild *b, struct ix_txn *t, const struct records *x)
{
	struct reclog_reader reader;
	struct reclog_record rec;

	if (!b->image || x->seq > b->image->seq)
		return true;
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

		r = apply_one(b, t, x, &rec, &why);
		if (r == -E_CORRUPT || r == -EPROTO) {
			if (b->replayed)
				continue;
			b->ret->damages++;
			rebuild_tell(b, "batch %llu: %s", (unsigned long long)x->seq, why.text);
		} else if (r) {
			return err_set(e, -r, "%s", why.text);
		}
	}
	return r;
}

/* May run several times, when the map grows; what is damaged is told once. */
int rebuild_replay(struct ix_txn *t, void *arg, struct err *e)
{
	static const struct ix_key key = {.b = "store", .len = 5};
	struct rebuild *b = arg;
	int r = index_put(t, IX_META, &key, &b->s->record, sizeof(b->s->record), NULL, 0, e);

	if (!r)
		r = put_features(b, t, e);
	if (!r && b->image)
		r = apply(b, t, b->image, e);
	for (size_t i = 0; !r && i < b->nr_records; i++)
		if (is_wanted(b, t, &b->records[i]))
			r = apply(b, t, &b->records[i], e);
	b->replayed = true;
	return r;
}
