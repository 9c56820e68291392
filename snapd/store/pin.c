/* SPDX-License-Identifier: MIT */
/*
 * What must not go while gc runs: points that become needed meanwhile (G1 of gc.c),
 * and points that readers pinned.  Any thread, under roots_lock.
 */
#include "snapd/store/internal.h"

int gc_note_root(struct store *s, struct snapd_point at)
{
	if (!s->gc_active || !at.timeline)
		return 0;
	if (s->nr_gc_new == s->cap_gc_new) {
		size_t cap = s->cap_gc_new ? s->cap_gc_new * 2 : 16;
		struct snapd_point *p = realloc(s->gc_new, cap * sizeof(*p));

		if (!p)
			return -ENOMEM;
		s->gc_new = p;
		s->cap_gc_new = cap;
	}
	s->gc_new[s->nr_gc_new++] = at;
	return 0;
}

int store_pin(struct store *s, struct snapd_point at, struct err *e)
{
	struct pin *pin = calloc(1, sizeof(*pin));
	struct snapd_point epoch = at;
	struct rec_epoch rec;
	struct ix_txn t;
	int r;

	if (!pin)
		return err_errno(e, ENOMEM, "store");
	pin->at = at;
	scoped_lock(&s->roots_lock);
	r = index_begin(s->index, &t, e);
	if (!r) {
		r = store_epoch_record(&t, &epoch, &rec, e);
		index_end(&t);
	}
	if (r >= 0 && gc_note_root(s, at))
		r = err_errno(e, ENOMEM, "store");
	if (r < 0) {
		free(pin);
		return r;
	}
	pin->next = s->pins;
	s->pins = pin;
	return 0;
}

void store_unpin(struct store *s, struct snapd_point at)
{
	scoped_lock(&s->roots_lock);

	for (struct pin **p = &s->pins; *p; p = &(*p)->next) {
		struct pin *pin = *p;

		if (pin->at.timeline != at.timeline || pin->at.epoch != at.epoch)
			continue;
		*p = pin->next;
		free(pin);
		return;
	}
	assert(!"a pin is there");
}
