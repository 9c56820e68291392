/* SPDX-License-Identifier: MIT */
/* Objects of a backup repository, and when a snapshot becomes visible; see repo.h. */
#include "snapd/backup/repo.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "snapd/util/cleanup.h"

#define FIRST_READ    (64u << 10) /* most blobs are smaller */
#define COMMIT_TRIES  4
#define CONFIG_OBJECT "config"

const char *const repo_rooms[REPO_NR_ROOMS] = {
	[REPO_PACKS] = "packs/",	 [REPO_BLOBS] = "blobs/", [REPO_SNAPSHOTS] = "snapshots/",
	[REPO_FORGOTTEN] = "forgotten/", [REPO_MARKS] = "marks/",
};

const char *repo_key(enum repo_room room, const struct bk_name *name, char ret[REPO_KEY_BYTES])
{
	char hex[BK_HEX_BYTES];

	snprintf(ret, REPO_KEY_BYTES, "%s%s", repo_rooms[room], name_hex(name, hex));
	return ret;
}

/* The reason with the object in front of it. */
static int of_object(int rc, const char *key, const struct err *why, struct err *e)
{
	return err_set(e, -rc, "%s: %s", key, why->code ? why->text : strerror(-rc));
}

/* ---- life ---- */

static int64_t system_ms(void *arg)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static int read_config(struct repo *r, const struct repo_config *c, struct err *e)
{
	struct bk_config config;
	size_t len;
	int rc = objstore_get(r->os, CONFIG_OBJECT, 0, &config, sizeof(config), &len, e);

	return rc ? rc : keys_open(&config, len, c->key_file, &r->keys, e);
}

/* Whoever is first makes it. */
static int make_config(struct repo *r, const struct repo_config *c, struct err *e)
{
	struct bk_config config;
	struct iovec iov = {.iov_base = &config, .iov_len = sizeof(config)};
	struct timespec ts;
	int rc;

	clock_gettime(CLOCK_REALTIME, &ts);
	rc = keys_make(c->key_file, c->grace_s ? c->grace_s : BK_GRACE_DEFAULT,
		       (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec, &config, &r->keys,
		       e);
	if (rc)
		return rc;
	rc = objstore_put(r->os, CONFIG_OBJECT, &iov, 1, OBJSTORE_ONLY_IF_ABSENT, NULL);
	if (rc == -EEXIST)
		return read_config(r, c, e);
	return rc ? err_errno(e, -rc, "%s: cannot make a repository", objstore_url(r->os)) : 0;
}

static int open_config(struct repo *r, const struct repo_config *c, struct err *e)
{
	struct err why = {0};
	int rc = read_config(r, c, &why);

	if (rc == -ENOENT && c->create)
		return make_config(r, c, e);
	if (rc == -ENOENT)
		return err_set(e, ENOENT, "there is no backup repository at %s",
			       objstore_url(r->os));
	return rc ? err_set(e, -rc, "%s: %s", objstore_url(r->os),
			    why.code ? why.text : strerror(-rc))
		  : 0;
}

static int open_cache(struct repo *r, const char *dir, struct err *e)
{
	char path[4096], id[33];

	for (int i = 0; i < 16; i++)
		sprintf(id + 2 * i, "%02x", r->keys.repo[i]);
	if (snprintf(path, sizeof(path), "%s/%s", dir, id) >= (int)sizeof(path))
		return err_set(e, ENAMETOOLONG, "%s: too long", dir);
	if (mkdir(dir, 0700) && errno != EEXIST)
		return err_errno(e, errno, "cannot make %s", dir);
	return cache_open(path, &r->cache, e);
}

int repo_open(const struct repo_config *c, struct repo **ret, struct err *e)
{
	struct repo *r = calloc(1, sizeof(*r));
	int rc;

	if (!r)
		return err_errno(e, ENOMEM, "backup");
	r->os = c->os;
	r->now_ms = c->now_ms ? c->now_ms : system_ms;
	r->now_arg = c->now_arg;
	rc = open_config(r, c, e);
	if (!rc)
		rc = open_cache(r, c->cache_dir, e);
	if (rc) {
		repo_close(r);
		return rc;
	}
	*ret = r;
	return 0;
}

void repo_close(struct repo *r)
{
	if (!r)
		return;
	cache_close(r->cache);
	keys_wipe(&r->keys);
	free(r);
}

/* ---- lists ---- */

struct each {
	size_t skip;
	repo_list_fn fn;
	void *arg;
};

static int on_key(void *arg, const char *key, const struct objstore_info *info)
{
	struct each *x = arg;
	struct bk_name name;

	return name_parse(key + x->skip, &name) ? 0 : x->fn(x->arg, &name, info);
}

int repo_each(struct repo *r, enum repo_room room, repo_list_fn fn, void *arg, struct err *e)
{
	struct each x = {.skip = strlen(repo_rooms[room]), .fn = fn, .arg = arg};

	return objstore_list(r->os, repo_rooms[room], NULL, on_key, &x, e);
}

static int add_name(void *set, const struct bk_name *name, const struct objstore_info *info)
{
	uint32_t number;

	return packset_add(set, name, &number);
}

int repo_names(struct repo *r, enum repo_room room, struct packset *ret, struct err *e)
{
	return repo_each(r, room, add_name, ret, e);
}

/* ---- blobs ---- */

int repo_put_blob(struct repo *r, enum repo_room room, enum bk_type type, const void *payload,
		  size_t len, struct bk_name *ret, uint64_t *sent, struct err *e)
{
	struct blob b = {0};
	char key[REPO_KEY_BYTES];
	struct iovec iov;
	int rc = blob_encode(&r->keys, type, payload, len, &b, e);

	if (rc)
		return rc;
	iov = (struct iovec){.iov_base = b.bytes, .iov_len = b.len};
	rc = objstore_put(r->os, repo_key(room, &b.name, key), &iov, 1, OBJSTORE_ONLY_IF_ABSENT, e);
	if (rc == -EEXIST) { /* ours: an answer was lost */
		err_clear(e);
		rc = 0;
	}
	*ret = b.name;
	*sent += b.len;
	if (!rc && (type == BK_MANIFEST || type == BK_MARK))
		cache_put_object(r->cache, &b.name, b.bytes, b.len, NULL);
	blob_deinit(&b);
	return rc;
}

/* The whole object: most come with the first read. */
static int get_object(struct repo *r, const char *key, uint8_t **ret, size_t *ret_len,
		      struct err *e)
{
	_cleanup_free_ uint8_t *bytes = malloc(FIRST_READ);
	struct objstore_info info;
	uint8_t *more;
	size_t len;
	int rc;

	if (!bytes)
		return err_errno(e, ENOMEM, "backup");
	rc = objstore_get(r->os, key, 0, bytes, FIRST_READ, ret_len, e);
	if (rc)
		return rc;
	if (*ret_len == FIRST_READ) {
		rc = objstore_head(r->os, key, &info, e);
		if (rc)
			return rc;
		if (info.size < FIRST_READ || info.size > OBJSTORE_OBJECT_MAX)
			return err_set(e, E_CORRUPT, "%llu bytes", (unsigned long long)info.size);
		more = realloc(bytes, info.size);
		if (!more)
			return err_errno(e, ENOMEM, "backup");
		bytes = more;
		rc = objstore_get(r->os, key, FIRST_READ, bytes + FIRST_READ,
				  info.size - FIRST_READ, &len, e);
		if (rc)
			return rc;
		*ret_len += len;
	}
	*ret = steal_ptr(&bytes);
	return 0;
}

int repo_get_blob(struct repo *r, enum repo_room room, enum bk_type type,
		  const struct bk_name *name, uint8_t **ret, size_t *len, struct err *e)
{
	_cleanup_free_ uint8_t *bytes = NULL;
	char key[REPO_KEY_BYTES];
	struct err why = {0};
	size_t nr = 0;
	int rc = get_object(r, repo_key(room, name, key), &bytes, &nr, &why);

	/* A whole repository has what it refers to: a list or a manifest named it. */
	if (rc == -ENOENT)
		return err_set(e, E_CORRUPT, "%s: missing", key);
	if (!rc)
		rc = blob_decode(&r->keys, type, name, bytes, nr, ret, len, &why);
	if (!rc && (type == BK_MANIFEST || type == BK_MARK))
		cache_put_object(r->cache, name, bytes, nr, NULL);
	return rc ? of_object(rc, key, &why, e) : 0;
}

int repo_get_cached(struct repo *r, enum repo_room room, enum bk_type type,
		    const struct bk_name *name, uint8_t **ret, size_t *len, struct err *e)
{
	_cleanup_free_ void *bytes = NULL;
	size_t nr;

	if (!cache_get_object(r->cache, name, &bytes, &nr, NULL) && bytes &&
	    !blob_decode(&r->keys, type, name, bytes, nr, ret, len, NULL))
		return 0;
	return repo_get_blob(r, room, type, name, ret, len, e);
}

int repo_get_manifest(struct repo *r, const struct bk_name *name, struct manifest *ret,
		      struct err *e)
{
	_cleanup_free_ uint8_t *payload = NULL;
	char key[REPO_KEY_BYTES];
	struct err why = {0};
	size_t len;
	int rc = repo_get_cached(r, REPO_SNAPSHOTS, BK_MANIFEST, name, &payload, &len, e);

	if (rc)
		return rc;
	rc = manifest_decode(payload, len, ret, &why);
	ret->name = *name;
	return rc ? of_object(rc, repo_key(REPO_SNAPSHOTS, name, key), &why, e) : 0;
}

/* ---- snapshots ---- */

/* 1: there. */
static int is_there(struct repo *r, enum repo_room room, const struct bk_name *name, struct err *e)
{
	char key[REPO_KEY_BYTES];
	struct objstore_info info;
	int rc = objstore_head(r->os, repo_key(room, name, key), &info, NULL);

	if (rc == -ENOENT)
		return 0;
	return rc ? err_errno(e, -rc, "%s", key) : 1;
}

void repo_list_deinit(struct repo_list *l)
{
	for (size_t i = 0; i < l->nr; i++)
		manifest_deinit(&l->all[i]);
	free(l->all);
	free(l->bad);
	*l = (struct repo_list){0};
}

static int by_vm_and_time(const void *a, const void *b)
{
	const struct manifest *x = a, *y = b;
	int vm = strcmp(x->m.vm, y->m.vm);

	if (vm)
		return vm;
	if (x->m.taken_ns != y->m.taken_ns)
		return x->m.taken_ns < y->m.taken_ns ? -1 : 1;
	return memcmp(&x->name, &y->name, sizeof(x->name));
}

static int take_manifest(struct repo *r, const struct bk_name *name, struct repo_list *l,
			 struct err *e)
{
	struct err why = {0};
	int rc = repo_get_manifest(r, name, &l->all[l->nr], &why);

	if (!rc) {
		l->nr++;
		return 0;
	}
	if (rc != -E_CORRUPT && rc != -EPROTO)
		return err_set(e, -rc, "%s", why.text);
	/* Damaged, or forgotten long ago and gone since the list? */
	rc = is_there(r, REPO_SNAPSHOTS, name, e);
	if (rc == 1)
		l->bad[l->nr_bad++] = (struct repo_bad){.name = *name, .why = why};
	return MIN(rc, 0);
}

static int fill_list(struct repo *r, const struct packset *names, const struct packset *gone,
		     struct repo_list *ret, struct err *e)
{
	int rc = 0;

	ret->all = calloc(names->nr + 1, sizeof(*ret->all));
	ret->bad = calloc(names->nr + 1, sizeof(*ret->bad));
	if (!ret->all || !ret->bad)
		return err_errno(e, ENOMEM, "backup");
	for (uint32_t i = 0; !rc && i < names->nr; i++)
		if (packset_find(gone, &names->names[i]) < 0)
			rc = take_manifest(r, &names->names[i], ret, e);
	qsort(ret->all, ret->nr, sizeof(*ret->all), by_vm_and_time);
	return rc;
}

int repo_list(struct repo *r, struct repo_list *ret, struct err *e)
{
	_cleanup_(packset_deinit) struct packset names = {0}, gone = {0};
	int rc = repo_names(r, REPO_SNAPSHOTS, &names, e);

	*ret = (struct repo_list){0};
	/* After the manifests: what is forgotten meanwhile is missing, not back again. */
	if (!rc)
		rc = repo_names(r, REPO_FORGOTTEN, &gone, e);
	if (!rc)
		rc = fill_list(r, &names, &gone, ret, e);
	if (rc)
		repo_list_deinit(ret);
	return rc;
}

int repo_forget(struct repo *r, const struct bk_name *name, struct err *e)
{
	struct blob b = {0};
	char key[REPO_KEY_BYTES];
	struct iovec iov;
	int rc = blob_encode(&r->keys, BK_TOMB, name, sizeof(*name), &b, e);

	if (rc)
		return rc;
	iov = (struct iovec){.iov_base = b.bytes, .iov_len = b.len};
	/* A second tombstone in its place would make it younger: harmless, but not put. */
	rc = objstore_put(r->os, repo_key(REPO_FORGOTTEN, name, key), &iov, 1,
			  OBJSTORE_ONLY_IF_ABSENT, e);
	if (rc == -EEXIST) {
		err_clear(e);
		rc = 0;
	}
	blob_deinit(&b);
	return rc;
}

/* ---- commit ---- */

static int add_marked(struct repo *r, const struct bk_name *mark, struct packset *set,
		      struct err *e)
{
	_cleanup_free_ uint8_t *payload = NULL;
	struct bk_marked one;
	size_t len = 0;
	uint32_t number;
	int rc = repo_get_cached(r, REPO_MARKS, BK_MARK, mark, &payload, &len, e);

	for (size_t at = 0; !rc && at + sizeof(one) <= len; at += sizeof(one)) {
		struct bk_name name;

		memcpy(&one, payload + at, sizeof(one));
		memcpy(name.b, one.name, sizeof(name.b));
		rc = packset_add(set, &name, &number);
	}
	return rc;
}

int repo_marked(struct repo *r, struct packset *ret, struct err *e)
{
	_cleanup_(packset_deinit) struct packset marks = {0};
	char key[REPO_KEY_BYTES];
	struct objstore_info info;
	int rc = repo_names(r, REPO_MARKS, &marks, e);

	for (uint32_t i = 0; !rc && i < marks.nr; i++) {
		struct err why = {0};

		rc = add_marked(r, &marks.names[i], ret, &why);
		/* A mark that has done its work meanwhile names nothing that is there. */
		if (rc == -E_CORRUPT &&
		    objstore_head(r->os, repo_key(REPO_MARKS, &marks.names[i], key), &info, NULL) ==
			    -ENOENT)
			rc = 0;
		else if (rc)
			err_set(e, -rc, "%s", why.text);
	}
	return rc;
}

/* R5 (a): no tombstone, and then there. */
static int look_at_base(struct repo *r, const struct bk_name *base, bool *lost, struct err *e)
{
	int rc = base ? is_there(r, REPO_FORGOTTEN, base, e) : 0;

	*lost = rc == 1;
	if (rc || !base)
		return MIN(rc, 0);
	rc = is_there(r, REPO_SNAPSHOTS, base, e);
	*lost = !rc;
	return MIN(rc, 0);
}

/* What we sent less than G / 2 ago is too young for a mark that is G old. */
static bool is_fresh(const struct repo *r, const struct repo_relied *x, int64_t now_ms)
{
	return x->sent && now_ms - x->sent_ms < (int64_t)r->keys.grace_s * 500;
}

/* R5 (b): no mark, and then there.  How many are lost, or an error. */
static int look_at_relied(struct repo *r, struct repo_relied *relied, size_t nr, int64_t now_ms,
			  struct err *e)
{
	_cleanup_(packset_deinit) struct packset marked = {0};
	int rc = repo_marked(r, &marked, e), lost = 0;

	for (size_t i = 0; rc >= 0 && i < nr; i++) {
		struct repo_relied *x = &relied[i];

		x->lost = packset_find(&marked, &x->name) >= 0;
		if (!x->lost && !is_fresh(r, x, now_ms)) {
			rc = is_there(r, x->is_pack ? REPO_PACKS : REPO_BLOBS, &x->name, e);
			x->lost = !rc;
		}
		lost += x->lost;
	}
	return rc < 0 ? rc : lost;
}

int repo_commit(struct repo *r, struct manifest *m, const struct bk_name *base, bool *base_lost,
		struct repo_relied *relied, size_t nr, struct err *e)
{
	int64_t window_ms = (int64_t)r->keys.grace_s * 1000 / 4;
	_cleanup_free_ uint8_t *payload = NULL;
	uint64_t sent = 0;
	size_t len;
	int rc = manifest_encode(m, &payload, &len);

	if (rc)
		return err_errno(e, -rc, "backup");
	for (int i = 0; i < COMMIT_TRIES; i++) {
		int64_t began = r->now_ms(r->now_arg);

		rc = look_at_base(r, base, base_lost, e);
		if (!rc)
			rc = look_at_relied(r, relied, nr, began, e);
		if (rc < 0)
			return rc;
		if (rc || *base_lost)
			return err_set(e, ESTALE,
				       "the repository was pruned meanwhile: what this snapshot "
				       "builds on goes away");
		if (r->now_ms(r->now_arg) - began < window_ms)
			return repo_put_blob(r, REPO_SNAPSHOTS, BK_MANIFEST, payload, len, &m->name,
					     &sent, e);
	}
	return err_set(e, ETIMEDOUT, "the object store is too slow for a grace time of %llu s",
		       (unsigned long long)r->keys.grace_s);
}
