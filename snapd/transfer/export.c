/* SPDX-License-Identifier: MIT */
/*
 * export: export_job(), a snapshot's pages from the store into a stream; transfer.h
 * has the format.  On a job thread.
 */
#include "snapd/transfer/transfer.h"

#include <stdlib.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/core/contents.h"
#include "snapd/core/daemon.h"
#include "snapd/util/cleanup.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "streams are little-endian");

struct exporter {
	struct job *job;
	struct stream *stream;
	struct contents c;
	struct store_reader *reader;
	struct page_read *reqs; /* one batch, ascending; the store reorders a copy */
	uint64_t *gfns;
	uint8_t *pages; /* XFER_EXTENT_MAX */
	uint32_t batch_max;
	XXH3_state_t *hash;
};

static void exporter_deinit(struct exporter *x)
{
	contents_deinit(&x->c);
	store_reader_destroy(x->reader);
	free(x->reqs);
	free(x->gfns);
	free(x->pages);
	XXH3_freeState(x->hash);
}

static int exporter_init(struct exporter *x, struct job *job, struct err *e)
{
	uint64_t id = (uint64_t)json_integer_value(json_object_get(job->args, "snapshot"));
	struct transfer *t = job->ctx;
	int rc = contents_open(job->daemon->store, id, true, &x->c, e);

	if (rc)
		return rc;
	x->job = job;
	x->stream = t->stream;
	x->batch_max = XFER_EXTENT_MAX / x->c.snap.page_size;
	x->reqs = calloc(x->batch_max, sizeof(*x->reqs));
	x->gfns = calloc(x->batch_max, sizeof(*x->gfns));
	x->pages = aligned_alloc(4096, XFER_EXTENT_MAX);
	x->hash = XXH3_createState();
	if (!x->reqs || !x->gfns || !x->pages || !x->hash)
		return err_errno(e, ENOMEM, "export");
	XXH3_128bits_reset(x->hash);
	return store_reader_create(job->daemon->store, x->c.snap.page_size, &x->reader, e);
}

/* The next pages that are not zero, as reqs; how many, 0 at the end. */
static int next_batch(struct exporter *x, struct contents_walk *w, struct err *e)
{
	uint32_t nr = 0;
	uint64_t gfn;
	loc_t loc;
	int rc;

	while (nr < x->batch_max) {
		rc = contents_next(w, &gfn, &loc, e);
		if (rc <= 0)
			return rc < 0 ? rc : (int)nr;
		if (loc_kind(loc) != LOC_PAGE)
			continue;
		x->gfns[nr] = gfn;
		x->reqs[nr] = (struct page_read){
			.gfn = gfn,
			.loc = loc,
			.dst = x->pages + (size_t)nr * x->c.snap.page_size,
		};
		nr++;
	}
	return (int)nr;
}

/* Pages from `at` on that follow each other without a gap. */
static uint32_t run_len(const struct exporter *x, uint32_t at, uint32_t nr)
{
	uint32_t n = 1;

	while (at + n < nr && x->gfns[at + n] == x->gfns[at] + n)
		n++;
	return n;
}

/* Bytes that the stream will have: known before the first one is sent, so that a
 * cut-off can be told from an end. */
static int measure(struct exporter *x, uint64_t *ret, struct err *e)
{
	struct contents_walk w = contents_walk(&x->c);
	uint64_t bytes = sizeof(struct xfer_end);
	int nr;

	while ((nr = next_batch(x, &w, e)) > 0) {
		for (uint32_t at = 0; at < (uint32_t)nr; at += run_len(x, at, (uint32_t)nr))
			bytes += sizeof(struct xfer_extent);
		bytes += (uint64_t)nr * x->c.snap.page_size;
	}
	*ret = bytes;
	return nr;
}

static int send_bytes(struct exporter *x, const void *bytes, size_t len, struct err *e)
{
	int rc = stream_job_write(x->stream, x->job, bytes, len);

	XXH3_128bits_update(x->hash, bytes, len);
	atomic_fetch_add(&x->job->done, len);
	return rc ? transfer_failed(rc, e) : 0;
}

static int send_batch(struct exporter *x, uint32_t nr, struct err *e)
{
	uint32_t page_size = x->c.snap.page_size, n;
	int rc = store_read_pages(x->reader, x->reqs, nr, e);

	for (uint32_t at = 0; !rc && at < nr; at += n) {
		struct xfer_extent extent = {.gpa = x->gfns[at] * page_size};

		n = run_len(x, at, nr);
		extent.len = (uint64_t)n * page_size;
		rc = send_bytes(x, &extent, sizeof(extent), e);
		if (!rc)
			rc = send_bytes(x, x->pages + (size_t)at * page_size, extent.len, e);
	}
	return rc;
}

static int send_end(struct exporter *x, struct err *e)
{
	XXH128_hash_t h = XXH3_128bits_digest(x->hash);
	struct xfer_end end = {
		.extent = {.gpa = XFER_END, .len = sizeof(end) - sizeof(end.extent)},
		.hash_lo = h.low64,
		.hash_hi = h.high64,
	};
	int rc = send_bytes(x, &end, sizeof(end), e);

	if (!rc)
		stream_end(x->stream);
	return rc;
}

static int export_pages(struct exporter *x, struct err *e)
{
	struct contents_walk w = contents_walk(&x->c);
	int nr, rc = 0;

	while (!rc && (nr = next_batch(x, &w, e)) != 0)
		rc = nr < 0 ? nr : send_batch(x, (uint32_t)nr, e);
	return rc ? rc : send_end(x, e);
}

int export_job(struct job *job, struct err *e)
{
	_cleanup_(exporter_deinit) struct exporter x = {0};
	struct transfer *t = job->ctx;
	uint64_t total;
	int rc;

	job->unit = "bytes";
	atomic_store(&job->phase, "reading maps");
	rc = exporter_init(&x, job, e);
	if (!rc)
		rc = measure(&x, &total, e);
	if (rc)
		return rc;
	atomic_store(&job->total, total);
	atomic_store(&job->phase, "sending");
	atomic_store(&t->total_bytes, total);
	atomic_store(&t->prepared, true);
	daemon_wake(job->daemon);
	rc = export_pages(&x, e);
	if (!rc)
		job->result = json_pack("{sI}", "bytes", (json_int_t)total);
	return rc;
}
