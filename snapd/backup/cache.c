/* SPDX-License-Identifier: MIT */
/* What this host knows of a repository, in LMDB; see cache.h. */
#include "snapd/backup/cache.h"

#include <endian.h>
#include <errno.h>
#include <lmdb.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/store/index_check.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"

#define MAP_BYTES (1ull << 37) /* address space, not memory: a quarter of what 39 bits have */

enum db { OBJECTS, PACKS, NUMBERS, PAGES, LOCAL, NR_DBS };
static const char *const db_names[NR_DBS] = {"objects", "packs", "numbers", "pages", "local"};

struct cache {
	MDB_env *env;
	MDB_dbi dbs[NR_DBS];
	_Atomic bool pushing;
	/* under open_lock: */
	char *dir; /* owned */
	uint32_t refs;
	struct cache *next;
};

static pthread_mutex_t open_lock = PTHREAD_MUTEX_INITIALIZER;
static struct cache *open_caches;

struct pack_rec {
	struct bk_name name;
	uint32_t state, nr_pages;
};

struct page_rec {
	uint32_t pack, entry;
	uint64_t hash; /* XXH3-64 of the page's name and the two */
};

static uint64_t page_hash(const struct bk_name *page, const struct page_rec *r)
{
	struct {
		struct bk_name page;
		uint32_t pack, entry;
	} all = {*page, r->pack, r->entry};

	return XXH3_64bits(&all, sizeof(all));
}

static int failed(int rc, struct err *e)
{
	if (rc == MDB_MAP_FULL || rc == ENOSPC)
		return err_set(e, ENOSPC, "the backup cache: no space");
	return err_set(e, rc > 0 ? rc : EIO, "the backup cache: %s", mdb_strerror(rc));
}

/* ---- life ---- */

static int open_dbs(struct cache *c)
{
	MDB_txn *txn;
	int rc = mdb_txn_begin(c->env, NULL, 0, &txn);

	if (rc)
		return rc;
	for (int i = 0; !rc && i < NR_DBS; i++)
		rc = mdb_dbi_open(txn, db_names[i], MDB_CREATE, &c->dbs[i]);
	if (!rc)
		return mdb_txn_commit(txn);
	mdb_txn_abort(txn);
	return rc;
}

static int open_env(const char *dir, struct cache *c)
{
	int rc = mdb_env_create(&c->env);

	if (!rc)
		rc = mdb_env_set_maxdbs(c->env, NR_DBS);
	if (!rc)
		rc = mdb_env_set_mapsize(c->env, MAP_BYTES);
	if (!rc)
		rc = mdb_env_open(c->env, dir, MDB_NOTLS | MDB_NORDAHEAD, 0600);
	return rc ? rc : open_dbs(c);
}

/* LMDB maps its file and trusts it. */
static void drop_damaged(const char *dir)
{
	char path[4096];
	struct err why = {0};

	if (snprintf(path, sizeof(path), "%s/data.mdb", dir) >= (int)sizeof(path) ||
	    access(path, F_OK) || !index_check(path, false, &why))
		return;
	log_warn("%s is damaged and made again: %s", path, why.text);
	unlink(path);
}

static void destroy(struct cache *c)
{
	if (c->env)
		mdb_env_close(c->env);
	free(c->dir);
	free(c);
}

/* open_lock is held. */
static int open_new(const char *dir, struct cache **ret, struct err *e)
{
	struct cache *c;
	int rc;

	if (mkdir(dir, 0700) && errno != EEXIST)
		return err_errno(e, errno, "cannot make %s", dir);
	drop_damaged(dir);
	c = calloc(1, sizeof(*c));
	if (!c)
		return err_errno(e, ENOMEM, "backup cache");
	c->dir = strdup(dir);
	rc = c->dir ? open_env(dir, c) : ENOMEM;
	if (rc) {
		destroy(c);
		return failed(rc, e);
	}
	c->next = open_caches;
	open_caches = c;
	*ret = c;
	return 0;
}

int cache_open(const char *dir, struct cache **ret, struct err *e)
{
	struct cache *c;
	int rc = 0;

	*ret = NULL;
	pthread_mutex_lock(&open_lock);
	for (c = open_caches; c && strcmp(c->dir, dir) != 0; c = c->next)
		;
	if (!c)
		rc = open_new(dir, &c, e);
	if (!rc && c) {
		c->refs++;
		*ret = c;
	}
	pthread_mutex_unlock(&open_lock);
	return rc;
}

void cache_close(struct cache *c)
{
	if (!c)
		return;
	pthread_mutex_lock(&open_lock);
	if (!--c->refs) {
		struct cache **p = &open_caches;

		while (*p != c)
			p = &(*p)->next;
		*p = c->next;
		destroy(c);
	}
	pthread_mutex_unlock(&open_lock);
}

bool cache_try_push(struct cache *c)
{
	return !atomic_exchange(&c->pushing, true);
}

void cache_end_push(struct cache *c)
{
	atomic_store(&c->pushing, false);
}

/* ---- transactions ---- */

static MDB_val val(const void *p, size_t len)
{
	return (MDB_val){.mv_data = (void *)p, .mv_size = len};
}

static MDB_val name_key(const struct bk_name *n)
{
	return val(n->b, sizeof(n->b));
}

/* A write of one record; `value` NULL deletes. */
static int write_one(struct cache *c, enum db db, const struct bk_name *name, const void *value,
		     size_t len, struct err *e)
{
	MDB_val k = name_key(name), v = val(value, len);
	MDB_txn *txn;
	int rc = mdb_txn_begin(c->env, NULL, 0, &txn);

	if (rc)
		return failed(rc, e);
	rc = value ? mdb_put(txn, c->dbs[db], &k, &v, 0) : mdb_del(txn, c->dbs[db], &k, NULL);
	if (rc == MDB_NOTFOUND)
		rc = 0;
	if (!rc)
		rc = mdb_txn_commit(txn);
	else
		mdb_txn_abort(txn);
	return rc ? failed(rc, e) : 0;
}

int cache_put_object(struct cache *c, const struct bk_name *name, const void *bytes, size_t len,
		     struct err *e)
{
	return write_one(c, OBJECTS, name, bytes, len, e);
}

int cache_drop_object(struct cache *c, const struct bk_name *name, struct err *e)
{
	return write_one(c, OBJECTS, name, NULL, 0, e);
}

int cache_get_object(struct cache *c, const struct bk_name *name, void **ret, size_t *len,
		     struct err *e)
{
	MDB_val k = name_key(name), v;
	MDB_txn *txn;
	int rc = mdb_txn_begin(c->env, NULL, MDB_RDONLY, &txn);

	*ret = NULL;
	if (rc)
		return failed(rc, e);
	rc = mdb_get(txn, c->dbs[OBJECTS], &k, &v);
	if (!rc) {
		*ret = malloc(v.mv_size + 1);
		*len = v.mv_size;
		if (*ret)
			memcpy(*ret, v.mv_data, v.mv_size);
		else
			rc = ENOMEM;
	}
	mdb_txn_abort(txn);
	return rc && rc != MDB_NOTFOUND ? failed(rc, e) : 0;
}

/* ---- packs ---- */

static int get_pack(struct cache *c, MDB_txn *txn, uint32_t number, struct pack_rec *ret)
{
	uint32_t be = htobe32(number);
	MDB_val k = val(&be, sizeof(be)), v;
	int rc = mdb_get(txn, c->dbs[PACKS], &k, &v);

	if (!rc && v.mv_size != sizeof(*ret))
		rc = MDB_CORRUPTED;
	if (!rc)
		memcpy(ret, v.mv_data, sizeof(*ret));
	return rc;
}

static int find_number(struct cache *c, MDB_txn *txn, const struct bk_name *name, uint32_t *ret)
{
	MDB_val k = name_key(name), v;
	int rc = mdb_get(txn, c->dbs[NUMBERS], &k, &v);

	if (!rc && v.mv_size != sizeof(*ret))
		rc = MDB_CORRUPTED;
	if (!rc)
		memcpy(ret, v.mv_data, sizeof(*ret));
	return rc;
}

/* The number of a pack that has none yet: numbers are never used twice, since pages of one
 * that was forgotten may still name it. */
static int next_number(struct cache *c, MDB_txn *txn, uint32_t *ret)
{
	static const uint8_t key[] = "next";
	MDB_val k = val(key, sizeof(key)), v;
	uint32_t next = 0;
	int rc = mdb_get(txn, c->dbs[LOCAL], &k, &v);

	if (!rc && v.mv_size == sizeof(next))
		memcpy(&next, v.mv_data, sizeof(next));
	else if (rc != MDB_NOTFOUND)
		return rc ? rc : MDB_CORRUPTED;
	*ret = next++;
	v = val(&next, sizeof(next));
	return mdb_put(txn, c->dbs[LOCAL], &k, &v, 0);
}

static int put_pack_rec(struct cache *c, MDB_txn *txn, uint32_t number, const struct pack_rec *r)
{
	uint32_t be = htobe32(number);
	MDB_val k = val(&be, sizeof(be)), v = val(r, sizeof(*r));

	return mdb_put(txn, c->dbs[PACKS], &k, &v, 0);
}

static int put_pages(struct cache *c, MDB_txn *txn, uint32_t number, const struct bk_name *pages,
		     uint32_t nr)
{
	int rc = 0;

	for (uint32_t i = 0; !rc && i < nr; i++) {
		struct page_rec r = {.pack = number, .entry = i};
		MDB_val k = name_key(&pages[i]), v = val(&r, sizeof(r));

		r.hash = page_hash(&pages[i], &r);
		rc = mdb_put(txn, c->dbs[PAGES], &k, &v, 0);
	}
	return rc;
}

static int put_pack(struct cache *c, MDB_txn *txn, const struct bk_name *name,
		    enum cache_pack state, const struct bk_name *pages, uint32_t nr)
{
	struct pack_rec r = {.name = *name, .state = state, .nr_pages = nr};
	uint32_t number;
	MDB_val k = name_key(name), v = val(&number, sizeof(number));
	int rc = find_number(c, txn, name, &number);

	if (rc == MDB_NOTFOUND) {
		rc = next_number(c, txn, &number);
		if (!rc)
			rc = mdb_put(txn, c->dbs[NUMBERS], &k, &v, 0);
	}
	if (!rc)
		rc = put_pack_rec(c, txn, number, &r);
	return rc ? rc : put_pages(c, txn, number, pages, nr);
}

int cache_put_pack(struct cache *c, const struct bk_name *name, enum cache_pack state,
		   const struct bk_name *pages, uint32_t nr, struct err *e)
{
	MDB_txn *txn;
	int rc = mdb_txn_begin(c->env, NULL, 0, &txn);

	if (rc)
		return failed(rc, e);
	rc = put_pack(c, txn, name, state, pages, nr);
	if (!rc)
		rc = mdb_txn_commit(txn);
	else
		mdb_txn_abort(txn);
	return rc ? failed(rc, e) : 0;
}

static int set_state(struct cache *c, MDB_txn *txn, const struct bk_name *name,
		     enum cache_pack state)
{
	MDB_val k = name_key(name);
	struct pack_rec r;
	uint32_t number, be;
	int rc = find_number(c, txn, name, &number);

	if (!rc)
		rc = get_pack(c, txn, number, &r);
	if (rc)
		return rc == MDB_NOTFOUND ? 0 : rc;
	r.state = state;
	if (state != CACHE_NONE)
		return put_pack_rec(c, txn, number, &r);
	rc = mdb_del(txn, c->dbs[NUMBERS], &k, NULL);
	be = htobe32(number);
	k = val(&be, sizeof(be));
	return rc ? rc : mdb_del(txn, c->dbs[PACKS], &k, NULL);
}

int cache_set_pack(struct cache *c, const struct bk_name *name, enum cache_pack state,
		   struct err *e)
{
	MDB_txn *txn;
	int rc = mdb_txn_begin(c->env, NULL, 0, &txn);

	if (rc)
		return failed(rc, e);
	rc = set_state(c, txn, name, state);
	if (!rc)
		rc = mdb_txn_commit(txn);
	else
		mdb_txn_abort(txn);
	return rc ? failed(rc, e) : 0;
}

enum cache_pack cache_pack_state(struct cache *c, const struct bk_name *name)
{
	struct pack_rec r = {0};
	uint32_t number;
	MDB_txn *txn;

	if (mdb_txn_begin(c->env, NULL, MDB_RDONLY, &txn))
		return CACHE_NONE;
	if (!find_number(c, txn, name, &number))
		get_pack(c, txn, number, &r);
	mdb_txn_abort(txn);
	return (enum cache_pack)r.state;
}

int cache_each_pack(struct cache *c, cache_pack_fn fn, void *arg, struct err *e)
{
	MDB_cursor *cur = NULL;
	struct pack_rec r;
	MDB_txn *txn;
	MDB_val k, v;
	int rc = mdb_txn_begin(c->env, NULL, MDB_RDONLY, &txn), got = 0;

	if (rc)
		return failed(rc, e);
	rc = mdb_cursor_open(txn, c->dbs[PACKS], &cur);
	while (!rc && !got && !(rc = mdb_cursor_get(cur, &k, &v, MDB_NEXT))) {
		if (v.mv_size != sizeof(r))
			continue;
		memcpy(&r, v.mv_data, sizeof(r));
		got = fn(arg, &r.name, (enum cache_pack)r.state);
	}
	mdb_cursor_close(cur); /* which the end of a read transaction does not do */
	mdb_txn_abort(txn);
	return got ? got : rc && rc != MDB_NOTFOUND ? failed(rc, e) : 0;
}

/* ---- pages ---- */

struct cache_view {
	struct cache *c;
	MDB_txn *txn;
};

int cache_view_open(struct cache *c, struct cache_view **ret, struct err *e)
{
	struct cache_view *v = calloc(1, sizeof(*v));
	int rc = v ? mdb_txn_begin(c->env, NULL, MDB_RDONLY, &v->txn) : ENOMEM;

	if (rc) {
		free(v);
		return failed(rc, e);
	}
	v->c = c;
	*ret = v;
	return 0;
}

void cache_view_close(struct cache_view *v)
{
	if (!v)
		return;
	mdb_txn_abort(v->txn);
	free(v);
}

bool cache_find(struct cache_view *v, const struct bk_name *page, struct cache_place *ret)
{
	MDB_val k = name_key(page), got;
	struct pack_rec pack;
	struct page_rec r;

	if (mdb_get(v->txn, v->c->dbs[PAGES], &k, &got) || got.mv_size != sizeof(r))
		return false;
	memcpy(&r, got.mv_data, sizeof(r));
	if (r.hash != page_hash(page, &r) || get_pack(v->c, v->txn, r.pack, &pack) ||
	    pack.state == CACHE_NONE || r.entry >= pack.nr_pages)
		return false;
	*ret = (struct cache_place){
		.pack = pack.name, .entry = r.entry, .state = (enum cache_pack)pack.state};
	return true;
}

/* ---- pulled snapshots ---- */

uint64_t cache_local(struct cache *c, const struct bk_name *manifest)
{
	MDB_val k = name_key(manifest), v;
	uint64_t id = 0;
	MDB_txn *txn;

	if (mdb_txn_begin(c->env, NULL, MDB_RDONLY, &txn))
		return 0;
	if (!mdb_get(txn, c->dbs[LOCAL], &k, &v) && v.mv_size == sizeof(id))
		memcpy(&id, v.mv_data, sizeof(id));
	mdb_txn_abort(txn);
	return id;
}

int cache_set_local(struct cache *c, const struct bk_name *manifest, uint64_t snapshot,
		    struct err *e)
{
	return write_one(c, LOCAL, manifest, &snapshot, sizeof(snapshot), e);
}
