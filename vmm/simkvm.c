/* SPDX-License-Identifier: MIT */
/*
 * simkvm: dirty rings, RESET, capabilities, and which descriptor is what.  Memslots and pages
 * are in simkvm_slots.c, with invariants K1, K2 and K4; the CPU is in simkvm_cpu.c.
 *
 *   K3  RESET frees an entry (flags = 0) before it clears the page's bit; so "flags == 0"
 *       does not mean "protected", as it does not with KVM.
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
int sim_ring_push(struct simkvm_cpu *cpu, uint32_t slot, uint64_t offset)
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

/* ---- RESET; slots_lock held ---- */

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
			sim_protect_page(sim, slot, offset);
	}
}

/* How many entries a RESET would take back. */
static uint32_t nr_collected(const struct simkvm *sim)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < atomic_load(&sim->nr_cpus); i++) {
		const struct simkvm_cpu *cpu = sim->cpus[i];
		uint32_t at = atomic_load(&cpu->reset_index), end = at + sim->ring_entries;

		for (; at != end; at++, n++)
			if (!(__atomic_load_n(&cpu->ring[at & (sim->ring_entries - 1)].flags,
					      __ATOMIC_ACQUIRE) &
			      KVM_DIRTY_GFN_F_RESET))
				break;
	}
	return n;
}

static int reset_rings(struct simkvm *sim)
{
	struct reset r = {.limit = UINT32_MAX, .protect_before = UINT32_MAX};
	uint32_t i;

	if (!sim->ring_entries)
		return -EINVAL;
	if (sim->cut_entries && nr_collected(sim) > sim->cut_entries) {
		r.limit = sim->cut_entries;
		r.protect_before = r.limit - MIN(r.limit, sim->cut_unprotected);
		sim->cut_entries = 0;
	}
	for (i = 0; i < atomic_load(&sim->nr_cpus); i++)
		reset_ring(sim, sim->cpus[i], &r);
	if (r.done)
		sim_synchronize(sim);
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
		return sim_set_memory_region(sim, arg);
	case KVM_RESET_DIRTY_RINGS:
		return reset_rings(sim);
	case KVM_GET_DIRTY_LOG:
		return sim_get_dirty_log(sim, arg);
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
		sim_slot_free(t->slots[i]);
	free(t);
	pthread_mutex_destroy(&sim->slots_lock);
	free(sim);
}

int simkvm_push(struct simkvm *sim, uint32_t vcpu, uint32_t slot, uint64_t offset)
{
	struct simkvm_cpu *cpu = sim->cpus[vcpu];
	int rc;

	pthread_mutex_lock(&cpu->lock);
	rc = sim_ring_push(cpu, slot, offset);
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
