/* SPDX-License-Identifier: MIT */
/*
 * dirtylog: KVM's dirty bitmap as a source, for hosts without the ring.  Enter: a bit
 * per page and memslot, set by KVM, whoever wrote through it; leave: bits in every set.
 *
 * With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (Linux 5.2) GET copies the bitmap and changes
 * nothing, CLEAR clears the bits it is given and write-protects their pages.  Without,
 * GET does all of it at once.
 *
 * Invariants
 *   L1  get → clear → publish → copy.  A page copied before its CLEAR may be written
 *       again without a fault, and its one bit is then cleared.
 *   L2  CLEAR gets exactly the bits that the GET before it returned, and once: any other
 *       bit belongs to a write that nobody has been told of.  Therefore one owner; all
 *       consumers get what it finds (I2).
 *   L3  A slot's bitmap goes with the slot: the last GET is before its deletion, and
 *       every vCPU is out of the guest from before that GET until the slot is gone.
 *       One in the VMM's code need not park: it does so before it enters the guest.
 *
 * KVM wants ranges that begin at a multiple of 64 pages, and end at one or with the
 * slot.  One CLEAR per slot and harvest, from the first word with a bit to the last:
 * each one ends in a flush of every vCPU's TLB.
 *
 * With INITIALLY_SET a new slot has every bit set and nothing protected: the first
 * round takes it whole, and only its CLEAR protects.
 *
 * A bitmap cannot overflow, so nobody looks at it between harvests.  Costs a copy of the
 * bitmap, 32 KiB per GiB, whatever was written.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent/vm.h"

#define LEAVE_GUEST_MS 1000u

static int log_attach(struct snapd_vm *vm, struct err *e)
{
	uint64_t want = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
	int has = vm_check_extension(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2), r;

	if (vm->log.initially_set)
		want |= KVM_DIRTY_LOG_INITIALLY_SET;
	vm->ring_entries = 0;
	vm->log.get_clears = !(has & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
	if (vm->log.initially_set && !(has & KVM_DIRTY_LOG_INITIALLY_SET))
		return err_set(e, ENOTSUP,
			       "this KVM has no KVM_DIRTY_LOG_INITIALLY_SET (Linux 5.7)");
	if (vm->log.get_clears)
		return 0;
	r = vm_enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, want);
	return r < 0 ? err_errno(e, -r, "KVM_ENABLE_CAP(manual dirty log protect)") : 0;
}

static void log_detach(struct snapd_vm *vm)
{
	for (size_t i = 0; i < vm->log.nr; i++)
		free(vm->log.slots[i].words);
	free(vm->log.slots);
}

/* ROM has no bitmap. */
static bool is_logged(const struct view *v)
{
	return v->nr_runs && !(v->m.flags & SNAPD_SLOT_READONLY);
}

static uint32_t kvm_slot_of(const struct view *v)
{
	return (uint32_t)v->m.as_id << 16 | v->kernel_id;
}

static struct log_slot *find(struct snapd_vm *vm, const struct view *v)
{
	for (size_t i = 0; i < vm->log.nr; i++)
		if (vm->log.slots[i].slot == kvm_slot_of(v))
			return &vm->log.slots[i];
	return NULL;
}

static int log_slot_adding(struct snapd_vm *vm, const struct view *v, struct err *e)
{
	struct log_slot s = {.slot = kvm_slot_of(v),
			     .nr_pages = v->m.size_bytes >> vm->page_shift,
			     .runs = v->runs,
			     .nr_runs = v->nr_runs};
	bool grown;

	if (!is_logged(v))
		return 0;
	s.words = calloc(DIV_ROUND_UP(s.nr_pages, 64ull), sizeof(*s.words));
	pthread_mutex_lock(&vm->harvest_lock);
	grown = s.words && GROW(vm->log.slots, vm->log.nr, vm->log.cap);
	if (grown)
		vm->log.slots[vm->log.nr++] = s;
	pthread_mutex_unlock(&vm->harvest_lock);
	if (grown)
		return 0;
	free(s.words);
	return err_set(e, ENOMEM, "no memory for the bitmap of slot %u", v->m.slot);
}

/* harvest_lock held. */
static void forget(struct snapd_vm *vm, const struct view *v)
{
	struct log_slot *s = find(vm, v);

	if (!s)
		return;
	free(s->words);
	*s = vm->log.slots[--vm->log.nr];
}

static void log_slot_cancelled(struct snapd_vm *vm, const struct view *v)
{
	pthread_mutex_lock(&vm->harvest_lock);
	forget(vm, v);
	pthread_mutex_unlock(&vm->harvest_lock);
}

/* A slot that is not in KVM yet, or no more, has nothing to tell (L3). */
static int get(struct snapd_vm *vm, struct log_slot *s)
{
	struct kvm_dirty_log log = {.slot = s->slot, .dirty_bitmap = s->words};
	int r = vm_ioctl(vm, KVM_GET_DIRTY_LOG, &log);

	if (r != -ENOENT)
		return r;
	memset(s->words, 0, DIV_ROUND_UP(s->nr_pages, 64ull) * sizeof(*s->words));
	return 0;
}

/* L2.  Words [first, end) as GET returned them. */
static int clear(struct snapd_vm *vm, struct log_slot *s, uint64_t first, uint64_t end)
{
	struct kvm_clear_dirty_log log = {
		.slot = s->slot,
		.first_page = first * 64,
		.num_pages = (uint32_t)(MIN(end * 64, s->nr_pages) - first * 64),
		.dirty_bitmap = s->words + first,
	};

	if (vm->log.get_clears)
		return 0;
	return vm_ioctl(vm, KVM_CLEAR_DIRTY_LOG, &log);
}

/* The words from the first that has a bit to the last; none: *first == *end. */
static void find_span(const struct log_slot *s, uint64_t *first, uint64_t *end)
{
	*first = 0;
	*end = DIV_ROUND_UP(s->nr_pages, 64ull);
	while (*first < *end && !s->words[*first])
		++*first;
	while (*end > *first && !s->words[*end - 1])
		--*end;
}

/* Pages [page, page + n) of a slot into every set. */
static void pages_publish(struct snapd_vm *vm, const struct log_slot *s, uint64_t page, uint64_t n)
{
	for (uint32_t i = 0; i < s->nr_runs; i++) {
		const struct slot_run *r = &s->runs[i];
		uint64_t lo = MAX(page, r->offset), hi = MIN(page + n, r->offset + r->nr_frames);

		if (lo < hi)
			each_set_add(vm, r->first_frame + (lo - r->offset), hi - lo);
	}
}

/* Runs of set bits of one word; returns how many bits. */
static uint64_t word_publish(struct snapd_vm *vm, const struct log_slot *s, uint64_t index)
{
	uint64_t w = s->words[index], total = 0;

	while (w) {
		unsigned int lo = (unsigned int)__builtin_ctzll(w);
		uint64_t rest = ~(w >> lo);
		unsigned int n = rest ? (unsigned int)__builtin_ctzll(rest) : 64;

		pages_publish(vm, s, index * 64 + lo, n);
		total += n;
		w = lo + n < 64 ? w & ~0ull << (lo + n) : 0;
	}
	return total;
}

static void words_publish(struct snapd_vm *vm, const struct log_slot *s, uint64_t first,
			  uint64_t end)
{
	uint64_t total = 0;

	for (uint64_t w = first; w < end; w++)
		total += word_publish(vm, s, w);
	count(&vm->shm->harvested, total);
	count(&vm->shm->published, total);
}

#ifdef SNAPD_ABLATION_COPY_BEFORE_CLEAR
/* What L1 forbids: bits go out now and are cleared at the next harvest. */
static int slot_harvest(struct snapd_vm *vm, struct log_slot *s)
{
	uint64_t first, end;
	int r = 0;

	find_span(s, &first, &end);
	if (first < end)
		r = clear(vm, s, first, end);
	if (r >= 0)
		r = get(vm, s);
	find_span(s, &first, &end);
	words_publish(vm, s, first, end);
	return r;
}
#elif defined(SNAPD_ABLATION_CLEAR_UNREAD)
/* What L2 forbids: bits are cleared that came after GET. */
static int slot_harvest(struct snapd_vm *vm, struct log_slot *s)
{
	uint64_t end = DIV_ROUND_UP(s->nr_pages, 64ull);
	int r = get(vm, s);

	words_publish(vm, s, 0, end);
	usleep(200);
	memset(s->words, 0xff, end * sizeof(*s->words));
	return r < 0 ? r : clear(vm, s, 0, end);
}
#else
static int slot_harvest(struct snapd_vm *vm, struct log_slot *s)
{
	uint64_t first, end;
	int r = get(vm, s);

	if (r < 0)
		return r;
	find_span(s, &first, &end);
	if (first == end)
		return 0;
	r = clear(vm, s, first, end);
	words_publish(vm, s, first, end);
	return r;
}
#endif

static int log_harvest(struct snapd_vm *vm)
{
	int ret = 0;

	for (size_t i = 0; i < vm->log.nr; i++) {
		int r = slot_harvest(vm, &vm->log.slots[i]);

		ret = ret < 0 ? ret : MIN(r, 0);
	}
	if (ret < 0) {
		count(&vm->shm->unresolved, 1);
		each_set_add(vm, 0, frames_end(vm));
	}
	return ret;
}

#ifdef SNAPD_ABLATION_NO_GET_BEFORE_DELETE
static void log_slot_deleting(struct snapd_vm *vm, const struct view *v)
{
	vm->log.is_missed = false;
	if (is_logged(v))
		vcpus_hold(vm);
}
#else
/* L3.  No CLEAR: should KVM not delete the slot, its bits are there still. */
static void log_slot_deleting(struct snapd_vm *vm, const struct view *v)
{
	struct log_slot *s;
	uint64_t first, end;

	if (!is_logged(v))
		return;
	vcpus_hold(vm);
	vm->log.is_missed = vcpus_wait_out(vm, LEAVE_GUEST_MS, NULL) < 0;
	pthread_mutex_lock(&vm->harvest_lock);
	s = find(vm, v);
	if (s && get(vm, s) >= 0) {
		find_span(s, &first, &end);
		words_publish(vm, s, first, end);
	} else {
		vm->log.is_missed = true;
	}
	pthread_mutex_unlock(&vm->harvest_lock);
}
#endif

static void log_slot_deleted(struct snapd_vm *vm, const struct view *v, int result)
{
	if (!is_logged(v))
		return;
	pthread_mutex_lock(&vm->harvest_lock);
	for (uint32_t i = 0; i < v->nr_runs && vm->log.is_missed; i++)
		each_set_add(vm, v->runs[i].first_frame, v->runs[i].nr_frames);
	if (result >= 0)
		forget(vm, v);
	pthread_mutex_unlock(&vm->harvest_lock);
	vcpus_release(vm);
}

const struct dirty_ops log_ops = {
	.backend = SNAPD_DIRTY_LOG,
	.attach = log_attach,
	.detach = log_detach,
	.slot_adding = log_slot_adding,
	.slot_cancelled = log_slot_cancelled,
	.slot_deleting = log_slot_deleting,
	.slot_deleted = log_slot_deleted,
	.harvest = log_harvest,
};
