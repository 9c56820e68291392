/* SPDX-License-Identifier: MIT */
/*
 * prune: what no snapshot needs any more goes, in steps that are G apart; R3 and R4 of repo.h.
 *
 *   1 tombstones that are G old: their manifests go, then they
 *   2 what is there: packs and blobs, with their times; the marks, with theirs
 *   3 what is needed: all manifests, forgotten ones too, and the maps that they name
 *   4 what is not needed and named by a mark that was G old before 3 began: goes
 *   5 marks all of whose objects are gone: go
 *   6 what is not needed, not marked and G old itself: is marked
 *
 * Objects younger than G are not marked, so that a push that takes long is not disturbed.
 * Each step is safe to stop after, and safe beside another prune.
 */
#include "snapd/backup/repo.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"

struct object {
	int64_t mtime_s;
	uint64_t bytes;
};

/* The objects of a room. */
struct room {
	struct packset names;
	struct object *objects; /* owned; by number */
	bool *needed, *marked;	/* owned; by number */
	uint32_t cap;
};

struct mark {
	struct bk_name name;
	int64_t mtime_s;
};

struct prune {
	struct repo *r;
	bool dry_run;
	bool (*stop)(void *opaque);
	void *opaque;
	struct prune_stats *stats;
	struct room rooms[2]; /* packs, blobs */
	struct mark *marks;   /* owned */
	size_t nr_marks;
	int64_t listed_s; /* the store's clock when the list of manifests began */
};

static void room_deinit(struct room *m)
{
	packset_deinit(&m->names);
	free(m->objects);
	free(m->needed);
	free(m->marked);
}

static void prune_deinit(struct prune *p)
{
	room_deinit(&p->rooms[0]);
	room_deinit(&p->rooms[1]);
	free(p->marks);
}

static int stopped(const struct prune *p, struct err *e)
{
	return p->stop && p->stop(p->opaque) ? err_set(e, ECANCELED, "prune was cancelled") : 0;
}

static bool is_old(const struct prune *p, int64_t mtime_s)
{
	return p->listed_s - mtime_s >= (int64_t)p->r->keys.grace_s;
}

/* ---- 1: what was forgotten ---- */

struct tombs {
	struct mark *all; /* owned */
	size_t nr, cap;
};

static int on_object(void *arg, const struct bk_name *name, const struct objstore_info *info)
{
	struct tombs *t = arg;

	if (t->nr == t->cap) {
		size_t cap = t->cap ? 2 * t->cap : 64;
		struct mark *all = realloc(t->all, cap * sizeof(*all));

		if (!all)
			return -ENOMEM;
		t->all = all;
		t->cap = cap;
	}
	t->all[t->nr++] = (struct mark){.name = *name, .mtime_s = info->mtime_s};
	return 0;
}

static int delete_object(struct prune *p, enum repo_room room, const struct bk_name *name,
			 struct err *e)
{
	char key[REPO_KEY_BYTES];

	return p->dry_run ? 0 : objstore_delete(p->r->os, repo_key(room, name, key), e);
}

static int drop_forgotten(struct prune *p, struct err *e)
{
	struct tombs t = {0};
	int rc = repo_each(p->r, REPO_FORGOTTEN, on_object, &t, e);

	p->listed_s = objstore_clock(p->r->os);
	for (size_t i = 0; !rc && i < t.nr; i++) {
		if (!is_old(p, t.all[i].mtime_s))
			continue;
		rc = delete_object(p, REPO_SNAPSHOTS, &t.all[i].name, e);
		if (!rc)
			rc = delete_object(p, REPO_FORGOTTEN, &t.all[i].name, e);
		if (!rc && !p->dry_run)
			rc = cache_drop_object(p->r->cache, &t.all[i].name, e);
		p->stats->snapshots_deleted += !rc;
	}
	free(t.all);
	return rc;
}

/* ---- 2: what is there ---- */

static int on_thing(void *arg, const struct bk_name *name, const struct objstore_info *info)
{
	struct room *m = arg;
	uint32_t n;
	int rc = packset_add(&m->names, name, &n);

	if (rc)
		return rc;
	if (n >= m->cap) {
		uint32_t cap = m->cap ? 2 * m->cap : 256;
		struct object *objects = realloc(m->objects, cap * sizeof(*objects));

		if (!objects)
			return -ENOMEM;
		m->objects = objects;
		m->cap = cap;
	}
	m->objects[n] = (struct object){.mtime_s = info->mtime_s, .bytes = info->size};
	return 0;
}

static int list_room(struct prune *p, enum repo_room room, struct room *m, struct err *e)
{
	int rc = repo_each(p->r, room, on_thing, m, e);

	if (rc)
		return rc;
	m->needed = calloc(m->names.nr + 1, sizeof(*m->needed));
	m->marked = calloc(m->names.nr + 1, sizeof(*m->marked));
	return m->needed && m->marked ? 0 : err_errno(e, ENOMEM, "prune");
}

static int list_marks(struct prune *p, struct err *e)
{
	struct tombs t = {0};
	int rc = repo_each(p->r, REPO_MARKS, on_object, &t, e);

	p->marks = t.all;
	p->nr_marks = t.nr;
	return rc;
}

/* ---- 3: what is needed ---- */

static void need(struct room *m, const struct bk_name *name)
{
	int64_t n = packset_find(&m->names, name);

	if (n >= 0)
		m->needed[n] = true;
}

static int ignore_run(void *arg, const struct layer_run *run, struct err *e)
{
	return 0;
}

/* A map that was looked at needs no second look; its packs are needed then. */
static int need_map(struct prune *p, const struct bk_name *map, struct err *e)
{
	_cleanup_(packset_deinit) struct packset packs = {0};
	_cleanup_free_ uint8_t *payload = NULL;
	int64_t n = packset_find(&p->rooms[1].names, map);
	size_t len;
	int rc;

	if (n >= 0 && p->rooms[1].needed[n])
		return 0;
	rc = repo_get_blob(p->r, REPO_BLOBS, BK_MAP, map, &payload, &len, e);
	if (!rc)
		rc = layer_decode(payload, len, &packs, ignore_run, NULL, e);
	if (rc)
		return rc;
	for (uint32_t i = 0; i < packs.nr; i++)
		need(&p->rooms[0], &packs.names[i]);
	need(&p->rooms[1], map);
	return 0;
}

static int need_parts(struct prune *p, const struct bk_name *name, struct err *e)
{
	struct manifest m = {0};
	struct bk_name state;
	int rc = repo_get_manifest(p->r, name, &m, e);

	if (rc)
		return rc;
	memcpy(state.b, m.m.state, sizeof(state.b));
	need(&p->rooms[1], &state);
	for (uint32_t i = 0; !rc && i < m.m.nr_maps; i++)
		rc = need_map(p, &m.maps[i], e);
	manifest_deinit(&m);
	p->stats->snapshots++;
	return rc;
}

static int need_snapshot(struct prune *p, const struct bk_name *name, struct err *e)
{
	char key[REPO_KEY_BYTES];
	struct objstore_info info;
	struct err why = {0};
	int rc = stopped(p, e);

	if (rc)
		return rc;
	rc = need_parts(p, name, &why);
	if (rc == -E_CORRUPT &&
	    objstore_head(p->r->os, repo_key(REPO_SNAPSHOTS, name, key), &info, NULL) == -ENOENT)
		return err_set(e, EBUSY, "another prune is under way");
	return rc ? err_set(e, -rc, "%s", why.code ? why.text : strerror(-rc)) : 0;
}

static int find_needed(struct prune *p, struct err *e)
{
	_cleanup_(packset_deinit) struct packset names = {0};
	int rc;

	/* The marks that count are those that were old before this list begins. */
	p->listed_s = objstore_clock(p->r->os);
	rc = repo_names(p->r, REPO_SNAPSHOTS, &names, e);
	for (uint32_t i = 0; !rc && i < names.nr; i++)
		rc = need_snapshot(p, &names.names[i], e);
	return rc;
}

/* ---- 4, 5: what marks name ---- */

/* 1: gone now, 0: it stays. */
static int drop_marked(struct prune *p, const struct mark *mark, const struct bk_marked *one,
		       struct err *e)
{
	struct room *m = &p->rooms[!one->is_pack];
	struct bk_name name;
	int64_t n;
	int rc;

	memcpy(name.b, one->name, sizeof(name.b));
	n = packset_find(&m->names, &name);
	if (n < 0)
		return 1;
	m->marked[n] = true;
	if (m->needed[n])
		return 0;
	if (!is_old(p, mark->mtime_s)) {
		p->stats->waiting++;
		return 0;
	}
	rc = delete_object(p, one->is_pack ? REPO_PACKS : REPO_BLOBS, &name, e);
	if (!rc && one->is_pack && !p->dry_run)
		rc = cache_set_pack(p->r->cache, &name, CACHE_NONE, e);
	if (rc)
		return rc;
	*(one->is_pack ? &p->stats->packs_deleted : &p->stats->blobs_deleted) += 1;
	p->stats->bytes_deleted += m->objects[n].bytes;
	return 1;
}

static int work_mark(struct prune *p, const struct mark *mark, struct err *e)
{
	_cleanup_free_ uint8_t *payload = NULL;
	size_t len, nr, gone = 0;
	char key[REPO_KEY_BYTES];
	struct objstore_info info;
	struct err why = {0};
	int rc = repo_get_cached(p->r, REPO_MARKS, BK_MARK, &mark->name, &payload, &len, &why);

	/* Another prune has done it. */
	if (rc == -E_CORRUPT &&
	    objstore_head(p->r->os, repo_key(REPO_MARKS, &mark->name, key), &info, NULL) == -ENOENT)
		return 0;
	if (rc)
		return err_set(e, -rc, "%s", why.code ? why.text : strerror(-rc));
	nr = len / sizeof(struct bk_marked);
	for (size_t i = 0; i < nr; i++) {
		struct bk_marked one;

		memcpy(&one, payload + i * sizeof(one), sizeof(one));
		rc = stopped(p, e);
		if (!rc)
			rc = drop_marked(p, mark, &one, e);
		if (rc < 0)
			return rc;
		gone += (size_t)rc;
	}
	if (gone < nr)
		return 0;
	rc = delete_object(p, REPO_MARKS, &mark->name, e);
	return rc || p->dry_run ? rc : cache_drop_object(p->r->cache, &mark->name, e);
}

/* ---- 6: new marks ---- */

static void mark_room(struct prune *p, bool is_pack, struct bk_marked *list, size_t *nr)
{
	struct room *m = &p->rooms[!is_pack];

	for (uint32_t i = 0; i < m->names.nr; i++) {
		if (m->needed[i] || m->marked[i] || !is_old(p, m->objects[i].mtime_s))
			continue;
		list[*nr] = (struct bk_marked){.is_pack = is_pack};
		memcpy(list[*nr].name, m->names.names[i].b, BK_NAME_BYTES);
		++*nr;
	}
}

static int mark_unused(struct prune *p, struct err *e)
{
	size_t room = (size_t)p->rooms[0].names.nr + p->rooms[1].names.nr, nr = 0;
	_cleanup_free_ struct bk_marked *list = calloc(room + 1, sizeof(*list));
	struct bk_name name;
	uint64_t sent = 0;

	if (!list)
		return err_errno(e, ENOMEM, "prune");
	mark_room(p, true, list, &nr);
	mark_room(p, false, list, &nr);
	p->stats->marked = nr;
	if (!nr || p->dry_run)
		return 0;
	return repo_put_blob(p->r, REPO_MARKS, BK_MARK, list, nr * sizeof(*list), &name, &sent, e);
}

int repo_prune(struct repo *r, bool dry_run, bool (*stop)(void *opaque), void *opaque,
	       struct prune_stats *ret, struct err *e)
{
	_cleanup_(prune_deinit) struct prune p = {
		.r = r, .dry_run = dry_run, .stop = stop, .opaque = opaque, .stats = ret};
	int rc;

	*ret = (struct prune_stats){0};
	rc = drop_forgotten(&p, e);
	if (!rc)
		rc = list_room(&p, REPO_PACKS, &p.rooms[0], e);
	if (!rc)
		rc = list_room(&p, REPO_BLOBS, &p.rooms[1], e);
	if (!rc)
		rc = list_marks(&p, e);
	if (!rc)
		rc = find_needed(&p, e);
	ret->packs = p.rooms[0].names.nr;
	ret->blobs = p.rooms[1].names.nr;
	for (size_t i = 0; !rc && i < p.nr_marks; i++)
		rc = work_mark(&p, &p.marks[i], e);
	return rc ? rc : mark_unused(&p, e);
}
