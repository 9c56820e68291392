/* SPDX-License-Identifier: MIT */
/*
 * An interrupted KVM_RESET_DIRTY_RINGS leaves pages writable that it counted.
 *
 * Since Linux 6.16 the loop over the ring stops when a signal is pending.  It
 * gathers neighbouring entries (up to 64 pages) before it write-protects them, and
 * the pending signal makes it return before it protects the last batch, although
 * these entries are empty again and counted.  The counts add up, but the guest's
 * next writes to those pages are never logged: silent loss.  So:
 *
 *   1. RESET is called with every signal blocked: then it is never short, and
 *      nothing is lost however many signals arrive (this is what is relied on);
 *   2. where a signal cannot be blocked (SIGSTOP, a debugger, the freezer) a short
 *      return still tells, and the pages in question are among the 64 entries
 *      that were counted last: these frames have to be taken for dirty until they
 *      turn up in a ring again;
 *   3. but a signal that comes after the very last entry was counted cuts the last
 *      batch off with a return that is not short: nothing tells.  That window is one
 *      pass of KVM's loop, and with rule 1 only a stop or the freezer can hit it.
 *
 * A kernel that does not return short, or protects before it returns, passes too.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>

#include "tests/lib/check.h"
#include "tests/lib/kvm_guest.h"

#define ENTRIES 65536
#define PAGES	16384
#define ROUNDS	20
#define BATCH	64 /* BITS_PER_LONG in virt/kvm/dirty_ring.c */

static struct kvm_dirty_gfn entries[ENTRIES];
static volatile sig_atomic_t signals;

GUEST_FN static void writer(uint64_t gpa, uint64_t nr_pages)
{
	for (uint64_t round = 1;; round++) {
		for (uint64_t i = 0; i < nr_pages; i++)
			guest_write(gpa + i * 4096, round);
		guest_tell(round);
	}
}

static void on_alarm(int sig)
{
	signals++;
}

static void signals_every(long us)
{
	struct itimerval it = {.it_interval.tv_usec = us, .it_value.tv_usec = us};

	setitimer(ITIMER_REAL, &it, NULL);
}

static void block_all(bool block)
{
	sigset_t all;

	sigfillset(&all);
	sigprocmask(block ? SIG_BLOCK : SIG_UNBLOCK, &all, NULL);
}

static void make(struct kvm_guest *g)
{
	struct kvm_guest_config config = {.ring_entries = ENTRIES, .data_bytes = PAGES * 4096ull};
	int r = kvm_guest_create(g, &config);

	if (r == -ENODEV || r == -ENOTSUP)
		skip("no /dev/kvm with a dirty ring of %d: %s", ENTRIES, strerror(-r));
	check(r == 0, "VM: %s", strerror(-r));
	r = kvm_guest_slot(g, 1, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA, g->data_bytes,
			   g->data);
	check(r == 0, "slot: %s", strerror(-r));
	r = kvm_guest_add_vcpu(g, GUEST_CODE(writer), KVM_GUEST_DATA_GPA, PAGES, 0, 0);
	check(r == 0, "vCPU: %s", strerror(-r));
}

/* One pass of the guest over all pages, harvested into entries[]. */
static uint32_t write_and_harvest(struct kvm_guest *g)
{
	uint64_t round;
	int r;

	do
		r = kvm_guest_run(g, 0);
	while (r == -EINTR);
	check(r == KVM_EXIT_MMIO && kvm_guest_told(g, 0, &round), "exit %d", r);
	return kvm_guest_harvest(g, 0, entries, ENTRIES);
}

static void test_blocked(void)
{
	struct kvm_guest g;

	make(&g);
	for (int round = 0; round < ROUNDS; round++) {
		uint32_t n = write_and_harvest(&g);
		int r;

		check(n == PAGES, "round %d: %u entries of %d", round, n, PAGES);
		block_all(true);
		signals_every(50);
		r = kvm_guest_reset_rings(&g);
		signals_every(0);
		block_all(false);
		check(r == (int)n, "RESET with signals blocked is short: %d of %u", r, n);
	}
	printf("signals blocked: %d rounds of %d entries, none short, none lost\n", ROUNDS, PAGES);
	kvm_guest_destroy(&g);
}

/* RESET under signals; suspect[] marks the entries counted last by each call. */
static uint32_t reset_interrupted(struct kvm_guest *g, uint32_t n, bool *suspect)
{
	uint32_t sum = 0, cuts = 0;

	signals_every(100);
	while (sum < n) {
		int r = kvm_guest_reset_rings(g);

		check(r >= 0 || r == -EINTR, "RESET: %s", strerror(-r));
		sum += r > 0 ? r : 0;
		cuts += sum < n;
		/* also after the last call: 3. */
		for (uint32_t i = sum > BATCH ? sum - BATCH : 0; i < sum && i < n; i++)
			suspect[entries[i].offset] = true;
	}
	signals_every(0);
	check(sum == n, "RESET gave back %u of %u", sum, n);
	return cuts;
}

static void test_interrupted(void)
{
	static bool suspect[PAGES], seen[PAGES];
	uint32_t cuts = 0, silent = 0, suspects = 0;
	struct kvm_guest g;

	make(&g);
	for (int round = 0; round < ROUNDS; round++) {
		uint32_t n = write_and_harvest(&g);

		memset(seen, 0, sizeof(seen));
		for (uint32_t i = 0; i < n; i++)
			seen[entries[i].offset] = true;
		for (uint32_t i = 0; i < PAGES; i++) {
			check(seen[i] || suspect[i],
			      "page %u was written, is not in the ring and not suspect", i);
			silent += !seen[i];
			suspect[i] = suspect[i] && !seen[i];
		}
		cuts += reset_interrupted(&g, n, suspect);
	}
	for (uint32_t i = 0; i < PAGES; i++)
		suspects += suspect[i];
	printf("not blocked: %d signals, %u short returns; %u page writes not logged, all of "
	       "suspects (%u now)\n",
	       (int)signals, cuts, silent, suspects);
	kvm_guest_destroy(&g);
}

int main(void)
{
	struct sigaction sa = {.sa_handler = on_alarm};

	sigaction(SIGALRM, &sa, NULL);
	test_blocked();
	test_interrupted();
	return 0;
}
