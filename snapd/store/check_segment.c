/* SPDX-License-Identifier: MIT */
/*
 * Segments: the file, its superblock, each batch header up to the tail, and the bytes of
 * pages where they are asked for.  What is bad is noted by its place.
 */
#include "snapd/store/check_internal.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "snapd/store/walk.h"

/* ---- what is bad already ---- */

bool check_in_bad_blocks(const struct check *k, uint32_t segment, uint32_t block)
{
	if (segment < k->nr_segs && k->segs[segment].bad)
		return true;
	for (size_t i = 0; i < k->nr_blocks; i++)
		if (k->blocks[i].segment == segment && block >= k->blocks[i].from &&
		    block < k->blocks[i].to)
			return true;
	return false;
}

const struct batch_at *check_find_batch(const struct check *k, uint32_t segment, uint32_t block)
{
	const struct seg_map *m = segment < k->nr_segs ? &k->segs[segment] : NULL;
	size_t lo = 0, hi = m ? m->nr : 0;

	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (m->batches[mid].block == block)
			return &m->batches[mid];
		if (m->batches[mid].block < block)
			lo = mid + 1;
		else
			hi = mid;
	}
	return NULL;
}

/* ---- segments ---- */

/* C2: is it still the segment that was looked at? */
static bool still_there(struct check *k, const struct seg_ident *id)
{
	scoped_lock(&k->s->segments_lock);
	const struct seg *seg = seg_find(k->s, id->segment);

	return seg && seg->state != SEG_FREE && seg->generation == id->generation &&
	       seg->rewrites == id->rewrites && !seg->condemned;
}

/* gc has written it again meanwhile: what was seen of it is of no file any more. */
static bool is_rewritten(struct check *k, const struct seg_ident *id)
{
	scoped_lock(&k->s->segments_lock);
	const struct seg *seg = seg_find(k->s, id->segment);

	return seg && seg->state != SEG_FREE && seg->generation == id->generation &&
	       seg->rewrites != id->rewrites;
}

static int note_blocks(struct check *k, uint32_t segment, uint32_t from, uint32_t to, struct err *e)
{
	if (array_grow(k->blocks, k->nr_blocks, k->cap_blocks))
		return err_errno(e, ENOMEM, "check");
	k->blocks[k->nr_blocks++] = (struct bad_blocks){segment, from, to};
	return 0;
}

static int note_page(struct check *k, loc_t loc, struct err *e)
{
	if (array_grow(k->pages, k->nr_pages, k->cap_pages))
		return err_errno(e, ENOMEM, "check");
	k->pages[k->nr_pages++] = loc;
	return 0;
}

/* The same batches each time, spread evenly. */
static bool is_sampled(const struct check *k, const struct batch_header *h)
{
	uint32_t percent = k->c->percent ? k->c->percent : 100;

	return h->seq * 0x9e3779b97f4a7c15u >> 32 < (uint64_t)percent * (1ull << 32) / 100;
}

/* quiet: what the file lacks was told already; only note which pages it costs. */
static int read_batch(struct check *k, const struct seg_ident *ident, const struct batch_header *h,
		      const struct batch_page *pages, bool quiet, struct err *e)
{
	uint32_t page_size = 1u << h->page_shift;
	_cleanup_free_ struct page_read *reads = calloc(h->nr_entries, sizeof(*reads));
	_cleanup_free_ uint8_t *bytes = aligned_alloc(FMT_BLOCK, (size_t)h->nr_entries * page_size);
	struct store_reader *reader;
	struct err why = {0};
	uint32_t nr = 0;
	int r;

	if (!reads || !bytes)
		return err_errno(e, ENOMEM, "check");
	for (uint32_t i = 0; i < h->nr_entries; i++)
		if (!page_is_gone(&pages[i]))
			reads[nr++] = (struct page_read){.gfn = pages[i].gfn,
							 .loc = loc_make(h->segment, h->block, i),
							 .dst = bytes + (size_t)i * page_size};
	r = store_reader_get(k->s, page_size, &reader, e);
	if (r)
		return r;
	/* Without what it remembers of headers: they are checked, too. */
	reader_forget(reader);
	r = store_read_pages(reader, reads, nr, &why);
	store_reader_put(k->s, reader, true);
	k->ret->pages_read += nr;
	if (r && r != -E_CORRUPT && r != -EIO)
		return err_set(e, -r, "%s", why.text);
	if (r && !still_there(k, ident))
		return 0;
	for (uint32_t i = 0; i < nr; i++) {
		if (!reads[i].err)
			continue;
		if (!quiet)
			check_tell(
				k, DAMAGE_PAGE,
				"segment %08x block %u entry %u: the bytes of a page first stored "
				"for address %#llx are damaged",
				h->segment, h->block, loc_entry(reads[i].loc),
				(unsigned long long)reads[i].gfn << h->page_shift);
		r = note_page(k, reads[i].loc, e);
		if (r)
			return r;
	}
	return 0;
}

/* A part of a blob by itself, whoever needs it. */
static int read_blob_part(struct check *k, int fd, const struct seg_ident *ident,
			  const struct batch_header *h, struct err *e)
{
	uint64_t len = ALIGN_UP(h->payload_bytes, FMT_BLOCK);
	_cleanup_free_ uint8_t *bytes = aligned_alloc(FMT_BLOCK, len);
	struct err why = {0};
	ssize_t n;
	int r = 0;

	if (!bytes)
		return err_errno(e, ENOMEM, "check");
	n = pread(fd, bytes, len, (off_t)h->block * FMT_BLOCK + h->header_bytes);
	if (n < (ssize_t)h->payload_bytes)
		err_set(&why, EIO, "%s", n < 0 ? strerror(errno) : "the file is cut off");
	else
		r = batch_blob_check(ident->seal, h, bytes, NULL);
	if ((!r && !why.code) || !still_there(k, ident))
		return 0;
	check_tell(k, DAMAGE_BLOB, "segment %08x block %u: %s", h->segment, h->block,
		   r ? "the contents of a part of a blob are damaged" : why.text);
	return 0;
}

static int note_batch(struct check *k, const struct batch_header *h, const struct batch_page *pages,
		      uint64_t *nr_pages, struct err *e)
{
	struct seg_map *m = &k->segs[h->segment];
	struct batch_at *b;

	if (array_grow(m->batches, m->nr, m->cap))
		return err_errno(e, ENOMEM, "check");
	b = &m->batches[m->nr++];
	*b = (struct batch_at){h->block, pages ? h->nr_entries : 0};
	for (uint32_t i = 0; pages && i < h->nr_entries; i++) {
		b->gone[i / 32] |= page_is_gone(&pages[i]) ? 1u << i % 32 : 0;
		*nr_pages += !page_is_gone(&pages[i]);
	}
	k->ret->batches++;
	return 0;
}

static int check_batches(struct check *k, struct seg_walk *w, uint64_t file_blocks,
			 uint64_t *nr_pages, struct err *e)
{
	for (;;) {
		const struct batch_header *h;
		const struct batch_page *pages;
		struct batch_header copy;
		struct err why = {0};
		uint32_t at;
		int r = seg_walk_next(w, &at, &h, &pages, &why);

		if (!r)
			return 0;
		if (r < 0) {
			if (!still_there(k, &w->ident))
				return 0;
			check_tell(k, DAMAGE_BATCH, "segment %08x blocks %u to %u: %s",
				   w->ident.segment, at, w->block - 1, why.text);
			r = note_blocks(k, w->ident.segment, at, w->block, e);
			if (r)
				return r;
			continue;
		}
		copy = *h;
		r = note_batch(k, h, pages, nr_pages, e);
		if (!r && pages && w->block > file_blocks)
			r = read_batch(k, &w->ident, h, pages, true, e);
		else if (!r && pages && k->c->read_data && is_sampled(k, h))
			r = read_batch(k, &w->ident, h, pages, false, e);
		else if (!r && !pages && k->blobs_here && w->block <= file_blocks)
			r = read_blob_part(k, w->fd, &w->ident, h, e);
		if (!r)
			r = check_step(
				k, copy.header_bytes + (k->c->read_data ? copy.payload_bytes : 0),
				e);
		if (r)
			return r;
	}
}

/* Its file and superblock; *blocks: how many it has. */
static int check_file(struct check *k, int fd, const struct seg_ident *want, uint64_t *blocks)
{
	_Alignas(FMT_BLOCK) uint8_t block[FMT_BLOCK];
	struct seg_ident got;
	struct err why = {0};
	struct stat st;
	ssize_t n;

	if (fstat(fd, &st))
		return -errno;
	*blocks = (uint64_t)st.st_size / FMT_BLOCK;
	n = pread(fd, block, sizeof(block), 0);
	if (n == sizeof(block) && !seg_super_decode(block, &got, &why)) {
		if (memcmp(got.store, want->store, sizeof(got.store)) != 0)
			check_tell(k, DAMAGE_SEGMENT,
				   "segment %08x: the file is one of another store", want->segment);
		else if (got.segment != want->segment)
			check_tell(k, DAMAGE_SEGMENT,
				   "segment %08x: the file is that of segment %08x", want->segment,
				   got.segment);
		else if (got.generation != want->generation)
			check_tell(k, DAMAGE_SEGMENT,
				   "segment %08x: the file is of generation %llu, not %llu",
				   want->segment, (unsigned long long)got.generation,
				   (unsigned long long)want->generation);
	} else {
		check_tell(k, DAMAGE_SEGMENT, "segment %08x: %s", want->segment,
			   n < 0		? strerror(errno)
			   : n != sizeof(block) ? "the file is empty"
						: why.text);
	}
	if ((uint64_t)st.st_size < want->segment_bytes)
		check_tell(k, DAMAGE_SEGMENT, "segment %08x: cut off: %lld of %llu bytes",
			   want->segment, (long long)st.st_size,
			   (unsigned long long)want->segment_bytes);
	return 0;
}

struct seg_view check_view(struct check *k, uint32_t id)
{
	scoped_lock(&k->s->segments_lock);
	const struct seg *seg = seg_find(k->s, id);
	struct seg_view v = {.used = seg && seg->state != SEG_FREE && seg->indexed &&
				     seg->tail > 1};

	if (!v.used)
		return v;
	v.ident = (struct seg_ident){.segment = id,
				     .generation = seg->generation,
				     .segment_bytes = seg->segment_bytes,
				     .rewrites = seg->rewrites};
	memcpy(v.ident.store, k->s->uuid, sizeof(v.ident.store));
	v.tail = seg->tail;
	v.pages = seg->pages;
	return v;
}

/* Every header up to the tail, with the data if asked for. */
static int walk_segment(struct check *k, const struct seg_view *v, int fd, uint64_t file_blocks,
			struct err *e)
{
	_cleanup_(seg_walk_deinit) struct seg_walk w;
	uint64_t before = k->ret->damages, nr_pages = 0;
	int r;

	if (seg_walk_init(&w, fd, &v->ident, v->tail))
		return err_errno(e, ENOMEM, "check");
	r = check_batches(k, &w, file_blocks, &nr_pages, e);
	/* The record of one that was written again follows: its file comes first. */
	if (!r && k->ret->damages == before &&
	    (v->ident.rewrites ? nr_pages > v->pages : nr_pages != v->pages) &&
	    still_there(k, &v->ident))
		check_tell(k, DAMAGE_COUNT,
			   "segment %08x: %llu pages up to its tail, its record says %llu",
			   v->ident.segment, (unsigned long long)nr_pages,
			   (unsigned long long)v->pages);
	return r;
}

/* 1: look again. */
static int look_through(struct check *k, uint32_t id, struct err *e)
{
	struct seg_view v = check_view(k, id);
	struct seg_ident ident;
	uint64_t file_blocks = 0;
	struct err why = {0};
	struct seg *seg;
	int fd, r;

	if (!v.used)
		return 0;
	k->segs[id].walked = true;
	k->segs[id].nr = 0;
	r = seg_open(k->s, id, &seg, &fd, &ident, &why);
	if (r) {
		if (r != -E_CORRUPT && r != -EIO && r != -EACCES)
			return err_set(e, -r, "%s", why.text);
		if (!still_there(k, &v.ident))
			return 0;
		k->segs[id].bad = true;
		check_tell(k, DAMAGE_SEGMENT, "segment %08x: %s", id,
			   r == -E_CORRUPT ? "the file is missing" : why.text);
		return 0;
	}
	if (ident.generation == v.ident.generation) {
		v.ident = ident; /* with what it takes to decrypt */
		r = check_file(k, fd, &v.ident, &file_blocks);
		r = r ? err_errno(e, -r, "segment %08x", id)
		      : walk_segment(k, &v, fd, file_blocks, e);
		if (!r && is_rewritten(k, &v.ident))
			r = 1;
	}
	seg_close(k->s, seg);
	return r;
}

int check_segment(struct check *k, uint32_t id, struct err *e)
{
	int r;

	do {
		r = look_through(k, id, e);
	} while (r > 0);
	k->ret->segments += k->segs[id].walked;
	return r;
}
