/* SPDX-License-Identifier: MIT */
/*
 * KVM_DIRTY_LOG_INITIALLY_SET must not be combined with the dirty ring.
 *
 * With manual protect = 3 (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) KVM does not
 * write-protect a slot when logging is switched on by flags alone: the dirty *log*
 * starts with every bit set, and pages are protected as it is cleared.  The ring
 * has no such bits: pages that are mapped already are never logged.  Silent loss.
 * Without the capability the same switch logs every first write.
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "tests/lib/check.h"
#include "tests/lib/kvm_guest.h"

#define PAGES 64
#define BYTES (PAGES * KVM_GUEST_PAGE)

GUEST_FN static void writer(uint64_t gpa, uint64_t nr_pages)
{
	for (uint64_t round = 1;; round++) {
		for (uint64_t i = 0; i < nr_pages; i++)
			guest_write(gpa + i * 4096, round);
		guest_tell(round);
	}
}

static void write_all(struct kvm_guest *g)
{
	uint64_t told;
	int r = kvm_guest_run(g, 0);

	check(r == KVM_EXIT_MMIO && kvm_guest_told(g, 0, &told), "exit %d", r);
}

static int manual_protect(struct kvm_guest *g, uint64_t flags)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args[0] = flags};

	return ioctl(g->vm_fd, KVM_ENABLE_CAP, &cap) < 0 ? -errno : 0;
}

/* Entries for PAGES writes after logging was switched on over mapped pages. */
static uint32_t logged(uint64_t protect_flags)
{
	struct kvm_guest_config config = {.ring_entries = 1024, .data_bytes = BYTES};
	struct kvm_guest g;
	uint32_t n;
	int r = kvm_guest_create(&g, &config);

	if (r == -ENODEV || r == -ENOTSUP)
		skip("no /dev/kvm with a dirty ring: %s", strerror(-r));
	check(r == 0, "VM: %s", strerror(-r));
	if (protect_flags) {
		r = manual_protect(&g, protect_flags);
		if (r)
			skip("this KVM refuses INITIALLY_SET with the ring: %s", strerror(-r));
	}
	r = kvm_guest_slot(&g, 1, 0, KVM_GUEST_DATA_GPA, BYTES, g.data);
	check(r == 0, "slot: %s", strerror(-r));
	r = kvm_guest_add_vcpu(&g, GUEST_CODE(writer), KVM_GUEST_DATA_GPA, PAGES, 0, 0);
	check(r == 0, "vCPU: %s", strerror(-r));
	write_all(&g);
	r = kvm_guest_slot(&g, 1, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA, BYTES, g.data);
	check(r == 0, "switching logging on: %s", strerror(-r));
	write_all(&g);
	n = kvm_guest_harvest(&g, 0, NULL, 1024);
	kvm_guest_destroy(&g);
	return n;
}

int main(void)
{
	uint32_t plain = logged(0), initially_set;

	printf("logging switched on over %d mapped pages: %u of %d writes logged\n", PAGES, plain,
	       PAGES);
	check(plain == PAGES, "writes are missing");
	initially_set = logged(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
	printf("the same with INITIALLY_SET: %u of %d\n", initially_set, PAGES);
	if (initially_set == PAGES)
		printf("this kernel logs them all the same\n");
	return 0;
}
