/* SPDX-License-Identifier: MIT */
/*
 * verify: job bodies that read what the store has: verify, diff.  On job threads.
 *
 * verify reads in batches of neighbouring frames; every page is checked by the
 * store against the hash in its record.  A bad page does not end the job: all bad
 * ones are counted, the first is told.  The digest, where asked for, is computed
 * over what was read and compared with what the VMM computed of its own memory in
 * the pause, if it did.
 */
#include "snapd/upkeep/verify.h"

#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/core/contents.h"
#include "snapd/core/daemon.h"
#include "snapd/util/cleanup.h"

#define BATCH_BYTES	(8u << 20)
#define DIFF_RANGES_MAX 4096
#define DIGEST_BYTES	32

struct verify {
	struct job *job;
	struct contents c;
	struct store_reader *reader;
	EVP_MD_CTX *sha; /* NULL: no digest */
	uint8_t *pages;	 /* BATCH_BYTES */
	uint8_t *zero;	 /* one page */
	struct page_read *reqs;
	uint64_t *gfns; /* of the batch; the reqs are reordered */
	int32_t *slots; /* page in `pages`, or -1 for a zero page */
	uint32_t batch_max;
	uint64_t nr_stored, nr_zero, nr_bad;
	struct err first; /* of the bad pages */
};

static void verify_deinit(struct verify *v)
{
	contents_deinit(&v->c);
	store_reader_destroy(v->reader);
	EVP_MD_CTX_free(v->sha);
	free(v->pages);
	free(v->zero);
	free(v->reqs);
	free(v->gfns);
	free(v->slots);
}

static int verify_init(struct verify *v, struct job *job, uint64_t snapshot, bool digest,
		       struct err *e)
{
	struct store *s = job->daemon->store;
	int rc = contents_open(s, snapshot, true, &v->c, e);
	uint32_t page_size = v->c.snap.page_size;

	v->job = job;
	if (rc)
		return rc;
	v->batch_max = BATCH_BYTES / page_size;
	v->pages = aligned_alloc(4096, BATCH_BYTES);
	v->zero = calloc(1, page_size);
	v->reqs = calloc(v->batch_max, sizeof(*v->reqs));
	v->gfns = calloc(v->batch_max, sizeof(*v->gfns));
	v->slots = calloc(v->batch_max, sizeof(*v->slots));
	if (!v->pages || !v->zero || !v->reqs || !v->gfns || !v->slots)
		return err_errno(e, ENOMEM, "verify");
	if (digest) {
		v->sha = EVP_MD_CTX_new();
		if (!v->sha || EVP_DigestInit_ex(v->sha, EVP_sha256(), NULL) != 1)
			return err_set(e, EIO, "libcrypto has no SHA-256");
	}
	return store_reader_create(s, page_size, &v->reader, e);
}

/* Read what of the batch is stored; bad pages are noted, other errors end the job. */
static int read_batch(struct verify *v, uint32_t nr_reqs, struct err *e)
{
	struct err why = {0};
	int rc = store_read_pages(v->reader, v->reqs, nr_reqs, &why);

	if (!rc)
		return 0;
	if (rc != -E_CORRUPT)
		return err_set(e, -rc, "%s", why.text);
	for (uint32_t i = 0; i < nr_reqs; i++)
		v->nr_bad += v->reqs[i].err == -E_CORRUPT;
	err_set(&v->first, E_CORRUPT, "%s", why.text);
	return 0;
}

static void digest_batch(struct verify *v, uint32_t nr)
{
	uint32_t page_size = v->c.snap.page_size;

	for (uint32_t i = 0; i < nr; i++) {
		const uint8_t *page = v->slots[i] < 0 ? v->zero
						      : v->pages + (size_t)v->slots[i] * page_size;

		EVP_DigestUpdate(v->sha, &v->gfns[i], sizeof(v->gfns[i])); /* little-endian */
		EVP_DigestUpdate(v->sha, page, page_size);
	}
}

/* Returns how many frames the batch had, 0 at the end. */
static int verify_batch(struct verify *v, struct contents_walk *w, struct err *e)
{
	uint32_t page_size = v->c.snap.page_size, nr = 0, nr_reqs = 0;
	loc_t loc;
	int rc = 1;

	while (nr < v->batch_max && (rc = contents_next(w, &v->gfns[nr], &loc, e)) > 0) {
		v->slots[nr] = -1;
		if (loc_kind(loc) == LOC_PAGE) {
			v->slots[nr] = (int32_t)nr_reqs;
			v->reqs[nr_reqs] = (struct page_read){
				.gfn = v->gfns[nr],
				.loc = loc,
				.dst = v->pages + (size_t)nr_reqs * page_size,
			};
			nr_reqs++;
		}
		nr++;
	}
	if (rc >= 0)
		rc = nr_reqs ? read_batch(v, nr_reqs, e) : 0;
	if (rc < 0)
		return rc;
	if (v->sha && !v->nr_bad)
		digest_batch(v, nr);
	v->nr_stored += nr_reqs;
	v->nr_zero += nr - nr_reqs;
	atomic_fetch_add(&v->job->done, nr);
	return (int)nr;
}

static int verify_pages(struct verify *v, struct err *e)
{
	struct contents_walk w = contents_walk(&v->c);
	int rc;

	v->job->unit = "pages";
	atomic_store(&v->job->total, v->c.nr_pages);
	atomic_store(&v->job->phase, v->sha ? "reading and hashing" : "reading");
	do {
		if (atomic_load(&v->job->cancel))
			return err_set(e, ECANCELED, "verify was cancelled");
		rc = verify_batch(v, &w, e);
	} while (rc > 0);
	if (rc < 0 || !v->nr_bad)
		return rc;
	return err_set(e, E_CORRUPT, "snapshot %s@%llu: %llu of %llu pages are corrupt; first: %s",
		       v->c.snap.vm_name, (unsigned long long)v->c.snap.id,
		       (unsigned long long)v->nr_bad, (unsigned long long)v->c.nr_pages,
		       v->first.text);
}

static void hex_digest(const uint8_t *d, char ret[2 * DIGEST_BYTES + 1])
{
	for (int i = 0; i < DIGEST_BYTES; i++)
		sprintf(ret + 2 * i, "%02x", d[i]);
}

static int verify_digest(struct verify *v, json_t *result, struct err *e)
{
	char ours[2 * DIGEST_BYTES + 1], theirs[2 * DIGEST_BYTES + 1];
	uint8_t d[EVP_MAX_MD_SIZE];
	const void *recorded;
	uint16_t version;
	size_t len;
	bool same;

	EVP_DigestFinal_ex(v->sha, d, NULL);
	hex_digest(d, ours);
	json_object_set_new(result, "digest", json_string(ours));
	if (state_get(&v->c.reader, "note.ram-sha256", 0, &version, &recorded, &len))
		return 0;
	if (len != DIGEST_BYTES)
		return err_set(e, E_CORRUPT, "snapshot %s@%llu: its note.ram-sha256 has %zu bytes",
			       v->c.snap.vm_name, (unsigned long long)v->c.snap.id, len);
	hex_digest(recorded, theirs);
	same = !strcmp(ours, theirs);
	json_object_set_new(result, "recorded_digest", json_string(theirs));
	json_object_set_new(result, "digest_matches", json_boolean(same));
	if (same)
		return 0;
	return err_set(e, E_CORRUPT,
		       "snapshot %s@%llu: SHA-256 of the stored memory is %s, but the VMM had %s",
		       v->c.snap.vm_name, (unsigned long long)v->c.snap.id, ours, theirs);
}

int verify_job(struct job *job, struct err *e)
{
	uint64_t id = (uint64_t)json_integer_value(json_object_get(job->args, "snapshot"));
	bool digest = json_is_true(json_object_get(job->args, "digest"));
	_cleanup_(verify_deinit) struct verify v = {0};
	int rc = verify_init(&v, job, id, digest, e);

	if (!rc)
		rc = verify_pages(&v, e);
	if (rc)
		return rc;
	job->result = json_pack("{sI sI sI sI sI}", "snapshot", (json_int_t)id, "pages",
				(json_int_t)v.c.nr_pages, "bytes",
				(json_int_t)v.c.nr_pages * v.c.snap.page_size, "zero",
				(json_int_t)v.nr_zero, "stored", (json_int_t)v.nr_stored);
	if (!job->result)
		return err_errno(e, ENOMEM, "verify");
	return digest ? verify_digest(&v, job->result, e) : 0;
}

/* ---- diff ---- */

/* Neighbouring frames as [gpa, bytes]; how many ranges there are in all. */
static size_t add_ranges(json_t *ranges, const uint64_t *gfns, size_t nr, uint32_t page_size)
{
	size_t nr_ranges = 0;

	for (size_t i = 0, n; i < nr; i += n) {
		for (n = 1; i + n < nr && gfns[i + n] == gfns[i] + n; n++)
			;
		if (nr_ranges++ < DIFF_RANGES_MAX)
			json_array_append_new(ranges,
					      json_pack("[II]", (json_int_t)gfns[i] * page_size,
							(json_int_t)n * page_size));
	}
	return nr_ranges;
}

int diff_job(struct job *job, struct err *e)
{
	uint64_t id_a = (uint64_t)json_integer_value(json_object_get(job->args, "a"));
	uint64_t id_b = (uint64_t)json_integer_value(json_object_get(job->args, "b"));
	_cleanup_(contents_deinit) struct contents a = {0}, b = {0};
	_cleanup_free_ uint64_t *gfns = NULL;
	size_t nr, nr_ranges;
	json_t *ranges;
	int rc;

	atomic_store(&job->phase, "comparing maps");
	rc = contents_open(job->daemon->store, id_a, true, &a, e);
	if (!rc)
		rc = contents_open(job->daemon->store, id_b, true, &b, e);
	if (rc)
		return rc;
	rc = pagemap_diff(a.map, b.map, &gfns, &nr);
	if (rc)
		return err_errno(e, -rc, "diff");
	ranges = json_array();
	nr_ranges = add_ranges(ranges, gfns, nr, a.snap.page_size);
	job->result = json_pack("{sI sI sI sI sI so sb}", "a", (json_int_t)id_a, "b",
				(json_int_t)id_b, "pages", (json_int_t)nr, "bytes",
				(json_int_t)nr * a.snap.page_size, "nr_ranges",
				(json_int_t)nr_ranges, "ranges", ranges, "truncated",
				nr_ranges > DIFF_RANGES_MAX);
	return job->result ? 0 : err_errno(e, ENOMEM, "diff");
}
