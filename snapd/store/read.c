/* SPDX-License-Identifier: MIT */
/*
 * Reading: locs → rounds → pages; a round (round.c): batch headers → few large reads →
 * pages, each checked.
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
#include "snapd/store/round.h"

#include <stdlib.h>

#include "snapd/util/pool.h"

#define TASK_PAGES 32u /* fewer are not worth waking a thread */

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

/* ---- rounds ---- */

static struct round *round_of(struct store_reader *r, uint64_t n)
{
	return &r->rounds[n % NR_ROUNDS];
}

/* It was read: to the pool, or done here. */
static void hand_round(struct store_reader *r, bool alone)
{
	struct round *d = round_of(r, r->handed++);
	int rc = d->nr_extents ? reader_wait(r->io, &d->group) : 0;

	if (rc)
		round_fail(d, rc);
	d->handed = !alone && r->s->pool && MAX(d->nr_found, d->nr_placed) >= TASK_PAGES;
	if (d->handed)
		pool_submit(r->s->pool, &d->task);
	else
		round_finish(d);
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
			round_start(r, round_of(r, r->started++), src);
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
