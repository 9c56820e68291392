/* SPDX-License-Identifier: MIT */
/*
 * Records of the index, checked: structs in, structs out; see index.h.  A record
 * carries a hash, or in an encrypted store a MAC, of database, key and value; it is
 * copied out of LMDB's pages and proved before anybody sees it.
 *
 * Threads: that of the transaction.
 */
#include "snapd/store/index_priv.h"

#include <sodium.h>
#include <stdio.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/store/reclog.h"
#include "snapd/store/seal.h"
#include "snapd/util/cleanup.h"

/* Flags that a record may have; the others are damage. */
static const uint32_t db_flags[IX_NR_DBS] = {[IX_SNAPSHOTS] = REC_SNAPSHOT_PINNED |
							      REC_SNAPSHOT_POSTMORTEM};

/* What a rebuilt index can't take from the segments by looking; names follow. */
static bool is_journalled(enum index_db db)
{
	return db == IX_VMS || db == IX_TIMELINES || db == IX_EPOCHS || db == IX_SNAPSHOTS;
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
			       t->ix->dir, index_db_names[db], key_text(k, text, sizeof(text)),
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
	return err_set(e, E_CORRUPT, "index %s: record %s/%s is damaged", t->ix->dir,
		       index_db_names[db], key_text(k, text, sizeof(text)));
}

int index_get(struct ix_txn *t, enum index_db db, const struct ix_key *k, void *rec,
	      size_t rec_size, const void **tail, size_t *tail_len, struct err *e)
{
	MDB_val key = {.mv_size = k->len, .mv_data = (void *)k->b}, v;
	int r;

	if (t->ix->dbi[db] == NO_DBI)
		return -ENOENT;
	r = mdb_get(t->txn, t->ix->dbi[db], &key, &v);
	if (r == MDB_NOTFOUND)
		return -ENOENT;
	if (r)
		return index_error(t->ix, r, "reading a record", e);
	return record_decode(t, db, k, &v, rec, rec_size, tail, tail_len, e);
}

bool index_has(struct ix_txn *t, enum index_db db, const struct ix_key *k)
{
	MDB_val key = {.mv_size = k->len, .mv_data = (void *)k->b}, v;

	return t->ix->dbi[db] != NO_DBI && !mdb_get(t->txn, t->ix->dbi[db], &key, &v);
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

int index_clear(struct ix_txn *t, enum index_db db, struct err *e)
{
	int r;

	assert(index_db_is_derived(db));
	r = mdb_drop(t->txn, t->ix->dbi[db], 0);
	return r ? write_error(t, r, "removing records", e) : 0;
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
	if (t->ix->dbi[db] == NO_DBI)
		return 0;
	r = mdb_cursor_open(t->txn, t->ix->dbi[db], &it->cursor);
	return r ? index_error(t->ix, r, "opening a cursor", e) : 0;
}

int index_iter_next(struct ix_iter *it, struct ix_key *k, void *rec, size_t rec_size, struct err *e)
{
	MDB_val key = {.mv_size = it->prefix.len, .mv_data = it->prefix.b}, v;
	MDB_cursor_op op = it->backwards ? MDB_PREV : MDB_NEXT;
	int r;

	if (!it->cursor)
		return 0;
	assert(!(it->backwards && it->prefix.len));
	if (!it->started && it->backwards)
		op = MDB_LAST;
	else if (!it->started)
		op = it->prefix.len ? MDB_SET_RANGE : MDB_FIRST;
	it->started = true;
	r = mdb_cursor_get(it->cursor, &key, &v, op);
	if (r == MDB_NOTFOUND)
		return 0;
	if (r)
		return index_error(it->t->ix, r, "listing records", e);
	if (key.mv_size > sizeof(k->b))
		return err_set(e, E_CORRUPT, "index %s: a key of %s has %zu bytes", it->t->ix->dir,
			       index_db_names[it->db], key.mv_size);
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
