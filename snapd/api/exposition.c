/* SPDX-License-Identifier: MIT */
/* The Prometheus text format: see exposition.h. */
#include "snapd/api/exposition.h"

#include <stdarg.h>
#include <string.h>

#define NS_PER_S 1000000000ull

void metric_family(FILE *f, const char *name, enum metric_type type, const char *help)
{
	static const char *const types[] = {[METRIC_COUNTER] = "counter",
					    [METRIC_GAUGE] = "gauge",
					    [METRIC_SUMMARY] = "summary",
					    [METRIC_HISTOGRAM] = "histogram"};

	fprintf(f, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, types[type]);
}

/* Appends what fits, never half of an escape. */
static size_t escape(char *buf, size_t at, size_t size, const char *value)
{
	for (; *value && at + 3 < size; value++) {
		bool special = *value == '"' || *value == '\\' || *value == '\n';

		if (special)
			buf[at++] = '\\';
		buf[at++] = *value == '\n' ? 'n' : *value;
	}
	buf[at] = '\0';
	return at;
}

char *metric_labels(char buf[LABELS_MAX], ...)
{
	const char *name;
	size_t at = 0;
	va_list ap;

	buf[0] = '\0';
	va_start(ap, buf);
	while ((name = va_arg(ap, const char *))) {
		const char *value = va_arg(ap, const char *);

		if (at + strlen(name) + 8 >= LABELS_MAX)
			break;
		at += (size_t)sprintf(buf + at, "%s%s=\"", at ? "," : "", name);
		at = escape(buf, at, LABELS_MAX - 2, value);
		buf[at++] = '"';
		buf[at] = '\0';
	}
	va_end(ap);
	return buf;
}

static void put_name(FILE *f, const char *name, const char *suffix, const char *labels)
{
	fprintf(f, "%s%s", name, suffix);
	if (*labels)
		fprintf(f, "{%s}", labels);
	fputc(' ', f);
}

static void put_seconds(FILE *f, uint64_t ns)
{
	fprintf(f, "%llu.%09llu\n", (unsigned long long)(ns / NS_PER_S),
		(unsigned long long)(ns % NS_PER_S));
}

void metric_u64(FILE *f, const char *name, const char *labels, uint64_t value)
{
	put_name(f, name, "", labels);
	fprintf(f, "%llu\n", (unsigned long long)value);
}

void metric_double(FILE *f, const char *name, const char *labels, double value)
{
	put_name(f, name, "", labels);
	fprintf(f, "%.9g\n", value);
}

void metric_seconds(FILE *f, const char *name, const char *labels, uint64_t ns)
{
	put_name(f, name, "", labels);
	put_seconds(f, ns);
}

void metric_histogram(FILE *f, const char *name, const char *labels, const struct histogram *h,
		      const uint64_t bounds[HISTOGRAM_BOUNDS], bool seconds)
{
	const char *comma = *labels ? "," : "";
	uint64_t n = 0;

	for (int i = 0; i < HISTOGRAM_BOUNDS; i++) {
		n += h->count[i];
		fprintf(f, "%s_bucket{%s%sle=\"%.12g\"} %llu\n", name, labels, comma,
			seconds ? (double)bounds[i] / NS_PER_S : (double)bounds[i],
			(unsigned long long)n);
	}
	n += h->count[HISTOGRAM_BOUNDS];
	fprintf(f, "%s_bucket{%s%sle=\"+Inf\"} %llu\n", name, labels, comma, (unsigned long long)n);
	put_name(f, name, "_sum", labels);
	if (seconds)
		put_seconds(f, h->sum);
	else
		fprintf(f, "%llu\n", (unsigned long long)h->sum);
	put_name(f, name, "_count", labels);
	fprintf(f, "%llu\n", (unsigned long long)n);
}
