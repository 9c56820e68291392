/* SPDX-License-Identifier: MIT */
/*
 * reap: rings → sets.  Enter: entries that KVM pushed; leave: bits in every set.
 *
 * Invariant I1, for each round of a harvest: collect → RESET until the counts
 * agree → set the bits → publish_seq.  A frame that someone finds in a set is
 * therefore write-protected again, or was written since and is in a ring again:
 * copying it now loses nothing.
 *
 * Everything here is under harvest_lock, taken by the harvest thread, by vCPU
 * threads that met ring-full, by the connection thread (SYNC, PAUSE) and by
 * whoever takes from a consumer's set.  No holder waits for anything but KVM.
 *
 * Pacing: a RESET costs the guest a fault for every page it touches again, so
 * the harvest thread looks (one load per ring) far more often than it harvests:
 * only when a ring is half full.
 */
#include "agent/vm.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* Empty RESETs in a row, with entries still to come back, after which KVM is
 * taken to have lost count. */
#define RESET_IDLE_MAX	  100000
#define ABLATION_RESET_NS 1500000u

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

static void publish(struct snapd_vm *vm, size_t n, const struct harvest_result *res)
{
	publish_to(&vm->dirty, vm->frames, n);
	for (struct snapd_consumer *c = vm->consumers; c; c = c->next)
		publish_to(&c->set, vm->frames, n);
	count(&vm->shm->harvested, res->collected);
	count(&vm->shm->published, n);
	if (res->unresolved) {
		each_set_add(vm, 0, frames_end(vm));
		count(&vm->shm->unresolved, res->unresolved);
	}
}

/* RESET until `want` entries came back.  *is_short: it took more than one call. */
static int reset_all(struct snapd_vm *vm, uint64_t want, bool *is_short)
{
	uint64_t done = 0;
	int idle = 0, r;

	*is_short = false;
	while (done < want) {
		r = vm_ioctl(vm, KVM_RESET_DIRTY_RINGS, NULL);
		if (r < 0 && r != -EINTR && r != -EAGAIN)
			return r;
		done += (uint64_t)MAX(r, 0);
		*is_short |= done < want;
		idle = r > 0 ? 0 : idle + 1;
		if (idle > RESET_IDLE_MAX)
			return -EIO;
		if (idle > 16)
			sched_yield();
	}
	count(&vm->shm->reset, done);
	return 0;
}

/* A RESET that a signal cuts short counts entries whose pages it has not protected
 * (tests/kernel/ring_reset_signal.c): so no signal, but for those that cannot be
 * blocked. */
static int ring_reset(struct snapd_vm *vm, uint64_t want, bool *is_short)
{
	sigset_t all, old;
	int r;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	r = reset_all(vm, want, is_short);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return r;
}

static void suspects_publish(struct snapd_vm *vm)
{
	uint64_t cursor = 0, frames[256];
	size_t n;

	while (vm->has_suspects &&
	       (n = gpaset_peek(&vm->suspects, frames_end(vm), &cursor, frames, 256)))
		for (size_t i = 0; i < n; i++)
			each_set_add(vm, frames[i], 1);
}

/* What was collected may not have been protected again: nothing is known any more. */
static int ring_died(struct snapd_vm *vm, int code)
{
	if (!atomic_exchange(&vm->ring_dead, true))
		wake_fd(vm->harvest_wake);
	each_set_add(vm, 0, frames_end(vm));
	return code;
}

/* One round: fill frames[] from the rings.  *more: some ring was left early. */
static size_t collect(struct snapd_vm *vm, struct harvest_result *res, bool *more)
{
	size_t n = 0;

	*more = false;
	for (uint32_t i = 0; i < atomic_load(&vm->nr_vcpus); i++) {
		struct snapd_vcpu *v = vm->vcpus[i];
		uint32_t from = v->ring.next, seen;

		if (!v->budget)
			continue;
		n += harvest_ring(&v->ring, &vm->table, vm->frames + n, REAP_FRAMES - n, res);
		seen = v->ring.next - from;
		*more = n == REAP_FRAMES;
		v->budget = *more && seen < v->budget ? v->budget - seen : 0;
		if (*more)
			break;
	}
	return n;
}

#ifdef SNAPD_ABLATION_COPY_BEFORE_RESET
/* What I1 forbids: frames go out while their pages are still writable. */
static int round_finish(struct snapd_vm *vm, size_t n, const struct harvest_result *res)
{
	publish(vm, n, res);
	vm->unreset += res->collected;
	vm->unreset_at = now_ns();
	return 0;
}

static void reset_late(struct snapd_vm *vm)
{
	bool is_short;

	if (!vm->unreset || now_ns() - vm->unreset_at < ABLATION_RESET_NS)
		return;
	ring_reset(vm, vm->unreset, &is_short);
	vm->unreset = 0;
}
#else
/* Frames that KVM may have left writable are suspects: dirty in every harvest,
 * until a RESET that was not cut short protects them, or a pause does. */
static void suspects_update(struct snapd_vm *vm, size_t n, bool is_short)
{
	if (!is_short && !vm->has_suspects)
		return;
	for (size_t i = 0; i < n; i++) {
		if (is_short)
			gpaset_add(&vm->suspects, vm->frames[i]);
		else
			gpaset_clear_range(&vm->suspects, vm->frames[i], 1);
	}
	vm->has_suspects = gpaset_count(&vm->suspects, frames_end(vm)) > 0;
}

static void reset_late(struct snapd_vm *vm)
{
}

static int round_finish(struct snapd_vm *vm, size_t n, const struct harvest_result *res)
{
	bool is_short;
	int r = ring_reset(vm, res->collected, &is_short);

	suspects_update(vm, n, is_short);
	publish(vm, n, res);
	return r < 0 ? ring_died(vm, r) : 0;
}
#endif

static int reap_locked(struct snapd_vm *vm)
{
	uint64_t begin = now_ns();
	bool more = true;
	int r = 0;

	if (atomic_load(&vm->ring_dead)) {
		each_set_add(vm, 0, frames_end(vm));
		return -EIO;
	}
	/* No further than one ring's length each: running vCPUs could keep us here. */
	for (uint32_t i = 0; i < atomic_load(&vm->nr_vcpus); i++)
		vm->vcpus[i]->budget = vm->vcpus[i]->ring.nr;
	while (more && r >= 0) {
		struct harvest_result res = {0};
		size_t n = collect(vm, &res, &more);

		if (res.collected)
			r = round_finish(vm, n, &res);
	}
	suspects_publish(vm);
	if (r >= 0 && !vm->unreset)
		slot_table_pass(&vm->table);
	count(&vm->shm->harvest_ns, now_ns() - begin);
	atomic_fetch_add_explicit(&vm->shm->publish_seq, 1, memory_order_release);
	return r;
}

int reap(struct snapd_vm *vm)
{
	int r;

	pthread_mutex_lock(&vm->harvest_lock);
	r = reap_locked(vm);
	pthread_mutex_unlock(&vm->harvest_lock);
	return r;
}

/* vCPUs stopped: protect everything anew, then no frame is suspect any more. */
int reap_last(struct snapd_vm *vm)
{
	bool cure;
	int r;

	pthread_mutex_lock(&vm->slots_lock);
	devlogs_collect(vm);
	(void)backup_collect(vm); /* failed: all memory is dirty now */
	cure = vm->has_suspects;
	r = cure ? slots_reprotect(vm) : 0;
	pthread_mutex_lock(&vm->harvest_lock);
	if (r < 0)
		ring_died(vm, r); /* a slot may be left without logging */
	r = reap_locked(vm);
	if (cure) {
		gpaset_clear(&vm->suspects, frames_end(vm));
		vm->has_suspects = false;
	}
	pthread_mutex_unlock(&vm->harvest_lock);
	pthread_mutex_unlock(&vm->slots_lock);
	return r;
}

/* How full the fullest ring is, in eighths of half a ring; harvests at 8. */
static uint32_t look(struct snapd_vm *vm)
{
	uint64_t pending = 0;
	uint32_t fill = 0;

	pthread_mutex_lock(&vm->harvest_lock);
	for (uint32_t i = 0; i < atomic_load(&vm->nr_vcpus); i++) {
		const struct harvest_ring *ring = &vm->vcpus[i]->ring;
		uint32_t ready = harvest_ready(ring, ring->nr / 2);

		pending += ready;
		fill = MAX(fill, ready * 8 / (ring->nr / 2));
	}
	atomic_store_explicit(&vm->shm->pending, pending, memory_order_relaxed);
	if (fill >= 8)
		reap_locked(vm);
	reset_late(vm);
	pthread_mutex_unlock(&vm->harvest_lock);
	return fill;
}

/* Rings must never fill between two looks: look sooner when a look found much. */
static uint64_t pace(const struct snapd_vm *vm, uint64_t interval, uint32_t fill)
{
	if (vm->unreset)
		return vm->harvest_min_ns;
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

		if (ppoll(&p, 1, &ts, NULL) > 0)
			(void)!read(vm->harvest_wake, &n, sizeof(n));
		interval = pace(vm, interval, look(vm));
		if (atomic_load(&vm->ring_dead) && !told_dead) {
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
		for (size_t i = 0; i < got; i++)
			gfns[n + i] = p.home_gfn + (gfns[n + i] - p.first_frame);
		consumer->next_gfn = p.home_gfn + (cursor - p.first_frame);
		n += got;
	}
	return (long)n;
}
