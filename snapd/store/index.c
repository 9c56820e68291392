/* SPDX-License-Identifier: MIT */
/*
 * The LMDB environment and its transactions; see index.h.
 *
 * The map grows when a transaction meets MDB_MAP_FULL: the transaction is thrown
 * away, `resize_lock` is taken for writing (so no transaction of this process is
 * open), the map is doubled, and the transaction's function runs again.  A reader
 * beside a growing writer process sees MDB_MAP_RESIZED and adopts the new size in
 * the same way.  Every transaction holds `resize_lock` for reading.
 *
 * LMDB runs with its default durability: a commit returns when data and meta page
 * are on stable storage.
 */
#include "snapd/store/index_priv.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include "snapd/store/index_check.h"
#include "snapd/util/cleanup.h"

#define INDEX_MAP_DEFAULT ((size_t)64 << 20)
#define INDEX_MAP_MAX	  ((size_t)1 << 42)
#define FULL_BYTES	  (256u << 10)
#define INDEX_READERS	  1024

const char *const index_db_names[IX_NR_DBS] = {
	[IX_META] = "meta",	      [IX_VMS] = "vms",		  [IX_VMNAMES] = "vmnames",
	[IX_TIMELINES] = "timelines", [IX_EPOCHS] = "epochs",	  [IX_SNAPSHOTS] = "snapshots",
	[IX_SNAPNAMES] = "snapnames", [IX_SEGMENTS] = "segments", [IX_REFS] = "refs",
	[IX_COUNTED] = "counted",
};
/* LMDB reports a write that the disk took in part only as EIO. */
static bool disk_is_full(const struct index *ix)
{
	struct statvfs fs;

	return !statvfs(ix->dir, &fs) && fs.f_bavail * fs.f_frsize < FULL_BYTES;
}

int index_error(const struct index *ix, int rc, const char *what, struct err *e)
{
	if (rc == EIO && disk_is_full(ix))
		rc = ENOSPC;
	if (rc > 0)
		return err_errno(e, rc, "index %s: %s", ix->dir, what);
	if (rc == MDB_READERS_FULL)
		return err_set(e, EBUSY, "index %s: %s: too many readers", ix->dir, what);
	if (rc == MDB_PANIC)
		return err_set(e, EIO, "index %s: %s: an earlier write failed; restart snapd",
			       ix->dir, what);
	return err_set(e, E_CORRUPT, "index %s: %s: %s", ix->dir, what, mdb_strerror(rc));
}

/* ---- opening ---- */

static int open_dbs_in(struct index *ix, MDB_txn *txn, bool create, bool *lacks, struct err *e)
{
	for (int i = 0; i < IX_NR_DBS; i++) {
		int r = mdb_dbi_open(txn, index_db_names[i], create ? MDB_CREATE : 0, &ix->dbi[i]);

		if (r == MDB_NOTFOUND && index_db_is_derived((enum index_db)i)) {
			ix->dbi[i] = NO_DBI;
			*lacks = true;
			continue;
		}
		if (r == MDB_NOTFOUND)
			return err_set(e, E_CORRUPT, "index %s: there is no database \"%s\"",
				       ix->dir, index_db_names[i]);
		if (r)
			return index_error(ix, r, "opening a database", e);
	}
	return 0;
}

static int open_dbs_once(struct index *ix, bool create, bool *lacks, struct err *e)
{
	MDB_txn *txn;
	int r = mdb_txn_begin(ix->env, NULL, create ? 0 : MDB_RDONLY, &txn);

	*lacks = false;
	if (r)
		return index_error(ix, r, "first transaction", e);
	r = open_dbs_in(ix, txn, create, lacks, e);
	if (r) {
		mdb_txn_abort(txn);
		return r;
	}
	r = mdb_txn_commit(txn);
	return r ? index_error(ix, r, "first commit", e) : 0;
}

/* All databases are made by one commit: an environment has all of them, or none
 * when a crash came before that commit.  One of an older version has no derived ones. */
static int open_dbs(struct index *ix, bool may_create, struct err *e)
{
	bool create = false, lacks;
	MDB_stat st;
	int r;

	r = mdb_env_stat(ix->env, &st);
	if (r)
		return index_error(ix, r, "first look", e);
	if (may_create)
		create = st.ms_entries == 0;
	r = open_dbs_once(ix, create, &lacks, e);
	return r || !lacks || ix->read_only ? r : open_dbs_once(ix, true, &lacks, e);
}

static int env_open(struct index *ix, const struct index_config *c, struct err *e)
{
	unsigned flags = MDB_NOTLS | (c->read_only ? MDB_RDONLY : 0);
	size_t map = c->map_bytes ? c->map_bytes : INDEX_MAP_DEFAULT;
	int r, dead;

	r = mdb_env_create(&ix->env);
	if (r)
		return index_error(ix, r, "creating the environment", e);
	mdb_env_set_maxdbs(ix->env, IX_NR_DBS);
	mdb_env_set_maxreaders(ix->env, INDEX_READERS);
	r = mdb_env_set_mapsize(ix->env, map);
	if (!r)
		r = mdb_env_open(ix->env, c->dir, flags, 0600);
	if (r)
		return index_error(ix, r, "opening", e);
	mdb_reader_check(ix->env, &dead);
	return 0;
}

static int check_file(const struct index_config *c, struct err *e)
{
	char path[4096];
	int r;

	if (snprintf(path, sizeof(path), "%s/data.mdb", c->dir) >= (int)sizeof(path))
		return err_set(e, ENAMETOOLONG, "%s: path too long", c->dir);
	r = index_check(path, c->read_only, e);
	if (r == -ENOENT && c->create && !c->read_only) {
		err_clear(e);
		return 0;
	}
	return r;
}

int index_open(const struct index_config *config, struct index **ret, struct err *e)
{
	struct index *ix;
	int r;

	r = check_file(config, e);
	if (r)
		return r;
	ix = calloc(1, sizeof(*ix));
	if (!ix)
		return err_errno(e, ENOMEM, "index");
	pthread_rwlock_init(&ix->resize_lock, NULL);
	ix->read_only = config->read_only;
	ix->key = config->key;
	ix->dir = strdup(config->dir);
	r = ix->dir ? env_open(ix, config, e) : err_errno(e, ENOMEM, "index");
	if (!r)
		r = open_dbs(ix, config->create && !config->read_only, e);
	if (r) {
		index_close(ix);
		return r;
	}
	*ret = ix;
	return 0;
}

void index_close(struct index *ix)
{
	if (!ix)
		return;
	if (ix->env)
		mdb_env_close(ix->env);
	pthread_rwlock_destroy(&ix->resize_lock);
	free(ix->dir);
	free(ix);
}

uint64_t index_bytes(struct index *ix)
{
	mdb_filehandle_t fd;
	struct stat st;

	if (mdb_env_get_fd(ix->env, &fd) || fstat(fd, &st))
		return 0;
	return (uint64_t)st.st_blocks * 512;
}

/* ---- transactions ---- */

/* The map to `bytes`, or (0) to what another process made it. */
static int map_resize(struct index *ix, size_t bytes, struct err *e)
{
	int r;

	if (bytes > INDEX_MAP_MAX)
		return err_set(e, ENOSPC, "index %s: larger than %zu bytes", ix->dir,
			       INDEX_MAP_MAX);
	pthread_rwlock_wrlock(&ix->resize_lock);
	r = mdb_env_set_mapsize(ix->env, bytes);
	pthread_rwlock_unlock(&ix->resize_lock);
	return r ? index_error(ix, r, "resizing the map", e) : 0;
}

static int map_grow(struct index *ix, struct err *e)
{
	MDB_envinfo info;
	int r = mdb_env_info(ix->env, &info);

	if (r)
		return index_error(ix, r, "reading the map size", e);
	return map_resize(ix, info.me_mapsize * 2, e);
}

static int txn_begin(struct index *ix, struct ix_txn *t, unsigned flags, struct err *e)
{
	for (int tries = 0; tries < 16; tries++) {
		int r;

		pthread_rwlock_rdlock(&ix->resize_lock);
		*t = (struct ix_txn){.ix = ix};
		r = mdb_txn_begin(ix->env, NULL, flags, &t->txn);
		if (!r)
			return 0;
		pthread_rwlock_unlock(&ix->resize_lock);
		t->ix = NULL;
		if (r != MDB_MAP_RESIZED)
			return index_error(ix, r, "beginning a transaction", e);
		r = map_resize(ix, 0, e);
		if (r)
			return r;
	}
	return err_set(e, EAGAIN, "index %s: the map keeps growing", ix->dir);
}

int index_begin(struct index *ix, struct ix_txn *t, struct err *e)
{
	return txn_begin(ix, t, MDB_RDONLY, e);
}

void index_end(struct ix_txn *t)
{
	if (!t->ix)
		return;
	if (t->txn)
		mdb_txn_abort(t->txn);
	pthread_rwlock_unlock(&t->ix->resize_lock);
	t->ix = NULL;
}

bool index_in_doubt(struct index *ix)
{
	MDB_txn *txn;
	int r = mdb_txn_begin(ix->env, NULL, MDB_RDONLY, &txn);

	if (!r)
		mdb_txn_abort(txn);
	return r == MDB_PANIC;
}

/* 0 committed; 1 the map was full; or an error. */
static int update_once(struct index *ix, int (*fn)(struct ix_txn *t, void *arg, struct err *e),
		       void *arg, struct err *e)
{
	struct ix_txn t;
	int r;

	r = txn_begin(ix, &t, 0, e);
	if (r)
		return r;
	r = fn(&t, arg, e);
	if (!r) {
		r = mdb_txn_commit(steal_ptr(&t.txn));
		if (r == MDB_MAP_FULL)
			t.map_full = true;
		else if (r)
			r = index_error(ix, r, "committing", e);
		if (r && !t.map_full && ix->doubt && index_in_doubt(ix))
			ix->doubt(ix->doubt_opaque);
	}
	index_end(&t);
	return t.map_full ? 1 : r;
}

void index_on_doubt(struct index *ix, void (*fn)(void *opaque), void *opaque)
{
	ix->doubt = fn;
	ix->doubt_opaque = opaque;
}

int index_update(struct index *ix, int (*fn)(struct ix_txn *t, void *arg, struct err *e), void *arg,
		 struct err *e)
{
	if (ix->read_only)
		return err_set(e, EROFS, "index %s: opened read-only", ix->dir);
	for (;;) {
		struct err one = {0};
		int r = update_once(ix, fn, arg, &one);

		if (r != 1) {
			if (r && e && !e->code)
				*e = one;
			return r;
		}
		r = map_grow(ix, e);
		if (r)
			return r;
	}
}
