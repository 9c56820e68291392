/* SPDX-License-Identifier: MIT */
/*
 * When the dirty ring can be enabled, and what it forbids afterwards.
 *
 *   - it can be enabled once, before the first vCPU: then a second time is EINVAL;
 *   - after a vCPU exists it is EINVAL: hence snapd_vm_attach() must come first;
 *   - KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG are ENXIO with the ring on: a host
 *     uses the ring or the log, and no VMM can quietly clear bits of ours.
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "tests/lib/check.h"
#include "tests/lib/kvm_guest.h"

#define ENTRIES 1024

static int enable(struct kvm_guest *g)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_DIRTY_LOG_RING,
		.args[0] = ENTRIES * sizeof(struct kvm_dirty_gfn),
	};

	return ioctl(g->vm_fd, KVM_ENABLE_CAP, &cap) < 0 ? -errno : 0;
}

GUEST_FN static void guest(void)
{
	for (;;)
		guest_tell(1);
}

static void make(struct kvm_guest *g, uint32_t ring_entries)
{
	struct kvm_guest_config config = {.ring_entries = ring_entries, .data_bytes = 1 << 20};
	int r = kvm_guest_create(g, &config);

	if (r == -ENODEV || r == -ENOTSUP)
		skip("no /dev/kvm with a dirty ring: %s", strerror(-r));
	check(r == 0, "making a VM: %s", strerror(-r));
}

static void test_twice(void)
{
	struct kvm_guest g;
	int r;

	make(&g, ENTRIES);
	r = enable(&g);
	printf("enabling twice: %s\n", strerror(-r));
	check(r == -EINVAL, "got %d", r);
	kvm_guest_destroy(&g);
}

static void test_after_vcpu(void)
{
	struct kvm_guest g;
	int r;

	make(&g, 0);
	r = kvm_guest_add_vcpu(&g, guest, 0, 0, 0, 0);
	check(r == 0, "vCPU: %s", strerror(-r));
	r = enable(&g);
	printf("enabling after a vCPU: %s\n", strerror(-r));
	check(r == -EINVAL, "got %d", r);
	kvm_guest_destroy(&g);
}

static void test_log_forbidden(void)
{
	uint64_t bitmap[4] = {0};
	struct kvm_dirty_log log = {.slot = 0, .dirty_bitmap = bitmap};
	struct kvm_clear_dirty_log clear = {.slot = 0, .num_pages = 256, .dirty_bitmap = bitmap};
	struct kvm_guest g;
	int r;

	make(&g, ENTRIES);
	r = kvm_guest_slot(&g, 0, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA, 1 << 20, g.data);
	check(r == 0, "slot: %s", strerror(-r));
	r = ioctl(g.vm_fd, KVM_GET_DIRTY_LOG, &log);
	printf("KVM_GET_DIRTY_LOG with the ring: %s\n", r ? strerror(errno) : "taken");
	check(r < 0 && errno == ENXIO, "got %d", r);
	r = ioctl(g.vm_fd, KVM_CLEAR_DIRTY_LOG, &clear);
	printf("KVM_CLEAR_DIRTY_LOG with the ring: %s\n", r ? strerror(errno) : "taken");
	check(r < 0 && errno == ENXIO, "got %d", r);
	kvm_guest_destroy(&g);
}

int main(void)
{
	test_twice();
	test_after_vcpu();
	test_log_forbidden();
	return 0;
}
