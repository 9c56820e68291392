/* SPDX-License-Identifier: MIT */
/* What the agent does not take, with the error that agent.h names and a reason. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/lib/agent_vm.h"
#include "tests/lib/check.h"

#define LEN (64 * KVM_GUEST_PAGE)
#define GPA (KVM_GUEST_DATA_GPA + (1ull << 30))

static void refused(int r, int want, const char *text)
{
	check(r == want, "%d (%s), not %d", r, snapd_vm_error(NULL), want);
	check(strstr(snapd_vm_error(NULL), text), "\"%s\" lacks \"%s\"", snapd_vm_error(NULL),
	      text);
	printf("  %s\n", snapd_vm_error(NULL));
}

static int slot(struct agent_vm *a, struct snapd_memslot m)
{
	return snapd_vm_memslot(a->vm, &m);
}

static void test_slots(void)
{
	struct agent_vm_config config = {.data_bytes = LEN};
	static struct agent_vm a;
	int other = memfd_create("other", MFD_CLOEXEC), file = open("/proc/self/exe", O_RDONLY);
	void *private, *copy;

	agent_vm_create(&a, &config);
	check(!ftruncate(other, LEN), "file");
	private = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	copy = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE, other, 0);
	struct snapd_memslot good = {
		.slot = 9, .gpa = GPA, .size_bytes = LEN, .hva = a.g.data, .fd = a.g.data_fd};
	struct snapd_memslot m;

	refused((m = good, m.fd = -1, slot(&a, m)), -EINVAL, "private memory");
	refused((m = good, m.hva = private, slot(&a, m)), -EINVAL, "is private memory");
	refused((m = good, m.fd = other, m.hva = copy, slot(&a, m)), -EINVAL, "is private memory");
	refused((m = good, m.fd = other, slot(&a, m)), -EINVAL, "another file");
	refused((m = good, m.fd = file, slot(&a, m)), -EINVAL, "tmpfs");
	refused((m = good, m.fd = 1000, slot(&a, m)), -EBADF, "descriptor");
	refused((m = good, m.size_bytes = LEN / 2, m.fd_offset = LEN / 2, slot(&a, m)), -EINVAL,
		"another offset");
	refused((m = good, m.size_bytes = 2 * LEN, slot(&a, m)), -EINVAL, "within its file");
	refused((m = good, m.fd_offset = ~0ull << 12, slot(&a, m)), -EINVAL, "within its file");
	refused((m = good, m.gpa = GPA + 1, slot(&a, m)), -EINVAL, "page aligned");
	refused((m = good, m.size_bytes = LEN - 1, slot(&a, m)), -EINVAL, "page aligned");
	refused((m = good, m.gpa = ~0ull << 12, slot(&a, m)), -EINVAL, "page aligned");
	refused((m = good, m.as_id = 1, slot(&a, m)), -EINVAL, "address space");
	refused((m = good, m.flags = 0x80, slot(&a, m)), -EINVAL, "flags");
	refused((m = good, m.gpa = KVM_GUEST_DATA_GPA + LEN / 2, slot(&a, m)), -EEXIST, "overlaps");
	refused((m = good, m.slot = AGENT_VM_DATA_SLOT, slot(&a, m)), -EEXIST, "exists");
	refused((m = good, m.size_bytes = 0, slot(&a, m)), -ENOENT, "no slot 9");
	munmap(a.g.data + LEN / 2, LEN / 2);
	refused(slot(&a, good), -EINVAL, "is not mapped");
	a.g.data_bytes = LEN / 2;
	check(!(m = good, m.size_bytes = LEN / 2, slot(&a, m)), "%s", snapd_vm_error(NULL));
	check(!*snapd_vm_error(NULL), "a reason without failure");
	/* ROM may be private; and goes away */
	check(!(m = good, m.slot = 10, m.gpa += LEN, m.fd = -1, m.hva = private,
		m.flags = SNAPD_SLOT_READONLY, slot(&a, m)),
	      "%s", snapd_vm_error(NULL));
	check(!agent_vm_unslot(&a, 10, 0), "ROM");
	agent_vm_destroy(&a);
	munmap(private, LEN);
	munmap(copy, LEN);
	close(other);
	close(file);
}

static int attach(struct kvm_guest *g, struct snapd_vm_config c)
{
	struct snapd_vm *vm;
	int r;

	c.kvm_fd = g->kvm_fd;
	c.vm_fd = g->vm_fd;
	if (!c.size_bytes)
		c.size_bytes = sizeof(c);
	r = snapd_vm_attach(&c, &vm);
	check((r == 0) == (vm != NULL), "*ret");
	snapd_vm_detach(vm);
	return r;
}

static int no_ring(void *opaque, int fd, unsigned long request, void *arg)
{
	return request == KVM_CHECK_EXTENSION ? 0 : ioctl(fd, request, arg);
}

/* Of a VMM built with an older header: nothing behind its struct is read. */
static void test_older_callbacks(struct kvm_guest *g)
{
	const size_t len = offsetof(struct snapd_vm_callbacks, check);
	char *pages = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct snapd_vm_callbacks *cb = (void *)(pages + 4096 - len);

	check(pages != MAP_FAILED && !mprotect(pages + 4096, 4096, PROT_NONE), "two pages");
	cb->size_bytes = (uint32_t)len - 1;
	refused(attach(g, (struct snapd_vm_config){.callbacks = cb}), -EINVAL, "callbacks");
	cb->size_bytes = (uint32_t)len;
	check(!attach(g,
		      (struct snapd_vm_config){.callbacks = cb, .socket = "/nonexistent/socket"}),
	      "%s", snapd_vm_error(NULL));
	munmap(pages, 8192);
}

static void test_attach(void)
{
	const struct kvm_guest_config gc = {0};
	const struct snapd_kvm_ops ops = {.ioctl = no_ring};
	struct kvm_guest g;
	char path[300];

	check(!kvm_guest_create(&g, &gc), "guest");
	memset(path, 'x', sizeof(path) - 1);
	path[sizeof(path) - 1] = '\0';
	refused(attach(&g, (struct snapd_vm_config){.size_bytes = 8}), -EINVAL, "size_bytes");
	refused(attach(&g, (struct snapd_vm_config){.flags = 1u << 30}), -EINVAL, "flags");
	refused(attach(&g, (struct snapd_vm_config){.name = "a/b"}), -EINVAL, "VM name");
	refused(attach(&g, (struct snapd_vm_config){.name = path}), -EINVAL, "VM name");
	refused(attach(&g, (struct snapd_vm_config){.socket = path}), -EINVAL, "too long");
	refused(attach(&g, (struct snapd_vm_config){.restore = path}), -EINVAL, "too long");
	refused(attach(&g, (struct snapd_vm_config){.ring_entries = 1000}), -EINVAL,
		"power of two");
	refused(attach(&g, (struct snapd_vm_config){.harvest_min_us = 9, .harvest_max_us = 3}),
		-EINVAL, "harvest_max_us");
	refused(attach(&g, (struct snapd_vm_config){.kick_signal = SIGKILL}), -EINVAL, "signal");
	refused(attach(&g, (struct snapd_vm_config){.kvm = &ops, .dirty = SNAPD_DIRTY_RING}),
		-ENOTSUP, "dirty ring");
	refused(attach(&g, (struct snapd_vm_config){.dirty = 99}), -EINVAL, "99");
	check(kvm_guest_add_vcpu(&g, NULL, 0, 0, 0, 0) == 0, "vCPU");
	refused(attach(&g, (struct snapd_vm_config){0}), -EINVAL, "before the first");
	kvm_guest_destroy(&g);
	check(!kvm_guest_create(&g, &gc), "guest");
	refused(attach(&g, (struct snapd_vm_config){.socket = "/nonexistent/socket",
						    .flags = SNAPD_ATTACH_REQUIRE_SERVICE}),
		-ENOTCONN, "/nonexistent/socket");
	kvm_guest_destroy(&g);
	check(!kvm_guest_create(&g, &gc), "guest");
	test_older_callbacks(&g);
	kvm_guest_destroy(&g);
	check(!kvm_guest_create(&g, &gc), "guest");
	check(!attach(&g, (struct snapd_vm_config){.socket = "/nonexistent/socket"}), "%s",
	      snapd_vm_error(NULL));
	kvm_guest_destroy(&g);
}

/* More vCPUs than were announced; and calls that make no sense. */
static void test_vcpus(void)
{
	struct agent_vm_config config = {.data_bytes = LEN};
	static struct agent_vm a;
	struct snapd_vcpu *v;

	agent_vm_create(&a, &config);
	refused(snapd_vcpu_attach(a.vm, -1, 3, &v), -EBADF, "vCPU 3");
	check(!v, "*ret");
	snapd_vm_stop(a.vm);
	agent_vm_destroy(&a);
	snapd_vm_detach(NULL);
}

int main(void)
{
	test_slots();
	test_attach();
	test_vcpus();
	printf("ok\n");
	return 0;
}
