/* SPDX-License-Identifier: MIT */
/*
 * arch: which architecture this was compiled for, and the one door through
 * which its KVM calls go.  Any thread; no state.
 */
#include "snapd/arch/arch.h"

#include <sys/ioctl.h>
#include <sys/mman.h>

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
