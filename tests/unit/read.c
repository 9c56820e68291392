/* SPDX-License-Identifier: MIT */
/*
 * Unit test of reading many pages at once (snapd/store/read.c): more than a reader has
 * rounds, raw and compressed, encrypted and not, with the pool's help and without.  Every
 * page comes as it was written, exactly once; a damaged one is named and harms no other;
 * an error of the callback ends the call.
 */
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "snapd/store/headers.h"
#include "snapd/store/internal.h"
#include "snapd/util/pool.h"
#include "tests/lib/check.h"
#include "tests/lib/store_model.h"

#define PAGE	 4096u
#define NR_PAGES 7000u
#define ZERO	 10u /* every so many pages one is zero */

static _Alignas(4096) uint8_t memory[NR_PAGES][PAGE];
static _Alignas(4096) uint8_t got[NR_PAGES][PAGE];

struct guest {
	struct store *s;
	struct pagemap *live;
	struct store_reader *reader;
	char *dir;
};

static const char *make_key(const char *dir)
{
	static char path[128];
	int fd;

	snprintf(path, sizeof(path), "%s.key", dir);
	fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	CHECK(fd >= 0 && write(fd, memory[1], 64) == 64 && !close(fd));
	return path;
}

static void put_all(struct epoch *ep, struct store *s)
{
	static struct epoch_page pages[NR_PAGES];

	for (uint32_t i = 0; i < NR_PAGES; i++)
		pages[i] = make_page(s, memory[i], PAGE, i, i % ZERO ? i : 0);
	CHECK_OK(epoch_put(ep, pages, NR_PAGES, &e));
}

static void guest_open(struct guest *g, const char *compression, bool sealed, struct pool *pool)
{
	struct store_config config = {.create = true,
				      .segment_bytes = SEG_BYTES_MIN,
				      .compression = compression,
				      .pool = pool};
	struct store_vm vm = {.name = "guest", .arch = "x86_64", .page_size = PAGE};
	struct epoch *ep;
	uint64_t timeline;

	config.dir = g->dir = temp_dir();
	config.key_file = sealed ? make_key(g->dir) : NULL;
	CHECK_OK(store_open(&config, &g->s, &e));
	CHECK_OK(store_vm_register(g->s, &vm, &e));
	CHECK_OK(store_timeline_create(g->s, vm.id, (struct snapd_point){0}, &timeline, &e));
	CHECK(pagemap_create(true, &g->live) == 0);
	CHECK_OK(epoch_begin(g->s, vm.id, timeline, PAGE, g->live, &ep, &e));
	put_all(ep, g->s);
	CHECK_OK(epoch_commit(ep, NULL, 0, NULL, &(struct snapd_point){0}, NULL,
			      &(struct epoch_stats){0}, &e));
	CHECK_OK(store_reader_create(g->s, PAGE, &g->reader, &e));
	if (config.key_file)
		unlink(config.key_file);
}

static void guest_close(struct guest *g)
{
	store_reader_destroy(g->reader);
	pagemap_destroy(g->live);
	store_close(g->s);
	remove_tree(g->dir);
	free(g->dir);
}

/* ---- into the caller's memory ---- */

/* In random order; returns the first error. */
static int read_all(struct guest *g, struct rand *rnd, struct page_read *reads)
{
	struct err why = {0};
	int r;

	memset(got, 0xa5, sizeof(got));
	for (uint32_t i = 0; i < NR_PAGES; i++)
		reads[i] = (struct page_read){
			.gfn = i, .loc = pagemap_get(g->live, i), .dst = got[i], .err = 1};
	for (uint32_t i = NR_PAGES; i-- > 1;) {
		uint32_t k = (uint32_t)rand_below(rnd, i + 1);
		struct page_read x = reads[i];

		reads[i] = reads[k];
		reads[k] = x;
	}
	r = store_read_pages(g->reader, reads, NR_PAGES, &why);
	CHECK(!r == !why.text[0]);
	return r;
}

static void check_read(struct guest *g, struct rand *rnd)
{
	static struct page_read reads[NR_PAGES];

	CHECK(read_all(g, rnd, reads) == 0);
	for (uint32_t i = 0; i < NR_PAGES; i++)
		CHECK(reads[i].err == 0);
	CHECK(!memcmp(got, memory, sizeof(memory)));
}

/* ---- handed out ---- */

struct placing {
	_Atomic uint32_t times[NR_PAGES];
	_Atomic uint32_t calls, fail_at; /* 0: never */
};

static int place(void *arg, const struct placed_page *pages, size_t nr, struct err *e)
{
	struct placing *x = arg;

	if (++x->calls == x->fail_at)
		return err_set(e, EFAULT, "no place for it");
	for (size_t i = 0; i < nr; i++) {
		x->times[pages[i].gfn]++;
		memcpy(got[pages[i].gfn], pages[i].bytes, PAGE);
	}
	return 0;
}

static int by_loc(const void *a, const void *b)
{
	const struct page_at *x = a, *y = b;

	return x->loc < y->loc ? -1 : x->loc > y->loc;
}

static int place_all(struct guest *g, struct placing *x, struct err *why)
{
	static struct page_at pages[NR_PAGES];

	memset(got, 0xa5, sizeof(got));
	for (uint32_t i = 0; i < NR_PAGES; i++)
		pages[i] = (struct page_at){i, pagemap_get(g->live, i)};
	qsort(pages, NR_PAGES, sizeof(*pages), by_loc);
	return store_place_pages(g->reader, pages, NR_PAGES, place, x, why);
}

static void check_place(struct guest *g)
{
	static struct placing x;
	struct err why = {0};

	x = (struct placing){0};
	CHECK_OK(place_all(g, &x, &e));
	for (uint32_t i = 0; i < NR_PAGES; i++)
		CHECK(x.times[i] == 1);
	CHECK(!memcmp(got, memory, sizeof(memory)));
	x = (struct placing){.fail_at = 1};
	CHECK(place_all(g, &x, &why) == -EFAULT && !strcmp(why.text, "no place for it"));
	/* What was not begun by then is not. */
	CHECK(g->s->pool || x.calls < DIV_ROUND_UP(NR_PAGES * PAGE, 4u << 20));
}

/* ---- headers ---- */

/* H1: a header in use stays, however many come after it; one that is not, goes. */
static void check_headers(struct guest *g)
{
	loc_t loc = pagemap_get(g->live, 1);
	static struct header_cache c;
	struct open_batch b, other;
	struct reader *io;

	CHECK(headers_init(&c) == 0 && reader_create(0, &io, NULL) == 0);
	for (int in_use = 1; in_use >= 0; in_use--) {
		batch_open(&c, g->s, loc_segment(loc), loc_block(loc), &b);
		CHECK(!b.err && batches_load(&c, g->s, io, &b, 1) == 0 && !b.err);
		if (!in_use)
			batch_close(&c, g->s, &b);
		for (uint32_t i = 1; i <= 2 * CACHE_HEADERS; i++) {
			batch_open(&c, g->s, loc_segment(loc), i % 200 + 1, &other);
			batch_close(&c, g->s, &other);
		}
		CHECK(!headers_peek(&c, g->s, loc_segment(loc), loc_block(loc)) == !in_use);
		if (in_use)
			batch_close(&c, g->s, &b);
	}
	reader_destroy(io);
	headers_deinit(&c);
}

/* ---- damage ---- */

static void flip(const struct guest *g, loc_t loc)
{
	char path[128];
	uint8_t byte;
	FILE *f;

	/* Each page of ours is longer than this, stored. */
	snprintf(path, sizeof(path), "%s/segments/%08x.seg", g->dir, loc_segment(loc));
	f = fopen(path, "r+e");
	CHECK(f && !fseek(f, (long)loc_block(loc) * 4096 + 3 * 4096 + 100, SEEK_SET) &&
	      fread(&byte, 1, 1, f) == 1);
	byte ^= 1;
	CHECK(!fseek(f, -1, SEEK_CUR) && fwrite(&byte, 1, 1, f) == 1 && !fclose(f));
}

/* One bit of one stored page: it alone is not read, and a place never gets it. */
static void check_damage(struct guest *g, struct rand *rnd)
{
	uint32_t bad = (uint32_t)rand_below(rnd, NR_PAGES / ZERO) * ZERO + 1, nr_bad = 0;
	static struct page_read reads[NR_PAGES];
	static struct placing x;
	struct err why = {0};

	flip(g, pagemap_get(g->live, bad));
	CHECK(read_all(g, rnd, reads) == -EUCLEAN);
	for (uint32_t i = 0; i < NR_PAGES; i++) {
		const struct page_read *q = &reads[i];

		nr_bad += q->err != 0;
		CHECK(q->err ? q->err == -EUCLEAN : !memcmp(got[q->gfn], memory[q->gfn], PAGE));
	}
	CHECK(nr_bad == 1);
	x = (struct placing){0};
	CHECK(place_all(g, &x, &why) == -EUCLEAN && why.text[0]);
	for (uint32_t i = 0; i < NR_PAGES; i++)
		CHECK(!x.times[i] || !memcmp(got[i], memory[i], PAGE));
}

int main(void)
{
	struct rand rnd = rand_of(rand_seed());
	struct pool *pool;

	CHECK(pool_create(2, &pool) == 0);
	for (int side = 0; side < 8; side++) {
		struct guest g;

		guest_open(&g, side & 1 ? "lz4" : "none", side & 2, side & 4 ? pool : NULL);
		check_read(&g, &rnd);
		check_place(&g);
		check_read(&g, &rnd);
		check_headers(&g);
		check_damage(&g, &rnd);
		guest_close(&g);
	}
	pool_destroy(pool);
	printf("ok: %u pages in %u ways\n", NR_PAGES, 8u);
	return 0;
}
