/* SPDX-License-Identifier: MIT */
/* What an epoch changes, as sorted runs; see changes.h. */
#include "snapd/store/changes.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"

#define CAP_MIN 1024u

void changes_deinit(struct changes *c)
{
	free(c->v);
	free(c->scratch);
	*c = (struct changes){0};
}

void changes_reset(struct changes *c, size_t keep)
{
	if (c->cap > keep || c->cap_scratch > keep)
		changes_deinit(c);
	c->nr = 0;
	c->nr_runs = 0;
}

static size_t run_end(const struct changes *c, uint32_t run)
{
	return run + 1 < c->nr_runs ? c->starts[run + 1] : c->nr;
}

/* The first entry of v[lo, hi) that is not below gfn. */
static size_t lower_bound(const struct change *v, size_t lo, size_t hi, uint64_t gfn)
{
	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (v[mid].gfn < gfn)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

const struct change *changes_get(const struct changes *c, uint64_t gfn)
{
	for (uint32_t run = c->nr_runs; run-- > 0;) {
		size_t end = run_end(c, run), i;

		/* The common case by far: pages come in ascending order. */
		if (c->v[end - 1].gfn < gfn)
			continue;
		i = lower_bound(c->v, c->starts[run], end, gfn);
		if (c->v[i].gfn == gfn)
			return &c->v[i];
	}
	return NULL;
}

static int reserve(struct change **v, size_t *cap, size_t want)
{
	size_t grown = MAX(*cap * 2, (size_t)CAP_MIN);
	struct change *p;

	if (want <= *cap)
		return 0;
	grown = MAX(grown, want);
	p = realloc(*v, grown * sizeof(**v));
	if (!p)
		return -ENOMEM;
	*v = p;
	*cap = grown;
	return 0;
}

/* The last run into the one before it, from the back: only the last one moves. */
static int merge_last(struct changes *c)
{
	size_t start = c->starts[c->nr_runs - 2], mid = c->starts[c->nr_runs - 1];
	size_t nr_late = c->nr - mid, a = mid, b = nr_late, to = c->nr;

	if (reserve(&c->scratch, &c->cap_scratch, nr_late))
		return -ENOMEM;
	memcpy(c->scratch, c->v + mid, nr_late * sizeof(*c->v));
	while (b) {
		if (a > start && c->v[a - 1].gfn > c->scratch[b - 1].gfn) {
			c->v[--to] = c->v[--a];
			continue;
		}
		a -= a > start && c->v[a - 1].gfn == c->scratch[b - 1].gfn;
		c->v[--to] = c->scratch[--b];
	}
	/* Frames in both leave a gap. */
	memmove(c->v + a, c->v + to, (c->nr - to) * sizeof(*c->v));
	c->nr -= to - a;
	c->nr_runs--;
	return 0;
}

static int merge_short(struct changes *c)
{
	while (c->nr_runs > 1) {
		size_t last = c->nr - c->starts[c->nr_runs - 1];
		size_t before = c->starts[c->nr_runs - 1] - c->starts[c->nr_runs - 2];

		if (before > 2 * last)
			return 0;
		if (merge_last(c))
			return -ENOMEM;
	}
	return 0;
}

int changes_put(struct changes *c, struct change change)
{
	if (reserve(&c->v, &c->cap, c->nr + 1))
		return -ENOMEM;
	if (!c->nr_runs || c->v[c->nr - 1].gfn >= change.gfn) {
		/* The last run is as long as it gets. */
		if (merge_short(c))
			return -ENOMEM;
		c->starts[c->nr_runs++] = c->nr;
	}
	c->v[c->nr++] = change;
	return 0;
}

int changes_sort(struct changes *c)
{
	int r = 0;

	while (!r && c->nr_runs > 1)
		r = merge_last(c);
	return r;
}

int changes_clear(struct changes *c, uint64_t gfn, uint64_t end)
{
	size_t from, to;

	if (changes_sort(c))
		return -ENOMEM;
	if (!c->nr)
		return 0;
	from = lower_bound(c->v, 0, c->nr, gfn);
	to = lower_bound(c->v, from, c->nr, end);
	memmove(c->v + from, c->v + to, (c->nr - to) * sizeof(*c->v));
	c->nr -= to - from;
	c->nr_runs = c->nr != 0;
	return 0;
}
