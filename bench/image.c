/* SPDX-License-Identifier: MIT */
/* A synthetic guest's memory; see image.h.  Every draw's order is part of the format. */
#include "bench/image.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/bench.h"
#include "snapd/util/cleanup.h"

#define POOL_PAGES   8192u
#define PER_MILLE    10u
#define WORDS	     (IMAGE_PAGE / 8)
#define MUTATE_MIN   64u
#define MUTATE_RANGE 449u

struct image_rand {
	uint64_t state;
};

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

static uint64_t next(struct image_rand *r)
{
	r->state += 0x9e3779b97f4a7c15ull;
	return mix(r->state);
}

static struct image_rand rand_for(uint64_t seed, uint64_t what, uint64_t b, uint64_t c)
{
	uint64_t where = mix(mix(b) + c * 0xd1342543de82ef95ull);

	return (struct image_rand){mix(seed * 0x9e3779b97f4a7c15ull ^ mix(what + 0x51) ^ where)};
}

static uint32_t below(struct image_rand *r, uint64_t n)
{
	return (uint32_t)(((unsigned __int128)next(r) * n) >> 64);
}

/* ---- kinds of pages ---- */

static const char *const words[64] = {
	"return ",    "static ",      "int ",	      "void ",
	"struct ",    "const char *", "if (",	      "else ",
	"while (",    "for (",	      "NULL",	      "0x",
	"error: ",    "%s: ",	      "/usr/lib/",    "x86_64-linux-gnu/",
	".so.6",      "GLIBC_2.",     "memcpy(",      "unsigned ",
	"long ",      "the ",	      "of ",	      "and ",
	"to ",	      "in ",	      "is ",	      "page ",
	"value ",     "kernel: ",     "systemd[1]: ", "INFO ",
	"WARN ",      "DEBUG ",	      "{\"id\": ",    "\"name\": ",
	"\"time\": ", "}, ",	      "true",	      "false",
	"\n",	      "\n\t",	      "\n        ",   "; ",
	") ",	      "= ",	      "i < n",	      "i++",
	"size_t ",    "buf",	      "len",	      "offset",
	"->next",     "->prev",	      "&ctx",	      "goto out",
	"#define ",   "#include <",   ".h>",	      "SELECT ",
	"FROM ",      "WHERE ",	      "http://",      "status=200 ",
};

static void text_page(uint8_t *p, struct image_rand *r)
{
	uint32_t at = 0;

	while (at < IMAGE_PAGE) {
		uint64_t v = next(r);
		const char *word = words[(v & 63) * ((v >> 6) & 3) / 3];
		char number[24];
		size_t len;

		if (!((v >> 8) & 15)) {
			snprintf(number, sizeof(number), "%u", (uint32_t)(v >> 40) & 0xfffff);
			word = number;
		}
		len = MIN(strlen(word), (size_t)(IMAGE_PAGE - at));
		memcpy(p + at, word, len);
		at += (uint32_t)len;
	}
}

static void code_page(uint8_t *p, struct image_rand *r)
{
	static const uint8_t op[32] = {0x48, 0x89, 0x8b, 0xe8, 0x0f, 0x83, 0xc0, 0x85,
				       0x74, 0x75, 0xff, 0x41, 0x55, 0x53, 0x5d, 0xc3,
				       0x31, 0x4c, 0x8d, 0x24, 0x44, 0x00, 0x01, 0x66,
				       0x90, 0x10, 0x08, 0x20, 0xeb, 0xc7, 0x45, 0xf8};
	uint32_t at = 0;

	while (at < IMAGE_PAGE) {
		uint64_t v = next(r);
		uint32_t operand = (uint32_t)(v >> 32) & 0x3ffff;

		for (uint32_t i = 0; i < 1 + (v & 3) && at < IMAGE_PAGE; i++)
			p[at++] = op[((v >> (8 + 5 * i)) & 31) * ((v >> (40 + 2 * i)) & 3) / 3];
		if (!((v >> 4) & 7) && at + 4 <= IMAGE_PAGE) {
			memcpy(p + at, &operand, 4);
			at += 4;
		}
	}
}

static uint64_t heap_word(uint64_t v, uint64_t base, struct image_rand *r)
{
	uint32_t kind = v & 15;
	char text[8];
	uint64_t w;

	if (kind < 5)
		return 0;
	if (kind < 9)
		return base + ((v >> 8) & 0xfffff0);
	if (kind < 12)
		return (v >> 8) & 0xff;
	if (kind < 13)
		return (v >> 8) & 0xffffffff;
	if (kind == 15)
		return next(r);
	for (int i = 0; i < 8; i++)
		text[i] = "etaoinshrdlu_-./"[(v >> (8 + 4 * i)) & 15];
	memcpy(&w, text, sizeof(w));
	return w;
}

static void heap_page(uint8_t *p, struct image_rand *r)
{
	uint64_t base = 0x7f0000000000ull + (next(r) & 0xffffff000ull);

	for (uint32_t i = 0; i < WORDS; i++) {
		uint64_t w = heap_word(next(r), base, r);

		memcpy(p + i * 8, &w, 8);
	}
}

static void random_page(uint8_t *p, struct image_rand *r)
{
	for (uint32_t i = 0; i < WORDS; i++) {
		uint64_t w = next(r);

		memcpy(p + i * 8, &w, 8);
	}
}

static void pool_page(uint8_t *p, uint64_t seed, uint64_t index)
{
	struct image_rand kinds, r;
	uint32_t kind;

	index %= POOL_PAGES;
	kinds = rand_for(seed, 7, index / 16, 0);
	kind = below(&kinds, 100);
	r = rand_for(seed, 8, index, 0);
	if (kind < 50)
		code_page(p, &r);
	else if (kind < 90)
		text_page(p, &r);
	else
		random_page(p, &r);
}

/* ---- versions ---- */

void image_base(uint8_t *ram, uint32_t nr_pages, uint64_t seed)
{
	struct image_rand r = rand_for(seed, 1, 0, 0);
	uint32_t left = 0, pool = 0, k = 0;

	for (uint32_t i = 0; i < nr_pages; i++, left--) {
		uint8_t *p = ram + (size_t)i * IMAGE_PAGE;
		struct image_rand own = rand_for(seed, 2, i, 0);

		if (!left) {
			k = below(&r, 100);
			left = 1 + below(&r, 64);
			pool = below(&r, POOL_PAGES);
		}
		if (k < 40)
			memset(p, 0, IMAGE_PAGE);
		else if (k < 70)
			pool_page(p, seed, pool++);
		else if (k < 85)
			heap_page(p, &own);
		else
			random_page(p, &own);
	}
}

/* A keyed permutation of [0, n): four rounds of Feistel, repeated until inside. */
static uint64_t permute(uint64_t x, uint64_t n, uint64_t key)
{
	uint32_t bits = 1;
	uint64_t mask;

	while ((1ull << (2 * bits)) < n)
		bits++;
	mask = (1ull << bits) - 1;
	do {
		uint64_t left = x >> bits, right = x & mask;

		for (uint64_t i = 0; i < 4; i++) {
			uint64_t t = left ^ (mix(right + mix(key + i)) & mask);

			left = right;
			right = t;
		}
		x = left << bits | right;
	} while (x >= n);
	return x;
}

static int compare_u32(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

static void mutate_pieces(uint8_t *p, uint64_t seed, uint32_t page, uint32_t epoch,
			  struct image_rand *r)
{
	uint32_t pieces = 1 + below(r, 4);

	for (uint32_t i = 0; i < pieces; i++) {
		uint32_t len = MUTATE_MIN + below(r, MUTATE_RANGE);
		uint32_t at = below(r, IMAGE_PAGE - len);
		struct image_rand own = rand_for(seed, 4, page, (uint64_t)epoch * 4 + i);
		uint8_t heap[IMAGE_PAGE];

		heap_page(heap, &own);
		memcpy(p + at, heap + at, len);
	}
}

static void mutate(uint8_t *p, uint64_t seed, uint32_t page, uint32_t epoch)
{
	struct image_rand r = rand_for(seed, 3, page, epoch);
	uint32_t kind = below(&r, 100);

	if (kind < 60)
		mutate_pieces(p, seed, page, epoch, &r);
	else if (kind < 80)
		heap_page(p, &r);
	else if (kind < 90)
		random_page(p, &r);
	else if (kind < 95)
		pool_page(p, seed, below(&r, POOL_PAGES));
	else
		memset(p, 0, IMAGE_PAGE);
}

uint32_t *image_epoch(uint8_t *ram, uint32_t nr_pages, uint64_t seed, uint32_t epoch, uint32_t *nr)
{
	uint64_t key = seed * 31 + (uint64_t)epoch * 1009;
	uint32_t *pages;

	*nr = (uint32_t)((uint64_t)nr_pages * PER_MILLE / 1000);
	pages = malloc((*nr + 1) * sizeof(*pages));
	if (!pages)
		bench_die("no memory");
	for (uint32_t i = 0; i < *nr; i++)
		pages[i] = (uint32_t)permute(i, nr_pages, key);
	qsort(pages, *nr, sizeof(*pages), compare_u32);
	for (uint32_t i = 0; i < *nr; i++)
		mutate(ram + (size_t)pages[i] * IMAGE_PAGE, seed, pages[i], epoch);
	return pages;
}

uint64_t image_fingerprint(const uint8_t *ram, uint32_t nr_pages)
{
	uint64_t hash = 0xcbf29ce484222325ull;

	for (size_t i = 0; i < (size_t)nr_pages * WORDS; i++) {
		uint64_t w;

		memcpy(&w, ram + i * 8, sizeof(w));
		hash = (hash ^ w) * 0x9fb21c651e98df25ull;
		hash ^= hash >> 32;
	}
	return hash;
}
