/* SPDX-License-Identifier: MIT */
/*
 * How a vCPU is stopped at an instruction boundary.
 *
 *   - KVM_RUN with immediate_exit = 1 runs nothing and returns EINTR, but first
 *     completes a pending MMIO read: RIP and the destination register move only
 *     then, so registers may be saved only after it;
 *   - but completing may ask for more: an instruction that reads and writes (INC) has
 *     another exit, which KVM_RUN then returns in spite of immediate_exit, and which
 *     has to be handled before the state is whole;
 *   - any value but 0 counts as set, so that agent and VMM can each have a bit;
 *   - a running vCPU is kicked by a signal whose handler sets immediate_exit: also
 *     when the signal hits between user space's last look and KVM_RUN, KVM_RUN
 *     returns EINTR; the flag stays set until user space clears it.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "tests/lib/check.h"
#include "tests/lib/kvm_guest.h"

#define KICKS 200

static struct kvm_guest g;

GUEST_FN static void asker(void)
{
	for (;;) {
		uint64_t v = guest_ask();

		__asm__ volatile("" : "+r"(v)); /* two instructions, not one INC */
		guest_tell(v + 1);
	}
}

GUEST_FN static void incrementer(void)
{
	for (;;)
		__asm__ volatile("incq (%0)" ::"r"(KVM_GUEST_EXIT_GPA) : "memory");
}

GUEST_FN static void spinner(void)
{
	for (volatile uint64_t i = 0;; i++)
		;
}

static void test_completes_read(void)
{
	struct kvm_run *run = g.vcpus[0].run;
	struct kvm_regs before, after;
	uint64_t told;
	int r = kvm_guest_run(&g, 0);

	check(r == KVM_EXIT_MMIO && kvm_guest_asked(&g, 0), "exit %d", r);
	check(ioctl(g.vcpus[0].fd, KVM_GET_REGS, &before) == 0, "KVM_GET_REGS");
	kvm_guest_answer(&g, 0, 41);
	run->immediate_exit = 1;
	r = kvm_guest_run(&g, 0);
	check(r == -EINTR, "immediate_exit: %d", r);
	check(run->immediate_exit == 1, "KVM clears immediate_exit itself");
	run->immediate_exit = 0;
	check(ioctl(g.vcpus[0].fd, KVM_GET_REGS, &after) == 0, "KVM_GET_REGS");
	check(after.rip > before.rip, "RIP 0x%llx before, 0x%llx after", before.rip, after.rip);
	printf("immediate_exit completes the read: RIP moves by %llu bytes, nothing runs\n",
	       after.rip - before.rip);
	r = kvm_guest_run(&g, 0);
	check(r == KVM_EXIT_MMIO && kvm_guest_told(&g, 0, &told) && told == 42, "told %d", r);
}

static void test_another_exit(void)
{
	struct kvm_run *run = g.vcpus[0].run;
	uint64_t told;
	int r;

	check(kvm_guest_start(&g, 0, incrementer, 0, 0, 0, 0) == 0, "KVM_SET_REGS");
	r = kvm_guest_run(&g, 0);
	check(r == KVM_EXIT_MMIO && kvm_guest_asked(&g, 0), "exit %d", r);
	kvm_guest_answer(&g, 0, 7);
	run->immediate_exit = 1;
	r = kvm_guest_run(&g, 0);
	check(r == KVM_EXIT_MMIO && kvm_guest_told(&g, 0, &told) && told == 8,
	      "no second exit of one instruction: %d", r);
	r = kvm_guest_run(&g, 0);
	check(r == -EINTR, "after its last exit: %d", r);
	run->immediate_exit = 0;
	printf("an INC of MMIO: completing its read exits with its write, then EINTR\n");
}

static void test_any_bit(void)
{
	for (int bit = 0; bit < 8; bit++) {
		int r;

		g.vcpus[0].run->immediate_exit = 1 << bit;
		r = kvm_guest_run(&g, 0);
		check(r == -EINTR, "immediate_exit = 0x%x: %d", 1 << bit, r);
	}
	g.vcpus[0].run->immediate_exit = 0;
	printf("each of the 8 bits of immediate_exit counts\n");
}

static void on_kick(int sig)
{
	__atomic_store_n(&g.vcpus[1].run->immediate_exit, 1, __ATOMIC_RELAXED);
}

static int kicked; /* atomic: KVM_RUNs of the spinning vCPU that returned EINTR */

static void *vcpu_thread(void *arg)
{
	while (kicked < KICKS) {
		int r = kvm_guest_run(&g, 1);

		check(r == -EINTR, "a spinning vCPU exits with %d", r);
		__atomic_store_n(&g.vcpus[1].run->immediate_exit, 0, __ATOMIC_RELAXED);
		__atomic_fetch_add(&kicked, 1, __ATOMIC_RELEASE);
	}
	return NULL;
}

static void test_kick(void)
{
	struct sigaction sa = {.sa_handler = on_kick};
	pthread_t thread;

	sigaction(SIGRTMIN, &sa, NULL);
	check(pthread_create(&thread, NULL, vcpu_thread, NULL) == 0, "thread");
	for (int i = 0; i < KICKS; i++) {
		/* at any phase: before, in and behind KVM_RUN */
		for (volatile int spin = i * 97 % 5000; spin > 0; spin--)
			;
		pthread_kill(thread, SIGRTMIN);
		while (__atomic_load_n(&kicked, __ATOMIC_ACQUIRE) <= i)
			usleep(10);
	}
	pthread_join(thread, NULL);
	printf("%d kicks at any phase: each made KVM_RUN return EINTR\n", KICKS);
}

int main(void)
{
	struct kvm_guest_config config = {0};
	int r = kvm_guest_create(&g, &config);

	if (r == -ENODEV)
		skip("no usable /dev/kvm");
	check(r == 0, "VM: %s", strerror(-r));
	if (kvm_guest_cap(&g, KVM_CAP_IMMEDIATE_EXIT) <= 0)
		skip("no KVM_CAP_IMMEDIATE_EXIT");
	r = kvm_guest_add_vcpu(&g, asker, 0, 0, 0, 0);
	check(r == 0, "vCPU: %s", strerror(-r));
	r = kvm_guest_add_vcpu(&g, spinner, 0, 0, 0, 0);
	check(r == 1, "vCPU: %s", strerror(-r));
	test_completes_read();
	test_any_bit();
	test_another_exit();
	test_kick();
	kvm_guest_destroy(&g);
	return 0;
}
