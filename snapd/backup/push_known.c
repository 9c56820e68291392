/* SPDX-License-Identifier: MIT */
/* What a push finds in the repository: a base, and packs; see push.h. */
#include "snapd/backup/push_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/store/point.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"

#define TABLE_READ (320u << 10) /* header and table of most packs */

/* The local snapshot that a manifest is of: taken here, or pulled; 0: none. */
static uint64_t local_of(struct store *s, struct repo *r, const struct manifest *m)
{
	if (!memcmp(m->m.store, store_uuid(s), 16))
		return m->m.snapshot;
	return cache_local(r->cache, &m->name);
}

const struct manifest *push_find(const struct repo_list *list, struct store *s, struct repo *r,
				 uint64_t snapshot)
{
	for (size_t i = 0; i < list->nr; i++)
		if (local_of(s, r, &list->all[i]) == snapshot)
			return &list->all[i];
	return NULL;
}

/* Where a manifest's snapshot is in this store.  One that was deleted since counts if this
 * host's cache says that it was pushed from here: a store that was put back to an earlier
 * state gives points out twice. */
static bool point_of(struct push *p, const struct manifest *m, struct snapd_point *ret)
{
	uint64_t id = local_of(p->store, p->r, m);
	bool ours = !memcmp(m->m.store, store_uuid(p->store), 16);
	struct store_snapshot s;

	if (!id || m->m.page_size != p->c.snap.page_size)
		return false;
	if (!store_snapshot_get(p->store, id, &s, NULL)) {
		*ret = s.point;
		return s.taken_ns == m->m.taken_ns;
	}
	*ret = (struct snapd_point){m->m.timeline, m->m.epoch};
	return ours && cache_local(p->r->cache, &m->name) == id;
}

struct bases {
	struct push_base *all; /* owned; sorted by point */
	size_t nr;
	struct push_base *found; /* in `all` */
};

/* The newest in the stretch. */
static int find_base(void *arg, uint64_t timeline, uint64_t from, uint64_t to)
{
	struct snapd_point end = {timeline, to};
	struct bases *b = arg;
	size_t lo = 0, hi = b->nr;

	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (compare_points(&b->all[mid].point, &end) <= 0)
			lo = mid + 1;
		else
			hi = mid;
	}
	if (lo && b->all[lo - 1].point.timeline == timeline && b->all[lo - 1].point.epoch >= from)
		b->found = &b->all[lo - 1];
	return b->found != NULL;
}

int push_find_ancestor(struct push *p, struct push_base *ret, struct err *e)
{
	struct bases b = {.all = calloc(p->list.nr + 1, sizeof(*b.all))};
	int rc;

	*ret = (struct push_base){0};
	if (!b.all)
		return err_errno(e, ENOMEM, "push");
	for (size_t i = 0; i < p->list.nr; i++) {
		b.all[b.nr].manifest = &p->list.all[i];
		b.nr += point_of(p, &p->list.all[i], &b.all[b.nr].point);
	}
	qsort(b.all, b.nr, sizeof(*b.all), compare_points);
	rc = mapstream_ancestors(p->store, p->c.snap.point, find_base, &b, e);
	if (b.found)
		*ret = *b.found;
	free(b.all);
	return MIN(rc, 0);
}

void push_find_relative(struct push *p, struct push_base *ret)
{
	uint64_t id;
	struct store_snapshot s;

	*ret = (struct push_base){0};
	for (size_t i = 0; i < p->list.nr; i++) {
		const struct manifest *m = &p->list.all[i];

		id = local_of(p->store, p->r, m);
		if (!id || store_snapshot_get(p->store, id, &s, NULL) ||
		    memcmp(s.vm, p->c.snap.vm, 16) != 0 || s.page_size != p->c.snap.page_size ||
		    s.taken_ns != m->m.taken_ns)
			continue;
		*ret = (struct push_base){.point = s.point, .manifest = m};
	}
}

struct unsure {
	struct packset names;
};

static int add_unsure(void *arg, const struct bk_name *name, enum cache_pack state)
{
	struct unsure *u = arg;
	uint32_t n;

	return state == CACHE_INTENDED ? packset_add(&u->names, name, &n) : 0;
}

/* Packs that a push which was killed may or may not have sent. */
int push_settle_intents(struct push *p, struct err *e)
{
	struct unsure u = {0};
	char key[REPO_KEY_BYTES];
	int rc = cache_each_pack(p->r->cache, add_unsure, &u, e);

	for (uint32_t i = 0; !rc && i < u.names.nr; i++) {
		const struct bk_name *name = &u.names.names[i];
		struct objstore_info info;

		rc = objstore_head(p->r->os, repo_key(REPO_PACKS, name, key), &info, NULL);
		if (!rc || rc == -ENOENT)
			rc = cache_set_pack(p->r->cache, name, rc ? CACHE_NONE : CACHE_SENT, e);
		else
			err_errno(e, -rc, "%s", key);
	}
	packset_deinit(&u.names);
	return rc;
}

/* The pages of a pack that somebody else sent. */
static int learn_pack(struct push *p, const struct bk_name *name, uint8_t *buf, struct err *e)
{
	size_t len, want = 0;
	char key[REPO_KEY_BYTES];
	struct pack_head h;
	int rc = objstore_get(p->r->os, repo_key(REPO_PACKS, name, key), 0, buf, TABLE_READ, &len,
			      e);

	if (rc == -ENOENT) {
		err_clear(e);
		return 0;
	}
	if (rc)
		return rc;
	rc = pack_head_bytes(&p->r->keys, buf, len, &want, NULL);
	if (!rc && want > len)
		rc = objstore_get(p->r->os, key, 0, buf, want, &len, NULL);
	if (!rc)
		rc = pack_head_decode(&p->r->keys, name, buf, len, &h, NULL);
	if (rc) { /* verify tells; nothing will refer to it */
		log_warn("backup: %s is damaged and not used", key);
		return 0;
	}
	rc = cache_put_pack(p->r->cache, name, CACHE_SENT, h.names, h.header.nr_pages, e);
	pack_head_deinit(&h);
	return rc;
}

struct forgetting {
	const struct packset *there;
	struct packset gone;
};

static int add_gone(void *arg, const struct bk_name *name, enum cache_pack state)
{
	struct forgetting *f = arg;
	uint32_t n;

	return packset_find(f->there, name) < 0 ? packset_add(&f->gone, name, &n) : 0;
}

/* Without a base most of the memory may be in the bucket already, from other VMs and hosts. */
int push_learn_all(struct push *p, struct err *e)
{
	_cleanup_free_ uint8_t *buf =
		malloc(sizeof(struct bk_header) + BK_TAG_BYTES +
		       BK_PACK_PAGES * (sizeof(struct bk_run) + BK_NAME_BYTES));
	_cleanup_(packset_deinit) struct packset there = {0};
	struct forgetting f = {.there = &there};
	int rc = buf ? repo_names(p->r, REPO_PACKS, &there, e) : err_errno(e, ENOMEM, "push");

	if (!rc)
		rc = cache_each_pack(p->r->cache, add_gone, &f, e);
	for (uint32_t i = 0; !rc && i < f.gone.nr; i++)
		rc = cache_set_pack(p->r->cache, &f.gone.names[i], CACHE_NONE, e);
	packset_deinit(&f.gone);
	for (uint32_t i = 0; !rc && i < there.nr; i++) {
		rc = push_cancelled(p, e);
		if (!rc && cache_pack_state(p->r->cache, &there.names[i]) == CACHE_NONE)
			rc = learn_pack(p, &there.names[i], buf, e);
	}
	return rc;
}
