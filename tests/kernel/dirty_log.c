/* SPDX-License-Identifier: MIT */
/*
 * KVM's dirty bitmap, as agent/dirtylog.c relies on it.
 *
 *   plain    GET returns the bits and clears and protects: the next write is a bit again
 *   manual   with MANUAL_DIRTY_LOG_PROTECT2 GET changes nothing; CLEAR clears and protects
 *            what it is given, and only that
 *   loss     a write between CLEAR's page and its GET: a bit that is cleared unread is
 *            gone, and a page copied before its CLEAR is stale without a bit
 *   ranges   CLEAR wants multiples of 64 pages, or the end of the slot
 *   gone     GET of a slot that is deleted fails: what was written last is lost
 *   set      with INITIALLY_SET a new slot has every bit set
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "tests/lib/check.h"
#include "tests/lib/kvm_guest.h"

#define PAGES 100u /* no multiple of 64 */
#define BYTES (PAGES * KVM_GUEST_PAGE)
#define SLOT  1u

/* Writes page 0, then page 70, then page 0, ... and tells after each. */
GUEST_FN static void writer(uint64_t gpa)
{
	for (uint64_t value = 1;; value++) {
		guest_write(gpa + (value % 2 ? 0 : 70 * 4096), value);
		guest_tell(value);
	}
}

static void write_next(struct kvm_guest *g)
{
	uint64_t value;
	int r = kvm_guest_run(g, 0);

	check(r == KVM_EXIT_MMIO && kvm_guest_told(g, 0, &value), "exit %d", r);
}

static int get(struct kvm_guest *g, uint64_t bits[2])
{
	struct kvm_dirty_log log = {.slot = SLOT, .dirty_bitmap = bits};

	bits[0] = bits[1] = ~0ull;
	return ioctl(g->vm_fd, KVM_GET_DIRTY_LOG, &log) < 0 ? -errno : 0;
}

static int clear(struct kvm_guest *g, uint64_t first, uint32_t n, uint64_t *bits)
{
	struct kvm_clear_dirty_log log = {
		.slot = SLOT, .first_page = first, .num_pages = n, .dirty_bitmap = bits};

	return ioctl(g->vm_fd, KVM_CLEAR_DIRTY_LOG, &log) < 0 ? -errno : 0;
}

static void open_guest(struct kvm_guest *g, uint64_t protect)
{
	struct kvm_guest_config config = {.data_bytes = BYTES};
	struct kvm_enable_cap cap = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args[0] = protect};
	int r = kvm_guest_create(g, &config);

	if (r == -ENODEV)
		skip("no usable /dev/kvm");
	check(r == 0, "VM: %s", strerror(-r));
	if (protect & ~(uint64_t)kvm_guest_cap(g, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2))
		skip("no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2");
	check(!protect || !ioctl(g->vm_fd, KVM_ENABLE_CAP, &cap), "%s", strerror(errno));
	r = kvm_guest_slot(g, SLOT, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA, BYTES, g->data);
	check(r == 0, "slot: %s", strerror(-r));
	r = kvm_guest_add_vcpu(g, GUEST_CODE(writer), KVM_GUEST_DATA_GPA, 0, 0, 0);
	check(r == 0, "vCPU: %s", strerror(-r));
}

static void expect(struct kvm_guest *g, uint64_t low, uint64_t high, const char *when)
{
	uint64_t bits[2];

	check(!get(g, bits), "GET: %s", strerror(errno));
	check(bits[0] == low && bits[1] == high, "%s: bits %llx %llx", when,
	      (unsigned long long)bits[0], (unsigned long long)bits[1]);
}

static void test_plain(void)
{
	struct kvm_guest g;

	open_guest(&g, 0);
	expect(&g, 0, 0, "a new slot");
	write_next(&g);
	write_next(&g);
	expect(&g, 1, 1 << 6, "written");
	expect(&g, 0, 0, "GET cleared");
	write_next(&g);
	expect(&g, 1, 0, "GET protected");
	kvm_guest_destroy(&g);
}

static void test_manual(void)
{
	uint64_t bits[2];
	struct kvm_guest g;

	open_guest(&g, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
	write_next(&g);
	write_next(&g);
	expect(&g, 1, 1 << 6, "written");
	expect(&g, 1, 1 << 6, "GET changed something");
	bits[0] = 1;
	check(clear(&g, 0, 32, bits) == -EINVAL, "CLEAR of 32 pages");
	check(clear(&g, 32, 64, bits) == -EINVAL, "CLEAR from page 32");
	check(clear(&g, 64, 64, bits) == -EINVAL, "CLEAR beyond the slot");
	check(!clear(&g, 0, 64, bits), "CLEAR: %s", strerror(errno));
	expect(&g, 0, 1 << 6, "CLEAR took another's bit");
	bits[0] = 1 << 6;
	check(!clear(&g, 64, PAGES - 64, bits), "CLEAR to the slot's end: %s", strerror(errno));
	expect(&g, 0, 0, "cleared");
	write_next(&g);
	write_next(&g);
	expect(&g, 1, 1 << 6, "CLEAR protected");
	printf("manual: CLEAR takes what it is given, in 64s or to the end of the slot\n");
	kvm_guest_destroy(&g);
}

static void test_loss(void)
{
	uint64_t bits[2], copy;
	struct kvm_guest g;

	open_guest(&g, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
	write_next(&g); /* page 0 */
	check(!get(&g, bits) && bits[0] == 1, "GET");
	write_next(&g); /* page 70: nobody has read its bit */
	copy = *(volatile uint64_t *)g.data;
	write_next(&g); /* page 0: no fault, its bit is set already */
	bits[0] = bits[1] = ~0ull;
	check(!clear(&g, 0, PAGES, bits), "CLEAR: %s", strerror(errno));
	expect(&g, 0, 0, "after a CLEAR of everything");
	check(*(volatile uint64_t *)g.data != copy, "the copy is not stale");
	printf("loss: page 70 and the newer page 0 have no bit any more\n");
	kvm_guest_destroy(&g);
}

static void test_gone(void)
{
	uint64_t bits[2];
	struct kvm_guest g;

	open_guest(&g, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
	write_next(&g);
	check(!kvm_guest_slot(&g, SLOT, 0, KVM_GUEST_DATA_GPA, 0, g.data), "delete");
	check(get(&g, bits) == -ENOENT, "GET of a deleted slot");
	check(!kvm_guest_slot(&g, SLOT, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA, BYTES, g.data),
	      "add");
	expect(&g, 0, 0, "a slot of the same id, memory and address");
	kvm_guest_destroy(&g);
}

static void test_set(void)
{
	uint64_t bits[2];
	struct kvm_guest g;

	open_guest(&g, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
	check(!get(&g, bits), "GET");
	check(bits[0] == ~0ull && (bits[1] & ((1ull << 36) - 1)) == (1ull << 36) - 1,
	      "not every bit is set");
	printf("set: a new slot's bits %llx %llx\n", (unsigned long long)bits[0],
	       (unsigned long long)bits[1]);
	check(!clear(&g, 0, PAGES, bits), "CLEAR: %s", strerror(errno));
	expect(&g, 0, 0, "cleared");
	write_next(&g);
	expect(&g, 1, 0, "CLEAR protected");
	kvm_guest_destroy(&g);
}

int main(void)
{
	test_plain();
	test_manual();
	test_loss();
	test_gone();
	test_set();
	return 0;
}
