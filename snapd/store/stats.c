/* SPDX-License-Identifier: MIT */
/*
 * The store's figures, from its index and its list of segments.
 *
 * Threads: any, see store.h.
 */
#include "snapd/store/internal.h"

static int count_logical(struct ix_txn *t, uint64_t *ret, struct err *e)
{
	struct rec_snapshot rec;
	struct rec_epoch ep;
	struct ix_iter it;
	struct ix_key k;
	int r;

	r = index_iter_init(&it, t, IX_SNAPSHOTS, NULL, e);
	while (!r && (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0) {
		k = ix_key_point(rec.point);
		r = index_get(t, IX_EPOCHS, &k, &ep, sizeof(ep), NULL, NULL, e);
		if (!r)
			*ret += ep.map_pages * ep.page_size;
	}
	index_iter_deinit(&it);
	return r == -ENOENT ? err_set(e, E_CORRUPT, "the epoch of a snapshot is missing") : r;
}

static void count_segments(struct store *s, struct store_stats *ret)
{
	scoped_lock(&s->segments_lock);

	for (uint32_t i = 0; i < s->nr_segs; i++) {
		const struct seg *seg = s->segs[i];

		if (!seg)
			continue;
		ret->segments++;
		ret->segments_free += seg->state == SEG_FREE;
		ret->bytes_on_disk += seg->disk_bytes;
		if (seg->state != SEG_FREE) {
			ret->bytes_used += (uint64_t)seg->tail * FMT_BLOCK;
			ret->pages_stored += seg->pages;
		}
	}
}

uint64_t store_bytes_in_use(struct store *s)
{
	scoped_lock(&s->segments_lock);
	uint64_t sum = 0;

	for (uint32_t i = 0; i < s->nr_segs; i++)
		if (s->segs[i] && s->segs[i]->state != SEG_FREE)
			sum += s->segs[i]->segment_bytes;
	return sum;
}

int store_get_stats(struct store *s, struct store_stats *ret, struct err *e)
{
	struct ix_txn t;
	int r;

	*ret = (struct store_stats){0};
	r = index_begin(s->index, &t, e);
	if (r)
		return r;
	r = index_count(&t, IX_VMS, &ret->vms, e);
	if (!r)
		r = index_count(&t, IX_TIMELINES, &ret->timelines, e);
	if (!r)
		r = index_count(&t, IX_EPOCHS, &ret->epochs, e);
	if (!r)
		r = index_count(&t, IX_SNAPSHOTS, &ret->snapshots, e);
	if (!r)
		r = count_logical(&t, &ret->bytes_logical, e);
	index_end(&t);
	count_segments(s, ret);
	ret->bytes_index = index_bytes(s->index);
	ret->bytes_on_disk += ret->bytes_index;
	ret->dedup_entries = dedup_nr(&s->dedup);
	ret->dedup_bytes = dedup_bytes(&s->dedup);
	return r;
}
