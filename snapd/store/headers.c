/* SPDX-License-Identifier: MIT */
/* A reader's batches and their headers; see headers.h. */
#include "snapd/store/headers.h"

#include <assert.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "snapd/store/internal.h"

#define LOAD_MAX 64u /* headers read at once */

static uint32_t bucket_of(uint32_t segment, uint32_t block)
{
	return (uint32_t)((((uint64_t)segment << 32 | block) * 0x9e3779b97f4a7c15u) >> 53);
}
static_assert(CACHE_BUCKETS == 1u << (64 - 53), "bucket_of() takes the top bits");

static uint8_t *slot_bytes(struct header_cache *c, uint32_t i)
{
	return c->bytes + (size_t)i * HEADER_BYTES;
}

static uint32_t find(const struct header_cache *c, const struct seg_ident *id, uint32_t block)
{
	uint32_t i = c->buckets[bucket_of(id->segment, block)];

	while (i != NO_HEADER) {
		const struct cached_header *h = &c->slots[i];

		if (h->segment == id->segment && h->block == block &&
		    h->generation == id->generation && h->rewrites == id->rewrites)
			return i;
		i = h->next;
	}
	return NO_HEADER;
}

static void drop(struct header_cache *c, uint32_t i)
{
	struct cached_header *h = &c->slots[i];
	uint32_t *link = &c->buckets[bucket_of(h->segment, h->block)];

	if (!h->valid)
		return;
	while (*link != i)
		link = &c->slots[*link].next;
	*link = h->next;
	h->valid = false;
}

/* A slot that no open batch uses (H1); what was in it is forgotten. */
static uint32_t take(struct header_cache *c)
{
	uint32_t i = c->hand;

	do
		i = (i + 1) % CACHE_HEADERS;
	while (c->slots[i].users && i != c->hand);
	assert(!c->slots[i].users);
	c->hand = i;
	drop(c, i);
	return i;
}

/* The slot holds that header now. */
static void insert(struct header_cache *c, uint32_t i, const struct seg_ident *id, uint32_t block)
{
	struct cached_header *h = &c->slots[i];
	uint32_t *bucket = &c->buckets[bucket_of(id->segment, block)];

	h->generation = id->generation;
	h->rewrites = id->rewrites;
	h->segment = id->segment;
	h->block = block;
	h->next = *bucket;
	h->valid = true;
	*bucket = i;
}

int headers_init(struct header_cache *c)
{
	c->bytes = mmap(NULL, (size_t)CACHE_HEADERS * HEADER_BYTES, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (c->bytes == MAP_FAILED) {
		c->bytes = NULL;
		return -ENOMEM;
	}
	headers_forget(c);
	return 0;
}

void headers_deinit(struct header_cache *c)
{
	if (c->bytes)
		munmap(c->bytes, (size_t)CACHE_HEADERS * HEADER_BYTES);
}

void headers_forget(struct header_cache *c)
{
	for (uint32_t i = 0; i < CACHE_BUCKETS; i++)
		c->buckets[i] = NO_HEADER;
	for (uint32_t i = 0; i < CACHE_HEADERS; i++)
		c->slots[i].valid = false;
}

const struct batch_header *headers_peek(struct header_cache *c, struct store *s, uint32_t segment,
					uint32_t block)
{
	struct seg_ident ident;
	struct seg *seg;
	uint32_t i;
	int fd;

	if (seg_open(s, segment, &seg, &fd, &ident, NULL))
		return NULL;
	seg_close(s, seg);
	i = find(c, &ident, block);
	return i == NO_HEADER ? NULL : (const void *)slot_bytes(c, i);
}

void batch_open(struct header_cache *c, struct store *s, uint32_t segment, uint32_t block,
		struct open_batch *b)
{
	*b = (struct open_batch){.segment = segment, .block = block, .header = NO_HEADER};
	b->err = seg_open(s, segment, &b->seg, &b->fd, &b->ident, &b->why);
	if (b->err)
		return;
	if (!block || block >= b->ident.segment_bytes / FMT_BLOCK) {
		b->err =
			err_set(&b->why, E_CORRUPT, "segment %08x has no block %u", segment, block);
		return;
	}
	b->header = find(c, &b->ident, block);
	b->missing = b->header == NO_HEADER;
	if (b->missing)
		b->header = take(c);
	c->slots[b->header].users++;
}

void batch_close(struct header_cache *c, struct store *s, struct open_batch *b)
{
	if (b->header != NO_HEADER)
		c->slots[b->header].users--;
	if (b->seg)
		seg_close(s, b->seg);
	b->header = NO_HEADER;
	b->seg = NULL;
}

static void decode(struct header_cache *c, struct open_batch *b, int res)
{
	const struct batch_header *h;
	const struct batch_page *p;

	if (res < 0)
		b->err = err_errno(&b->why, -res, "reading segment %08x block %u", b->segment,
				   b->block);
	else
		b->err = batch_decode(slot_bytes(c, b->header), (size_t)res, &b->ident, b->block,
				      &h, &p, &b->why);
	if (b->err == -ENODATA)
		b->err = err_set(&b->why, E_CORRUPT, "segment %08x block %u: cut off", b->segment,
				 b->block);
	if (!b->err)
		insert(c, b->header, &b->ident, b->block);
}

/* Requests for the next missing headers; *at goes on behind them. */
static uint32_t collect(struct header_cache *c, struct store *s, struct open_batch *b, uint32_t nr,
			uint32_t *at, struct read_req *reqs, struct open_batch **which)
{
	uint32_t n = 0;

	for (; *at < nr && n < LOAD_MAX; ++*at) {
		struct open_batch *x = &b[*at];
		uint64_t offset = (uint64_t)x->block * FMT_BLOCK;

		if (x->err || !x->missing)
			continue;
		which[n] = x;
		reqs[n++] = (struct read_req){.fd = x->fd,
					      .offset = offset,
					      .dst = slot_bytes(c, x->header),
					      .len = MIN((uint64_t)batch_header_max(s->seal),
							 x->ident.segment_bytes - offset)};
	}
	return n;
}

int batches_load(struct header_cache *c, struct store *s, struct reader *io, struct open_batch *b,
		 uint32_t nr)
{
	struct read_req reqs[LOAD_MAX];
	struct open_batch *which[LOAD_MAX];
	uint32_t n, at = 0;
	int r = 0;

	while (!r && (n = collect(c, s, b, nr, &at, reqs, which))) {
		r = reader_run(io, reqs, n);
		for (uint32_t i = 0; !r && i < n; i++)
			decode(c, which[i], reqs[i].res);
	}
	return r;
}
