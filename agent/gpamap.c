/* SPDX-License-Identifier: MIT */
/*
 * gpamap: which frames are at which GPA of address space 0, for writers that know
 * GPAs only: the VMM's marks, device logs.  Enter: slots that come and go; leave:
 * bits in the sets.  Any thread, under map_lock.
 *
 * Memory that no slot shows is kept under the GPA at which it was last seen
 * (`holes`), so that a mark is never lost between a deletion and the next slot.
 * Several blocks may have been at one GPA: all of them get the mark.
 *
 * A device log has bits by GPA as well.  They mean the memory that is there when the
 * device writes; so they are turned into frames before what is there changes.
 */
#include "agent/vm.h"

#include <string.h>

static void ranges_add(struct snapd_vm *vm, struct range_list *l, struct gpa_range r)
{
	size_t i;

	if (!GROW(l->r, l->nr, l->cap)) {
		vm->map_lossy = true;
		return;
	}
	for (i = l->nr; i && l->r[i - 1].gfn > r.gfn; i--)
		l->r[i] = l->r[i - 1];
	l->r[i] = r;
	l->nr++;
}

/* Remove frames [first, first + n) from every range; a range may fall in two. */
void ranges_drop_frames(struct snapd_vm *vm, struct range_list *l, uint64_t first, uint64_t n)
{
	for (size_t i = 0; i < l->nr;) {
		struct gpa_range r = l->r[i];
		uint64_t end = r.first_frame + r.nr, lo = MAX(first, r.first_frame);
		uint64_t hi = MIN(first + n, end);

		if (lo >= hi) {
			i++;
			continue;
		}
		memmove(&l->r[i], &l->r[i + 1], (--l->nr - i) * sizeof(r));
		if (hi < end)
			ranges_add(vm, l,
				   (struct gpa_range){r.gfn + (hi - r.first_frame), end - hi, hi});
		if (lo > r.first_frame)
			ranges_add(vm, l,
				   (struct gpa_range){r.gfn, lo - r.first_frame, r.first_frame});
	}
}

/* A slot of address space 0 came: its frames are seen here, and in no hole. */
void gpamap_show(struct snapd_vm *vm, const struct view *v)
{
	if (v->m.as_id != 0)
		return;
	pthread_rwlock_wrlock(&vm->map_lock);
	if (!ABLATED(LOG_AFTER_SLOT_CHANGE))
		devlogs_collect_locked(vm);
	for (uint32_t i = 0; i < v->nr_runs; i++) {
		const struct slot_run *r = &v->runs[i];

		ranges_drop_frames(vm, &vm->holes, r->first_frame, r->nr_frames);
		ranges_add(vm, &vm->mapped,
			   (struct gpa_range){(v->m.gpa >> vm->page_shift) + r->offset,
					      r->nr_frames, r->first_frame});
	}
	pthread_rwlock_unlock(&vm->map_lock);
}

static void mapped_remove(struct snapd_vm *vm, uint64_t gfn, uint64_t n)
{
	struct range_list *l = &vm->mapped;
	size_t out = 0;

	for (size_t i = 0; i < l->nr; i++)
		if (l->r[i].gfn < gfn || l->r[i].gfn >= gfn + n)
			l->r[out++] = l->r[i];
	l->nr = out;
}

void gpamap_hide(struct snapd_vm *vm, const struct view *v)
{
	uint64_t gfn = v->m.gpa >> vm->page_shift;

	if (v->m.as_id != 0)
		return;
	pthread_rwlock_wrlock(&vm->map_lock);
	if (!ABLATED(LOG_AFTER_SLOT_CHANGE))
		devlogs_collect_locked(vm);
	mapped_remove(vm, gfn, v->m.size_bytes >> vm->page_shift);
	for (uint32_t i = 0; i < v->nr_runs; i++) {
		const struct slot_run *r = &v->runs[i];

		ranges_drop_frames(vm, &vm->holes, r->first_frame, r->nr_frames);
		ranges_add(vm, &vm->holes,
			   (struct gpa_range){gfn + r->offset, r->nr_frames, r->first_frame});
	}
	pthread_rwlock_unlock(&vm->map_lock);
}

/* The first of the mapped ranges that ends above gfn. */
static size_t mapped_from(const struct range_list *l, uint64_t gfn)
{
	size_t lo = 0, hi = l->nr;

	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (l->r[mid].gfn + l->r[mid].nr <= gfn)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

/* map_lock held: the list of sets stands. */
static uint64_t mark_range(struct snapd_vm *vm, const struct gpa_range *r, uint64_t gfn,
			   uint64_t end)
{
	uint64_t lo = MAX(gfn, r->gfn), hi = MIN(end, r->gfn + r->nr), first;

	if (lo >= hi)
		return 0;
	first = r->first_frame + (lo - r->gfn);
	each_set_add(vm, first, hi - lo);
	return hi - lo;
}

uint64_t gpamap_add_dirty(struct snapd_vm *vm, uint64_t gfn, uint64_t end)
{
	const struct range_list *l = &vm->mapped;
	uint64_t marked = 0;

	if (vm->map_lossy)
		each_set_add(vm, 0, frames_end(vm));
	for (size_t i = mapped_from(l, gfn); i < l->nr && l->r[i].gfn < end; i++)
		marked += mark_range(vm, &l->r[i], gfn, end);
	for (size_t i = 0; i < vm->holes.nr; i++)
		marked += mark_range(vm, &vm->holes.r[i], gfn, end);
	return marked;
}
