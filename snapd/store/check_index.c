/* SPDX-License-Identifier: MIT */
/*
 * The index: each record by itself, and what it refers to; epochs are listed on the way.
 */
#include "snapd/store/check_internal.h"

#include <stdio.h>

static const struct {
	enum index_db db;
	size_t size;
} record_sizes[] = {
	{IX_VMS, sizeof(struct rec_vm)},
	{IX_VMNAMES, sizeof(struct rec_vmname)},
	{IX_TIMELINES, sizeof(struct rec_timeline)},
	{IX_EPOCHS, sizeof(struct rec_epoch)},
	{IX_SNAPSHOTS, sizeof(struct rec_snapshot)},
	{IX_SNAPNAMES, sizeof(struct rec_snapname)},
	{IX_SEGMENTS, sizeof(struct rec_segment)},
};

union any_record {
	struct rec_store store;
	struct rec_vm vm;
	struct rec_vmname vmname;
	struct rec_timeline timeline;
	struct rec_epoch epoch;
	struct rec_snapshot snapshot;
	struct rec_snapname snapname;
	struct rec_segment segment;
};

/* A reference from one record to another: false when that one is not there.  One that is
 * damaged is told as itself. */
static bool there(struct ix_txn *t, enum index_db db, struct ix_key k, void *rec, size_t size)
{
	return index_get(t, db, &k, rec, size, NULL, NULL, NULL) != -ENOENT;
}

static void check_vm_links(struct check *k, struct ix_txn *t, const struct rec_vm *vm)
{
	uint32_t be = __builtin_bswap32(vm->uid);
	struct rec_vmname name;

	if (!there(t, IX_VMNAMES, ix_key_name(&be, sizeof(be), vm->name), &name, sizeof(name)))
		check_tell(k, DAMAGE_LINK, "VM %.63s of user %u: its name leads nowhere", vm->name,
			   vm->uid);
}

static void check_timeline_links(struct check *k, uint64_t id, const struct rec_timeline *tl)
{
	if (tl->parent.timeline >= id)
		check_tell(k, DAMAGE_LINK, "timeline %llu forks from timeline %llu, which is later",
			   (unsigned long long)id, (unsigned long long)tl->parent.timeline);
}

static void check_snapshot_links(struct check *k, struct ix_txn *t, uint64_t id,
				 const struct rec_snapshot *sn)
{
	struct rec_snapname name;
	struct rec_epoch ep;
	struct rec_vm vm;
	int r;

	if (!there(t, IX_VMS, ix_key_id(sn->vm), &vm, sizeof(vm)))
		check_tell(k, DAMAGE_LINK, "snapshot %llu: its VM is not in the index",
			   (unsigned long long)id);
	if (sn->name[0] && !there(t, IX_SNAPNAMES, ix_key_name(sn->vm, sizeof(sn->vm), sn->name),
				  &name, sizeof(name)))
		check_tell(k, DAMAGE_LINK, "snapshot %llu: its name \"%.63s\" leads nowhere",
			   (unsigned long long)id, sn->name);
	struct ix_key key = ix_key_point(sn->point);

	r = index_get(t, IX_EPOCHS, &key, &ep, sizeof(ep), NULL, NULL, NULL);
	if (r == -ENOENT)
		check_tell(k, DAMAGE_LINK,
			   "snapshot %llu: epoch %llu of timeline %llu is not in the index",
			   (unsigned long long)id, (unsigned long long)sn->point.epoch,
			   (unsigned long long)sn->point.timeline);
	else if (!r && ep.snapshot != id)
		check_tell(k, DAMAGE_LINK,
			   "snapshot %llu: its epoch %llu of timeline %llu is snapshot %llu's",
			   (unsigned long long)id, (unsigned long long)sn->point.epoch,
			   (unsigned long long)sn->point.timeline, (unsigned long long)ep.snapshot);
}

static void check_epoch_links(struct check *k, struct ix_txn *t, struct snapd_point at,
			      const struct rec_epoch *ep)
{
	struct rec_timeline tl;
	struct rec_epoch parent;
	struct rec_snapshot sn;

	if (!there(t, IX_TIMELINES, ix_key_u64(at.timeline), &tl, sizeof(tl)))
		check_tell(k, DAMAGE_LINK,
			   "epoch %llu of timeline %llu: the timeline is not in the index",
			   (unsigned long long)at.epoch, (unsigned long long)at.timeline);
	if (ep->chain_epochs &&
	    !there(t, IX_EPOCHS, ix_key_point(ep->parent), &parent, sizeof(parent)))
		check_tell(k, DAMAGE_LINK,
			   "epoch %llu of timeline %llu builds on epoch %llu of timeline %llu, "
			   "which is "
			   "not in the index",
			   (unsigned long long)at.epoch, (unsigned long long)at.timeline,
			   (unsigned long long)ep->parent.epoch,
			   (unsigned long long)ep->parent.timeline);
	if (ep->snapshot && !there(t, IX_SNAPSHOTS, ix_key_u64(ep->snapshot), &sn, sizeof(sn)))
		check_tell(k, DAMAGE_LINK,
			   "epoch %llu of timeline %llu: its snapshot %llu is not in the index",
			   (unsigned long long)at.epoch, (unsigned long long)at.timeline,
			   (unsigned long long)ep->snapshot);
}

static void check_name_links(struct check *k, struct ix_txn *t, const struct ix_key *key,
			     const struct rec_snapname *name)
{
	struct rec_snapshot sn;

	if (!there(t, IX_SNAPSHOTS, ix_key_u64(name->snapshot), &sn, sizeof(sn)))
		check_tell(k, DAMAGE_LINK,
			   "the name \"%.*s\" leads to snapshot %llu, which is not there",
			   (int)(key->len - 16), (const char *)key->b + 16,
			   (unsigned long long)name->snapshot);
}

static void check_links(struct check *k, struct ix_txn *t, enum index_db db,
			const struct ix_key *key, const union any_record *rec)
{
	struct rec_vm vm;

	switch (db) {
	case IX_VMS:
		check_vm_links(k, t, &rec->vm);
		break;
	case IX_VMNAMES:
		if (!there(t, IX_VMS, ix_key_id(rec->vmname.vm), &vm, sizeof(vm)))
			check_tell(k, DAMAGE_LINK, "the VM name \"%.*s\" leads nowhere",
				   (int)(key->len - 4), (const char *)key->b + 4);
		break;
	case IX_TIMELINES:
		check_timeline_links(k, ix_be64(key->b), &rec->timeline);
		break;
	case IX_EPOCHS:
		check_epoch_links(k, t, (struct snapd_point){ix_be64(key->b), ix_be64(key->b + 8)},
				  &rec->epoch);
		break;
	case IX_SNAPSHOTS:
		check_snapshot_links(k, t, ix_be64(key->b), &rec->snapshot);
		break;
	case IX_SNAPNAMES:
		check_name_links(k, t, key, &rec->snapname);
		break;
	default:
		break;
	}
}

static int note_epoch(struct check *k, const struct ix_key *key, const struct rec_epoch *rec,
		      struct err *e)
{
	if (array_grow(k->epochs, k->nr_epochs, k->cap_epochs))
		return err_errno(e, ENOMEM, "check");
	k->epochs[k->nr_epochs++] =
		(struct known_epoch){{ix_be64(key->b), ix_be64(key->b + 8)}, *rec};
	return 0;
}

static int check_db(struct check *k, struct ix_txn *t, enum index_db db, size_t size, struct err *e)
{
	union any_record rec;
	struct ix_iter it;
	struct ix_key key;
	int r;

	r = index_iter_init(&it, t, db, NULL, e);
	while (!r) {
		struct err why = {0};

		r = index_iter_next(&it, &key, &rec, size, &why);
		if (!r)
			break;
		k->ret->records++;
		if (r == -E_CORRUPT || r == -EPROTO) {
			check_tell(k, DAMAGE_RECORD, "%s", why.text);
			r = 0;
			continue;
		}
		if (r < 0) {
			r = err_set(e, -r, "%s", why.text);
			break;
		}
		check_links(k, t, db, &key, &rec);
		r = db == IX_EPOCHS ? note_epoch(k, &key, &rec.epoch, e) : 0;
	}
	index_iter_deinit(&it);
	return r;
}

int check_index(struct check *k, struct err *e)
{
	struct ix_txn t;
	int r = index_begin(k->s->index, &t, e);

	if (r)
		return r;
	for (size_t i = 0; !r && i < ARRAY_SIZE(record_sizes); i++)
		r = check_db(k, &t, record_sizes[i].db, record_sizes[i].size, e);
	index_end(&t);
	return r;
}
