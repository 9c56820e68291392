/* SPDX-License-Identifier: MIT */
/*
 * preload: the libc calls of QEMU's that this library answers in libc's place.  Every other
 * program that finds itself with this library gets what libc does.
 *
 *   ioctl      KVM's; VFIO's and vDPA's, to refuse; userfaultfd's, which fail
 *   sendmsg    descriptors of RAM that go to another process, to refuse
 *   munmap     RAM that goes
 *   madvise    RAM given back to the host, by MADV_REMOVE
 *   fallocate  the same, by FALLOC_FL_PUNCH_HOLE
 */
#include "adapters/qemu/adapter.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <linux/falloc.h>
#include <linux/userfaultfd.h>

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
typedef ssize_t (*sendmsg_fn)(int fd, const struct msghdr *msg, int flags);
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

/*
 * Post-copy and background snapshots have QEMU's mapping of RAM tell of faults.  The guest's are
 * not on that mapping: it would read zeros for pages that have yet to come.  QEMU asks for this
 * before it promises either, and takes no for an answer.
 */
static bool watches_faults(unsigned long request)
{
	return request == (unsigned int)UFFDIO_API && adapter_vm() && blocks_any();
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
	if (watches_faults(request)) {
		adapter_log("no post-copy, no background snapshots: QEMU does not see the guest's "
			    "faults under snapd");
		errno = EOPNOTSUPP;
		return -1;
	}
	look_for_dma(request);
	return real_ioctl(fd, request, arg);
}

static bool passes_ram(const struct cmsghdr *c)
{
	const unsigned char *fds = CMSG_DATA(c);
	size_t nr = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
	bool is_ram = false;

	for (size_t i = 0; i < nr && !is_ram; i++) {
		int fd;

		memcpy(&fd, fds + i * sizeof(fd), sizeof(fd));
		is_ram = blocks_has_file(fd);
	}
	return is_ram;
}

/* vhost-user and its like have stream sockets; the agent, which does the same, has not. */
static bool is_stream(int fd)
{
	int type = 0;
	socklen_t len = sizeof(type);

	return !getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) && type == SOCK_STREAM;
}

static void look_for_ram(int fd, const struct msghdr *msg)
{
	/* The macros do not take a const one. */
	struct msghdr *m = (struct msghdr *)msg;

	if (!msg->msg_controllen || !is_stream(fd))
		return;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c))
		if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS && passes_ram(c))
			adapter_refuse("another process has its memory, and writes it unseen "
				       "(vhost-user)");
}

EXPORT ssize_t sendmsg(int fd, const struct msghdr *msg, int flags)
{
	static _Atomic(void *) fn;

	if (adapter_vm())
		look_for_ram(fd, msg);
	return ((sendmsg_fn)next(&fn, "sendmsg"))(fd, msg, flags);
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
