/* SPDX-License-Identifier: MIT */
/*
 * pack: pages ↔ one object of them.  In: pages with their names; out: header and table, and
 * the stored bytes of the runs; and back, run by run, each page checked against its name.
 *
 *   header, table (runs, names), run 0, run 1, …
 *
 * A *run* is up to BK_RUN_BYTES of neighbouring pages compressed together: that gains a tenth
 * to a fifth over single pages, and to read one page costs at most 64 KiB.  A pack's name is
 * that of header and table; what is in the runs is proved by the pages' own names.
 *
 * A builder belongs to one thread at a time; add() uses the pool for compression.
 */
#pragma once

#include "snapd/backup/keys.h"

struct pool;

struct pack_builder {
	const struct repo_keys *keys; /* borrowed */
	uint32_t page_size;
	struct bk_header header;
	struct bk_run *runs;   /* owned; BK_PACK_PAGES */
	struct bk_name *names; /* owned; BK_PACK_PAGES */
	uint16_t *slots;       /* owned; name → entry + 1 */
	uint8_t *data;	       /* owned; BK_PACK_DATA */
	uint8_t *scratch;      /* borrowed; PACK_SCRATCH_BYTES; during add() */
	uint64_t data_bytes;
	uint32_t nr_reserved; /* entries that have a name and no bytes yet */
	uint8_t *head;	      /* owned; after finish(): header and table */
	size_t head_bytes;
	struct bk_name name;
};

/* Pages that one call to add() takes at most. */
#define PACK_ADD_BYTES	   (4u << 20)
#define PACK_SCRATCH_BYTES (PACK_ADD_BYTES / BK_RUN_BYTES * (BK_RUN_BYTES + BK_TAG_BYTES))

int pack_builder_init(struct pack_builder *b, const struct repo_keys *keys);
void pack_builder_deinit(struct pack_builder *b);
/* Begin another pack. */
void pack_begin(struct pack_builder *b, uint32_t page_size);
/* Has it room for so many more pages, whatever they compress to? */
bool pack_has_room(const struct pack_builder *b, uint32_t nr);
/* Its entry with that name, or -1. */
int32_t pack_find(const struct pack_builder *b, const struct bk_name *name);
/* An entry for a page whose bytes follow with the next add().  There is room. */
uint32_t pack_reserve(struct pack_builder *b, const struct bk_name *name);
/* The bytes of all that was reserved, in that order: page_size each. */
void pack_add(struct pack_builder *b, struct pool *pool, const void *const *pages);
/* head and name are there then; data is as it is.  -ENOMEM. */
int pack_finish(struct pack_builder *b);

/* ---- reading ---- */

struct pack_head {
	struct bk_header header;
	const struct bk_run *runs;   /* in `table` */
	const struct bk_name *names; /* in `table` */
	uint64_t *offsets; /* owned; of each run in the object, and one more: where it ends */
	uint32_t *first;   /* owned; each run's first entry, and one more */
	uint8_t *table;	   /* owned */
};

/* Bytes of header and table, from the first sizeof(struct bk_header) of the object.  -EUCLEAN. */
int pack_head_bytes(const struct repo_keys *k, const void *bytes, size_t len, size_t *ret,
		    struct err *e);
/* `bytes`: header and table as they came, of which the object's name is proof. */
int pack_head_decode(const struct repo_keys *k, const struct bk_name *name, const void *bytes,
		     size_t len, struct pack_head *ret, struct err *e);
void pack_head_deinit(struct pack_head *h);
static inline uint32_t pack_page_size(const struct pack_head *h)
{
	return 1u << h->header.page_shift;
}
uint32_t pack_run_of(const struct pack_head *h, uint32_t entry);
/* The pages of a run to dst (BK_RUN_BYTES), each checked; `stored` is spoilt.  -EUCLEAN, -ENOMEM.
 */
int pack_run_open(const struct repo_keys *k, const struct pack_head *h, uint32_t run,
		  uint8_t *stored, uint8_t *dst, struct err *e);
