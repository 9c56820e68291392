/* SPDX-License-Identifier: MIT */
/*
 * Full rings and writers that have no vCPU, on the simulated KVM.
 *
 *   idle    every ring is full and no vCPU runs, as when all are preempted: marks, device
 *           logs, KVM's own writes, consumers, memslots and the service get on all the same
 *   storm   eight vCPUs fill small rings all the time, nobody harvests but who is stuck,
 *           RESETs come back short, signals rain, memslots change: it ends, and nothing
 *           is lost
 *
 * An alarm ends a test that hangs.
 */
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/lib/check.h"
#include "tests/lib/fake_service.h"
#include "tests/lib/rand.h"
#include "tests/lib/sim_vm.h"

#define PAGES	1024u
#define VCPUS	8u
#define STORES	3000u
#define RING	256u
#define FULL	(RING - SIMKVM_RING_RESERVED)
#define PASSING 0x40000000ull /* a slot that comes and goes */
#define HANGS_S 120

static struct sim_vm vm;
static struct fake_service service;
static struct fake_copy copy;
static int fd;
static uint8_t *ram;

static void slot(uint32_t id, uint64_t gpa, uint64_t first, uint64_t nr)
{
	struct snapd_memslot s = {.slot = id,
				  .gpa = gpa,
				  .size_bytes = nr * FAKE_PAGE,
				  .hva = ram + first * FAKE_PAGE,
				  .fd = fd,
				  .fd_offset = first * FAKE_PAGE};

	check(!snapd_vm_memslot(vm.agent, &s), "%s", snapd_vm_error(NULL));
}

static void open_vm(uint32_t nr_vcpus)
{
	const struct sim_vm_config config = {.nr_vcpus = nr_vcpus,
					     .ring_entries = RING,
					     .harvest_us = 60000000,
					     .backup_bitmap = true};

	alarm(HANGS_S);
	fd = memfd_create("ram", MFD_CLOEXEC);
	check(fd >= 0 && !ftruncate(fd, PAGES * FAKE_PAGE), "memory");
	ram = mmap(NULL, PAGES * FAKE_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	check(ram != MAP_FAILED, "memory");
	sim_vm_create(&vm, &config);
	slot(1, 0, 0, PAGES);
	fake_open_on(vm.listen_fd, &service);
	fake_copy_init(&copy, &service);
}

static void close_vm(void)
{
	struct snapd_vm_stats st;

	close(fake_pause(&service, 0));
	fake_copy_dirty(&service, &copy);
	fake_copy_check(&copy, "snapshot");
	fake_resume(&service);
	snapd_vm_get_stats(vm.agent, &st);
	check(st.harvested == st.reset && !st.unresolved, "harvested %llu, reset %llu",
	      (unsigned long long)st.harvested, (unsigned long long)st.reset);
	printf("rings full %llu, harvested %llu\n", (unsigned long long)st.ring_full,
	       (unsigned long long)st.harvested);
	fake_copy_deinit(&copy);
	fake_close(&service);
	sim_vm_destroy(&vm);
	munmap(ram, PAGES * FAKE_PAGE);
	close(fd);
	alarm(0);
}

static void test_idle(void)
{
	static struct sim_store stores[FULL];
	struct snapd_devlog_mem mem;
	struct snapd_consumer *c;
	struct snapd_devlog *log;
	uint64_t gfns[64];

	open_vm(2);
	fake_sync(&service);
	fake_copy_dirty(&service, &copy);
	for (uint32_t i = 0; i < 2; i++) {
		for (uint32_t k = 0; k < FULL; k++)
			stores[k] = (struct sim_store){0, (i * FULL + k) * FAKE_PAGE, k + 1};
		sim_vm_run(&vm, i, stores, FULL);
	}
	check(simkvm_push(vm.sim, 0, 0, 0) == 0, "the reserve");
	/* Rings are full, vCPUs are elsewhere. */
	check(!snapd_devlog_create(vm.agent, PAGES * FAKE_PAGE, &log, &mem), "log");
	*(uint64_t *)(ram + 1000 * FAKE_PAGE) = 1;
	((uint8_t *)mem.base)[1000 / 8] = 1 << 1000 % 8;
	*(uint64_t *)(ram + 1001 * FAKE_PAGE) = 1;
	check(!snapd_vm_mark_dirty(vm.agent, 1001 * FAKE_PAGE, 8), "mark");
	check(!simkvm_write(vm.sim, 0, 1002 * FAKE_PAGE, 1), "write");
	check(!snapd_consumer_create(vm.agent, "c", &c), "consumer");
	check(snapd_consumer_take(c, gfns, 64, 0) == 64, "take");
	slot(2, PASSING, 0, 16);
	check(!snapd_vm_memslot(vm.agent, &(struct snapd_memslot){.slot = 2, .fd = -1}), "delete");
	snapd_devlog_destroy(log);
	close_vm();
	printf("idle: ok\n");
}

static void on_signal(int sig)
{
}

static _Atomic bool stop;

static void *pelt(void *arg)
{
	const struct timespec rest = {.tv_nsec = 50000};

	while (!atomic_load(&stop)) {
		for (uint32_t i = 0; i < VCPUS; i++)
			if (vm.vcpus[i].thread)
				pthread_kill(vm.vcpus[i].thread, SIGUSR1);
		simkvm_interrupt_reset(vm.sim, 1 + (uint32_t)(rest.tv_nsec % 7), 1);
		nanosleep(&rest, NULL);
	}
	return NULL;
}

static void *mark(void *arg)
{
	for (uint64_t n = 1; !atomic_load(&stop); n++) {
		uint64_t at = n * 13 % PAGES * FAKE_PAGE;

		__atomic_store_n((uint64_t *)(ram + at + 512), n, __ATOMIC_RELEASE);
		check(!snapd_vm_mark_dirty(vm.agent, at, 8), "mark");
		check(!simkvm_write(vm.sim, 0, at + 1024, n), "write");
		usleep(20);
	}
	return NULL;
}

static void *change_slots(void *arg)
{
	while (!atomic_load(&stop)) {
		slot(2, PASSING, 0, PAGES);
		check(!snapd_vm_memslot(vm.agent, &(struct snapd_memslot){.slot = 2, .fd = -1}),
		      "%s", snapd_vm_error(NULL));
		usleep(200);
	}
	return NULL;
}

static void test_storm(struct rand *r)
{
	void *(*const others[])(void *) = {pelt, mark, change_slots};
	static struct sim_store stores[VCPUS][STORES];
	struct sigaction sa = {.sa_handler = on_signal};
	struct snapd_vm_stats st;
	pthread_t threads[3];

	sigaction(SIGUSR1, &sa, NULL);
	open_vm(VCPUS);
	for (uint32_t i = 0; i < VCPUS; i++) {
		for (uint32_t k = 0; k < STORES; k++)
			stores[i][k] = (struct sim_store){
				0, rand_below(r, PAGES) * FAKE_PAGE + i * 8, k + 1};
		sim_vm_begin(&vm, i, stores[i], STORES);
	}
	for (int i = 0; i < 3; i++)
		check(!pthread_create(&threads[i], NULL, others[i], NULL), "thread");
	for (int i = 0; i < 10; i++) {
		fake_sync(&service);
		fake_copy_dirty(&service, &copy);
		usleep(2000);
	}
	atomic_store(&stop, true);
	for (int i = 0; i < 3; i++)
		pthread_join(threads[i], NULL);
	for (uint32_t i = 0; i < VCPUS; i++)
		sim_vm_join(&vm, i);
	snapd_vm_get_stats(vm.agent, &st);
	check(st.ring_full >= VCPUS, "%llu rings full", (unsigned long long)st.ring_full);
	close_vm();
	printf("storm: ok\n");
}

int main(void)
{
	struct rand r = rand_of(rand_seed());

	test_idle();
	test_storm(&r);
	return 0;
}
