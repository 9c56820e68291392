/* SPDX-License-Identifier: MIT */
/*
 * Pauses and kicks.
 *
 *   storm    two threads pause and resume at random, the service takes snapshots,
 *            the VMM kicks vCPUs by its own signal and immediate_exit; the guest
 *            asks the host for numbers by MMIO reads all the time: no read may be
 *            answered twice or not at all (V4), no kick may be lost (V2, V3)
 *   slots    memslot calls on a vCPU's thread go on while a pause is asked for;
 *            on any other thread they wait for the end of the service's pause
 *   slow     a vCPU that stays in the VMM's code: ETIMEDOUT, and the VM runs on
 *   thread   a vCPU whose thread has ended is saved all the same, and another
 *            thread may go on with it
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "tests/lib/agent_vm.h"
#include "tests/lib/check.h"
#include "tests/lib/rand.h"

/* Ask, write the answer, tell it back with a count. */
GUEST_FN static void guest_ask_tell(uint64_t page)
{
	for (uint64_t n = 1;; n++) {
		uint64_t v = guest_ask();

		guest_write(KVM_GUEST_DATA_GPA + page * KVM_GUEST_PAGE, v);
		guest_tell(n << 32 | v);
	}
}

GUEST_FN static void guest_spin(uint64_t page)
{
	for (uint64_t n = 1;; n++)
		guest_write(KVM_GUEST_DATA_GPA + page * KVM_GUEST_PAGE, n);
}

struct asker {
	uint64_t answer, told; /* its vCPU's thread */
};
static struct asker askers[KVM_GUEST_MAX_VCPUS];
static _Atomic bool use_slots, be_slow, is_slow;

static void slots_on_thread(struct agent_vcpu *v)
{
	check(!agent_vm_slot(v->vm, 10 + v->index,
			     KVM_GUEST_DATA_GPA + (64ull << 20) + v->index * KVM_GUEST_PAGE,
			     v->index, 1),
	      "%s", snapd_vm_error(NULL));
	check(!agent_vm_unslot(v->vm, 10 + v->index, 0), "%s", snapd_vm_error(NULL));
}

static void on_ask(struct agent_vcpu *v, struct kvm_run *run)
{
	struct asker *k = &askers[v->index];

	check(!run->mmio.is_write && run->mmio.phys_addr == KVM_GUEST_EXIT_GPA, "MMIO");
	if (k->answer) { /* the last answer was told back, once */
		uint64_t told = atomic_load(&v->told);

		check(told == (++k->told << 32 | k->answer), "vCPU %u: told %llx, not %llx:%llx",
		      v->index, (unsigned long long)told, (unsigned long long)k->told,
		      (unsigned long long)k->answer);
	}
	if (atomic_load(&use_slots))
		slots_on_thread(v);
	while (atomic_load(&be_slow)) {
		atomic_store(&is_slow, true);
		usleep(1000);
	}
	k->answer = (k->answer * 7 + 1) & 0xffffffff;
	memcpy(run->mmio.data, &k->answer, 8);
}

static _Atomic bool storm_over;

static void *pauser(void *arg)
{
	struct agent_vm *a = arg;
	struct rand r = rand_of((uintptr_t)pthread_self());

	while (!atomic_load(&storm_over)) {
		check(!snapd_vm_pause(a->vm, 0), "%s", snapd_vm_error(NULL));
		usleep((useconds_t)rand_below(&r, 500));
		snapd_vm_resume(a->vm);
		usleep((useconds_t)rand_below(&r, 1000));
	}
	return NULL;
}

static void on_usr1(int sig)
{
}

/* A VMM's own kick: the run call must come back with -EINTR. */
static void own_kick(struct agent_vcpu *v)
{
	uint64_t was = atomic_load(&v->interrupted);

	__atomic_store_n(&snapd_vcpu_kvm_run(v->v)->immediate_exit, 1, __ATOMIC_SEQ_CST);
	pthread_kill(v->thread, SIGUSR1);
	wait_until(atomic_load(&v->interrupted) != was);
}

static void test_storm(struct agent_vm *a, struct fake_service *s)
{
	uint64_t exits = atomic_load(&a->vcpus[0].exits);
	pthread_t t[2];

	for (int i = 0; i < 2; i++)
		check(!pthread_create(&t[i], NULL, pauser, a), "thread");
	for (int i = 0; i < 300; i++) {
		atomic_store(&use_slots, i % 3 == 0);
		own_kick(&a->vcpus[i % 3]);
		if (i % 4 == 0) {
			close(fake_pause(s, 0));
			fake_resume(s);
		}
	}
	atomic_store(&storm_over, true);
	for (int i = 0; i < 2; i++)
		pthread_join(t[i], NULL);
	atomic_store(&use_slots, false);
	printf("storm: %llu exits of vCPU 0\n",
	       (unsigned long long)(atomic_load(&a->vcpus[0].exits) - exits));
}

static _Atomic bool slot_done;

static void *other_slot(void *arg)
{
	struct agent_vm *a = arg;

	check(!agent_vm_slot(a, 20, KVM_GUEST_DATA_GPA + (128ull << 20), 0, 1), "%s",
	      snapd_vm_error(NULL));
	atomic_store(&slot_done, true);
	check(!agent_vm_unslot(a, 20, 0), "%s", snapd_vm_error(NULL));
	return NULL;
}

static void test_slot_waits(struct agent_vm *a, struct fake_service *s)
{
	pthread_t t;

	close(fake_pause(s, 0));
	check(!pthread_create(&t, NULL, other_slot, a), "thread");
	usleep(50000);
	check(!atomic_load(&slot_done), "a slot changed in the pause");
	fake_resume(s);
	pthread_join(t, NULL);
	check(atomic_load(&slot_done), "slot");
	printf("slots: wait for the end of a pause\n");
}

static void test_slow(struct agent_vm *a, struct fake_service *s)
{
	struct snapd_msg_pause m = {.timeout_ms = 30};
	uint64_t exits;

	atomic_store(&be_slow, true);
	wait_until(atomic_load(&is_slow));
	check(snapd_vm_pause(a->vm, 30) == -ETIMEDOUT, "no timeout");
	check(strstr(snapd_vm_error(NULL), "snapd_vcpu_run"), "%s", snapd_vm_error(NULL));
	fake_send(s, &m, sizeof(m), SNAPD_MSG_PAUSE, -1);
	check(fake_answer(s) == SNAPD_MSG_FAILED && s->in.error.code == ETIMEDOUT, "no FAILED");
	atomic_store(&be_slow, false);
	exits = atomic_load(&a->vcpus[0].exits);
	wait_until(atomic_load(&a->vcpus[0].exits) > exits + 10);
	printf("slow: %s\n", s->in.error.text);
}

static void test_thread_ends(struct agent_vm *a, struct fake_service *s)
{
	struct agent_vcpu *v = &a->vcpus[2];
	volatile uint64_t *n = (void *)(a->g.data + 2 * KVM_GUEST_PAGE);
	uint64_t was;

	atomic_store(&v->leave, true);
	own_kick(v);
	pthread_join(v->thread, NULL);
	was = *n;
	close(fake_pause(s, 0));
	check(s->in.paused.state_bytes > 1000, "state");
	fake_resume(s);
	check(*n == was, "it runs without a thread");
	atomic_store(&v->leave, false);
	agent_vm_start(a, 2);
	wait_until(*n > was);
	printf("thread: another one went on\n");
}

int main(void)
{
	struct agent_vm_config config = {.data_bytes = 1 << 20};
	struct sigaction sa = {.sa_handler = on_usr1};
	static struct agent_vm a;
	static struct fake_service s;

	sigaction(SIGUSR1, &sa, NULL);
	agent_vm_create(&a, &config);
	a.mmio = on_ask;
	agent_vm_add(&a, GUEST_CODE(guest_ask_tell), 0, 0, 0, 0);
	agent_vm_add(&a, GUEST_CODE(guest_ask_tell), 1, 0, 0, 0);
	agent_vm_add(&a, GUEST_CODE(guest_spin), 2, 0, 0, 0);
	fake_open(&a, &s);
	for (uint32_t i = 0; i < 3; i++)
		agent_vm_start(&a, i);
	test_storm(&a, &s);
	test_slot_waits(&a, &s);
	test_slow(&a, &s);
	test_thread_ends(&a, &s);
	fake_close(&s);
	agent_vm_destroy(&a);
	printf("ok\n");
	return 0;
}
