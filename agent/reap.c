/* SPDX-License-Identifier: MIT */
/*
 * reap: sources → sets.  Enter: what the VM's dirty sources know (source.h); leave:
 * bits in every set, and publish_seq.
 *
 * A harvest is under harvest_lock, taken by the harvest thread, by vCPU threads that
 * cannot go on without one, by the connection thread (SYNC, PAUSE) and by whoever takes
 * from a consumer's set.  No holder waits for anything but the kernel.
 *
 * Pacing: a harvest costs the guest a fault for every page that it touches again, so
 * the harvest thread looks far more often than it harvests: only when a source says
 * that it is due.
 */
#include "agent/vm.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

size_t set_bytes(void)
{
	return gpaset_bytes(SNAPD_SHM_FRAMES);
}

void *set_create(struct gpaset *set)
{
	void *p = mmap(NULL, set_bytes(), PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		return NULL;
	gpaset_init(set, p, SNAPD_SHM_FRAMES);
	return p;
}

void each_set_add(struct snapd_vm *vm, uint64_t first, uint64_t n)
{
	gpaset_add_range(&vm->dirty, first, n);
	for (struct snapd_consumer *c = vm->consumers; c; c = c->next)
		gpaset_add_range(&c->set, first, n);
}

void sets_add_range(struct snapd_vm *vm, uint64_t first, uint64_t n)
{
	pthread_rwlock_rdlock(&vm->map_lock);
	each_set_add(vm, first, n);
	pthread_rwlock_unlock(&vm->map_lock);
}

void sets_clear_range(struct snapd_vm *vm, uint64_t first, uint64_t n)
{
	pthread_rwlock_rdlock(&vm->map_lock);
	gpaset_clear_range(&vm->dirty, first, n);
	for (struct snapd_consumer *c = vm->consumers; c; c = c->next)
		gpaset_clear_range(&c->set, first, n);
	pthread_rwlock_unlock(&vm->map_lock);
}

void consumers_add_all(struct snapd_vm *vm)
{
	pthread_rwlock_rdlock(&vm->map_lock);
	for (struct snapd_consumer *c = vm->consumers; c; c = c->next)
		gpaset_add_range(&c->set, 0, frames_end(vm));
	pthread_rwlock_unlock(&vm->map_lock);
}

/* Length of the run of neighbouring frames at the head of frames[]. */
static size_t run_length(const uint64_t *frames, size_t n)
{
	size_t i = 1;

	while (i < n && frames[i] == frames[i - 1] + 1)
		i++;
	return i;
}

static void publish_to(struct gpaset *set, const uint64_t *frames, size_t n)
{
	size_t run;

	for (size_t i = 0; i < n; i += run) {
		run = run_length(frames + i, n - i);
		if (run == 1)
			gpaset_add(set, frames[i]);
		else
			gpaset_add_range(set, frames[i], run);
	}
}

void publish_frames(struct snapd_vm *vm, size_t n)
{
	publish_to(&vm->dirty, vm->frames, n);
	for (struct snapd_consumer *c = vm->consumers; c; c = c->next)
		publish_to(&c->set, vm->frames, n);
	count(&vm->shm->published, n);
}

static int reap_locked(struct snapd_vm *vm, bool stopped)
{
	uint64_t begin = now_ns();
	int r = sources_harvest(vm, stopped);

	if (r == 0)
		slot_table_pass(&vm->table);
	count(&vm->shm->harvest_ns, now_ns() - begin);
	/* Release: who acquires it finds the bits of this harvest. */
	atomic_fetch_add_explicit(&vm->shm->publish_seq, 1, memory_order_release);
	return MIN(r, 0);
}

int reap(struct snapd_vm *vm)
{
	int r;

	pthread_mutex_lock(&vm->harvest_lock);
	r = reap_locked(vm, false);
	pthread_mutex_unlock(&vm->harvest_lock);
	return r;
}

int reap_last(struct snapd_vm *vm)
{
	int r;

	pthread_mutex_lock(&vm->slots_lock);
	if (!ABLATED(LOG_BEFORE_QUIESCE))
		devlogs_collect(vm);
	if (!ABLATED(BACKUP_BEFORE_STATE))
		(void)backup_collect(vm); /* failed: all memory is dirty now */
	pthread_mutex_lock(&vm->harvest_lock);
	r = reap_locked(vm, true);
	pthread_mutex_unlock(&vm->harvest_lock);
	pthread_mutex_unlock(&vm->slots_lock);
	return r;
}

static uint32_t look(struct snapd_vm *vm)
{
	uint32_t fill;

	pthread_mutex_lock(&vm->harvest_lock);
	fill = sources_look(vm);
	if (fill >= 8)
		reap_locked(vm, false);
	pthread_mutex_unlock(&vm->harvest_lock);
	return fill;
}

/* Rings must never fill between two looks: look sooner when a look found much. */
static uint64_t pace(const struct snapd_vm *vm, uint64_t interval, uint32_t fill)
{
	if (fill >= 4)
		interval /= fill >= 8 ? 4 : 2;
	else if (fill <= 1)
		interval += interval / 2;
	interval = MIN(interval, vm->harvest_max_ns);
	return MAX(interval, vm->harvest_min_ns);
}

void *reap_thread(void *arg)
{
	struct snapd_vm *vm = arg;
	uint64_t interval = vm->harvest_min_ns;
	bool told_dead = false;

	while (!atomic_load(&vm->exiting)) {
		struct timespec ts = {(time_t)(interval / 1000000000u),
				      (long)(interval % 1000000000u)};
		struct pollfd p = {vm->harvest_wake, POLLIN, 0};
		uint64_t n;

		if (ppoll(&p, 1, sources_can_fill(vm) ? &ts : NULL, NULL) > 0)
			(void)!read(vm->harvest_wake, &n, sizeof(n));
		interval = pace(vm, interval, look(vm));
		if (atomic_load(&vm->tracking_dead) && !told_dead) {
			told_dead = true;
			vm_log(vm, SNAPD_LOG_ERR,
			       "KVM lost count of a dirty ring: no vCPU can go on safely; "
			       "all memory counts as dirty");
		}
	}
	return NULL;
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
	struct snapd_consumer *c = calloc(1, sizeof(*c));

	*ret = NULL;
	err_clear(&agent_err);
	if (!c)
		return err_set(&agent_err, ENOMEM, "no memory for a consumer");
	c->vm = vm;
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
