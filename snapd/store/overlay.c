/* SPDX-License-Identifier: MIT */
/* Sorted runs of layers as one sequence; see overlay.h. */
#include "snapd/store/overlay.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#include "snapd/util/cleanup.h"

struct overlay_layer {
	void *arg;		 /* borrowed */
	struct manifest_run run; /* the current one, whole */
};

static uint64_t end_of(const struct overlay *o, uint32_t rank)
{
	return o->layers[rank].run.gfn + o->layers[rank].run.len;
}

/* ---- heaps of ranks ---- */

typedef bool (*before_fn)(const struct overlay *o, uint32_t a, uint32_t b);

static bool begins_before(const struct overlay *o, uint32_t a, uint32_t b)
{
	return o->layers[a].run.gfn < o->layers[b].run.gfn;
}

static bool is_above(const struct overlay *o, uint32_t a, uint32_t b)
{
	return a < b;
}

static void heap_push(const struct overlay *o, uint32_t *heap, uint32_t *nr, uint32_t rank,
		      before_fn before)
{
	uint32_t i = (*nr)++;

	for (; i && before(o, rank, heap[(i - 1) / 2]); i = (i - 1) / 2)
		heap[i] = heap[(i - 1) / 2];
	heap[i] = rank;
}

static uint32_t heap_pop(const struct overlay *o, uint32_t *heap, uint32_t *nr, before_fn before)
{
	uint32_t top = heap[0], last = heap[--*nr], i = 0, child;

	for (; (child = 2 * i + 1) < *nr; i = child) {
		if (child + 1 < *nr && before(o, heap[child + 1], heap[child]))
			child++;
		if (!before(o, heap[child], last))
			break;
		heap[i] = heap[child];
	}
	heap[i] = last;
	return top;
}

/* ---- layers ---- */

/* The layer's next run that is not over, into the heap where it belongs. */
static int advance(struct overlay *o, uint32_t rank, struct err *e)
{
	struct overlay_layer *l = &o->layers[rank];
	int rc;

	do {
		rc = o->fn(l->arg, &l->run, e);
		if (rc <= 0)
			return rc;
	} while (l->run.gfn + l->run.len <= o->gfn);
	if (l->run.gfn > o->gfn)
		heap_push(o, o->waiting, &o->nr_waiting, rank, begins_before);
	else
		heap_push(o, o->at_hand, &o->nr_at_hand, rank, is_above);
	return 0;
}

int overlay_init(struct overlay *o, overlay_fn fn, void *const *layers, uint32_t nr, struct err *e)
{
	int rc = 0;

	*o = (struct overlay){.fn = fn,
			      .layers = calloc(nr + 1, sizeof(*o->layers)),
			      .waiting = calloc(nr + 1, sizeof(*o->waiting)),
			      .at_hand = calloc(nr + 1, sizeof(*o->at_hand))};
	if (!o->layers || !o->waiting || !o->at_hand)
		rc = err_errno(e, ENOMEM, "laying maps over each other");
	for (uint32_t i = 0; !rc && i < nr; i++) {
		o->layers[i].arg = layers[i];
		rc = advance(o, i, e);
	}
	if (rc)
		overlay_deinit(o);
	return rc;
}

void overlay_deinit(struct overlay *o)
{
	free(o->layers);
	free(o->waiting);
	free(o->at_hand);
	*o = (struct overlay){0};
}

/* Go to where the next run is; 0: there is none. */
static int find_top(struct overlay *o, struct err *e)
{
	for (;;) {
		if (!o->nr_at_hand) {
			if (!o->nr_waiting)
				return 0;
			o->gfn = o->layers[o->waiting[0]].run.gfn;
		}
		while (o->nr_waiting && o->layers[o->waiting[0]].run.gfn <= o->gfn)
			heap_push(o, o->at_hand, &o->nr_at_hand,
				  heap_pop(o, o->waiting, &o->nr_waiting, begins_before), is_above);
		if (end_of(o, o->at_hand[0]) > o->gfn)
			return 1;
		int rc = advance(o, heap_pop(o, o->at_hand, &o->nr_at_hand, is_above), e);

		if (rc)
			return rc;
	}
}

int overlay_next(struct overlay *o, struct manifest_run *ret, struct err *e)
{
	int rc = find_top(o, e);
	uint64_t end;

	if (rc <= 0)
		return rc;
	end = end_of(o, o->at_hand[0]);
	if (o->nr_waiting)
		end = MIN(end, o->layers[o->waiting[0]].run.gfn);
	*ret = run_from(o->layers[o->at_hand[0]].run, o->gfn);
	ret->len = end - o->gfn;
	assert(ret->len);
	o->gfn = end;
	return 1;
}
