/* SPDX-License-Identifier: MIT */
/*
 * Goal: a page comes back from each codec as it was; what would not shrink by an
 * eighth stays raw; whatever else a stored form says is refused, within bounds; a
 * store keeps what it was told about compression, and pages of every codec side by
 * side; features that are not known are refused by name.
 * Method: pages of known kinds, forged frames and blocks, stores reopened with
 * another setting and with forged records.  Output buffers end where the page does,
 * in blocks of their own, so that ASan sees a byte too many.
 */
#include <lz4.h>
#include <zstd.h>

#include "snapd/store/internal.h"
#include "snapd/util/pool.h"
#include "tests/lib/store_model.h"

#define PAGE 4096u

static const char *const settings[] = {"lz4", "zstd", "zstd:-7", "zstd:19"};

static struct codec *codec;

static struct codec_policy policy_of(const char *text)
{
	struct codec_policy p;

	CHECK_OK(codec_parse(text, &p, &e));
	return p;
}

/* The reason is there if and only if it is refused. */
static int unpack(enum page_codec kind, const void *src, uint32_t len, uint32_t page_size)
{
	_cleanup_free_ uint8_t *dst = malloc(page_size), *exact = malloc(len ? len : 1);
	struct err e = {0};
	int r;

	memcpy(exact, src, len);
	r = codec_unpack(codec, kind, dst, page_size, exact, len, &e);
	CHECK((r == 0) == !e.text[0] && (r == 0 || r == -EUCLEAN));
	return r;
}

static void test_settings(void)
{
	static const char *const bad[] = {"",	     "LZ4",	"lz4:1", "zstd:", "zstd:20",
					  "zstd:-8", "zstd:1x", "gzip",	 "zstd1", "none "};
	char text[CODEC_TEXT_MAX];
	struct codec_policy p;

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		struct err e = {0};

		CHECK(codec_parse(bad[i], &p, &e) == -EINVAL && e.text[0]);
	}
	codec_format(policy_of("zstd:-7"), text);
	CHECK(!strcmp(text, "zstd:-7"));
	codec_format(policy_of("zstd"), text);
	CHECK(!strcmp(text, "zstd:1"));
	codec_format(policy_of("lz4"), text);
	CHECK(!strcmp(text, "lz4"));
	codec_format(policy_of("none"), text);
	CHECK(!strcmp(text, "none"));
}

static void round_trip(struct codec_policy p, uint32_t page_size)
{
	_cleanup_free_ uint8_t *page = malloc(page_size),
			       *packed = malloc(codec_pack_max(page_size));
	_cleanup_free_ uint8_t *got = malloc(page_size);
	uint32_t len;

	page_fill(page, page_size, 3);
	len = codec_pack(codec, p, packed, page, page_size);
	CHECK(len > 0 && len <= codec_pack_max(page_size));
	CHECK_OK(codec_unpack(codec, p.codec, got, page_size, packed, len, &e));
	CHECK(!memcmp(page, got, page_size));
	for (uint32_t cut = 1; cut < MIN(len, 64u); cut++)
		CHECK(unpack(p.codec, packed, len - cut, page_size) == -EUCLEAN);
	page_fill(page, page_size, 4);
	CHECK(codec_pack(codec, p, packed, page, page_size) == 0);
}

static void test_round_trips(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(settings); i++)
		for (uint32_t shift = 12; shift <= 16; shift += 2)
			round_trip(policy_of(settings[i]), 1u << shift);
}

/* An eighth is the least gain: seven eighths of noise stay raw, a little less not. */
static void test_least_gain(void)
{
	static uint8_t page[PAGE], packed[PAGE];

	for (size_t i = 0; i < ARRAY_SIZE(settings); i++) {
		struct codec_policy p = policy_of(settings[i]);

		page_fill(page, PAGE, 4);
		memset(page + 3600, 0, PAGE - 3600);
		CHECK(codec_pack(codec, p, packed, page, PAGE) == 0);
		memset(page + 3400, 0, PAGE - 3400);
		CHECK(codec_pack(codec, p, packed, page, PAGE) > 0);
	}
}

/* Frames of other sizes than a page, from a few bytes to much: never more is written. */
static void test_wrong_sizes(void)
{
	static const size_t sizes[] = {0, 1, PAGE - 1, PAGE + 1, 2 * PAGE, 1 << 20, 64 << 20};
	static uint8_t packed[PAGE - 1];

	for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
		_cleanup_free_ uint8_t *zeroes = calloc(1, sizes[i] + 1);
		size_t n = ZSTD_compress(packed, sizeof(packed), zeroes, sizes[i], 19);

		if (!ZSTD_isError(n))
			CHECK(unpack(CODEC_ZSTD, packed, (uint32_t)n, PAGE) == -EUCLEAN);
		else
			CHECK(sizes[i] > 1 << 20);
		if (sizes[i] > 1 << 20)
			continue;
		n = (size_t)LZ4_compress_default((char *)zeroes, (char *)packed, (int)sizes[i],
						 sizeof(packed));
		if (n)
			CHECK(unpack(CODEC_LZ4, packed, (uint32_t)n, PAGE) == -EUCLEAN);
	}
}

static void test_other_frames(void)
{
	static const uint8_t skippable[] = {0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4};
	static uint8_t page[PAGE], two[PAGE];
	size_t n, m;

	page_fill(page, PAGE, 3);
	n = ZSTD_compress(two, sizeof(two), page, PAGE / 2, 1);
	CHECK(!ZSTD_isError(n));
	m = ZSTD_compress(two + n, sizeof(two) - n, page, PAGE / 2, 1);
	CHECK(!ZSTD_isError(m));
	/* Two frames of half a page each are a page to ZSTD_decompress(), not to us. */
	CHECK(ZSTD_decompress(page, PAGE, two, n + m) == PAGE);
	CHECK(unpack(CODEC_ZSTD, two, (uint32_t)(n + m), PAGE) == -EUCLEAN);
	CHECK(unpack(CODEC_ZSTD, skippable, sizeof(skippable), PAGE) == -EUCLEAN);
	CHECK(unpack(CODEC_ZSTD, page, 0, PAGE) == -EUCLEAN);
	CHECK(unpack(CODEC_LZ4, page, 0, PAGE) == -EUCLEAN);
	CHECK(unpack(CODEC_RAW, page, PAGE, PAGE) == -EUCLEAN);
	CHECK(unpack(CODEC_LZ4, page, PAGE, PAGE) == -EUCLEAN);
	CHECK(unpack((enum page_codec)3, page, 100, PAGE) == -EUCLEAN);
}

static void test_damage(void)
{
	struct rand r = rand_of(rand_seed());
	static uint8_t page[PAGE], packed[PAGE], bad[PAGE];

	page_fill(page, PAGE, 3);
	for (size_t i = 0; i < ARRAY_SIZE(settings); i++) {
		struct codec_policy p = policy_of(settings[i]);
		uint32_t len = codec_pack(codec, p, packed, page, PAGE);

		for (int k = 0; k < 2000; k++) {
			memcpy(bad, packed, len);
			bad[rand_below(&r, len)] ^= (uint8_t)(1u << rand_below(&r, 8));
			unpack(p.codec, bad, len, PAGE);
		}
	}
}

/* ---- in a store ---- */

#define NR_PAGES 600u

static uint64_t values[NR_PAGES];

static uint64_t gfn_of(uint32_t i)
{
	return i;
}

static void put_pages(struct epoch *ep, struct store *s, struct rand *r)
{
	static _Alignas(4096) uint8_t bufs[NR_PAGES][PAGE];
	static struct epoch_page pages[NR_PAGES];

	for (uint32_t i = 0; i < NR_PAGES; i++) {
		values[i] = rand_next(r) % 900; /* zero pages and duplicates as well */
		pages[i] = make_page(s, bufs[i], PAGE, i, values[i]);
	}
	CHECK_OK(epoch_put(ep, pages, NR_PAGES, &e));
}

struct guest {
	struct store *s;
	struct pagemap *live;
	struct store_vm vm;
	uint64_t timeline;
	struct snapd_point at;
};

static void guest_open(struct guest *g, const char *dir, const char *compression, struct pool *pool)
{
	struct store_config config = {.dir = dir,
				      .create = true,
				      .segment_bytes = SEG_BYTES_MIN,
				      .compression = compression,
				      .pool = pool};

	*g = (struct guest){.vm = {.name = "guest", .arch = "x86_64", .page_size = PAGE}};
	CHECK_OK(store_open(&config, &g->s, &e));
	CHECK_OK(store_vm_register(g->s, &g->vm, &e));
	CHECK_OK(store_timeline_create(g->s, g->vm.id, (struct snapd_point){0}, &g->timeline, &e));
	CHECK(pagemap_create(true, &g->live) == 0);
}

static void guest_close(struct guest *g)
{
	pagemap_destroy(g->live);
	store_close(g->s);
}

static void guest_epoch(struct guest *g, struct rand *r, struct epoch_stats *stats)
{
	struct epoch *ep;

	CHECK_OK(epoch_begin(g->s, g->vm.id, g->timeline, PAGE, g->live, &ep, &e));
	put_pages(ep, g->s, r);
	CHECK_OK(epoch_commit(ep, "s", 1, NULL, &g->at, NULL, stats, &e));
}

static void guest_check(struct guest *g)
{
	struct store_reader *reader;

	CHECK_OK(store_reader_create(g->s, PAGE, &reader, &e));
	check_point(g->s, reader, PAGE, g->at, gfn_of, values, NR_PAGES);
	store_reader_destroy(reader);
}

/* One setting after the other on the same store: each is remembered, what the ones
 * before it wrote is read and found as duplicates. */
static void test_switching(void)
{
	static const char *const turns[] = {"none", "lz4", NULL, "zstd:3", NULL, "none", NULL};
	static const char *const says[] = {"none",   "lz4",  "lz4", "zstd:3",
					   "zstd:3", "none", "none"};
	struct rand r = rand_of(rand_seed());
	_cleanup_free_ char *dir = temp_dir();
	struct pool *pool;

	CHECK(pool_create(2, &pool) == 0);
	for (size_t i = 0; i < ARRAY_SIZE(turns); i++) {
		struct epoch_stats stats;
		char text[CODEC_TEXT_MAX];
		struct guest g;

		guest_open(&g, dir, turns[i], i % 2 ? pool : NULL);
		codec_format(g.s->policy, text);
		CHECK(!strcmp(text, says[i]));
		for (int k = 0; k < 3; k++) {
			guest_epoch(&g, &r, &stats);
			guest_check(&g);
			CHECK(i == 0 || stats.duplicate > 0);
		}
		guest_close(&g);
	}
	pool_destroy(pool);
	remove_tree(dir);
}

static uint64_t bytes_of(const char *compression)
{
	struct rand r = rand_of(5);
	_cleanup_free_ char *dir = temp_dir();
	struct epoch_stats stats;
	struct guest g;

	guest_open(&g, dir, compression, NULL);
	guest_epoch(&g, &r, &stats);
	guest_close(&g);
	remove_tree(dir);
	return stats.bytes_written;
}

/* Half of the pages shrink to an eighth or less; the other half cost what they did. */
static void test_smaller(void)
{
	uint64_t raw = bytes_of("none");

	CHECK(bytes_of("lz4") < raw * 3 / 5);
	CHECK(bytes_of("zstd:1") < raw * 3 / 5);
	CHECK(bytes_of(NULL) == bytes_of("lz4"));
}

static void flip(const char *dir, loc_t loc, long at, uint8_t bit)
{
	char path[128];
	uint8_t byte;
	FILE *f;

	snprintf(path, sizeof(path), "%s/segments/%08x.seg", dir, loc_segment(loc));
	f = fopen(path, "r+e");
	at += (long)(loc_block(loc) + 1) * 4096;
	CHECK(f && !fseek(f, at, SEEK_SET) && fread(&byte, 1, 1, f) == 1);
	byte ^= bit;
	CHECK(!fseek(f, at, SEEK_SET) && fwrite(&byte, 1, 1, f) == 1);
	CHECK(!fclose(f));
}

static int read_back(struct store *s, loc_t loc)
{
	static _Alignas(4096) uint8_t buf[PAGE];
	struct page_read read = {.gfn = 7, .loc = loc, .dst = buf};
	struct store_reader *reader;
	struct err why = {0};
	int r;

	CHECK_OK(store_reader_create(s, PAGE, &reader, &e));
	r = store_read_pages(reader, &read, 1, &why);
	CHECK((r == 0) == !why.text[0] && read.err == r);
	store_reader_destroy(reader);
	return r;
}

/* Any bit of a compressed page: its reader says so. */
static void test_bad_page(void)
{
	struct rand r = rand_of(rand_seed());
	_cleanup_free_ char *dir = temp_dir();
	static _Alignas(4096) uint8_t buf[PAGE];
	struct epoch_page page;
	struct guest g;
	struct epoch *ep;
	loc_t loc;

	guest_open(&g, dir, "lz4", NULL);
	page = make_page(g.s, buf, PAGE, 7, 3);
	CHECK_OK(epoch_begin(g.s, g.vm.id, g.timeline, PAGE, g.live, &ep, &e));
	CHECK_OK(epoch_put(ep, &page, 1, &e));
	CHECK_OK(epoch_commit(ep, "s", 1, NULL, &g.at, NULL, NULL, &e));
	loc = pagemap_get(g.live, 7);
	for (int i = 0; i < 100; i++) {
		long at = (long)rand_below(&r, 512);
		uint8_t bit = (uint8_t)(1u << rand_below(&r, 8));

		flip(dir, loc, at, bit);
		CHECK(read_back(g.s, loc) == -EUCLEAN);
		flip(dir, loc, at, bit);
	}
	CHECK(read_back(g.s, loc) == 0);
	guest_close(&g);
	remove_tree(dir);
}

/* ---- features ---- */

struct forged {
	const void *names;
	size_t len;
	struct rec_features rec;
};

static int put_forged(struct ix_txn *t, void *arg, struct err *e)
{
	static const struct ix_key key = {.b = "features", .len = 8};
	struct forged *x = arg;

	if (!x->names)
		return index_del(t, IX_META, &key, e);

	return index_put(t, IX_META, &key, &x->rec, sizeof(x->rec), x->names, x->len, e);
}

static int open_forged(struct forged x, const char *reason)
{
	_cleanup_free_ char *dir = temp_dir();
	struct store_config config = {.dir = dir};
	struct store *s = open_store(dir);
	struct err why = {0};
	int r;

	CHECK_OK(index_update(s->index, put_forged, &x, &e));
	store_close(s);
	r = store_open(&config, &s, &why);
	if (!r)
		store_close(s);
	else
		CHECK(strstr(why.text, reason));
	remove_tree(dir);
	return r;
}

static void test_features(void)
{
	CHECK(open_forged((struct forged){.names = NULL}, "") == 0); /* of the first version */
	CHECK(open_forged((struct forged){"lz4", 4, {.codec = CODEC_LZ4}}, "") == 0);
	CHECK(open_forged((struct forged){"lz4\0zstd", 9, {.codec = CODEC_ZSTD, .level = 1}}, "") ==
	      0);
	CHECK(open_forged((struct forged){"", 0, {.codec = CODEC_RAW}}, "") == 0);
	CHECK(open_forged((struct forged){"lz4\0cloud", 10, {.codec = CODEC_LZ4}}, "\"cloud\"") ==
	      -EPROTO);
	CHECK(open_forged((struct forged){"lz4", 3, {.codec = CODEC_LZ4}}, "cut off") == -EUCLEAN);
	CHECK(open_forged((struct forged){"", 0, {.codec = 3}}, "impossible") == -EUCLEAN);
	CHECK(open_forged((struct forged){"", 0, {.codec = CODEC_LZ4, .level = 1}}, "impossible") ==
	      -EUCLEAN);
	CHECK(open_forged((struct forged){"", 0, {.codec = CODEC_ZSTD, .level = 99}},
			  "impossible") == -EUCLEAN);
}

int main(void)
{
	CHECK(codec_create(&codec) == 0);
	test_settings();
	test_round_trips();
	test_least_gain();
	test_wrong_sizes();
	test_other_frames();
	test_damage();
	codec_destroy(codec);
	test_switching();
	test_smaller();
	test_bad_page();
	test_features();
	printf("codecs, stores of every codec, features: ok\n");
	return 0;
}
