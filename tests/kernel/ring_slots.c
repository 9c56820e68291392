/* SPDX-License-Identifier: MIT */
/*
 * Dirty-ring entries and memslots that change under them.
 *
 *   - entries not yet harvested survive the deletion of their slot, with the slot's
 *     old id, whatever becomes of the range: hence ids that are not reused before
 *     every ring has passed them;
 *   - RESET of entries whose slot is gone, or has come back smaller, returns the
 *     full count and no error;
 *   - the first write to a page of a slot just added is always logged;
 *   - a guest's store to a deleted slot exits as MMIO and then counts as done:
 *     re-adding the slot and running on does not repeat it, so the VMM has to apply
 *     it.
 */
#include <errno.h>
#include <string.h>

#include "tests/lib/check.h"
#include "tests/lib/kvm_guest.h"

#define ENTRIES 4096
#define PAGES	64
#define BYTES	(PAGES * KVM_GUEST_PAGE)

static struct kvm_dirty_gfn entries[ENTRIES];

/* Write pages [first, first + nr) each time the host says so. */
GUEST_FN static void writer(void)
{
	for (;;) {
		uint64_t first = guest_ask(), nr = guest_ask(), value = guest_ask();

		for (uint64_t i = first; i < first + nr; i++)
			guest_write(KVM_GUEST_DATA_GPA + i * 4096, value);
		guest_tell(value);
	}
}

static void answer(struct kvm_guest *g, uint64_t value)
{
	int r = kvm_guest_run(g, 0);

	check(r == KVM_EXIT_MMIO && kvm_guest_asked(g, 0), "exit %d", r);
	kvm_guest_answer(g, 0, value);
}

static void order_writes(struct kvm_guest *g, uint64_t first, uint64_t nr, uint64_t value)
{
	answer(g, first);
	answer(g, nr);
	answer(g, value);
}

static void await_done(struct kvm_guest *g)
{
	uint64_t told;
	int r = kvm_guest_run(g, 0);

	check(r == KVM_EXIT_MMIO && kvm_guest_told(g, 0, &told), "exit %d", r);
}

static void write_pages(struct kvm_guest *g, uint64_t first, uint64_t nr, uint64_t value)
{
	order_writes(g, first, nr, value);
	await_done(g);
}

static void add(struct kvm_guest *g, uint32_t slot, uint64_t bytes)
{
	int r = kvm_guest_slot(g, slot, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA, bytes,
			       g->data);

	check(r == 0, "adding slot %u: %s", slot, strerror(-r));
}

static void delete (struct kvm_guest *g, uint32_t slot)
{
	int r = kvm_guest_slot(g, slot, 0, 0, 0, NULL);

	check(r == 0, "deleting slot %u: %s", slot, strerror(-r));
}

static uint32_t harvest(struct kvm_guest *g)
{
	return kvm_guest_harvest(g, 0, entries, ENTRIES);
}

static void test_entries_survive(struct kvm_guest *g)
{
	uint32_t n;

	add(g, 1, BYTES);
	write_pages(g, 0, PAGES, 1);
	delete (g, 1);
	add(g, 2, BYTES);
	n = harvest(g);
	check(n == PAGES, "%u entries of %d after the slot was deleted", n, PAGES);
	for (uint32_t i = 0; i < n; i++)
		check(entries[i].slot == 1 && entries[i].offset == i, "entry %u: slot %u page %llu",
		      i, entries[i].slot, (unsigned long long)entries[i].offset);
	printf("%u entries survive with slot id 1 while slot 2 has the range\n", n);
	check(kvm_guest_reset_rings(g) == (int)n, "RESET of a deleted slot's entries");
	delete (g, 2);
	printf("RESET of entries of a deleted slot: full count\n");
}

static void test_shrunk(struct kvm_guest *g)
{
	uint32_t n;

	add(g, 1, BYTES);
	write_pages(g, 0, PAGES, 2);
	delete (g, 1);
	add(g, 1, BYTES / 4);
	n = harvest(g);
	check(n == PAGES, "%u entries", n);
	check(kvm_guest_reset_rings(g) == (int)n, "RESET of entries beyond a slot's end");
	printf("RESET of entries beyond the end of a smaller slot: full count\n");
	delete (g, 1);
}

static void test_first_write(struct kvm_guest *g)
{
	uint32_t n;

	add(g, 1, BYTES);
	write_pages(g, 0, PAGES, 3);
	harvest(g);
	kvm_guest_reset_rings(g);
	for (int round = 0; round < 10; round++) {
		delete (g, 1);
		add(g, 1, BYTES);
		write_pages(g, 0, PAGES, 4 + round);
		n = harvest(g);
		check(n >= PAGES, "round %d: %u entries after re-adding", round, n);
		kvm_guest_reset_rings(g);
	}
	printf("first writes after re-adding a slot: all logged, 10 times\n");
	delete (g, 1);
}

static void test_store_to_hole(struct kvm_guest *g)
{
	const struct kvm_run *run = g->vcpus[0].run;
	volatile uint64_t *page = (volatile uint64_t *)g->data;
	uint64_t stored;
	int r;

	add(g, 1, BYTES);
	write_pages(g, 0, 1, 77);
	delete (g, 1);
	order_writes(g, 0, 1, 78);
	r = kvm_guest_run(g, 0);
	check(r == KVM_EXIT_MMIO && run->mmio.is_write && run->mmio.len == 8 &&
		      run->mmio.phys_addr == KVM_GUEST_DATA_GPA,
	      "a store to a hole: exit %d", r);
	memcpy(&stored, run->mmio.data, sizeof(stored));
	check(stored == 78, "MMIO data %llu", (unsigned long long)stored);
	add(g, 1, BYTES);
	await_done(g);
	check(*page == 77, "memory has %llu", (unsigned long long)*page);
	printf("a store to a hole exits as MMIO and is not repeated: memory keeps 77, not 78\n");
	delete (g, 1);
}

int main(void)
{
	struct kvm_guest_config config = {.ring_entries = ENTRIES, .data_bytes = BYTES};
	struct kvm_guest g;
	int r = kvm_guest_create(&g, &config);

	if (r == -ENODEV || r == -ENOTSUP)
		skip("no /dev/kvm with a dirty ring: %s", strerror(-r));
	check(r == 0, "VM: %s", strerror(-r));
	r = kvm_guest_add_vcpu(&g, writer, 0, 0, 0, 0);
	check(r == 0, "vCPU: %s", strerror(-r));
	test_entries_survive(&g);
	test_shrunk(&g);
	test_first_write(&g);
	test_store_to_hole(&g);
	kvm_guest_destroy(&g);
	return 0;
}
