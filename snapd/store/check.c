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
#include "snapd/store/check_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "snapd/store/manifest.h"

const char *const damage_kind_names[DAMAGE_NR_KINDS] = {
	[DAMAGE_RECORD] = "record", [DAMAGE_LINK] = "link",   [DAMAGE_SEGMENT] = "segment",
	[DAMAGE_BATCH] = "batch",   [DAMAGE_COUNT] = "count", [DAMAGE_BLOB] = "blob",
	[DAMAGE_LOC] = "loc",	    [DAMAGE_PAGE] = "page",
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

void check_tell(struct check *k, enum damage_kind kind, const char *fmt, ...)
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
int check_step(struct check *k, uint64_t bytes, struct err *e)
{
	k->ret->bytes_read += bytes;
	if (pace_step(&k->pace, bytes))
		return err_set(e, ECANCELED, "the check was cancelled");
	return 0;
}

/* ---- epochs: their blobs, and what those name ---- */

/* It was there, and as far as can be told it still is, with the same maps. */
static bool epoch_is_there(struct check *k, const struct known_epoch *x)
{
	struct ix_key key = ix_key_point(x->at);
	struct rec_epoch now;
	struct ix_txn t;
	int r;

	if (index_begin(k->s->index, &t, NULL))
		return true;
	r = index_get(&t, IX_EPOCHS, &key, &now, sizeof(now), NULL, NULL, NULL);
	index_end(&t);
	return r ? r != -ENOENT : epoch_same_maps(&x->rec, &now);
}

static bool has_run(const struct batch_at *b, uint32_t entry, uint64_t len)
{
	bool has = entry + len <= b->nr_entries;

	for (uint64_t i = 0; has && i < len; i++)
		has = !batch_lacks(b, entry + (uint32_t)i);
	return has;
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
		b = check_find_batch(k, loc_segment(run.loc), loc_block(run.loc));
		if ((b && has_run(b, loc_entry(run.loc), run.len)) ||
		    check_in_bad_blocks(k, loc_segment(run.loc), loc_block(run.loc)))
			continue;
		if (!nr_bad) {
			first = run.loc;
			first_gfn = run.gfn;
		}
		nr_bad += run.len;
	}
	if (r < 0)
		check_tell(k, DAMAGE_BLOB, "%s: %s", what, why.text);
	if (nr_bad)
		check_tell(k, DAMAGE_LOC,
			   "%s: %llu pages are not where it says, first frame %#llx: segment %08x "
			   "block "
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
	if (r && !epoch_is_there(k, x))
		return 0;
	if (r) {
		k->blobs_bad = true;
		if (!check_in_bad_blocks(k, blob->last.segment, blob->last.block))
			check_tell(k, DAMAGE_BLOB, "%s", why.text);
	} else if (type != BATCH_STATE && epoch_is_there(k, x)) {
		check_locs(k, bytes, blob->bytes, what);
	}
	return check_step(k, blob->bytes, e);
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

/* ---- all of it ---- */

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
	uint32_t nr;

	*k->ret = (struct store_check_result){0};
	k->pace = (struct pace){.rate_bytes = k->c->rate_bytes, .stop = stop_check, .opaque = k};
	k->total = bytes_in_use(k->s, k->c->read_data);
	/* Segments that come while it runs belong to epochs that it did not list. */
	nr = count_slots(k->s);
	k->segs = calloc(nr + 1, sizeof(*k->segs));
	if (!k->segs)
		return err_errno(e, ENOMEM, "check");
	k->nr_segs = nr;
	return 0;
}

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
	return r || !ret->damages ? r : check_tell_losses(&k, e);
}

int store_scrub_step(struct store *s, const struct store_check_config *c, uint32_t from,
		     uint32_t *next, struct store_check_result *ret, struct err *e)
{
	_cleanup_(check_deinit) struct check k = {.s = s, .c = c, .ret = ret};
	int r = check_init(&k, e);

	k.blobs_here = true;
	if (!r && !from)
		r = check_index(&k, e);
	while (!r && from < k.nr_segs && !check_view(&k, from).used)
		from++;
	if (!r && from < k.nr_segs)
		r = check_segment(&k, from, e);
	*next = from + 1 < k.nr_segs ? from + 1 : 0;
	return r;
}
