/* SPDX-License-Identifier: MIT */
/*
 * What KVM_RESET_DIRTY_RINGS returns.
 *
 *   - nothing harvested: 0;
 *   - else the number of entries marked harvested, and only these;
 *   - two threads may reset at once: their counts add up.
 *
 * Until an entry is reset, its page is not write-protected again: pages may be
 * copied only when the counts add up.  ring_reset_signal.c has what a signal does.
 */
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "tests/lib/check.h"
#include "tests/lib/kvm_guest.h"

#define ENTRIES 65536
#define PAGES	16384
#define ROUNDS	20

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
	uint64_t round;
	int r = kvm_guest_run(g, 0);

	check(r == KVM_EXIT_MMIO && kvm_guest_told(g, 0, &round), "exit %d", r);
}

static void test_counts(struct kvm_guest *g)
{
	int r = kvm_guest_reset_rings(g);

	check(r == 0, "RESET of nothing: %d", r);
	write_all(g);
	check(kvm_guest_harvest(g, 0, NULL, 1000) == 1000, "too few entries");
	r = kvm_guest_reset_rings(g);
	check(r == 1000, "RESET of 1000: %d", r);
	check(kvm_guest_harvest(g, 0, NULL, UINT32_MAX) == PAGES - 1000, "entries are missing");
	r = kvm_guest_reset_rings(g);
	check(r == PAGES - 1000, "RESET of the rest: %d", r);
	printf("RESET returned 0, 1000, %d as harvested\n", r);
}

struct resetter {
	struct kvm_guest *g;
	long sum;
};

static void *reset_thread(void *arg)
{
	struct resetter *r = arg;

	for (int i = 0; i < 8; i++) {
		int n = kvm_guest_reset_rings(r->g);

		r->sum += n > 0 ? n : 0;
	}
	return NULL;
}

static void test_two_threads(struct kvm_guest *g)
{
	struct resetter a = {.g = g}, b = {.g = g};
	pthread_t ta, tb;

	write_all(g);
	check(kvm_guest_harvest(g, 0, NULL, UINT32_MAX) == PAGES, "entries are missing");
	check(pthread_create(&ta, NULL, reset_thread, &a) == 0, "thread");
	check(pthread_create(&tb, NULL, reset_thread, &b) == 0, "thread");
	pthread_join(ta, NULL);
	pthread_join(tb, NULL);
	printf("two threads reset %ld and %ld of %d\n", a.sum, b.sum, PAGES);
	check(a.sum + b.sum == PAGES, "counts do not add up");
}

int main(void)
{
	struct kvm_guest_config config = {.ring_entries = ENTRIES, .data_bytes = PAGES * 4096ull};
	struct kvm_guest g;
	int r;

	r = kvm_guest_create(&g, &config);
	if (r == -ENODEV || r == -ENOTSUP)
		skip("no /dev/kvm with a dirty ring of %d: %s", ENTRIES, strerror(-r));
	check(r == 0, "VM: %s", strerror(-r));
	r = kvm_guest_slot(&g, 1, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA, g.data_bytes,
			   g.data);
	check(r == 0, "slot: %s", strerror(-r));
	r = kvm_guest_add_vcpu(&g, GUEST_CODE(writer), KVM_GUEST_DATA_GPA, PAGES, 0, 0);
	check(r == 0, "vCPU: %s", strerror(-r));
	test_counts(&g);
	test_two_threads(&g);
	kvm_guest_destroy(&g);
	return 0;
}
