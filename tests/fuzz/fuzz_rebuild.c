/* SPDX-License-Identifier: MIT */
/*
 * Changes of a store's segments, whose index is then made from them.  Input: flags (1: the
 * hashes of changed batches are put right, as a hostile writer would, to reach what lies
 * behind them), then changes of 4 bytes: u24 offset in the blocks in use, byte.  Whatever they
 * are, the rebuild refuses with a reason, or the store opens, and all of it can be asked for.
 */
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "snapd/store/check.h"
#include "snapd/store/rebuild.h"
#include "snapd/store/segment.h"
#include "snapd/util/log.h"
#include "tests/fuzz/fuzz.h"
#include "tests/lib/store_model.h"

#define PAGE	   4096u
#define FRAMES	   24u
#define BLOCKS_MAX 256u

static char *dir;
static int segment;
static uint8_t *base, *now; /* blocks in use, as they were made and as they are */
static size_t bytes;

static uint64_t gfn_of(uint32_t i)
{
	return i < FRAMES / 2 ? i : 1000 + 2 * i;
}

static void one_epoch(struct store *s, const uint8_t vm[16], uint64_t timeline,
		      struct pagemap *live, uint32_t n)
{
	static _Alignas(PAGE) uint8_t page[PAGE];
	struct snapshot_meta meta = {.name = n ? "two" : "one", .note = "note", .tags = "a,b"};
	struct snapd_point point;
	struct epoch *ep;

	CHECK_OK(epoch_begin(s, vm, timeline, PAGE, live, &ep, &e));
	for (uint32_t i = n; i < FRAMES; i += n + 1) {
		struct epoch_page p = make_page(s, page, PAGE, gfn_of(i), i % 5 ? i + 40 * n : 0);

		CHECK_OK(epoch_put(ep, &p, 1, &e));
	}
	CHECK_OK(epoch_commit(ep, "state", 5, n % 2 ? NULL : &meta, &point, NULL, NULL, &e));
}

static void clean_up(void)
{
	remove_tree(dir);
}

static void make_base(void)
{
	struct store_vm vm = {.name = "guest", .arch = "x86_64", .page_size = PAGE};
	uint64_t timeline;
	struct pagemap *live;
	struct store *s;
	char path[128];

	log_set_level(LOG_LVL_ERR);
	dir = memory_dir();
	atexit(clean_up);
	s = open_store(dir);
	CHECK_OK(store_vm_register(s, &vm, &e));
	CHECK_OK(store_timeline_create(s, vm.id, (struct snapd_point){0}, &timeline, &e));
	CHECK(!pagemap_create(true, &live));
	for (uint32_t n = 0; n < 3; n++)
		one_epoch(s, vm.id, timeline, live, n);
	pagemap_destroy(live);
	store_vm_deinit(&vm);
	store_close(s);
	snprintf(path, sizeof(path), "%s/segments/%08x.seg", dir, 1u);
	segment = open(path, O_RDWR | O_CLOEXEC);
	base = aligned_alloc(PAGE, (size_t)BLOCKS_MAX * FMT_BLOCK);
	now = aligned_alloc(PAGE, (size_t)BLOCKS_MAX * FMT_BLOCK);
	CHECK(segment >= 0 && base && now);
	CHECK(pread(segment, base, (size_t)BLOCKS_MAX * FMT_BLOCK, 0) == BLOCKS_MAX * FMT_BLOCK);
	bytes = (size_t)BLOCKS_MAX * FMT_BLOCK;
	while (bytes > FMT_BLOCK && !base[bytes - FMT_BLOCK])
		bytes -= FMT_BLOCK;
}

/* As far as its numbers allow. */
static void put_right(struct batch_header *h, size_t room)
{
	if (h->magic != BATCH_MAGIC || h->header_bytes < FMT_BLOCK || h->header_bytes % FMT_BLOCK ||
	    h->header_bytes > room)
		return;
	if (h->type != BATCH_PAGES && h->payload_bytes <= room - h->header_bytes)
		batch_blob_finish(NULL, h, (uint8_t *)h + h->header_bytes);
	batch_seal(h);
}

static void change(const uint8_t *data, size_t len)
{
	memcpy(now, base, bytes);
	for (size_t i = 1; i + 4 <= len; i += 4)
		now[(size_t)(data[i] | data[i + 1] << 8 | data[i + 2] << 16) % bytes] = data[i + 3];
	for (size_t at = FMT_BLOCK; data[0] & 1 && at < bytes; at += FMT_BLOCK)
		put_right((struct batch_header *)(now + at), bytes - at);
	CHECK(pwrite(segment, now, bytes, 0) == (ssize_t)bytes);
}

static void read_map(struct store *s, struct store_reader *reader, struct snapd_point at)
{
	static _Alignas(PAGE) uint8_t got[PAGE];
	struct pagemap_iter it;
	struct pagemap *m;
	uint64_t gfn;
	loc_t loc;

	if (store_map_load(s, at, false, &m, NULL))
		return;
	CHECK(!pagemap_iter_init(&it, m));
	for (uint32_t n = 0; n < 64 && pagemap_iter_next(&it, &gfn, &loc); n++) {
		struct page_read q = {.gfn = gfn, .loc = loc, .dst = got};

		store_read_pages(reader, &q, 1, NULL);
	}
	pagemap_iter_deinit(&it);
	pagemap_destroy(m);
}

static void ask_for_all(struct store *s)
{
	struct store_check_config c = {.read_data = true};
	struct store_check_result result;
	struct store_snapshot *list;
	struct store_reader *reader;
	struct store_stats stats;
	size_t nr;

	store_get_stats(s, &stats, NULL);
	CHECK_OK(store_reader_create(s, PAGE, &reader, &e));
	if (!store_snapshot_list(s, NULL, &list, &nr, NULL)) {
		for (size_t i = 0; i < nr; i++)
			read_map(s, reader, list[i].point);
		free(list);
	}
	store_reader_destroy(reader);
	CHECK_OK(store_check(s, &c, &result, &e));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct rebuild_config c;
	struct store_config config;
	struct rebuild_result result;
	struct err e = {0};
	struct store *s;
	int r;

	if (!dir)
		make_base();
	if (!len)
		return 0;
	change(data, len);
	c = (struct rebuild_config){.dir = dir};
	r = store_rebuild_index(&c, &result, &e);
	PROMISE((r == 0) == !e.text[0]);
	if (r)
		return 0;
	config = (struct store_config){.dir = dir, .read_only = true};
	r = store_open(&config, &s, &e);
	PROMISE(r == 0 || r == -EPROTO || r == -EUCLEAN);
	if (r)
		return 0;
	ask_for_all(s);
	store_close(s);
	return 0;
}
