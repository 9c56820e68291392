/* SPDX-License-Identifier: MIT */
/*
 * Any bytes as a compressed page: first byte codec (2 bits) and page size, then the
 * stored bytes.  What is accepted fills exactly a page, in a block of exactly its size;
 * and packs and unpacks to itself.
 */
#include <errno.h>
#include <string.h>

#include "snapd/store/codec.h"
#include "tests/fuzz/fuzz.h"

static struct codec *codec;

static void again(enum page_codec kind, const uint8_t *page, uint32_t page_size)
{
	struct codec_policy policy = {.codec = kind, .level = kind == CODEC_ZSTD ? 1 : 0};
	uint8_t *packed = malloc(codec_pack_max(page_size)), *got = malloc(page_size);
	uint32_t len = codec_pack(codec, policy, packed, page, page_size);

	PROMISE(len <= codec_pack_max(page_size));
	if (len) {
		PROMISE(codec_unpack(codec, kind, got, page_size, packed, len, NULL) == 0);
		PROMISE(!memcmp(page, got, page_size));
	}
	free(packed);
	free(got);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	enum page_codec kind = len ? data[0] & 3 : 0;
	uint32_t page_size = 4096u << (len ? (data[0] >> 2) % 3 * 2 : 0);
	uint8_t *page = malloc(page_size);
	struct err e = {0};
	int r;

	if (!codec)
		PROMISE(codec_create(&codec) == 0);
	if (len > 65536)
		len = 65536;
	r = codec_unpack(codec, kind, page, page_size, len ? data + 1 : data,
			 len ? (uint32_t)len - 1 : 0, &e);
	PROMISE(r == 0 || r == -EUCLEAN);
	PROMISE((r == 0) == !e.text[0]);
	if (r == 0)
		again(kind, page, page_size);
	free(page);
	return 0;
}
