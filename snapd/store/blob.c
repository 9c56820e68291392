/* SPDX-License-Identifier: MIT */
/*
 * Blobs: manifests, checkpoints and states, as parts in batches of their own, each of
 * which names the one before.  In: a blob's record; out: its bytes, checked.
 *
 * The last part of many blobs can be read ahead, together.  What is read ahead is checked
 * as what is read later; a read that failed is merely done again.
 *
 * Threads: any.
 */
#include "snapd/store/internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#define BLOB_BYTES_MAX ((uint64_t)8 << 30)
#define PART_GUESS     (16u << 10) /* read at first */
#define AHEAD_BYTES    ((uint64_t)64 << 10)

struct part {
	_Alignas(FMT_BLOCK) uint8_t bytes[BATCH_BYTES_MAX];
};

/* pread() of a segment, from block `at`; returns bytes read. */
static int read_blocks(struct store *s, struct batch_ref at, uint8_t *buf, uint64_t len,
		       struct seg_ident *ident, uint64_t *got, struct err *e)
{
	uint64_t offset = (uint64_t)at.block * FMT_BLOCK;
	struct seg *seg;
	ssize_t n;
	int fd, r;

	r = seg_open(s, at.segment, &seg, &fd, ident, e);
	if (r)
		return r;
	if (!at.block || offset >= ident->segment_bytes) {
		r = err_set(e, E_CORRUPT, "segment %08x has no block %u", at.segment, at.block);
	} else {
		n = pread(fd, buf, MIN(len, ident->segment_bytes - offset), (off_t)offset);
		if (n < 0)
			r = err_errno(e, errno, "reading segment %08x offset %llu", at.segment,
				      (unsigned long long)offset);
		*got = (uint64_t)MAX(n, (ssize_t)0);
	}
	seg_close(s, seg);
	return r;
}

static int decode_part(struct part *part, uint64_t len, const struct seg_ident *ident,
		       struct batch_ref at, const struct batch_header **ret, struct err *e)
{
	const struct batch_page *pages;
	int r = batch_decode(part->bytes, len, ident, at.block, ret, &pages, e);

	return r == -ENODATA ? err_set(e, E_CORRUPT, "segment %08x block %u: cut off", at.segment,
				       at.block)
			     : r;
}

/* The header alone. */
static int read_part_header(struct store *s, struct batch_ref at, struct part *part,
			    const struct batch_header **ret, struct err *e)
{
	struct seg_ident ident;
	uint64_t n;
	int r = read_blocks(s, at, part->bytes, FMT_BLOCK, &ident, &n, e);

	return r ? r : decode_part(part, n, &ident, at, ret, e);
}

/* The beginning of a part: read already, or now. */
static int read_begin(struct store *s, struct batch_ref at, const struct blob_ahead *ahead,
		      struct part *part, struct seg_ident *ident, uint64_t *got, struct err *e)
{
	if (!ahead || !ahead->got)
		return read_blocks(s, at, part->bytes, PART_GUESS, ident, got, e);
	memcpy(part->bytes, ahead->bytes, ahead->got);
	*ident = ahead->ident;
	*got = ahead->got;
	return 0;
}

/* Header and payload, in one read when it is as small as most are. */
static int read_part(struct store *s, struct batch_ref at, enum batch_type type,
		     const struct blob_ahead *ahead, struct part *part,
		     const struct batch_header **ret, struct err *e)
{
	struct seg_ident ident;
	uint64_t n, want;
	int r;

	r = read_begin(s, at, ahead, part, &ident, &n, e);
	if (!r)
		r = decode_part(part, n, &ident, at, ret, e);
	if (r)
		return r;
	want = ALIGN_UP((*ret)->header_bytes + (*ret)->payload_bytes, FMT_BLOCK);
	if (want > n) {
		r = read_blocks(s, at, part->bytes, want, &ident, &n, e);
		if (!r)
			r = decode_part(part, n, &ident, at, ret, e);
		if (r)
			return r;
	}
	if ((*ret)->type != type || (*ret)->header_bytes + (*ret)->payload_bytes > n)
		return err_set(e, E_CORRUPT, "segment %08x block %u: cut off, or of another kind",
			       at.segment, at.block);
	return batch_blob_check(s->seal, *ret, part->bytes + FMT_BLOCK, e);
}

static int read_parts(struct store *s, const struct rec_blob *blob, enum batch_type type,
		      const struct blob_ahead *ahead, uint8_t *bytes, struct err *e)
{
	_cleanup_free_ struct part *part = aligned_alloc(FMT_BLOCK, sizeof(*part));
	struct batch_ref at = blob->last;
	uint64_t left = blob->bytes;
	const struct batch_header *h;
	uint32_t index = 0;

	if (!part)
		return err_errno(e, ENOMEM, "reading a blob");
	for (bool last = true; left; last = false) {
		int r = read_part(s, at, type, last ? ahead : NULL, part, &h, e);

		if (r)
			return r;
		if (!h->payload_bytes || h->payload_bytes > left ||
		    (!last && h->nr_entries != index - 1) ||
		    (h->nr_entries == 0) != (h->payload_bytes == left))
			return err_set(e, E_CORRUPT, "segment %08x block %u: a part out of order",
				       at.segment, at.block);
		left -= h->payload_bytes;
		memcpy(bytes + left, part->bytes + FMT_BLOCK, h->payload_bytes);
		index = h->nr_entries;
		at = h->prev;
	}
	return 0;
}

int store_blob_read_from(struct store *s, struct batch_ref at, enum batch_type type, void **ret,
			 size_t *len, struct err *e)
{
	_cleanup_free_ struct part *part = aligned_alloc(FMT_BLOCK, sizeof(*part));
	_cleanup_free_ uint8_t *bytes = NULL;
	uint32_t index = 0;

	*len = 0;
	if (!part)
		return err_errno(e, ENOMEM, "reading a blob");
	for (bool last = true; last || index; last = false) {
		const struct batch_header *h;
		uint8_t *more;
		int r = read_part(s, at, type, NULL, part, &h, e);

		if (r)
			return r;
		if ((!last && h->nr_entries != index - 1) || *len > BLOB_BYTES_MAX)
			return err_set(e, E_CORRUPT, "segment %08x block %u: a part out of order",
				       at.segment, at.block);
		more = malloc(*len + h->payload_bytes + 1);
		if (!more)
			return err_errno(e, ENOMEM, "reading a blob");
		memcpy(more, part->bytes + FMT_BLOCK, h->payload_bytes);
		if (*len)
			memcpy(more + h->payload_bytes, bytes, *len);
		free(bytes);
		bytes = more;
		*len += h->payload_bytes;
		index = h->nr_entries;
		at = h->prev;
	}
	*ret = steal_ptr(&bytes);
	return 0;
}

uint64_t store_blob_hash(const struct store *s, const void *bytes, size_t len)
{
	if (!s->seal)
		return XXH3_64bits(bytes, len);
	return XXH3_64bits_withSecret(bytes, len, s->secret.b, sizeof(s->secret.b));
}

int store_blob_read(struct store *s, const struct rec_blob *blob, enum batch_type type,
		    const char *what, const struct blob_ahead *ahead, void **ret, struct err *e)
{
	_cleanup_free_ uint8_t *bytes = NULL;
	struct err why = {0};
	int r;

	if (blob->bytes > BLOB_BYTES_MAX)
		return err_set(e, E_CORRUPT, "%s: a blob of %llu bytes", what,
			       (unsigned long long)blob->bytes);
	bytes = malloc(blob->bytes + 1);
	if (!bytes)
		return err_errno(e, ENOMEM, "%s", what);
	r = read_parts(s, blob, type, ahead, bytes, &why);
	if (r)
		return err_set(e, -r, "%s: %s", what, why.text);
	if (store_blob_hash(s, bytes, blob->bytes) != blob->hash)
		return err_set(e, E_CORRUPT, "%s: segment %08x block %u: wrong checksum", what,
			       blob->last.segment, blob->last.block);
	*ret = steal_ptr(&bytes);
	return 0;
}

int store_blob_read_part(struct store *s, struct batch_ref at, enum batch_type type, uint32_t index,
			 uint8_t *part, const uint8_t **payload, uint64_t *bytes, struct err *e)
{
	const struct batch_header *h;
	int r = read_part(s, at, type, NULL, (struct part *)part, &h, e);

	if (!r && (!h->payload_bytes || h->nr_entries != index))
		r = err_set(e, E_CORRUPT, "segment %08x block %u: a part out of order", at.segment,
			    at.block);
	if (r)
		return r;
	*payload = part + FMT_BLOCK;
	*bytes = h->payload_bytes;
	return 0;
}

int store_blob_part(struct store *s, struct batch_ref *at, uint64_t *payload, struct err *e)
{
	_cleanup_free_ struct part *part = aligned_alloc(FMT_BLOCK, sizeof(*part));
	const struct batch_header *h = (const void *)part;
	int r;

	if (!part)
		return err_errno(e, ENOMEM, "reading a blob");
	r = read_part_header(s, *at, part, &h, e);
	if (!r && (h->type == BATCH_PAGES || !h->payload_bytes))
		r = err_set(e, E_CORRUPT, "segment %08x block %u: no part of a blob", at->segment,
			    at->block);
	if (r)
		return r;
	*payload = h->payload_bytes;
	*at = h->prev;
	return 0;
}

/* ---- many of them ---- */

static uint64_t ahead_bytes(const struct rec_blob *blob)
{
	return blob->bytes ? MIN(ALIGN_UP(FMT_BLOCK + blob->bytes, FMT_BLOCK), AHEAD_BYTES) : 0;
}

static void ahead_request(struct store *s, struct blob_ahead *a, struct read_req *ret)
{
	struct batch_ref at = a->blob->last;
	uint64_t offset = (uint64_t)at.block * FMT_BLOCK;
	int fd;

	*ret = (struct read_req){.offset = offset, .dst = a->bytes};
	if (!a->blob->bytes || seg_open(s, at.segment, &a->seg, &fd, &a->ident, NULL))
		return;
	ret->fd = fd;
	if (at.block && offset < a->ident.segment_bytes)
		ret->len = MIN(ahead_bytes(a->blob), a->ident.segment_bytes - offset);
}

void store_blobs_ahead(struct store *s, struct blob_ahead *a, size_t nr, uint8_t **memory)
{
	_cleanup_free_ struct read_req *reqs = calloc(nr, sizeof(*reqs));
	struct store_reader *reader = NULL;
	uint64_t bytes = 0;

	for (size_t i = 0; i < nr; i++) {
		a[i].got = 0;
		a[i].seg = NULL;
		bytes += ahead_bytes(a[i].blob);
	}
	if (!reqs || nr < 2 || !bytes || !(*memory = aligned_alloc(FMT_BLOCK, bytes)) ||
	    store_reader_get(s, 4096, &reader, NULL))
		return;
	bytes = 0;
	for (size_t i = 0; i < nr; i++) {
		a[i].bytes = *memory + bytes;
		bytes += ahead_bytes(a[i].blob);
		ahead_request(s, &a[i], &reqs[i]);
	}
	if (!reader_run(reader_ring(reader), reqs, nr))
		for (size_t i = 0; i < nr; i++)
			a[i].got = (uint64_t)MAX(reqs[i].res, 0);
	for (size_t i = 0; i < nr; i++)
		if (a[i].seg)
			seg_close(s, a[i].seg);
	store_reader_put(s, reader, false);
}
