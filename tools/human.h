/* SPDX-License-Identifier: MIT */
/* human: sizes, times and tables for people.  Functions fill and return `buf`. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

char *human_bytes(char *buf, size_t len, uint64_t bytes);	   /* "1.4 GiB" */
char *human_amount(char *buf, size_t len, uint64_t n, bool bytes); /* bytes, or a plain count */
char *human_seconds(char *buf, size_t len, double seconds);    /* "820 µs", "1.4 s", "2 min 5 s" */
char *human_time(char *buf, size_t len, uint64_t realtime_ns); /* local time */

/* "20M" → bytes; K, M, G, T may follow.  -EINVAL. */
int parse_bytes(const char *text, uint64_t *ret);

/* A table: cells are copied; columns of numbers are right-aligned. */
struct table;
struct table *table_new(const char *const *heads, const bool *right, size_t nr_cols);
void table_row(struct table *t, const char *const *cells);
/* Print to stdout (nothing but the head when there are no rows) and free. */
void table_print(struct table *t);
/* Columns that a UTF-8 text takes, near enough: one per character. */
size_t text_width(const char *s);
