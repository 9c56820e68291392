/* SPDX-License-Identifier: MIT */
/*
 * journal: what the index learns other than by an epoch's commit goes to the segments
 * as well, so that the index can be made again from them (rebuild.c).
 *
 * An EPOCH batch has the records of its epoch.  An INDEX batch has those that another
 * transaction put and removed; or, now and then, it is an *image*: all records, which
 * makes the INDEX batches before it useless.  Names and segments are not in it: they
 * follow from the others, and from the batches.
 *
 *   J1 An INDEX batch is written, and synced, inside its transaction: while it waits for
 *      the disk nobody else commits, so the order of seq is the order of commits.
 *   J2 A batch with records that was not committed is not left behind: append_deinit()
 *      takes its header away, and at start so does space_recover() (C9 of docs/crash.md).
 *   J3 The segments that the batches lie in, from the last image on, are in the record
 *      "journal"; gc leaves them alone.
 *   J4 Where no room is left for the batch, the transaction is done without: space must
 *      come back on a full disk.  Then the record asks for an image, which the next
 *      transaction, or the end of gc, writes.  Only store_update_whole() fails.
 *
 * Registered VMs and new timelines are not worth a batch: the first epoch has them.
 *
 * Threads: any.
 */
#include "snapd/store/internal.h"

#include <string.h>

#include "snapd/store/reclog.h"
#include "snapd/util/log.h"

#define DELTAS_MAX 256u /* INDEX batches between two images */

static const struct ix_key key_journal = {.b = "journal", .len = 7};
static const enum index_db journalled[] = {IX_VMS, IX_TIMELINES, IX_EPOCHS, IX_SNAPSHOTS};

struct update {
	struct store *s;
	int (*fn)(struct ix_txn *t, void *arg, struct err *e);
	void *arg;
	bool image;	   /* wanted in any case */
	bool whole;	   /* no J4 */
	struct reclog log; /* owned */
	bool appending;	   /* `a` is there */
	bool written;	   /* and has the batch */
	struct appender a;
	struct seg_refs refs; /* owned: the journal's segments afterwards */
	size_t txn_id;	      /* that has them */
	bool stale;	      /* J4 */
};

static void update_reset(struct update *u)
{
	if (u->appending)
		append_deinit(&u->a);
	u->appending = u->written = u->stale = false;
	reclog_reset(&u->log);
	free(u->refs.bits);
	u->refs = (struct seg_refs){0};
}

static void update_deinit(struct update *u)
{
	update_reset(u);
	reclog_deinit(&u->log);
}

/* ---- the record ---- */

static int read_record(struct ix_txn *t, struct rec_journal *rec, struct seg_refs *refs,
		       struct err *e)
{
	const uint8_t *tail;
	size_t len;
	int r = index_get(t, IX_META, &key_journal, rec, sizeof(*rec), (const void **)&tail, &len,
			  e);

	for (size_t i = 0; !r && i + 4 <= len; i += 4) {
		uint32_t id;

		memcpy(&id, tail + i, sizeof(id));
		if (id > SEG_ID_MAX)
			return err_set(e, E_CORRUPT, "the journal is in a segment %08x", id);
		if (seg_refs_add(refs, id))
			return err_errno(e, ENOMEM, "journal");
	}
	return r;
}

static int put_record(struct ix_txn *t, struct rec_journal *rec, const struct seg_refs *refs,
		      struct err *e)
{
	_cleanup_free_ uint32_t *ids = calloc(refs->nr + 1, sizeof(*ids));
	size_t nr = 0;

	if (!ids)
		return err_errno(e, ENOMEM, "journal");
	for (uint32_t i = 0; i < refs->nr; i++)
		if (seg_refs_has(refs, i))
			ids[nr++] = i;
	return index_put(t, IX_META, &key_journal, rec, sizeof(*rec), ids, nr * sizeof(*ids), e);
}

int journal_put_empty(struct ix_txn *t, struct err *e)
{
	struct rec_journal rec = {0};

	return index_put(t, IX_META, &key_journal, &rec, sizeof(rec), NULL, 0, e);
}

/* ---- the batch ---- */

/* Identity, features, counters, and what kind of batch it is. */
int journal_begin(struct store *s, struct ix_txn *t, bool image, struct reclog *log, struct err *e)
{
	struct ix_key sk = {.b = "store", .len = 5}, ck = {.b = "counters", .len = 8};
	struct rec_journal kind = {.image = image};
	struct rec_store store = s->record;
	struct rec_counters counters;
	int r = index_get(t, IX_META, &ck, &counters, sizeof(counters), NULL, NULL, e);

	if (r)
		return r;
	index_seal(s->index, IX_META, &sk, &store, sizeof(store), NULL, 0);
	index_seal(s->index, IX_META, &ck, &counters, sizeof(counters), NULL, 0);
	index_seal(s->index, IX_META, &key_journal, &kind, sizeof(kind), NULL, 0);
	r = reclog_add(log, IX_META, sk.b, sk.len, &store, sizeof(store), NULL, 0);
	if (!r)
		r = reclog_add(log, IX_META, ck.b, ck.len, &counters, sizeof(counters), NULL, 0);
	if (!r)
		r = reclog_add(log, IX_META, key_journal.b, key_journal.len, &kind, sizeof(kind),
			       NULL, 0);
	if (!r)
		r = features_log(s, log);
	return r ? err_errno(e, -r, "journal") : 0;
}

static int make_image(struct update *u, struct ix_txn *t, struct err *e)
{
	int r = 0;

	reclog_reset(&u->log);
	for (size_t i = 0; !r && i < ARRAY_SIZE(journalled); i++)
		r = index_dump(t, journalled[i], &u->log, e);
	return r;
}

static int append_log(struct update *u, struct ix_txn *t, bool image, struct err *e)
{
	_cleanup_(reclog_deinit) struct reclog all = {0};
	static const uint8_t nobody[16];
	struct rec_blob blob;
	int r = journal_begin(u->s, t, image, &all, e);

	if (!r && u->log.len && reclog_add_all(&all, &u->log))
		r = err_errno(e, ENOMEM, "journal");
	if (r)
		return r;
	u->appending = true;
	r = append_init(&u->a, u->s, nobody, (struct snapd_point){0}, 12, e);
	if (!r)
		r = append_blob(&u->a, BATCH_INDEX, all.bytes, all.len, &blob, e);
	if (!r)
		r = append_sync(&u->a, e);
	u->written = !r;
	return r;
}

static int note_segments(struct update *u)
{
	int r = 0;

	for (size_t i = 0; !r && i < u->a.nr_segs; i++)
		r = seg_refs_add(&u->refs, u->a.segs[i].ident.segment);
	return r;
}

static int write_journal(struct update *u, struct ix_txn *t, struct err *e)
{
	struct err why = {0};
	struct rec_journal rec;
	bool image;
	int r = read_record(t, &rec, &u->refs, e);

	if (r == -ENOENT) {
		rec = (struct rec_journal){.image = 1};
		r = 0;
	}
	if (r)
		return r;
	image = u->image || rec.image || rec.nr >= DELTAS_MAX;
	r = image ? make_image(u, t, e) : 0;
	if (!r)
		r = append_log(u, t, image, &why);
	if (r && (u->whole || (r != -ENOSPC && r != -EDQUOT)))
		return why.code ? err_set(e, -r, "%s", why.text) : r;
	if (r) { /* J4; what there is of the journal stays */
		log_warn("store %s: no room for the journal: %s", u->s->dir, why.text);
		u->stale = true;
		rec.image = 1;
		return put_record(t, &rec, &u->refs, e);
	}
	if (image) {
		free(u->refs.bits);
		u->refs = (struct seg_refs){0};
	}
	if (note_segments(u))
		return err_errno(e, ENOMEM, "journal");
	rec = (struct rec_journal){.nr = image ? 0 : rec.nr + 1};
	r = put_record(t, &rec, &u->refs, e);
	if (!r)
		r = commit_put_tails(t, &u->a, e);
	return r ? r : commit_put_counters(t, u->s, e);
}

static int update_txn(struct ix_txn *t, void *arg, struct err *e)
{
	struct update *u = arg;
	int r;

	update_reset(u);
	t->log = &u->log;
	r = u->fn ? u->fn(t, u->arg, e) : 0;
	t->log = NULL;
	u->txn_id = mdb_txn_id(t->txn);
	return r || (!u->log.len && !u->image) ? r : write_journal(u, t, e);
}

/* Before the segments are given back: from then on gc may look at them. */
static void publish(struct update *u)
{
	struct store *s = u->s;

	if (u->written)
		commit_publish_tails(&u->a);
	if (!u->refs.nr)
		return;
	atomic_store(&s->journal_stale, u->stale);
	scoped_lock(&s->segments_lock);
	if (u->txn_id < s->journal_txn) /* a later one was faster */
		return;
	s->journal_txn = u->txn_id;
	free(s->journal_refs.bits);
	s->journal_refs = u->refs;
	u->refs = (struct seg_refs){0};
}

static int update(struct update *u, struct err *e)
{
	int r = index_update(u->s->index, update_txn, u, e);

	if (!r)
		publish(u);
	else if (u->appending && index_in_doubt(u->s->index))
		append_abandon(&u->a);
	update_deinit(u);
	return r;
}

int store_update(struct store *s, int (*fn)(struct ix_txn *t, void *arg, struct err *e), void *arg,
		 struct err *e)
{
	struct update u = {.s = s, .fn = fn, .arg = arg};

	return update(&u, e);
}

int store_update_image(struct store *s, int (*fn)(struct ix_txn *t, void *arg, struct err *e),
		       void *arg, struct err *e)
{
	struct update u = {.s = s, .fn = fn, .arg = arg, .image = true};

	return update(&u, e);
}

int store_update_whole(struct store *s, int (*fn)(struct ix_txn *t, void *arg, struct err *e),
		       void *arg, struct err *e)
{
	struct update u = {.s = s, .fn = fn, .arg = arg, .whole = true};

	return update(&u, e);
}

/* ---- opening ---- */

/* The journal as the index knows it; 1: it needs an image. */
static int load(struct store *s, struct err *e)
{
	struct rec_journal rec = {.image = 1};
	struct seg_refs refs = {0};
	struct ix_txn t;
	int r = index_begin(s->index, &t, e);

	if (r)
		return r;
	r = read_record(&t, &rec, &refs, e);
	index_end(&t);
	s->journal_refs = refs;
	return r && r != -ENOENT ? r : rec.image != 0;
}

int journal_open(struct store *s, struct err *e)
{
	struct err why = {0};
	int r = load(s, e);

	if (r != 1 || s->read_only)
		return MIN(r, 0);
	s->features |= 1u << FEATURE_JOURNAL;
	r = store_update_image(s, features_put, s, &why);
	if (r)
		return err_set(e, -r, "%s", why.text);
	log_info("store %s: the whole index was written to the segments", s->dir);
	return 0;
}
