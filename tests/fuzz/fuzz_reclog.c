/* SPDX-License-Identifier: MIT */
/*
 * Any bytes as index records in a segment: refused with a reason, or records that lie within
 * them, and that come out the same when they are written again.
 */
#include <errno.h>
#include <string.h>

#include "snapd/store/index.h"
#include "snapd/store/reclog.h"
#include "tests/fuzz/fuzz.h"

static void copy(struct reclog *to, const struct reclog_record *rec)
{
	PROMISE(!(rec->removed ? reclog_add_removed(to, rec->db, rec->key, rec->key_len)
			       : reclog_add(to, rec->db, rec->key, rec->key_len, rec->value,
					    rec->len, NULL, 0)));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct reclog again = {0};
	struct reclog_reader reader;
	struct reclog_record rec;
	struct err e = {0};
	int r;

	reclog_reader_init(&reader, data, len);
	while ((r = reclog_next(&reader, &rec, &e)) > 0) {
		PROMISE(rec.db < IX_NR_DBS && rec.key_len && rec.key_len <= sizeof(struct ix_key));
		PROMISE((const uint8_t *)rec.key > data);
		PROMISE((const uint8_t *)rec.value + rec.len <= data + len);
		PROMISE(!rec.removed || !rec.len);
		copy(&again, &rec);
		PROMISE(!memcmp(again.bytes, data, again.len));
	}
	PROMISE(r == 0 || r == -EUCLEAN);
	PROMISE((r == 0) == !e.text[0] && (r != 0 || again.len == len));
	reclog_deinit(&again);
	return 0;
}
