/* SPDX-License-Identifier: MIT */
/*
 * Pages and blobs of one epoch → batches → the tails of segments lent to it.
 *
 * A page batch is put together in a write buffer: raw pages behind room for the
 * largest header; compressed ones gather in `packed` and are put behind the raw ones
 * when the batch ends; a batch that ends early moves its payload up to its smaller
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
#include <unistd.h>

#include "snapd/util/log.h"
#include "snapd/util/pool.h"

#define SEAL_PARALLEL_MIN 32u /* pages; below it, waking a helper costs more */

/* ---- writers: rings and buffers are worth keeping ---- */

static int writer_get(struct store *s, struct writer **ret, struct err *e)
{
	struct writer_config config = {.depth = 8,
				       .nr_bufs = 8 + RECENT_MAX + 2,
				       .fault = s->fault,
				       .fault_opaque = s->fault_opaque};

	pthread_mutex_lock(&s->segments_lock);
	*ret = s->nr_idle_writers ? s->idle_writers[--s->nr_idle_writers] : NULL;
	pthread_mutex_unlock(&s->segments_lock);
	return *ret ? 0 : writer_create(&config, ret, e);
}

static void writer_put(struct store *s, struct writer *w)
{
	writer_reset(w);
	pthread_mutex_lock(&s->segments_lock);
	if (s->nr_idle_writers < s->max_idle)
		s->idle_writers[s->nr_idle_writers++] = steal_ptr(&w);
	pthread_mutex_unlock(&s->segments_lock);
	if (w)
		writer_destroy(w);
}

/* ---- begin and end ---- */

static int start_packing(struct appender *a, struct codec_policy policy, struct err *e)
{
	struct store *s = a->s;

	if (policy.codec == CODEC_RAW)
		return 0;
	a->packed = malloc(BATCH_BYTES_MAX);
	if (!a->packed || packer_init(&a->packer, policy, 1u << a->page_shift, &s->codecs, s->pool))
		return err_errno(e, ENOMEM, "epoch");
	a->packing = true;
	return 0;
}

int append_init(struct appender *a, struct store *s, const uint8_t vm[16], struct snapd_point point,
		uint32_t page_shift, struct err *e)
{
	int r;

	*a = (struct appender){.s = s, .point = point, .page_shift = page_shift};
	memcpy(a->vm, vm, sizeof(a->vm));
	a->page = malloc((size_t)1 << page_shift);
	a->opened = malloc((size_t)1 << page_shift);
	if (!a->page || !a->opened)
		return err_errno(e, ENOMEM, "epoch");
	r = start_packing(a, s->policy, e);
	return r ? r : writer_get(s, &a->w, e);
}

int append_compress(struct appender *a, struct codec_policy policy, struct err *e)
{
	assert(!a->buf && !a->nr_segs);
	if (a->packing)
		packer_deinit(&a->packer);
	free(a->packed);
	a->packed = NULL;
	a->packing = false;
	return start_packing(a, policy, e);
}

static void recent_drop(struct appender *a, struct append_recent *x)
{
	if (x->buf)
		writer_buf_unpin(a->w, x->buf);
	free(x->plain);
	*x = (struct append_recent){0};
}

/* J2: index records that are not committed must not be found by a rebuild.  Not synced:
 * if this is lost, the next start does it again. */
static void take_back_record(const struct appender *a)
{
	static _Alignas(FMT_BLOCK) const uint8_t nothing[FMT_BLOCK];

	for (size_t i = 0; i < a->nr_segs; i++) {
		const struct append_seg *x = &a->segs[i];

		if (x->ident.segment == a->record.segment && !x->seg->damaged &&
		    pwrite(x->fd, nothing, sizeof(nothing), (off_t)a->record.block * FMT_BLOCK) !=
			    sizeof(nothing))
			log_warn("store %s: segment %08x block %u: an epoch that failed stays: %m",
				 a->s->dir, a->record.segment, a->record.block);
	}
}

void append_deinit(struct appender *a)
{
	for (uint32_t i = 0; i < RECENT_MAX; i++)
		recent_drop(a, &a->recent[i]);
	if (a->buf)
		writer_buf_put(a->w, steal_ptr(&a->buf));
	/* The writer first: it may still write to the segments. */
	if (a->w)
		writer_put(a->s, steal_ptr(&a->w));
	if (a->record.block)
		take_back_record(a);
	for (size_t i = 0; i < a->nr_segs; i++)
		seg_return(a->s, a->segs[i].seg);
	packer_deinit(&a->packer);
	free(a->packed);
	free(a->page);
	free(a->opened);
	free(a->segs);
	a->packed = a->page = a->opened = NULL;
	a->segs = NULL;
	a->nr_segs = 0;
}

void append_abandon(struct appender *a)
{
	scoped_lock(&a->s->segments_lock);

	for (size_t i = 0; i < a->nr_segs; i++)
		a->segs[i].seg->damaged = true;
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
	assert(a->segs);
	x = &a->segs[a->nr_segs++];
	*x = (struct append_seg){.seg = seg, .fd = seg->fd, .start = seg->tail, .tail = seg->tail};
	x->ident = (struct seg_ident){.segment = seg->id,
				      .generation = seg->generation,
				      .segment_bytes = seg->segment_bytes,
				      .seal = a->s->seal};
	memcpy(x->ident.store, a->s->uuid, sizeof(x->ident.store));
	return 0;
}

static int need_room(struct appender *a, struct err *e)
{
	uint32_t page_blocks = a->page_shift ? 1u << (a->page_shift - 12) : 1;
	uint32_t min =
		MAX(SEG_TAIL_MIN_BLOCKS, batch_header_max(a->s->seal) / FMT_BLOCK + page_blocks);
	int r = 0;

	/* What is left of a segment that was taken may be too little, too. */
	while (!r && (!current(a) || room_blocks(current(a)) < min))
		r = next_segment(a, e);
	return r;
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

static uint16_t batch_version(const struct appender *a)
{
	return a->s->seal ? BATCH_SEALED : BATCH_PLAIN;
}

static uint32_t header_bytes(const struct appender *a, uint32_t nr_pages)
{
	return batch_header_bytes_of(batch_version(a), nr_pages);
}

static void fill_header(const struct appender *a, const struct append_seg *x,
			struct batch_header *h, enum batch_type type)
{
	*h = (struct batch_header){
		.magic = BATCH_MAGIC,
		.version = batch_version(a),
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
static uint32_t pages_in(const struct appender *a, uint32_t blocks)
{
	uint32_t page_blocks = 1u << (a->page_shift - 12);
	uint32_t n = MIN((blocks - 1) / page_blocks, BATCH_PAGES_MAX);

	while (header_bytes(a, n) / FMT_BLOCK + n * page_blocks > blocks)
		n--;
	return n;
}

static int begin_batch(struct appender *a, struct err *e)
{
	uint32_t blocks;
	int r = need_room(a, e);

	if (!r)
		r = get_buffer(a, &a->buf, e);
	if (r)
		return r;
	blocks = room_blocks(current(a));
	a->max_pages = a->packing ? BATCH_PAGES_MAX : pages_in(a, blocks);
	a->header_bytes = header_bytes(a, a->max_pages);
	a->payload_bytes = blocks * FMT_BLOCK - a->header_bytes;
	a->nr_pages = a->raw_bytes = a->packed_bytes = 0;
	memset(a->buf->data, 0, a->header_bytes);
	/* Where the records lie. */
	((struct batch_header *)a->buf->data)->version = batch_version(a);
	return 0;
}

/* Keep the batch that is about to be written readable.  Takes `plain`. */
static void remember(struct appender *a, struct wbuf *buf, const struct batch_header *h,
		     struct batch_header *plain)
{
	struct append_recent *x = &a->recent[a->next_recent];

	a->next_recent = (a->next_recent + 1) % RECENT_MAX;
	recent_drop(a, x);
	writer_buf_pin(a->w, buf);
	*x = (struct append_recent){
		.buf = buf, .segment = h->segment, .block = h->block, .plain = plain};
}

static struct batch_page *page_records(struct wbuf *buf)
{
	return (struct batch_page *)batch_pages((const struct batch_header *)buf->data);
}

struct sealing {
	const struct seal *seal;
	struct batch_header *h;
};

static int seal_range(void *arg, uint64_t first, uint64_t n)
{
	struct sealing *x = arg;
	const struct batch_page *p = batch_pages(x->h);

	for (uint64_t i = first; i < first + n; i++)
		seal_page(x->seal, x->h, (uint32_t)i,
			  (uint8_t *)x->h + x->h->header_bytes + p[i].offset,
			  page_stored_bytes(&p[i]));
	return 0;
}

/* Encrypt a finished batch in place; a copy of its header stays for proofs. */
static int seal_batch(struct appender *a, struct batch_header *h, struct batch_header **ret,
		      struct err *e)
{
	struct sealing x = {a->s->seal, h};

	*ret = malloc(h->header_bytes);
	if (!*ret)
		return err_errno(e, ENOMEM, "epoch");
	seal_begin(h);
	if (a->s->pool)
		pool_ranges(a->s->pool, h->nr_entries, SEAL_PARALLEL_MIN, seal_range, &x);
	else
		seal_range(&x, 0, h->nr_entries);
	memcpy(*ret, h, h->header_bytes);
	seal_records(a->s->seal, h);
	return 0;
}

/* Header, raw pages, compressed pages, zeroes up to a block; returns the bytes of all. */
static uint32_t lay_out(const struct appender *a, struct wbuf *buf, uint32_t header)
{
	uint32_t payload = a->raw_bytes + a->packed_bytes;
	uint32_t padded = ALIGN_UP(payload, FMT_BLOCK);
	struct batch_page *p = page_records(buf);

	if (header < a->header_bytes)
		memmove(buf->data + header, buf->data + a->header_bytes, a->raw_bytes);
	if (a->packed_bytes)
		memcpy(buf->data + header + a->raw_bytes, a->packed, a->packed_bytes);
	memset(buf->data + header + payload, 0, padded - payload);
	for (uint32_t i = 0; i < a->nr_pages; i++)
		if (page_codec(&p[i]) != CODEC_RAW)
			p[i].offset += a->raw_bytes;
	return header + padded;
}

static int end_batch(struct appender *a, struct err *e)
{
	struct wbuf *buf = steal_ptr(&a->buf);
	struct batch_header *h, *plain = NULL;
	uint32_t total;
	int r;

	if (!buf)
		return 0;
	assert(a->nr_pages);
	h = (struct batch_header *)buf->data;
	total = lay_out(a, buf, header_bytes(a, a->nr_pages));
	fill_header(a, current(a), h, BATCH_PAGES);
	h->page_shift = (uint8_t)a->page_shift;
	h->header_bytes = header_bytes(a, a->nr_pages);
	h->nr_entries = a->nr_pages;
	h->payload_bytes = a->raw_bytes + a->packed_bytes;
	r = a->s->seal ? seal_batch(a, h, &plain, e) : 0;
	if (r) {
		writer_buf_put(a->w, buf);
		return r;
	}
	batch_seal(h);
	current(a)->pages += a->nr_pages;
	remember(a, buf, h, plain);
	return submit(a, buf, total, e);
}

/* Raw pages end on a block, so compressed ones only fill what is left. */
static bool fits(const struct appender *a, uint32_t len)
{
	return a->nr_pages < a->max_pages &&
	       a->raw_bytes + a->packed_bytes + len <= a->payload_bytes;
}

static int room_for(struct appender *a, uint32_t len, struct err *e)
{
	int r = a->buf && !fits(a, len) ? end_batch(a, e) : 0;

	return r || a->buf ? r : begin_batch(a, e);
}

int append_page(struct appender *a, uint64_t gfn, struct pageid id, const void *bytes, loc_t *ret,
		struct err *e)
{
	uint32_t page_size = 1u << a->page_shift, packed = 0, len, i;
	const void *stored = a->packing ? packer_take(&a->packer, bytes, &packed) : NULL;
	struct batch_page *p;
	int r;

	len = packed ? packed : page_size;
	r = room_for(a, len, e);
	if (r)
		return r;
	i = a->nr_pages++;
	p = page_records(a->buf) + i;
	*p = (struct batch_page){.id_lo = id.lo, .id_hi = id.hi, .gfn = gfn};
	if (packed) {
		p->offset = a->packed_bytes; /* lay_out() adds the raw pages' bytes */
		p->len_codec = len << 8 | a->packer.policy.codec;
		memcpy(a->packed + a->packed_bytes, stored, len);
		a->packed_bytes += len;
	} else {
		p->offset = a->raw_bytes;
		p->len_codec = len << 8 | CODEC_RAW;
		memcpy(a->buf->data + a->header_bytes + a->raw_bytes, bytes, len);
		a->raw_bytes += len;
	}
	*ret = loc_make(current(a)->ident.segment, current(a)->tail, i);
	return a->nr_pages == a->max_pages ? end_batch(a, e) : 0;
}

/* A page as it was put, from its record and stored bytes, which are our own. */
static const void *page_of(struct appender *a, const struct batch_page *p, const uint8_t *stored)
{
	if (page_codec(p) == CODEC_RAW)
		return stored;
	if (codec_unpack(a->packer.codec, page_codec(p), a->page, 1u << a->page_shift, stored,
			 page_stored_bytes(p), NULL))
		return NULL;
	return a->page;
}

static const void *recent_page(struct appender *a, const struct append_recent *x, uint32_t entry)
{
	const struct batch_header *h = (const struct batch_header *)x->buf->data;
	const uint8_t *stored = x->buf->data + h->header_bytes;
	const struct batch_page *p;

	h = x->plain ? x->plain : h;
	p = batch_pages(h) + entry;
	stored += p->offset;
	if (x->plain) {
		if (!unseal_page(a->s->seal, h, entry, a->opened, stored, page_stored_bytes(p)))
			return NULL;
		stored = a->opened;
	}
	return page_of(a, p, stored);
}

const void *append_recent(struct appender *a, loc_t loc)
{
	uint32_t segment = loc_segment(loc), block = loc_block(loc), entry = loc_entry(loc);

	if (a->buf) {
		const struct append_seg *x = &a->segs[a->nr_segs - 1];
		const struct batch_page *p = page_records(a->buf) + entry;
		bool raw = page_codec(p) == CODEC_RAW;

		if (segment == x->ident.segment && block == x->tail)
			return page_of(a, p,
				       (raw ? a->buf->data + a->header_bytes : a->packed) +
					       p->offset);
	}
	for (uint32_t i = 0; i < RECENT_MAX; i++)
		if (a->recent[i].buf && a->recent[i].segment == segment &&
		    a->recent[i].block == block)
			return recent_page(a, &a->recent[i], entry);
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
	batch_blob_finish(a->s->seal, h, buf->data + FMT_BLOCK);
	batch_seal(h);
	blob->last = (struct batch_ref){.segment = h->segment, .block = h->block};
	blob->parts = index + 1;
	if (type == BATCH_EPOCH || type == BATCH_INDEX)
		a->record = blob->last;
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
	*ret = (struct rec_blob){.bytes = len, .hash = store_blob_hash(a->s, bytes, len)};
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
