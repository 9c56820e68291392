/* SPDX-License-Identifier: MIT */
/*
 * Reading: locs → batch headers → few large reads → pages, each checked.
 *
 * A call goes through its pages by loc, in *rounds* of at most ROUND_BYTES of pages from
 * at most ROUND_BATCHES batches.  A round (1) opens its batches; headers that the cache
 * does not hold are read together, 64 batches ahead; (2) finds each page's record; (3)
 * makes neighbouring pages one *extent*: raw ones are read straight into the memory where
 * the page shall be, when that is contiguous and aligned; the others, and compressed ones,
 * into the round's arena, with small gaps read along; (4) reads its extents together; (5)
 * decrypts, decompresses or copies every page, and checks it against its record (I8).
 *
 * Up to NR_ROUNDS are under way.  The caller's thread does all I/O, in order; step 5 of a
 * round that was read is a task of the store's pool, while the next ones are being read.
 * A call of one round does it all itself.  A page wanted twice is read once.
 *
 * A probe is the same with memcmp() in place of the copy, after the record's 128
 * bits of identity have agreed.
 *
 * Everything read is untrusted: batch_decode() proves a header and its numbers.
 *
 * Threads: a reader is one thread's.  Between pool_submit() and pool_wait() a round and
 * its jobs are the task's, and the requests that these name.
 */
#include "snapd/store/internal.h"

#include <assert.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "snapd/store/headers.h"
#include "snapd/util/pool.h"

#define NR_ROUNDS     6u
#define ROUND_BYTES   (4u << 20)
#define ROUND_BATCHES 64u
#define GAPS_BYTES    (2u << 20) /* of a round */
#define EXTENT_BYTES  (512u << 10)
#define DIRECT_MIN    (64u << 10) /* shorter runs are read into the arena */
#define DIRECT_BYTES  (1u << 20)
#define GAP_BYTES     (16u << 10)
#define TASK_PAGES    32u /* fewer are not worth waking a thread */

struct page_job {
	loc_t loc;
	uint64_t gfn;
	void *dst; /* NULL: a probe, or id */
	struct pageid *id;
	struct page_probe *probe;
	int *err;
	/* found: */
	const struct batch_header *h;
	const struct batch_page *p;
	const uint8_t *bytes; /* after the read */
	struct open_batch *batch;
	uint32_t extent;
};

struct extent {
	uint64_t offset;
	uint32_t len;
	uint8_t *to;
	struct open_batch *batch;
	bool direct;
};

/* What a call wants, by loc. */
struct source {
	struct page_read *reads; /* one of the three */
	const struct page_at *pages;
	struct page_probe *probes;
	store_place_fn *place; /* of pages */
	void *arg;
	size_t nr, next;
	size_t ahead; /* up to here headers were looked for */
	int failed;   /* -errno: no more rounds */
};

struct round {
	struct pool_task task;
	struct store_reader *reader;
	struct source *src;
	struct open_batch batches[ROUND_BATCHES];
	uint32_t nr_batches, nr_jobs, nr_found, nr_extents, nr_placed;
	bool handed;	       /* `task` was submitted */
	struct page_job *jobs; /* owned, max_jobs, as the next five */
	struct page_job **found;
	struct extent *extents;
	struct read_req *reqs;
	struct placed_page *placed; /* of source.pages */
	int *errs;
	uint8_t *arena; /* owned, mapped: arena_bytes */
	uint8_t *out;	/* owned, mapped: max_jobs pages, of source.pages */
	size_t arena_used, gaps;
	struct read_group group;
	struct codec *codec; /* lent by the store during step 5 */
	uint8_t *page;	     /* owned, page_size: a compressed page that is probed */
	uint8_t *opened;     /* owned, page_size: stored bytes, decrypted */
	struct err first;
};

struct store_reader {
	struct store *s;
	struct reader *io; /* owned */
	uint32_t page_size, page_shift;
	uint32_t max_jobs; /* of a round */
	size_t arena_bytes;
	struct header_cache headers;
	struct open_batch ahead[ROUND_BATCHES];
	struct round rounds[NR_ROUNDS];
	/* rounds[n % NR_ROUNDS]: ended ≤ handed ≤ started */
	uint64_t started, handed, ended;
};

bool reader_batch(struct store_reader *r, loc_t loc, const struct batch_header **ret,
		  const struct batch_page **pages)
{
	*ret = headers_peek(&r->headers, r->s, loc_segment(loc), loc_block(loc));
	if (!*ret || (*ret)->type != BATCH_PAGES || (*ret)->page_shift != r->page_shift)
		return false;
	*pages = batch_pages(*ret);
	return true;
}

struct reader *reader_ring(struct store_reader *r)
{
	return r->io;
}

void reader_forget(struct store_reader *r)
{
	headers_forget(&r->headers);
}

/* ---- readers ---- */

static void *map_buffer(size_t len)
{
	void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

static void round_deinit(struct round *d)
{
	if (d->arena)
		munmap(d->arena, d->reader->arena_bytes);
	if (d->out)
		munmap(d->out, (size_t)d->reader->max_jobs * d->reader->page_size);
	free(d->jobs);
	free(d->found);
	free(d->extents);
	free(d->reqs);
	free(d->placed);
	free(d->errs);
	free(d->page);
	free(d->opened);
	*d = (struct round){.reader = d->reader};
}

static void finish_task(struct pool_task *task);

/* Small calls need one round only, so the others are made when they are needed. */
static int round_init(struct store_reader *r, struct round *d)
{
	uint32_t n = r->max_jobs;

	if (d->arena)
		return 0;
	*d = (struct round){.reader = r, .task.fn = finish_task};
	d->jobs = calloc(n, sizeof(*d->jobs));
	d->found = calloc(n, sizeof(struct page_job *));
	d->extents = calloc(n, sizeof(*d->extents));
	d->reqs = calloc(n, sizeof(*d->reqs));
	d->placed = calloc(n, sizeof(*d->placed));
	d->errs = calloc(n, sizeof(*d->errs));
	d->page = malloc(r->page_size);
	d->opened = malloc(r->page_size);
	d->out = map_buffer((size_t)n * r->page_size);
	if (d->jobs && d->found && d->extents && d->reqs && d->placed && d->errs && d->page &&
	    d->opened && d->out)
		d->arena = map_buffer(r->arena_bytes);
	if (d->arena)
		return 0;
	round_deinit(d);
	return -ENOMEM;
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
	r->max_jobs = ROUND_BYTES / page_size;
	/* The worst case: every page in an extent of its own, unaligned. */
	r->arena_bytes = (size_t)r->max_jobs * (page_size + 2 * FMT_BLOCK) + GAPS_BYTES;
	rc = headers_init(&r->headers);
	rc = rc ? err_errno(e, ENOMEM, "store reader") : reader_create(0, &r->io, e);
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
	for (uint32_t i = 0; i < NR_ROUNDS; i++)
		round_deinit(&r->rounds[i]);
	headers_deinit(&r->headers);
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

/* ---- what is wanted ---- */

static uint32_t page_shift_of(const struct round *d)
{
	return d->reader->page_shift;
}

static loc_t source_loc(const struct source *src, size_t i)
{
	assert(src->reads || src->pages || src->probes);
	return src->reads ? src->reads[i].loc : src->pages ? src->pages[i].loc : src->probes[i].loc;
}

/* A page without a batch: zero; or nothing that was ever stored.  True when done. */
static bool read_trivial(struct round *d, const struct page_job *j)
{
	*j->err = 0;
	if (loc_kind(j->loc) == LOC_PAGE)
		return false;
	if (j->id)
		*j->id = (struct pageid){0, 0};
	if (j->loc == LOC_ZERO_PAGE && j->dst)
		memset(j->dst, 0, d->reader->page_size);
	else if (j->loc != LOC_ZERO_PAGE)
		*j->err = err_set(&d->first, E_CORRUPT, "page %#llx: nothing is stored at %#llx",
				  (unsigned long long)j->gfn << page_shift_of(d),
				  (unsigned long long)j->loc);
	return true;
}

static struct page_job read_job(struct page_read *q)
{
	return (struct page_job){.loc = q->loc,
				 .gfn = q->gfn,
				 .dst = q->dst,
				 .id = q->dst ? NULL : &q->id,
				 .err = &q->err};
}

static struct page_job place_job(struct round *d, const struct page_at *at)
{
	uint32_t i = d->nr_placed++;

	d->placed[i] = (struct placed_page){at->gfn, d->out + (size_t)i * d->reader->page_size};
	return (struct page_job){
		.loc = at->loc, .gfn = at->gfn, .dst = d->placed[i].bytes, .err = &d->errs[i]};
}

static struct page_job probe_job(struct round *d, struct page_probe *p)
{
	return (struct page_job){.loc = p->loc, .probe = p, .err = &d->errs[d->nr_jobs]};
}

static struct page_job next_job(struct round *d)
{
	struct source *src = d->src;
	size_t i = src->next;

	if (src->reads)
		return read_job(&src->reads[i]);
	return src->pages ? place_job(d, &src->pages[i]) : probe_job(d, &src->probes[i]);
}

/* ---- step 1: batches and their headers ---- */

/* When a long way is ahead: the headers of the next batches at once, for the rounds that
 * will want them.  What cannot be read is a matter of the round that needs it. */
static int look_ahead(struct store_reader *r, struct source *src)
{
	uint32_t nr = 0;
	size_t i;
	int rc;

	if (src->next < src->ahead || src->nr - src->next <= r->max_jobs)
		return 0;
	for (i = src->next; i < src->nr; i++) {
		const struct open_batch *b = nr ? &r->ahead[nr - 1] : NULL;
		loc_t loc = source_loc(src, i);

		if (loc_kind(loc) != LOC_PAGE ||
		    (b && b->segment == loc_segment(loc) && b->block == loc_block(loc)))
			continue;
		if (nr == ROUND_BATCHES)
			break;
		batch_open(&r->headers, r->s, loc_segment(loc), loc_block(loc), &r->ahead[nr++]);
	}
	src->ahead = i;
	rc = batches_load(&r->headers, r->s, r->io, r->ahead, nr);
	while (nr)
		batch_close(&r->headers, r->s, &r->ahead[--nr]);
	return rc;
}

/* The jobs of a round, their batches open. */
static void collect(struct round *d)
{
	struct store_reader *r = d->reader;
	struct source *src = d->src;

	for (uint32_t taken = 0; src->next < src->nr && taken < r->max_jobs; taken++) {
		struct open_batch *b = d->nr_batches ? &d->batches[d->nr_batches - 1] : NULL;
		loc_t loc = source_loc(src, src->next);
		uint32_t segment = loc_segment(loc), block = loc_block(loc);
		bool same = b && b->segment == segment && b->block == block;
		bool stored = loc_kind(loc) == LOC_PAGE;
		struct page_job *j = &d->jobs[d->nr_jobs];

		if (stored && !same && d->nr_batches == ROUND_BATCHES)
			break;
		*j = next_job(d);
		src->next++;
		if (!j->probe && read_trivial(d, j))
			continue;
		if (!same) {
			b = &d->batches[d->nr_batches++];
			batch_open(&r->headers, r->s, segment, block, b);
		}
		j->batch = b;
		d->nr_jobs++;
	}
}

/* ---- step 2: the record of each page ---- */

static void fail_job(struct round *d, struct page_job *j, int err, const char *why)
{
	*j->err = err;
	if (j->probe)
		j->probe->result = PROBE_UNREADABLE;
	else
		err_set(&d->first, -err, "page %#llx: %s",
			(unsigned long long)j->gfn << page_shift_of(d), why);
}

/* Sets j->h, j->p; false when the job is done (failed, a probe that differs, an identity). */
static bool find_record(struct round *d, struct page_job *j)
{
	const struct batch_header *h;
	const struct batch_page *p;
	char why[128];

	if (j->batch->err) {
		fail_job(d, j, j->batch->err, j->batch->why.text);
		return false;
	}
	h = batch_header_of(&d->reader->headers, j->batch);
	if (h->type != BATCH_PAGES || h->page_shift != page_shift_of(d) ||
	    loc_entry(j->loc) >= h->nr_entries) {
		snprintf(why, sizeof(why), "segment %08x block %u has no such page",
			 j->batch->segment, j->batch->block);
		fail_job(d, j, -E_CORRUPT, why);
		return false;
	}
	p = batch_pages(h) + loc_entry(j->loc);
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
static uint32_t direct_run(uint32_t page_size, struct page_job *const *jobs, uint32_t nr)
{
	uint32_t n = 1, max = DIRECT_BYTES / page_size;

	if (!is_direct(jobs[0]))
		return 0;
	while (n < nr && n < max && jobs[n]->dst && is_raw(jobs[n]) &&
	       jobs[n]->batch->seg == jobs[0]->batch->seg &&
	       file_offset(jobs[n]) == file_offset(jobs[0]) + (uint64_t)n * page_size &&
	       (uint8_t *)jobs[n]->dst == (uint8_t *)jobs[0]->dst + (size_t)n * page_size)
		n++;
	return n * page_size >= DIRECT_MIN ? n : 0;
}

/* Does the page fit behind extent x? */
static bool extends(const struct round *d, const struct extent *x, const struct page_job *j)
{
	uint64_t at = blocks_begin(j), end = x->offset + x->len;
	uint64_t gap = at > end ? at - end : 0;

	return !x->direct && x->batch->seg == j->batch->seg && at >= x->offset &&
	       gap <= MIN((uint64_t)GAP_BYTES, GAPS_BYTES - d->gaps) &&
	       MAX(end, blocks_end(j)) - x->offset <= EXTENT_BYTES;
}

static void extend(struct round *d, struct extent *x, struct page_job *j)
{
	uint64_t end = x->offset + x->len, new_end = MAX(end, blocks_end(j));

	d->gaps += blocks_begin(j) > end ? blocks_begin(j) - end : 0;
	d->arena_used += new_end - end;
	x->len = (uint32_t)(new_end - x->offset);
	j->extent = (uint32_t)(x - d->extents);
	j->bytes = x->to + (file_offset(j) - x->offset);
}

/* An extent for jobs[0], and those behind it that are read with it straight into their
 * memory; returns how many. */
static uint32_t add_extent(struct round *d, struct page_job *const *jobs, uint32_t nr)
{
	uint32_t page_size = d->reader->page_size, direct = direct_run(page_size, jobs, nr);
	struct extent *x = &d->extents[d->nr_extents++];
	const struct page_job *j = jobs[0];
	uint64_t len = direct ? (uint64_t)direct * page_size : blocks_end(j) - blocks_begin(j);

	assert(x);
	*x = (struct extent){.offset = blocks_begin(j),
			     .len = (uint32_t)len,
			     .batch = j->batch,
			     .direct = direct,
			     .to = direct ? j->dst : d->arena + d->arena_used};
	d->arena_used += direct ? 0 : len;
	for (uint32_t i = 0; i < MAX(direct, 1u); i++) {
		jobs[i]->extent = (uint32_t)(x - d->extents);
		jobs[i]->bytes = x->to + (file_offset(jobs[i]) - x->offset);
	}
	return MAX(direct, 1u);
}

static void queue_extents(struct round *d)
{
	for (uint32_t i = 0; i < d->nr_extents; i++)
		d->reqs[i] = (struct read_req){.fd = d->extents[i].batch->fd,
					       .offset = d->extents[i].offset,
					       .dst = d->extents[i].to,
					       .len = d->extents[i].len};
	reader_queue(d->reader->io, &d->group, d->reqs, d->nr_extents);
}

static void plan(struct round *d)
{
	for (uint32_t i = 0; i < d->nr_found;) {
		struct extent *x = d->nr_extents ? &d->extents[d->nr_extents - 1] : NULL;

		if (x && extends(d, x, d->found[i]))
			extend(d, x, d->found[i++]);
		else
			i += add_extent(d, d->found + i, d->nr_found - i);
	}
	assert(d->arena_used <= d->reader->arena_bytes);
}

/* ---- step 5: pages ---- */

/* Were the stored bytes read?  They lie at j->bytes then. */
static int check_read(const struct round *d, const struct page_job *j, struct err *why)
{
	const struct extent *x = &d->extents[j->extent];
	int res = d->reqs[j->extent].res;
	uint64_t end = file_offset(j) + page_stored_bytes(j->p);

	if (res < 0)
		return err_errno(why, -res, "reading segment %08x offset %llu", x->batch->segment,
				 (unsigned long long)x->offset);
	if ((uint64_t)res < end - x->offset)
		return err_set(why, E_CORRUPT, "segment %08x is cut off before offset %llu",
			       x->batch->segment, (unsigned long long)end);
	return 0;
}

/* The stored bytes as they were before they were encrypted, at `to` or where they are.
 * Never in place in the arena: another job may want them, too. */
static int open_stored(struct round *d, const struct page_job *j, void *to, const uint8_t **ret,
		       struct err *e)
{
	*ret = j->bytes;
	if (!d->reader->s->seal)
		return 0;
	*ret = to;
	if (unseal_page(d->reader->s->seal, j->h, loc_entry(j->loc), to, j->bytes,
			page_stored_bytes(j->p)))
		return 0;
	return err_set(e, E_CORRUPT, "segment %08x block %u offset %u: not authentic",
		       j->batch->segment, j->batch->block, j->p->offset);
}

/* A compressed page to `to`. */
static int unpack(struct round *d, const struct page_job *j, void *to, struct err *e)
{
	struct err why = {0};
	const uint8_t *stored;
	int rc = open_stored(d, j, d->opened, &stored, e);

	if (rc)
		return rc;
	rc = codec_unpack(d->codec, page_codec(j->p), to, d->reader->page_size, stored,
			  page_stored_bytes(j->p), &why);
	return rc ? err_set(e, -rc, "segment %08x block %u offset %u: %s", j->batch->segment,
			    j->batch->block, j->p->offset, why.text)
		  : 0;
}

static int finish_probe(struct round *d, struct page_job *j, struct err *why)
{
	const uint8_t *bytes = d->page;
	int rc = is_raw(j) ? open_stored(d, j, d->page, &bytes, why) : unpack(d, j, d->page, why);

	if (!rc)
		j->probe->result = memcmp(bytes, j->probe->bytes, d->reader->page_size)
					   ? PROBE_COLLISION
					   : PROBE_EQUAL;
	return rc;
}

static int finish_read(struct round *d, struct page_job *j, struct err *why)
{
	const uint8_t *bytes = j->dst;
	int rc = is_raw(j) ? open_stored(d, j, j->dst, &bytes, why) : unpack(d, j, j->dst, why);

	if (!rc)
		rc = batch_page_check(&d->reader->s->secret, j->h, j->p, bytes, why);
	if (!rc && j->dst != bytes)
		memcpy(j->dst, bytes, d->reader->page_size);
	return rc;
}

static void finish_job(struct round *d, struct page_job *j)
{
	struct err why = {0};
	int rc = check_read(d, j, &why);

	if (!rc)
		rc = j->probe ? finish_probe(d, j, &why) : finish_read(d, j, &why);
	if (rc)
		fail_job(d, j, rc, why.text);
}

/* On the caller's thread or one of the pool's. */
static void finish_round(struct round *d)
{
	struct source *src = d->src;

	if (codec_list_get(&d->reader->s->codecs, &d->codec)) {
		for (uint32_t i = 0; i < d->nr_found; i++)
			fail_job(d, d->found[i], -ENOMEM, "no memory to read it");
		return;
	}
	for (uint32_t i = 0; i < d->nr_found; i++)
		finish_job(d, d->found[i]);
	codec_list_put(&d->reader->s->codecs, d->codec);
	if (src->place && d->nr_placed && !d->first.code)
		src->place(src->arg, d->placed, d->nr_placed, &d->first);
}

static void finish_task(struct pool_task *task)
{
	finish_round((struct round *)((char *)task - offsetof(struct round, task)));
}

/* ---- rounds ---- */

static struct round *round_of(struct store_reader *r, uint64_t n)
{
	return &r->rounds[n % NR_ROUNDS];
}

static void fail_round(struct round *d, int err)
{
	d->nr_found = 0;
	d->src->failed = err;
	for (uint32_t i = 0; i < d->nr_jobs; i++)
		fail_job(d, &d->jobs[i], err, "not read");
	err_errno(&d->first, -err, "reading segments of %s", d->reader->s->dir);
}

/* The pages to be read, batch by batch, in the order in which our writer lays them out: raw
 * ones, then compressed ones. */
static void find_records(struct round *d)
{
	for (uint32_t i = 0, n; i < d->nr_jobs; i += n) {
		struct page_job *jobs = &d->jobs[i];

		for (n = 0; i + n < d->nr_jobs && jobs[n].batch == jobs[0].batch; n++)
			if (find_record(d, &jobs[n]) && is_raw(&jobs[n]))
				d->found[d->nr_found++] = &jobs[n];
		for (uint32_t k = 0; k < n; k++)
			if (jobs[k].p && !is_raw(&jobs[k]))
				d->found[d->nr_found++] = &jobs[k];
	}
}

/* Steps 1 to 4, up to where the disk works. */
static void start_round(struct store_reader *r, struct source *src)
{
	struct round *d = round_of(r, r->started++);
	int rc = round_init(r, d);

	d->src = src;
	d->nr_batches = d->nr_jobs = d->nr_found = d->nr_extents = d->nr_placed = 0;
	d->arena_used = d->gaps = 0;
	d->handed = false;
	err_clear(&d->first);
	if (!rc)
		rc = look_ahead(r, src);
	if (rc) {
		fail_round(d, rc);
		return;
	}
	collect(d);
	rc = batches_load(&r->headers, r->s, r->io, d->batches, d->nr_batches);
	if (rc) {
		fail_round(d, rc);
		return;
	}
	find_records(d);
	plan(d);
	queue_extents(d);
}

/* It was read: to the pool, or done here. */
static void hand_round(struct store_reader *r, bool alone)
{
	struct round *d = round_of(r, r->handed++);
	int rc = d->nr_extents ? reader_wait(r->io, &d->group) : 0;

	if (rc)
		fail_round(d, rc);
	d->handed = !alone && r->s->pool && MAX(d->nr_found, d->nr_placed) >= TASK_PAGES;
	if (d->handed)
		pool_submit(r->s->pool, &d->task);
	else
		finish_round(d);
}

/* The threads take the oldest first: meanwhile do here what none has begun, from the newest
 * on.  On a busy machine the pool's threads may be long in coming. */
static void help_pool(struct store_reader *r)
{
	for (uint64_t n = r->handed; n-- > r->ended;) {
		struct round *d = round_of(r, n);

		if (d->handed && atomic_load(&d->task.state) == POOL_QUEUED)
			pool_wait(r->s->pool, &d->task);
	}
}

static void end_round(struct store_reader *r, struct err *first)
{
	struct round *d;

	help_pool(r);
	d = round_of(r, r->ended++);
	if (d->handed)
		pool_wait(r->s->pool, &d->task);
	while (d->nr_batches)
		batch_close(&r->headers, r->s, &d->batches[--d->nr_batches]);
	if (d->first.code && !first->code)
		*first = d->first;
	if (d->first.code && d->src->place)
		d->src->failed = d->first.code; /* its caller wants all of them or none */
}

/* What no round took. */
static void fail_rest(struct source *src)
{
	for (; src->next < src->nr; src->next++) {
		if (src->reads)
			src->reads[src->next].err = src->failed;
		else if (src->probes)
			src->probes[src->next].result = PROBE_UNREADABLE;
	}
}

/* One loop for three moves: start what can be started, so that the disk always has some;
 * hand over what was read; and only then wait for the oldest. */
static int run(struct store_reader *r, struct source *src, struct err *e)
{
	uint32_t at_once = r->s->pool ? pool_nr_threads(r->s->pool) + 1 : 1;
	struct err first = {0};

	r->started = r->handed = r->ended = 0;

	for (;;) {
		bool more = src->next < src->nr && !src->failed;

		if (more && r->started - r->ended < NR_ROUNDS)
			start_round(r, src);
		else if (r->handed < r->started && r->handed - r->ended < at_once)
			hand_round(r, !more && r->started == 1 + r->ended);
		else if (r->ended < r->handed)
			end_round(r, &first);
		else
			break;
	}
	fail_rest(src);
	if (first.code && e && !e->code)
		*e = first;
	return first.code;
}

static int compare_reads(const void *a, const void *b)
{
	const struct page_read *x = a, *y = b;

	if (x->loc != y->loc)
		return x->loc < y->loc ? -1 : 1;
	return x->gfn < y->gfn ? -1 : x->gfn > y->gfn;
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
	struct source src = {.reads = reqs, .nr = nr};

	if (!reads_sorted(reqs, nr))
		qsort(reqs, nr, sizeof(*reqs), compare_reads);
	return run(r, &src, e);
}

int store_place_pages(struct store_reader *r, const struct page_at *pages, size_t nr,
		      store_place_fn *place, void *arg, struct err *e)
{
	struct source src = {.pages = pages, .nr = nr, .place = place, .arg = arg};

	return run(r, &src, e);
}

static int compare_probes(const void *a, const void *b)
{
	const struct page_probe *x = a, *y = b;

	return x->loc < y->loc ? -1 : x->loc > y->loc;
}

int reader_probe(struct store_reader *r, struct page_probe *probes, size_t nr, struct err *e)
{
	struct source src = {.probes = probes, .nr = nr};

	qsort(probes, nr, sizeof(*probes), compare_probes);
	return run(r, &src, e);
}
