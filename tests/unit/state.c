/* SPDX-License-Identifier: MIT */
/*
 * State blobs: what was put can be got, whatever the sizes; and a blob with any
 * byte changed, cut off or with lying lengths is refused, never believed.  The
 * lies come with a right hash, as from a malicious import file.
 */
#include <stdbool.h>
#include <string.h>

#include "snapd/state.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/rand.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

static void make_blob(struct snapd_state_writer *w, const void **blob, size_t *len)
{
	uint8_t payload[100];

	memset(payload, 7, sizeof(payload));
	check(state_writer_init(w) == 0, "memory");
	check(state_put(w, "layout", 0, 1, payload, 64) == 0, "put");
	check(state_put(w, "dev.serial", 2, 3, payload, 13) == 0, "put");
	check(state_put(w, "note.empty", 0, 1, NULL, 0) == 0, "put");
	check(state_writer_finish(w, blob, len) == 0, "finish");
}

static void test_round_trip(struct rand *rnd)
{
	static uint8_t payload[100000], expect[100000];
	struct snapd_state_reader reader;
	struct snapd_state_writer w;
	size_t sizes[64], len;
	const void *blob, *data;
	uint16_t version;
	struct err e = {0};

	check(state_writer_init(&w) == 0, "memory");
	for (uint32_t i = 0; i < ARRAY_SIZE(sizes); i++) {
		sizes[i] = rand_below(rnd, i % 8 ? 200 : sizeof(payload));
		memset(payload, i, sizes[i]);
		check(state_put(&w, i % 2 ? "dev.odd" : "dev.even", i, i, payload, sizes[i]) == 0,
		      "put %u", i);
	}
	check(state_writer_finish(&w, &blob, &len) == 0, "finish");
	check(state_reader_init(&reader, blob, len, &e) == 0, "%s", e.text);
	for (uint32_t i = 0; i < ARRAY_SIZE(sizes); i++) {
		size_t got;

		check(state_get(&reader, i % 2 ? "dev.odd" : "dev.even", i, &version, &data,
				&got) == 0,
		      "get %u", i);
		memset(expect, i, sizes[i]);
		check(version == i && got == sizes[i] && memcmp(data, expect, got) == 0,
		      "record %u", i);
		check((uintptr_t)data % 8 == 0, "payload %u is not aligned", i);
	}
	check(state_get(&reader, "dev.odd", 0, &version, &data, &len) == -ENOENT, "instance");
	check(state_get(&reader, "dev.od", 1, &version, &data, &len) == -ENOENT, "name");
	state_writer_deinit(&w);
}

static void test_writer_limits(void)
{
	struct snapd_state_writer w;
	const void *blob;
	size_t len;

	check(state_writer_init(&w) == 0, "memory");
	check(state_put(&w, "", 0, 1, NULL, 0) == -EINVAL, "empty name");
	check(state_put(&w, "dev.ok", 0, 1, NULL, 0) == -EINVAL, "errors are sticky");
	check(state_writer_finish(&w, &blob, &len) == -EINVAL, "errors are sticky");
	state_writer_deinit(&w);
	state_writer_deinit(&w);

	check(state_writer_init(&w) == 0, "memory");
	check(state_put(&w, "0123456789012345678901234567890", 0, 1, "x", 1) == 0, "31 bytes fit");
	check(state_put(&w, "01234567890123456789012345678901", 0, 1, "x", 1) == -EINVAL,
	      "32 bytes do not");
	state_writer_deinit(&w);

	check(state_writer_init(&w) == 0, "memory");
	check(state_put(&w, "dev.big", 0, 1, &w, STATE_MAX_BYTES + 1ull) == -E2BIG, "too big");
	state_writer_deinit(&w);
}

static int read_blob(const void *blob, size_t len)
{
	struct snapd_state_reader reader;
	struct err e = {0};
	int r = state_reader_init(&reader, blob, len, &e);

	check(!r == !e.code, "a refusal has a reason");
	check(!r || !state_next(&reader, NULL), "a refused blob has no records");
	return r;
}

static void rehash(uint8_t *blob, size_t len)
{
	struct state_header *h = (void *)blob;

	h->hash = XXH3_64bits(blob + sizeof(*h), len - sizeof(*h));
}

/* Every single byte of a blob changed, and every length short of it. */
static void test_damage(void)
{
	_cleanup_free_ uint8_t *copy = NULL;
	struct snapd_state_writer w;
	const void *blob;
	size_t len;

	make_blob(&w, &blob, &len);
	copy = malloc(len + 8);
	check(copy, "memory");
	memcpy(copy, blob, len);
	check(read_blob(copy, len) == 0, "a good blob");
	for (size_t i = 0; i < len; i++) {
		bool minor = i >= offsetof(struct state_header, minor) &&
			     i < offsetof(struct state_header, nr_records);

		copy[i] ^= 0x40;
		check(read_blob(copy, len) == (minor ? 0 : -EUCLEAN), "byte %zu changed", i);
		copy[i] ^= 0x40;
	}
	for (size_t i = 0; i < len; i++)
		check(read_blob(copy, i) == -EUCLEAN, "cut to %zu bytes", i);
	check(read_blob(copy, len + 8) == -EUCLEAN, "longer than it says");
	state_writer_deinit(&w);
}

/* Lies under a right hash. */
static void test_lies(void)
{
	struct snapd_state_writer w;
	struct state_record *rec;
	struct state_header *h;
	const void *blob;
	uint8_t *copy;
	size_t len;

	make_blob(&w, &blob, &len);
	copy = w.buf;
	h = (void *)copy;
	rec = (void *)(h + 1);

	for (uint64_t lie = 1; lie; lie <<= 1) {
		uint64_t was = rec->len_bytes;

		rec->len_bytes = was + lie;
		rehash(copy, len);
		check(read_blob(copy, len) == -EUCLEAN || lie < 8, "length + %llu",
		      (unsigned long long)lie);
		rec->len_bytes = was - lie;
		rehash(copy, len);
		check(read_blob(copy, len) == -EUCLEAN || lie < 8, "length - %llu",
		      (unsigned long long)lie);
		rec->len_bytes = was;
	}
	for (int nr = 0; nr < 8; nr++) {
		h->nr_records = nr;
		rehash(copy, len);
		check(read_blob(copy, len) == (nr == 3 ? 0 : -EUCLEAN), "%d records", nr);
	}
	h->nr_records = 3;
	memset(rec->name, 'x', sizeof(rec->name));
	rehash(copy, len);
	check(read_blob(copy, len) == -EUCLEAN, "a name without end");
	memset(rec->name, 0, sizeof(rec->name));
	rehash(copy, len);
	check(read_blob(copy, len) == -EUCLEAN, "an empty name");
	memcpy(rec->name, "a\0b", 3);
	rehash(copy, len);
	check(read_blob(copy, len) == -EUCLEAN, "bytes behind a name");
	state_writer_deinit(&w);
}

static void test_alignment(void)
{
	struct snapd_state_reader reader;
	struct snapd_state_writer w;
	const void *blob;
	size_t len;

	make_blob(&w, &blob, &len);
	check(state_reader_init(&reader, (const uint8_t *)blob + 4, len - 4, NULL) == -EINVAL,
	      "a blob that is not aligned");
	state_writer_deinit(&w);
}

int main(void)
{
	struct rand rnd = rand_of(rand_seed());

	for (int i = 0; i < 50; i++)
		test_round_trip(&rnd);
	test_writer_limits();
	test_damage();
	test_lies();
	test_alignment();
	return 0;
}
