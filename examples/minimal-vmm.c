/* SPDX-License-Identifier: MIT */
/*
 * minimal-vmm: a whole VMM in one file, and what it takes to have its guest
 * snapshotted by snapd: the lines within #ifdef SNAPD, and nothing else.
 *
 *   cc minimal-vmm.c -o plain
 *   cc -DSNAPD minimal-vmm.c -o adopted -lsnapd-agent
 *
 * The guest adds one to a word of each of its pages, again and again, and rings a
 * doorbell (a store where there is no memory) after each pass.  After PASSES of them
 * (first argument, default 1000) the VMM looks whether every page was counted right.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef SNAPD
#include <snapd/agent.h>
#endif

#define RAM_BYTES  (4u << 20)
#define TABLES_GPA 0x1000u
#define CODE_GPA   0x4000u
#define DATA_GPA   0x100000u
#define DOORBELL   0x10000000u

/* rbx: page, rsi: first page, rcx: end, rdi: doorbell. */
__asm__(".pushsection .rodata\n"
	"guest_code:\n"
	"1:	incq (%rbx)\n"
	"	add $4096, %rbx\n"
	"	cmp %rcx, %rbx\n"
	"	jne 1b\n"
	"	mov %rsi, %rbx\n"
	"	mov %rax, (%rdi)\n"
	"	jmp 1b\n"
	"guest_code_end:\n"
	".popsection\n");
extern const char guest_code[], guest_code_end[];

struct vmm {
	int kvm, vm, vcpu, ram_fd;
	char *ram;
	struct kvm_run *run;
	uint64_t passes; /* the device's state: doorbells seen */
#ifdef SNAPD
	struct snapd_vm *agent;
	struct snapd_vcpu *agent_vcpu;
#endif
};

#ifdef SNAPD
static int save_doorbell(void *opaque, struct snapd_state_writer *w)
{
	struct vmm *v = opaque;

	return snapd_state_put(w, "doorbell", 0, 1, &v->passes, sizeof(v->passes));
}

static int load_doorbell(void *opaque, const struct snapd_state_reader *r)
{
	struct vmm *v = opaque;
	const void *data;
	uint16_t version;
	size_t len;
	int rc = snapd_state_get(r, "doorbell", 0, &version, &data, &len);

	if (rc || version != 1 || len != sizeof(v->passes))
		return rc ? rc : -1;
	memcpy(&v->passes, data, len);
	return 0;
}

static const struct snapd_vm_callbacks callbacks = {.size_bytes = sizeof(struct snapd_vm_callbacks),
						    .save = save_doorbell,
						    .load = load_doorbell};

static void attach(struct vmm *v)
{
	const struct snapd_vm_config config = {.size_bytes = sizeof(config),
					       .kvm_fd = v->kvm,
					       .vm_fd = v->vm,
					       .callbacks = &callbacks,
					       .opaque = v};

	if (snapd_vm_attach(&config, &v->agent))
		errx(1, "attach: %s", snapd_vm_error(NULL));
}
#endif

static void must(int rc, const char *what)
{
	if (rc < 0)
		err(1, "%s", what);
}

static void create_vm(struct vmm *v)
{
	v->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (v->kvm < 0) {
		warn("/dev/kvm");
		exit(77);
	}
	v->vm = ioctl(v->kvm, KVM_CREATE_VM, 0);
	must(v->vm, "KVM_CREATE_VM");
#ifdef SNAPD
	attach(v);
#endif
}

static void create_ram(struct vmm *v)
{
	v->ram_fd = memfd_create("guest-ram", MFD_CLOEXEC);
	must(v->ram_fd, "memfd_create");
	must(ftruncate(v->ram_fd, RAM_BYTES), "ftruncate");
	v->ram = mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, v->ram_fd, 0);
	if (v->ram == MAP_FAILED)
		err(1, "mmap of guest RAM");
#ifdef SNAPD
	struct snapd_memslot slot = {.size_bytes = RAM_BYTES, .hva = v->ram, .fd = v->ram_fd};

	if (snapd_vm_memslot(v->agent, &slot))
		errx(1, "memslot: %s", snapd_vm_error(v->agent));
#else
	struct kvm_userspace_memory_region region = {.memory_size = RAM_BYTES,
						     .userspace_addr = (uintptr_t)v->ram};

	must(ioctl(v->vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
#endif
}

static void create_vcpu(struct vmm *v)
{
	int bytes = ioctl(v->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);

	must(bytes, "KVM_GET_VCPU_MMAP_SIZE");
	v->vcpu = ioctl(v->vm, KVM_CREATE_VCPU, 0);
	must(v->vcpu, "KVM_CREATE_VCPU");
	v->run = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, v->vcpu, 0);
	if (v->run == MAP_FAILED)
		err(1, "mmap of kvm_run");
#ifdef SNAPD
	if (snapd_vcpu_attach(v->agent, v->vcpu, 0, &v->agent_vcpu))
		errx(1, "vCPU: %s", snapd_vm_error(v->agent));
#endif
}

/* The program, and page tables that map 1 GiB one to one, open to user code. */
static void load_guest(struct vmm *v)
{
	uint64_t *pml4 = (uint64_t *)(v->ram + TABLES_GPA), *pdpt = pml4 + 512, *pd = pml4 + 1024;

	memcpy(v->ram + CODE_GPA, guest_code, guest_code_end - guest_code);
	pml4[0] = (TABLES_GPA + 0x1000) | 0x27;
	pdpt[0] = (TABLES_GPA + 0x2000) | 0x27;
	for (uint64_t i = 0; i < 512; i++)
		pd[i] = i << 21 | 0xe7;
}

/* 64-bit user mode: it runs natively on every KVM. */
static void set_registers(struct vmm *v)
{
	struct kvm_segment data = {.limit = ~0u,
				   .selector = 0x2b,
				   .type = 3,
				   .present = 1,
				   .dpl = 3,
				   .db = 1,
				   .s = 1,
				   .g = 1};
	struct kvm_regs regs = {.rip = CODE_GPA,
				.rflags = 2,
				.rbx = DATA_GPA,
				.rsi = DATA_GPA,
				.rcx = RAM_BYTES,
				.rdi = DOORBELL};
	struct kvm_sregs s;

	must(ioctl(v->vcpu, KVM_GET_SREGS, &s), "KVM_GET_SREGS");
	s.ds = s.es = s.fs = s.gs = s.ss = data;
	s.cs = (struct kvm_segment){.limit = ~0u,
				    .selector = 0x33,
				    .type = 11,
				    .present = 1,
				    .dpl = 3,
				    .s = 1,
				    .l = 1,
				    .g = 1};
	s.cr0 = 0x80050033;
	s.cr3 = TABLES_GPA;
	s.cr4 = 0x20;
	s.efer = 0xd01;
	must(ioctl(v->vcpu, KVM_SET_SREGS, &s), "KVM_SET_SREGS");
	must(ioctl(v->vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static int run_vcpu(struct vmm *v)
{
#ifdef SNAPD
	return snapd_vcpu_run(v->agent_vcpu);
#else
	return ioctl(v->vcpu, KVM_RUN, 0);
#endif
}

static void run_guest(struct vmm *v, uint64_t passes)
{
	while (v->passes < passes) {
		must(run_vcpu(v), "KVM_RUN");
		if (v->run->exit_reason != KVM_EXIT_MMIO || v->run->mmio.phys_addr != DOORBELL)
			errx(1, "unexpected exit, reason %u", v->run->exit_reason);
		v->passes++;
	}
}

static int count_is_right(const struct vmm *v)
{
	for (uint32_t gpa = DATA_GPA; gpa < RAM_BYTES; gpa += 4096)
		if (*(const uint64_t *)(v->ram + gpa) != v->passes)
			return 0;
	return 1;
}

int main(int argc, char **argv)
{
	struct vmm v = {0};
	int right;

	create_vm(&v);
	create_ram(&v);
	create_vcpu(&v);
#ifdef SNAPD
	if (!getenv("SNAPD_RESTORE")) /* else snapd fills memory */
#endif
		load_guest(&v);
	set_registers(&v);
	run_guest(&v, argc > 1 ? strtoull(argv[1], NULL, 0) : 1000);
	right = count_is_right(&v);
	printf("%llu passes, memory is %s\n", (unsigned long long)v.passes,
	       right ? "right" : "WRONG");
#ifdef SNAPD
	snapd_vm_detach(v.agent);
#endif
	return !right;
}
