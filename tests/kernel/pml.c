/* SPDX-License-Identifier: MIT */
/*
 * A vCPU that stays in the guest after it wrote, and what its ring tells.
 *
 *   - with page-modification logging (VMX, kvm_intel.pml) the CPU keeps up to 512 addresses
 *     to itself: pages are written, no ring has them, for as long as the vCPU does not leave;
 *   - once it has left guest mode, by a kick, every write of before has its entry.  That is what a
 *     pause relies on, with PML and without: the last harvest begins when all have left.
 *
 * On a host without PML the second is tested, by the same guest, and the first left out.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "tests/lib/check.h"
#include "tests/lib/kvm_guest.h"

#define ENTRIES 4096u
#define PAGES	64u /* fewer than a PML buffer has room for */
#define ROUNDS	50u
#define LOOKS	200u /* times to look before the kick */

static struct kvm_guest g;
static _Atomic int result;

/* A round each time it is run: write all pages, the last one last; then stay. */
GUEST_FN static void writer(uint64_t gpa, uint64_t nr_pages, uint64_t round)
{
	for (uint64_t i = 0; i < nr_pages; i++)
		guest_write(gpa + i * 4096, round);
	for (volatile uint64_t i = 0;; i++)
		;
}

static bool host_has_pml(void)
{
	FILE *f = fopen("/sys/module/kvm_intel/parameters/pml", "re");
	int c = f ? fgetc(f) : EOF;

	if (f)
		fclose(f);
	return c == 'Y' || c == '1';
}

static void on_kick(int sig)
{
	__atomic_store_n(&g.vcpus[0].run->immediate_exit, 1, __ATOMIC_RELAXED);
}

static void *run(void *arg)
{
	result = kvm_guest_run(&g, 0);
	return NULL;
}

/* Entries that the ring shows, left as they are. */
static uint32_t visible(void)
{
	const struct kvm_guest_vcpu *v = &g.vcpus[0];
	uint32_t n = 0;

	while (n < ENTRIES && __atomic_load_n(&v->ring[(v->next + n) % ENTRIES].flags,
					      __ATOMIC_ACQUIRE) == KVM_DIRTY_GFN_F_DIRTY)
		n++;
	return n;
}

/* Entries visible while the vCPU stays in the guest, its writes done. */
static uint32_t one_round(uint64_t round)
{
	const volatile uint64_t *last = (void *)(g.data + (PAGES - 1) * KVM_GUEST_PAGE);
	pthread_t thread;
	uint32_t before, after;

	check(!kvm_guest_start(&g, 0, GUEST_CODE(writer), KVM_GUEST_DATA_GPA, PAGES, round, 0),
	      "KVM_SET_REGS");
	check(!pthread_create(&thread, NULL, run, NULL), "thread");
	for (int i = 0; i < 20000 && *last != round; i++)
		usleep(500);
	check(*last == round, "the guest did not write");
	before = visible();
	for (uint32_t i = 0; i < LOOKS && before < PAGES; i++)
		before = visible();
	pthread_kill(thread, SIGUSR1);
	pthread_join(thread, NULL);
	g.vcpus[0].run->immediate_exit = 0;
	check(result == -EINTR, "kicked: %d", result);
	after = kvm_guest_harvest(&g, 0, NULL, ENTRIES);
	check(after == PAGES, "round %llu: %u of %u entries after the vCPU has left",
	      (unsigned long long)round, after, PAGES);
	check(kvm_guest_reset_rings(&g) == (int)PAGES, "RESET");
	return before;
}

int main(void)
{
	struct kvm_guest_config config = {.ring_entries = ENTRIES,
					  .data_bytes = PAGES * KVM_GUEST_PAGE};
	struct sigaction sa = {.sa_handler = on_kick};
	bool pml = host_has_pml();
	uint32_t kept = 0;
	int r = kvm_guest_create(&g, &config);

	if (r == -ENODEV || r == -ENOTSUP)
		skip("no /dev/kvm with a dirty ring: %s", strerror(-r));
	check(!r, "VM: %s", strerror(-r));
	check(!sigaction(SIGUSR1, &sa, NULL), "sigaction");
	r = kvm_guest_slot(&g, 1, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA,
			   PAGES * KVM_GUEST_PAGE, g.data);
	check(!r, "slot: %s", strerror(-r));
	r = kvm_guest_add_vcpu(&g, GUEST_CODE(writer), KVM_GUEST_DATA_GPA, PAGES, 0, 0);
	check(r == 0, "vCPU: %s", strerror(-r));
	for (uint64_t round = 1; round <= ROUNDS; round++)
		kept += PAGES - one_round(round);
	printf("after a kick: every entry of %u rounds of %u pages; before it %u were missing\n",
	       ROUNDS, PAGES, kept);
	if (pml)
		check(kept, "PML is on, and never kept an entry back");
	else
		printf("PML: LEFT OUT, this host has none (no kvm_intel with pml=Y): that a CPU "
		       "keeps "
		       "entries back could not be seen\n");
	kvm_guest_destroy(&g);
	return 0;
}
