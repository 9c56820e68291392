/* SPDX-License-Identifier: MIT */
/*
 * preload: the libc calls of QEMU's that this library answers in libc's place.  Every other
 * program that finds itself with this library gets what libc does.
 *
 *   ioctl      KVM's; VFIO's and vDPA's, to refuse
 *   munmap     RAM that goes
 *   madvise    RAM given back to the host, by MADV_REMOVE
 *   fallocate  the same, by FALLOC_FL_PUNCH_HOLE
 */
#include "adapters/qemu/adapter.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <linux/falloc.h>

#define EXPORT __attribute__((visibility("default")))

#define KVM_TYPE   0xae
#define VFIO_TYPE  ';'
#define VHOST_TYPE 0xaf

/* VFIO_IOMMU_MAP_DMA and IOMMU_IOAS_MAP: a device gets at guest memory by itself. */
#define VFIO_NR_MAP_DMA	  113
#define IOMMU_NR_IOAS_MAP 0x85
/* VHOST_VDPA_*: the same, for vDPA. */
#define VDPA_NR_FIRST	  0x70
#define VDPA_NR_LAST	  0x7f

typedef int (*ioctl_fn)(int fd, unsigned long request, ...);
typedef int (*munmap_fn)(void *addr, size_t len);
typedef int (*madvise_fn)(void *addr, size_t len, int advice);
typedef int (*fallocate_fn)(int fd, int mode, off_t offset, off_t len);

/* Looked up at the first call: libraries that are initialized earlier call, too. */
static void *next(_Atomic(void *) *fn, const char *name)
{
	void *p = atomic_load_explicit(fn, memory_order_acquire);

	if (!p) {
		p = dlsym(RTLD_NEXT, name);
		atomic_store_explicit(fn, p, memory_order_release);
	}
	return p;
}

int real_ioctl(int fd, unsigned long request, void *arg)
{
	static _Atomic(void *) fn;

	return ((ioctl_fn)next(&fn, "ioctl"))(fd, request, arg);
}

int real_munmap(void *addr, size_t len)
{
	static _Atomic(void *) fn;

	return ((munmap_fn)next(&fn, "munmap"))(addr, len);
}

static void look_for_dma(unsigned long request)
{
	unsigned int type = _IOC_TYPE(request), nr = _IOC_NR(request);

	if (!adapter_vm())
		return;
	if (type == VFIO_TYPE && (nr == VFIO_NR_MAP_DMA || nr == IOMMU_NR_IOAS_MAP))
		adapter_refuse("a VFIO device writes its memory, and nobody tells of that");
	if (type == VHOST_TYPE && nr >= VDPA_NR_FIRST && nr <= VDPA_NR_LAST)
		adapter_refuse("a vDPA device writes its memory, and nobody tells of that");
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
	va_list ap;
	void *arg;

	va_start(ap, request);
	arg = va_arg(ap, void *);
	va_end(ap);
	request = (unsigned int)request; /* as the kernel has it; some callers sign-extend */
	if (_IOC_TYPE(request) == KVM_TYPE)
		return kvm_call(fd, request, arg);
	look_for_dma(request);
	return real_ioctl(fd, request, arg);
}

EXPORT int munmap(void *addr, size_t len)
{
	if (adapter_vm())
		blocks_unmapped(adapter_vm(), addr, len);
	return real_munmap(addr, len);
}

EXPORT int madvise(void *addr, size_t len, int advice)
{
	static _Atomic(void *) fn;
	int r = ((madvise_fn)next(&fn, "madvise"))(addr, len, advice);

	if (!r && advice == MADV_REMOVE && adapter_vm())
		blocks_removed(adapter_vm(), addr, len);
	return r;
}

static int punch(_Atomic(void *) *fn, const char *name, int fd, int mode, off_t offset, off_t len)
{
	int r = ((fallocate_fn)next(fn, name))(fd, mode, offset, len);

	if (!r && mode & FALLOC_FL_PUNCH_HOLE && adapter_vm())
		snapd_vm_discarded(adapter_vm(), fd, (uint64_t)offset, (uint64_t)len);
	return r;
}

/* libc has two names for it, one of which the header gives to the other. */
EXPORT int preload_fallocate(int fd, int mode, off_t offset, off_t len) __asm__("fallocate");
EXPORT int preload_fallocate64(int fd, int mode, off_t offset, off_t len) __asm__("fallocate64");

int preload_fallocate(int fd, int mode, off_t offset, off_t len)
{
	static _Atomic(void *) fn;

	return punch(&fn, "fallocate", fd, mode, offset, len);
}

int preload_fallocate64(int fd, int mode, off_t offset, off_t len)
{
	static _Atomic(void *) fn;

	return punch(&fn, "fallocate64", fd, mode, offset, len);
}
