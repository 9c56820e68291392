/* SPDX-License-Identifier: MIT */
/*
 * arch: which architecture this was compiled for, and the one door through
 * which its KVM calls go.  Any thread; no state.
 */
#include "snapd/arch/arch.h"

#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define DISCARD_TRIES 64 /* an instruction's MMIO comes in a few parts */

/* KVM takes any value of kvm_run.immediate_exit but 0 as set.  A bit of our own
 * leaves alone what a kick of the VMM's or the agent's has put there, even one
 * that comes just now. */
#define EXIT_BIT 0x40

static int kernel_ioctl(void *opaque, int fd, unsigned long request, void *arg)
{
	return ioctl(fd, request, arg);
}

static void *kernel_mmap(void *opaque, size_t len_bytes, int prot, int flags, int fd,
			 int64_t offset)
{
	return mmap(NULL, len_bytes, prot, flags, fd, offset);
}

static int kernel_munmap(void *opaque, void *addr, size_t len_bytes)
{
	return munmap(addr, len_bytes);
}

const struct snapd_kvm_ops arch_kvm_kernel = {
	.ioctl = kernel_ioctl,
	.mmap = kernel_mmap,
	.munmap = kernel_munmap,
};

int arch_ioctl(const struct arch_vm *vm, int fd, unsigned long request, void *arg)
{
	int r = vm->kvm->ioctl(vm->kvm->opaque, fd, request, arg);

	return r < 0 ? -errno : r;
}

int arch_ioctl_value(const struct arch_vm *vm, int fd, unsigned long request, unsigned long value)
{
	/* ioctl(2) passes a number as if it were a pointer. */
	return arch_ioctl(vm, fd, request, (void *)value); // NOLINT(performance-no-int-to-ptr)
}

int arch_cap(const struct arch_vm *vm, uint32_t cap)
{
	int r = arch_ioctl_value(vm, vm->vm_fd, KVM_CHECK_EXTENSION, cap);

	return r < 0 ? 0 : r;
}

int arch_complete_pending(const struct arch_vm *vm, int vcpu_fd, struct kvm_run *run,
			  uint32_t index, struct err *e)
{
	int r;

	/* Relaxed: KVM_RUN, which reads it, is of this thread; a kick of another is atomic too. */
	__atomic_fetch_or(&run->immediate_exit, EXIT_BIT, __ATOMIC_RELAXED);
	r = arch_ioctl(vm, vcpu_fd, KVM_RUN, NULL);
	__atomic_fetch_and(&run->immediate_exit, (uint8_t)~EXIT_BIT, __ATOMIC_RELAXED);
	if (r == -EINTR || r == -EAGAIN) /* EAGAIN: it waits for its start-up IPI */
		return 0;
	if (r < 0)
		return err_errno(e, -r, "vCPU %u: KVM_RUN to complete a pending exit", index);
	return err_set(e, EAGAIN, "vCPU %u: an exit is to be handled before its state is whole",
		       index);
}

int arch_discard_pending(const struct arch_vm *vm, int vcpu_fd, struct kvm_run *run, uint32_t index,
			 struct err *e)
{
	for (int i = 0; i < DISCARD_TRIES; i++) {
		int r = arch_complete_pending(vm, vcpu_fd, run, index, NULL);

		if (r == 0)
			return 0;
		if (r != -EAGAIN)
			return err_errno(e, -r, "vCPU %u: KVM_RUN to drop a pending exit", index);
	}
	return err_set(e, EIO, "vCPU %u: its exits stay pending", index);
}

const struct arch_ops *arch_host(void)
{
#if defined(__x86_64__)
	return &arch_x86_64;
#elif defined(__aarch64__)
	return &arch_aarch64;
#else
#error "write snapd/arch/NAME.c; arch.h has the steps"
#endif
}
