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
 *   R1 a batch that is newer than the image, or has an epoch that is later than the last
 *      one of its timeline in the image: it was on its way while the image was made.  No
 *      INDEX batch before the image is like that (J1).
 *   R2 In a store without a journal, an epoch one of whose pages is not where its manifest
 *      says, in a batch older than its record, is one that gc took, and is left out.
 *
 * Only batches that were committed are found: what a crash or a failure left is cleared
 * before anything else is written (J2 of journal.c).  The one exception is an epoch in
 * doubt when the index was lost: it is there, or not.
 *
 * All segments are sealed, their tails behind the last batch that something leads to.
 */
#include "snapd/store/rebuild_internal.h"

#include <stdarg.h>
#include <stdio.h>

static void rebuild_deinit(struct rebuild *b)
{
	for (size_t i = 0; i < b->nr_records; i++)
		free(b->records[i].bytes);
	free(b->records);
	free(b->found);
	free(b->gaps);
	free(b->gone);
	free(b->epochs);
	store_close(b->s);
}

void rebuild_tell(const struct rebuild *b, const char *fmt, ...)
{
	char line[480];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	if (b->c->tell)
		b->c->tell(b->c->opaque, line);
}

int rebuild_no_memory(struct err *e)
{
	return err_errno(e, ENOMEM, "rebuilding the index");
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
	int r = rebuild_find_identity(b, e);

	if (!r)
		r = index_update(s->index, rebuild_replay, b, e);
	if (!r)
		r = rebuild_look_at_epochs(b, e);
	if (!r)
		r = rebuild_tell_lost(b, e);
	if (!r) {
		rebuild_find_tails(b);
		rebuild_tell_gaps(b);
	}
	if (!r)
		r = index_update(s->index, rebuild_settle, b, e);
	/* What the journal has of the features may be older than what needs them. */
	if (!r)
		r = features_load(s, e);
	if (!r)
		r = features_add(s, rebuild_features_found(b), e);
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
		r = rebuild_find_segments(&b, e);
	if (!r)
		r = rebuild_walk_segments(&b, e);
	if (!r)
		r = rebuild_read_records(&b, e);
	if (!r)
		r = store_make_index(b.s, fill, &b, e);
	if (!r)
		r = store_swap_index(b.s, e);
	if (!r && !ret->journalled)
		rebuild_tell(
			&b,
			"this store has no journal: names, notes, tags and pins are as when the "
			"snapshots were taken, and what was deleted may be back");
	return r;
}
