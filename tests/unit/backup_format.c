/* SPDX-License-Identifier: MIT */
/*
 * Goal: what is put into a backup repository's objects comes out of them, and nothing else
 * does: cut off anywhere, with any bit flipped, of another type, repository or key, an object
 * is refused with a reason.
 * Method: config, blobs of every type, packs of every page size, maps and manifests, each open
 * and sealed: there and back, every truncation, every single bit.  Where encryption is to
 * notice it, the object's name is made to agree first, as one who had that key would.
 */
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <sodium.h>
#include <string.h>
#include <unistd.h>

#include "snapd/backup/blob.h"
#include "snapd/backup/layer.h"
#include "snapd/backup/manifest.h"
#include "snapd/backup/pack.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/rand.h"

static char key_path[] = "/tmp/backup-format-XXXXXX", other_path[] = "/tmp/backup-format-XXXXXX";

static void make_key_file(char *path, uint8_t fill)
{
	_cleanup_fd_ int fd = mkostemp(path, O_CLOEXEC);
	uint8_t bytes[40];

	memset(bytes, fill, sizeof(bytes));
	CHECK(fd >= 0 && write(fd, bytes, sizeof(bytes)) == sizeof(bytes));
}

static struct repo_keys make_keys(bool sealed, struct bk_config *config)
{
	struct repo_keys keys;
	struct err e = {0};

	CHECK(!keys_make(sealed ? key_path : NULL, 60, 5, config, &keys, &e));
	CHECK(keys.sealed == sealed && keys.grace_s == 60);
	return keys;
}

static void flip(void *bytes, size_t bit)
{
	((uint8_t *)bytes)[bit / 8] ^= (uint8_t)(1u << bit % 8);
}

/* A buffer of exactly this size, so that a read behind it is one that ASan sees. */
static uint8_t *copy_of(const void *bytes, size_t len)
{
	uint8_t *copy = malloc(len ? len : 1);

	CHECK(copy);
	memcpy(copy, bytes, len);
	return copy;
}

/* ---- config ---- */

static int open_config(const struct bk_config *c, size_t len, const char *key)
{
	struct repo_keys keys = {0};
	struct err e = {0};
	int rc = keys_open(c, len, key, &keys, &e);

	CHECK((rc == 0) == !e.text[0]);
	return rc;
}

/* With a hash that agrees, as anyone could make it. */
#define FORGED(field, value)                                                           \
	({                                                                             \
		struct bk_config forged_ = good;                                       \
		forged_.field = (value);                                               \
		crypto_generichash_blake2b(forged_.hash, sizeof(forged_.hash),         \
					   (const void *)&forged_,                     \
					   offsetof(struct bk_config, hash), NULL, 0); \
		open_config(&forged_, sizeof(forged_), sealed ? key_path : NULL);      \
	})

static void test_config(bool sealed)
{
	const char *key = sealed ? key_path : NULL;
	struct bk_config good, bad;
	struct repo_keys keys = make_keys(sealed, &good), again = {0};
	struct err e = {0};

	CHECK(!keys_open(&good, sizeof(good), key, &again, &e));
	CHECK(!memcmp(keys.repo, again.repo, sizeof(keys.repo)) && again.sealed == sealed &&
	      again.grace_s == keys.grace_s && !memcmp(keys.names, again.names, 32) &&
	      !memcmp(keys.pages, again.pages, 32) && !memcmp(keys.bodies, again.bodies, 32) &&
	      !memcmp(keys.runs, again.runs, 32));
	for (size_t len = 0; len < sizeof(good); len++)
		CHECK(open_config(&good, len, key) == -E_CORRUPT);
	CHECK(open_config(&good, sizeof(good) + 1, key) == -E_CORRUPT);
	for (size_t bit = 0; bit < 8 * sizeof(good); bit++) {
		bad = good;
		flip(&bad, bit);
		CHECK(open_config(&bad, sizeof(bad), key) == -E_CORRUPT);
	}
	CHECK(FORGED(created_ns, good.created_ns) == 0);
	CHECK(FORGED(major, BK_MAJOR + 1) == -EPROTO);
	CHECK(FORGED(features, good.features | 2) == -EPROTO);
	CHECK(FORGED(grace_s, BK_GRACE_MIN_S - 1) == -E_CORRUPT);
	CHECK(FORGED(grace_s, BK_GRACE_MAX_S + 1) == -E_CORRUPT);
	if (!sealed) {
		CHECK(open_config(&good, sizeof(good), key_path) == -EPROTO);
		CHECK(FORGED(features, BK_FEATURE_SEALED) == -ENOKEY);
		return;
	}
	CHECK(open_config(&good, sizeof(good), NULL) == -ENOKEY);
	CHECK(open_config(&good, sizeof(good), other_path) == -EKEYREJECTED);
	CHECK(open_config(&good, sizeof(good), "/nowhere") == -ENOENT);
	CHECK(FORGED(features, 0) == -EPROTO); /* a key is set: it is not to be used in the clear */
	CHECK(FORGED(grace_s, good.grace_s + 1) == -EKEYREJECTED);
	CHECK(FORGED(repo[0], good.repo[0] ^ 1) == -EKEYREJECTED);
	CHECK(FORGED(salt[0], good.salt[0] ^ 1) == -EKEYREJECTED);
	CHECK(FORGED(nonce[23], good.nonce[23] ^ 1) == -EKEYREJECTED);
	CHECK(FORGED(wrapped[31], good.wrapped[31] ^ 1) == -EKEYREJECTED);
	CHECK(FORGED(tag[0], good.tag[0] ^ 1) == -EKEYREJECTED);
}

/* ---- blobs ---- */

static int decode_blob(const struct repo_keys *k, enum bk_type type, const struct bk_name *name,
		       const void *bytes, size_t len)
{
	_cleanup_free_ uint8_t *copy = copy_of(bytes, len), *payload = NULL;
	struct err e = {0};
	size_t n;
	int rc = blob_decode(k, type, name, copy, len, &payload, &n, &e);

	CHECK((rc == 0) == !e.text[0] && (rc == 0) == (payload != NULL));
	return rc;
}

/* Its name made to agree. */
static int decode_renamed(const struct repo_keys *k, enum bk_type type, const void *bytes,
			  size_t len)
{
	struct bk_name name;

	keys_object_name(k, bytes, len, NULL, 0, &name);
	return decode_blob(k, type, &name, bytes, len);
}

static bool refused(int rc)
{
	return rc == -E_CORRUPT || rc == -EPROTO;
}

/* Where a change is noticed though the name agrees: all but what is random or reserved. */
static bool has_meaning(size_t byte)
{
	return byte < offsetof(struct bk_header, reserved) ||
	       (byte >= offsetof(struct bk_header, repo) &&
		byte < offsetof(struct bk_header, nonce)) ||
	       (byte >= offsetof(struct bk_header, table_bytes) &&
		byte < offsetof(struct bk_header, reserved3));
}

static void damage_blob(const struct repo_keys *k, enum bk_type type, struct blob *b)
{
	struct bk_header good, h;

	memcpy(&good, b->bytes, sizeof(good));
	h = good;
	for (size_t len = 0; len < b->len; len++) {
		CHECK(refused(decode_blob(k, type, &b->name, b->bytes, len)));
		CHECK(refused(decode_renamed(k, type, b->bytes, len)));
		if (len >= sizeof(h)) { /* and says so */
			h.body_bytes = len - sizeof(h);
			memcpy(b->bytes, &h, sizeof(h));
			CHECK(refused(decode_renamed(k, type, b->bytes, len)));
			memcpy(b->bytes, &good, sizeof(good));
		}
	}
	for (size_t bit = 0; bit < 8 * b->len; bit++) {
		flip(b->bytes, bit);
		CHECK(refused(decode_blob(k, type, &b->name, b->bytes, b->len)));
		/* No bytes are no bytes under either codec. */
		if (k->sealed || (has_meaning(bit / 8) && b->len > sizeof(struct bk_header)))
			CHECK(refused(decode_renamed(k, type, b->bytes, b->len)));
		flip(b->bytes, bit);
	}
}

static void wrong_blob(const struct repo_keys *k, enum bk_type type, const struct blob *b)
{
	struct repo_keys other = *k;

	for (int t = BK_PACK; t <= BK_TOMB; t++)
		CHECK((decode_blob(k, (enum bk_type)t, &b->name, b->bytes, b->len) == 0) ==
		      (t == (int)type));
	other.repo[5]++;
	CHECK(decode_blob(&other, type, &b->name, b->bytes, b->len) == -E_CORRUPT);
	other = *k;
	other.names[5]++;
	CHECK(decode_blob(&other, type, &b->name, b->bytes, b->len) == -E_CORRUPT);
	other = *k;
	other.bodies[5]++;
	CHECK((decode_blob(&other, type, &b->name, b->bytes, b->len) == 0) == !k->sealed);
	other = *k;
	other.sealed = !k->sealed;
	CHECK(decode_renamed(&other, type, b->bytes, b->len) == -E_CORRUPT);
}

static void test_blob(const struct repo_keys *k, enum bk_type type, size_t len, bool noise)
{
	uint8_t payload[512], *got;
	struct blob b, again;
	struct err e = {0};
	size_t got_len;

	memset(payload, 7, sizeof(payload));
	if (noise)
		randombytes_buf(payload, sizeof(payload));
	CHECK(!blob_encode(k, type, payload, len, &b, &e));
	CHECK(!blob_decode(k, type, &b.name, b.bytes, b.len, &got, &got_len, &e));
	CHECK(got_len == len && !memcmp(got, payload, len));
	free(got);
	CHECK((memmem(b.bytes, b.len, payload, 16) != NULL) == (noise && !k->sealed && len >= 16));
	/* The same once more has another name: one that was deleted does not come back. */
	CHECK(!blob_encode(k, type, payload, len, &again, &e));
	CHECK(memcmp(&b.name, &again.name, sizeof(b.name)) != 0);
	blob_deinit(&again);
	damage_blob(k, type, &b);
	wrong_blob(k, type, &b);
	blob_deinit(&b);
}

static void test_blobs(const struct repo_keys *k)
{
	for (int type = BK_MAP; type <= BK_TOMB; type++) {
		test_blob(k, (enum bk_type)type, 400, false);
		test_blob(k, (enum bk_type)type, 32, true);
	}
	test_blob(k, BK_STATE, 0, false);
	test_blob(k, BK_STATE, 300, true);
}

/* ---- packs ---- */

#define NR_PAGES 21u /* more than a run, and no multiple of it */

static uint8_t *pages; /* NR_PAGES of 64 KiB at most */

static void *page_at(uint32_t i, uint32_t page_size)
{
	return pages + (size_t)i * page_size;
}

/* Runs that shrink, and some that do not. */
static void fill_pages(uint32_t page_size)
{
	for (uint32_t i = 0; i < NR_PAGES; i++) {
		memset(page_at(i, page_size), (int)i, page_size);
		if (i >= NR_PAGES - 5)
			randombytes_buf(page_at(i, page_size), page_size);
	}
}

static void build(struct pack_builder *b, const struct repo_keys *k, uint32_t page_size)
{
	const void *list[NR_PAGES];
	uint8_t *scratch = malloc(PACK_SCRATCH_BYTES);
	struct bk_name name;

	CHECK(scratch && !pack_builder_init(b, k));
	b->scratch = scratch;
	fill_pages(page_size);
	pack_begin(b, page_size);
	CHECK(pack_has_room(b, NR_PAGES) && !pack_has_room(b, BK_PACK_PAGES + 1));
	for (uint32_t i = 0; i < NR_PAGES; i++) {
		list[i] = page_at(i, page_size);
		keys_page_name(k, list[i], page_size, &name);
		CHECK(pack_find(b, &name) == -1 && pack_reserve(b, &name) == i &&
		      pack_find(b, &name) == (int32_t)i);
	}
	pack_add(b, NULL, list);
	CHECK(!pack_finish(b));
	b->scratch = NULL;
	free(scratch);
}

static int decode_head(const struct repo_keys *k, const struct bk_name *name, const void *bytes,
		       size_t len)
{
	_cleanup_free_ uint8_t *copy = copy_of(bytes, len);
	struct pack_head h = {0};
	struct err e = {0};
	int rc = pack_head_decode(k, name, copy, len, &h, &e);

	CHECK((rc == 0) == !e.text[0]);
	pack_head_deinit(&h);
	return rc;
}

static void damage_head(const struct repo_keys *k, struct pack_builder *b)
{
	struct repo_keys other = *k;
	size_t names_at = sizeof(b->header) + b->header.nr_runs * sizeof(struct bk_run);
	struct bk_name name;

	CHECK(decode_head(k, &b->name, b->head, b->head_bytes) == 0);
	for (size_t len = 0; len < b->head_bytes; len++)
		CHECK(refused(decode_head(k, &b->name, b->head, len)));
	for (size_t bit = 0; bit < 8 * b->head_bytes; bit++) {
		flip(b->head, bit);
		CHECK(refused(decode_head(k, &b->name, b->head, b->head_bytes)));
		keys_object_name(k, b->head, b->head_bytes, NULL, 0, &name);
		if (k->sealed || has_meaning(bit / 8) ||
		    (bit / 8 >= sizeof(b->header) && bit / 8 < names_at))
			CHECK(refused(decode_head(k, &name, b->head, b->head_bytes)));
		flip(b->head, bit);
	}
	other.bodies[0]++;
	CHECK((decode_head(&other, &b->name, b->head, b->head_bytes) == 0) == !k->sealed);
	other = *k;
	other.repo[0]++;
	CHECK(decode_head(&other, &b->name, b->head, b->head_bytes) == -E_CORRUPT);
}

/* 0: the pages are what they were. */
static int open_run(const struct repo_keys *k, const struct pack_head *h, uint32_t run,
		    const uint8_t *stored)
{
	uint32_t page_size = pack_page_size(h), stored_bytes = h->runs[run].stored_bytes;
	_cleanup_free_ uint8_t *copy = copy_of(stored, stored_bytes), *dst = malloc(BK_RUN_BYTES);
	struct err e = {0};
	int rc = pack_run_open(k, h, run, copy, dst, &e);

	CHECK((rc == 0) == !e.text[0] && (!rc || rc == -E_CORRUPT));
	if (!rc)
		CHECK(!memcmp(dst, page_at(h->first[run], page_size),
			      (size_t)h->runs[run].nr_pages * page_size));
	return rc;
}

/* Bits of a run: all, or one of each `every`.  A bit that zstd does not look at may be flipped
 * where nothing is sealed: open_run() sees to the pages. */
static void damage_run(const struct repo_keys *k, const struct pack_head *h, uint32_t run,
		       uint8_t *stored)
{
	size_t bits = 8 * (size_t)h->runs[run].stored_bytes, every = 1 + bits / 4096;
	bool zstd = h->runs[run].codec == BK_ZSTD;
	struct repo_keys other = *k;

	CHECK(open_run(k, h, run, stored) == 0);
	for (size_t bit = 0; bit < bits; bit += every) {
		flip(stored, bit);
		CHECK(open_run(k, h, run, stored) == -E_CORRUPT || (zstd && !k->sealed));
		flip(stored, bit);
	}
	other.pages[0]++;
	CHECK(open_run(&other, h, run, stored) == -E_CORRUPT);
	other = *k;
	other.runs[0]++;
	CHECK((open_run(&other, h, run, stored) == 0) == !k->sealed);
}

static void test_runs(const struct repo_keys *k, struct pack_builder *b)
{
	struct pack_head h;
	struct err e = {0};
	uint32_t codecs[3] = {0};
	size_t want;

	CHECK(!pack_head_bytes(k, b->head, sizeof(struct bk_header), &want, &e) &&
	      want == b->head_bytes);
	CHECK(!pack_head_decode(k, &b->name, b->head, b->head_bytes, &h, &e));
	CHECK(h.header.nr_pages == NR_PAGES && h.first[h.header.nr_runs] == NR_PAGES);
	CHECK(h.offsets[0] == b->head_bytes &&
	      h.offsets[h.header.nr_runs] == b->head_bytes + b->data_bytes);
	for (uint32_t i = 0; i < NR_PAGES; i++) {
		uint32_t run = pack_run_of(&h, i);

		CHECK(h.first[run] <= i && i < h.first[run + 1]);
	}
	for (uint32_t run = 0; run < h.header.nr_runs; run++) {
		uint8_t *stored = b->data + (h.offsets[run] - b->head_bytes);

		CHECK(open_run(k, &h, run, stored) == 0);
		if (!codecs[h.runs[run].codec]++)
			damage_run(k, &h, run, stored);
		/* One run in another's place. */
		if (run && h.runs[run].stored_bytes == h.runs[run - 1].stored_bytes)
			CHECK(open_run(k, &h, run - 1, stored) == -E_CORRUPT);
	}
	CHECK(codecs[BK_RAW] && codecs[BK_ZSTD]);
	pack_head_deinit(&h);
}

static void test_packs(const struct repo_keys *k)
{
	for (uint32_t page_size = 4096; page_size <= 65536; page_size *= 4) {
		struct pack_builder b;

		build(&b, k, page_size);
		damage_head(k, &b);
		test_runs(k, &b);
		pack_builder_deinit(&b);
	}
}

/* ---- maps ---- */

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
			CHECK(!layer_put(&w, i, all.f[i].kind, all.f[i].pack, all.f[i].entry));
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

/* ---- manifests ---- */

static struct manifest make_manifest(void)
{
	static const char cmdline[] = "vmm\0--mem\0"
				      "1G";
	struct manifest m = {.m = {.snapshot = 7,
				   .timeline = 2,
				   .epoch = 9,
				   .taken_ns = 5,
				   .pushed_ns = 6,
				   .state_bytes = 100,
				   .nr_pages = 3,
				   .page_size = 4096,
				   .flags = BK_SNAPSHOT_PINNED,
				   .nr_layers = 2,
				   .cmdline_bytes = sizeof(cmdline),
				   .vm = "web",
				   .arch = "x86_64",
				   .host = "here",
				   .name = "before",
				   .note = "upgrade",
				   .tags = "a,b"},
			     .layers = {{.nr_maps = 2, .nr_frames = 3},
					{.nr_maps = 1, .nr_frames = 1}}};

	m.cmdline = (char *)copy_of(cmdline, sizeof(cmdline));
	for (uint8_t i = 1; i <= 3; i++) {
		struct bk_name name = {{i}};

		CHECK(!manifest_add_map(&m, &name));
	}
	return m;
}

static int decode_manifest(const uint8_t *payload, size_t len)
{
	_cleanup_free_ uint8_t *copy = copy_of(payload, len);
	struct manifest got;
	struct err e = {0};
	int rc = manifest_decode(copy, len, &got, &e);

	CHECK((rc == 0) == !e.text[0] && (!rc || (!got.maps && !got.cmdline)));
	manifest_deinit(&got);
	return rc;
}

/* What encode() makes of a manifest with this change. */
#define CHANGED(change)                                     \
	({                                                  \
		struct manifest m_ = make_manifest();       \
		struct manifest *m = &m_;                   \
		uint8_t *bytes_;                            \
		size_t len_;                                \
		int rc_;                                    \
		change;                                     \
		CHECK(!manifest_encode(m, &bytes_, &len_)); \
		rc_ = decode_manifest(bytes_, len_);        \
		free(bytes_);                               \
		manifest_deinit(m);                         \
		rc_;                                        \
	})
#define REFUSED(change) CHECK(CHANGED(change) == -E_CORRUPT)

/* As many layers as no reader has room for, and all else right. */
static void test_many_layers(void)
{
	enum { NR = BK_LAYERS_MAX + 1 };
	struct manifest m = make_manifest();
	uint8_t payload[sizeof(m.m) + NR * (sizeof(struct bk_layer) + BK_NAME_BYTES)] = {0};
	struct bk_layer *layer = (struct bk_layer *)(payload + sizeof(m.m));

	m.m.nr_layers = m.m.nr_maps = NR;
	m.m.cmdline_bytes = 0;
	memcpy(payload, &m.m, sizeof(m.m));
	for (uint32_t i = 0; i < NR; i++)
		memcpy(&layer[i], &(struct bk_layer){.nr_maps = 1}, sizeof(*layer));
	CHECK(decode_manifest(payload, sizeof(payload)) == -E_CORRUPT);
	manifest_deinit(&m);
}

static void test_manifest_refuses(void)
{
	test_many_layers();
	CHECK(CHANGED(m->m.page_size = 65536) == 0);
	REFUSED(m->m.page_size = 8192);
	REFUSED(m->m.flags = 4);
	REFUSED(m->m.state_bytes = 0);
	REFUSED(m->m.state_bytes = UINT64_MAX);
	REFUSED(m->m.taken_ns = UINT64_MAX);
	REFUSED(m->m.nr_pages = UINT64_MAX);
	REFUSED(m->m.nr_layers = 0);
	REFUSED(m->m.nr_layers = 1);
	REFUSED(m->layers[1].nr_maps = 0);
	REFUSED(m->layers[1].nr_maps = 2);
	REFUSED(m->layers[0].reserved = 1);
	REFUSED(m->cmdline[m->m.cmdline_bytes - 1] = 'x');
	REFUSED(memset(m->m.vm, 'v', sizeof(m->m.vm)));
	REFUSED(m->m.vm[0] = '\0');
	REFUSED(memcpy(m->m.vm, "../x", 5));
	REFUSED(memcpy(m->m.name, "a/b", 4));
	REFUSED(m->m.host[1] = '\n');
	REFUSED(m->m.note[200] = 'x'); /* behind the NUL */
	REFUSED(m->m.tags[0] = 0x7f);
}

static void test_manifest(void)
{
	struct manifest m = make_manifest(), got;
	struct err e = {0};
	uint8_t *payload;
	size_t len;

	CHECK(manifest_frames(&m, 0) == 4 && manifest_frames(&m, 1) == 1);
	CHECK(!manifest_encode(&m, &payload, &len));
	CHECK(!manifest_decode(payload, len, &got, &e));
	CHECK(!memcmp(&got.m, &m.m, sizeof(m.m)) &&
	      !memcmp(got.layers, m.layers, sizeof(m.layers)) &&
	      !memcmp(got.maps, m.maps, 3 * sizeof(*m.maps)) &&
	      !memcmp(got.cmdline, m.cmdline, m.m.cmdline_bytes));
	for (size_t n = 0; n < len; n++)
		CHECK(decode_manifest(payload, n) == -E_CORRUPT);
	free(payload);
	manifest_deinit(&got);
	manifest_deinit(&m);
	test_manifest_refuses();
}

/* ---- names ---- */

static void test_names(void)
{
	struct bk_name name, again;
	char hex[BK_HEX_BYTES + 1] = {0};

	randombytes_buf(&name, sizeof(name));
	name_hex(&name, hex);
	CHECK(!name_parse(hex, &again) && !memcmp(&name, &again, sizeof(name)));
	strcat(hex, "0");
	CHECK(name_parse(hex, &again) == -EINVAL);
	hex[BK_HEX_BYTES - 2] = '\0';
	CHECK(name_parse(hex, &again) == -EINVAL);
	strcat(hex, "A");
	CHECK(name_parse(hex, &again) == -EINVAL);
}

int main(void)
{
	struct rand r = rand_of(rand_seed());

	/* A header may claim 256 MiB: they are allocated, and not to be filled by MALLOC_PERTURB_.
	 */
	mallopt(M_PERTURB, 0);
	make_key_file(key_path, 1);
	make_key_file(other_path, 2);
	pages = malloc((size_t)NR_PAGES * 65536);
	CHECK(pages);
	for (int sealed = 0; sealed < 2; sealed++) {
		struct bk_config config;
		struct repo_keys keys;

		test_config(sealed);
		keys = make_keys(sealed, &config);
		test_blobs(&keys);
		test_packs(&keys);
	}
	for (int i = 0; i < 3; i++)
		test_map(&r);
	test_map_refuses();
	test_manifest();
	test_names();
	free(pages);
	CHECK(!unlink(key_path) && !unlink(other_path));
	printf("configs, blobs, packs, maps, manifests: there and back; damaged, foreign: "
	       "refused\n");
	return 0;
}
