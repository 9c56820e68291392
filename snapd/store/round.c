/* SPDX-License-Identifier: MIT */
/*
 * A round of a read: its batches, its records, its extents, its pages; read.c has the
 * whole.  Everything up to where the disk works is on the reader's thread; round_finish()
 * on any, of one round at a time.
 */
#include "snapd/store/round.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define EXTENT_BYTES (512u << 10)
#define DIRECT_MIN   (64u << 10) /* shorter runs are read into the arena */
#define DIRECT_BYTES (1u << 20)
#define GAP_BYTES    (16u << 10)

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

static void *map_buffer(size_t len)
{
	void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

static void finish_task(struct pool_task *task);

void round_deinit(struct round *d)
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
	if (page_is_gone(p)) {
		snprintf(why, sizeof(why), "segment %08x block %u: this page was reclaimed",
			 j->batch->segment, j->batch->block);
		fail_job(d, j, -E_CORRUPT, why);
		return false;
	}
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
void round_finish(struct round *d)
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
	round_finish((struct round *)((char *)task - offsetof(struct round, task)));
}

/* ---- a round ---- */

void round_fail(struct round *d, int err)
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
void round_start(struct store_reader *r, struct round *d, struct source *src)
{
	int rc = round_init(r, d);

	d->src = src;
	d->nr_batches = d->nr_jobs = d->nr_found = d->nr_extents = d->nr_placed = 0;
	d->arena_used = d->gaps = 0;
	d->handed = false;
	err_clear(&d->first);
	if (!rc)
		rc = look_ahead(r, src);
	if (rc) {
		round_fail(d, rc);
		return;
	}
	collect(d);
	rc = batches_load(&r->headers, r->s, r->io, d->batches, d->nr_batches);
	if (rc) {
		round_fail(d, rc);
		return;
	}
	find_records(d);
	plan(d);
	queue_extents(d);
}
