/* SPDX-License-Identifier: MIT */
/*
 * kvm: QEMU's KVM ioctls → libsnapd-agent.  Enter: what preload.c was called with; leave:
 * what QEMU sees.  On QEMU's threads.
 *
 *   KVM_CREATE_VM           attach: before anything else can be done with the VM
 *   KVM_CREATE_VCPU         and its ring
 *   KVM_RUN                 snapd_vcpu_run(): ring-full is never seen
 *   KVM_SET_USER_MEMORY_REGION(2), KVM_GET_DIRTY_LOG   slots.c
 *   KVM_CHECK_EXTENSION     the ways of dirty tracking that are ours now are not there:
 *                           a ring, and MANUAL_DIRTY_LOG_PROTECT2, with which QEMU would ask
 *                           for INITIALLY_SET, which loses writes beside a ring
 *
 * The process has one VM here; a second one (nobody makes one) is QEMU's alone.
 */
#include "adapters/qemu/adapter.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "adapters/qemu/env.h"
#include "snapd/arch/arch.h"
#include "snapd/util/cleanup.h"

#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP
#define KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP 225
#endif
/* Linux 6.8: as KVM_SET_USER_MEMORY_REGION, and a guest_memfd. */
#define SET_USER_MEMORY_REGION2 0x4049u /* _IOC_DIR and _IOC_NR without type and size */
#define MEM_GUEST_MEMFD		(1u << 2)

#define VCPUS_MAX	    1024u
/* Where KVM shadows page tables, CPL 0 may be emulated, with an entry for each store, and ring-full
 * seen only every few thousand instructions: the rings must never come near it. */
#define EMULATED_HARVEST_US 1000u

static struct {
	pthread_mutex_t create_lock;
	_Atomic(struct snapd_vm *) vm; /* set once; never freed */
	struct snapd_consumer *log;    /* QEMU's own dirty log */
	int vm_fd;
	pid_t pid;
	_Atomic uint32_t nr_vcpus; /* grows under create_lock */
	struct {
		int fd;
		struct snapd_vcpu *vcpu;
	} vcpus[VCPUS_MAX];
	_Atomic bool refused, ended;
} adapter = {.create_lock = PTHREAD_MUTEX_INITIALIZER, .vm_fd = -1};

struct snapd_vm *adapter_vm(void)
{
	return atomic_load_explicit(&adapter.vm, memory_order_acquire);
}

void adapter_log(const char *fmt, ...)
{
	char line[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	dprintf(STDERR_FILENO, "snapd: %s\n", line);
}

void adapter_refuse(const char *fmt, ...)
{
	char why[320];
	va_list ap;

	if (atomic_exchange(&adapter.refused, true))
		return;
	va_start(ap, fmt);
	vsnprintf(why, sizeof(why), fmt, ap);
	va_end(ap);
	adapter_log("this VM cannot be snapshotted: %s", why);
	control_refuse(why);
}

/* ---- the agent's way to KVM ---- */

static int ops_ioctl(void *opaque, int fd, unsigned long request, void *arg)
{
	return real_ioctl(fd, request, arg);
}

static void *ops_mmap(void *opaque, size_t len, int prot, int flags, int fd, int64_t offset)
{
	return mmap(NULL, len, prot, flags, fd, offset);
}

static int ops_munmap(void *opaque, void *addr, size_t len)
{
	return real_munmap(addr, len);
}

static const struct snapd_kvm_ops kvm_ops = {ops_ioctl, ops_mmap, ops_munmap, NULL};

/* ---- VM ---- */

/* QEMU is in exit(): its vCPUs stand.  To say goodbye is all that is left to do.  A child
 * that it forked has none of its threads, and its sockets. */
static void at_exit(void)
{
	if (getpid() != adapter.pid)
		return;
	atomic_store(&adapter.ended, true);
	control_end();
	snapd_vm_leave(adapter_vm());
}

static bool is_emulated(int kvm_fd)
{
	const struct arch_vm vm = {.kvm = &kvm_ops, .kvm_fd = kvm_fd, .vm_fd = -1};

	return arch_host()->shadows(&vm, NULL);
}

static int attach(int kvm_fd, int vm_fd, struct snapd_vm **ret)
{
	const struct snapd_vm_config config = {
		.size_bytes = sizeof(config),
		.flags = SNAPD_ATTACH_VMM_STATE | SNAPD_ATTACH_TRACK_HOST_WRITES,
		.kvm_fd = kvm_fd,
		.vm_fd = vm_fd,
		.max_vcpus = VCPUS_MAX,
		.harvest_max_us = is_emulated(kvm_fd) ? EMULATED_HARVEST_US : 0,
		.callbacks = &control_callbacks,
		.kvm = &kvm_ops,
	};
	int r = snapd_vm_attach(&config, ret);

	if (!r)
		r = snapd_consumer_create_for(*ret, "qemu", SNAPD_CONSUMER_VCPUS, &adapter.log);
	return r;
}

/* Memory of a confidential VM is nobody's to read. */
static bool is_confidential(unsigned long type)
{
#ifdef __x86_64__
	return type != 0;
#else
	return false; /* elsewhere a number of address bits */
#endif
}

/* A list as LD_PRELOAD has it, without one of its words; the caller's. */
static char *list_without(const char *list, const char *word)
{
	char *rest = calloc(1, strlen(list) + 1);
	size_t len, n = 0;

	for (; rest && *list; list += len + (list[len] != '\0')) {
		len = strcspn(list, ": ");
		if (!len || (len == strlen(word) && !strncmp(list, word, len)))
			continue;
		if (n)
			rest[n++] = ':';
		memcpy(rest + n, list, len);
		n += len;
	}
	return rest;
}

/* Helpers that QEMU starts need no adapter, and what confines them may not let them have it. */
static void hide_from_children(void)
{
	const char *all = getenv("LD_PRELOAD");
	_cleanup_free_ char *rest = NULL;
	Dl_info self;

	unsetenv(SNAPD_QEMU_ENV_QMP);
	if (!all || !dladdr(&adapter, &self))
		return;
	rest = list_without(all, self.dli_fname);
	if (rest && *rest)
		setenv("LD_PRELOAD", rest, 1);
	else if (rest)
		unsetenv("LD_PRELOAD");
}

static void vm_created(int kvm_fd, int vm_fd, unsigned long type)
{
	const char *where = getenv(SNAPD_QEMU_ENV_QMP);
	struct snapd_vm *vm = NULL;

	if (!where || adapter_vm())
		return;
	if (is_confidential(type)) {
		adapter_log("this VM cannot be snapshotted: a VM of type %lu, whose memory is "
			    "private",
			    type);
		return;
	}
	if (attach(kvm_fd, vm_fd, &vm) < 0) {
		adapter_log("this VM cannot be snapshotted: %s", snapd_vm_error(vm));
		snapd_vm_detach(vm);
		return;
	}
	adapter.vm_fd = vm_fd;
	atomic_store_explicit(&adapter.vm, vm, memory_order_release);
	if (control_start(vm, where) < 0)
		adapter_refuse("QEMU's monitor \"%s\" cannot be reached", where);
	hide_from_children();
	adapter.pid = getpid();
	atexit(at_exit);
}

static int create_vm(int fd, unsigned long request, void *arg)
{
	int vm_fd = real_ioctl(fd, request, arg), saved = errno;

	if (vm_fd >= 0) {
		pthread_mutex_lock(&adapter.create_lock);
		vm_created(fd, vm_fd, (unsigned long)arg);
		pthread_mutex_unlock(&adapter.create_lock);
	}
	errno = saved;
	return vm_fd;
}

/* ---- vCPUs ---- */

static int vcpu_created(int fd, uint32_t id)
{
	uint32_t n = atomic_load(&adapter.nr_vcpus);
	struct snapd_vcpu *vcpu;
	int r = n == VCPUS_MAX ? -ENOSPC : snapd_vcpu_attach(adapter_vm(), fd, id, &vcpu);

	if (r < 0) {
		adapter_log("vCPU %u: %s", id, snapd_vm_error(NULL));
		return r;
	}
	adapter.vcpus[n].fd = fd;
	adapter.vcpus[n].vcpu = vcpu;
	atomic_store_explicit(&adapter.nr_vcpus, n + 1, memory_order_release);
	return 0;
}

/* One without its ring would stop for ever when that is full: none at all, then. */
static int create_vcpu(int fd, unsigned long request, void *arg)
{
	int vcpu_fd = real_ioctl(fd, request, arg), r;

	if (vcpu_fd < 0)
		return vcpu_fd;
	pthread_mutex_lock(&adapter.create_lock);
	r = vcpu_created(vcpu_fd, (uint32_t)(unsigned long)arg);
	pthread_mutex_unlock(&adapter.create_lock);
	if (!r)
		return vcpu_fd;
	close(vcpu_fd);
	errno = -r;
	return -1;
}

static struct snapd_vcpu *vcpu_of(int fd)
{
	static _Thread_local int last_fd = -1;
	static _Thread_local struct snapd_vcpu *last;
	uint32_t n;

	if (fd == last_fd)
		return last;
	n = atomic_load_explicit(&adapter.nr_vcpus, memory_order_acquire);
	for (uint32_t i = 0; i < n; i++)
		if (adapter.vcpus[i].fd == fd) {
			last_fd = fd;
			return last = adapter.vcpus[i].vcpu;
		}
	return NULL;
}

static int vcpu_run(int fd)
{
	struct snapd_vcpu *vcpu = vcpu_of(fd);
	int r = vcpu ? snapd_vcpu_run(vcpu) : real_ioctl(fd, KVM_RUN, NULL);

	if (!vcpu || r >= 0)
		return r;
	if (r != -EINTR && r != -EAGAIN)
		adapter_log("%s", snapd_vm_error(NULL));
	errno = -r;
	return -1;
}

/* ---- capabilities ---- */

static bool is_ours(uint32_t cap)
{
	return cap == KVM_CAP_DIRTY_LOG_RING || cap == KVM_CAP_DIRTY_LOG_RING_ACQ_REL ||
	       cap == KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP ||
	       cap == KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
}

static int enable_cap(int fd, struct kvm_enable_cap *cap)
{
	if (fd == adapter.vm_fd && is_ours(cap->cap)) {
		errno = EINVAL;
		return -1;
	}
	return real_ioctl(fd, KVM_ENABLE_CAP, cap);
}

static int create_device(int fd, struct kvm_create_device *dev)
{
	int r = real_ioctl(fd, KVM_CREATE_DEVICE, dev), saved = errno;

	if (r >= 0 && dev->type == KVM_DEV_TYPE_VFIO && !(dev->flags & KVM_CREATE_DEVICE_TEST))
		adapter_refuse("a VFIO device writes its memory, and nobody tells of that");
	errno = saved;
	return r;
}

/* ---- all of it ---- */

static int result(int r)
{
	if (r >= 0)
		return r;
	errno = -r;
	return -1;
}

static int set_region2(const struct kvm_userspace_memory_region *r)
{
	return r->flags & MEM_GUEST_MEMFD ? -EOPNOTSUPP : slots_set(adapter_vm(), r);
}

static bool is_region2(unsigned long request)
{
	return _IOC_NR(request) == 0x49 && _IOC_DIR(request) == _IOC_WRITE &&
	       _IOC_SIZE(request) > sizeof(struct kvm_userspace_memory_region);
}

static int vm_call(int fd, unsigned long request, void *arg)
{
	switch (request) {
	case KVM_SET_USER_MEMORY_REGION:
		return result(slots_set(adapter_vm(), arg));
	case KVM_GET_DIRTY_LOG:
		return result(slots_dirty_log(adapter.log, arg));
	case KVM_CREATE_VCPU:
		return create_vcpu(fd, request, arg);
	case KVM_ENABLE_CAP:
		return enable_cap(fd, arg);
	case KVM_CREATE_DEVICE:
		return create_device(fd, arg);
	default:
		return is_region2(request) ? result(set_region2(arg))
					   : real_ioctl(fd, request, arg);
	}
}

int kvm_call(int fd, unsigned long request, void *arg)
{
	if (request == KVM_CREATE_VM)
		return create_vm(fd, request, arg);
	if (!adapter_vm() || atomic_load_explicit(&adapter.ended, memory_order_relaxed))
		return real_ioctl(fd, request, arg);
	if (request == KVM_RUN)
		return vcpu_run(fd);
	if (request == KVM_CHECK_EXTENSION && is_ours((uint32_t)(unsigned long)arg))
		return 0;
	return fd == adapter.vm_fd ? vm_call(fd, request, arg) : real_ioctl(fd, request, arg);
}
