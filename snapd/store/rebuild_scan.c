/* SPDX-License-Identifier: MIT */
/*
 * Segment files → the store's segments, their batches, the gaps between them; see
 * rebuild_internal.h.
 */
#include "snapd/store/rebuild_internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "snapd/store/walk.h"

/* ---- superblocks ---- */

static int open_segment(const struct rebuild *b, uint32_t id, uint64_t *bytes)
{
	char name[16];
	struct stat st;
	int fd;

	seg_path(id, name);
	fd = openat(b->s->segments_fd, name, O_RDONLY | O_CLOEXEC);
	if (fd >= 0 && fstat(fd, &st)) {
		close(fd);
		return -1;
	}
	*bytes = fd < 0 ? 0 : (uint64_t)st.st_size / FMT_BLOCK * FMT_BLOCK;
	return fd;
}

/* Its superblock; 1: that can't be used. */
static int read_super(const struct rebuild *b, uint32_t id, struct seg_ident *ret)
{
	_Alignas(FMT_BLOCK) uint8_t block[FMT_BLOCK];
	uint64_t bytes;
	_cleanup_fd_ int fd = open_segment(b, id, &bytes);

	if (fd < 0 || pread(fd, block, sizeof(block), 0) != sizeof(block) ||
	    seg_super_decode(block, ret, NULL) || ret->segment != id)
		return 1;
	return 0;
}

/* Whose the store is: the UUID of most superblocks. */
static int find_uuid(struct rebuild *b, const uint32_t *ids, size_t nr, struct err *e)
{
	uint32_t best = 0;

	if (b->s->seal) {
		memcpy(b->s->uuid, seal_uuid(b->s->seal), sizeof(b->s->uuid));
		return 0;
	}
	for (size_t i = 0; i < nr; i++) {
		struct seg_ident x, y;
		uint32_t same = 0;

		if (read_super(b, ids[i], &x) || !memcmp(x.store, b->s->uuid, sizeof(x.store)))
			continue;
		for (size_t k = i; k < nr; k++)
			same += !read_super(b, ids[k], &y) &&
				!memcmp(x.store, y.store, sizeof(x.store));
		if (same > best) {
			best = same;
			memcpy(b->s->uuid, x.store, sizeof(x.store));
		}
	}
	return best ? 0
		    : err_set(e, ENOENT,
			      "store %s: no segment has a superblock: there is nothing "
			      "to make an index of",
			      b->s->dir);
}

/* Behind a superblock that is damaged: the life that its first batch tells of. */
static int find_generation(const struct rebuild *b, struct seg_ident *ident)
{
	_cleanup_free_ uint8_t *buf = aligned_alloc(FMT_BLOCK, batch_header_max(b->s->seal));
	_cleanup_fd_ int fd = open_segment(b, ident->segment, &ident->segment_bytes);

	if (!buf || fd < 0)
		return 1;
	for (uint64_t block = 1; block < ident->segment_bytes / FMT_BLOCK; block++) {
		const struct batch_header *h = (const struct batch_header *)buf;
		const struct batch_page *pages;
		ssize_t n =
			pread(fd, buf, batch_header_max(b->s->seal), (off_t)(block * FMT_BLOCK));

		if (n < (ssize_t)sizeof(*h) || h->magic != BATCH_MAGIC)
			continue;
		ident->generation = h->generation;
		if (!batch_decode(buf, (size_t)n, ident, (uint32_t)block, &h, &pages, NULL))
			return 0;
	}
	return 1;
}

static int add_segment(struct rebuild *b, uint32_t id, struct err *e)
{
	struct seg_ident ident = {.segment = id}, want = {.segment = id, .seal = b->s->seal};
	struct seg *seg;

	memcpy(want.store, b->s->uuid, sizeof(want.store));
	if (read_super(b, id, &ident)) {
		b->ret->damages++;
		if (find_generation(b, &want)) {
			rebuild_tell(b,
				     "segment %08x: neither its superblock nor a batch can be read",
				     id);
			return 0;
		}
		rebuild_tell(b, "segment %08x: its superblock is damaged, its batches are used",
			     id);
		ident = want;
	} else if (memcmp(ident.store, want.store, sizeof(want.store)) != 0) {
		b->ret->damages++;
		rebuild_tell(b, "segment %08x: the file is one of another store", id);
		return 0;
	}
	if (id > SEG_ID_MAX || ident.segment_bytes < SEG_BYTES_MIN ||
	    ident.segment_bytes > SEG_BYTES_MAX || ident.segment_bytes % FMT_BLOCK) {
		b->ret->damages++;
		rebuild_tell(b, "segment %08x: it can't have %llu bytes", id,
			     (unsigned long long)ident.segment_bytes);
		return 0;
	}
	if (seg_add(b->s, id, &seg))
		return rebuild_no_memory(e);
	seg->generation = ident.generation;
	seg->segment_bytes = ident.segment_bytes;
	seg->tail = (uint32_t)(ident.segment_bytes / FMT_BLOCK);
	seg->state = SEG_SEALED;
	b->ret->segments++;
	return 0;
}

int rebuild_find_segments(struct rebuild *b, struct err *e)
{
	_cleanup_free_ uint32_t *ids = NULL;
	size_t nr = 0;
	int r = space_list(b->s, &ids, &nr, e);

	if (!r)
		r = find_uuid(b, ids, nr, e);
	for (size_t i = 0; !r && i < nr; i++)
		r = add_segment(b, ids[i], e);
	return r;
}

/* ---- batches ---- */

static int note_gone(struct rebuild *b, loc_t loc)
{
	struct gone *last = b->nr_gone ? &b->gone[b->nr_gone - 1] : NULL;

	if (last && last->from + last->len == loc) {
		last->len++;
		return 0;
	}
	if (array_grow(b->gone, b->nr_gone, b->cap_gone))
		return -ENOMEM;
	assert(b->gone);
	b->gone[b->nr_gone++] = (struct gone){loc, 1};
	return 0;
}

static int note_pages(struct rebuild *b, struct found *x, const struct batch_header *h,
		      const struct batch_page *pages)
{
	int r = 0;

	for (uint32_t i = 0; !r && i < h->nr_entries; i++) {
		if (page_is_gone(&pages[i])) {
			r = note_gone(b, loc_make(h->segment, h->block, i));
			continue;
		}
		x->nr_pages++;
		b->codecs |= 1u << page_codec(&pages[i]);
	}
	return r;
}

static int note_batch(struct rebuild *b, const struct batch_header *h,
		      const struct batch_page *pages, struct err *e)
{
	if (array_grow(b->found, b->nr_found, b->cap_found))
		return rebuild_no_memory(e);
	b->found[b->nr_found++] = (struct found){.at = {h->segment, h->block},
						 .prev = pages ? (struct batch_ref){0} : h->prev,
						 .blocks = batch_blocks(h),
						 .nr_entries = pages ? h->nr_entries : 0,
						 .type = h->type,
						 .seq = h->seq};
	b->ret->batches++;
	b->counters.next_seq = MAX(b->counters.next_seq, h->seq + 1);
	if (pages && note_pages(b, &b->found[b->nr_found - 1], h, pages))
		return rebuild_no_memory(e);
	return 0;
}

static int walk_segment(struct rebuild *b, const struct seg *seg, struct seg_walk *w, struct err *e)
{
	struct gap gap = {.segment = seg->id};

	for (;;) {
		const struct batch_page *pages;
		const struct batch_header *h;
		struct err why = {0};
		uint32_t at;
		int r = seg_walk_next(w, &at, &h, &pages, &why);

		if (!r)
			return 0;
		if (r < 0 && r != -E_CORRUPT && r != -EPROTO) { /* what may be there is not known */
			b->ret->damages++;
			rebuild_tell(b, "%s", why.text);
		}
		if (r < 0) {
			gap.from = at;
			gap.to = w->block;
			continue;
		}
		if (gap.to && array_grow(b->gaps, b->nr_gaps, b->cap_gaps))
			return rebuild_no_memory(e);
		if (gap.to)
			b->gaps[b->nr_gaps++] = gap;
		gap.to = 0;
		r = note_batch(b, h, pages, e);
		if (r)
			return r;
	}
}

int rebuild_walk_segments(struct rebuild *b, struct err *e)
{
	for (uint32_t i = 0; i < b->s->nr_segs; i++) {
		_cleanup_(seg_walk_deinit) struct seg_walk w = {0};
		struct seg_ident ident;
		struct seg *seg;
		int fd, r;

		if (!b->s->segs[i])
			continue;
		r = seg_open(b->s, i, &seg, &fd, &ident, e);
		if (r)
			return r;
		b->holes |= ident.rewrites != 0;
		r = seg_walk_init(&w, fd, &ident, (uint32_t)(ident.segment_bytes / FMT_BLOCK))
			    ? rebuild_no_memory(e)
			    : walk_segment(b, seg, &w, e);
		seg_close(b->s, seg);
		if (r)
			return r;
	}
	return 0;
}

uint32_t rebuild_features_found(const struct rebuild *b)
{
	return (b->holes ? 1u << FEATURE_HOLES : 0) |
	       (b->codecs & 1u << CODEC_LZ4 ? 1u << FEATURE_LZ4 : 0) |
	       (b->codecs & 1u << CODEC_ZSTD ? 1u << FEATURE_ZSTD : 0);
}

/* ---- found again ---- */

static uint64_t place(struct batch_ref at)
{
	return (uint64_t)at.segment << 32 | at.block;
}

static int compare_found(const void *a, const void *b)
{
	uint64_t x = place(((const struct found *)a)->at), y = place(((const struct found *)b)->at);

	return x < y ? -1 : x > y;
}

struct found *rebuild_find(const struct rebuild *b, struct batch_ref at)
{
	struct found key = {.at = at};

	if (!at.block || !b->nr_found)
		return NULL;
	return bsearch(&key, b->found, b->nr_found, sizeof(key), compare_found);
}

/* All parts of a blob; each was written before the one that leads to it. */
void rebuild_use_blob(struct rebuild *b, struct batch_ref at)
{
	struct found *x = rebuild_find(b, at);

	for (uint64_t seq = UINT64_MAX; x && x->seq < seq; x = rebuild_find(b, x->prev)) {
		x->used = true;
		seq = x->seq;
	}
}
