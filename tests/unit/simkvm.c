/* SPDX-License-Identifier: MIT */
/*
 * The simulated KVM against what is known of the kernel's (docs: kernel tests).
 *
 * Method: a program that writes the pages that the test names, one step at a time,
 * through the same ioctls, ring and kvm_run page that a VMM uses.
 */
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/kvm.h>

#include "tests/lib/check.h"
#include "vmm/simkvm.h"

#define PAGE	 4096ull
#define PAGES	 512u
#define BELL_GPA 0x10000000ull
#define RING	 256u

/* What the guest does next: a list of accesses, then the doorbell for ever. */
struct script {
	uint64_t gpa[4096];
	uint32_t nr, at;
	bool load;
};

struct vm {
	struct simkvm *sim;
	struct snapd_kvm_ops ops;
	struct script script;
	int kvm, vm, vcpu;
	struct kvm_run *run;
	struct kvm_dirty_gfn *ring;
	uint32_t next; /* first entry not harvested */
	uint8_t *ram;
};

static void step(struct simkvm_cpu *cpu, uint64_t rdi, void *opaque)
{
	struct script *s = opaque;

	/* A step may be replayed: `at` moves on after its last instruction only. */
	if (s->at == s->nr) {
		simkvm_store(cpu, BELL_GPA, rdi);
		return;
	}
	if (s->load)
		(void)simkvm_load(cpu, s->gpa[s->at]);
	else
		simkvm_store(cpu, s->gpa[s->at], s->at + 1);
	s->at++;
}

static int call(struct vm *v, int fd, unsigned long request, void *arg)
{
	int rc = v->ops.ioctl(v->ops.opaque, fd, request, arg);

	return rc < 0 ? -errno : rc;
}

static int enable_ring(struct vm *v, uint64_t bytes)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_DIRTY_LOG_RING, .args = {bytes}};

	return call(v, v->vm, KVM_ENABLE_CAP, &cap);
}

static int set_slot(struct vm *v, uint32_t id, uint64_t gpa, uint64_t pages, uint64_t first,
		    uint32_t flags)
{
	struct kvm_userspace_memory_region r = {
		.slot = id,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = pages * PAGE,
		.userspace_addr = (uintptr_t)(v->ram + first * PAGE),
	};

	return call(v, v->vm, KVM_SET_USER_MEMORY_REGION, &r);
}

static int add_slot(struct vm *v, uint32_t id, uint64_t gpa, uint64_t pages, uint64_t first)
{
	return set_slot(v, id, gpa, pages, first, KVM_MEM_LOG_DIRTY_PAGES);
}

static void vm_open(struct vm *v)
{
	const struct simkvm_config config = {.step = step, .opaque = &v->script};

	memset(v, 0, sizeof(*v));
	check(simkvm_create(&config, &v->sim) == 0, "create");
	simkvm_get_ops(v->sim, &v->ops);
	v->kvm = simkvm_open(v->sim);
	v->vm = call(v, v->kvm, KVM_CREATE_VM, NULL);
	check(v->kvm >= 0 && v->vm >= 0, "descriptors");
	v->ram =
		mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

static void vm_start(struct vm *v)
{
	check(enable_ring(v, RING * sizeof(struct kvm_dirty_gfn)) == 0, "ring");
	v->vcpu = call(v, v->vm, KVM_CREATE_VCPU, NULL);
	check(v->vcpu >= 0, "vCPU: %d", v->vcpu);
	v->run = v->ops.mmap(v->ops.opaque, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, v->vcpu, 0);
	v->ring = v->ops.mmap(v->ops.opaque, RING * sizeof(struct kvm_dirty_gfn),
			      PROT_READ | PROT_WRITE, MAP_SHARED, v->vcpu,
			      KVM_DIRTY_LOG_PAGE_OFFSET * (int64_t)PAGE);
	check(v->run != MAP_FAILED && v->ring != MAP_FAILED, "mappings");
}

static void vm_close(struct vm *v)
{
	if (v->ring)
		v->ops.munmap(v->ops.opaque, v->ring, RING * sizeof(struct kvm_dirty_gfn));
	if (v->run)
		v->ops.munmap(v->ops.opaque, v->run, PAGE);
	if (v->vcpu > 0)
		close(v->vcpu);
	close(v->vm);
	close(v->kvm);
	munmap(v->ram, PAGES * PAGE);
	simkvm_destroy(v->sim);
}

/* A new script; whatever step was under way is forgotten. */
static void do_pages(struct vm *v, bool load, uint32_t first, uint32_t nr)
{
	static struct kvm_regs regs;
	static struct kvm_xsave xsave;

	check(call(v, v->vcpu, KVM_SET_REGS, &regs) == 0 &&
		      call(v, v->vcpu, KVM_SET_XSAVE, &xsave) == 0,
	      "new step");
	v->script.at = 0;
	v->script.nr = nr;
	v->script.load = load;
	for (uint32_t i = 0; i < nr; i++)
		v->script.gpa[i] = (first + i) * PAGE;
}

static uint32_t run(struct vm *v)
{
	int rc = call(v, v->vcpu, KVM_RUN, NULL);

	check(rc == 0, "KVM_RUN: %d", rc);
	return v->run->exit_reason;
}

/* Run the script to its end. */
static void run_to_bell(struct vm *v)
{
	check(run(v) == KVM_EXIT_MMIO && v->run->mmio.phys_addr == BELL_GPA, "exit %u at 0x%llx",
	      v->run->exit_reason, (unsigned long long)v->run->mmio.phys_addr);
}

static bool harvest_one(struct vm *v, uint64_t *offset)
{
	struct kvm_dirty_gfn *e = &v->ring[v->next % RING];

	if (__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
		return false;
	*offset = e->offset;
	__atomic_store_n(&e->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
	v->next++;
	return true;
}

/* Mark all that is dirty as harvested; the last offset seen in *offset. */
static uint32_t harvest(struct vm *v, uint64_t *offset)
{
	uint64_t last;
	uint32_t n = 0;

	while (n < RING && harvest_one(v, offset ? offset : &last))
		n++;
	return n;
}

static uint32_t reset(struct vm *v)
{
	int rc = call(v, v->vm, KVM_RESET_DIRTY_RINGS, NULL);

	check(rc >= 0, "RESET: %d", rc);
	return (uint32_t)rc;
}

static void test_enable(void)
{
	struct vm v;

	vm_open(&v);
	check(call(&v, v.vm, KVM_RESET_DIRTY_RINGS, NULL) == -EINVAL, "RESET without rings");
	check(enable_ring(&v, 3000) == -EINVAL, "not a power of two");
	check(enable_ring(&v, 512) == -EINVAL, "too small");
	check(enable_ring(&v, 2 << 20) == -E2BIG, "too large");
	check(enable_ring(&v, 4096) == 0, "fits");
	check(enable_ring(&v, 4096) == -EINVAL, "twice");
	vm_close(&v);
	vm_open(&v);
	v.vcpu = call(&v, v.vm, KVM_CREATE_VCPU, NULL);
	check(enable_ring(&v, 4096) == -EINVAL, "after a vCPU");
	vm_close(&v);
}

static void test_slots(void)
{
	struct vm v;

	vm_open(&v);
	check(add_slot(&v, 1, 0, 16, 0) == 0, "add");
	check(add_slot(&v, 1, 0, 8, 0) == -EINVAL, "resize");
	check(add_slot(&v, 1, 0, 16, 16) == -EINVAL, "other memory");
	check(set_slot(&v, 1, 0, 16, 0, KVM_MEM_READONLY) == -EINVAL, "read-only");
	check(add_slot(&v, 2, 8 * PAGE, 16, 16) == -EEXIST, "overlap");
	check(add_slot(&v, 1u << 16, 0, 16, 0) == 0, "the other address space");
	check(add_slot(&v, 2u << 16, 0, 16, 0) == -EINVAL, "a third address space");
	check(add_slot(&v, 7, 0, 0, 0) == -EINVAL, "delete what is not there");
	check(add_slot(&v, 1, 64 * PAGE, 16, 0) == 0, "move");
	check(add_slot(&v, 1, 0, 0, 0) == 0, "delete");
	check(add_slot(&v, 40000, 0, 16, 0) == -EINVAL, "id too high");
	vm_close(&v);
}

static void test_write_is_reported_once(void)
{
	uint64_t offset = 0;
	struct vm v;

	vm_open(&v);
	check(add_slot(&v, 3, 0, 64, 0) == 0, "slot");
	vm_start(&v);
	do_pages(&v, false, 5, 1);
	run_to_bell(&v);
	check(harvest(&v, &offset) == 1 && offset == 5, "first write");
	do_pages(&v, false, 5, 1);
	run_to_bell(&v);
	check(harvest(&v, NULL) == 0, "second write, before RESET");
	check(reset(&v) == 1 && reset(&v) == 0, "RESET counts once");
	do_pages(&v, true, 5, 1);
	run_to_bell(&v);
	check(harvest(&v, NULL) == 0, "a read of a mapped page");
	do_pages(&v, false, 5, 1);
	run_to_bell(&v);
	check(harvest(&v, NULL) == 1, "write after RESET");
	do_pages(&v, true, 6, 1);
	run_to_bell(&v);
	check(harvest(&v, NULL) == 1, "first read of an unmapped page");
	check(v.ram[5 * PAGE] == 1, "the write itself");
	vm_close(&v);
}

static void test_ring_full(void)
{
	struct vm v;
	uint32_t usable = RING - SIMKVM_RING_RESERVED;

	vm_open(&v);
	check(add_slot(&v, 0, 0, PAGES, 0) == 0, "slot");
	vm_start(&v);
	do_pages(&v, false, 0, PAGES);
	check(run(&v) == KVM_EXIT_DIRTY_RING_FULL && v.script.at == usable, "at %u", v.script.at);
	check(run(&v) == KVM_EXIT_DIRTY_RING_FULL, "still full");
	check(harvest(&v, NULL) == usable, "all of them");
	check(run(&v) == KVM_EXIT_DIRTY_RING_FULL, "harvested is not reset");
	check(reset(&v) == usable, "RESET");
	while (run(&v) == KVM_EXIT_DIRTY_RING_FULL) {
		check(harvest(&v, NULL) == usable && reset(&v) == usable, "again");
	}
	check(v.script.at == PAGES, "to the end");
	vm_close(&v);
}

/* Entries outlive their slot, with the old id and offset; RESET takes them. */
static void test_stale_entries(void)
{
	uint64_t offset = 0;
	struct vm v;

	vm_open(&v);
	check(add_slot(&v, 3, 0, 64, 0) == 0, "slot");
	vm_start(&v);
	do_pages(&v, false, 40, 1);
	run_to_bell(&v);
	check(add_slot(&v, 3, 0, 0, 0) == 0 && add_slot(&v, 3, 0, 8, 0) == 0, "shrunk");
	check(harvest(&v, &offset) == 1 && offset == 40, "old offset");
	check(reset(&v) == 1, "counted");
	check(simkvm_push(v.sim, 0, 1u << 16 | 9, 7) == 0, "an entry of address space 1");
	check(harvest(&v, &offset) == 1 && offset == 7 && reset(&v) == 1, "and back");
	vm_close(&v);
}

static void test_zap(void)
{
	struct kvm_enable_cap cap = {.cap = 213, .args = {1u << 7}};
	struct vm v;

	vm_open(&v);
	check(add_slot(&v, 0, 0, 16, 0) == 0 && add_slot(&v, 1, 64 * PAGE, 16, 16) == 0, "slots");
	vm_start(&v);
	do_pages(&v, false, 0, 4);
	run_to_bell(&v);
	check(harvest(&v, NULL) == 4 && reset(&v) == 4, "written");
	do_pages(&v, true, 0, 4);
	run_to_bell(&v);
	check(harvest(&v, NULL) == 0, "mapped");
	check(add_slot(&v, 1, 0, 0, 0) == 0, "delete another");
	do_pages(&v, true, 0, 4);
	run_to_bell(&v);
	check(harvest(&v, NULL) == 4 && reset(&v) == 4, "everything was zapped");
	check(call(&v, v.vm, KVM_ENABLE_CAP, &cap) == 0, "disable the quirk");
	check(add_slot(&v, 1, 64 * PAGE, 16, 16) == 0 && add_slot(&v, 1, 0, 0, 0) == 0, "again");
	do_pages(&v, true, 0, 4);
	run_to_bell(&v);
	check(harvest(&v, NULL) == 0, "nothing was zapped");
	vm_close(&v);
}

/* Linux 6.16 and later: counted, but still writable. */
static void test_interrupted_reset(void)
{
	struct vm v;

	vm_open(&v);
	check(add_slot(&v, 0, 0, 64, 0) == 0, "slot");
	vm_start(&v);
	do_pages(&v, false, 0, 32);
	run_to_bell(&v);
	check(harvest(&v, NULL) == 32, "harvest");
	simkvm_interrupt_reset(v.sim, 10, 4);
	check(reset(&v) == 10 && reset(&v) == 22, "short, then the rest");
	do_pages(&v, false, 0, 32);
	run_to_bell(&v);
	check(harvest(&v, NULL) == 28, "four pages were left writable");
	vm_close(&v);
}

static void test_hole_and_state(void)
{
	struct kvm_regs regs;
	struct kvm_xsave xsave;
	struct vm v;

	vm_open(&v);
	check(add_slot(&v, 0, 0, 8, 0) == 0, "slot");
	vm_start(&v);
	do_pages(&v, true, 20, 1);
	check(run(&v) == KVM_EXIT_MMIO && !v.run->mmio.is_write, "load in a hole");
	v.run->immediate_exit = 1;
	check(call(&v, v.vcpu, KVM_RUN, NULL) == -EINTR, "completes it and leaves");
	check(call(&v, v.vcpu, KVM_GET_REGS, &regs) == 0 && regs.rax == 1, "one instruction done");
	check(call(&v, v.vcpu, KVM_GET_XSAVE, &xsave) == 0, "and what it loaded");
	v.run->immediate_exit = 0;
	run_to_bell(&v);
	check(call(&v, v.vcpu, KVM_SET_REGS, &regs) == 0 &&
		      call(&v, v.vcpu, KVM_SET_XSAVE, &xsave) == 0,
	      "back");
	v.script.at = 0;
	run_to_bell(&v);
	check(v.script.at == 1, "the load was not done again");
	do_pages(&v, false, 20, 1);
	check(run(&v) == KVM_EXIT_MMIO && v.run->mmio.is_write, "store in a hole");
	run_to_bell(&v);
	memset(&xsave, 0xff, sizeof(xsave));
	check(call(&v, v.vcpu, KVM_SET_XSAVE, &xsave) == -EINVAL, "garbage");
	vm_close(&v);
}

/* ---- RESET against a running vCPU ---- */

#define HOT 16u

static void step_count(struct simkvm_cpu *cpu, uint64_t rdi, void *opaque)
{
	uint64_t n = simkvm_load(cpu, 0);

	simkvm_store(cpu, (1 + n % HOT) * PAGE, n);
	simkvm_store(cpu, 0, n + 1);
}

static void *run_thread(void *arg)
{
	struct vm *v = arg;
	int rc;

	do
		rc = call(v, v->vcpu, KVM_RUN, NULL);
	while (rc == 0); /* ring full: the other thread empties it */
	check(rc == -EINTR, "KVM_RUN: %d", rc);
	return NULL;
}

/* A copy taken after RESET, brought up to date with the pages reported later, must in the
 * end equal memory: a store between RESET and copy may be in both, but never in neither. */
static void test_reset_while_running(void)
{
	const struct simkvm_config config = {.step = step_count};
	static uint8_t copy[(1 + HOT) * PAGE];
	pthread_t thread;
	struct vm v = {0};
	uint64_t total = 0;

	check(simkvm_create(&config, &v.sim) == 0, "create");
	simkvm_get_ops(v.sim, &v.ops);
	v.kvm = simkvm_open(v.sim);
	v.vm = call(&v, v.kvm, KVM_CREATE_VM, NULL);
	v.ram = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	check(add_slot(&v, 0, 0, 1 + HOT, 0) == 0, "slot");
	vm_start(&v);
	check(pthread_create(&thread, NULL, run_thread, &v) == 0, "thread");
	for (bool last = false; !last;) {
		uint64_t offsets[RING];
		uint32_t n = 0;

		last = total >= 20000;
		if (last) {
			__atomic_store_n(&v.run->immediate_exit, 1, __ATOMIC_SEQ_CST);
			pthread_join(thread, NULL);
		}
		while (n < RING && harvest_one(&v, &offsets[n]))
			n++;
		check(reset(&v) == n, "RESET");
		total += n;
		for (uint32_t i = 0; i < n; i++)
			for (uint32_t w = 0; w < PAGE / 8; w++)
				((uint64_t *)(copy + offsets[i] * PAGE))[w] =
					__atomic_load_n((uint64_t *)(v.ram + offsets[i] * PAGE) + w,
							__ATOMIC_RELAXED);
	}
	check(memcmp(copy, v.ram, sizeof(copy)) == 0, "a store was lost");
	vm_close(&v);
}

int main(void)
{
	test_enable();
	test_slots();
	test_write_is_reported_once();
	test_ring_full();
	test_stale_entries();
	test_zap();
	test_interrupted_reset();
	test_hole_and_state();
	test_reset_while_running();
	return 0;
}
