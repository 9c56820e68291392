/* SPDX-License-Identifier: MIT */
/*
 * LZ4 and Zstandard, a page at a time; see codec.h.
 *
 * Nothing that src says decides how much is written or allocated: both decoders are
 * given the page as their whole output, and Zstandard's runs in one step, without a
 * window of its own.  So a "bomb" ends where the page does.
 */
#include "snapd/store/codec.h"

#include <assert.h>
#include <lz4.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "snapd/util/cleanup.h"

struct codec {
	void *lz4;	    /* owned */
	ZSTD_CCtx *deflate; /* owned; made when first needed */
	ZSTD_DCtx *inflate; /* owned; likewise */
};

/* ---- settings ---- */

static int parse_level(const char *text, int32_t *ret)
{
	char *end;
	long v;

	errno = 0;
	v = strtol(text, &end, 10);
	if (end == text || *end || errno || v < CODEC_ZSTD_LEVEL_MIN || v > CODEC_ZSTD_LEVEL_MAX)
		return -EINVAL;
	*ret = (int32_t)v;
	return 0;
}

int codec_parse(const char *text, struct codec_policy *ret, struct err *e)
{
	int r = 0;

	*ret = (struct codec_policy){.codec = CODEC_RAW};
	if (!strcmp(text, "none"))
		return 0;
	if (!strcmp(text, "lz4")) {
		ret->codec = CODEC_LZ4;
		return 0;
	}
	ret->codec = CODEC_ZSTD;
	ret->level = CODEC_ZSTD_LEVEL_DEFAULT;
	if (!strncmp(text, "zstd:", 5))
		r = parse_level(text + 5, &ret->level);
	else if (strcmp(text, "zstd") != 0)
		r = -EINVAL;
	return r ? err_set(e, EINVAL,
			   "\"%.40s\" is no compression: none, lz4, zstd or zstd:LEVEL (%d to %d)",
			   text, CODEC_ZSTD_LEVEL_MIN, CODEC_ZSTD_LEVEL_MAX)
		 : 0;
}

void codec_format(struct codec_policy policy, char ret[CODEC_TEXT_MAX])
{
	static const char *const names[] = {
		[CODEC_RAW] = "none", [CODEC_LZ4] = "lz4", [CODEC_ZSTD] = "zstd"};

	if (policy.codec == CODEC_ZSTD)
		snprintf(ret, CODEC_TEXT_MAX, "zstd:%d", policy.level);
	else
		snprintf(ret, CODEC_TEXT_MAX, "%s", names[policy.codec]);
}

/* ---- working memory ---- */

int codec_create(struct codec **ret)
{
	struct codec *c = calloc(1, sizeof(*c));

	if (c)
		c->lz4 = malloc((size_t)LZ4_sizeofState());
	if (!c || !c->lz4) {
		codec_destroy(c);
		return -ENOMEM;
	}
	*ret = c;
	return 0;
}

void codec_destroy(struct codec *c)
{
	if (!c)
		return;
	ZSTD_freeCCtx(c->deflate);
	ZSTD_freeDCtx(c->inflate);
	free(c->lz4);
	free(c);
}

void codec_list_init(struct codec_list *l)
{
	pthread_mutex_init(&l->lock, NULL);
	l->nr = 0;
}

void codec_list_deinit(struct codec_list *l)
{
	while (l->nr)
		codec_destroy(l->idle[--l->nr]);
	pthread_mutex_destroy(&l->lock);
}

int codec_list_get(struct codec_list *l, struct codec **ret)
{
	pthread_mutex_lock(&l->lock);
	*ret = l->nr ? l->idle[--l->nr] : NULL;
	pthread_mutex_unlock(&l->lock);
	return *ret ? 0 : codec_create(ret);
}

void codec_list_put(struct codec_list *l, struct codec *c)
{
	pthread_mutex_lock(&l->lock);
	if (c && l->nr < CODECS_IDLE_MAX)
		l->idle[l->nr++] = steal_ptr(&c);
	pthread_mutex_unlock(&l->lock);
	codec_destroy(c);
}

/* ---- pages ---- */

static uint32_t pack_zstd(struct codec *c, int level, void *dst, const void *page,
			  uint32_t page_size)
{
	size_t n;

	if (!c->deflate)
		c->deflate = ZSTD_createCCtx();
	if (!c->deflate) /* out of memory: raw is as good */
		return 0;
	n = ZSTD_compressCCtx(c->deflate, dst, codec_pack_max(page_size), page, page_size, level);
	return ZSTD_isError(n) ? 0 : (uint32_t)n;
}

uint32_t codec_pack(struct codec *c, struct codec_policy policy, void *dst, const void *page,
		    uint32_t page_size)
{
	switch (policy.codec) {
	case CODEC_LZ4:
		return (uint32_t)LZ4_compress_fast_extState(c->lz4, page, dst, (int)page_size,
							    (int)codec_pack_max(page_size), 1);
	case CODEC_ZSTD:
		return pack_zstd(c, policy.level, dst, page, page_size);
	case CODEC_RAW:
		break;
	}
	return 0;
}

static const char *unpack_zstd(struct codec *c, void *dst, uint32_t page_size, const void *src,
			       uint32_t len)
{
	size_t n;

	if (!c->inflate)
		c->inflate = ZSTD_createDCtx();
	if (!c->inflate)
		return "no memory to decompress";
	/* One frame: what a decoder of several would skip is not ours. */
	n = ZSTD_findFrameCompressedSize(src, len);
	if (ZSTD_isError(n) || n != len)
		return "not one Zstandard frame";
	n = ZSTD_decompressDCtx(c->inflate, dst, page_size, src, len);
	if (ZSTD_isError(n))
		return ZSTD_getErrorName(n);
	return n == page_size ? NULL : "decompresses to another size than a page";
}

static const char *unpack_lz4(void *dst, uint32_t page_size, const void *src, uint32_t len)
{
	int n = LZ4_decompress_safe(src, dst, (int)len, (int)page_size);

	if (n < 0)
		return "not an LZ4 block of a page";
	return (uint32_t)n == page_size ? NULL : "decompresses to another size than a page";
}

int codec_unpack(struct codec *c, enum page_codec codec, void *dst, uint32_t page_size,
		 const void *src, uint32_t len, struct err *e)
{
	const char *why = "unknown codec";

	if (len >= page_size)
		why = "longer than a page";
	else if (codec == CODEC_LZ4)
		why = unpack_lz4(dst, page_size, src, len);
	else if (codec == CODEC_ZSTD)
		why = unpack_zstd(c, dst, page_size, src, len);
	return why ? err_set(e, E_CORRUPT, "compressed page: %s", why) : 0;
}
