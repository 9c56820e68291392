/* SPDX-License-Identifier: MIT */
/*
 * consumer: sets of dirty frames of the VMM's own, beside the service's.  Enter: what every
 * harvest publishes (reap.c); leave: GFNs, or a slot's bitmap.  Any thread.
 *
 * A frame is taken out of one consumer's set by that consumer alone.  A new one has
 * everything to look at.  After a rollback everything is dirty for all of them: they
 * never saw what the service wrote.
 */
#include "agent/vm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define TAKE_FRAMES 512u

void consumers_add_all(struct snapd_vm *vm)
{
	pthread_rwlock_rdlock(&vm->map_lock);
	for (struct snapd_consumer *c = vm->consumers; c; c = c->next)
		gpaset_add_range(&c->set, 0, frames_end(vm));
	pthread_rwlock_unlock(&vm->map_lock);
}

static void consumer_link(struct snapd_vm *vm, struct snapd_consumer *c)
{
	pthread_mutex_lock(&vm->slots_lock); /* no piece is born meanwhile */
	pthread_rwlock_wrlock(&vm->map_lock);
	pthread_mutex_lock(&vm->harvest_lock);
	if (!ABLATED(NEWCOMER_CLEAN))
		gpaset_add_range(&c->set, 0, frames_end(vm));
	c->next = vm->consumers;
	vm->consumers = c;
	pthread_mutex_unlock(&vm->harvest_lock);
	pthread_rwlock_unlock(&vm->map_lock);
	pthread_mutex_unlock(&vm->slots_lock);
}

int snapd_consumer_create(struct snapd_vm *vm, const char *name, struct snapd_consumer **ret)
{
	return snapd_consumer_create_for(vm, name, 0, ret);
}

int snapd_consumer_create_for(struct snapd_vm *vm, const char *name, uint32_t flags,
			      struct snapd_consumer **ret)
{
	struct snapd_consumer *c;

	*ret = NULL;
	err_clear(&agent_err);
	if (flags & ~SNAPD_CONSUMER_VCPUS)
		return err_set(&agent_err, EINVAL, "unknown consumer flags 0x%x", flags);
	c = calloc(1, sizeof(*c));
	if (!c)
		return err_set(&agent_err, ENOMEM, "no memory for a consumer");
	c->vm = vm;
	c->vcpus_only = flags & SNAPD_CONSUMER_VCPUS;
	strncpy(c->name, name ? name : "", sizeof(c->name) - 1);
	c->mem = set_create(&c->set);
	if (!c->mem) {
		free(c);
		return err_errno(&agent_err, errno, "no memory for a consumer's set");
	}
	consumer_link(vm, c);
	*ret = c;
	return 0;
}

void consumer_free(struct snapd_consumer *c)
{
	munmap(c->mem, set_bytes());
	free(c);
}

void snapd_consumer_destroy(struct snapd_consumer *consumer)
{
	struct snapd_consumer **p;
	struct snapd_vm *vm;

	if (!consumer)
		return;
	vm = consumer->vm;
	pthread_rwlock_wrlock(&vm->map_lock);
	pthread_mutex_lock(&vm->harvest_lock);
	for (p = &vm->consumers; *p && *p != consumer;)
		p = &(*p)->next;
	if (*p)
		*p = consumer->next;
	pthread_mutex_unlock(&vm->harvest_lock);
	pthread_rwlock_unlock(&vm->map_lock);
	consumer_free(consumer);
}

/* The piece with the lowest home GFN that ends above `gfn`. */
static bool next_piece(struct snapd_vm *vm, uint64_t gfn, struct piece *ret)
{
	const struct piece *best = NULL;

	pthread_mutex_lock(&vm->slots_lock);
	for (size_t i = 0; i < vm->nr_pieces; i++) {
		const struct piece *p = &vm->pieces[i];

		if (!p->gone && p->home_gfn + p->nr_frames > gfn &&
		    (!best || p->home_gfn < best->home_gfn))
			best = p;
	}
	if (best)
		*ret = *best;
	pthread_mutex_unlock(&vm->slots_lock);
	return best;
}

long snapd_consumer_take(struct snapd_consumer *consumer, uint64_t *gfns, size_t max, int again)
{
	struct piece p;
	size_t n = 0, got;

	if (!again) {
		consumer->next_gfn = 0;
		devlogs_collect(consumer->vm);
		reap(consumer->vm);
	}
	while (n < max && next_piece(consumer->vm, consumer->next_gfn, &p)) {
		uint64_t skip = consumer->next_gfn > p.home_gfn ? consumer->next_gfn - p.home_gfn
								: 0;
		uint64_t cursor = p.first_frame + skip;

		got = gpaset_take(&consumer->set, NULL, p.first_frame + p.nr_frames, &cursor,
				  gfns + n, max - n);
		for (size_t i = 0; i < got && ABLATED(CONSUMERS_SHARE); i++)
			sets_clear_range(consumer->vm, gfns[n + i], 1);
		for (size_t i = 0; i < got; i++)
			gfns[n + i] = p.home_gfn + (gfns[n + i] - p.first_frame);
		consumer->next_gfn = p.home_gfn + (cursor - p.first_frame);
		n += got;
	}
	return (long)n;
}

/* ---- by slot ---- */

static void run_take(struct snapd_consumer *c, const struct slot_run *run, uint8_t *bitmap)
{
	uint64_t frames[TAKE_FRAMES], cursor = run->first_frame;
	size_t n;

	while ((n = gpaset_take(&c->set, NULL, run->first_frame + run->nr_frames, &cursor, frames,
				TAKE_FRAMES)))
		for (size_t i = 0; i < n; i++) {
			uint64_t page = run->offset + (frames[i] - run->first_frame);

			bitmap[page / 8] |= (uint8_t)(1u << page % 8);
		}
}

static int slot_take(struct snapd_consumer *c, uint32_t as_id, uint32_t slot, uint8_t *bitmap,
		     size_t bitmap_bytes)
{
	const struct view *v = view_find(c->vm, as_id, slot);

	if (!v || v->m.flags & SNAPD_SLOT_READONLY)
		return err_set(&agent_err, ENOENT, "no slot %u that is logged", slot);
	if (bitmap_bytes < DIV_ROUND_UP(v->m.size_bytes >> c->vm->page_shift, 8u))
		return err_set(&agent_err, EINVAL, "slot %u: a bitmap of %zu bytes is too short",
			       slot, bitmap_bytes);
	for (uint32_t i = 0; i < v->nr_runs; i++)
		run_take(c, &v->runs[i], bitmap);
	return 0;
}

int snapd_consumer_take_slot(struct snapd_consumer *consumer, uint32_t as_id, uint32_t slot,
			     void *bitmap, size_t bitmap_bytes)
{
	struct snapd_vm *vm = consumer->vm;
	int r;

	err_clear(&agent_err);
	if (consumer->vcpus_only)
		reap_vcpus(vm);
	else
		reap(vm);
	pthread_mutex_lock(&vm->slots_lock);
	r = slot_take(consumer, as_id, slot, bitmap, bitmap_bytes);
	pthread_mutex_unlock(&vm->slots_lock);
	return r;
}
