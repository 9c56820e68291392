/* SPDX-License-Identifier: MIT */
/*
 * LMDB transactions and checked records; see index.h.
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
#include "snapd/store/index.h"

#include <fcntl.h>
#include <pthread.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/store/index_check.h"
#include "snapd/store/reclog.h"
#include "snapd/store/seal.h"
#include "snapd/util/cleanup.h"

#define INDEX_MAP_DEFAULT ((size_t)64 << 20)
#define INDEX_MAP_MAX	  ((size_t)1 << 42)
#define FULL_BYTES	  (256u << 10)
#define INDEX_READERS	  1024

struct index {
	MDB_env *env;
	MDB_dbi dbi[IX_NR_DBS];
	pthread_rwlock_t resize_lock; /* read: a transaction is open; write: the map changes */
	char *dir;		      /* owned; for reasons */
	bool read_only;
	const uint8_t *key; /* borrowed; NULL: records are hashed, not authenticated */
};

static const char *const db_names[] = {
	[IX_META] = "meta",	      [IX_VMS] = "vms",		  [IX_VMNAMES] = "vmnames",
	[IX_TIMELINES] = "timelines", [IX_EPOCHS] = "epochs",	  [IX_SNAPSHOTS] = "snapshots",
	[IX_SNAPNAMES] = "snapnames", [IX_SEGMENTS] = "segments",
};
static_assert(ARRAY_SIZE(db_names) == IX_NR_DBS, "a name for each database");

/* Flags that a record may have; the others are damage. */
static const uint32_t db_flags[IX_NR_DBS] = {[IX_SNAPSHOTS] = REC_SNAPSHOT_PINNED |
							      REC_SNAPSHOT_POSTMORTEM};

/* What a rebuilt index can't take from the segments by looking; names follow. */
static bool is_journalled(enum index_db db)
{
	return db == IX_VMS || db == IX_TIMELINES || db == IX_EPOCHS || db == IX_SNAPSHOTS;
}

/* LMDB reports a write that the disk took in part only as EIO. */
static bool disk_is_full(const struct index *ix)
{
	struct statvfs fs;

	return !statvfs(ix->dir, &fs) && fs.f_bavail * fs.f_frsize < FULL_BYTES;
}

static int index_error(const struct index *ix, int rc, const char *what, struct err *e)
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

static int open_dbs_in(struct index *ix, MDB_txn *txn, bool create, struct err *e)
{
	for (int i = 0; i < IX_NR_DBS; i++) {
		int r = mdb_dbi_open(txn, db_names[i], create ? MDB_CREATE : 0, &ix->dbi[i]);

		if (r == MDB_NOTFOUND)
			return err_set(e, E_CORRUPT, "index %s: there is no database \"%s\"",
				       ix->dir, db_names[i]);
		if (r)
			return index_error(ix, r, "opening a database", e);
	}
	return 0;
}

/* All databases are made by one commit: an environment has all of them, or none
 * when a crash came before that commit. */
static int open_dbs(struct index *ix, bool may_create, struct err *e)
{
	bool create = false;
	MDB_stat st;
	MDB_txn *txn;
	int r;

	r = mdb_env_stat(ix->env, &st);
	if (r)
		return index_error(ix, r, "first look", e);
	if (may_create)
		create = st.ms_entries == 0;
	r = mdb_txn_begin(ix->env, NULL, create ? 0 : MDB_RDONLY, &txn);
	if (r)
		return index_error(ix, r, "first transaction", e);
	r = open_dbs_in(ix, txn, create, e);
	if (r) {
		mdb_txn_abort(txn);
		return r;
	}
	r = mdb_txn_commit(txn);
	return r ? index_error(ix, r, "first commit", e) : 0;
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
	}
	index_end(&t);
	return t.map_full ? 1 : r;
}

bool index_in_doubt(struct index *ix)
{
	MDB_txn *txn;
	int r = mdb_txn_begin(ix->env, NULL, MDB_RDONLY, &txn);

	if (!r)
		mdb_txn_abort(txn);
	return r == MDB_PANIC;
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

/* ---- keys ---- */

void rec_string_copy(char *field, size_t size, const char *s)
{
	size_t len = strnlen(s, size - 1);

	memset(field, 0, size);
	memcpy(field, s, len);
}

static void key_append(struct ix_key *k, const void *p, size_t len)
{
	assert(k->len + len <= sizeof(k->b));
	memcpy(k->b + k->len, p, len);
	k->len += len;
}

struct ix_key ix_key_u32(uint32_t v)
{
	struct ix_key k = {.len = 0};
	uint32_t be = __builtin_bswap32(v);

	key_append(&k, &be, sizeof(be));
	return k;
}

struct ix_key ix_key_u64(uint64_t v)
{
	struct ix_key k = {.len = 0};
	uint64_t be = __builtin_bswap64(v);

	key_append(&k, &be, sizeof(be));
	return k;
}

struct ix_key ix_key_point(struct snapd_point p)
{
	struct ix_key k = ix_key_u64(p.timeline);
	uint64_t be = __builtin_bswap64(p.epoch);

	key_append(&k, &be, sizeof(be));
	return k;
}

struct ix_key ix_key_id(const uint8_t id[16])
{
	struct ix_key k = {.len = 0};

	key_append(&k, id, 16);
	return k;
}

struct ix_key ix_key_name(const void *head, size_t head_len, const char *name)
{
	struct ix_key k = {.len = 0};

	key_append(&k, head, head_len);
	key_append(&k, name, strnlen(name, SNAPD_NAME_MAX - 1));
	return k;
}

/* A key for a reason: printable bytes as they are, the others in hex. */
static const char *key_text(const struct ix_key *k, char *buf, size_t size)
{
	size_t n = 0;

	buf[0] = '\0';
	for (size_t i = 0; i < k->len && n + 3 < size; i++)
		n += (size_t)snprintf(buf + n, size - n, "%02x", k->b[i]);
	return buf;
}

/* ---- records ---- */

/* So that nobody without the key can make a record. */
static uint64_t record_mac(const uint8_t *secret, enum index_db db, const struct ix_key *k,
			   const void *rec, size_t rec_size, const void *tail, size_t tail_len)
{
	const uint32_t head[2] = {db, (uint32_t)k->len};
	size_t at = offsetof(struct rec_head, hash);
	crypto_generichash_blake2b_state state;
	uint64_t mac[2];

	crypto_generichash_blake2b_init(&state, secret, SEAL_INDEX_KEY_BYTES, sizeof(mac));
	crypto_generichash_blake2b_update(&state, (const void *)head, sizeof(head));
	crypto_generichash_blake2b_update(&state, k->b, k->len);
	crypto_generichash_blake2b_update(&state, rec, at);
	crypto_generichash_blake2b_update(&state, (const uint8_t *)rec + sizeof(struct rec_head),
					  rec_size - sizeof(struct rec_head));
	if (tail_len)
		crypto_generichash_blake2b_update(&state, tail, tail_len);
	crypto_generichash_blake2b_final(&state, (void *)mac, sizeof(mac));
	return mac[0];
}

static uint64_t record_hash(const struct index *ix, enum index_db db, const struct ix_key *k,
			    const void *rec, size_t rec_size, const void *tail, size_t tail_len)
{
	static const uint8_t no_hash[sizeof(uint64_t)];
	size_t at = offsetof(struct rec_head, hash);
	XXH3_state_t state;

	if (ix->key)
		return record_mac(ix->key, db, k, rec, rec_size, tail, tail_len);
	XXH3_INITSTATE(&state);
	XXH3_64bits_reset_withSeed(&state, (XXH64_hash_t)db);
	XXH3_64bits_update(&state, k->b, k->len);
	XXH3_64bits_update(&state, rec, at);
	XXH3_64bits_update(&state, no_hash, sizeof(no_hash));
	XXH3_64bits_update(&state, (const uint8_t *)rec + sizeof(struct rec_head),
			   rec_size - sizeof(struct rec_head));
	if (tail_len)
		XXH3_64bits_update(&state, tail, tail_len);
	return XXH3_64bits_digest(&state);
}

static uint32_t keyed(const struct index *ix)
{
	return ix->key ? REC_KEYED : 0;
}

void index_seal(const struct index *ix, enum index_db db, const struct ix_key *k, void *rec,
		size_t rec_size, const void *tail, size_t tail_len)
{
	struct rec_head *h = rec;

	h->flags &= ~REC_KEYED;
	assert(!(h->flags & ~db_flags[db]));
	*h = (struct rec_head){
		.version = 1, .size = (uint16_t)rec_size, .flags = h->flags | keyed(ix)};
	h->hash = record_hash(ix, db, k, rec, rec_size, tail, tail_len);
}

/* Copy the value out and prove it: LMDB aligns values to two bytes only. */
static int record_decode(const struct ix_txn *t, enum index_db db, const struct ix_key *k,
			 const MDB_val *v, void *rec, size_t rec_size, const void **tail,
			 size_t *tail_len, struct err *e)
{
	const uint8_t *bytes = v->mv_data;
	struct rec_head h;
	char text[128];

	if (v->mv_size < sizeof(h))
		goto corrupt;
	memcpy(&h, bytes, sizeof(h));
	if (h.version > 1)
		return err_set(e, EPROTO,
			       "index %s: record %s/%s has version %u; this is an older snapd",
			       t->ix->dir, db_names[db], key_text(k, text, sizeof(text)),
			       h.version);
	if (h.version != 1 || (h.flags & ~db_flags[db]) != keyed(t->ix) || h.size != rec_size ||
	    v->mv_size < rec_size)
		goto corrupt;
	memcpy(rec, bytes, rec_size);
	if (record_hash(t->ix, db, k, rec, rec_size, bytes + rec_size, v->mv_size - rec_size) !=
	    h.hash)
		goto corrupt;
	((struct rec_head *)rec)->flags &= ~REC_KEYED;
	if (tail) {
		*tail = bytes + rec_size;
		*tail_len = v->mv_size - rec_size;
	}
	return 0;
corrupt:
	return err_set(e, E_CORRUPT, "index %s: record %s/%s is damaged", t->ix->dir, db_names[db],
		       key_text(k, text, sizeof(text)));
}

int index_get(struct ix_txn *t, enum index_db db, const struct ix_key *k, void *rec,
	      size_t rec_size, const void **tail, size_t *tail_len, struct err *e)
{
	MDB_val key = {.mv_size = k->len, .mv_data = (void *)k->b}, v;
	int r;

	r = mdb_get(t->txn, t->ix->dbi[db], &key, &v);
	if (r == MDB_NOTFOUND)
		return -ENOENT;
	if (r)
		return index_error(t->ix, r, "reading a record", e);
	return record_decode(t, db, k, &v, rec, rec_size, tail, tail_len, e);
}

/* Keep an error of a write: a full map is no error, index_update() grows it. */
static int write_error(struct ix_txn *t, int r, const char *what, struct err *e)
{
	if (r == MDB_MAP_FULL || r == MDB_TXN_FULL)
		t->map_full = r == MDB_MAP_FULL;
	return index_error(t->ix, r, what, e);
}

int index_put(struct ix_txn *t, enum index_db db, const struct ix_key *k, void *rec,
	      size_t rec_size, const void *tail, size_t tail_len, struct err *e)
{
	MDB_val key = {.mv_size = k->len, .mv_data = (void *)k->b};
	MDB_val v = {.mv_size = rec_size + tail_len};
	int r;

	index_seal(t->ix, db, k, rec, rec_size, tail, tail_len);
	r = mdb_put(t->txn, t->ix->dbi[db], &key, &v, MDB_RESERVE);
	if (r)
		return write_error(t, r, "writing a record", e);
	memcpy(v.mv_data, rec, rec_size);
	if (tail_len)
		memcpy((uint8_t *)v.mv_data + rec_size, tail, tail_len);
	if (t->log && is_journalled(db) &&
	    reclog_add(t->log, db, k->b, k->len, rec, rec_size, tail, tail_len))
		return err_errno(e, ENOMEM, "index %s", t->ix->dir);
	return 0;
}

int index_unpack(struct index *ix, enum index_db db, const struct ix_key *k, const void *value,
		 size_t len, void *rec, size_t rec_size, const void **tail, size_t *tail_len,
		 struct err *e)
{
	MDB_val v = {.mv_size = len, .mv_data = (void *)value};
	struct ix_txn t = {.ix = ix};

	return record_decode(&t, db, k, &v, rec, rec_size, tail, tail_len, e);
}

int index_dump(struct ix_txn *t, enum index_db db, struct reclog *log, struct err *e)
{
	MDB_cursor *cursor;
	MDB_val k, v;
	int r;

	assert(is_journalled(db));
	r = mdb_cursor_open(t->txn, t->ix->dbi[db], &cursor);
	if (r)
		return index_error(t->ix, r, "opening a cursor", e);
	while (!(r = mdb_cursor_get(cursor, &k, &v, MDB_NEXT)))
		if (reclog_add(log, db, k.mv_data, k.mv_size, v.mv_data, v.mv_size, NULL, 0)) {
			mdb_cursor_close(cursor);
			return err_errno(e, ENOMEM, "index %s", t->ix->dir);
		}
	mdb_cursor_close(cursor);
	return r == MDB_NOTFOUND ? 0 : index_error(t->ix, r, "listing records", e);
}

int index_del(struct ix_txn *t, enum index_db db, const struct ix_key *k, struct err *e)
{
	MDB_val key = {.mv_size = k->len, .mv_data = (void *)k->b};
	int r;

	r = mdb_del(t->txn, t->ix->dbi[db], &key, NULL);
	if (r && r != MDB_NOTFOUND)
		return write_error(t, r, "deleting a record", e);
	if (!r && t->log && is_journalled(db) && reclog_add_removed(t->log, db, k->b, k->len))
		return err_errno(e, ENOMEM, "index %s", t->ix->dir);
	return 0;
}

int index_count(struct ix_txn *t, enum index_db db, uint64_t *ret, struct err *e)
{
	MDB_stat st;
	int r = mdb_stat(t->txn, t->ix->dbi[db], &st);

	if (r)
		return index_error(t->ix, r, "counting records", e);
	*ret = st.ms_entries;
	return 0;
}

/* ---- iteration ---- */

int index_iter_init(struct ix_iter *it, struct ix_txn *t, enum index_db db,
		    const struct ix_key *prefix, struct err *e)
{
	int r;

	*it = (struct ix_iter){.t = t, .db = db};
	if (prefix)
		it->prefix = *prefix;
	r = mdb_cursor_open(t->txn, t->ix->dbi[db], &it->cursor);
	return r ? index_error(t->ix, r, "opening a cursor", e) : 0;
}

int index_iter_next(struct ix_iter *it, struct ix_key *k, void *rec, size_t rec_size, struct err *e)
{
	MDB_val key = {.mv_size = it->prefix.len, .mv_data = it->prefix.b}, v;
	MDB_cursor_op op = MDB_NEXT;
	int r;

	if (!it->started)
		op = it->prefix.len ? MDB_SET_RANGE : MDB_FIRST;
	it->started = true;
	r = mdb_cursor_get(it->cursor, &key, &v, op);
	if (r == MDB_NOTFOUND)
		return 0;
	if (r)
		return index_error(it->t->ix, r, "listing records", e);
	if (key.mv_size > sizeof(k->b))
		return err_set(e, E_CORRUPT, "index %s: a key of %s has %zu bytes", it->t->ix->dir,
			       db_names[it->db], key.mv_size);
	if (key.mv_size < it->prefix.len || memcmp(key.mv_data, it->prefix.b, it->prefix.len) != 0)
		return 0;
	k->len = key.mv_size;
	memcpy(k->b, key.mv_data, key.mv_size);
	r = record_decode(it->t, it->db, k, &v, rec, rec_size, NULL, NULL, e);
	return r ? r : 1;
}

void index_iter_deinit(struct ix_iter *it)
{
	if (it->cursor)
		mdb_cursor_close(it->cursor);
	it->cursor = NULL;
}
