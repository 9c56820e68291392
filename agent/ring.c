/* SPDX-License-Identifier: MIT */
/*
 * ring: KVM's dirty rings as a source.  Enter: entries that KVM pushed, one ring per
 * vCPU; leave: bits in every set.
 *
 * Invariant I1, for each round of a harvest: collect → RESET until the counts agree →
 * set the bits.  A frame that someone finds in a set is therefore write-protected
 * again, or was written since and is in a ring again: copying it now loses nothing.
 *
 * RESET costs the guest a fault for every page it touches again, so look() costs one
 * load per ring, and a harvest is due only when a ring is half full.  A vCPU that
 * meets ring-full harvests on its own thread and waits for nobody (I10).
 *
 * A ring that KVM overran (harvest_overrun()) goes on being used.  All frames are suspects then:
 * dirty in each harvest until the next pause has protected them anew.
 *
 * All under harvest_lock, but for attaching and full.
 */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include "agent/vm.h"

#define RING_ENTRIES_MIN  256u
/* Empty RESETs in a row, with entries still to come back, after which KVM is
 * taken to have lost count. */
#define RESET_IDLE_MAX	  100000
#define REMARK_AT	  16
#define ABLATION_RESET_NS 1500000u
#define FULL_IN_VAIN_MAX  200u
#define FULL_WAIT_US	  100u

#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP
#define KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP 225
#endif

/* ---- attaching ---- */

/* DIRTY_LOG_RING without ACQ_REL promises an order only on TSO machines. */
static int ring_capability(struct snapd_vm *vm, uint32_t *cap)
{
	int bytes = vm_check_extension(vm, *cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL);

#ifdef __x86_64__
	if (bytes <= 0)
		bytes = vm_check_extension(vm, *cap = KVM_CAP_DIRTY_LOG_RING);
#endif
	return bytes;
}

bool ring_is_there(struct snapd_vm *vm)
{
	uint32_t cap;

	return ring_capability(vm, &cap) > 0;
}

static int ring_attach(struct snapd_vm *vm, struct err *e)
{
	uint32_t cap, wanted = vm->ring_entries;
	int bytes = ring_capability(vm, &cap), r;

	if (bytes <= 0)
		return err_set(e, ENOTSUP,
			       "this KVM has no dirty ring (KVM_CAP_DIRTY_LOG_RING, Linux 5.11)");
	vm->ring_entries = (uint32_t)bytes / (uint32_t)sizeof(struct kvm_dirty_gfn);
	if (wanted)
		vm->ring_entries = MIN(wanted, vm->ring_entries);
	r = vm_enable_cap(vm, cap, vm->ring_entries * sizeof(struct kvm_dirty_gfn));
	if (r == -EINVAL)
		return err_set(e, EINVAL,
			       "KVM refused the dirty ring: attach before the first "
			       "KVM_CREATE_VCPU, once, with a ring of at least %u entries",
			       RING_ENTRIES_MIN);
	if (r < 0)
		return err_errno(e, -r, "KVM_ENABLE_CAP(dirty ring)");
	/* Where KVM itself writes without a vCPU; must come before the first memslot. */
	if (vm_check_extension(vm, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) > 0)
		vm->backup_bitmap = vm_enable_cap(vm, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 0) >= 0;
	vm->ring.suspects_mem = set_create(&vm->ring.suspects);
	if (!vm->ring.suspects_mem)
		return err_errno(e, errno, "no memory for a set of frames");
	return 0;
}

static void ring_detach(struct snapd_vm *vm)
{
	if (vm->ring.suspects_mem)
		munmap(vm->ring.suspects_mem, set_bytes());
}

static int ring_vcpu_attach(struct snapd_vcpu *v, struct err *e)
{
	struct snapd_vm *vm = v->vm;

	v->ring_bytes = vm->ring_entries * sizeof(struct kvm_dirty_gfn);
	v->ring_map =
		vcpu_map(v, v->ring_bytes, (int64_t)vm->arch->ring_page_offset * vm->page_size);
	if (!v->ring_map)
		return err_errno(e, errno, "vCPU %u: cannot map its dirty ring", v->id);
	v->ring = (struct harvest_ring){.gfns = v->ring_map, .nr = vm->ring_entries};
	return 0;
}

static void ring_vcpu_detach(struct snapd_vcpu *v)
{
	const struct snapd_kvm_ops *k = v->vm->kvm.kvm;

	if (v->ring_map)
		k->munmap(k->opaque, v->ring_map, v->ring_bytes);
}

/* Its backup bitmap goes with a slot.  Failed: all memory is dirty now. */
static void ring_slot_deleting(struct snapd_vm *vm, const struct view *v)
{
	if (!ABLATED(BACKUP_GOES_WITH_SLOT))
		(void)backup_collect_view(vm, v);
}

/* ---- harvesting ---- */

/* What was pushed is known no more, nor what is protected. */
static void ring_overran(struct snapd_vm *vm)
{
	each_set_add(vm, 0, frames_end(vm));
	gpaset_add_range(&vm->ring.suspects, 0, frames_end(vm));
	vm->ring.has_suspects = true;
	atomic_store(&vm->ring.overran, true);
}

static void remark(struct snapd_vm *vm)
{
	for (uint32_t i = 0; i < atomic_load(&vm->nr_vcpus); i++)
		if (harvest_remark(&vm->vcpus[i]->ring, vm->vcpus[i]->collected_from))
			ring_overran(vm);
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
		if (idle == REMARK_AT || idle % 1000 == 999)
			remark(vm);
		if (idle > REMARK_AT)
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

	while (vm->ring.has_suspects &&
	       (n = gpaset_peek(&vm->ring.suspects, frames_end(vm), &cursor, frames, 256)))
		for (size_t i = 0; i < n; i++)
			each_set_add(vm, frames[i], 1);
}

/* What was collected may not have been protected again: nothing is known any more. */
static int ring_died(struct snapd_vm *vm, int code)
{
	if (!atomic_exchange(&vm->tracking_dead, true))
		wake_fd(vm->harvest_wake);
	each_set_add(vm, 0, frames_end(vm));
	return code;
}

static void round_publish(struct snapd_vm *vm, size_t n, const struct harvest_result *res)
{
	publish_frames(vm, n);
	count(&vm->shm->harvested, res->collected);
	if (res->unresolved) {
		each_set_add(vm, 0, frames_end(vm));
		count(&vm->shm->unresolved, res->unresolved);
	}
}

/* One round: fill frames[] from the rings.  *more: some ring was left early. */
static size_t collect(struct snapd_vm *vm, struct harvest_result *res, bool *more)
{
	size_t n = 0;

	*more = false;
	for (uint32_t i = 0; i < atomic_load(&vm->nr_vcpus); i++)
		vm->vcpus[i]->collected_from = vm->vcpus[i]->ring.next;
	for (uint32_t i = 0; i < atomic_load(&vm->nr_vcpus); i++) {
		struct snapd_vcpu *v = vm->vcpus[i];
		uint32_t seen;

		if (!v->budget)
			continue;
		if (harvest_overrun(&v->ring, res))
			ring_overran(vm);
		n += harvest_ring(&v->ring, &vm->table, vm->frames + n, REAP_FRAMES - n, res);
		seen = v->ring.next - v->collected_from;
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
	round_publish(vm, n, res);
	vm->ring.unreset += res->collected;
	vm->ring.unreset_at = now_ns();
	return 0;
}

/* Look again soon while a RESET is due. */
static uint32_t reset_late(struct snapd_vm *vm, uint32_t fill)
{
	bool is_short;

	if (!vm->ring.unreset)
		return fill;
	if (now_ns() - vm->ring.unreset_at >= ABLATION_RESET_NS) {
		ring_reset(vm, vm->ring.unreset, &is_short);
		vm->ring.unreset = 0;
	}
	return MAX(fill, 7u);
}
#else
/* Frames that KVM may have left writable are suspects: dirty in every harvest, until a pause
 * protects everything.  A later RESET of an entry of theirs is no proof: it protects one view of
 * the page, and the one left writable may be another. */
static void suspects_update(struct snapd_vm *vm, size_t n, bool is_short)
{
	if (!is_short || ABLATED(SUSPECTS_FORGOTTEN))
		return;
	for (size_t i = 0; i < n; i++)
		gpaset_add(&vm->ring.suspects, vm->frames[i]);
	vm->ring.has_suspects = n || vm->ring.has_suspects;
}

static uint32_t reset_late(struct snapd_vm *vm, uint32_t fill)
{
	return fill;
}

static int round_finish(struct snapd_vm *vm, size_t n, const struct harvest_result *res)
{
	bool is_short;
	int r = ring_reset(vm, res->collected, &is_short);

	suspects_update(vm, n, is_short);
	round_publish(vm, n, res);
	return r < 0 ? ring_died(vm, r) : 0;
}
#endif

static bool some_are_ahead(const struct snapd_vm *vm)
{
	bool ahead = false;

	for (uint32_t i = 0; i < atomic_load(&vm->nr_vcpus); i++)
		ahead |= vm->vcpus[i]->ring.ahead;
	return ahead;
}

static int ring_harvest(struct snapd_vm *vm)
{
	bool more = true;
	int r = 0;

	if (atomic_load(&vm->tracking_dead)) {
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
	return r >= 0 && (vm->ring.unreset || some_are_ahead(vm)) ? HARVEST_PARTIAL : r;
}

/* Suspects are cured by protecting everything anew, since nothing writes now. */
static int ring_pause(struct snapd_vm *vm)
{
	bool cure = vm->ring.has_suspects;
	int r = cure ? slots_reprotect(vm) : 0;

	if (r < 0)
		ring_died(vm, r); /* a slot may be left without logging */
	r = ring_harvest(vm);
	if (!r) /* nothing runs: until the next look the service need not think that more waits */
		atomic_store_explicit(&vm->shm->pending, 0, memory_order_relaxed);
	if (cure) {
		gpaset_clear(&vm->ring.suspects, frames_end(vm));
		vm->ring.has_suspects = false;
	}
	return r;
}

static void ring_frames_gone(struct snapd_vm *vm, uint64_t first, uint64_t n)
{
	pthread_mutex_lock(&vm->harvest_lock);
	gpaset_clear_range(&vm->ring.suspects, first, n);
	pthread_mutex_unlock(&vm->harvest_lock);
}

/* The fullest ring, in eighths of half a ring. */
static uint32_t ring_look(struct snapd_vm *vm)
{
	uint64_t pending = 0;
	uint32_t fill = 0;

	for (uint32_t i = 0; i < atomic_load(&vm->nr_vcpus); i++) {
		const struct harvest_ring *ring = &vm->vcpus[i]->ring;
		uint32_t ready = harvest_ready(ring, ring->nr / 2);

		pending += ready;
		fill = MAX(fill, ready * 8 / (ring->nr / 2));
	}
	atomic_store_explicit(&vm->shm->pending, pending, memory_order_relaxed);
	return reset_late(vm, fill);
}

/* Harvest here and now, on the vCPU's own thread (I10).  Another thread may have
 * done so since; but in a ring that is full and has nothing KVM is ahead, and one
 * that never moves is dead. */
static int ring_full(struct snapd_vcpu *v)
{
	struct snapd_vm *vm = v->vm;
	uint32_t next;

	count(&vm->shm->ring_full, 1);
	reap(vm);
	pthread_mutex_lock(&vm->harvest_lock);
	next = v->ring.next;
	v->full_in_vain = next == v->full_next ? v->full_in_vain + 1 : 0;
	if (v->full_in_vain && !v->ring.ahead) {
		harvest_ahead(&v->ring);
		ring_overran(vm);
	}
	pthread_mutex_unlock(&vm->harvest_lock);
	v->full_next = next;
	if (v->full_in_vain > FULL_IN_VAIN_MAX) {
		atomic_store(&vm->tracking_dead, true);
		wake_fd(vm->harvest_wake);
	} else if (v->full_in_vain) {
		usleep(FULL_WAIT_US);
	}
	if (atomic_load(&vm->tracking_dead))
		return err_set(&agent_err, EIO, "vCPU %u: its dirty ring is dead (KVM lost count)",
			       v->id);
	return 0;
}

const struct dirty_ops ring_ops = {
	.backend = SNAPD_DIRTY_RING,
	.attach = ring_attach,
	.detach = ring_detach,
	.vcpu_attach = ring_vcpu_attach,
	.vcpu_detach = ring_vcpu_detach,
	.slot_deleting = ring_slot_deleting,
	.frames_gone = ring_frames_gone,
	.look = ring_look,
	.harvest = ring_harvest,
	.pause = ring_pause,
	.full = ring_full,
};
