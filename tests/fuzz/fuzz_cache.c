/* SPDX-License-Identifier: MIT */
/*
 * Changes of a backup's cache (lmdb_file.h): whatever the file says, it opens (made again, if it
 * must be), is read and written without harm, what was written is there, and a place that it
 * tells is inside a pack that it knows.
 */
#include "snapd/backup/cache.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "tests/fuzz/lmdb_file.h"
#include "tests/lib/store_model.h"

#define PACKS	4u
#define PAGES	100u /* of each */
#define OBJECTS 3u

enum what { A_PACK, A_PAGE, AN_OBJECT, A_MANIFEST };

static char *dir;
static struct lmdb_file file;

static struct bk_name name_of(enum what what, uint32_t n)
{
	struct bk_name name = {
		.b = {(uint8_t)(n * 37), (uint8_t)what, (uint8_t)n, (uint8_t)(n >> 8)}};

	return name;
}

static void put_pack(struct cache *c, uint32_t n)
{
	struct bk_name pack = name_of(A_PACK, n), pages[PAGES];
	struct err e = {0};

	for (uint32_t i = 0; i < PAGES; i++)
		pages[i] = name_of(A_PAGE, n * PAGES + i);
	PROMISE(!cache_put_pack(c, &pack, n % 2 ? CACHE_SENT : CACHE_INTENDED, pages, PAGES, &e));
}

static void clean_up(void)
{
	lmdb_file_remove(&file);
}

static void make_base(void)
{
	static uint8_t object[9000];
	struct cache *c;
	struct err e = {0};

	log_set_level(LOG_LVL_ERR);
	dir = memory_dir(); /* each write is synced */
	atexit(clean_up);
	PROMISE(!cache_open(dir, &c, &e));
	for (uint32_t i = 0; i < PACKS; i++)
		put_pack(c, i);
	for (uint32_t i = 0; i < OBJECTS; i++) {
		struct bk_name name = name_of(AN_OBJECT, i), m = name_of(A_MANIFEST, i);

		PROMISE(!cache_put_object(c, &name, object, 10 + i * 4000, &e));
		PROMISE(!cache_set_local(c, &m, i + 1, &e));
	}
	cache_close(c);
	lmdb_file_take(&file, dir);
}

static int on_pack(void *arg, const struct bk_name *name, enum cache_pack state)
{
	uint32_t *nr = arg;

	return ++*nr > 1000;
}

static void find_pages(struct cache *c)
{
	struct cache_view *v;
	struct err e = {0};

	if (cache_view_open(c, &v, &e))
		return;
	for (uint32_t i = 0; i < (PACKS + 1) * PAGES; i++) {
		struct bk_name page = name_of(A_PAGE, i);
		struct cache_place at;

		if (cache_find(v, &page, &at))
			PROMISE(at.state != CACHE_NONE);
	}
	cache_view_close(v);
}

static void read_all(struct cache *c)
{
	uint32_t nr = 0;

	find_pages(c);
	cache_each_pack(c, on_pack, &nr, NULL);
	PROMISE(nr < 1000);
	for (uint32_t i = 0; i < PACKS + 1; i++) {
		struct bk_name pack = name_of(A_PACK, i), object = name_of(AN_OBJECT, i);
		struct bk_name m = name_of(A_MANIFEST, i);
		_cleanup_free_ void *bytes = NULL;
		size_t len;

		cache_pack_state(c, &pack);
		cache_local(c, &m);
		if (!cache_get_object(c, &object, &bytes, &len, NULL) && bytes)
			PROMISE(len < FILE_MAX);
	}
}

/* A push and a prune on top. */
static void write_some(struct cache *c)
{
	struct bk_name pack = name_of(A_PACK, 0), object = name_of(AN_OBJECT, 9),
		       gone = name_of(AN_OBJECT, 2);
	_cleanup_free_ void *bytes = NULL;
	size_t len;
	int r;

	cache_set_pack(c, &pack, CACHE_NONE, NULL);
	cache_drop_object(c, &gone, NULL);
	r = cache_put_object(c, &object, "new", 3, NULL);
	if (!r)
		PROMISE(!cache_get_object(c, &object, &bytes, &len, NULL) && bytes && len == 3 &&
			!memcmp(bytes, "new", 3));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct err e = {0};
	struct cache *c;

	if (!file.base)
		make_base();
	lmdb_file_write(&file, data, len);
	if (cache_open(dir, &c, &e)) {
		PROMISE(e.text[0]);
		return 0;
	}
	read_all(c);
	write_some(c);
	read_all(c);
	cache_close(c);
	return 0;
}
