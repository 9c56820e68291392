/* SPDX-License-Identifier: MIT */
/*
 * codec: a page ↔ its compressed bytes.  One page is one LZ4 block or one Zstandard
 * frame of its own, so that any page can be read alone.  Pages that would not
 * shrink by an eighth stay raw: they are read straight into guest RAM.
 *
 * Working memory (struct codec) belongs to one thread at a time; a list of idle
 * ones is shared by all.
 */
#pragma once

#include <pthread.h>
#include <stdint.h>

#include "include/snapd/format.h"
#include "snapd/util/err.h"

/* How new pages are stored. */
struct codec_policy {
	enum page_codec codec;
	int32_t level; /* zstd only */
};

#define CODEC_ZSTD_LEVEL_MIN	 (-7)
#define CODEC_ZSTD_LEVEL_MAX	 19
#define CODEC_ZSTD_LEVEL_DEFAULT 1
#define CODEC_TEXT_MAX		 16

/* "none", "lz4", "zstd" or "zstd:LEVEL".  -EINVAL. */
int codec_parse(const char *text, struct codec_policy *ret, struct err *e);
void codec_format(struct codec_policy policy, char ret[CODEC_TEXT_MAX]);

/* Most bytes that a page of page_size is worth storing as. */
static inline uint32_t codec_pack_max(uint32_t page_size)
{
	return page_size - page_size / 8;
}

struct codec;
int codec_create(struct codec **ret); /* -ENOMEM */
void codec_destroy(struct codec *c);  /* accepts NULL */
/* Compress into dst (codec_pack_max() bytes); returns the bytes, or 0: leave it raw. */
uint32_t codec_pack(struct codec *c, struct codec_policy policy, void *dst, const void *page,
		    uint32_t page_size);
/* Untrusted src; writes dst[0, page_size) at most.  0, or -EUCLEAN when it is not one
 * block or frame of exactly a page. */
int codec_unpack(struct codec *c, enum page_codec codec, void *dst, uint32_t page_size,
		 const void *src, uint32_t len, struct err *e);

#define CODECS_IDLE_MAX 16u

struct codec_list {
	pthread_mutex_t lock; /* the rest */
	struct codec *idle[CODECS_IDLE_MAX];
	uint32_t nr;
};
void codec_list_init(struct codec_list *l);
void codec_list_deinit(struct codec_list *l);
int codec_list_get(struct codec_list *l, struct codec **ret); /* -ENOMEM */
void codec_list_put(struct codec_list *l, struct codec *c);   /* accepts NULL */
