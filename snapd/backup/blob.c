/* SPDX-License-Identifier: MIT */
/* Payloads as objects; see blob.h. */
#include "snapd/backup/blob.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "snapd/util/cleanup.h"

#define ZSTD_LEVEL 3 /* small, and kept for long */

int blob_encode(const struct repo_keys *k, enum bk_type type, const void *payload, size_t len,
		struct blob *ret, struct err *e)
{
	size_t tag = k->sealed ? BK_TAG_BYTES : 0, room = ZSTD_compressBound(len), packed;
	struct bk_header h;

	if (len > BK_BLOB_MAX)
		return err_set(e, EFBIG, "%zu bytes are too many for one object", len);
	*ret = (struct blob){.bytes = malloc(sizeof(h) + room + tag)};
	if (!ret->bytes)
		return err_errno(e, ENOMEM, "backup");
	keys_header(k, type, &h);
	packed = ZSTD_compress(ret->bytes + sizeof(h), room, payload, len, ZSTD_LEVEL);
	h.codec = BK_ZSTD;
	if (ZSTD_isError(packed) || packed >= len) {
		memcpy(ret->bytes + sizeof(h), payload, len);
		packed = len;
		h.codec = BK_RAW;
	}
	h.plain_bytes = len;
	h.body_bytes = packed + tag;
	memcpy(ret->bytes, &h, sizeof(h));
	if (k->sealed)
		keys_seal(k, &h, 0, ret->bytes + sizeof(h), packed);
	ret->len = sizeof(h) + h.body_bytes;
	keys_object_name(k, ret->bytes, ret->len, NULL, 0, &ret->name);
	return 0;
}

void blob_deinit(struct blob *b)
{
	free(b->bytes);
	*b = (struct blob){0};
}

static int check(const struct repo_keys *k, enum bk_type type, const struct bk_name *name,
		 const void *bytes, size_t len, struct bk_header *h, struct err *e)
{
	size_t tag = k->sealed ? BK_TAG_BYTES : 0;
	struct bk_name is;
	int rc;

	if (len < sizeof(*h))
		return err_set(e, E_CORRUPT, "cut off in the header");
	memcpy(h, bytes, sizeof(*h));
	rc = keys_check_header(k, h, type, e);
	if (rc)
		return rc;
	keys_object_name(k, bytes, len, NULL, 0, &is);
	if (memcmp(&is, name, sizeof(is)) != 0)
		return err_set(e, E_CORRUPT, "its bytes are not what its name says");
	if (h->table_bytes || h->nr_runs || h->nr_pages || h->page_shift ||
	    h->plain_bytes > BK_BLOB_MAX || h->body_bytes != len - sizeof(*h) ||
	    h->body_bytes < tag || (h->codec != BK_RAW && h->codec != BK_ZSTD) ||
	    (h->codec == BK_RAW && h->plain_bytes != h->body_bytes - tag))
		return err_set(e, E_CORRUPT, "the header makes no sense");
	return 0;
}

int blob_decode(const struct repo_keys *k, enum bk_type type, const struct bk_name *name,
		const void *bytes, size_t len, uint8_t **ret, size_t *ret_len, struct err *e)
{
	_cleanup_free_ uint8_t *body = NULL, *plain = NULL;
	struct bk_header h;
	size_t packed;
	int rc = check(k, type, name, bytes, len, &h, e);

	if (rc)
		return rc;
	body = malloc(h.body_bytes + 1);
	plain = malloc(h.plain_bytes + 1);
	if (!body || !plain)
		return err_errno(e, ENOMEM, "backup");
	memcpy(body, (const uint8_t *)bytes + sizeof(h), h.body_bytes);
	packed = h.body_bytes - (k->sealed ? BK_TAG_BYTES : 0);
	if (k->sealed && !keys_unseal(k, &h, 0, body, packed))
		return err_set(e, E_CORRUPT, "not authentic");
	if (h.codec == BK_RAW)
		memcpy(plain, body, packed);
	else if (ZSTD_decompress(plain, h.plain_bytes, body, packed) != h.plain_bytes)
		return err_set(e, E_CORRUPT, "no frame of the length that it says");
	*ret = steal_ptr(&plain);
	*ret_len = h.plain_bytes;
	return 0;
}
