/* SPDX-License-Identifier: MIT */
/*
 * Rings under stress: two vCPUs write stamped pages in an order of their own, and
 * every snapshot made from the sets alone must equal RAM.
 *
 *   full      a ring of 1024 entries that nobody harvests but the vCPUs
 *   signals   SIGALRM rains on every thread; RESET must never let a page slip
 *   short     RESET cut short as by a signal that cannot be blocked, which leaves
 *             pages writable (tests/kernel/ring_reset_signal.c): the agent must
 *             keep these frames dirty
 *   storm     all of that on four vCPUs at once, while a device writes and marks
 *   consumer  a set of the VMM's own sees all the service's set sees
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#include "tests/lib/agent_vm.h"
#include "tests/lib/check.h"
#include "tests/lib/rand.h"

#define PAGES 8192u

GUEST_FN static void guest_scatter(uint64_t first, uint64_t step)
{
	for (uint64_t n = 1, p = first;; n++) {
		guest_write(KVM_GUEST_DATA_GPA + p * KVM_GUEST_PAGE + first * 8, n);
		p = (p + step) % PAGES;
	}
}

static struct fake_copy copy;
static _Atomic uint32_t alarms;

static void on_alarm(int sig)
{
	atomic_fetch_add(&alarms, 1);
}

/* In the main thread, once the vCPUs run: the rain is for them. */
static void take_shelter(void)
{
	sigset_t alarm;

	sigemptyset(&alarm);
	sigaddset(&alarm, SIGALRM);
	pthread_sigmask(SIG_BLOCK, &alarm, NULL);
}

static void rain(long us)
{
	struct itimerval it = {.it_interval.tv_usec = us, .it_value.tv_usec = us};
	struct sigaction sa = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};

	sigaction(SIGALRM, &sa, NULL);
	setitimer(ITIMER_REAL, &it, NULL);
}

static _Atomic(pthread_t) target; /* whom to pelt; 0: none */
static _Atomic bool pelt_stop;
static _Atomic uint32_t resets, shorts;

static void *pelt(void *arg)
{
	pthread_t t;

	while (!atomic_load(&pelt_stop)) {
		t = atomic_load(&target);
		if (t)
			pthread_kill(t, SIGALRM);
	}
	return NULL;
}

/* Signals come in every other RESET, though the agent blocks them: as SIGSTOP would. */
static int ioctl_short(void *opaque, int fd, unsigned long request, void *arg)
{
	static _Thread_local bool was_pelted;
	sigset_t alarm, old;
	int r;

	if (request != KVM_RESET_DIRTY_RINGS)
		return ioctl(fd, request, arg);
	if (was_pelted || atomic_fetch_add(&resets, 1) % 2) {
		r = ioctl(fd, request, arg);
		atomic_fetch_add(&shorts, was_pelted && r > 0);
		was_pelted = false;
		return r;
	}
	sigemptyset(&alarm);
	sigaddset(&alarm, SIGALRM);
	atomic_store(&target, pthread_self());
	pthread_sigmask(SIG_UNBLOCK, &alarm, &old);
	r = ioctl(fd, request, arg);
	atomic_store(&target, 0);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	was_pelted = true;
	return r;
}

static void *mmap_op(void *opaque, size_t len, int prot, int flags, int fd, int64_t offset)
{
	return mmap(NULL, len, prot, flags, fd, offset);
}

static int munmap_op(void *opaque, void *addr, size_t len)
{
	return munmap(addr, len);
}

static void open_vm(struct agent_vm *a, struct fake_service *s, const struct agent_vm_config *c)
{
	sigset_t none;

	sigemptyset(&none);
	pthread_sigmask(SIG_SETMASK, &none, NULL);
	agent_vm_create(a, c);
	agent_vm_add(a, GUEST_CODE(guest_scatter), 0, 1, 0, 0);
	agent_vm_add(a, GUEST_CODE(guest_scatter), 1, 4097, 0, 0);
	fake_open(a, s);
	fake_copy_init(&copy, s);
}

static void start_vcpus(struct agent_vm *a)
{
	for (uint32_t i = 0; i < a->g.nr_vcpus; i++)
		agent_vm_start(a, i);
	take_shelter();
}

static void close_vm(struct agent_vm *a, struct fake_service *s, const char *what)
{
	struct snapd_vm_stats st;

	/* Counters are read one by one, and harvests go on: what was lost stays lost. */
	for (int i = 0; i < 1000; i++) {
		snapd_vm_get_stats(a->vm, &st);
		if (st.harvested == st.reset)
			break;
		usleep(1000);
	}
	printf("%s: harvested %llu, ring full %llu, unresolved %llu, kicks %llu\n", what,
	       (unsigned long long)st.harvested, (unsigned long long)st.ring_full,
	       (unsigned long long)st.unresolved, (unsigned long long)st.kicks);
	check(st.harvested == st.reset, "%llu reset", (unsigned long long)st.reset);
	check(!st.unresolved, "unresolved");
	fake_copy_deinit(&copy);
	fake_close(s);
	agent_vm_destroy(a);
}

static void snapshots(struct fake_service *s, struct fake_copy *c, struct rand *r, int rounds)
{
	for (int i = 0; i < rounds; i++) {
		usleep((useconds_t)rand_below(r, 20000));
		for (uint64_t early = rand_below(r, 3); early; early--) {
			fake_sync(s);
			fake_copy_dirty(s, c);
		}
		close(fake_pause(s, 0));
		fake_copy_dirty(s, c);
		fake_copy_check(c, "snapshot");
		fake_resume(s);
	}
}

static void test_full(struct rand *r)
{
	struct agent_vm_config c = {
		.data_bytes = PAGES * KVM_GUEST_PAGE, .ring_entries = 1024, .harvest_us = 60000000};
	static struct agent_vm a;
	static struct fake_service s;
	struct snapd_vm_stats st;

	open_vm(&a, &s, &c);
	start_vcpus(&a);
	snapshots(&s, &copy, r, 40);
	usleep(200000);
	snapd_vm_get_stats(a.vm, &st);
	check(st.ring_full > 0, "no ring was full");
	snapshots(&s, &copy, r, 5);
	close_vm(&a, &s, "full");
}

static void test_signals(struct rand *r)
{
	struct agent_vm_config c = {.data_bytes = PAGES * KVM_GUEST_PAGE, .ring_entries = 4096};
	static struct agent_vm a;
	static struct fake_service s;

	open_vm(&a, &s, &c);
	start_vcpus(&a);
	rain(200);
	snapshots(&s, &copy, r, 60);
	rain(0);
	printf("signals: %u\n", atomic_load(&alarms));
	close_vm(&a, &s, "signals");
}

static void test_short(struct rand *r)
{
	struct snapd_kvm_ops ops = {ioctl_short, mmap_op, munmap_op, NULL};
	struct agent_vm_config c = {
		.data_bytes = PAGES * KVM_GUEST_PAGE, .ring_entries = 65536, .kvm = &ops};
	static struct agent_vm a;
	static struct fake_service s;
	pthread_t thread;

	open_vm(&a, &s, &c);
	start_vcpus(&a);
	check(!pthread_create(&thread, NULL, pelt, NULL), "thread");
	snapshots(&s, &copy, r, 60);
	atomic_store(&pelt_stop, true);
	pthread_join(thread, NULL);
	printf("short: %u of %u RESETs\n", atomic_load(&shorts), atomic_load(&resets));
	close_vm(&a, &s, "short");
}

static _Atomic bool marker_stop;
static _Atomic uint64_t marks;

/* A writer with no vCPU context. */
static void *marker(void *arg)
{
	struct agent_vm *a = arg;

	for (uint64_t n = 1; !atomic_load(&marker_stop); n++) {
		uint64_t at = n * 7 % PAGES * KVM_GUEST_PAGE;

		__atomic_store_n((uint64_t *)(a->g.data + at + 2048), n, __ATOMIC_RELEASE);
		check(!snapd_vm_mark_dirty(a->vm, KVM_GUEST_DATA_GPA + at, KVM_GUEST_PAGE), "mark");
		atomic_store(&marks, n);
		if (n % 16 == 0)
			usleep(100);
	}
	return NULL;
}

/* Every ring full at once, nobody harvests but who is stuck, RESETs come back short,
 * signals rain, and a device writes and marks: all get on, and nothing is lost. */
static void test_storm(struct rand *r)
{
	struct snapd_kvm_ops ops = {ioctl_short, mmap_op, munmap_op, NULL};
	struct agent_vm_config c = {.data_bytes = PAGES * KVM_GUEST_PAGE,
				    .ring_entries = 1024,
				    .harvest_us = 60000000,
				    .kvm = &ops};
	static struct agent_vm a;
	static struct fake_service s;
	pthread_t pelter, writer;
	struct snapd_vm_stats st;

	open_vm(&a, &s, &c);
	agent_vm_add(&a, GUEST_CODE(guest_scatter), 2, 1025, 0, 0);
	agent_vm_add(&a, GUEST_CODE(guest_scatter), 3, 2049, 0, 0);
	start_vcpus(&a);
	atomic_store(&pelt_stop, false);
	check(!pthread_create(&pelter, NULL, pelt, NULL), "thread");
	check(!pthread_create(&writer, NULL, marker, &a), "thread");
	rain(500);
	for (int i = 0; i < 6; i++) {
		usleep((useconds_t)rand_below(r, 100000));
		fake_sync(&s);
		fake_copy_dirty(&s, &copy);
	}
	atomic_store(&marker_stop, true); /* as quiesce would have it */
	pthread_join(writer, NULL);
	snapshots(&s, &copy, r, 4);
	rain(0);
	atomic_store(&pelt_stop, true);
	pthread_join(pelter, NULL);
	snapd_vm_get_stats(a.vm, &st);
	check(st.ring_full >= 4, "%llu rings full", (unsigned long long)st.ring_full);
	check(atomic_load(&marks) > 100, "the device waited: %llu marks",
	      (unsigned long long)atomic_load(&marks));
	close_vm(&a, &s, "storm");
}

static uint64_t take_all(struct snapd_consumer *c, uint8_t *seen)
{
	uint64_t gfns[100], total = 0, last = 0;
	long n;

	for (int again = 0; (n = snapd_consumer_take(c, gfns, 100, again)); again = 1)
		for (long i = 0; i < n; i++, total++) {
			check(!total || gfns[i] > last, "not ascending");
			last = gfns[i];
			seen[gfns[i]]++;
		}
	return total;
}

static void test_consumer(struct rand *r)
{
	const uint64_t data_gfn = KVM_GUEST_DATA_GPA / KVM_GUEST_PAGE;
	struct agent_vm_config config = {.data_bytes = PAGES * KVM_GUEST_PAGE};
	static uint8_t seen[(1 << 16) + PAGES + 1];
	static struct agent_vm a;
	static struct fake_service s;
	struct snapd_consumer *c, *other;

	open_vm(&a, &s, &config);
	start_vcpus(&a);
	check(!snapd_consumer_create(a.vm, "a", &c), "consumer");
	check(!snapd_consumer_create(a.vm, "b", &other), "consumer");
	check(take_all(c, seen) >= PAGES + 512, "a new consumer sees all");
	check(!snapd_vm_pause(a.vm, 0), "%s", snapd_vm_error(a.vm));
	take_all(c, seen);
	check(take_all(c, seen) == 0, "dirty though paused");
	memset(seen, 0, sizeof(seen));
	check(!snapd_vm_mark_dirty(a.vm, KVM_GUEST_DATA_GPA + 5 * KVM_GUEST_PAGE + 4095, 2),
	      "mark");
	check(take_all(c, seen) == 2 && seen[data_gfn + 5] && seen[data_gfn + 6], "marks");
	check(!snapd_vm_mark_dirty(a.vm, 1ull << 40, 4096), "no memory there");
	check(snapd_vm_mark_dirty(a.vm, ~0ull - 5, 4096) == -EINVAL, "wraps");
	check(take_all(c, seen) == 0, "nothing marked");
	check(take_all(other, seen) >= PAGES + 512, "another's bits were taken");
	snapd_vm_resume(a.vm);
	usleep(20000);
	check(take_all(c, seen) > 100, "the guest writes");
	snapd_consumer_destroy(other);
	snapd_consumer_destroy(c);
	close_vm(&a, &s, "consumer");
	(void)r;
}

int main(void)
{
	struct rand r = rand_of(rand_seed());

	test_full(&r);
	test_signals(&r);
	test_short(&r);
	test_storm(&r);
	test_consumer(&r);
	printf("ok\n");
	return 0;
}
