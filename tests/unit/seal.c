/* SPDX-License-Identifier: MIT */
/*
 * Goal: an encrypted store gives back what was put into it, to whoever has the key;
 * without it nothing of a page, a map or a state is to be found in its files, and
 * nothing that is put there is taken for the store's; every wrong key has one clear
 * reason; the key file can be changed.
 * Method: stores with and without a key whose files are searched for what went into
 * them; sealed batches with one field changed, and their checksum made to agree; index
 * records written without the key.
 */
#include <dirent.h>
#include <fcntl.h>
#include <sodium.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/store/internal.h"
#include "snapd/util/pool.h"
#include "tests/lib/store_model.h"

#define PAGE	 4096u
#define NR_PAGES 300u

static char *dir; /* of keys and stores */

static const char *path_of(const char *name)
{
	static char path[2][256];
	static int which;

	which = !which;
	snprintf(path[which], sizeof(path[which]), "%s/%s", dir, name);
	return path[which];
}

static void write_key(const char *name, uint8_t fill, size_t len, mode_t mode)
{
	_cleanup_fd_ int fd = open(path_of(name), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	uint8_t bytes[8192];

	memset(bytes, fill, sizeof(bytes));
	CHECK(fd >= 0 && write(fd, bytes, len) == (ssize_t)len && !fchmod(fd, mode));
}

static int try_open(const char *name, const char *key, bool create, struct store **ret,
		    const char *reason)
{
	struct store_config config = {.dir = path_of(name),
				      .create = create,
				      .segment_bytes = SEG_BYTES_MIN,
				      .compression = create ? "lz4" : NULL};
	struct err e = {0};
	int r;

	config.key_file = key ? path_of(key) : NULL;
	r = store_open(&config, ret, &e);
	CHECK((r == 0) == !e.text[0]);
	if (r && !strstr(e.text, reason)) {
		printf("%s\n", e.text);
		CHECK(!"the reason");
	}
	return r;
}

static struct store *must_open(const char *name, const char *key)
{
	struct store *s;

	CHECK(try_open(name, key, true, &s, "") == 0);
	return s;
}

/* ---- what goes in comes out ---- */

static uint64_t values[NR_PAGES];
static const char state[] = "a state that nobody else may see";

static uint64_t gfn_of(uint32_t i)
{
	return i;
}

static struct snapd_point fill(struct store *s, const char *vm_name)
{
	struct store_vm vm = {.arch = "x86_64", .page_size = PAGE};
	static _Alignas(4096) uint8_t buf[PAGE];
	struct epoch_stats stats;
	struct pagemap *live;
	struct snapd_point at;
	struct epoch *ep;
	uint64_t timeline;

	strcpy(vm.name, vm_name);
	CHECK_OK(store_vm_register(s, &vm, &e));
	CHECK_OK(store_timeline_create(s, vm.id, (struct snapd_point){0}, &timeline, &e));
	CHECK(pagemap_create(true, &live) == 0);
	for (int round = 0; round < 3; round++) {
		CHECK_OK(epoch_begin(s, vm.id, timeline, PAGE, live, &ep, &e));
		for (uint32_t i = 0; i < NR_PAGES; i++) {
			struct epoch_page page;

			values[i] = i % 5 == 4 ? 1 + i % 9 : 1000 * (uint64_t)round + i + 1;
			page = make_page(s, buf, PAGE, i, values[i]);
			CHECK_OK(epoch_put(ep, &page, 1, &e));
		}
		CHECK_OK(epoch_commit(ep, state, sizeof(state), NULL, &at, NULL, &stats, &e));
		CHECK(stats.duplicate > 20 || round);
	}
	pagemap_destroy(live);
	return at;
}

static void expect(struct store *s, struct snapd_point at)
{
	struct store_reader *reader;
	void *got;
	size_t len;

	CHECK_OK(store_reader_create(s, PAGE, &reader, &e));
	check_point(s, reader, PAGE, at, gfn_of, values, NR_PAGES);
	store_reader_destroy(reader);
	CHECK_OK(store_state_load(s, at, &got, &len, &e));
	CHECK(len == sizeof(state) && !memcmp(got, state, len));
	free(got);
}

static void test_round_trip(void)
{
	struct store *s = must_open("sealed", "key");
	struct snapd_point at = fill(s, "guest");

	expect(s, at);
	store_close(s);
	s = must_open("sealed", "key");
	expect(s, at);
	CHECK(dedup_nr(&s->dedup) > 0);
	store_close(s);
}

/* ---- keys ---- */

static void test_keys(void)
{
	struct store *s = must_open("plain", NULL);

	store_close(s);
	CHECK(try_open("plain", "key", true, &s, "is not encrypted") == -EPROTO);
	CHECK(try_open("sealed", NULL, true, &s, "is encrypted: its key is needed") == -ENOKEY);
	CHECK(try_open("sealed", "other", true, &s, "is not the key of") == -EKEYREJECTED);
	CHECK(try_open("sealed", "open", true, &s, "chmod 600") == -EPERM);
	CHECK(try_open("sealed", "group", true, &s, "chmod 600") == -EPERM);
	CHECK(try_open("sealed", "short", true, &s, "fewer than 32") == -EINVAL);
	CHECK(try_open("sealed", "long", true, &s, "more than 4096") == -EINVAL);
	CHECK(try_open("sealed", "none", true, &s, "No such file") == -ENOENT);
	CHECK(try_open("sealed", ".", true, &s, "no regular file") == -EPERM);
	/* systemd's directory, with the modes that it uses. */
	setenv("CREDENTIALS_DIRECTORY", dir, 1);
	CHECK(try_open("sealed", "group", false, &s, "") == 0);
	store_close(s);
	unsetenv("CREDENTIALS_DIRECTORY");
}

static int rekey(const char *old_key, const char *new_key)
{
	struct err e = {0};
	char old_path[256];

	strcpy(old_path, path_of(old_key));
	return store_rekey(path_of("sealed"), old_path, path_of(new_key), &e);
}

static void test_rekey(void)
{
	struct store *s = must_open("sealed", "key");

	CHECK(rekey("key", "other") == -EBUSY);
	store_close(s);
	CHECK(rekey("other", "key") == -EKEYREJECTED);
	CHECK(rekey("key", "open") == -EPERM);
	CHECK(rekey("key", "other") == 0);
	CHECK(try_open("sealed", "key", true, &s, "is not the key of") == -EKEYREJECTED);
	CHECK(try_open("sealed", "other", true, &s, "") == 0);
	store_close(s);
	CHECK(rekey("other", "key") == 0);
}

/* Any bit of STORE/key: damaged, never another key. */
static void test_key_file_damage(void)
{
	_cleanup_fd_ int fd = open(path_of("sealed/key"), O_RDWR | O_CLOEXEC);
	struct key_file good, bad;
	struct store *s;

	CHECK(fd >= 0 && pread(fd, &good, sizeof(good), 0) == sizeof(good));
	for (size_t i = 0; i < sizeof(good); i++) {
		bad = good;
		((uint8_t *)&bad)[i] ^= 1u << i % 8;
		CHECK(pwrite(fd, &bad, sizeof(bad), 0) == sizeof(bad));
		CHECK(try_open("sealed", "key", true, &s, "/key is damaged") == -EUCLEAN);
	}
	CHECK(pwrite(fd, &good, sizeof(good), 0) == sizeof(good) && !ftruncate(fd, 100));
	CHECK(try_open("sealed", "key", true, &s, "/key is cut off") == -EUCLEAN);
	CHECK(pwrite(fd, &good, sizeof(good), 0) == sizeof(good));
}

/* ---- what its files tell ---- */

static size_t count_in(const char *path, const void *what, size_t len)
{
	_cleanup_fd_ int fd = open(path, O_RDONLY | O_CLOEXEC);
	off_t size = lseek(fd, 0, SEEK_END);
	_cleanup_free_ uint8_t *bytes = malloc((size_t)size + 1);
	const uint8_t *p = bytes;
	size_t n = 0;

	CHECK(fd >= 0 && bytes && pread(fd, bytes, (size_t)size, 0) == size);
	while ((p = memmem(p, (size_t)(bytes + size - p), what, len)) != NULL) {
		n++;
		p++;
	}
	return n;
}

/* How often the bytes are in the files of a store. */
static size_t count_in_store(const char *name, const void *what, size_t len)
{
	size_t n = count_in(path_of("sealed/key"), what, len);
	char sub[64], file[400];
	struct dirent *d;
	DIR *segments;

	snprintf(sub, sizeof(sub), "%s/segments", name);
	segments = opendir(path_of(sub));
	CHECK(segments);
	while ((d = readdir(segments)) != NULL) {
		if (d->d_name[0] == '.')
			continue;
		snprintf(file, sizeof(file), "%s/%s", path_of(sub), d->d_name);
		n += count_in(file, what, len);
	}
	closedir(segments);
	snprintf(sub, sizeof(sub), "%s/index/data.mdb", name);
	return n + count_in(path_of(sub), what, len);
}

static size_t count_traces(const char *name, const struct store *s, struct snapd_point at)
{
	static _Alignas(4096) uint8_t buf[PAGE];
	struct rec_epoch rec;
	struct ix_txn t;
	struct pageid id;
	size_t n;

	page_fill(buf, PAGE, 2); /* stays raw */
	id = pageid_of(&s->secret, buf, PAGE);
	n = count_in_store(name, buf + 1024, 16) > 0;
	n += count_in_store(name, &id.lo, 8) > 0;
	page_fill(buf, PAGE, 3); /* is compressed: its first words are literals */
	n += count_in_store(name, buf + 64, 16) > 0;
	n += count_in_store(name, state, 20) > 0;
	n += count_in_store(name, s->secret.b, 32) > 0;
	/* Hashes of what is known to be there. */
	CHECK_OK(index_begin(s->index, &t, &e));
	CHECK(store_epoch_record(&t, &at, &rec, NULL) == 0);
	index_end(&t);
	n += rec.state.hash == XXH3_64bits(state, sizeof(state));
	return n;
}

static void test_no_traces(void)
{
	struct store *s = must_open("plain", NULL);
	struct snapd_point at = fill(s, "traces");

	CHECK(count_traces("plain", s, at) == 6); /* the search finds what is there */
	store_close(s);
	s = must_open("sealed", "key");
	at = fill(s, "traces");
	CHECK(count_traces("sealed", s, at) == 0);
	store_close(s);
}

/* ---- batches ---- */

struct sealed_batch {
	_Alignas(4096) uint8_t bytes[4 * FMT_BLOCK];
};

static struct seal *seal;
static struct seg_ident here = {.segment = 7, .generation = 3, .segment_bytes = SEG_BYTES_MIN};

static void make_batch(struct sealed_batch *b)
{
	struct batch_header *h = (struct batch_header *)b->bytes;
	struct batch_page *p;

	memset(b, 0, sizeof(*b));
	*h = (struct batch_header){.magic = BATCH_MAGIC,
				   .version = BATCH_SEALED,
				   .type = BATCH_PAGES,
				   .page_shift = 12,
				   .header_bytes = FMT_BLOCK,
				   .nr_entries = 2,
				   .payload_bytes = 2 * PAGE,
				   .segment = here.segment,
				   .block = 9,
				   .generation = here.generation,
				   .seq = 5,
				   .vm = "the vm",
				   .point = {2, 4}};
	p = (struct batch_page *)batch_pages(h);
	for (uint32_t i = 0; i < 2; i++) {
		p[i] = (struct batch_page){
			.id_lo = i + 1, .offset = i * PAGE, .len_codec = PAGE << 8};
		page_fill(b->bytes + FMT_BLOCK * (i + 1), PAGE, i + 10);
	}
	seal_begin(h);
	for (uint32_t i = 0; i < 2; i++)
		seal_page(seal, h, i, b->bytes + FMT_BLOCK * (i + 1), PAGE);
	seal_records(seal, h);
	batch_seal(h);
}

static int decode(struct sealed_batch *b, const struct seg_ident *where, uint32_t block)
{
	const struct batch_header *h;
	const struct batch_page *p;
	struct err e = {0};
	int r = batch_decode(b->bytes, sizeof(b->bytes), where, block, &h, &p, &e);

	CHECK((r == 0) == !e.text[0]);
	if (!r)
		CHECK(p[0].id_lo == 1 && p[1].id_lo == 2);
	return r;
}

/* Whatever the header says otherwise, with a checksum that agrees and read at the
 * place that it claims, is not authentic. */
#define FORGED(change)                                                   \
	do {                                                             \
		struct sealed_batch forged = good;                       \
		struct batch_header *h = (struct batch_header *)&forged; \
		struct seg_ident where = here;                           \
		change;                                                  \
		batch_seal(h);                                           \
		where.segment = h->segment;                              \
		where.generation = h->generation;                        \
		memcpy(where.store, h->store, sizeof(where.store));      \
		CHECK(decode(&forged, &where, h->block) == -EUCLEAN);    \
	} while (0)

static void test_forged_header(void)
{
	struct sealed_batch good, copy;

	make_batch(&good);
	copy = good;
	CHECK(decode(&copy, &here, 9) == 0);
	FORGED(h->segment++);
	FORGED(h->block++);
	FORGED(h->generation++);
	FORGED(h->seq++);
	FORGED(h->store[0]++);
	FORGED(h->vm[0]++);
	FORGED(h->point.timeline++);
	FORGED(h->point.epoch++);
	FORGED(h->payload_bytes++);
	FORGED(h->payload_lo++);
	FORGED(h->prev.block++);
	FORGED(h->nr_entries = 1);
	FORGED(forged.bytes[sizeof(*h)] ^= 1);				     /* nonce */
	FORGED(forged.bytes[sizeof(*h) + 40] ^= 1);			     /* tag */
	FORGED(forged.bytes[sizeof(*h) + sizeof(struct batch_sealed)] ^= 1); /* a record */
	FORGED(h->version = BATCH_PLAIN);
}

static void test_forged_pages(void)
{
	struct batch_header *h, other;
	static struct sealed_batch b, c;
	static uint8_t want[PAGE], got[PAGE];
	_Alignas(8) uint8_t place[FMT_BLOCK];

	make_batch(&b);
	CHECK(decode(&b, &here, 9) == 0);
	h = (struct batch_header *)b.bytes;
	page_fill(want, PAGE, 10);
	CHECK(unseal_page(seal, h, 0, got, b.bytes + FMT_BLOCK, PAGE));
	CHECK(!memcmp(got, want, PAGE));
	CHECK(!unseal_page(seal, h, 1, got, b.bytes + FMT_BLOCK, PAGE));
	CHECK(!unseal_page(seal, h, 0, got, b.bytes + FMT_BLOCK, PAGE - 1));
	memcpy(place, h, sizeof(place));
	for (size_t i = offsetof(struct batch_header, segment);
	     i < offsetof(struct batch_header, point); i++) {
		place[i] ^= 1;
		CHECK(!unseal_page(seal, (void *)place, 0, got, b.bytes + FMT_BLOCK, PAGE));
		place[i] ^= 1;
	}
	CHECK(unseal_page(seal, (void *)place, 0, got, b.bytes + FMT_BLOCK, PAGE));
	b.bytes[FMT_BLOCK + 5] ^= 1;
	CHECK(!unseal_page(seal, h, 0, got, b.bytes + FMT_BLOCK, PAGE));
	/* Equal pages of a batch are encrypted each in its own way. */
	page_fill(want, PAGE, 10);
	page_fill(got, PAGE, 10);
	seal_page(seal, h, 0, want, PAGE);
	seal_page(seal, h, 1, got, PAGE);
	CHECK(memcmp(want, got, 16) != 0);
	/* The same once more is encrypted otherwise. */
	make_batch(&b);
	make_batch(&c);
	memcpy(&other, c.bytes, sizeof(other));
	CHECK(memcmp(batch_sealed((void *)b.bytes)->nonce, batch_sealed((void *)c.bytes)->nonce,
		     SEAL_NONCE_BYTES) != 0);
	CHECK(memcmp(b.bytes + FMT_BLOCK, c.bytes + FMT_BLOCK, 64) != 0);
}

static void test_forged_blob(void)
{
	static struct sealed_batch b;
	struct batch_header *h = (struct batch_header *)b.bytes;
	uint8_t *payload = b.bytes + FMT_BLOCK;

	*h = (struct batch_header){.type = BATCH_STATE,
				   .header_bytes = FMT_BLOCK,
				   .payload_bytes = sizeof(state),
				   .segment = 7,
				   .block = 9,
				   .point = {1, 1}};
	memcpy(payload, state, sizeof(state));
	batch_blob_finish(seal, h, payload);
	batch_seal(h);
	CHECK(!h->payload_lo && !h->payload_hi && memcmp(payload, state, sizeof(state)) != 0);
	h->point.epoch++;
	CHECK(batch_blob_check(seal, h, payload, NULL) == -EUCLEAN);
	h->point.epoch--;
	/* A blob that could not be opened means nothing: it is read again. */
	memcpy(payload, state, sizeof(state));
	batch_blob_finish(seal, h, payload);
	batch_seal(h);
	CHECK(batch_blob_check(seal, h, payload, NULL) == 0);
	CHECK(!memcmp(payload, state, sizeof(state)));
}

static void expect_reason(struct sealed_batch *b, const struct seg_ident *where, const char *text)
{
	const struct batch_header *h;
	const struct batch_page *p;
	struct err e = {0};

	CHECK(batch_decode(b->bytes, sizeof(b->bytes), where, 9, &h, &p, &e) == -EUCLEAN);
	CHECK(strstr(e.text, text));
}

/* Batches of the one kind in a store of the other. */
static void test_mixed(void)
{
	struct seg_ident plain = here;
	static struct sealed_batch b;

	plain.seal = NULL;
	make_batch(&b);
	expect_reason(&b, &plain, "it is encrypted, but the store is not");
	((struct batch_header *)b.bytes)->version = BATCH_PLAIN;
	batch_seal((struct batch_header *)b.bytes);
	expect_reason(&b, &here, "it is not encrypted");
}

static void test_batches(void)
{
	int fd = open(path_of("sealed"), O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	CHECK_OK(seal_open(fd, "sealed", path_of("key"), false, &seal, &e));
	close(fd);
	here.seal = seal;
	test_forged_header();
	test_forged_pages();
	test_forged_blob();
	test_mixed();
	seal_close(seal);
}

/* ---- the index ---- */

static int put_vm(struct ix_txn *t, void *arg, struct err *e)
{
	struct ix_key k = ix_key_id((const uint8_t *)"0123456789abcde");
	struct rec_vm rec = {.name = "forged", .page_size = PAGE};

	return index_put(t, IX_VMS, &k, &rec, sizeof(rec), "", 0, e);
}

/* A record made by somebody who can write the files, but has no key, or another. */
static void test_forged_record(bool key)
{
	static const uint8_t other_key[SEAL_INDEX_KEY_BYTES] = {1};
	struct index_config config = {.dir = path_of("sealed/index"),
				      .key = key ? other_key : NULL};
	struct store *s;
	struct index *ix;
	struct store_vm vm;
	struct err why = {0};

	CHECK_OK(index_open(&config, &ix, &e));
	CHECK_OK(index_update(ix, put_vm, NULL, &e));
	index_close(ix);
	s = must_open("sealed", "key");
	CHECK(store_vm_get(s, (const uint8_t *)"0123456789abcde", &vm, &why) == -EUCLEAN);
	CHECK(why.text[0]);
	store_close(s);
}

int main(void)
{
	dir = temp_dir();
	write_key("key", 1, 32, 0600);
	write_key("other", 2, 4096, 0400);
	write_key("open", 1, 32, 0644);
	write_key("group", 1, 32, 0440);
	write_key("short", 1, 31, 0600);
	write_key("long", 1, 4097, 0600);
	test_round_trip();
	test_keys();
	test_rekey();
	test_key_file_damage();
	test_no_traces();
	test_batches();
	test_forged_record(false);
	test_forged_record(true);
	remove_tree(dir);
	free(dir);
	printf("encrypted stores, keys, forgeries: ok\n");
	return 0;
}
