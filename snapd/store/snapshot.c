/* SPDX-License-Identifier: MIT */
/*
 * Snapshots as records: found, listed, described, changed, deleted.
 *
 * A snapshot is a name for an epoch, with what people say of it: name, note, tags,
 * pin.  All of it is in its index record; the EPOCH batch has it as it was when
 * the snapshot was taken.  Deleting one takes its record and its name away; what
 * its epoch needs goes when gc finds that nothing else needs it.
 *
 *   P1 A pinned snapshot is not deleted, by whatever way; its VM is not removed.
 *
 * Threads: any.
 */
#include "snapd/store/internal.h"

#include <ctype.h>
#include <string.h>

/* ---- snapshots ---- */

static int fill_vm(struct ix_txn *t, struct store_snapshot *sn, struct err *e)
{
	struct ix_key k = ix_key_id(sn->vm);
	struct rec_vm vm;
	int r;

	r = index_get(t, IX_VMS, &k, &vm, sizeof(vm), NULL, NULL, e);
	if (r == -ENOENT)
		return err_set(e, E_CORRUPT, "snapshot %llu: the record of its VM is missing",
			       (unsigned long long)sn->id);
	if (r)
		return r;
	memcpy(sn->vm_name, vm.name, sizeof(sn->vm_name));
	sn->vm_name[sizeof(sn->vm_name) - 1] = '\0';
	sn->uid = vm.uid;
	return 0;
}

/* The nearest ancestor epoch that a snapshot names. */
static int find_parent_snapshot(struct ix_txn *t, struct snapd_point at, struct store_snapshot *sn,
				struct err *e)
{
	struct rec_epoch rec;
	int r;

	while (at.timeline) {
		r = store_epoch_record(t, &at, &rec, e);
		if (r)
			return r < 0 ? r : 0;
		if (rec.snapshot) {
			sn->parent_snapshot = rec.snapshot;
			return 0;
		}
		at = rec.ancestor;
	}
	return 0;
}

static void fill_epoch(struct store_snapshot *sn, const struct rec_epoch *ep)
{
	sn->page_size = ep->page_size;
	sn->parent = ep->parent;
	sn->state_bytes = ep->state.bytes;
	sn->nr_changed = ep->nr_changed;
	sn->stats = (struct epoch_stats){.pages_in = ep->pages_in,
					 .zero = ep->zero,
					 .unchanged = ep->unchanged,
					 .duplicate = ep->duplicate,
					 .stored = ep->stored,
					 .collisions = ep->collisions,
					 .read_back = ep->read_back,
					 .bytes_written = ep->bytes_written};
}

static int snapshot_fill(struct ix_txn *t, uint64_t id, const struct rec_snapshot *rec,
			 struct store_snapshot *sn, struct err *e)
{
	struct ix_key k = ix_key_point(rec->point);
	struct rec_epoch ep;
	int r;

	*sn = (struct store_snapshot){.id = id,
				      .point = rec->point,
				      .taken_ns = rec->taken_ns,
				      .pause_ns = rec->pause_ns,
				      .pinned = rec->head.flags & REC_SNAPSHOT_PINNED,
				      .post_mortem = rec->head.flags & REC_SNAPSHOT_POSTMORTEM};
	memcpy(sn->vm, rec->vm, sizeof(sn->vm));
	static_assert(sizeof(sn->name) == sizeof(rec->name), "copied whole");
	static_assert(sizeof(sn->note) == sizeof(rec->note), "copied whole");
	static_assert(sizeof(sn->tags) == sizeof(rec->tags), "copied whole");
	memcpy(sn->name, rec->name, sizeof(sn->name));
	memcpy(sn->note, rec->note, sizeof(sn->note));
	memcpy(sn->tags, rec->tags, sizeof(sn->tags));
	sn->name[sizeof(sn->name) - 1] = sn->note[sizeof(sn->note) - 1] = '\0';
	sn->tags[sizeof(sn->tags) - 1] = '\0';
	r = fill_vm(t, sn, e);
	if (!r)
		r = index_get(t, IX_EPOCHS, &k, &ep, sizeof(ep), NULL, NULL, e);
	if (r == -ENOENT)
		r = err_set(e, E_CORRUPT, "snapshot %llu: the record of its epoch is missing",
			    (unsigned long long)id);
	if (r)
		return r;
	fill_epoch(sn, &ep);
	return find_parent_snapshot(t, ep.ancestor, sn, e);
}

static int snapshot_get(struct ix_txn *t, uint64_t id, struct store_snapshot *ret, struct err *e)
{
	struct ix_key k = ix_key_u64(id);
	struct rec_snapshot rec;
	int r;

	r = index_get(t, IX_SNAPSHOTS, &k, &rec, sizeof(rec), NULL, NULL, e);
	if (r == -ENOENT)
		return err_set(e, ENOENT, "there is no snapshot %llu", (unsigned long long)id);
	return r ? r : snapshot_fill(t, id, &rec, ret, e);
}

int store_snapshot_get(struct store *s, uint64_t id, struct store_snapshot *ret, struct err *e)
{
	struct ix_txn t;
	int r;

	r = index_begin(s->index, &t, e);
	if (r)
		return r;
	r = snapshot_get(&t, id, ret, e);
	index_end(&t);
	return r;
}

int store_snapshot_list(struct store *s, const uint8_t *vm, struct store_snapshot **ret, size_t *nr,
			struct err *e)
{
	_cleanup_free_ struct store_snapshot *list = NULL;
	struct rec_snapshot rec;
	struct ix_iter it;
	struct ix_txn t;
	struct ix_key k;
	uint64_t all;
	size_t n = 0;
	int r;

	r = index_begin(s->index, &t, e);
	if (r)
		return r;
	r = index_iter_init(&it, &t, IX_SNAPSHOTS, NULL, e);
	if (!r)
		r = index_count(&t, IX_SNAPSHOTS, &all, e);
	if (!r) {
		list = calloc(all + 1, sizeof(*list));
		r = list ? 0 : err_errno(e, ENOMEM, "listing snapshots");
	}
	while (!r && n < all && (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0) {
		if (vm && memcmp(rec.vm, vm, sizeof(rec.vm)) != 0)
			r = 0;
		else
			r = snapshot_fill(&t, ix_be64(k.b), &rec, &list[n++], e);
	}
	index_iter_deinit(&it);
	index_end(&t);
	if (r)
		return r;
	*ret = steal_ptr(&list);
	*nr = n;
	return 0;
}

int store_snapshot_newest(struct store *s, const uint8_t vm[16], uint64_t *taken_ns, struct err *e)
{
	struct rec_snapshot rec;
	struct ix_iter it;
	struct ix_txn t;
	struct ix_key k;
	bool found = false;
	int r;

	r = index_begin(s->index, &t, e);
	if (r)
		return r;
	r = index_iter_init(&it, &t, IX_SNAPSHOTS, NULL, e);
	it.backwards = true;
	while (!r && !found && (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0) {
		found = !memcmp(rec.vm, vm, sizeof(rec.vm));
		r = 0;
	}
	index_iter_deinit(&it);
	index_end(&t);
	*taken_ns = found ? rec.taken_ns : 0;
	return r;
}

/* ---- selectors ---- */

struct selector {
	char vm[SNAPD_NAME_MAX]; /* "": none */
	char name[SNAPD_NAME_MAX];
	uint64_t id; /* 0: none */
};

static bool parse_id(const char *s, uint64_t *ret)
{
	char *end;

	if (!isdigit((unsigned char)*s))
		return false;
	errno = 0;
	*ret = strtoull(s, &end, 10);
	return !*end && !errno && *ret;
}

static int parse_selector(const char *text, struct selector *sel, struct err *e)
{
	const char *at = strchr(text, '@');
	size_t vm_len = at ? (size_t)(at - text) : strlen(text);

	*sel = (struct selector){.id = 0};
	if (!at && parse_id(text, &sel->id))
		return 0;
	if (!vm_len || vm_len >= sizeof(sel->vm) ||
	    (at && (!at[1] || strlen(at + 1) >= sizeof(sel->name))))
		return err_set(e, EINVAL, "\"%.80s\" selects nothing: use ID, VM, VM@ID or VM@NAME",
			       text);
	memcpy(sel->vm, text, vm_len);
	if (at && !parse_id(at + 1, &sel->id))
		memcpy(sel->name, at + 1, strlen(at + 1) + 1);
	return 0;
}

static bool selects(const struct selector *sel, const struct store_snapshot *sn, uint32_t uid)
{
	if (uid && sn->uid != uid)
		return false;
	if (sel->vm[0] && strcmp(sel->vm, sn->vm_name) != 0)
		return false;
	if (sel->name[0] && strcmp(sel->name, sn->name) != 0)
		return false;
	return !sel->id || sel->id == sn->id;
}

/* By its record alone, without walking to its parent snapshot. */
static int newest_match(struct ix_txn *t, const struct selector *sel, uint32_t uid, uint64_t *ret,
			struct err *e)
{
	struct rec_snapshot rec;
	struct ix_iter it;
	struct ix_key k;
	int r;

	*ret = 0;
	r = index_iter_init(&it, t, IX_SNAPSHOTS, NULL, e);
	it.backwards = true;
	while (!r && !*ret && (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0) {
		struct store_snapshot sn = {.id = ix_be64(k.b)};

		memcpy(sn.vm, rec.vm, sizeof(sn.vm));
		memcpy(sn.name, rec.name, sizeof(sn.name));
		r = fill_vm(t, &sn, e);
		if (!r && selects(sel, &sn, uid))
			*ret = sn.id;
	}
	index_iter_deinit(&it);
	return r;
}

static int snapshot_find(struct ix_txn *t, const char *text, uint32_t uid,
			 struct store_snapshot *ret, struct err *e)
{
	struct selector sel;
	struct err ignored = {0};
	uint64_t id;
	int r;

	r = parse_selector(text, &sel, e);
	if (r)
		return r;
	id = sel.id;
	if (!id)
		r = newest_match(t, &sel, uid, &id, e);
	if (r)
		return r;
	r = id ? snapshot_get(t, id, ret, &ignored) : -ENOENT;
	if (r == -ENOENT || (!r && !selects(&sel, ret, uid)))
		return err_set(e, ENOENT, "there is no snapshot \"%.130s\"", text);
	return r ? err_set(e, -r, "%s", ignored.text) : 0;
}

int store_snapshot_find(struct store *s, const char *selector, uint32_t uid,
			struct store_snapshot *ret, struct err *e)
{
	struct ix_txn t;
	int r;

	r = index_begin(s->index, &t, e);
	if (r)
		return r;
	r = snapshot_find(&t, selector, uid, ret, e);
	index_end(&t);
	return r;
}

/* ---- deleting ---- */

static int forget_name(struct ix_txn *t, const struct rec_snapshot *rec, struct err *e)
{
	struct ix_key k = ix_key_name(rec->vm, sizeof(rec->vm), rec->name);

	return rec->name[0] ? index_del(t, IX_SNAPNAMES, &k, e) : 0;
}

static int snapshot_delete(struct ix_txn *t, uint64_t id, struct err *e)
{
	struct ix_key k = ix_key_u64(id), epoch;
	struct rec_snapshot rec;
	struct rec_epoch ep;
	int r;

	r = index_get(t, IX_SNAPSHOTS, &k, &rec, sizeof(rec), NULL, NULL, e);
	if (r == -ENOENT)
		return err_set(e, ENOENT, "there is no snapshot %llu", (unsigned long long)id);
	if (r)
		return r;
	if (rec.head.flags & REC_SNAPSHOT_PINNED)
		return err_set(e, EBUSY, "snapshot %llu is pinned: unpin it first",
			       (unsigned long long)id);
	r = index_del(t, IX_SNAPSHOTS, &k, e);
	if (!r)
		r = forget_name(t, &rec, e);
	epoch = ix_key_point(rec.point);
	if (!r)
		r = index_get(t, IX_EPOCHS, &epoch, &ep, sizeof(ep), NULL, NULL, e);
	if (r)
		return r == -ENOENT ? 0 : r;
	ep.snapshot = 0;
	return index_put(t, IX_EPOCHS, &epoch, &ep, sizeof(ep), NULL, 0, e);
}

struct deletion {
	const uint64_t *ids;
	size_t nr;
};

static int delete_txn(struct ix_txn *t, void *arg, struct err *e)
{
	const struct deletion *d = arg;
	int r = 0;

	for (size_t i = 0; !r && i < d->nr; i++)
		r = snapshot_delete(t, d->ids[i], e);
	return r;
}

int store_snapshots_delete(struct store *s, const uint64_t *ids, size_t nr, struct err *e)
{
	struct deletion d = {ids, nr};

	return store_update(s, delete_txn, &d, e);
}

int store_snapshot_delete(struct store *s, uint64_t id, struct err *e)
{
	return store_snapshots_delete(s, &id, 1, e);
}

struct removal {
	struct store *s;
	const uint8_t *vm;
	uint64_t *ids; /* owned */
	size_t nr;
};

/* Its snapshots; a pinned one refuses the removal when it is deleted. */
static int snapshots_of_vm(struct ix_txn *t, struct removal *rm, struct err *e)
{
	struct rec_snapshot rec;
	struct ix_iter it;
	struct ix_key k;
	uint64_t all;
	int r;

	rm->nr = 0;
	r = index_count(t, IX_SNAPSHOTS, &all, e);
	if (r)
		return r;
	free(rm->ids);
	rm->ids = calloc(all + 1, sizeof(*rm->ids));
	if (!rm->ids)
		return err_errno(e, ENOMEM, "listing snapshots");
	r = index_iter_init(&it, t, IX_SNAPSHOTS, NULL, e);
	while (!r && rm->nr < all && (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0) {
		if (!memcmp(rec.vm, rm->vm, sizeof(rec.vm)))
			rm->ids[rm->nr++] = ix_be64(k.b);
		r = 0;
	}
	index_iter_deinit(&it);
	return r;
}

static int remove_txn(struct ix_txn *t, void *arg, struct err *e)
{
	struct removal *rm = arg;
	struct ix_key k = ix_key_id(rm->vm), name;
	struct rec_vm vm;
	uint32_t uid;
	int r;

	r = index_get(t, IX_VMS, &k, &vm, sizeof(vm), NULL, NULL, e);
	if (r)
		return r == -ENOENT ? err_set(e, ENOENT, "there is no such VM") : r;
	r = snapshots_of_vm(t, rm, e);
	for (size_t i = 0; !r && i < rm->nr; i++)
		r = snapshot_delete(t, rm->ids[i], e);
	uid = __builtin_bswap32(vm.uid);
	name = ix_key_name(&uid, sizeof(uid), vm.name);
	if (!r)
		r = index_del(t, IX_VMNAMES, &name, e);
	return r ? r : index_del(t, IX_VMS, &k, e);
}

int store_vm_remove(struct store *s, const uint8_t id[16], uint64_t *nr_snapshots, struct err *e)
{
	struct removal rm = {.s = s, .vm = id};
	scoped_lock(&s->roots_lock);
	int r;

	for (const struct epoch *ep = s->epochs; ep; ep = ep->next)
		if (!memcmp(ep->vm, id, sizeof(ep->vm)))
			return err_set(e, EBUSY, "an epoch of this VM is being written");
	r = store_update(s, remove_txn, &rm, e);
	*nr_snapshots = rm.nr;
	free(rm.ids);
	return r;
}

/* ---- what people say of it ---- */

static bool valid_name(const char *name)
{
	bool digits = true;

	for (const char *p = name; *p; p++) {
		bool digit = *p >= '0' && *p <= '9';

		if (*p <= ' ' || *p == '/' || *p == '@' || *p == 127)
			return false;
		digits &= digit;
	}
	return *name && !digits && strlen(name) < SNAPD_NAME_MAX;
}

int snapshot_check_texts(const char *name, const char *note, const char *tags, struct err *e)
{
	if (name && !valid_name(name))
		return err_set(
			e, EINVAL,
			"\"%.80s\" is no name for a snapshot: up to 63 bytes, not only digits, "
			"no blanks, '/' or '@'",
			name);
	if (note && strlen(note) >= sizeof(((struct rec_snapshot *)0)->note))
		return err_set(e, EINVAL, "a snapshot's note has at most 255 bytes");
	if (tags && strlen(tags) >= sizeof(((struct rec_snapshot *)0)->tags))
		return err_set(e, EINVAL, "a snapshot's tags have at most 255 bytes");
	return 0;
}

struct change_arg {
	uint64_t id;
	const struct snapshot_change *c;
};

static int rename_snapshot(struct ix_txn *t, uint64_t id, struct rec_snapshot *rec,
			   const char *name, struct err *e)
{
	struct rec_snapname entry = {.snapshot = id}, other;
	struct ix_key k = ix_key_name(rec->vm, sizeof(rec->vm), name);
	int r;

	if (!strcmp(name, rec->name))
		return 0;
	r = name[0] ? index_get(t, IX_SNAPNAMES, &k, &other, sizeof(other), NULL, NULL, e)
		    : -ENOENT;
	if (!r)
		return err_set(e, EEXIST, "snapshot %llu of this VM has the name \"%s\"",
			       (unsigned long long)other.snapshot, name);
	if (r == -ENOENT)
		r = forget_name(t, rec, e);
	if (!r && name[0])
		r = index_put(t, IX_SNAPNAMES, &k, &entry, sizeof(entry), NULL, 0, e);
	rec_string(rec->name, name);
	return r;
}

static int change_txn(struct ix_txn *t, void *arg, struct err *e)
{
	const struct change_arg *a = arg;
	const struct snapshot_change *c = a->c;
	struct ix_key k = ix_key_u64(a->id);
	struct rec_snapshot rec;
	int r;

	r = index_get(t, IX_SNAPSHOTS, &k, &rec, sizeof(rec), NULL, NULL, e);
	if (r == -ENOENT)
		return err_set(e, ENOENT, "there is no snapshot %llu", (unsigned long long)a->id);
	if (!r && c->name)
		r = rename_snapshot(t, a->id, &rec, c->name, e);
	if (r)
		return r;
	if (c->note)
		rec_string(rec.note, c->note);
	if (c->tags)
		rec_string(rec.tags, c->tags);
	if (c->pin != SNAPSHOT_PIN_KEEP)
		rec.head.flags = (rec.head.flags & ~REC_SNAPSHOT_PINNED) |
				 (c->pin == SNAPSHOT_PIN_SET ? REC_SNAPSHOT_PINNED : 0);
	return index_put(t, IX_SNAPSHOTS, &k, &rec, sizeof(rec), NULL, 0, e);
}

int store_snapshot_change(struct store *s, uint64_t id, const struct snapshot_change *c,
			  struct err *e)
{
	struct change_arg a = {id, c};
	int r = snapshot_check_texts(c->name && *c->name ? c->name : NULL, c->note, c->tags, e);

	return r ? r : store_update(s, change_txn, &a, e);
}
