/* SPDX-License-Identifier: MIT */
/*
 * A page may be copied only after RESET.  The case that shows why, step by step:
 *
 *   1. the guest writes A: one entry; the page is writable from now on
 *   2. harvest the entry, and (wrongly) copy the page: the copy has A
 *   3. the guest writes B: no entry, for the page is still writable
 *   4. RESET: the page is write-protected again
 *   5. harvest: nothing.  Memory has B, the copy A, and nobody will tell.
 *
 * With RESET before the copy, a write after it is a new entry.
 */
#include <errno.h>
#include <string.h>

#include "tests/lib/check.h"
#include "tests/lib/kvm_guest.h"

GUEST_FN static void writer(uint64_t gpa)
{
	for (uint64_t value = 1;; value++) {
		guest_write(gpa, value);
		guest_tell(value);
	}
}

static uint64_t write_next(struct kvm_guest *g)
{
	uint64_t value = 0;
	int r = kvm_guest_run(g, 0);

	check(r == KVM_EXIT_MMIO && kvm_guest_told(g, 0, &value), "exit %d", r);
	return value;
}

static uint64_t page(const struct kvm_guest *g)
{
	return *(volatile uint64_t *)g->data;
}

int main(void)
{
	struct kvm_guest_config config = {.ring_entries = 1024, .data_bytes = 1 << 20};
	uint64_t copy, written;
	struct kvm_guest g;
	int r = kvm_guest_create(&g, &config);

	if (r == -ENODEV || r == -ENOTSUP)
		skip("no /dev/kvm with a dirty ring: %s", strerror(-r));
	check(r == 0, "VM: %s", strerror(-r));
	r = kvm_guest_slot(&g, 1, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA, 1 << 20, g.data);
	check(r == 0, "slot: %s", strerror(-r));
	r = kvm_guest_add_vcpu(&g, GUEST_CODE(writer), KVM_GUEST_DATA_GPA, 0, 0, 0);
	check(r == 0, "vCPU: %s", strerror(-r));

	write_next(&g);
	check(kvm_guest_harvest(&g, 0, NULL, 1024) == 1, "one write, one entry");
	copy = page(&g);
	written = write_next(&g);
	check(kvm_guest_reset_rings(&g) == 1, "RESET");
	check(kvm_guest_harvest(&g, 0, NULL, 1024) == 0, "an entry for a write to a writable page");
	check(page(&g) == written && copy != written, "the copy is not stale");
	printf("copy before RESET: copy has %llu, memory %llu, no entry left\n",
	       (unsigned long long)copy, (unsigned long long)written);

	write_next(&g);
	check(kvm_guest_harvest(&g, 0, NULL, 1024) == 1, "one write, one entry");
	check(kvm_guest_reset_rings(&g) == 1, "RESET");
	copy = page(&g);
	written = write_next(&g);
	check(kvm_guest_harvest(&g, 0, NULL, 1024) == 1, "a write after RESET is not logged");
	printf("copy after RESET: copy has %llu, memory %llu, and an entry says so\n",
	       (unsigned long long)copy, (unsigned long long)written);
	kvm_guest_destroy(&g);
	return 0;
}
