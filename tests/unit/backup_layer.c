/* SPDX-License-Identifier: MIT */
/*
 * Goal: what is put into a map comes out of it, run by run; cut off anywhere, or with runs that
 * make no sense, it is refused with a reason.
 * Method: random frames, there and back; every truncation; runs that are wrong, one by one.
 */
#include <errno.h>
#include <sodium.h>

#include "snapd/backup/layer.h"
#include "tests/lib/damage.h"

#define NR_FRAMES 3000u
#define NR_PACKS  40u

struct frame {
	bool there;
	enum layer_kind kind;
	uint32_t pack, entry;
};

struct frames {
	struct frame f[NR_FRAMES];
	const struct packset *packs; /* numbers of what is decoded → names */
	const struct bk_name *names; /* of the numbers in f */
	uint64_t next, nr;
};

/* Runs that go on, that begin anew in the same and another pack, zero, gone and gaps. */
static void random_frames(struct frames *all, struct rand *r)
{
	struct frame f = {.kind = LAYER_PAGES};

	for (uint32_t i = 0; i < NR_FRAMES; i++, f.entry++) {
		if (!rand_below(r, 4) || f.entry == BK_PACK_PAGES)
			f = (struct frame){.there = rand_below(r, 3),
					   .kind = (enum layer_kind)(1 + rand_below(r, 3)),
					   .pack = (uint32_t)rand_below(r, NR_PACKS),
					   .entry = (uint32_t)rand_below(r, BK_PACK_PAGES)};
		all->f[i] = f;
	}
}

static int check_run(void *arg, const struct layer_run *run, struct err *e)
{
	struct frames *all = arg;

	(void)e;
	CHECK(run->gfn >= all->next && run->gfn + run->nr <= NR_FRAMES && run->nr);
	for (; all->next < run->gfn; all->next++)
		CHECK(!all->f[all->next].there);
	for (uint32_t i = 0; i < run->nr; i++, all->next++, all->nr++) {
		const struct frame *f = &all->f[all->next];

		CHECK(f->there && f->kind == run->kind);
		if (f->kind == LAYER_PAGES)
			CHECK(f->entry == run->entry + i &&
			      !memcmp(&all->packs->names[run->pack], &all->names[f->pack],
				      sizeof(struct bk_name)));
	}
	return 0;
}

static int ignore_run(void *arg, const struct layer_run *run, struct err *e)
{
	(void)arg, (void)run, (void)e;
	return 0;
}

static int decode_map(const uint8_t *payload, size_t len)
{
	_cleanup_free_ uint8_t *copy = copy_of(payload, len);
	_cleanup_(packset_deinit) struct packset packs = {0};
	struct err e = {0};
	int rc = layer_decode(copy, len, &packs, ignore_run, NULL, &e);

	CHECK((rc == 0) == !e.text[0]);
	return rc;
}

static void test_map(struct rand *r)
{
	static struct frames all;
	_cleanup_(packset_deinit) struct packset packs = {0}, got = {0};
	_cleanup_free_ uint8_t *payload = NULL;
	struct layer_writer w;
	struct err e = {0};
	uint32_t number;
	uint64_t nr;
	size_t len;

	all = (struct frames){.packs = &got};
	for (uint32_t i = 0; i < NR_PACKS; i++) {
		struct bk_name name;

		randombytes_buf(&name, sizeof(name));
		CHECK(!packset_add(&packs, &name, &number) && number == i);
	}
	all.names = packs.names;
	random_frames(&all, r);
	layer_writer_init(&w, &packs);
	for (uint32_t i = 0; i < NR_FRAMES; i++)
		if (all.f[i].there)
			CHECK(!layer_put(&w, &(struct layer_run){.gfn = i,
								 .nr = 1,
								 .kind = all.f[i].kind,
								 .pack = all.f[i].pack,
								 .entry = all.f[i].entry}));
	CHECK(!layer_finish(&w, &payload, &len, &nr));
	layer_writer_deinit(&w);
	CHECK(!layer_decode(payload, len, &got, check_run, &all, &e));
	CHECK(all.nr == nr && nr);
	for (; all.next < NR_FRAMES; all.next++)
		CHECK(!all.f[all.next].there);
	for (size_t n = 0; n < len; n++)
		CHECK(decode_map(payload, n) == -E_CORRUPT);
}

/* Runs that make no sense: {gap, len << 2 | kind, …} behind a head for one pack. */
static void test_map_refuses(void)
{
	static const struct {
		uint8_t nr_frames, len, runs[20];
	} bad[] = {
		{1, 2, {0, 1 << 2 | LAYER_PAGES_ON}},		  /* no page before */
		{1, 4, {0, 1 << 2 | LAYER_PAGES, 1, 0}},	  /* no such pack */
		{0, 4, {0, 0 << 2 | LAYER_PAGES, 0, 0}},	  /* no frame */
		{2, 4, {0, 1 << 2 | LAYER_PAGES, 0, 0}},	  /* a frame too few */
		{1, 3, {0x80, 0, 1 << 2 | LAYER_ZERO}},		  /* longer than needed */
		{2, 5, {0, 2 << 2 | LAYER_PAGES, 0, 0xff, 0x7f}}, /* past the last entry */
		{1, 9, {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x0f, 1 << 2 | LAYER_ZERO}},
		{2,
		 18,
		 {0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 4, 1 << 2 | LAYER_ZERO, /* 2^51 */
		  0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 4, 1 << 2 | LAYER_ZERO}},
	};
	static const uint8_t good[] = {3, 1 << 2 | LAYER_PAGES, 0, 5, 0, 1 << 2 | LAYER_PAGES_ON};
	uint8_t payload[sizeof(struct bk_map) + BK_NAME_BYTES + 20] = {0};
	struct bk_map head = {.nr_packs = 1, .nr_frames = 2};
	uint8_t *runs = payload + sizeof(head) + BK_NAME_BYTES;

	memcpy(payload, &head, sizeof(head));
	memcpy(runs, good, sizeof(good));
	CHECK(decode_map(payload, (size_t)(runs - payload) + sizeof(good)) == 0);
	payload[4] = 1; /* reserved */
	CHECK(decode_map(payload, (size_t)(runs - payload) + sizeof(good)) == -E_CORRUPT);
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		head.nr_frames = bad[i].nr_frames;
		memcpy(payload, &head, sizeof(head));
		memcpy(runs, bad[i].runs, sizeof(bad[i].runs));
		CHECK(decode_map(payload, (size_t)(runs - payload) + bad[i].len) == -E_CORRUPT);
	}
}

int main(void)
{
	struct rand r = rand_of(rand_seed());

	for (int i = 0; i < 3; i++)
		test_map(&r);
	test_map_refuses();
	printf("maps: there and back; damaged: refused\n");
	return 0;
}
