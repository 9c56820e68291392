/* SPDX-License-Identifier: MIT */
/*
 * Reading: locs → batch headers → few large reads → pages, each checked.
 *
 * A call sorts its pages by loc and goes through them in windows of at most
 * WINDOW_BATCHES batches.  In a window (1) headers that the reader's cache does
 * not hold are read together; (2) each page's record is found in its header;
 * (3) neighbouring pages become one *extent*: raw ones are read straight into the
 * caller's memory where that is contiguous and aligned; the others, and compressed
 * ones, into the arena, with small gaps read along; (4) extents are read together,
 * then every page is decompressed or copied, and checked against its record (I8).
 * A page wanted twice is read once.
 *
 * A probe is the same with memcmp() in place of the copy, after the record's 128
 * bits of identity have agreed.
 *
 * Everything read is untrusted: batch_decode() proves a header and its numbers.
 * The cache knows a header by segment, generation and block, and is forgotten
 * after an epoch that failed, since blocks behind the tails are written again.
 *
 * Threads: a reader is one thread's.
 */
#include "snapd/store/internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/store/manifest.h"
#include "snapd/util/log.h"

#define HEADER_BYTES   (3u * FMT_BLOCK) /* of the cache; the largest of a sealed batch */
#define CACHE_HEADERS  1024u
#define CACHE_BUCKETS  2048u
#define WINDOW_BATCHES 64u
#define ARENA_BYTES    (8u << 20)
#define EXTENTS_MAX    64u
#define EXTENT_BYTES   (512u << 10)
#define DIRECT_MIN     (64u << 10) /* shorter runs are read into the arena */
#define DIRECT_BYTES   (1u << 20)
#define GAP_BYTES      (16u << 10)
#define NO_HEADER      UINT32_MAX

struct header {
	uint64_t generation;
	uint32_t segment, block;
	uint32_t next;	 /* in its bucket */
	uint32_t window; /* last used in */
	bool valid;
};

/* A batch of the window. */
struct window_batch {
	uint32_t segment, block;
	struct seg *seg; /* open until the window ends; NULL: err */
	struct seg_ident ident;
	uint32_t header; /* in the cache */
	int fd;
	int err;
	bool missing; /* header to be read */
	struct err why;
};

struct page_job {
	loc_t loc;
	uint64_t gfn;
	void *dst; /* NULL: a probe, or id */
	struct pageid *id;
	struct page_probe *probe;
	int *err;
	/* found in the window: */
	const struct batch_header *h;
	const struct batch_page *p;
	const uint8_t *bytes; /* after the read */
	struct window_batch *batch;
	uint32_t extent;
};

struct extent {
	uint64_t offset;
	uint32_t len;
	uint8_t *to;
	struct window_batch *batch;
	bool direct;
	int res;
};

struct store_reader {
	struct store *s;
	struct reader *io; /* owned */
	uint32_t page_size, page_shift;
	uint8_t *headers;    /* CACHE_HEADERS × HEADER_BYTES, mapped */
	uint8_t *arena;	     /* ARENA_BYTES, mapped */
	uint8_t *page;	     /* page_size, owned: a compressed page that is probed */
	uint8_t *opened;     /* page_size, owned: stored bytes, decrypted */
	struct codec *codec; /* lent by the store */
	struct header cache[CACHE_HEADERS];
	uint32_t buckets[CACHE_BUCKETS];
	uint32_t hand, window;
	struct window_batch batches[WINDOW_BATCHES];
	uint32_t nr_batches;
	struct extent extents[EXTENTS_MAX];
	uint32_t nr_extents;
	size_t arena_used;
	struct page_job *jobs; /* owned, grows */
	size_t cap_jobs;
};

/* ---- the cache of headers ---- */

static uint32_t bucket_of(uint32_t segment, uint32_t block)
{
	return (uint32_t)((((uint64_t)segment << 32 | block) * 0x9e3779b97f4a7c15u) >> 53);
}
static_assert(CACHE_BUCKETS == 1u << (64 - 53), "bucket_of() takes the top bits");

static uint32_t cache_find(struct store_reader *r, const struct seg_ident *id, uint32_t block)
{
	uint32_t i = r->buckets[bucket_of(id->segment, block)];

	while (i != NO_HEADER) {
		const struct header *c = &r->cache[i];

		if (c->segment == id->segment && c->block == block &&
		    c->generation == id->generation)
			return i;
		i = c->next;
	}
	return NO_HEADER;
}

static void cache_remove(struct store_reader *r, uint32_t i)
{
	struct header *c = &r->cache[i];
	uint32_t *link = &r->buckets[bucket_of(c->segment, c->block)];

	if (!c->valid)
		return;
	while (*link != i)
		link = &r->cache[*link].next;
	*link = c->next;
	c->valid = false;
}

/* A slot for a header, in place of one that this window does not use. */
static uint32_t cache_take(struct store_reader *r, const struct seg_ident *id, uint32_t block)
{
	uint32_t bucket = bucket_of(id->segment, block);
	uint32_t i;

	static_assert(CACHE_HEADERS > WINDOW_BATCHES, "a slot is always free");
	do {
		r->hand = (r->hand + 1) % CACHE_HEADERS;
		i = r->hand;
	} while (r->cache[i].valid && r->cache[i].window == r->window);
	cache_remove(r, i);
	r->cache[i] = (struct header){.generation = id->generation,
				      .segment = id->segment,
				      .block = block,
				      .next = r->buckets[bucket],
				      .valid = true};
	r->buckets[bucket] = i;
	return i;
}

static uint8_t *cache_bytes(struct store_reader *r, uint32_t i)
{
	return r->headers + (size_t)i * HEADER_BYTES;
}

bool reader_batch(struct store_reader *r, loc_t loc, const struct batch_header **ret,
		  const struct batch_page **pages)
{
	struct seg_ident ident;
	struct seg *seg;
	uint32_t i;
	int fd;

	if (seg_open(r->s, loc_segment(loc), &seg, &fd, &ident, NULL))
		return false;
	seg_close(r->s, seg);
	i = cache_find(r, &ident, loc_block(loc));
	if (i == NO_HEADER)
		return false;
	*ret = (const struct batch_header *)cache_bytes(r, i);
	*pages = (const struct batch_page *)(*ret + 1);
	return (*ret)->type == BATCH_PAGES && (*ret)->page_shift == r->page_shift;
}

void reader_forget(struct store_reader *r)
{
	for (uint32_t i = 0; i < CACHE_BUCKETS; i++)
		r->buckets[i] = NO_HEADER;
	for (uint32_t i = 0; i < CACHE_HEADERS; i++)
		r->cache[i].valid = false;
}

/* ---- readers ---- */

static void *map_buffer(size_t len)
{
	void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

int store_reader_create(struct store *s, uint32_t page_size, struct store_reader **ret,
			struct err *e)
{
	struct store_reader *r;
	int rc;

	if (page_size != 4096 && page_size != 16384 && page_size != 65536)
		return err_set(e, EINVAL, "page size %u is not supported", page_size);
	r = calloc(1, sizeof(*r));
	if (!r)
		return err_errno(e, ENOMEM, "store reader");
	r->s = s;
	r->page_size = page_size;
	r->page_shift = (uint32_t)__builtin_ctz(page_size);
	r->headers = map_buffer((size_t)CACHE_HEADERS * HEADER_BYTES);
	r->arena = map_buffer(ARENA_BYTES);
	r->page = malloc(page_size);
	r->opened = malloc(page_size);
	reader_forget(r);
	rc = r->headers && r->arena && r->page && r->opened &&
			     !codec_list_get(&s->codecs, &r->codec)
		     ? reader_create(0, &r->io, e)
		     : err_errno(e, ENOMEM, "store reader");
	if (rc) {
		store_reader_destroy(r);
		return rc;
	}
	*ret = r;
	return 0;
}

void store_reader_destroy(struct store_reader *r)
{
	if (!r)
		return;
	if (r->io)
		reader_destroy(r->io);
	if (r->headers)
		munmap(r->headers, (size_t)CACHE_HEADERS * HEADER_BYTES);
	if (r->arena)
		munmap(r->arena, ARENA_BYTES);
	codec_list_put(&r->s->codecs, r->codec);
	free(r->page);
	free(r->opened);
	free(r->jobs);
	free(r);
}

int store_reader_get(struct store *s, uint32_t page_size, struct store_reader **ret, struct err *e)
{
	*ret = NULL;
	pthread_mutex_lock(&s->segments_lock);
	for (uint32_t i = 0; i < s->nr_idle_readers && !*ret; i++) {
		if (s->idle_readers[i]->page_size != page_size)
			continue;
		*ret = s->idle_readers[i];
		s->idle_readers[i] = s->idle_readers[--s->nr_idle_readers];
	}
	pthread_mutex_unlock(&s->segments_lock);
	return *ret ? 0 : store_reader_create(s, page_size, ret, e);
}

void store_reader_put(struct store *s, struct store_reader *r, bool forget)
{
	if (!r)
		return;
	if (forget)
		reader_forget(r);
	pthread_mutex_lock(&s->segments_lock);
	if (s->nr_idle_readers < s->max_idle)
		s->idle_readers[s->nr_idle_readers++] = steal_ptr(&r);
	pthread_mutex_unlock(&s->segments_lock);
	store_reader_destroy(r);
}

/* ---- step 1: the headers of a window ---- */

static void batch_open(struct store_reader *r, struct window_batch *b)
{
	b->err = seg_open(r->s, b->segment, &b->seg, &b->fd, &b->ident, &b->why);
	if (b->err)
		return;
	if (!b->block || b->block >= b->ident.segment_bytes / FMT_BLOCK) {
		b->err = err_set(&b->why, E_CORRUPT, "segment %08x has no block %u", b->segment,
				 b->block);
		return;
	}
	b->header = cache_find(r, &b->ident, b->block);
	b->missing = b->header == NO_HEADER;
	if (b->missing)
		b->header = cache_take(r, &b->ident, b->block);
	r->cache[b->header].window = r->window;
}

static void batch_decode_read(struct store_reader *r, struct window_batch *b, int res)
{
	const struct batch_header *h;
	const struct batch_page *p;

	if (res < 0)
		b->err = err_errno(&b->why, -res, "reading segment %08x block %u", b->segment,
				   b->block);
	else
		b->err = batch_decode(cache_bytes(r, b->header), (size_t)res, &b->ident, b->block,
				      &h, &p, &b->why);
	if (b->err == -ENODATA)
		b->err = err_set(&b->why, E_CORRUPT, "segment %08x block %u: cut off", b->segment,
				 b->block);
	if (b->err)
		cache_remove(r, b->header);
}

static int read_headers(struct store_reader *r, struct err *e)
{
	struct read_req reqs[WINDOW_BATCHES];
	uint32_t which[WINDOW_BATCHES];
	size_t nr = 0;
	int rc;

	for (uint32_t i = 0; i < r->nr_batches; i++) {
		struct window_batch *b = &r->batches[i];
		uint64_t at = (uint64_t)b->block * FMT_BLOCK;

		if (b->err || !b->missing)
			continue;
		which[nr] = i;
		reqs[nr++] = (struct read_req){.fd = b->fd,
					       .offset = at,
					       .dst = cache_bytes(r, b->header),
					       .len = MIN((uint64_t)batch_header_max(r->s->seal),
							  b->ident.segment_bytes - at)};
	}
	if (!nr)
		return 0;
	rc = reader_run(r->io, reqs, nr);
	if (rc) {
		for (size_t i = 0; i < nr; i++)
			cache_remove(r, r->batches[which[i]].header);
		return err_errno(e, -rc, "reading segments of %s", r->s->dir);
	}
	for (size_t i = 0; i < nr; i++)
		batch_decode_read(r, &r->batches[which[i]], reqs[i].res);
	return 0;
}

static void window_close(struct store_reader *r)
{
	for (uint32_t i = 0; i < r->nr_batches; i++)
		if (r->batches[i].seg)
			seg_close(r->s, r->batches[i].seg);
	r->nr_batches = 0;
}

/* ---- step 2: the record of each page ---- */

static int fail_job(struct page_job *j, struct store_reader *r, int err, const char *why,
		    struct err *e)
{
	*j->err = err;
	if (j->probe) {
		j->probe->result = PROBE_UNREADABLE;
		return 0;
	}
	return err_set(e, -err, "page %#llx: %s", (unsigned long long)j->gfn << r->page_shift, why);
}

/* Sets j->h, j->p; false when the job is done (failed, a probe that differs, an identity). */
static bool find_record(struct store_reader *r, struct page_job *j, struct err *e)
{
	const struct batch_header *h = (const void *)cache_bytes(r, j->batch->header);
	const struct batch_page *p = batch_pages(h);
	char why[128];

	if (j->batch->err) {
		fail_job(j, r, j->batch->err, j->batch->why.text, e);
		return false;
	}
	if (h->type != BATCH_PAGES || h->page_shift != r->page_shift ||
	    loc_entry(j->loc) >= h->nr_entries) {
		snprintf(why, sizeof(why), "segment %08x block %u has no such page",
			 j->batch->segment, j->batch->block);
		fail_job(j, r, -E_CORRUPT, why, e);
		return false;
	}
	p += loc_entry(j->loc);
	if (j->probe && (p->id_lo != j->probe->id.lo || p->id_hi != j->probe->id.hi)) {
		j->probe->result = PROBE_DIFFERENT;
		return false;
	}
	if (j->id) {
		*j->id = (struct pageid){p->id_lo, p->id_hi};
		return false;
	}
	j->h = h;
	j->p = p;
	return true;
}

/* ---- steps 3 and 4: extents ---- */

static bool is_raw(const struct page_job *j)
{
	return page_codec(j->p) == CODEC_RAW;
}

static bool is_direct(const struct page_job *j)
{
	return j->dst && !((uintptr_t)j->dst % FMT_BLOCK) && is_raw(j);
}

static uint64_t file_offset(const struct page_job *j)
{
	return (uint64_t)j->batch->block * FMT_BLOCK + j->h->header_bytes + j->p->offset;
}

/* The whole blocks that hold the stored bytes. */
static uint64_t blocks_begin(const struct page_job *j)
{
	return file_offset(j) / FMT_BLOCK * FMT_BLOCK;
}

static uint64_t blocks_end(const struct page_job *j)
{
	return ALIGN_UP(file_offset(j) + page_stored_bytes(j->p), FMT_BLOCK);
}

/* How many of jobs[0, nr) lie one after the other in the file and in memory. */
static size_t direct_run(const struct store_reader *r, struct page_job *const *jobs, size_t nr)
{
	size_t n = 1, max = DIRECT_BYTES / r->page_size;

	if (!is_direct(jobs[0]))
		return 0;
	while (n < nr && n < max && jobs[n]->dst && is_raw(jobs[n]) &&
	       jobs[n]->batch->seg == jobs[0]->batch->seg &&
	       file_offset(jobs[n]) == file_offset(jobs[0]) + n * r->page_size &&
	       (uint8_t *)jobs[n]->dst == (uint8_t *)jobs[0]->dst + n * r->page_size)
		n++;
	return n * r->page_size >= DIRECT_MIN ? n : 0;
}

static bool extend(const struct store_reader *r, struct extent *x, const struct page_job *j)
{
	uint64_t at = blocks_begin(j), end = x->offset + x->len;
	uint64_t new_end = MAX(end, blocks_end(j));

	if (x->direct || x->batch->seg != j->batch->seg || at < x->offset || at > end + GAP_BYTES ||
	    new_end - x->offset > EXTENT_BYTES || r->arena_used + (new_end - end) > ARENA_BYTES)
		return false;
	return true;
}

/* Put jobs[0..] into extents; returns how many fitted. */
static size_t plan(struct store_reader *r, struct page_job *const *jobs, size_t nr)
{
	struct extent *x = NULL;
	size_t i = 0;

	r->nr_extents = 0;
	r->arena_used = 0;
	while (i < nr) {
		struct page_job *j = jobs[i];
		uint64_t len;
		size_t direct;

		if (x && extend(r, x, j)) {
			uint64_t end = MAX(x->offset + x->len, blocks_end(j));

			r->arena_used += end - x->offset - x->len;
			x->len = (uint32_t)(end - x->offset);
			j->extent = r->nr_extents - 1;
			j->bytes = x->to + (file_offset(j) - x->offset);
			i++;
			continue;
		}
		if (r->nr_extents == EXTENTS_MAX)
			break;
		direct = direct_run(r, jobs + i, nr - i);
		len = direct ? direct * r->page_size : blocks_end(j) - blocks_begin(j);
		if (!direct && r->arena_used + len > ARENA_BYTES)
			break;
		x = &r->extents[r->nr_extents++];
		*x = (struct extent){.offset = blocks_begin(j),
				     .len = (uint32_t)len,
				     .batch = j->batch,
				     .direct = direct,
				     .to = direct ? j->dst : r->arena + r->arena_used};
		r->arena_used += direct ? 0 : len;
		for (size_t k = 0; k < MAX(direct, (size_t)1); k++) {
			jobs[i + k]->extent = r->nr_extents - 1;
			jobs[i + k]->bytes = x->to + (file_offset(jobs[i + k]) - x->offset);
		}
		i += MAX(direct, (size_t)1);
	}
	return i;
}

static int read_extents(struct store_reader *r, struct err *e)
{
	struct read_req reqs[EXTENTS_MAX];
	int rc;

	for (uint32_t i = 0; i < r->nr_extents; i++) {
		const struct extent *x = &r->extents[i];

		reqs[i] = (struct read_req){
			.fd = x->batch->fd, .offset = x->offset, .dst = x->to, .len = x->len};
	}
	rc = reader_run(r->io, reqs, r->nr_extents);
	if (rc)
		return err_errno(e, -rc, "reading segments of %s", r->s->dir);
	for (uint32_t i = 0; i < r->nr_extents; i++)
		r->extents[i].res = reqs[i].res;
	return 0;
}

/* Were the stored bytes read?  They lie at j->bytes then. */
static int check_read(const struct store_reader *r, const struct page_job *j, struct err *why)
{
	const struct extent *x = &r->extents[j->extent];
	uint64_t end = file_offset(j) + page_stored_bytes(j->p);

	if (x->res < 0)
		return err_errno(why, -x->res, "reading segment %08x offset %llu",
				 x->batch->segment, (unsigned long long)x->offset);
	if ((uint64_t)x->res < end - x->offset)
		return err_set(why, E_CORRUPT, "segment %08x is cut off before offset %llu",
			       x->batch->segment, (unsigned long long)end);
	return 0;
}

/* The stored bytes as they were before they were encrypted, at `to` or where they are.
 * Never in place in the arena: another job may want them, too. */
static int open_stored(struct store_reader *r, const struct page_job *j, void *to,
		       const uint8_t **ret, struct err *e)
{
	*ret = j->bytes;
	if (!r->s->seal)
		return 0;
	*ret = to;
	if (unseal_page(r->s->seal, j->h, loc_entry(j->loc), to, j->bytes, page_stored_bytes(j->p)))
		return 0;
	return err_set(e, E_CORRUPT, "segment %08x block %u offset %u: not authentic",
		       j->batch->segment, j->batch->block, j->p->offset);
}

/* A compressed page to `to`. */
static int unpack(struct store_reader *r, const struct page_job *j, void *to, struct err *e)
{
	struct err why = {0};
	const uint8_t *stored;
	int rc = open_stored(r, j, r->opened, &stored, e);

	if (rc)
		return rc;
	rc = codec_unpack(r->codec, page_codec(j->p), to, r->page_size, stored,
			  page_stored_bytes(j->p), &why);
	return rc ? err_set(e, -rc, "segment %08x block %u offset %u: %s", j->batch->segment,
			    j->batch->block, j->p->offset, why.text)
		  : 0;
}

static int finish_probe(struct store_reader *r, struct page_job *j, struct err *why)
{
	const uint8_t *bytes = r->page;
	int rc = is_raw(j) ? open_stored(r, j, r->page, &bytes, why) : unpack(r, j, r->page, why);

	if (!rc)
		j->probe->result = memcmp(bytes, j->probe->bytes, r->page_size) ? PROBE_COLLISION
										: PROBE_EQUAL;
	return rc;
}

static int finish_read(struct store_reader *r, struct page_job *j, struct err *why)
{
	const uint8_t *bytes = j->dst;
	int rc = is_raw(j) ? open_stored(r, j, j->dst, &bytes, why) : unpack(r, j, j->dst, why);

	if (!rc)
		rc = batch_page_check(&r->s->secret, j->h, j->p, bytes, why);
	if (!rc && j->dst != bytes)
		memcpy(j->dst, bytes, r->page_size);
	return rc;
}

static void finish_job(struct store_reader *r, struct page_job *j, struct err *e)
{
	struct err why = {0};
	int rc = check_read(r, j, &why);

	if (!rc)
		rc = j->probe ? finish_probe(r, j, &why) : finish_read(r, j, &why);
	if (rc)
		fail_job(j, r, rc, why.text, e);
}

/* ---- windows ---- */

/* Open the batches of the first jobs; returns how many jobs the window has. */
static size_t window_open(struct store_reader *r, struct page_job *jobs, size_t nr)
{
	size_t i;

	r->window++;
	for (i = 0; i < nr; i++) {
		struct window_batch *b = r->nr_batches ? &r->batches[r->nr_batches - 1] : NULL;
		uint32_t segment = loc_segment(jobs[i].loc), block = loc_block(jobs[i].loc);

		if (!b || b->segment != segment || b->block != block) {
			if (r->nr_batches == WINDOW_BATCHES)
				break;
			b = &r->batches[r->nr_batches++];
			*b = (struct window_batch){.segment = segment, .block = block};
			batch_open(r, b);
		}
		jobs[i].batch = b;
	}
	return i;
}

static int run_found(struct store_reader *r, struct page_job **found, size_t nr, struct err *e)
{
	while (nr) {
		size_t n = plan(r, found, nr);
		int rc = read_extents(r, e);

		if (rc)
			return rc;
		for (size_t i = 0; i < n; i++)
			finish_job(r, found[i], e);
		found += n;
		nr -= n;
	}
	return 0;
}

/* The jobs of jobs[0]'s batch (*ret of them) whose pages are to be read, in the order
 * in which our writer lays them out: raw ones, then compressed ones. */
static size_t find_in_batch(struct store_reader *r, struct page_job *jobs, size_t nr,
			    struct page_job **found, size_t *ret, struct err *e)
{
	size_t nr_raw = 0, nr_packed = 0, n;

	for (n = 0; n < nr && jobs[n].batch == jobs[0].batch; n++)
		if (find_record(r, &jobs[n], e) && is_raw(&jobs[n]))
			found[nr_raw++] = &jobs[n];
	for (size_t i = 0; i < n; i++)
		if (jobs[i].p && !is_raw(&jobs[i]))
			found[nr_raw + nr_packed++] = &jobs[i];
	*ret = n;
	return nr_raw + nr_packed;
}

static int run_window(struct store_reader *r, struct page_job *jobs, size_t nr, struct err *e)
{
	_cleanup_free_ struct page_job **found = calloc(nr + 1, sizeof(struct page_job *));
	size_t nr_found = 0;
	int rc;

	if (!found)
		return err_errno(e, ENOMEM, "reading pages");
	rc = read_headers(r, e);
	if (rc)
		return rc;
	for (size_t i = 0, n; i < nr; i += n)
		nr_found += find_in_batch(r, jobs + i, nr - i, found + nr_found, &n, e);
	return run_found(r, found, nr_found, e);
}

/* jobs sorted by loc, all of kind PAGE. */
static int run_jobs(struct store_reader *r, struct page_job *jobs, size_t nr, struct err *e)
{
	while (nr) {
		size_t n = window_open(r, jobs, nr);
		int rc = run_window(r, jobs, n, e);

		window_close(r);
		if (rc) {
			for (size_t i = 0; i < nr; i++)
				fail_job(&jobs[i], r, rc, "not read", NULL);
			return rc;
		}
		jobs += n;
		nr -= n;
	}
	return 0;
}

static int reserve_jobs(struct store_reader *r, size_t nr, struct err *e)
{
	struct page_job *jobs;

	if (nr <= r->cap_jobs)
		return 0;
	jobs = realloc(r->jobs, nr * sizeof(*jobs));
	if (!jobs)
		return err_errno(e, ENOMEM, "reading pages");
	r->jobs = jobs;
	r->cap_jobs = nr;
	return 0;
}

#define JOBS_AT_ONCE 16384u

static int compare_reads(const void *a, const void *b)
{
	const struct page_read *x = a, *y = b;

	if (x->loc != y->loc)
		return x->loc < y->loc ? -1 : 1;
	return x->gfn < y->gfn ? -1 : x->gfn > y->gfn;
}

/* Pages without a batch; true when done. */
static bool read_trivial(const struct store_reader *r, struct page_read *q, struct err *e)
{
	q->err = 0;
	if (loc_kind(q->loc) == LOC_PAGE)
		return false;
	q->id = (struct pageid){0, 0};
	if (q->loc == LOC_ZERO_PAGE && q->dst)
		memset(q->dst, 0, r->page_size);
	else if (q->loc != LOC_ZERO_PAGE)
		q->err = err_set(e, E_CORRUPT, "page %#llx: nothing is stored at %#llx",
				 (unsigned long long)q->gfn << r->page_shift,
				 (unsigned long long)q->loc);
	return true;
}

static bool reads_sorted(const struct page_read *reqs, size_t nr)
{
	for (size_t i = 1; i < nr; i++)
		if (reqs[i - 1].loc > reqs[i].loc)
			return false;
	return true;
}

int store_read_pages(struct store_reader *r, struct page_read *reqs, size_t nr, struct err *e)
{
	struct err first = {0};
	int rc = 0;

	if (!reads_sorted(reqs, nr))
		qsort(reqs, nr, sizeof(*reqs), compare_reads);
	rc = reserve_jobs(r, MIN(nr, (size_t)JOBS_AT_ONCE), e);
	if (rc)
		return rc;
	for (size_t at = 0; at < nr;) {
		size_t nr_jobs = 0;

		for (; at < nr && nr_jobs < JOBS_AT_ONCE; at++) {
			if (read_trivial(r, &reqs[at], &first))
				continue;
			r->jobs[nr_jobs++] =
				(struct page_job){.loc = reqs[at].loc,
						  .gfn = reqs[at].gfn,
						  .dst = reqs[at].dst,
						  .id = reqs[at].dst ? NULL : &reqs[at].id,
						  .err = &reqs[at].err};
		}
		run_jobs(r, r->jobs, nr_jobs, &first);
	}
	if (first.code && e && !e->code)
		*e = first;
	return first.code;
}

static int compare_probes(const void *a, const void *b)
{
	const struct page_probe *x = a, *y = b;

	return x->loc < y->loc ? -1 : x->loc > y->loc;
}

int reader_probe(struct store_reader *r, struct page_probe *probes, size_t nr, struct err *e)
{
	int ignored;
	int rc;

	qsort(probes, nr, sizeof(*probes), compare_probes);
	rc = reserve_jobs(r, nr, e);
	if (rc)
		return rc;
	for (size_t i = 0; i < nr; i++)
		r->jobs[i] = (struct page_job){
			.loc = probes[i].loc, .probe = &probes[i], .err = &ignored};
	return run_jobs(r, r->jobs, nr, e);
}
