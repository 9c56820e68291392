/* SPDX-License-Identifier: MIT */
/*
 * Goal: every variant of the page kernels gives the same ids as the reference
 * (XXH3-128 of the plain library), tells zero from nonzero whichever single bit
 * is set, copies exactly, from any alignment, and identifies the copy even when
 * the source is written meanwhile.
 * Method: all variants that this CPU runs against the library and a naive loop.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include <xxhash.h>

#include "snapd/store/pageid_ops.h"
#include "tests/lib/rand.h"

#define LEN_MAX 65536u

static struct page_secret secret;
static _Alignas(64) uint8_t src[LEN_MAX + 64], dst[LEN_MAX + 64];

static struct pageid reference(const void *page, size_t len)
{
	XXH128_hash_t h = XXH3_128bits_withSecret(page, len, secret.b, sizeof(secret.b));

	for (size_t i = 0; i < len; i++)
		if (((const uint8_t *)page)[i])
			return (struct pageid){h.low64, h.high64};
	return (struct pageid){0};
}

/* One page of `len` bytes at `page`, by ops: of, copy, zero, and nothing beside. */
static void check_page(const struct pageid_ops *ops, const uint8_t *page, size_t len)
{
	struct pageid want = reference(page, len);

	memset(dst, 0xa5, len + 64);
	CHECK(pageid_equal(ops->of(&secret, page, len), want));
	CHECK(pageid_equal(ops->copy(&secret, dst, page, NULL, len), want));
	CHECK(memcmp(dst, page, len) == 0);
	for (int i = 0; i < 64; i++)
		CHECK(dst[len + i] == 0xa5);
	memset(dst, 0x5a, len);
	CHECK(pageid_equal(ops->copy(&secret, dst, page, page, len), want));
	CHECK(memcmp(dst, page, len) == 0);
	CHECK(ops->zero(page, len) == pageid_is_zero(want));
}

static void test_lengths(const struct pageid_ops *ops, struct rand *r)
{
	for (size_t len = 64; len <= LEN_MAX; len = len < 1024 ? len + 64 : len * 2)
		for (size_t shift = 0; shift < 64; shift += 1 + rand_below(r, 20)) {
			memset(src, 0, sizeof(src));
			check_page(ops, src + shift, len);
			for (size_t i = 0; i < sizeof(src); i++)
				src[i] = (uint8_t)rand_next(r);
			check_page(ops, src + shift, len);
		}
}

/* A page is zero only if every bit of it is. */
static void test_single_bits(const struct pageid_ops *ops)
{
	memset(src, 0, sizeof(src));
	for (size_t bit = 0; bit < 4096 * 8; bit++) {
		src[bit / 8] = (uint8_t)(1u << bit % 8);
		CHECK(!ops->zero(src, 4096));
		CHECK(!pageid_is_zero(ops->copy(&secret, dst, src, NULL, 4096)));
		src[bit / 8] = 0;
	}
	CHECK(ops->zero(src, 4096));
	src[4096] = 1; /* beside the page */
	CHECK(ops->zero(src, 4096));
}

static atomic_bool stop;

static void *scribble(void *arg)
{
	_Atomic uint8_t *p = arg;

	/* Zero most of the time, so that the zero test races, too. */
	while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
		atomic_store_explicit(p + 4095, 1, memory_order_relaxed);
		atomic_store_explicit(p + 4095, 0, memory_order_relaxed);
	}
	return NULL;
}

/* The id is the copy's, whatever the guest does to the source meanwhile. */
static void test_racing_guest(const struct pageid_ops *ops)
{
	pthread_t t;

	memset(src, 0, sizeof(src));
	atomic_store(&stop, false);
	CHECK(pthread_create(&t, NULL, scribble, src) == 0);
	for (int i = 0; i < 20000; i++) {
		struct pageid id = ops->copy(&secret, dst, src, NULL, 4096);

		CHECK(pageid_equal(id, reference(dst, 4096)));
	}
	atomic_store(&stop, true);
	pthread_join(t, NULL);
}

/* Another secret, other ids: a guest cannot know them. */
static void test_secret(void)
{
	struct page_secret other = secret;
	struct pageid id;

	memset(src, 1, 4096);
	id = pageid_of(&secret, src, 4096);
	other.b[100] ^= 1;
	CHECK(!pageid_equal(id, pageid_of(&other, src, 4096)));
}

int main(void)
{
	struct rand r = rand_of(rand_seed());
	const struct pageid_ops *ops;

	for (size_t i = 0; i < sizeof(secret.b); i++)
		secret.b[i] = (uint8_t)rand_next(&r);
	CHECK(strcmp(pageid_variant(), pageid_ops_at(0)->name) == 0);
	for (size_t i = 0; (ops = pageid_ops_at(i)) != NULL; i++) {
		test_lengths(ops, &r);
		test_single_bits(ops);
		test_racing_guest(ops);
		printf("variant %s: same as the library\n", ops->name);
	}
	test_secret();
	return 0;
}
