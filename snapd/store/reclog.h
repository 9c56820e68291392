/* SPDX-License-Identifier: MIT */
/*
 * reclog: index records as bytes, for EPOCH and INDEX batches: of each its database,
 * key and value, or that it was removed.  docs/format.md has the layout.  Pure; the
 * reader takes untrusted bytes.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "snapd/util/err.h"

struct reclog {
	uint8_t *bytes; /* owned */
	size_t len, cap;
};

/* A record, its value in two pieces; -ENOMEM. */
int reclog_add(struct reclog *l, uint32_t db, const void *key, size_t key_len, const void *value,
	       size_t len, const void *tail, size_t tail_len);
int reclog_add_removed(struct reclog *l, uint32_t db, const void *key, size_t key_len);
int reclog_add_all(struct reclog *l, const struct reclog *more);
void reclog_reset(struct reclog *l); /* empty; keeps its memory */
void reclog_deinit(struct reclog *l);

struct reclog_record {
	uint32_t db;
	bool removed;
	const void *key, *value; /* borrowed from the bytes; value not aligned */
	size_t key_len, len;
};

struct reclog_reader {
	const uint8_t *at, *end;
};

void reclog_reader_init(struct reclog_reader *r, const void *bytes, size_t len);
/* 1 and a record; 0 at the end; -EUCLEAN: cut off, or no such database. */
int reclog_next(struct reclog_reader *r, struct reclog_record *ret, struct err *e);
