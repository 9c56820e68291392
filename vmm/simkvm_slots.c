/* SPDX-License-Identifier: MIT */
/*
 * simkvm_slots: memslots, and the two bits of each of their pages, present and writable:
 * what a page table entry is to KVM.  A vCPU that stores to a page that is not writable
 * pushes an entry and sets both; RESET and memslot changes clear them.
 *
 * Invariants
 *   K1  A vCPU holds its own lock from reading a bit to the end of its store.
 *   K2  Whoever clears bits, or takes a slot away, afterwards takes and gives back every
 *       vCPU's lock once: a store that saw the bit set is then done, and every later one
 *       pushes an entry again.  So after RESET returns a page can be copied: what comes
 *       later is in the ring.
 *   K4  Two vCPUs that store to one page at once push one entry or two, never none: the
 *       bit is set by an atomic OR whose winner pushes, and a vCPU that found it set ends
 *       its store before any RESET that clears it returns (K2).
 */
#include <errno.h>
#include <stdlib.h>

#include "snapd/util/cleanup.h"
#include "vmm/simkvm_internal.h"

static bool bit_test(_Atomic uint64_t *bits, uint64_t i)
{
	return atomic_load_explicit(&bits[i / 64], memory_order_acquire) >> i % 64 & 1;
}

/* Was it clear? */
static bool bit_set(_Atomic uint64_t *bits, uint64_t i)
{
	return !(atomic_fetch_or(&bits[i / 64], 1ull << i % 64) >> i % 64 & 1);
}

static void bit_clear(_Atomic uint64_t *bits, uint64_t i)
{
	atomic_fetch_and(&bits[i / 64], ~(1ull << i % 64));
}

static void bits_clear(_Atomic uint64_t *bits, uint64_t nr)
{
	uint64_t i;

	for (i = 0; i < DIV_ROUND_UP(nr, 64ull); i++)
		atomic_store(&bits[i], 0);
}

static struct sim_slot *slot_at(struct sim_slots *t, uint32_t as_id, uint64_t gfn)
{
	uint32_t i;

	for (i = 0; i < t->nr; i++)
		if (t->slots[i]->id >> 16 == as_id &&
		    gfn - t->slots[i]->gfn < t->slots[i]->nr_pages)
			return t->slots[i];
	return NULL;
}

void *sim_touch(struct simkvm_cpu *cpu, uint64_t gpa, enum sim_touch how)
{
	const uint64_t page_size = cpu->sim->page_size;
	struct sim_slot *s = slot_at(atomic_load(&cpu->sim->slots), cpu->space, gpa / page_size);
	bool logged;
	uint64_t page;

	if (!s || (how == TOUCH_STORE && s->flags & KVM_MEM_READONLY))
		return NULL;
	page = gpa / page_size - s->gfn;
	logged = s->flags & KVM_MEM_LOG_DIRTY_PAGES && cpu->ring;
	if (how == TOUCH_STORE ? !bit_test(s->writable, page) : !bit_test(s->present, page)) {
		bit_set(s->present, page);
		/* Soft full keeps room for the store that is on its way (64 entries). */
		if (bit_set(s->writable, page) && logged && sim_ring_push(cpu, s->id, page))
			abort();
	}
	return s->hva + page * page_size + gpa % page_size;
}

void sim_synchronize(struct simkvm *sim)
{
	uint32_t i;

	for (i = 0; i < atomic_load(&sim->nr_cpus); i++) {
		pthread_mutex_lock(&sim->cpus[i]->lock);
		pthread_mutex_unlock(&sim->cpus[i]->lock);
	}
}

void sim_slot_free(struct sim_slot *s)
{
	if (!s)
		return;
	free((void *)s->writable);
	free((void *)s->present);
	free((void *)s->backup);
	free(s);
}

static struct sim_slot *slot_new(const struct simkvm *sim,
				 const struct kvm_userspace_memory_region *r)
{
	bool backup = sim->with_backup && r->flags & KVM_MEM_LOG_DIRTY_PAGES;
	struct sim_slot *s = calloc(1, sizeof(*s));
	size_t words = DIV_ROUND_UP(r->memory_size / sim->page_size, 64ull);
	uint8_t *hva;

	if (!s)
		return NULL;
	/* NOLINTNEXTLINE(performance-no-int-to-ptr): the kernel's struct has an integer */
	hva = (uint8_t *)(uintptr_t)r->userspace_addr;
	*s = (struct sim_slot){.id = r->slot,
			       .flags = r->flags,
			       .gfn = r->guest_phys_addr / sim->page_size,
			       .nr_pages = r->memory_size / sim->page_size,
			       .hva = hva,
			       .writable = calloc(words, 8),
			       .present = calloc(words, 8),
			       .backup = backup ? calloc(words, 8) : NULL};
	if (s->writable && s->present && !(backup && !s->backup))
		return s;
	sim_slot_free(s);
	return NULL;
}

static struct sim_slot *slot_by_id(struct sim_slots *t, uint32_t id)
{
	uint32_t i;

	for (i = 0; i < t->nr; i++)
		if (t->slots[i]->id == id)
			return t->slots[i];
	return NULL;
}

static bool slot_overlaps(const struct simkvm *sim, const struct kvm_userspace_memory_region *r)
{
	uint64_t gfn = r->guest_phys_addr / sim->page_size, nr = r->memory_size / sim->page_size;
	struct sim_slots *t = atomic_load(&sim->slots);
	uint32_t i;

	for (i = 0; i < t->nr; i++) {
		const struct sim_slot *s = t->slots[i];

		if (s->id >> 16 == r->slot >> 16 && s->id != r->slot && s->gfn < gfn + nr &&
		    gfn < s->gfn + s->nr_pages)
			return true;
	}
	return false;
}

/* A new table without `drop` and with `add`, either may be NULL; vCPUs see it from
 * here on, and none sees the old one when this returns. */
static int slots_publish(struct simkvm *sim, const struct sim_slot *drop, struct sim_slot *add)
{
	struct sim_slots *old = atomic_load(&sim->slots), *t;
	uint32_t i;

	t = malloc(sizeof(*t) +
		   (old->nr + 1) *
			   sizeof(struct sim_slot *)); /* NOLINT(bugprone-sizeof-expression) */
	if (!t)
		return -ENOMEM;
	t->nr = 0;
	for (i = 0; i < old->nr; i++)
		if (old->slots[i] != drop)
			t->slots[t->nr++] = old->slots[i];
	if (add)
		t->slots[t->nr++] = add;
	atomic_store(&sim->slots, t);
	sim_synchronize(sim);
	free(old);
	return 0;
}

static void zap_slot(struct sim_slot *s)
{
	bits_clear(s->writable, s->nr_pages);
	bits_clear(s->present, s->nr_pages);
}

static void zap_all(struct simkvm *sim)
{
	struct sim_slots *t = atomic_load(&sim->slots);
	uint32_t i;

	for (i = 0; i < t->nr; i++)
		zap_slot(t->slots[i]);
	sim_synchronize(sim);
}

static int slot_delete(struct simkvm *sim, struct sim_slot *s)
{
	int rc;

	if (!s)
		return -EINVAL;
	rc = slots_publish(sim, s, NULL);
	if (rc == 0)
		sim_slot_free(s);
	if (rc == 0 && !sim->keep_on_delete)
		zap_all(sim);
	return rc;
}

static int slot_add(struct simkvm *sim, const struct kvm_userspace_memory_region *r)
{
	struct sim_slot *s = slot_new(sim, r);
	int rc = s ? slots_publish(sim, NULL, s) : -ENOMEM;

	if (rc)
		sim_slot_free(s);
	return rc;
}

/* Only the address and the flags of a slot may change. */
static int slot_change(struct simkvm *sim, struct sim_slot *s,
		       const struct kvm_userspace_memory_region *r)
{
	struct sim_slot *fresh;
	int rc;

	if (s->nr_pages != r->memory_size / sim->page_size ||
	    (uintptr_t)s->hva != r->userspace_addr || (s->flags ^ r->flags) & KVM_MEM_READONLY)
		return -EINVAL;
	if (s->gfn == r->guest_phys_addr / sim->page_size && s->flags == r->flags)
		return 0;
	fresh = slot_new(sim, r);
	rc = fresh ? slots_publish(sim, s, fresh) : -ENOMEM;
	if (rc == 0 && s->backup && fresh->backup) { /* a bitmap outlives all but its flag */
		free((void *)fresh->backup);
		fresh->backup = s->backup;
		s->backup = NULL;
	}
	sim_slot_free(rc ? fresh : s);
	return rc;
}

int sim_set_memory_region(struct simkvm *sim, const struct kvm_userspace_memory_region *r)
{
	const uint32_t known = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY;
	struct sim_slots *t = atomic_load(&sim->slots);
	struct sim_slot *s = slot_by_id(t, r->slot);

	if (r->flags & ~known || r->slot >> 16 >= SIM_SPACES || (r->slot & 0xffff) >= SIM_SLOT_IDS)
		return -EINVAL;
	if (!r->memory_size)
		return slot_delete(sim, s);
	if ((r->memory_size | r->guest_phys_addr | r->userspace_addr) % sim->page_size ||
	    r->guest_phys_addr + r->memory_size < r->guest_phys_addr)
		return -EINVAL;
	if (slot_overlaps(sim, r))
		return -EEXIST;
	return s ? slot_change(sim, s, r) : slot_add(sim, r);
}

static int write_locked(struct simkvm *sim, uint32_t as_id, uint64_t gpa, uint64_t value)
{
	struct sim_slot *s = slot_at(atomic_load(&sim->slots), as_id, gpa / sim->page_size);
	const uint64_t page_size = sim->page_size;
	uint64_t page;

	if (!s || s->flags & KVM_MEM_READONLY)
		return -EFAULT;
	page = gpa / page_size - s->gfn;
	__atomic_store_n((uint64_t *)(s->hva + page * page_size + gpa % page_size), value,
			 __ATOMIC_RELEASE);
	if (s->backup)
		bit_set(s->backup, page);
	return 0;
}

int simkvm_write(struct simkvm *sim, uint32_t as_id, uint64_t gpa, uint64_t value)
{
	int rc;

	pthread_mutex_lock(&sim->slots_lock);
	rc = write_locked(sim, as_id, gpa, value);
	pthread_mutex_unlock(&sim->slots_lock);
	return rc;
}

/* Without KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: bits out, pages protected. */
int sim_get_dirty_log(struct simkvm *sim, const struct kvm_dirty_log *log)
{
	struct sim_slot *s = slot_by_id(atomic_load(&sim->slots), log->slot);
	uint64_t *out = log->dirty_bitmap, i;

	if (!sim->with_backup)
		return -ENXIO;
	if (!s || !s->backup)
		return -ENOENT;
	for (i = 0; i < DIV_ROUND_UP(s->nr_pages, 64ull); i++) {
		out[i] = atomic_exchange(&s->backup[i], 0);
		atomic_fetch_and(&s->writable[i], ~out[i]);
	}
	sim_synchronize(sim);
	return 0;
}

void sim_protect_page(struct simkvm *sim, uint32_t slot, uint64_t offset)
{
	struct sim_slot *s = slot_by_id(atomic_load(&sim->slots), slot);

	if (s && offset < s->nr_pages)
		bit_clear(s->writable, offset);
}
