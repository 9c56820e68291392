/* SPDX-License-Identifier: MIT */
/*
 * Timelines as records: forked from a point, dropped while nothing is on them.
 *
 * Threads: any, see store.h.
 */
#include "snapd/store/internal.h"

#include <string.h>

static const struct ix_key key_counters = {.b = "counters", .len = 8};

struct new_timeline {
	const uint8_t *vm;
	struct snapd_point parent;
	uint64_t id;
};

/* The parent must exist, and be this VM's or another's of the same owner: the
 * caller checks that; here only that it is there. */
static int timeline_create(struct ix_txn *t, void *arg, struct err *e)
{
	struct new_timeline *n = arg;
	struct rec_timeline rec = {.parent = n->parent, .created_ns = store_now_ns()};
	struct snapd_point at = n->parent;
	struct rec_counters counters;
	struct rec_epoch parent;
	struct rec_vm vm;
	struct ix_key k = ix_key_id(n->vm);
	int r;

	r = index_get(t, IX_VMS, &k, &vm, sizeof(vm), NULL, NULL, e);
	if (r == -ENOENT)
		return err_set(e, ENOENT, "there is no such VM");
	if (!r)
		r = store_epoch_record(t, &at, &parent, e);
	if (r >= 0)
		r = index_get(t, IX_META, &key_counters, &counters, sizeof(counters), NULL, NULL,
			      e);
	if (r)
		return r;
	n->id = counters.next_timeline++;
	memcpy(rec.vm, n->vm, sizeof(rec.vm));
	k = ix_key_u64(n->id);
	/* An epoch stays as long as this one needs it; a timeline without epochs would go. */
	rec.parent = at;
	r = index_put(t, IX_TIMELINES, &k, &rec, sizeof(rec), NULL, 0, e);
	if (r)
		return r;
	return index_put(t, IX_META, &key_counters, &counters, sizeof(counters), NULL, 0, e);
}

int store_timeline_create(struct store *s, const uint8_t vm[16], struct snapd_point parent,
			  uint64_t *ret, struct err *e)
{
	struct new_timeline n = {.vm = vm, .parent = parent};
	scoped_lock(&s->roots_lock);
	int r;

	if (gc_note_root(s, parent))
		return err_errno(e, ENOMEM, "timeline");
	r = index_update(s->index, timeline_create, &n, e);
	if (!r)
		*ret = n.id;
	return r;
}

static int timeline_drop(struct ix_txn *t, void *arg, struct err *e)
{
	struct ix_key k = ix_key_u64(*(const uint64_t *)arg);
	struct rec_timeline rec;
	int r = index_get(t, IX_TIMELINES, &k, &rec, sizeof(rec), NULL, NULL, e);

	if (r == -ENOENT || (!r && rec.last))
		return 0;
	return r ? r : index_del(t, IX_TIMELINES, &k, e);
}

/* Nothing can refer to it: a fork of {id, 0} has the epoch behind that for a parent. */
int store_timeline_drop(struct store *s, uint64_t id, struct err *e)
{
	scoped_lock(&s->roots_lock);

	return index_update(s->index, timeline_drop, &id, e);
}

int store_timeline_get(struct store *s, uint64_t id, struct store_timeline *ret, struct err *e)
{
	struct ix_key k = ix_key_u64(id);
	struct rec_timeline rec;
	struct ix_txn t;
	int r;

	r = index_begin(s->index, &t, e);
	if (r)
		return r;
	r = index_get(&t, IX_TIMELINES, &k, &rec, sizeof(rec), NULL, NULL, e);
	index_end(&t);
	if (r == -ENOENT)
		return err_set(e, ENOENT, "there is no timeline %llu", (unsigned long long)id);
	if (r)
		return r;
	*ret = (struct store_timeline){
		.id = id, .parent = rec.parent, .head = rec.last, .created_ns = rec.created_ns};
	memcpy(ret->vm, rec.vm, sizeof(ret->vm));
	return 0;
}
