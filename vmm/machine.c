/* SPDX-License-Identifier: MIT */
/*
 * machine: the four calls that make a VMM a snapd VMM, in order: attach the VM, hand
 * in memslots (ram.c), attach vCPUs, run them (vcpu.c).
 *
 * Main's thread.  Destruction runs on half-built machines, too.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "vmm/machine.h"
#include "vmm/simguest.h"

static int kernel_ioctl(void *opaque, int fd, unsigned long request, void *arg)
{
	return ioctl(fd, request, arg);
}

static void *kernel_mmap(void *opaque, size_t len, int prot, int flags, int fd, int64_t offset)
{
	return mmap(NULL, len, prot, flags, fd, offset);
}

static int kernel_munmap(void *opaque, void *addr, size_t len)
{
	return munmap(addr, len);
}

static const struct snapd_kvm_ops kernel_ops = {
	.ioctl = kernel_ioctl,
	.mmap = kernel_mmap,
	.munmap = kernel_munmap,
};

/* --no-log: what the same guest does when nobody watches its memory. */
static int nolog_ioctl(void *opaque, int fd, unsigned long request, void *arg)
{
	if (request == KVM_SET_USER_MEMORY_REGION)
		((struct kvm_userspace_memory_region *)arg)->flags &= ~KVM_MEM_LOG_DIRTY_PAGES;
	return ioctl(fd, request, arg);
}

/* --dirty log-get-clears: what a KVM of before Linux 5.2 says. */
static int old_log_ioctl(void *opaque, int fd, unsigned long request, void *arg)
{
	if (request == KVM_CHECK_EXTENSION && (uintptr_t)arg == KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
		return 0;
	return ioctl(fd, request, arg);
}

int machine_ioctl(struct machine *m, int fd, unsigned long request, void *arg)
{
	int rc = m->kvm.ioctl(m->kvm.opaque, fd, request, arg);

	return rc < 0 ? -errno : rc;
}

void machine_fail(struct machine *m, const char *fmt, ...)
{
	va_list ap;

	pthread_mutex_lock(&m->fail_lock);
	if (!m->failure[0]) {
		va_start(ap, fmt);
		vsnprintf(m->failure, sizeof(m->failure), fmt, ap);
		va_end(ap);
	}
	pthread_mutex_unlock(&m->fail_lock);
	atomic_store(&m->fatal, true);
}

static int open_kvm(struct machine *m)
{
	m->kvm = kernel_ops;
	if (m->opt->sim)
		return simguest_open(m);
	if (m->opt->no_log)
		m->kvm.ioctl = nolog_ioctl;
	else if (m->opt->tracking == TRACK_LOG_GET_CLEARS)
		m->kvm.ioctl = old_log_ioctl;
	m->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (m->kvm_fd >= 0)
		return 0;
	fprintf(stderr, "snapvm: /dev/kvm: %s; try --accel sim\n", strerror(errno));
	return -ENODEV;
}

static int create_vm(struct machine *m)
{
	m->vm_fd = machine_ioctl(m, m->kvm_fd, KVM_CREATE_VM, NULL);
	if (m->vm_fd >= 0)
		return 0;
	fprintf(stderr, "snapvm: cannot create a VM: %s\n", strerror(-m->vm_fd));
	return m->vm_fd;
}

static uint32_t attach_flags(const struct options *opt)
{
	uint32_t flags = opt->require_service ? SNAPD_ATTACH_REQUIRE_SERVICE : 0;

	if (opt->tracking == TRACK_LOG_INITIALLY_SET)
		flags |= SNAPD_ATTACH_LOG_INITIALLY_SET;
	if (opt->track_host)
		flags |= SNAPD_ATTACH_TRACK_HOST_WRITES;
	return flags;
}

static int attach(struct machine *m)
{
	static const uint32_t dirty[TRACK_NR] = {
		[TRACK_AUTO] = SNAPD_DIRTY_AUTO,
		[TRACK_RING] = SNAPD_DIRTY_RING,
		[TRACK_LOG] = SNAPD_DIRTY_LOG,
		[TRACK_LOG_INITIALLY_SET] = SNAPD_DIRTY_LOG,
		[TRACK_LOG_GET_CLEARS] = SNAPD_DIRTY_LOG,
		[TRACK_PAGEMAP] = SNAPD_DIRTY_PAGEMAP,
	};
	const struct options *opt = m->opt;
	const struct snapd_vm_config config = {
		.size_bytes = sizeof(config),
		.flags = attach_flags(opt),
		.kvm_fd = m->kvm_fd,
		.vm_fd = m->vm_fd,
		.name = opt->name,
		.socket = opt->socket,
		.restore = opt->restore,
		.ring_entries = opt->ring_entries,
		.harvest_min_us = opt->harvest_us ? MIN(opt->harvest_us, 1000u) : 0,
		.harvest_max_us = opt->harvest_us,
		.callbacks = &machine_callbacks,
		.opaque = m,
		.kvm = &m->kvm,
		.dirty = dirty[opt->tracking],
	};
	int rc = snapd_vm_attach(&config, &m->agent);

	if (rc)
		fprintf(stderr, "snapvm: cannot attach: %s\n", snapd_vm_error(NULL));
	return rc;
}

/* The service fills memory as soon as it knows it: so nothing is put there then. */
static int fill(struct machine *m)
{
	uint32_t i;
	int rc = m->restoring ? 0 : guest_load(m);

	/* The service may have copied some of it already. */
	if (rc == 0 && !m->restoring)
		snapd_vm_mark_dirty(m->agent, 0, m->low.len_bytes);
	for (i = 0; rc == 0 && i < m->opt->nr_vcpus; i++)
		rc = guest_set_vcpu(m, &m->vcpus[i]);
	return rc;
}

int machine_create(struct machine *m, const struct options *opt)
{
	uint32_t i;
	int rc;

	*m = (struct machine){.opt = opt,
			      .kvm_fd = -1,
			      .vm_fd = -1,
			      .low.fd = -1,
			      .main.fd = -1,
			      .dimm.fd = -1,
			      .smram.fd = -1};
	m->page_size = (uint64_t)sysconf(_SC_PAGESIZE);
	m->restoring = opt->restore || getenv("SNAPD_RESTORE");
	atomic_store(&m->live, !m->restoring);
	pthread_mutex_init(&m->write_lock, NULL);
	pthread_mutex_init(&m->fail_lock, NULL);
	for (i = 0; i < opt->nr_vcpus; i++)
		m->vcpus[i].fd = -1;
	rc = open_kvm(m);
	if (rc == 0)
		rc = create_vm(m);
	if (rc == 0)
		rc = attach(m);
	for (i = 0; rc == 0 && i < opt->nr_vcpus; i++)
		rc = vcpu_create(m, i);
	if (rc == 0)
		rc = ram_create(m);
	return rc ? rc : fill(m);
}

int machine_start(struct machine *m)
{
	uint32_t i;
	int rc = lockstep_start(m);

	for (i = 0; rc == 0 && i < m->opt->nr_vcpus; i++)
		rc = vcpu_start(&m->vcpus[i]);
	if (rc == 0)
		rc = device_start(m);
	if (rc == 0)
		rc = spare_start(m);
	if (rc == 0)
		rc = mirror_start(m);
	if (rc == 0)
		rc = punch_start(m);
	if (rc == 0)
		rc = epochs_start(m);
	if (rc)
		fprintf(stderr, "snapvm: cannot start threads: %s\n", strerror(-rc));
	atomic_store(&m->started, rc == 0);
	return rc;
}

/* Host threads first: the puncher may wait for vCPU 0, and a pause for the vCPUs. */
void machine_stop(struct machine *m)
{
	uint32_t i;

	atomic_store(&m->stopping, true);
	lockstep_stop(m);
	punch_stop(m);
	device_stop(m);
	spare_stop(m);
	mirror_stop(m);
	epochs_stop(m);
	if (m->agent)
		snapd_vm_stop(m->agent);
	for (i = 0; i < m->opt->nr_vcpus; i++)
		vcpu_join(&m->vcpus[i]);
}

void machine_destroy(struct machine *m)
{
	uint32_t i;

	snapd_vm_detach(m->agent);
	for (i = 0; i < m->opt->nr_vcpus; i++)
		cleanup_fd(&m->vcpus[i].fd);
	cleanup_fd(&m->vm_fd);
	cleanup_fd(&m->kvm_fd);
	simguest_close(m);
	ram_destroy(m);
	free(m->puncher);
	free(m->device);
	free(m->spare);
	mirror_destroy(m);
	free(m->epochs);
	free(m->lockstep);
	pthread_mutex_destroy(&m->fail_lock);
	pthread_mutex_destroy(&m->write_lock);
}
