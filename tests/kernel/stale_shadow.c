/* SPDX-License-Identifier: MIT */
/*
 * Guest page tables rewritten by the host, as a rollback in place does.
 *
 * The guest's own page table maps a virtual page to frame A; it has been used, so
 * that KVM without EPT or NPT holds a shadow of it.  The host rewrites the entry in
 * guest memory to point to frame B.  Does the guest, without a TLB flush of its
 * own, see A (stale) or B?
 *
 *   - under shadow paging it sees A: the host's write is not noticed;
 *     KVM_SET_SREGS does not help;
 *   - adding and deleting a memslot that nothing uses cures it, unless the quirk
 *     KVM_X86_QUIRK_SLOT_ZAP_ALL is disabled: then it does not;
 *   - madvise(MADV_DONTNEED) on the mapping of the memory behind the table cures it
 *     in both cases (MMU notifiers drop what was built from it).
 *
 * With EPT or NPT nothing is ever stale, and the cures do no harm: passes, too.
 */
#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "tests/lib/check.h"
#include "tests/lib/kvm_guest.h"

#ifndef KVM_CAP_DISABLE_QUIRKS2
#define KVM_CAP_DISABLE_QUIRKS2 213
#endif
#define QUIRK_SLOT_ZAP_ALL (1u << 7)

/* In data memory: a page directory and page table of its own, and two frames. */
#define PT_PAGE	   0
#define A_PAGE	   1
#define B_PAGE	   2
#define DATA_BYTES (4 * KVM_GUEST_PAGE)
#define WINDOW	   0x40000000ull /* virtual: mapped through our table */
#define PD_GPA	   (KVM_GUEST_PML4_GPA + 0x2000)
#define DUMMY_SLOT 7
#define DUMMY_GPA  0xe0000000ull

GUEST_FN static void reader(void)
{
	for (;;)
		guest_tell(guest_read(WINDOW));
}

static uint64_t frame(uint64_t page)
{
	return (KVM_GUEST_DATA_GPA + page * KVM_GUEST_PAGE) | 0x67; /* P RW US A D */
}

static void point_to(struct kvm_guest *g, uint64_t page)
{
	*(volatile uint64_t *)(g->data + PT_PAGE * KVM_GUEST_PAGE) = frame(page);
}

static uint64_t seen(struct kvm_guest *g)
{
	uint64_t value = 0;
	int r = kvm_guest_run(g, 0);

	check(r == KVM_EXIT_MMIO && kvm_guest_told(g, 0, &value), "exit %d", r);
	return value;
}

static bool disable_zap_all(struct kvm_guest *g)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_DISABLE_QUIRKS2, .args[0] = QUIRK_SLOT_ZAP_ALL};

	if (!(kvm_guest_cap(g, cap.cap) & QUIRK_SLOT_ZAP_ALL))
		return false;
	return ioctl(g->vm_fd, KVM_ENABLE_CAP, &cap) == 0;
}

/* Neither cures, on its own, what is stale. */
static void set_sregs(struct kvm_guest *g)
{
	struct kvm_sregs s;

	check(ioctl(g->vcpus[0].fd, KVM_GET_SREGS, &s) == 0, "KVM_GET_SREGS");
	check(ioctl(g->vcpus[0].fd, KVM_SET_SREGS, &s) == 0, "KVM_SET_SREGS");
}

static void dummy_slot(struct kvm_guest *g)
{
	void *page = mmap(NULL, KVM_GUEST_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
			  -1, 0);

	check(page != MAP_FAILED, "mmap");
	check(kvm_guest_slot(g, DUMMY_SLOT, 0, DUMMY_GPA, KVM_GUEST_PAGE, page) == 0, "slot");
	check(kvm_guest_slot(g, DUMMY_SLOT, 0, DUMMY_GPA, 0, NULL) == 0, "slot");
	munmap(page, KVM_GUEST_PAGE);
}

static void dont_need(struct kvm_guest *g)
{
	check(madvise(g->data, DATA_BYTES, MADV_DONTNEED) == 0, "MADV_DONTNEED");
}

/* Does the guest still see A after the table was pointed to B and `cure` done? */
static bool is_stale(struct kvm_guest *g, void (*cure)(struct kvm_guest *))
{
	bool stale;

	point_to(g, A_PAGE);
	dont_need(g);
	check(seen(g) == 'A', "frame A");
	point_to(g, B_PAGE);
	if (cure)
		cure(g);
	stale = seen(g) == 'A';
	return stale;
}

static void make(struct kvm_guest *g)
{
	struct kvm_guest_config config = {.data_bytes = DATA_BYTES};
	int r = kvm_guest_create(g, &config);

	if (r == -ENODEV)
		skip("no usable /dev/kvm");
	check(r == 0, "VM: %s", strerror(-r));
	g->data[A_PAGE * KVM_GUEST_PAGE] = 'A';
	g->data[B_PAGE * KVM_GUEST_PAGE] = 'B';
	/* the window's 2 MiB go through a page table in data memory */
	((uint64_t *)(g->sys + PD_GPA))[WINDOW >> 21] =
		(KVM_GUEST_DATA_GPA + PT_PAGE * KVM_GUEST_PAGE) | 0x67;
	r = kvm_guest_slot(g, 1, 0, KVM_GUEST_DATA_GPA, DATA_BYTES, g->data);
	check(r == 0, "slot: %s", strerror(-r));
	r = kvm_guest_add_vcpu(g, reader, 0, 0, 0, 0);
	check(r == 0, "vCPU: %s", strerror(-r));
}

static const char *word(bool stale)
{
	return stale ? "stale" : "right";
}

static void test(bool zap_all)
{
	struct kvm_guest g;
	bool dummy;

	make(&g);
	if (!zap_all && !disable_zap_all(&g)) {
		printf("SLOT_ZAP_ALL cannot be disabled here\n");
		kvm_guest_destroy(&g);
		return;
	}
	printf("SLOT_ZAP_ALL %s:\n", zap_all ? "as it is" : "disabled");
	printf("  no cure        %s\n", word(is_stale(&g, NULL)));
	printf("  KVM_SET_SREGS  %s\n", word(is_stale(&g, set_sregs)));
	dummy = is_stale(&g, dummy_slot);
	printf("  dummy slot     %s\n", word(dummy));
	check(!zap_all || !dummy, "a dummy slot does not cure");
	for (int i = 0; i < 50; i++)
		check(!is_stale(&g, dont_need), "MADV_DONTNEED does not cure");
	printf("  MADV_DONTNEED  right, 50 times\n");
	kvm_guest_destroy(&g);
}

int main(void)
{
	test(true);
	test(false);
	return 0;
}
