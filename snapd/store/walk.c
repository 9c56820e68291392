/* SPDX-License-Identifier: MIT */
/* The batches of a segment; see walk.h. */
#include "snapd/store/walk.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"

#define FAR_BLOCKS 256u /* read at once while looking for the next header */

/* Of the longest header. */
static uint32_t header_blocks(const struct seg_walk *w)
{
	return batch_header_max(w->ident.seal) / FMT_BLOCK;
}

uint32_t seg_skip_hole(int fd, const struct seg_ident *ident, uint32_t block)
{
	uint32_t end = (uint32_t)(ident->segment_bytes / FMT_BLOCK);
	off_t data;

	if (!ident->rewrites || block >= end)
		return block;
	data = lseek(fd, (off_t)block * FMT_BLOCK, SEEK_DATA);
	if (data < 0)
		return errno == ENXIO ? end : block;
	return MAX(block, (uint32_t)(data / FMT_BLOCK));
}

bool seg_block_is_hole(const struct seg_ident *ident, const void *block)
{
	return ident->rewrites && pageid_bytes_zero(block, FMT_BLOCK);
}

int seg_walk_init(struct seg_walk *w, int fd, const struct seg_ident *ident, uint32_t end)
{
	*w = (struct seg_walk){.fd = fd, .ident = *ident, .block = 1, .end = end};
	w->buf = aligned_alloc(FMT_BLOCK, (size_t)FAR_BLOCKS * FMT_BLOCK);
	return w->buf ? 0 : -ENOMEM;
}

void seg_walk_deinit(struct seg_walk *w)
{
	free(w->buf);
	w->buf = NULL;
}

/* Have the blocks from `block` on that a header can take; `ahead` more if need be. */
static int fill(struct seg_walk *w, uint32_t block, uint32_t ahead, uint8_t **ret, size_t *len,
		struct err *e)
{
	uint32_t last = (uint32_t)(w->ident.segment_bytes / FMT_BLOCK);
	uint32_t want = MIN(block + header_blocks(w), last);
	ssize_t n;

	if (block < w->buf_block || want > w->buf_block + w->buf_blocks) {
		uint32_t nr = MIN(ahead, last - block);

		w->buf_blocks = 0;
		n = pread(w->fd, w->buf, (size_t)nr * FMT_BLOCK, (off_t)block * FMT_BLOCK);
		if (n < 0)
			return err_errno(e, errno, "reading segment %08x block %u",
					 w->ident.segment, block);
		w->buf_block = block;
		w->buf_blocks = (uint32_t)n / FMT_BLOCK;
	}
	*ret = w->buf + (size_t)(block - w->buf_block) * FMT_BLOCK;
	*len = (size_t)(w->buf_block + w->buf_blocks - block) * FMT_BLOCK;
	return 0;
}

static int look(struct seg_walk *w, uint32_t block, uint32_t ahead, const struct batch_header **ret,
		const struct batch_page **pages, struct err *e)
{
	uint8_t *bytes = NULL;
	size_t len = 0;
	int r = fill(w, block, ahead, &bytes, &len, e);

	if (!r)
		r = batch_decode(bytes, len, &w->ident, block, ret, pages, e);
	return r == -ENODATA ? err_set(e, E_CORRUPT, "segment %08x block %u: cut off",
				       w->ident.segment, block)
			     : r;
}

/* To the next block that is not one of zeroes. */
static int skip_holes(struct seg_walk *w, struct err *e)
{
	uint8_t *bytes = NULL;
	size_t len = 0;
	int r = 0;

	while (w->ident.rewrites && w->block < w->end) {
		w->block = seg_skip_hole(w->fd, &w->ident, w->block);
		r = w->block < w->end ? fill(w, w->block, header_blocks(w), &bytes, &len, e) : 0;
		if (r || w->block >= w->end || len < FMT_BLOCK ||
		    !seg_block_is_hole(&w->ident, bytes))
			break;
		w->block++;
	}
	return r;
}

int seg_walk_next(struct seg_walk *w, uint32_t *at, const struct batch_header **ret,
		  const struct batch_page **pages, struct err *e)
{
	int r = skip_holes(w, e);

	*at = w->block;
	if (w->block >= w->end)
		return 0;
	if (!r)
		r = look(w, w->block, header_blocks(w), ret, pages, e);
	if (!r) {
		w->block += batch_blocks(*ret);
		return 1;
	}
	do {
		w->block++;
	} while (w->block < w->end && look(w, w->block, FAR_BLOCKS, ret, pages, NULL));
	/* A buffer is decoded once: what was found is read again. */
	w->buf_blocks = 0;
	return r;
}
