/* SPDX-License-Identifier: MIT */
/*
 * slots: QEMU's memslots.  Enter: kvm_userspace_memory_region; leave: snapd_vm_memslot(), and
 * which slots QEMU wants a dirty log of.  On QEMU's threads, some of them vCPUs', under
 * one lock.
 *
 * Every writable slot is logged; QEMU's own flag only says whether KVM_GET_DIRTY_LOG is
 * answered.  A log that QEMU begins holds everything written before, too: more than KVM would
 * tell, never less.
 *
 *   writable, over a RAM file    told, watched for QEMU's own writes
 *   writable, over other memory  private: logged for QEMU alone; in its device state
 *   read-only                    as its memory is; never logged
 */
#include "adapters/qemu/adapter.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"

#define PAGE_BYTES  4096u
/* Private memory is in every snapshot as a whole: video memory and the like, not RAM. */
#define PRIVATE_MAX (48ull << 20)

struct qemu_slot {
	struct kvm_userspace_memory_region r;
	bool is_private;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct qemu_slot *slots; /* owned */
static size_t nr_slots, cap_slots;

static struct qemu_slot *find(uint32_t slot)
{
	for (size_t i = 0; i < nr_slots; i++)
		if (slots[i].r.slot == slot)
			return &slots[i];
	return NULL;
}

static bool reserve(void)
{
	size_t cap = cap_slots ? cap_slots * 2 : 64;
	struct qemu_slot *more;

	if (nr_slots < cap_slots)
		return true;
	more = reallocarray(slots, cap, sizeof(*more));
	if (!more)
		return false;
	slots = more;
	cap_slots = cap;
	return true;
}

static bool is_readonly(const struct kvm_userspace_memory_region *r)
{
	return r->flags & KVM_MEM_READONLY;
}

static struct snapd_memslot memslot_of(const struct kvm_userspace_memory_region *r)
{
	return (struct snapd_memslot){
		.slot = r->slot & 0xffff,
		.as_id = (uint16_t)(r->slot >> 16),
		.flags = is_readonly(r) ? SNAPD_SLOT_READONLY : 0,
		.gpa = r->guest_phys_addr,
		.size_bytes = r->memory_size,
		/* NOLINTNEXTLINE(performance-no-int-to-ptr): the kernel's struct has an integer */
		.hva = (void *)(uintptr_t)r->userspace_addr,
		.fd = -1,
	};
}

static uint64_t private_bytes(void)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < nr_slots; i++)
		sum += slots[i].is_private ? slots[i].r.memory_size : 0;
	return sum;
}

/* What is behind GPA 0 is the VM's RAM, on every machine that QEMU has. */
static void check_private(const struct kvm_userspace_memory_region *r, const char *why)
{
	if (*why)
		adapter_refuse("its RAM at GPA 0x%" PRIx64 ": %s", (uint64_t)r->guest_phys_addr,
			       why);
	else if (!r->guest_phys_addr && !(r->slot >> 16))
		adapter_refuse("its RAM is private to QEMU: it needs a memory backend with "
			       "share=on, as snapd-qemu makes one");
	else if (private_bytes() + r->memory_size > PRIVATE_MAX)
		adapter_refuse("0x%" PRIx64 " bytes at GPA 0x%" PRIx64
			       " are private to QEMU, too much to save each time",
			       (uint64_t)r->memory_size, (uint64_t)r->guest_phys_addr);
}

/* As RAM; *why is set if what is behind it is RAM, and cannot be snapshotted. */
static int add_shared(struct snapd_vm *vm, const struct kvm_userspace_memory_region *r, char *why,
		      size_t why_bytes)
{
	struct snapd_memslot m = memslot_of(r);
	struct ram_block b;
	int ret = blocks_find(vm, m.hva, m.size_bytes, m.gpa, &b, why, why_bytes);

	if (ret < 0)
		return ret;
	m.fd = b.fd;
	m.fd_offset = b.fd_offset + (uint64_t)((char *)m.hva - b.hva);
	return snapd_vm_memslot(vm, &m);
}

static int add_private(struct snapd_vm *vm, const struct kvm_userspace_memory_region *r)
{
	struct snapd_memslot m = memslot_of(r);

	if (!is_readonly(r))
		m.flags |= SNAPD_SLOT_PRIVATE;
	return snapd_vm_memslot(vm, &m);
}

static int add(struct snapd_vm *vm, const struct kvm_userspace_memory_region *r)
{
	struct qemu_slot s = {.r = *r};
	char why[256] = "";
	int ret;

	if (!reserve())
		return -ENOMEM;
	ret = add_shared(vm, r, why, sizeof(why));
	if (ret == -ENOENT || *why) {
		s.is_private = !is_readonly(r);
		if (s.is_private)
			check_private(r, why);
		ret = add_private(vm, r);
	}
	if (ret < 0) {
		adapter_log("%s", snapd_vm_error(vm));
		return ret;
	}
	slots[nr_slots++] = s;
	return 0;
}

static int drop(struct snapd_vm *vm, struct qemu_slot *s)
{
	struct snapd_memslot m = memslot_of(&s->r);
	int r;

	m.size_bytes = 0;
	m.flags = 0;
	r = snapd_vm_memslot(vm, &m);
	if (!r)
		*s = slots[--nr_slots];
	return r;
}

static bool only_flags(const struct kvm_userspace_memory_region *a,
		       const struct kvm_userspace_memory_region *b)
{
	return a->guest_phys_addr == b->guest_phys_addr && a->memory_size == b->memory_size &&
	       a->userspace_addr == b->userspace_addr && is_readonly(a) == is_readonly(b);
}

/* KVM moves a slot that keeps size and memory, and refuses any other change. */
static int change(struct snapd_vm *vm, struct qemu_slot *s,
		  const struct kvm_userspace_memory_region *r)
{
	int ret;

	if (only_flags(&s->r, r)) {
		s->r.flags = r->flags;
		return 0;
	}
	if (s->r.memory_size != r->memory_size || s->r.userspace_addr != r->userspace_addr ||
	    is_readonly(&s->r) != is_readonly(r))
		return -EINVAL;
	ret = drop(vm, s);
	return ret < 0 ? ret : add(vm, r);
}

static int set(struct snapd_vm *vm, const struct kvm_userspace_memory_region *r)
{
	struct qemu_slot *s = find(r->slot);

	if (!r->memory_size)
		return s ? drop(vm, s) : -EINVAL;
	return s ? change(vm, s, r) : add(vm, r);
}

int slots_set(struct snapd_vm *vm, const struct kvm_userspace_memory_region *r)
{
	int ret;

	pthread_mutex_lock(&lock);
	ret = set(vm, r);
	pthread_mutex_unlock(&lock);
	return ret;
}

/* The slot's bitmap in bytes, as KVM writes it; 0: KVM would not answer. */
static size_t bitmap_bytes(uint32_t slot)
{
	const struct qemu_slot *s;
	size_t bytes = 0;

	pthread_mutex_lock(&lock);
	s = find(slot);
	if (s && s->r.flags & KVM_MEM_LOG_DIRTY_PAGES)
		bytes = ALIGN_UP(s->r.memory_size / PAGE_BYTES, 64) / 8;
	pthread_mutex_unlock(&lock);
	return bytes;
}

int slots_dirty_log(struct snapd_consumer *log, const struct kvm_dirty_log *d)
{
	size_t bytes = bitmap_bytes(d->slot);

	if (!bytes)
		return -ENOENT;
	memset(d->dirty_bitmap, 0, bytes);
	return snapd_consumer_take_slot(log, d->slot >> 16, d->slot & 0xffff, d->dirty_bitmap,
					bytes);
}
