/* SPDX-License-Identifier: MIT */
/*
 * Manifests of epochs that were deleted, into the epoch that builds on them.  In: the list
 * of epochs, marked.  Out: epochs that stay for their manifests only have nobody who builds
 * on them any more, and go like all others in the run's last step; with them the pages that
 * a later manifest overwrites.
 *
 * A *carrier* is an epoch that is kept, but no root, and that one epoch alone builds on.
 * Carriers in a row, and the epoch D that builds on the last of them, become D: its manifest
 * is then what all of them changed, the newest first, and its parent is the oldest one's.
 * If that one begins a chain, D begins it now: it gets a checkpoint (or, without any parent, a
 * manifest that begins with nothing).  No map of any epoch that stays changes by that.
 *
 *   M1 The new manifest is durable before the transaction that makes it D's; with it D's
 *      record goes to the journal.  That has to find room (no J4): the EPOCH batch of D leads
 *      to blobs that go.
 *   M2 D is no longer counted in that transaction (F1), and is counted anew, as an epoch
 *      that came, before anything is dropped.
 *   M3 Who walks a chain that is pinned reads the blobs that it found.  An epoch on the way
 *      from a pin to its checkpoint is left as it is, until another run.  Who has no pin
 *      looks again when a blob is not there (map.c, check.c, account.c).
 *   M4 Reading and writing is limited by what can come back: MERGE_BYTES_PER_BYTE for each
 *      byte of pages that may be overwritten.  What is not worth it waits for more.
 *   M5 Where something can't be read, or there is no room, it stays; that is no reason not
 *      to give back the rest.
 *
 * Nothing is done twice: a run that was cancelled, or killed, leaves merged what it
 * committed.  One thread: gc's.
 */
#include "snapd/store/gc.h"

#include <string.h>

#include "snapd/store/mapstream.h"
#include "snapd/util/log.h"

#define MERGE_BYTES_PER_BYTE 4u
#define MERGE_BYTES_FREE     (64u << 10) /* of manifests, for each epoch that goes */
#define GROUP_MAX	     256u	 /* epochs that one transaction changes */
#define GROUP_BYTES	     (16u << 20)

/* Carriers in a row, and what builds on them. */
struct run {
	size_t epoch;			/* D, of the list */
	struct snapd_point last;	/* the oldest of them */
	struct snapd_point parent;	/* and what that was made from */
	bool whole;			/* it begins a chain */
	uint32_t nr;			/* of them */
	uint64_t bytes;			/* of all blobs that have to be read */
	uint64_t newest, oldest, pages; /* changed by D; by the oldest; by all */
};

/* D as it will be. */
struct merged {
	size_t epoch;
	struct rec_epoch rec; /* what is new in it */
	struct ref_log drop;  /* owned; what it named */
};

struct merging {
	struct gc *g;
	uint32_t *nr_above; /* owned; of the list: kept ones that build on it */
	struct manifest_writer writer;
	bool appending; /* `a` is there */
	struct appender a;
	struct merged *group; /* owned, GROUP_MAX */
	size_t nr;
	uint64_t bytes; /* in the group */
};

static void group_reset(struct merging *m)
{
	for (size_t i = 0; i < m->nr; i++)
		ref_log_deinit(&m->group[i].drop);
	m->nr = 0;
	m->bytes = 0;
	if (m->appending)
		append_deinit(&m->a);
	m->appending = false;
}

static void merging_deinit(struct merging *m)
{
	group_reset(m);
	manifest_writer_deinit(&m->writer);
	free(m->nr_above);
	free(m->group);
}

static int no_memory(struct err *e)
{
	return err_errno(e, ENOMEM, "gc");
}

/* ---- what is to be merged ---- */

static int count_above(struct merging *m, struct err *e)
{
	struct gc *g = m->g;

	m->nr_above = calloc(g->nr_epochs + 1, sizeof(*m->nr_above));
	if (!m->nr_above)
		return no_memory(e);
	for (size_t i = 0; i < g->nr_epochs; i++) {
		const struct gc_epoch *x = &g->epochs[i], *p;

		p = x->kept && x->chained ? gc_find_epoch(g, x->parent) : NULL;
		if (p)
			m->nr_above[p - g->epochs]++;
	}
	return 0;
}

static bool is_carrier(const struct merging *m, const struct gc_epoch *x)
{
	return x->kept && !x->root && m->nr_above[x - m->g->epochs] == 1;
}

static int get_record(struct ix_txn *t, struct snapd_point at, struct rec_epoch *ret, struct err *e)
{
	struct ix_key k = ix_key_point(at);
	int r = index_get(t, IX_EPOCHS, &k, ret, sizeof(*ret), NULL, NULL, e);

	return r == -ENOENT ? err_set(e, E_CORRUPT, "the record of an epoch is missing") : r;
}

static uint64_t bytes_of(const struct rec_epoch *rec)
{
	return rec->manifest.bytes + rec->checkpoint.bytes;
}

/* The carriers under epoch i; ret->nr 0: none. */
static int find_run(struct merging *m, struct ix_txn *t, size_t i, struct run *ret, struct err *e)
{
	const struct gc_epoch *x = &m->g->epochs[i];
	struct rec_epoch rec;
	int r = 0;

	*ret = (struct run){.epoch = i};
	while (x->chained && (x = gc_find_epoch(m->g, x->parent)) && is_carrier(m, x)) {
		r = get_record(t, x->at, &rec, e);
		if (r)
			return r;
		ret->nr++;
		ret->last = x->at;
		ret->parent = x->parent;
		ret->whole = !x->chained;
		ret->bytes += bytes_of(&rec);
		ret->oldest = x->chained ? rec.nr_changed : MAX(rec.map_pages, rec.nr_changed);
		ret->pages += ret->oldest;
	}
	if (!ret->nr)
		return 0;
	r = get_record(t, m->g->epochs[i].at, &rec, e);
	ret->bytes += bytes_of(&rec);
	ret->newest = rec.nr_changed;
	ret->pages += rec.nr_changed;
	return r;
}

/* M4: what is overwritten was changed twice, so neither by the newest nor by the oldest alone. */
static bool is_worth_it(const struct run *x, uint32_t page_size)
{
	uint64_t most = x->pages - MAX(x->newest, x->oldest);

	return x->bytes <=
	       (uint64_t)x->nr * MERGE_BYTES_FREE + most * page_size * MERGE_BYTES_PER_BYTE;
}

/* ---- one ---- */

/* The frames of a stream as a blob. */
static int append_stream(struct merging *m, struct snapd_point at, const struct snapd_point *base,
			 enum batch_type type, struct rec_blob *ret, uint64_t *frames,
			 struct err *e)
{
	struct manifest_run run;
	struct mapstream *stream;
	const uint8_t *bytes;
	size_t len;
	int r = mapstream_open(m->g->s, at, base, MAPSTREAM_BYTES, &stream, e);

	if (r)
		return r;
	r = manifest_writer_init(&m->writer);
	*frames = 0;
	while (!r && (r = mapstream_next(stream, &run, e)) == 1) {
		manifest_add_run(&m->writer, run.gfn, run.len, run.loc);
		*frames += run.loc != MANIFEST_GONE ? run.len : 0;
		r = 0;
	}
	mapstream_close(stream);
	if (!r)
		r = manifest_finish(&m->writer, &bytes, &len);
	if (r)
		return e && e->code ? r : err_errno(e, -r, "merging manifests");
	m->bytes += len;
	return append_blob(&m->a, type, bytes, len, ret, e);
}

static int append_maps(struct merging *m, const struct run *x, struct rec_epoch *rec, struct err *e)
{
	struct snapd_point at = m->g->epochs[x->epoch].at;
	uint64_t frames;
	int r;

	rec->checkpoint = (struct rec_blob){0};
	/* With what is gone, also where there is nothing before: it went since some epoch. */
	r = append_stream(m, at, &x->parent, BATCH_MANIFEST, &rec->manifest, &rec->nr_changed, e);
	if (!r && x->whole && x->parent.timeline)
		r = append_stream(m, at, NULL, BATCH_CHECKPOINT, &rec->checkpoint, &frames, e);
	return r;
}

/* How long the way to the checkpoint is now; of those further up it is at most what they say. */
static int count_chain(struct gc *g, const struct run *x, struct rec_epoch *rec, struct err *e)
{
	struct rec_epoch parent;
	struct ix_txn t;
	int r;

	rec->chain_epochs = 0;
	rec->chain_bytes = rec->chain_pages = 0;
	if (x->whole)
		return 0;
	r = index_begin(g->s->index, &t, e);
	if (r)
		return r;
	r = get_record(&t, x->parent, &parent, e);
	index_end(&t);
	rec->chain_epochs = parent.chain_epochs + 1;
	rec->chain_bytes = parent.chain_bytes + rec->manifest.bytes;
	rec->chain_pages = parent.chain_pages + rec->nr_changed;
	return r;
}

static int begin_group(struct merging *m, const struct rec_epoch *rec, struct snapd_point at,
		       struct err *e)
{
	int r;

	if (m->appending) {
		memcpy(m->a.vm, rec->vm, sizeof(m->a.vm));
		m->a.point = at;
		return 0;
	}
	m->appending = true;
	r = append_init(&m->a, m->g->s, rec->vm, at, 12, e);
	return r;
}

static int merge_one(struct merging *m, const struct run *x, struct rec_epoch *rec, struct err *e)
{
	struct gc *g = m->g;
	const struct gc_epoch *d = &g->epochs[x->epoch];
	struct merged *to = &m->group[m->nr];
	int r = begin_group(m, rec, d->at, e);

	*to = (struct merged){.epoch = x->epoch};
	if (!r)
		r = append_maps(m, x, rec, e);
	if (!r)
		r = count_chain(g, x, rec, e);
	if (!r && d->counted)
		r = gc_name_epoch(g, d, -1, &to->drop, e);
	rec->parent = x->parent;
	to->rec = *rec;
	if (r)
		ref_log_deinit(&to->drop);
	else
		m->nr++;
	return r;
}

/* ---- some ---- */

/* M3.  roots_lock held; -errno. */
static int find_held(struct gc *g, struct err *e)
{
	for (size_t i = 0; i < g->nr_epochs; i++)
		g->epochs[i].held = false;
	for (const struct pin *p = g->s->pins; p; p = p->next) {
		int r = gc_hold(g, p->at, e);

		if (r)
			return r;
	}
	return 0;
}

static int put_merged(struct ix_txn *t, const struct gc_epoch *x, const struct rec_epoch *now,
		      struct err *e)
{
	struct ix_key k = ix_key_point(x->at);
	struct rec_epoch rec;
	int r = get_record(t, x->at, &rec, e);

	if (r)
		return r;
	rec.parent = now->parent;
	rec.manifest = now->manifest;
	rec.checkpoint = now->checkpoint;
	rec.chain_epochs = now->chain_epochs;
	rec.chain_bytes = now->chain_bytes;
	rec.chain_pages = now->chain_pages;
	rec.nr_changed = now->nr_changed;
	r = index_put(t, IX_EPOCHS, &k, &rec, sizeof(rec), NULL, 0, e);
	return r || !x->counted ? r : index_del(t, IX_COUNTED, &k, e);
}

struct merge_txn {
	struct merging *m;
	struct ref_changes changes; /* owned */
};

static int merge_txn(struct ix_txn *t, void *arg, struct err *e)
{
	struct merge_txn *x = arg;
	struct gc *g = x->m->g;
	int r = refs_put_all(t, &x->changes, e);

	for (size_t i = 0; !r && i < x->m->nr; i++) {
		const struct gc_epoch *d = &g->epochs[x->m->group[i].epoch];

		if (!d->held)
			r = put_merged(t, d, &x->m->group[i].rec, e);
	}
	if (!r)
		r = commit_put_tails(t, &x->m->a, e);
	return r ? r : commit_put_counters(t, g->s, e);
}

/* roots_lock held: what is pinned from here on sees the new records. */
static int swing(struct merging *m, struct err *e)
{
	_cleanup_(ref_log_deinit) struct ref_log drop = {0};
	struct merge_txn x = {.m = m};
	struct gc *g = m->g;
	int r = find_held(g, e);

	for (size_t i = 0; !r && i < m->nr; i++)
		if (!g->epochs[m->group[i].epoch].held && ref_log_add_all(&drop, &m->group[i].drop))
			r = no_memory(e);
	if (!r)
		r = gc_change(g, &drop, &x.changes, e);
	if (!r)
		r = store_update_whole(g->s, merge_txn, &x, e);
	if (!r) {
		commit_publish_tails(&m->a);
		gc_learn(g, &x.changes);
		g->merged = true;
	} else if (index_in_doubt(g->s->index)) {
		append_abandon(&m->a);
	}
	ref_changes_deinit(&x.changes);
	return r;
}

static int commit_group(struct merging *m, struct err *e)
{
	int r = m->nr ? append_sync(&m->a, e) : 0;

	if (!r && m->nr) {
		scoped_lock(&m->g->s->roots_lock);
		r = swing(m, e);
	}
	group_reset(m);
	return r;
}

/* ---- all ---- */

static int consider(struct merging *m, size_t i, struct err *e)
{
	struct rec_epoch rec;
	struct ix_txn t;
	struct run x;
	int r = index_begin(m->g->s->index, &t, e);

	if (r)
		return r;
	r = find_run(m, &t, i, &x, e);
	if (!r && x.nr)
		r = get_record(&t, m->g->epochs[i].at, &rec, e);
	index_end(&t);
	if (r || !x.nr || !is_worth_it(&x, rec.page_size))
		return r;
	r = merge_one(m, &x, &rec, e);
	if (r == -E_CORRUPT || r == -EIO) { /* M5 */
		log_warn("store %s: epoch %llu of timeline %llu keeps what others gave up: %s",
			 m->g->s->dir, (unsigned long long)m->g->epochs[i].at.epoch,
			 (unsigned long long)m->g->epochs[i].at.timeline, e ? e->text : "");
		err_clear(e);
		return 0;
	}
	return r ? r : gc_pace(m->g, x.bytes + bytes_of(&rec), e);
}

static int merge_all(struct merging *m, struct err *e)
{
	struct gc *g = m->g;
	int r = count_above(m, e);

	pthread_mutex_lock(&g->s->roots_lock);
	if (!r)
		r = find_held(g, e);
	pthread_mutex_unlock(&g->s->roots_lock);
	m->group = calloc(GROUP_MAX, sizeof(*m->group));
	if (!r && !m->group)
		r = no_memory(e);
	for (size_t i = 0; !r && i < g->nr_epochs; i++) {
		const struct gc_epoch *x = &g->epochs[i];

		if (!x->kept || !x->chained || x->held || is_carrier(m, x))
			continue;
		r = consider(m, i, e);
		if (!r && (m->nr == GROUP_MAX || m->bytes >= GROUP_BYTES))
			r = commit_group(m, e);
	}
	return r;
}

int gc_merge(struct gc *g, struct err *e)
{
	_cleanup_(merging_deinit) struct merging m = {.g = g};
	struct err why = {0};
	int r = merge_all(&m, &why), last;

	if (!r || r == -ECANCELED) { /* what is done is done */
		last = commit_group(&m, r ? NULL : &why);
		r = r ? r : last;
	}
	if (r == -ENOSPC || r == -EDQUOT) { /* M5 */
		log_notice("store %s: manifests are not merged: %s", g->s->dir, why.text);
		r = 0;
	}
	return why.code && r ? err_set(e, -r, "%s", why.text) : r;
}
