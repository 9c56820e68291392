/* SPDX-License-Identifier: MIT */
/*
 * Which frames a push looks at: all of the snapshot's pieces, or those that changed since the
 * base, as runs ascending by GFN; see push.h.  Out of streams of maps (mapstream.h), so that
 * memory does not grow with the VM.  What a base's map cannot tell, since it is damaged or gone, is
 * no error: it is found before anything is sent, and then all frames are looked at.
 */
#include "snapd/backup/push_impl.h"

#include <errno.h>

#include "snapd/store/overlay.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"

/* The next run of a stream, when the last one is used up. */
static int refill(struct mapstream *m, struct manifest_run *run, struct err *e)
{
	int rc = run->len ? 1 : mapstream_next(m, run, e);

	return MIN(rc, 0);
}

static struct manifest_run take(struct manifest_run *run, uint64_t nr)
{
	struct manifest_run ret = *run;

	ret.len = nr;
	*run = run_from(*run, run->gfn + nr);
	return ret;
}

/* All of the pieces; each of their frames is in the map. */
static int next_of_all(struct push *p, struct manifest_run *ret, struct err *e)
{
	struct push_frames *f = &p->frames;
	const struct contents *c = &p->c;
	uint64_t gfn, end;
	int rc;

	if (f->piece == c->nr_pieces)
		return 0;
	gfn = c->pieces[f->piece].home_gfn + f->page;
	end = c->pieces[f->piece].home_gfn + c->pieces[f->piece].nr_pages;
	while (!(rc = refill(f->now, &f->run, e)) && f->run.len && f->run.gfn < gfn)
		take(&f->run, MIN(f->run.len, gfn - f->run.gfn));
	if (rc)
		return rc;
	if (!f->run.len || f->run.gfn > gfn)
		return err_set(e, E_CORRUPT, "no page is recorded for GPA 0x%llx",
			       (unsigned long long)gfn * c->snap.page_size);
	*ret = take(&f->run, MIN(f->run.len, end - gfn));
	f->page += ret->len;
	if (gfn + ret->len == end) {
		f->piece++;
		f->page = 0;
	}
	return 1;
}

/* The next frames that both maps tell of alike or otherwise, or one alone does.  1: *ret; 0 at the
 * end of both. */
static int compare_step(struct push_frames *f, struct manifest_run *ret, bool *same, struct err *e)
{
	struct manifest_run *a = &f->run, *b = &f->base_run;
	int rc = refill(f->now, a, e);

	if (!rc)
		rc = refill(f->base, b, e);
	if (rc || (!a->len && !b->len))
		return rc;
	*same = false;
	if (a->len && (!b->len || a->gfn < b->gfn)) {
		*ret = take(a, b->len ? MIN(a->len, b->gfn - a->gfn) : a->len);
	} else if (!a->len || b->gfn < a->gfn) {
		*ret = take(b, a->len ? MIN(b->len, a->gfn - b->gfn) : b->len);
		ret->loc = MANIFEST_GONE;
	} else {
		*ret = take(a, MIN(a->len, b->len));
		*same = take(b, ret->len).loc == ret->loc;
	}
	return 1;
}

/* *ret is left alone at the end: what is alike is nobody's. */
static int next_of_both(struct push *p, struct manifest_run *ret, struct err *e)
{
	struct manifest_run run;
	bool same;
	int rc;

	do
		rc = compare_step(&p->frames, &run, &same, e);
	while (rc == 1 && same);
	if (rc == 1)
		*ret = run;
	return rc;
}

int push_next_frames(struct push *p, struct manifest_run *ret, struct err *e)
{
	if (!p->base)
		return next_of_all(p, ret, e);
	if (p->frames.base)
		return next_of_both(p, ret, e);
	return mapstream_next(p->frames.now, ret, e);
}

/* ---- streams ---- */

static void close_streams(struct push_frames *f)
{
	mapstream_close(f->now);
	mapstream_close(f->base);
	f->now = f->base = NULL;
	f->run = f->base_run = (struct manifest_run){0};
	f->piece = 0;
	f->page = 0;
}

static int open_streams(struct push *p, struct err *e)
{
	struct push_frames *f = &p->frames;
	const struct snapd_point *since = p->base && !f->compare ? &f->base_point : NULL;
	int rc = mapstream_open(p->store, p->c.snap.point, since, MAPSTREAM_BYTES, &f->now, e);

	if (!rc && f->compare)
		rc = mapstream_open(p->store, f->base_point, NULL, MAPSTREAM_BYTES, &f->base, e);
	return rc;
}

void push_close_frames(struct push *p)
{
	close_streams(&p->frames);
	if (p->frames.compare)
		store_unpin(p->store, p->frames.base_point);
	p->frames.compare = false;
}

/* How many there are; and all that tells so is whole. */
static int count_frames(struct push *p, struct err *e)
{
	struct manifest_run run = {0};
	int rc = open_streams(p, e);

	p->nr_frames = 0;
	while (!rc && (rc = push_next_frames(p, &run, e)) == 1) {
		p->nr_frames += run.len;
		rc = push_cancelled(p, e);
	}
	close_streams(&p->frames);
	return rc;
}

/* Use the base that was found, by what the epochs since then changed or by comparing both maps. */
static int try_base(struct push *p, const struct manifest *base, struct snapd_point at,
		    bool compare, struct err *e)
{
	struct err why = {0};
	int rc = compare ? store_pin(p->store, at, &why) : 0;

	if (rc)
		return 0;
	p->base = base;
	p->frames.base_point = at;
	p->frames.compare = compare;
	rc = count_frames(p, &why);
	if (!rc)
		return 0;
	push_close_frames(p);
	p->base = NULL;
	if (rc == -ECANCELED || rc == -ENOMEM)
		return err_set(e, -rc, "%s", why.text);
	log_notice("backup: all memory of %s@%llu is looked at: %s", p->c.snap.vm_name,
		   (unsigned long long)p->c.snap.id, why.text);
	return 0;
}

int push_open_frames(struct push *p, struct err *e)
{
	struct push_base b;
	int rc = push_find_ancestor(p, &b, e);

	if (!rc && b.manifest)
		rc = try_base(p, b.manifest, b.point, false, e);
	if (!rc && !p->base) {
		push_find_relative(p, &b);
		if (b.manifest)
			rc = try_base(p, b.manifest, b.point, true, e);
	}
	if (rc)
		return rc;
	if (!p->base)
		p->nr_frames = p->c.nr_pages;
	return open_streams(p, e);
}
