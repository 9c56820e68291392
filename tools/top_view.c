/* SPDX-License-Identifier: MIT */
/* Lines for snapctl top: see top_view.h. */
#include "tools/top_view.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"
#include "tools/human.h"

#define KEYS_LINE "n s d b a p t e f: sort  r: reverse  j k: scroll  space: hold  q: quit"

/* No more columns than there are; a character of several bytes counts as one. */
static void cut(char *s, int cols)
{
	int n = 0;

	for (; *s; s++)
		if (((unsigned char)*s & 0xc0) != 0x80 && n++ == cols) {
			*s = '\0';
			return;
		}
}

static void __attribute__((format(printf, 3, 4)))
put(struct top_lines *l, int cols, const char *fmt, ...)
{
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	cut(text, cols);
	l->text = reallocarray(l->text, (size_t)l->nr + 1, sizeof(*l->text));
	if (!l->text || !(l->text[l->nr++] = strdup(text)))
		abort();
}

/* ---- the store ---- */

static void put_store(struct top_lines *l, int cols, const struct top_sample *s)
{
	const struct top_store *st = &s->store;
	char disk[24], limit[24] = "", growth[24] = "", times[24] = "", text[24];
	size_t ready = 0;

	for (size_t i = 0; i < s->nr_vms; i++)
		ready += !strcmp(s->vms[i].state, "ready");
	if (st->limit_bytes)
		snprintf(limit, sizeof(limit), " of %s",
			 human_bytes(text, sizeof(text), st->limit_bytes));
	if (st->growth >= 1)
		snprintf(growth, sizeof(growth), ", +%s/s",
			 human_bytes(text, sizeof(text), (uint64_t)st->growth));
	if (st->used_bytes)
		snprintf(times, sizeof(times), ", keeps %.1fx",
			 (double)st->logical_bytes / (double)st->used_bytes);
	put(l, cols, "%zu VMs, %zu ready; store: %llu snapshots, %s%s on disk%s%s", s->nr_vms,
	    ready, (unsigned long long)st->snapshots,
	    human_bytes(disk, sizeof(disk), st->disk_bytes), limit, times, growth);
}

/* ---- VMs ---- */

static const char *rate_text(char *buf, size_t len, double v, const char *unit)
{
	char bytes[20];

	if (v < 0)
		snprintf(buf, len, "-");
	else
		snprintf(buf, len, "%s%s", human_bytes(bytes, sizeof(bytes), (uint64_t)v), unit);
	return buf;
}

static const char *plain_text(char *buf, size_t len, double v, const char *unit)
{
	if (v < 0)
		snprintf(buf, len, "-");
	else
		snprintf(buf, len, v < 10 ? "%.1f%s" : "%.0f%s", v, unit);
	return buf;
}

/* At most 6 columns. */
static const char *age_text(char *buf, size_t len, double s)
{
	if (s < 0)
		snprintf(buf, len, "-");
	else if (s < 100)
		snprintf(buf, len, "%.1fs", s);
	else if (s < 6000)
		snprintf(buf, len, "%dm%02ds", (int)s / 60, (int)s % 60);
	else if (s < 360000)
		snprintf(buf, len, "%dh%02dm", (int)s / 3600, (int)s / 60 % 60);
	else
		snprintf(buf, len, "%.0fd", s / 86400);
	return buf;
}

static const char *pause_text(char *buf, size_t len, uint64_t ns)
{
	if (!ns)
		snprintf(buf, len, "-");
	else if (ns < 10000000)
		snprintf(buf, len, "%.2fms", (double)ns / 1e6);
	else if (ns < 10000000000)
		snprintf(buf, len, "%.0fms", (double)ns / 1e6);
	else
		snprintf(buf, len, "%.0fs", (double)ns / 1e9);
	return buf;
}

/* 75 columns and the job; wider screens have room for longer names. */
#define NAME_COLS	  14
#define NAME_COLS_MAX	  40
#define ROW_COLS	  80
#define ROW		  "%-*.*s %-7.7s %10s %8s %6s %6s %6s %5s %5s %s"
#define NAMES(cols, name) name_cols(cols), name_cols(cols), name

static int name_cols(int cols)
{
	int spare = MAX(cols - ROW_COLS, 0);

	return NAME_COLS + MIN(spare, NAME_COLS_MAX - NAME_COLS);
}

static void put_head(struct top_lines *l, const struct top_view *v)
{
	static const char *const heads[] = {"VM",    "STATE", "DIRTY/S", "BEHIND", "AGE",
					    "PAUSE", "STILL", "EPO/",	 "FUL/"};
	char name[ARRAY_SIZE(heads)][16];

	for (int i = 0; i < (int)ARRAY_SIZE(heads); i++) {
		const char *mark = v->key != i ? "" : v->reverse ? "^" : "*";

		snprintf(name[i], sizeof(name[i]), "%s%s", heads[i],
			 !*mark && heads[i][strlen(heads[i]) - 1] == '/' ? "S" : mark);
	}
	l->head = l->nr;
	put(l, v->cols, ROW, NAMES(v->cols, name[0]), name[1], name[2], name[3], name[4], name[5],
	    name[6], name[7], name[8], "JOB");
}

static void put_vm(struct top_lines *l, int cols, const struct top_vm *v)
{
	char dirty[24], behind[24], age[16], pause[16], still[16], epochs[16], full[16];

	put(l, cols, ROW, NAMES(cols, v->name), v->state,
	    rate_text(dirty, sizeof(dirty), v->dirty_rate, "/s"),
	    human_bytes(behind, sizeof(behind), v->behind_bytes),
	    age_text(age, sizeof(age), v->age_s), pause_text(pause, sizeof(pause), v->pause_ns),
	    plain_text(still, sizeof(still), v->still_share < 0 ? -1 : v->still_share * 100, "%"),
	    plain_text(epochs, sizeof(epochs), v->epoch_rate, ""),
	    plain_text(full, sizeof(full), v->ring_full_rate, ""), v->job);
}

static void put_vms(struct top_lines *l, struct top_view *v, const struct top_sample *s, int room)
{
	size_t fit = v->rows ? (size_t)MAX(room, 0) : s->nr_vms;

	put_head(l, v);
	if (fit < s->nr_vms && fit)
		fit--; /* for the line that says so */
	v->first = fit < s->nr_vms ? MIN(v->first, s->nr_vms - fit) : 0;
	for (size_t i = v->first; i < s->nr_vms && i < v->first + fit; i++)
		put_vm(l, v->cols, &s->vms[i]);
	if (fit < s->nr_vms && room > 0)
		put(l, v->cols, "VMs %zu to %zu of %zu", v->first + 1, v->first + fit, s->nr_vms);
}

/* ---- jobs ---- */

static void put_job(struct top_lines *l, int cols, const struct top_job *j)
{
	char done[24], total[24];

	put(l, cols, "job %llu  %s%s%s  %s%s%s%s%s", (unsigned long long)j->id, j->kind,
	    *j->vm ? " " : "", j->vm, j->phase, *j->phase ? "  " : "",
	    j->done ? human_amount(done, sizeof(done), j->done, j->bytes) : "",
	    j->total ? " of " : "",
	    j->total ? human_amount(total, sizeof(total), j->total, j->bytes) : "");
}

void top_view_lines(struct top_view *v, const struct top_sample *s, struct top_lines *ret)
{
	bool last = v->keys || v->trouble;
	int jobs = (int)MIN(s->nr_jobs, (size_t)1000);

	if (v->rows)
		jobs = MIN(jobs, v->rows / 4);
	*ret = (struct top_lines){0};
	put_store(ret, v->cols, s);
	put_vms(ret, v, s, v->rows - 2 - jobs - last);
	for (int i = 0; i < jobs; i++)
		put_job(ret, v->cols, &s->jobs[i]);
	if (last)
		put(ret, v->cols, "%s", v->trouble ? v->trouble : KEYS_LINE);
	while (v->rows && ret->nr > v->rows)
		free(ret->text[--ret->nr]);
}

void top_lines_deinit(struct top_lines *l)
{
	for (int i = 0; i < l->nr; i++)
		free(l->text[i]);
	free(l->text);
	*l = (struct top_lines){0};
}
