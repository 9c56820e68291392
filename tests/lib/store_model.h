/* SPDX-License-Identifier: MIT */
/*
 * store_model: what store tests share: pages made from a number, so that a
 * model of a guest's memory is an array of numbers; temporary directories; every
 * page of a point read back and compared.
 */
#pragma once

#include <errno.h>
#include <ftw.h>
#include <stdbool.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "snapd/store.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/rand.h"

#define NO_PAGE UINT64_MAX /* value of a frame that is not part of the VM */

/* 0 for success; else prints the reason and stops. */
#define CHECK_OK(call)                                                                       \
	do {                                                                                 \
		struct err e = {0};                                                          \
		int r_ = (call);                                                             \
		if (r_) {                                                                    \
			printf("%s:%d: %s: %d %s\n", __FILE__, __LINE__, #call, r_, e.text); \
			fflush(stdout);                                                      \
			abort();                                                             \
		}                                                                            \
	} while (0)

/* The page of a value: 0 is the zero page; odd ones compress, even ones do not. */
static inline void page_fill(void *page, size_t size, uint64_t value)
{
	size_t period = value % 2 ? 64 : size;
	struct rand r = rand_of(value);
	uint64_t *p = page;

	if (!value)
		memset(page, 0, size);
	for (size_t i = 0; value && i < size / 8; i++)
		p[i] = i < period ? rand_next(&r) : p[i - period];
}

static inline int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

static inline void remove_tree(const char *path)
{
	nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

/* For store_gc(): the one timeline that `timeline` points to. */
static inline int live_timeline(void *timeline, uint64_t **ret, size_t *nr)
{
	*ret = malloc(sizeof(**ret));
	if (!*ret)
		return -ENOMEM;
	**ret = *(uint64_t *)timeline;
	*nr = 1;
	return 0;
}

/* Once no segment is being made ahead any more, by a thread of the store's own. */
static inline void get_settled_stats(struct store *s, struct store_stats *ret)
{
	for (int i = 0; i < 5000; i++) {
		CHECK_OK(store_get_stats(s, ret, &e));
		if (ret->segments == ret->segments_free)
			return;
		usleep(1000);
	}
}

/* A fresh directory below the working directory (a real disk, not a tmpfs). */
static inline char *temp_dir(void)
{
	char name[64] = "store-test-XXXXXX";

	CHECK(mkdtemp(name));
	return strdup(name);
}

/* compression, key_file: as in store.h; NULL, NULL: not encrypted, lz4 for a new one */
static inline struct store *open_store_as(const char *dir, const char *compression,
					  const char *key_file)
{
	struct store_config config = {.dir = dir,
				      .create = true,
				      .segment_bytes = SEG_BYTES_MIN,
				      .compression = compression,
				      .key_file = key_file};
	struct store *s;

	CHECK_OK(store_open(&config, &s, &e));
	return s;
}

/* The same in memory, where there is room: flushing costs nothing there, and a history of
 * hundreds of commits nine tenths of its time on a disk.  For what is about logic;
 * O_DIRECT and durability need temp_dir(). */
static inline char *memory_dir(void)
{
	char name[] = "/dev/shm/snapd-test-XXXXXX";
	struct statvfs fs;

	if (statvfs("/dev/shm", &fs) || (uint64_t)fs.f_bavail * fs.f_frsize < (uint64_t)1 << 30 ||
	    !mkdtemp(name))
		return temp_dir();
	return strdup(name);
}

static inline struct store *open_store(const char *dir)
{
	return open_store_as(dir, NULL, NULL);
}

static inline struct epoch_page make_page(struct store *s, void *buf, size_t size, uint64_t gfn,
					  uint64_t value)
{
	page_fill(buf, size, value);
	return (struct epoch_page){
		.gfn = gfn, .bytes = buf, .id = pageid_of(store_secret(s), buf, size)};
}

/* Every frame of the point holds what values[] says, and no other frame is there. */
static inline void check_point(struct store *s, struct store_reader *reader, uint32_t page_size,
			       struct snapd_point at, uint64_t (*gfn_of)(uint32_t),
			       const uint64_t *values, uint32_t nr)
{
	_cleanup_free_ struct page_read *reads = calloc(nr + 1, sizeof(*reads));
	_cleanup_free_ uint8_t *got = aligned_alloc(4096, (size_t)(nr + 1) * page_size);
	_cleanup_free_ uint8_t *want = malloc(page_size);
	_cleanup_free_ uint64_t *index = calloc(nr + 1, sizeof(*index));
	struct pagemap *m;
	uint32_t n = 0;

	CHECK(reads && got && want && index);
	CHECK_OK(store_map_load(s, at, false, &m, &e));
	for (uint32_t i = 0; i < nr; i++) {
		loc_t loc = pagemap_get(m, gfn_of(i));

		CHECK((loc_kind(loc) == LOC_NONE) == (values[i] == NO_PAGE));
		CHECK((loc == LOC_ZERO_PAGE) == (values[i] == 0));
		if (values[i] == NO_PAGE)
			continue;
		reads[n] = (struct page_read){
			.gfn = gfn_of(i), .loc = loc, .dst = got + (size_t)i * page_size};
		n++;
	}
	CHECK(pagemap_nr(m) == n);
	CHECK_OK(store_read_pages(reader, reads, n, &e));
	for (uint32_t i = 0; i < nr; i++) {
		if (values[i] == NO_PAGE)
			continue;
		page_fill(want, page_size, values[i]);
		CHECK(memcmp(got + (size_t)i * page_size, want, page_size) == 0);
	}
	for (uint32_t i = 0; i < n; i++)
		CHECK(reads[i].err == 0);
	pagemap_destroy(m);
}
