/* SPDX-License-Identifier: MIT */
/*
 * simkvm: memslots, dirty rings, RESET, and which descriptor is what.
 *
 * Each page of a slot has two bits, present and writable: what a page table entry is to
 * KVM.  A vCPU that stores to a page that is not writable pushes an entry and sets both;
 * RESET and memslot changes clear them.
 *
 * Invariants
 *   K1  A vCPU holds its own lock from reading a bit to the end of its store.
 *   K2  Whoever clears bits, or takes a slot away, afterwards takes and gives back every
 *       vCPU's lock once: a store that saw the bit set is then done, and every later one
 *       pushes an entry again.  So after RESET returns a page can be copied: what comes
 *       later is in the ring.
 *   K3  RESET frees an entry (flags = 0) before it clears the bit; so "flags == 0" does
 *       not mean "protected", as it does not with KVM.
 *   K4  Two vCPUs that store to one page at once push one entry or two, never none: the
 *       bit is set by an atomic OR whose winner pushes, and a vCPU that found it set ends
 *       its store before any RESET that clears it returns (K2).
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "vmm/simkvm_internal.h"

#ifndef KVM_CAP_DISABLE_QUIRKS2
#define KVM_CAP_DISABLE_QUIRKS2 213
#endif
#ifndef KVM_X86_QUIRK_SLOT_ZAP_ALL
#define KVM_X86_QUIRK_SLOT_ZAP_ALL (1u << 7)
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP
#define KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP 225
#endif

/* ---- rings ---- */

static uint32_t ring_used(struct simkvm_cpu *cpu)
{
	return cpu->dirty_index - atomic_load(&cpu->reset_index);
}

bool sim_ring_soft_full(struct simkvm_cpu *cpu)
{
	return cpu->ring && ring_used(cpu) >= cpu->sim->ring_entries - SIMKVM_RING_RESERVED;
}

/* cpu->lock held. */
static int ring_push(struct simkvm_cpu *cpu, uint32_t slot, uint64_t offset)
{
	struct kvm_dirty_gfn *e;

	if (ring_used(cpu) >= cpu->sim->ring_entries)
		return -ENOSPC;
	e = &cpu->ring[cpu->dirty_index & (cpu->sim->ring_entries - 1)];
	e->slot = slot;
	e->offset = offset;
	__atomic_store_n(&e->flags, KVM_DIRTY_GFN_F_DIRTY, __ATOMIC_RELEASE);
	cpu->dirty_index++;
	return 0;
}

/* ---- pages ---- */

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
		if (bit_set(s->writable, page) && logged && ring_push(cpu, s->id, page))
			abort();
	}
	return s->hva + page * page_size + gpa % page_size;
}

/* K2 */
static void cpus_synchronize(struct simkvm *sim)
{
	uint32_t i;

	for (i = 0; i < atomic_load(&sim->nr_cpus); i++) {
		pthread_mutex_lock(&sim->cpus[i]->lock);
		pthread_mutex_unlock(&sim->cpus[i]->lock);
	}
}

/* ---- memslots; slots_lock held ---- */

static void slot_free(struct sim_slot *s)
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
	slot_free(s);
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
	cpus_synchronize(sim);
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
	cpus_synchronize(sim);
}

static int slot_delete(struct simkvm *sim, struct sim_slot *s)
{
	int rc;

	if (!s)
		return -EINVAL;
	rc = slots_publish(sim, s, NULL);
	if (rc == 0)
		slot_free(s);
	if (rc == 0 && !sim->keep_on_delete)
		zap_all(sim);
	return rc;
}

static int slot_add(struct simkvm *sim, const struct kvm_userspace_memory_region *r)
{
	struct sim_slot *s = slot_new(sim, r);
	int rc = s ? slots_publish(sim, NULL, s) : -ENOMEM;

	if (rc)
		slot_free(s);
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
	slot_free(rc ? fresh : s);
	return rc;
}

static int set_memory_region(struct simkvm *sim, const struct kvm_userspace_memory_region *r)
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

/* ---- writes without a vCPU; slots_lock held ---- */

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
static int get_dirty_log(struct simkvm *sim, const struct kvm_dirty_log *log)
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
	cpus_synchronize(sim);
	return 0;
}

/* ---- RESET; slots_lock held ---- */

/* The slot may be gone, or smaller than it was: then there is nothing to protect. */
static void protect_page(struct simkvm *sim, uint32_t slot, uint64_t offset)
{
	struct sim_slot *s = slot_by_id(atomic_load(&sim->slots), slot);

	if (s && offset < s->nr_pages)
		bit_clear(s->writable, offset);
}

struct reset {
	uint32_t done;
	uint32_t limit;		 /* entries, UINT32_MAX: none */
	uint32_t protect_before; /* entries from this one on stay writable */
};

static void reset_ring(struct simkvm *sim, struct simkvm_cpu *cpu, struct reset *r)
{
	for (; r->done < r->limit; r->done++) {
		uint32_t index = atomic_load(&cpu->reset_index);
		struct kvm_dirty_gfn *e = &cpu->ring[index & (sim->ring_entries - 1)];
		uint32_t slot;
		uint64_t offset;

		if (!(__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_RESET))
			break;
		slot = e->slot;
		offset = e->offset;
		__atomic_store_n(&e->flags, 0, __ATOMIC_RELEASE);
		atomic_store(&cpu->reset_index, index + 1);
		if (r->done < r->protect_before)
			protect_page(sim, slot, offset);
	}
}

static int reset_rings(struct simkvm *sim)
{
	struct reset r = {.limit = UINT32_MAX, .protect_before = UINT32_MAX};
	uint32_t i;

	if (!sim->ring_entries)
		return -EINVAL;
	if (sim->cut_entries) {
		r.limit = sim->cut_entries;
		r.protect_before = r.limit - MIN(r.limit, sim->cut_unprotected);
		sim->cut_entries = 0;
	}
	for (i = 0; i < atomic_load(&sim->nr_cpus); i++)
		reset_ring(sim, sim->cpus[i], &r);
	if (r.done)
		cpus_synchronize(sim);
	return (int)r.done;
}

/* ---- capabilities ---- */

static uint32_t ring_bytes_max(const struct simkvm *sim)
{
	return sim->config.ring_bytes_max ? sim->config.ring_bytes_max : 1u << 20;
}

static int check_extension(const struct simkvm *sim, uintptr_t cap)
{
	switch (cap) {
	case KVM_CAP_USER_MEMORY:
	case KVM_CAP_READONLY_MEM:
	case KVM_CAP_IMMEDIATE_EXIT:
	case KVM_CAP_SYNC_MMU:
	case KVM_CAP_MP_STATE:
	case KVM_CAP_XSAVE:
	case KVM_CAP_XCRS:
	case KVM_CAP_DEBUGREGS:
	case KVM_CAP_VCPU_EVENTS:
	case KVM_CAP_GET_TSC_KHZ:
	case KVM_CAP_DESTROY_MEMORY_REGION_WORKS:
		return 1;
	case KVM_CAP_DIRTY_LOG_RING:
	case KVM_CAP_DIRTY_LOG_RING_ACQ_REL:
		return (int)ring_bytes_max(sim);
	case KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP:
		return sim->config.backup_bitmap;
	case KVM_CAP_MULTI_ADDRESS_SPACE:
		return SIM_SPACES;
	case KVM_CAP_NR_MEMSLOTS:
		return SIM_SLOT_IDS;
	case KVM_CAP_NR_VCPUS:
	case KVM_CAP_MAX_VCPUS:
	case KVM_CAP_MAX_VCPU_ID:
		return SIMKVM_MAX_VCPUS;
	case KVM_CAP_DISABLE_QUIRKS2:
		return KVM_X86_QUIRK_SLOT_ZAP_ALL;
	default:
		return 0;
	}
}

static int enable_ring(struct simkvm *sim, uint64_t bytes)
{
	if (!bytes || bytes & (bytes - 1) || bytes < sim->page_size ||
	    bytes < SIMKVM_RING_RESERVED * sizeof(struct kvm_dirty_gfn))
		return -EINVAL;
	if (bytes > ring_bytes_max(sim))
		return -E2BIG;
	if (sim->ring_entries || atomic_load(&sim->nr_cpus))
		return -EINVAL;
	sim->ring_entries = (uint32_t)(bytes / sizeof(struct kvm_dirty_gfn));
	return 0;
}

/* After the ring, before any memslot. */
static int enable_backup(struct simkvm *sim)
{
	if (!sim->config.backup_bitmap || !sim->ring_entries || atomic_load(&sim->slots)->nr)
		return -EINVAL;
	sim->with_backup = true;
	return 0;
}

static int enable_cap(struct simkvm *sim, const struct kvm_enable_cap *c)
{
	if (c->flags)
		return -EINVAL;
	switch (c->cap) {
	case KVM_CAP_DIRTY_LOG_RING:
	case KVM_CAP_DIRTY_LOG_RING_ACQ_REL:
		return enable_ring(sim, c->args[0]);
	case KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP:
		return enable_backup(sim);
	case KVM_CAP_DISABLE_QUIRKS2:
		if (c->args[0] & ~(uint64_t)KVM_X86_QUIRK_SLOT_ZAP_ALL)
			return -EINVAL;
		sim->keep_on_delete = c->args[0];
		return 0;
	default:
		return -EINVAL;
	}
}

/* ---- descriptors ---- */

static int make_fd(const char *name, ino_t *ino)
{
	_cleanup_fd_ int fd = memfd_create(name, MFD_CLOEXEC);
	struct stat st;

	if (fd < 0 || fstat(fd, &st))
		return -errno;
	*ino = st.st_ino;
	return steal_fd(&fd);
}

int simkvm_open(struct simkvm *sim)
{
	struct stat st;
	int fd = make_fd("simkvm", &sim->kvm_ino);

	if (fd >= 0 && fstat(fd, &st) == 0)
		sim->dev = st.st_dev;
	return fd;
}

static int msr_index_list(struct kvm_msr_list *list)
{
	list->nmsrs = 0; /* this CPU has none */
	return 0;
}

static int kvm_ioctl(struct simkvm *sim, unsigned long request, void *arg)
{
	switch (request) {
	case KVM_GET_API_VERSION:
		return KVM_API_VERSION;
	case KVM_CHECK_EXTENSION:
		return check_extension(sim, (uintptr_t)arg);
	case KVM_GET_VCPU_MMAP_SIZE:
		return (int)sim->page_size;
	case KVM_GET_SUPPORTED_CPUID:
		return sim_cpuid_supported(arg);
	case KVM_GET_MSR_INDEX_LIST:
		return msr_index_list(arg);
	case KVM_CREATE_VM:
		return sim->vm_ino ? -EBUSY : make_fd("simkvm-vm", &sim->vm_ino);
	default:
		return -ENOTTY;
	}
}

static int vm_ioctl_locked(struct simkvm *sim, unsigned long request, void *arg)
{
	switch (request) {
	case KVM_ENABLE_CAP:
		return enable_cap(sim, arg);
	case KVM_SET_USER_MEMORY_REGION:
		return set_memory_region(sim, arg);
	case KVM_RESET_DIRTY_RINGS:
		return reset_rings(sim);
	case KVM_GET_DIRTY_LOG:
		return get_dirty_log(sim, arg);
	case KVM_CREATE_VCPU:
		return sim_cpu_create(sim, (uint32_t)(uintptr_t)arg);
	case KVM_GET_IRQCHIP:
		return -ENXIO;
	default:
		return -ENOTTY;
	}
}

static int vm_ioctl(struct simkvm *sim, unsigned long request, void *arg)
{
	int rc;

	if (request == KVM_CHECK_EXTENSION)
		return check_extension(sim, (uintptr_t)arg);
	pthread_mutex_lock(&sim->slots_lock);
	rc = vm_ioctl_locked(sim, request, arg);
	pthread_mutex_unlock(&sim->slots_lock);
	return rc;
}

static int dispatch(struct simkvm *sim, int fd, unsigned long request, void *arg)
{
	struct stat st;
	uint32_t i;

	if (fstat(fd, &st))
		return -errno;
	if (st.st_dev != sim->dev)
		return -ENOTTY;
	for (i = 0; i < atomic_load(&sim->nr_cpus); i++)
		if (sim->cpus[i]->ino == st.st_ino)
			return sim_cpu_ioctl(sim->cpus[i], request, arg);
	if (st.st_ino == sim->vm_ino)
		return vm_ioctl(sim, request, arg);
	return st.st_ino == sim->kvm_ino ? kvm_ioctl(sim, request, arg) : -ENOTTY;
}

static int op_ioctl(void *opaque, int fd, unsigned long request, void *arg)
{
	int rc = dispatch(opaque, fd, request, arg);

	if (rc >= 0)
		return rc;
	errno = -rc;
	return -1;
}

static void *op_mmap(void *opaque, size_t len, int prot, int flags, int fd, int64_t offset)
{
	return mmap(NULL, len, prot, flags, fd, offset);
}

static int op_munmap(void *opaque, void *addr, size_t len)
{
	return munmap(addr, len);
}

void simkvm_get_ops(struct simkvm *sim, struct snapd_kvm_ops *ret)
{
	*ret = (struct snapd_kvm_ops){
		.ioctl = op_ioctl, .mmap = op_mmap, .munmap = op_munmap, .opaque = sim};
}

/* ---- life ---- */

int simkvm_create(const struct simkvm_config *config, struct simkvm **ret)
{
	struct simkvm *sim = calloc(1, sizeof(*sim));
	struct sim_slots *none = calloc(1, sizeof(*none));

	if (!sim || !none) {
		free(sim);
		free(none);
		return -ENOMEM;
	}
	sim->config = *config;
	sim->page_size = (uint64_t)sysconf(_SC_PAGESIZE);
	atomic_store(&sim->slots, none);
	pthread_mutex_init(&sim->slots_lock, NULL);
	*ret = sim;
	return 0;
}

void simkvm_destroy(struct simkvm *sim)
{
	struct sim_slots *t;
	uint32_t i;

	if (!sim)
		return;
	for (i = 0; i < atomic_load(&sim->nr_cpus); i++)
		sim_cpu_destroy(sim->cpus[i]);
	t = atomic_load(&sim->slots);
	for (i = 0; i < t->nr; i++)
		slot_free(t->slots[i]);
	free(t);
	pthread_mutex_destroy(&sim->slots_lock);
	free(sim);
}

int simkvm_push(struct simkvm *sim, uint32_t vcpu, uint32_t slot, uint64_t offset)
{
	struct simkvm_cpu *cpu = sim->cpus[vcpu];
	int rc;

	pthread_mutex_lock(&cpu->lock);
	rc = ring_push(cpu, slot, offset);
	pthread_mutex_unlock(&cpu->lock);
	return rc;
}

void simkvm_interrupt_reset(struct simkvm *sim, uint32_t entries, uint32_t unprotected)
{
	pthread_mutex_lock(&sim->slots_lock);
	sim->cut_entries = entries;
	sim->cut_unprotected = unprotected;
	pthread_mutex_unlock(&sim->slots_lock);
}
