/* SPDX-License-Identifier: MIT */
/* Index records as bytes; see reclog.h. */
#include "snapd/store/reclog.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/store/index.h"
#include "snapd/util/cleanup.h"

#define REMOVED 0xffffffffu /* for the bytes of a value */

static int reserve(struct reclog *l, size_t more)
{
	size_t cap = (l->len + more) * 2;
	uint8_t *bytes;

	if (l->len + more <= l->cap)
		return 0;
	bytes = realloc(l->bytes, cap);
	if (!bytes)
		return -ENOMEM;
	l->bytes = bytes;
	l->cap = cap;
	return 0;
}

static void append(struct reclog *l, const void *bytes, size_t len)
{
	if (len)
		memcpy(l->bytes + l->len, bytes, len);
	l->len += len;
}

int reclog_add(struct reclog *l, uint32_t db, const void *key, size_t key_len, const void *value,
	       size_t len, const void *tail, size_t tail_len)
{
	uint32_t head[3] = {db, (uint32_t)key_len, (uint32_t)(len + tail_len)};
	int r = reserve(l, sizeof(head) + key_len + len + tail_len);

	if (r)
		return r;
	append(l, head, sizeof(head));
	append(l, key, key_len);
	append(l, value, len);
	append(l, tail, tail_len);
	return 0;
}

int reclog_add_removed(struct reclog *l, uint32_t db, const void *key, size_t key_len)
{
	uint32_t head[3] = {db, (uint32_t)key_len, REMOVED};
	int r = reserve(l, sizeof(head) + key_len);

	if (r)
		return r;
	append(l, head, sizeof(head));
	append(l, key, key_len);
	return 0;
}

int reclog_add_all(struct reclog *l, const struct reclog *more)
{
	int r = reserve(l, more->len);

	if (!r)
		append(l, more->bytes, more->len);
	return r;
}

void reclog_reset(struct reclog *l)
{
	l->len = 0;
}

void reclog_deinit(struct reclog *l)
{
	free(l->bytes);
	*l = (struct reclog){0};
}

void reclog_reader_init(struct reclog_reader *r, const void *bytes, size_t len)
{
	*r = (struct reclog_reader){.at = bytes, .end = (const uint8_t *)bytes + len};
}

int reclog_next(struct reclog_reader *r, struct reclog_record *ret, struct err *e)
{
	uint64_t left = (uint64_t)(r->end - r->at);
	uint32_t head[3];

	if (!left)
		return 0;
	if (left < sizeof(head))
		return err_set(e, E_CORRUPT, "a list of index records is cut off");
	memcpy(head, r->at, sizeof(head));
	left -= sizeof(head);
	*ret = (struct reclog_record){.db = head[0],
				      .removed = head[2] == REMOVED,
				      .key = r->at + sizeof(head),
				      .key_len = head[1],
				      .len = head[2] == REMOVED ? 0 : head[2]};
	if (head[0] >= IX_NR_DBS || !head[1] || head[1] > sizeof(((struct ix_key *)0)->b) ||
	    head[1] > left || ret->len > left - head[1])
		return err_set(e, E_CORRUPT, "a list of index records is damaged");
	ret->value = (const uint8_t *)ret->key + ret->key_len;
	r->at = (const uint8_t *)ret->value + ret->len;
	return 1;
}
