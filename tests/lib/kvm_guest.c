/* SPDX-License-Identifier: MIT */
/* A small real guest for tests; kvm_guest.h tells how it is laid out. */
#include "tests/lib/kvm_guest.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "snapd/util/cleanup.h"

#define CPUID_ENTRIES 256
#define PTE_TABLE     0x67ull /* present, writable, user, accessed, dirty */
#define PTE_LEAF      0xe7ull /* and a 2 MiB page */
#define STACKS_GPA    0x100000ull
#define STACK_BYTES   0x10000ull

/* The guest's functions: from the test program's own section. */
extern const uint8_t guest_start[] __asm__("__start_guest_text") __attribute__((weak));
extern const uint8_t guest_stop[] __asm__("__stop_guest_text") __attribute__((weak));

static int sys_ioctl(int fd, unsigned long request, void *arg)
{
	int r = ioctl(fd, request, arg);

	return r < 0 ? -errno : r;
}

static void *shared_map(size_t len_bytes, int fd, off_t offset)
{
	void *p = mmap(NULL, len_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);

	return p == MAP_FAILED ? NULL : p;
}

int kvm_guest_cap(struct kvm_guest *g, uint32_t cap)
{
	return sys_ioctl(g->vm_fd, KVM_CHECK_EXTENSION, (void *)(uintptr_t)cap);
}

static int enable_ring(struct kvm_guest *g, uint32_t entries)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL};
	uint32_t bytes = entries * sizeof(struct kvm_dirty_gfn);

	if (kvm_guest_cap(g, cap.cap) <= 0)
		cap.cap = KVM_CAP_DIRTY_LOG_RING;
	if (kvm_guest_cap(g, cap.cap) < (int)bytes)
		return -ENOTSUP;
	cap.args[0] = bytes;
	return sys_ioctl(g->vm_fd, KVM_ENABLE_CAP, &cap);
}

static int make_vm(struct kvm_guest *g, const struct kvm_guest_config *config)
{
	struct kvm_pit_config pit = {0};
	int r;

	g->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (g->kvm_fd < 0)
		return -ENODEV;
	g->vm_fd = sys_ioctl(g->kvm_fd, KVM_CREATE_VM, NULL);
	if (g->vm_fd < 0)
		return g->vm_fd;
	g->run_bytes = sys_ioctl(g->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, NULL);
	if (g->run_bytes < 0)
		return g->run_bytes;
	r = sys_ioctl(g->vm_fd, KVM_SET_TSS_ADDR, (void *)0xfffbd000ul);
	if (r >= 0 && config->irqchip)
		r = sys_ioctl(g->vm_fd, KVM_CREATE_IRQCHIP, NULL);
	if (r >= 0 && config->irqchip)
		r = sys_ioctl(g->vm_fd, KVM_CREATE_PIT2, &pit);
	if (r >= 0 && config->ring_entries)
		r = enable_ring(g, config->ring_entries);
	g->ring_entries = config->ring_entries;
	return r < 0 ? r : 0;
}

/* Page directories of 2 MiB pages, one a GiB, identity mapped. */
static void make_page_tables(uint8_t *sys)
{
	uint64_t *pml4 = (void *)(sys + KVM_GUEST_PML4_GPA);
	uint64_t *pdpt = pml4 + 512, *pd = pml4 + 1024;

	pml4[0] = (KVM_GUEST_PML4_GPA + 0x1000) | PTE_TABLE;
	for (uint64_t i = 0; i < KVM_GUEST_MAP_GIB; i++)
		pdpt[i] = (KVM_GUEST_PML4_GPA + 0x2000 + i * 0x1000) | PTE_TABLE;
	for (uint64_t i = 0; i < KVM_GUEST_MAP_GIB * 512; i++)
		pd[i] = (i << 21) | PTE_LEAF;
}

static int make_memory(struct kvm_guest *g, const struct kvm_guest_config *config)
{
	g->sys_fd = memfd_create("guest-sys", MFD_CLOEXEC);
	if (g->sys_fd < 0 || ftruncate(g->sys_fd, KVM_GUEST_SYS_BYTES) < 0)
		return -errno;
	g->sys = shared_map(KVM_GUEST_SYS_BYTES, g->sys_fd, 0);
	if (!g->sys)
		return -errno;
	make_page_tables(g->sys);
	if (guest_start)
		memcpy(g->sys + KVM_GUEST_CODE_GPA, guest_start, guest_stop - guest_start);
	if (config->data_bytes) {
		g->data_bytes = config->data_bytes;
		g->data_fd = config->data_fd ? fcntl(config->data_fd, F_DUPFD_CLOEXEC, 0)
					     : memfd_create("guest-data", MFD_CLOEXEC);
		if (g->data_fd < 0 || ftruncate(g->data_fd, config->data_bytes) < 0)
			return -errno;
		g->data = shared_map(config->data_bytes, g->data_fd, 0);
		if (!g->data)
			return -errno;
	}
	if (config->no_slots)
		return 0;
	return kvm_guest_slot(g, KVM_GUEST_SYS_SLOT, 0, 0, KVM_GUEST_SYS_BYTES, g->sys);
}

int kvm_guest_create(struct kvm_guest *g, const struct kvm_guest_config *config)
{
	int r;

	*g = (struct kvm_guest){.kvm_fd = -1, .vm_fd = -1, .sys_fd = -1, .data_fd = -1};
	r = make_vm(g, config);
	if (!r)
		r = make_memory(g, config);
	if (r)
		kvm_guest_destroy(g);
	return r;
}

void kvm_guest_destroy(struct kvm_guest *g)
{
	for (uint32_t i = 0; i < g->nr_vcpus; i++) {
		struct kvm_guest_vcpu *v = &g->vcpus[i];

		if (v->ring)
			munmap(v->ring, g->ring_entries * sizeof(*v->ring));
		if (v->run)
			munmap(v->run, g->run_bytes);
		cleanup_fd(&v->fd);
	}
	if (g->sys)
		munmap(g->sys, KVM_GUEST_SYS_BYTES);
	if (g->data)
		munmap(g->data, g->data_bytes);
	cleanup_fd(&g->data_fd);
	cleanup_fd(&g->sys_fd);
	cleanup_fd(&g->vm_fd);
	cleanup_fd(&g->kvm_fd);
	*g = (struct kvm_guest){.kvm_fd = -1, .vm_fd = -1, .sys_fd = -1, .data_fd = -1};
}

int kvm_guest_slot(struct kvm_guest *g, uint32_t slot, uint32_t flags, uint64_t gpa,
		   uint64_t size_bytes, void *hva)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = size_bytes,
		.userspace_addr = (uintptr_t)hva,
	};

	return sys_ioctl(g->vm_fd, KVM_SET_USER_MEMORY_REGION, &region);
}

static int set_cpuid(struct kvm_guest *g, int vcpu_fd)
{
	_cleanup_free_ struct kvm_cpuid2 *c =
		calloc(1, sizeof(*c) + CPUID_ENTRIES * sizeof(c->entries[0]));
	int r;

	if (!c)
		return -ENOMEM;
	c->nent = CPUID_ENTRIES;
	r = sys_ioctl(g->kvm_fd, KVM_GET_SUPPORTED_CPUID, c);
	return r < 0 ? r : sys_ioctl(vcpu_fd, KVM_SET_CPUID2, c);
}

static struct kvm_segment user_segment(uint16_t selector, uint8_t type, uint8_t l)
{
	return (struct kvm_segment){
		.limit = 0xffffffff,
		.selector = selector,
		.type = type,
		.present = 1,
		.dpl = 3,
		.s = 1,
		.l = l,
		.db = !l,
		.g = 1,
	};
}

static int set_long_mode(int vcpu_fd)
{
	struct kvm_sregs s;
	int r = sys_ioctl(vcpu_fd, KVM_GET_SREGS, &s);

	if (r < 0)
		return r;
	s.cs = user_segment(0x33, 0xb, 1);
	s.ss = s.ds = s.es = s.fs = s.gs = user_segment(0x2b, 0x3, 0);
	s.cr0 = 0x80050033; /* PG AM WP NE ET MP PE */
	s.cr4 = 0x620;	    /* PAE OSFXSR OSXMMEXCPT */
	s.efer = 0xd01;	    /* NX LMA LME SCE */
	s.cr3 = KVM_GUEST_PML4_GPA;
	return sys_ioctl(vcpu_fd, KVM_SET_SREGS, &s);
}

int kvm_guest_start(struct kvm_guest *g, uint32_t i, void (*fn)(void), uint64_t a, uint64_t b,
		    uint64_t c, uint64_t d)
{
	struct kvm_regs regs = {
		.rip = KVM_GUEST_CODE_GPA + ((uintptr_t)fn - (uintptr_t)guest_start),
		/* as if called: 16-byte aligned before the return address */
		.rsp = STACKS_GPA + (i + 1) * STACK_BYTES - 8,
		.rdi = a,
		.rsi = b,
		.rdx = c,
		.rcx = d,
		.rflags = 0x2,
	};

	return sys_ioctl(g->vcpus[i].fd, KVM_SET_REGS, &regs);
}

static int map_vcpu(struct kvm_guest *g, struct kvm_guest_vcpu *v)
{
	v->run = shared_map(g->run_bytes, v->fd, 0);
	if (!v->run)
		return -errno;
	if (!g->ring_entries)
		return 0;
	v->ring = shared_map(g->ring_entries * sizeof(*v->ring), v->fd,
			     KVM_DIRTY_LOG_PAGE_OFFSET * KVM_GUEST_PAGE);
	return v->ring ? 0 : -errno;
}

int kvm_guest_add_vcpu(struct kvm_guest *g, void (*fn)(void), uint64_t a, uint64_t b, uint64_t c,
		       uint64_t d)
{
	uint32_t i = g->nr_vcpus;
	struct kvm_guest_vcpu *v = &g->vcpus[i];
	int r;

	if (i == KVM_GUEST_MAX_VCPUS)
		return -ENOSPC;
	*v = (struct kvm_guest_vcpu){
		.fd = sys_ioctl(g->vm_fd, KVM_CREATE_VCPU, (void *)(uintptr_t)i)};
	if (v->fd < 0)
		return v->fd;
	g->nr_vcpus++;
	r = map_vcpu(g, v);
	if (!r)
		r = set_cpuid(g, v->fd);
	if (!r)
		r = set_long_mode(v->fd);
	if (!r)
		r = kvm_guest_start(g, i, fn, a, b, c, d);
	if (!r && i) {
		struct kvm_mp_state runnable = {.mp_state = KVM_MP_STATE_RUNNABLE};

		r = sys_ioctl(v->fd, KVM_SET_MP_STATE, &runnable);
	}
	return r < 0 ? r : (int)i;
}

int kvm_guest_run(struct kvm_guest *g, uint32_t i)
{
	int r = sys_ioctl(g->vcpus[i].fd, KVM_RUN, NULL);

	return r < 0 ? r : (int)g->vcpus[i].run->exit_reason;
}

static bool is_exit_mmio(const struct kvm_run *run, bool write)
{
	return run->exit_reason == KVM_EXIT_MMIO && run->mmio.phys_addr == KVM_GUEST_EXIT_GPA &&
	       run->mmio.len == 8 && run->mmio.is_write == write;
}

bool kvm_guest_told(const struct kvm_guest *g, uint32_t i, uint64_t *value)
{
	const struct kvm_run *run = g->vcpus[i].run;

	if (!is_exit_mmio(run, true))
		return false;
	memcpy(value, run->mmio.data, sizeof(*value));
	return true;
}

bool kvm_guest_asked(const struct kvm_guest *g, uint32_t i)
{
	return is_exit_mmio(g->vcpus[i].run, false);
}

void kvm_guest_answer(struct kvm_guest *g, uint32_t i, uint64_t value)
{
	memcpy(g->vcpus[i].run->mmio.data, &value, sizeof(value));
}

uint32_t kvm_guest_harvest(struct kvm_guest *g, uint32_t i, struct kvm_dirty_gfn *out, uint32_t max)
{
	struct kvm_guest_vcpu *v = &g->vcpus[i];
	uint32_t n = 0;

	while (n < max && n < g->ring_entries) {
		struct kvm_dirty_gfn *e = &v->ring[v->next % g->ring_entries];

		if (__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
			break;
		if (out)
			out[n] = *e;
		__atomic_store_n(&e->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
		v->next++;
		n++;
	}
	return n;
}

int kvm_guest_reset_rings(struct kvm_guest *g)
{
	return sys_ioctl(g->vm_fd, KVM_RESET_DIRTY_RINGS, NULL);
}
