/* SPDX-License-Identifier: MIT */
/*
 * Pages and blobs of one epoch → batches → the tails of segments lent to it.
 *
 * A page batch is put together in a write buffer: payload behind room for the
 * largest header; a batch that ends early moves its payload up to its smaller
 * header.  A loc is known, and its bytes are readable through append_recent(), as
 * soon as append_page() returns; on disk they are after append_sync().  The last
 * RECENT_MAX batches stay in memory for proofs.
 *
 * Nothing here becomes visible: the caller commits the new tails, or not.
 *
 * Threads: the epoch's.
 */
#include "snapd/store/internal.h"

#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

int append_init(struct appender *a, struct store *s, const uint8_t vm[16], struct snapd_point point,
		uint32_t page_shift, struct err *e)
{
	*a = (struct appender){.s = s, .point = point, .page_shift = page_shift};
	memcpy(a->vm, vm, sizeof(a->vm));
	return store_writer_get(s, &a->w, e);
}

static void recent_drop(struct appender *a, struct append_recent *x)
{
	if (x->buf)
		writer_buf_unpin(a->w, x->buf);
	x->buf = NULL;
}

void append_deinit(struct appender *a)
{
	for (uint32_t i = 0; i < RECENT_MAX; i++)
		recent_drop(a, &a->recent[i]);
	if (a->buf)
		writer_buf_put(a->w, steal_ptr(&a->buf));
	/* The writer first: it may still write to the segments. */
	if (a->w)
		store_writer_put(a->s, steal_ptr(&a->w));
	for (size_t i = 0; i < a->nr_segs; i++)
		seg_return(a->s, a->segs[i].seg);
	free(a->segs);
	a->segs = NULL;
	a->nr_segs = 0;
}

/* ---- room ---- */

static struct append_seg *current(struct appender *a)
{
	return a->nr_segs ? &a->segs[a->nr_segs - 1] : NULL;
}

static uint32_t room_blocks(const struct append_seg *x)
{
	uint32_t room = (uint32_t)(x->ident.segment_bytes / FMT_BLOCK) - x->tail;

	return MIN(room, BATCH_BYTES_MAX / FMT_BLOCK);
}

static int next_segment(struct appender *a, struct err *e)
{
	struct append_seg *x;
	struct seg *seg;
	int r;

	if (a->nr_segs == a->cap_segs) {
		size_t cap = a->cap_segs ? a->cap_segs * 2 : 4;
		struct append_seg *segs = realloc(a->segs, cap * sizeof(*segs));

		if (!segs)
			return err_errno(e, ENOMEM, "epoch");
		a->segs = segs;
		a->cap_segs = cap;
	}
	r = seg_take(a->s, &seg, e);
	if (r)
		return r;
	x = &a->segs[a->nr_segs++];
	*x = (struct append_seg){.seg = seg, .fd = seg->fd, .start = seg->tail, .tail = seg->tail};
	x->ident = (struct seg_ident){.segment = seg->id,
				      .generation = seg->generation,
				      .segment_bytes = seg->segment_bytes};
	memcpy(x->ident.store, a->s->uuid, sizeof(x->ident.store));
	return 0;
}

static int need_room(struct appender *a, struct err *e)
{
	const struct append_seg *x = current(a);
	uint32_t page_blocks = a->page_shift ? 1u << (a->page_shift - 12) : 1;
	uint32_t min = MAX(SEG_TAIL_MIN_BLOCKS, 1 + page_blocks);

	return x && room_blocks(x) >= min ? 0 : next_segment(a, e);
}

static int get_buffer(struct appender *a, struct wbuf **ret, struct err *e)
{
	int r = writer_buf_get(a->w, ret);

	return r ? err_errno(e, -r, "writing to segments of %s", a->s->dir) : 0;
}

/* Half full: the next segment will be needed soon. */
static void look_ahead(struct appender *a, struct append_seg *x)
{
	if (x->followed || x->tail < x->ident.segment_bytes / FMT_BLOCK / 2)
		return;
	x->followed = true;
	seg_reserve_ahead(a->s);
}

/* Hand a batch of `len` bytes to the writer and move the tail. */
static int submit(struct appender *a, struct wbuf *buf, uint32_t len, struct err *e)
{
	struct append_seg *x = current(a);
	int r;

	r = writer_submit(a->w, buf, x->fd, (uint64_t)x->tail * FMT_BLOCK, len);
	if (r)
		return err_errno(e, -r, "writing to segment %08x of %s", x->ident.segment,
				 a->s->dir);
	x->tail += len / FMT_BLOCK;
	a->bytes_written += len;
	a->unsynced = true;
	look_ahead(a, x);
	return 0;
}

static void fill_header(const struct appender *a, const struct append_seg *x,
			struct batch_header *h, enum batch_type type)
{
	*h = (struct batch_header){
		.type = type,
		.segment = x->ident.segment,
		.block = x->tail,
		.generation = x->ident.generation,
		.seq = atomic_fetch_add(&a->s->next_seq, 1),
		.point = a->point,
	};
	memcpy(h->store, a->s->uuid, sizeof(h->store));
	memcpy(h->vm, a->vm, sizeof(h->vm));
}

/* ---- pages ---- */

/* As many pages as fit with their header into `blocks`. */
static uint32_t pages_in(uint32_t blocks, uint32_t page_shift)
{
	uint32_t page_blocks = 1u << (page_shift - 12);
	uint32_t n = MIN((blocks - 1) / page_blocks, BATCH_PAGES_MAX);

	while (batch_header_bytes(n) / FMT_BLOCK + n * page_blocks > blocks)
		n--;
	return n;
}

static int begin_batch(struct appender *a, struct err *e)
{
	int r = need_room(a, e);

	if (!r)
		r = get_buffer(a, &a->buf, e);
	if (r)
		return r;
	a->max_pages = pages_in(room_blocks(current(a)), a->page_shift);
	a->header_bytes = batch_header_bytes(a->max_pages);
	a->nr_pages = 0;
	memset(a->buf->data, 0, a->header_bytes);
	return 0;
}

/* Keep the batch that is about to be written readable. */
static void remember(struct appender *a, struct wbuf *buf, const struct batch_header *h)
{
	struct append_recent *x = &a->recent[a->next_recent];

	a->next_recent = (a->next_recent + 1) % RECENT_MAX;
	recent_drop(a, x);
	writer_buf_pin(a->w, buf);
	*x = (struct append_recent){
		.buf = buf, .segment = h->segment, .block = h->block, .nr_pages = h->nr_entries};
}

static int end_batch(struct appender *a, struct err *e)
{
	struct wbuf *buf = steal_ptr(&a->buf);
	struct batch_header *h;
	uint32_t header_bytes, payload;

	if (!buf)
		return 0;
	assert(a->nr_pages);
	h = (struct batch_header *)buf->data;
	header_bytes = batch_header_bytes(a->nr_pages);
	payload = a->nr_pages << a->page_shift;
	if (header_bytes < a->header_bytes)
		memmove(buf->data + header_bytes, buf->data + a->header_bytes, payload);
	fill_header(a, current(a), h, BATCH_PAGES);
	h->page_shift = (uint8_t)a->page_shift;
	h->header_bytes = header_bytes;
	h->nr_entries = a->nr_pages;
	h->payload_bytes = payload;
	batch_seal(h);
	current(a)->pages += a->nr_pages;
	remember(a, buf, h);
	return submit(a, buf, header_bytes + payload, e);
}

int append_page(struct appender *a, uint64_t gfn, struct pageid id, const void *bytes, loc_t *ret,
		struct err *e)
{
	struct batch_page *p;
	uint32_t i;
	int r;

	r = a->buf ? 0 : begin_batch(a, e);
	if (r)
		return r;
	i = a->nr_pages++;
	p = (struct batch_page *)(a->buf->data + sizeof(struct batch_header)) + i;
	*p = (struct batch_page){.id_lo = id.lo,
				 .id_hi = id.hi,
				 .gfn = gfn,
				 .offset = i << a->page_shift,
				 .len_codec = 1u << a->page_shift << 8 | CODEC_RAW};
	memcpy(a->buf->data + a->header_bytes + p->offset, bytes, (size_t)1 << a->page_shift);
	*ret = loc_make(current(a)->ident.segment, current(a)->tail, i);
	return a->nr_pages == a->max_pages ? end_batch(a, e) : 0;
}

const void *append_recent(const struct appender *a, loc_t loc)
{
	uint32_t segment = loc_segment(loc), block = loc_block(loc);
	size_t at = (size_t)loc_entry(loc) << a->page_shift;

	if (a->buf) {
		const struct append_seg *x = &a->segs[a->nr_segs - 1];

		if (segment == x->ident.segment && block == x->tail)
			return a->buf->data + a->header_bytes + at;
	}
	for (uint32_t i = 0; i < RECENT_MAX; i++) {
		const struct append_recent *x = &a->recent[i];

		if (x->buf && x->segment == segment && x->block == block)
			return x->buf->data + batch_header_bytes(x->nr_pages) + at;
	}
	return NULL;
}

bool append_owns(const struct appender *a, loc_t loc)
{
	for (size_t i = 0; i < a->nr_segs; i++)
		if (a->segs[i].ident.segment == loc_segment(loc) &&
		    loc_block(loc) >= a->segs[i].start)
			return true;
	return false;
}

/* ---- blobs ---- */

static int append_part(struct appender *a, enum batch_type type, const uint8_t *bytes, uint64_t len,
		       struct rec_blob *blob, uint32_t index, uint64_t *ret, struct err *e)
{
	struct append_seg *x;
	struct batch_header *h;
	struct wbuf *buf;
	uint32_t total;
	int r;

	r = need_room(a, e);
	if (!r)
		r = get_buffer(a, &buf, e);
	if (r)
		return r;
	x = current(a);
	len = MIN(len, (uint64_t)(room_blocks(x) - 1) * FMT_BLOCK);
	total = FMT_BLOCK + (uint32_t)ALIGN_UP(len, FMT_BLOCK);
	h = (struct batch_header *)buf->data;
	memset(h, 0, FMT_BLOCK);
	memcpy(buf->data + FMT_BLOCK, bytes, len);
	memset(buf->data + FMT_BLOCK + len, 0, total - FMT_BLOCK - len);
	fill_header(a, x, h, type);
	h->header_bytes = FMT_BLOCK;
	h->nr_entries = index;
	h->payload_bytes = len;
	h->prev = blob->last;
	batch_blob_hash(h, buf->data + FMT_BLOCK);
	batch_seal(h);
	blob->last = (struct batch_ref){.segment = h->segment, .block = h->block};
	blob->parts = index + 1;
	*ret = len;
	return submit(a, buf, total, e);
}

int append_blob(struct appender *a, enum batch_type type, const void *bytes, size_t len,
		struct rec_blob *ret, struct err *e)
{
	const uint8_t *p = bytes;
	uint64_t n;
	int r;

	r = end_batch(a, e);
	*ret = (struct rec_blob){.bytes = len, .hash = XXH3_64bits(bytes, len)};
	for (uint32_t index = 0; !r && len; index++) {
		r = append_part(a, type, p, len, ret, index, &n, e);
		p += r ? 0 : n;
		len -= r ? 0 : n;
	}
	return r;
}

int append_settle(struct appender *a, struct err *e)
{
	int r = a->unsynced ? writer_barrier(a->w, e) : 0;

	a->unsynced &= r != 0;
	return r;
}

int append_sync(struct appender *a, struct err *e)
{
	int r = end_batch(a, e);

	return r ? r : append_settle(a, e);
}
