/* SPDX-License-Identifier: MIT */
/* Figures of VMs: see figures.h. */
#include "snapd/vm/figures.h"

#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"
#include "snapd/vm/priv.h"

#define MS 1000000ull

const uint64_t pause_bounds_ns[HISTOGRAM_BOUNDS] = {
	MS / 10, MS / 4,  MS / 2,  MS,	     5 * MS / 2, 5 * MS,
	10 * MS, 25 * MS, 50 * MS, 100 * MS, 250 * MS,	 1000 * MS,
};
const uint64_t commit_bounds_ns[HISTOGRAM_BOUNDS] = {
	MS / 2,	 MS,	   5 * MS / 2, 5 * MS,	  10 * MS,   25 * MS,
	50 * MS, 100 * MS, 250 * MS,   1000 * MS, 5000 * MS, 30000 * MS,
};
const uint64_t epoch_bounds_bytes[HISTOGRAM_BOUNDS] = {
	1ull << 14, 1ull << 16, 1ull << 18, 1ull << 20, 1ull << 22, 1ull << 24,
	1ull << 26, 1ull << 28, 1ull << 30, 1ull << 32, 1ull << 34, 1ull << 36,
};

void histogram_add(struct histogram *h, const uint64_t bounds[HISTOGRAM_BOUNDS], uint64_t value)
{
	int i = 0;

	while (i < HISTOGRAM_BOUNDS && value > bounds[i])
		i++;
	h->count[i]++;
	h->sum += value;
}

uint64_t histogram_count(const struct histogram *h)
{
	uint64_t n = 0;

	for (int i = 0; i <= HISTOGRAM_BOUNDS; i++)
		n += h->count[i];
	return n;
}

uint64_t vm_loss_ns(const struct vm_loss *from, const struct vm_loss *to, uint32_t nr_vcpus,
		    uint64_t fault_ns)
{
	uint64_t by_one = 0, harvests = to->harvests - from->harvests;

	if (to->paused_ns < from->paused_ns || to->published < from->published ||
	    to->ring_full < from->ring_full || to->harvests < from->harvests ||
	    to->harvest_ns < from->harvest_ns)
		return 0;
	if (harvests)
		by_one = (to->harvest_ns - from->harvest_ns) / harvests *
			 MIN(to->ring_full - from->ring_full, harvests);
	by_one += (to->published - from->published) * fault_ns;
	return to->paused_ns - from->paused_ns + by_one / MAX(nr_vcpus, 1u);
}

static void fill(struct vm *vm, struct vm_figures *f)
{
	const struct vm_pub *pub = &vm->pub;

	pthread_mutex_lock(&vm->lock);
	*f = (struct vm_figures){
		.uid = vm->uid,
		.nr_vcpus = pub->nr_vcpus,
		.page_size = pub->page_size,
		.nr_queued = vm->nr_queued,
		.ready = vm->state == VM_READY,
		.broken = pub->broken,
		.ram_bytes = pub->ram_frames * pub->page_size,
		.snapshots = pub->snapshots,
		.failures = pub->failures,
		.self_checks = pub->self_checks,
		.missed_pages = pub->missed_pages,
		.pause = pub->pause,
		.epochs = pub->epochs,
		.lost_ns = pub->lost_ns,
	};
	memcpy(f->name, vm->name, sizeof(f->name));
	if (vm->shm.map)
		vm_shm_stats(&vm->shm, pub->frames_end, &f->agent);
	pthread_mutex_unlock(&vm->lock);
}

int vm_list_figures(struct daemon *d, uint32_t view, struct vm_figures **ret, size_t *nr)
{
	size_t all = 0;

	pthread_mutex_lock(&d->vms_lock);
	for (struct vm *v = d->vms; v; v = v->next)
		all++;
	*nr = 0;
	*ret = calloc(all + 1, sizeof(**ret));
	for (struct vm *v = d->vms; *ret && v; v = v->next)
		if (v->claimed && (!view || v->uid == view))
			fill(v, &(*ret)[(*nr)++]);
	pthread_mutex_unlock(&d->vms_lock);
	return *ret ? 0 : -ENOMEM;
}
