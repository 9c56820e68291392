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

void each_set_add_host(struct snapd_vm *vm, uint64_t first, uint64_t n)
{
	gpaset_add_range(&vm->dirty, first, n);
	for (struct snapd_consumer *c = vm->consumers; c; c = c->next)
		if (!c->vcpus_only || !vm->kvm_logs)
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

enum reap_what {
	REAP_VCPUS, /* sources[0] alone: the others tell of the VMM */
	REAP_ALL,
	REAP_STOPPED,
};

static int reap_locked(struct snapd_vm *vm, enum reap_what what)
{
	uint64_t begin = now_ns();
	int r = what == REAP_VCPUS ? vm->sources[0]->harvest(vm)
				   : sources_harvest(vm, what == REAP_STOPPED);

	if (r == 0)
		slot_table_pass(&vm->table);
	count(&vm->shm->harvest_ns, now_ns() - begin);
	/* Release: who acquires it finds the bits of this harvest. */
	atomic_fetch_add_explicit(&vm->shm->publish_seq, 1, memory_order_release);
	return MIN(r, 0);
}

static int reap_some(struct snapd_vm *vm, enum reap_what what)
{
	int r;

	pthread_mutex_lock(&vm->harvest_lock);
	r = reap_locked(vm, what);
	pthread_mutex_unlock(&vm->harvest_lock);
	return r;
}

int reap(struct snapd_vm *vm)
{
	return reap_some(vm, REAP_ALL);
}

int reap_vcpus(struct snapd_vm *vm)
{
	return reap_some(vm, REAP_VCPUS);
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
	r = reap_locked(vm, REAP_STOPPED);
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
		reap_locked(vm, REAP_ALL);
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
		if (atomic_exchange(&vm->ring.overran, false))
			vm_log(vm, SNAPD_LOG_WARN,
			       "KVM overran a dirty ring and lost what was in it: all memory "
			       "counts as dirty until the next pause is over");
		if (atomic_load(&vm->tracking_dead) && !told_dead) {
			told_dead = true;
			vm_log(vm, SNAPD_LOG_ERR,
			       "KVM lost count of a dirty ring: no vCPU can go on safely; "
			       "all memory counts as dirty");
		}
	}
	return NULL;
}
