/* SPDX-License-Identifier: MIT */
/*
 * manifest: sorted gfn → loc as a stream of runs; the encoding is in manifest.h
 * and docs/format.md.  Pure; any thread.
 *
 * The writer gathers neighbours into a run and writes it out when the next entry
 * does not continue it.  The reader accepts exactly what a writer can produce,
 * apart from the way runs are split: minimal varints, no empty runs, frames below
 * MANIFEST_GFN_MAX, page locs that stay within one batch's 4096 entries.
 */
#include "snapd/store/manifest.h"

#include <endian.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"

enum run_kind { RUN_NEXT = 0, RUN_ZERO = 1, RUN_AT = 2, RUN_GONE = 3 };

#define ENTRY_LAST 0xfffu	 /* of a batch, as far as a loc can name it */
#define RUN_BYTES  (10 + 10 + 8) /* longest encoding of one run */

static bool is_page(loc_t loc)
{
	return loc_kind(loc) == LOC_PAGE;
}

static bool is_valid(loc_t loc)
{
	return is_page(loc) || loc == LOC_ZERO_PAGE || loc == MANIFEST_GONE;
}

/* The loc of the frame n after one at `loc` in the same run. */
static loc_t loc_after(loc_t loc, uint64_t n)
{
	return is_page(loc) ? loc + n : loc;
}

int manifest_writer_init(struct manifest_writer *w)
{
	struct manifest_writer old = *w;

	*w = (struct manifest_writer){.buf = old.buf, .cap = old.cap};
	if (w->buf)
		return 0;
	w->cap = 4096;
	w->buf = malloc(w->cap);
	return w->buf ? 0 : -ENOMEM;
}

void manifest_writer_deinit(struct manifest_writer *w)
{
	free(w->buf);
	w->buf = NULL;
}

static bool reserve_run(struct manifest_writer *w)
{
	uint8_t *p;

	if (w->cap - w->len >= RUN_BYTES)
		return true;
	p = realloc(w->buf, w->cap * 2);
	if (!p) {
		w->error = -ENOMEM;
		return false;
	}
	w->buf = p;
	w->cap *= 2;
	return true;
}

/* Both write to room that was reserved. */
static uint8_t *put_varint(uint8_t *p, uint64_t v)
{
	for (; v >= 0x80; v >>= 7)
		*p++ = (uint8_t)(v | 0x80);
	*p++ = (uint8_t)v;
	return p;
}

static uint8_t *put_loc(uint8_t *p, loc_t loc)
{
	loc = htole64(loc);
	memcpy(p, &loc, sizeof(loc));
	return p + sizeof(loc);
}

static enum run_kind kind_of_run(const struct manifest_writer *w)
{
	if (w->run_loc == LOC_ZERO_PAGE)
		return RUN_ZERO;
	if (w->run_loc == MANIFEST_GONE)
		return RUN_GONE;
	return w->prev_loc && w->run_loc == w->prev_loc + 1 && loc_entry(w->run_loc) ? RUN_NEXT
										     : RUN_AT;
}

/* Write out the run that was gathered. */
static void flush_run(struct manifest_writer *w)
{
	enum run_kind kind = kind_of_run(w);
	uint8_t *p;

	if (!w->run_len || !reserve_run(w))
		return;
	p = put_varint(w->buf + w->len, w->run_gfn - w->end_gfn);
	p = put_varint(p, w->run_len << 2 | kind);
	if (kind == RUN_AT)
		p = put_loc(p, w->run_loc);
	w->len = (size_t)(p - w->buf);
	if (is_page(w->run_loc))
		w->prev_loc = w->run_loc + w->run_len - 1;
	w->end_gfn = w->run_gfn + w->run_len;
	w->run_len = 0;
}

static bool continues_run(const struct manifest_writer *w, uint64_t gfn, loc_t loc)
{
	if (!w->run_len || gfn != w->next_gfn)
		return false;
	/* The loc after a batch's last entry may look like anything. */
	if (is_page(w->run_loc) && w->run_len > ENTRY_LAST - loc_entry(w->run_loc))
		return false;
	return loc == loc_after(w->run_loc, w->run_len);
}

void manifest_add_run(struct manifest_writer *w, uint64_t gfn, uint64_t n, loc_t loc)
{
	if (!n || w->error)
		return;
	if (gfn < w->next_gfn || n > MANIFEST_GFN_MAX || gfn > MANIFEST_GFN_MAX - n ||
	    !is_valid(loc) || (is_page(loc) && n - 1 > ENTRY_LAST - loc_entry(loc))) {
		w->error = -EINVAL;
		return;
	}
	if (!continues_run(w, gfn, loc)) {
		flush_run(w);
		w->run_gfn = gfn;
		w->run_loc = loc;
	}
	w->run_len += n;
	w->next_gfn = gfn + n;
	w->nr_pages += n;
}

void manifest_add(struct manifest_writer *w, uint64_t gfn, loc_t loc)
{
	manifest_add_run(w, gfn, 1, loc);
}

int manifest_finish(struct manifest_writer *w, const uint8_t **ret, size_t *len)
{
	if (!w->error)
		flush_run(w);
	if (w->error)
		return w->error;
	*ret = w->buf;
	*len = w->len;
	return 0;
}

void manifest_reader_init(struct manifest_reader *r, const void *buf, size_t len)
{
	*r = (struct manifest_reader){.p = buf, .end = (const uint8_t *)buf + len};
}

/* False when it is cut off, longer than it need be, or more than 64 bits. */
static bool get_varint(struct manifest_reader *r, uint64_t *ret)
{
	uint64_t v = 0;

	for (unsigned int shift = 0; r->p < r->end && shift < 64; shift += 7) {
		uint64_t byte = *r->p++;

		if (shift == 63 && byte > 1)
			return false;
		v |= (byte & 0x7f) << shift;
		if (byte < 0x80) {
			*ret = v;
			return byte || !shift;
		}
	}
	return false;
}

static bool get_loc(struct manifest_reader *r, loc_t *ret)
{
	loc_t loc = 0;

	if (r->end - r->p < 8)
		return false;
	for (int i = 0; i < 8; i++)
		loc |= (loc_t)r->p[i] << 8 * i;
	r->p += 8;
	*ret = loc;
	return is_page(loc);
}

/* The loc of a run of `kind`, and the reader's last page brought up to date. */
static const char *read_run_loc(struct manifest_reader *r, enum run_kind kind, uint64_t len,
				loc_t *ret)
{
	if (kind == RUN_ZERO || kind == RUN_GONE) {
		*ret = kind == RUN_ZERO ? LOC_ZERO_PAGE : MANIFEST_GONE;
		return NULL;
	}
	if (kind == RUN_AT) {
		if (!get_loc(r, ret))
			return "no page location where one must follow";
	} else {
		if (!r->loc || loc_entry(r->loc) == ENTRY_LAST)
			return "a run continues from no page";
		*ret = r->loc + 1;
	}
	if (len - 1 > ENTRY_LAST - loc_entry(*ret))
		return "a run of pages leaves its batch";
	r->loc = *ret + len - 1;
	return NULL;
}

static const char *read_run(struct manifest_reader *r, struct manifest_run *ret)
{
	uint64_t gap, len_kind, len;
	const char *why;

	if (!get_varint(r, &gap) || !get_varint(r, &len_kind))
		return "broken number";
	len = len_kind >> 2;
	if (!len)
		return "empty run";
	if (gap > MANIFEST_GFN_MAX - r->gfn || len > MANIFEST_GFN_MAX - r->gfn - gap)
		return "frame number out of range";
	why = read_run_loc(r, (enum run_kind)(len_kind & 3), len, &ret->loc);
	if (why)
		return why;
	ret->gfn = r->gfn + gap;
	ret->len = len;
	r->gfn = ret->gfn + len;
	return NULL;
}

int manifest_next(struct manifest_reader *r, struct manifest_run *ret, struct err *e)
{
	size_t left = (size_t)(r->end - r->p);
	const char *why;

	if (!left)
		return 0;
	why = read_run(r, ret);
	if (!why)
		return 1;
	r->p = r->end - left;
	return err_set(e, E_CORRUPT, "manifest is damaged %zu bytes before its end: %s", left, why);
}
