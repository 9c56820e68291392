/* SPDX-License-Identifier: MIT */
/* Sizes, times and tables for people; see human.h. */
#include "tools/human.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/util/cleanup.h"

char *human_bytes(char *buf, size_t len, uint64_t bytes)
{
	static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
	double v = (double)bytes;
	size_t u = 0;

	while (v >= 1023.95 && u + 1 < ARRAY_SIZE(units)) {
		v /= 1024;
		u++;
	}
	snprintf(buf, len, u && v < 99.95 ? "%.1f %s" : "%.0f %s", v, units[u]);
	return buf;
}

char *human_amount(char *buf, size_t len, uint64_t n, bool bytes)
{
	if (bytes)
		return human_bytes(buf, len, n);
	snprintf(buf, len, "%llu", (unsigned long long)n);
	return buf;
}

int parse_bytes(const char *text, uint64_t *ret)
{
	static const char units[] = "KMGT";
	const char *unit;
	char *end;

	if (*text < '0' || *text > '9')
		return -EINVAL;
	errno = 0;
	*ret = strtoull(text, &end, 10);
	if (errno)
		return -EINVAL;
	unit = *end ? strchr(units, *end) : NULL;
	if (!unit)
		return *end ? -EINVAL : 0;
	if (end[1] || *ret > UINT64_MAX >> 10 * (unit - units + 1))
		return -EINVAL;
	*ret <<= 10 * (unit - units + 1);
	return 0;
}

char *human_seconds(char *buf, size_t len, double s)
{
	if (s < 1e-3)
		snprintf(buf, len, "%.0f µs", s * 1e6);
	else if (s < 1)
		snprintf(buf, len, "%.1f ms", s * 1e3);
	else if (s < 99.95)
		snprintf(buf, len, "%.1f s", s);
	else if (s < 7200)
		snprintf(buf, len, "%d min %d s", (int)s / 60, (int)s % 60);
	else
		snprintf(buf, len, "%d h %d min", (int)(s / 3600), (int)s / 60 % 60);
	return buf;
}

char *human_time(char *buf, size_t len, uint64_t realtime_ns)
{
	time_t t = (time_t)(realtime_ns / 1000000000);
	struct tm tm;

	if (!localtime_r(&t, &tm) || !strftime(buf, len, "%F %T", &tm))
		snprintf(buf, len, "-");
	return buf;
}

size_t text_width(const char *s)
{
	size_t n = 0;

	for (; *s; s++)
		n += ((unsigned char)*s & 0xc0) != 0x80;
	return n;
}

struct table {
	const bool *right;
	size_t nr_cols, nr_rows;
	char **cells; /* nr_rows × nr_cols, owned */
};

struct table *table_new(const char *const *heads, const bool *right, size_t nr_cols)
{
	struct table *t = calloc(1, sizeof(*t));

	if (!t)
		abort();
	t->right = right;
	t->nr_cols = nr_cols;
	table_row(t, heads);
	return t;
}

void table_row(struct table *t, const char *const *cells)
{
	size_t at = t->nr_rows++ * t->nr_cols;

	t->cells = reallocarray(t->cells, t->nr_rows * t->nr_cols, sizeof(*t->cells));
	for (size_t c = 0; c < t->nr_cols; c++)
		if (!t->cells || !(t->cells[at + c] = strdup(cells[c] ? cells[c] : "")))
			abort();
}

static size_t column_width(const struct table *t, size_t c)
{
	size_t w = 0;

	for (size_t r = 0; r < t->nr_rows; r++)
		w = MAX(w, text_width(t->cells[r * t->nr_cols + c]));
	return w;
}

static void print_row(const struct table *t, size_t r, const size_t *width)
{
	for (size_t c = 0; c < t->nr_cols; c++) {
		char *cell = t->cells[r * t->nr_cols + c];
		int pad = (int)(width[c] - text_width(cell));
		bool last = c + 1 == t->nr_cols;

		printf("%*s%s%*s%s", t->right[c] ? pad : 0, "", cell, t->right[c] || last ? 0 : pad,
		       "", last ? "\n" : "  ");
		free(cell);
	}
}

void table_print(struct table *t)
{
	size_t *width = calloc(t->nr_cols, sizeof(*width));

	if (!width)
		abort();
	for (size_t c = 0; c < t->nr_cols; c++)
		width[c] = column_width(t, c);
	for (size_t r = 0; r < t->nr_rows; r++)
		print_row(t, r, width);
	free(width);
	free(t->cells);
	free(t);
}
