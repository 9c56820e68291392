/* SPDX-License-Identifier: MIT */
/*
 * The agent and a service that the test plays: two vCPUs count in every page.
 *
 *   snapshot   SYNC, early copy, PAUSE, copy, RESUME, many times: the copy put
 *              together from the sets alone equals RAM at the paused instant
 *   rollback   PAUSE(NO_STATE), REWRITE, write RAM back, LOAD, RESUME, and the same in
 *              two messages: the guest goes on from the snapshot, counters and
 *              registers agree
 *   untouched  a pause to rewrite is taken back, by who alone can know
 *   leaving    the connection ends in each state: a VM paused for a snapshot runs
 *              on; one half rewritten stays, and says so
 *   nonsense   bad messages end the connection, not the VM
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "tests/lib/agent_vm.h"
#include "tests/lib/check.h"

#define PAGES	   2048u
#define DATA_BYTES (PAGES * KVM_GUEST_PAGE)

/* Each vCPU owns every other page: i-th round writes i into all of them; the
 * last page tells the round, written before the round begins. */
GUEST_FN static void guest_count(uint64_t first, uint64_t round)
{
	for (;; round++) {
		guest_write(KVM_GUEST_DATA_GPA + first * KVM_GUEST_PAGE + 8, round);
		for (uint64_t p = first; p < PAGES; p += 2)
			guest_write(KVM_GUEST_DATA_GPA + p * KVM_GUEST_PAGE, round);
	}
}

static uint64_t counter(struct agent_vm *a, uint64_t page)
{
	return *(volatile uint64_t *)(a->g.data + page * KVM_GUEST_PAGE);
}

/* The guest runs: its round goes up. */
static void check_runs(struct agent_vm *a)
{
	uint64_t was = counter(a, 0);

	wait_until(counter(a, 0) != was);
}

static void check_stands(struct agent_vm *a)
{
	uint64_t was = counter(a, 0), was2 = counter(a, PAGES - 1);

	usleep(20000);
	check(counter(a, 0) == was && counter(a, PAGES - 1) == was2, "the guest runs");
}

static void test_snapshots(struct agent_vm *a, struct fake_service *s)
{
	struct fake_copy c;
	int rounds = 0;

	fake_copy_init(&c, s);
	for (; rounds < 60; rounds++) {
		for (int i = 0; i < rounds % 4; i++) {
			fake_sync(s);
			fake_copy_dirty(s, &c);
			usleep((useconds_t)(rounds * 37 % 1500));
		}
		close(fake_pause(s, 0));
		fake_copy_dirty(s, &c);
		fake_copy_check(&c, "snapshot");
		fake_resume(s);
	}
	fake_copy_deinit(&c);
	check_runs(a);
	printf("snapshots: %d rounds whole\n", rounds);
}

/* The guest runs on from where it was rolled back to. */
static void goes_on(struct agent_vm *a, struct fake_service *s, struct fake_copy *c, uint64_t was)
{
	/* the first page of the next round follows the snapshot's */
	wait_until(counter(a, 0) != was);
	check(counter(a, 0) > was, "counter fell");
	/* after a rollback the sets tell all that was written since */
	close(fake_pause(s, 0));
	fake_copy_dirty(s, c);
	fake_copy_check(c, "after rollback");
	fake_resume(s);
}

/* Snapshot, run on, roll back; the guest's two counters of each vCPU agree with
 * the registers that it goes on with only if both went back. */
static void test_rollback(struct agent_vm *a, struct fake_service *s)
{
	struct snapd_point to = {1, 2};
	struct fake_copy c;

	fake_copy_init(&c, s);
	for (int i = 0; i < 10; i++) {
		int state = fake_pause(s, 0);
		uint64_t len = s->in.paused.state_bytes, was;

		for (int b = 0; b < 2; b++)
			memcpy(c.ram[b], c.map[b], c.size[b]);
		was = counter(a, 0);
		fake_resume(s);
		wait_until(counter(a, 0) > was + 2);
		if (i % 2) {
			fake_pause_to_rewrite(s, to);
			for (int b = 0; b < 2; b++)
				memcpy(c.map[b], c.ram[b], c.size[b]);
			gpaset_clear(&s->dirty, s->shm->nr_frames);
			fake_load_resume(s, state, len);
			check(s->in.loaded.paused_ns, "how long it stood");
			goes_on(a, s, &c, was);
			close(state);
			continue;
		}
		fake_pause(s, SNAPD_PAUSE_NO_STATE);
		fake_rewrite(s, to);
		for (int b = 0; b < 2; b++)
			memcpy(c.map[b], c.ram[b], c.size[b]);
		fake_load(s, state, len);
		if (i == 0)
			printf("rollback: layout %llu us, cure %llu us, load %llu us\n",
			       (unsigned long long)s->in.loaded.layout_ns / 1000,
			       (unsigned long long)s->in.loaded.cure_ns / 1000,
			       (unsigned long long)s->in.loaded.load_ns / 1000);
		check(counter(a, 0) == was, "RAM changed in LOAD");
		check_stands(a);
		gpaset_clear(&s->dirty, s->shm->nr_frames);
		fake_resume(s);
		goes_on(a, s, &c, was);
		close(state);
	}
	fake_copy_deinit(&c);
	printf("rollback: 10 times\n");
}

static void reopen(struct agent_vm *a, struct fake_service *s, uint32_t flags)
{
	fake_close(s);
	fake_open(a, s);
	check((s->hello.flags & SNAPD_HELLO_REWRITING) == flags, "HELLO flags 0x%x",
	      s->hello.flags);
}

static void test_leaving(struct agent_vm *a, struct fake_service *s)
{
	struct snapd_point to = {3, 4};
	uint64_t len;
	int state;

	reopen(a, s, 0);
	check_runs(a);
	fake_sync(s);
	reopen(a, s, 0);
	state = fake_pause(s, 0);
	len = s->in.paused.state_bytes;
	check_stands(a);
	reopen(a, s, 0);
	check_runs(a);
	close(state);
	state = fake_pause(s, 0);
	fake_rewrite(s, to);
	reopen(a, s, SNAPD_HELLO_REWRITING);
	check(s->hello.rewrite_to.timeline == 3 && s->hello.rewrite_to.epoch == 4, "rewrite_to");
	check_stands(a);
	fake_pause(s, SNAPD_PAUSE_NO_STATE);
	fake_rewrite(s, to);
	fake_load(s, state, len);
	reopen(a, s, SNAPD_HELLO_REWRITING);
	check_stands(a);
	fake_pause(s, SNAPD_PAUSE_NO_STATE);
	fake_rewrite(s, to);
	fake_load(s, state, len);
	fake_resume(s);
	close(state);
	check_runs(a);
	printf("leaving: in each state\n");
}

static void test_untouched(struct agent_vm *a, struct fake_service *s)
{
	struct snapd_point to = {5, 6};
	int state = fake_pause(s, 0);
	uint64_t len = s->in.paused.state_bytes;

	fake_resume(s);
	fake_pause_to_rewrite(s, to);
	check_stands(a);
	check(fake_resume_untouched(s) == SNAPD_MSG_RESUMED, "taken back");
	check_runs(a);
	fake_pause_to_rewrite(s, to);
	fake_rewrite(s, to);
	check(fake_resume_untouched(s) == SNAPD_MSG_FAILED, "not after REWRITE");
	check_stands(a);
	fake_load_resume(s, state, len);
	check_runs(a);
	fake_pause_to_rewrite(s, to);
	reopen(a, s, SNAPD_HELLO_REWRITING);
	check(s->hello.rewrite_to.timeline == 5 && s->hello.rewrite_to.epoch == 6, "rewrite_to");
	check_stands(a);
	check(fake_resume_untouched(s) == SNAPD_MSG_FAILED, "not by another service");
	fake_pause_to_rewrite(s, to);
	check(fake_resume_untouched(s) == SNAPD_MSG_FAILED, "nor by asking it again");
	fake_load_resume(s, state, len);
	check_runs(a);
	close(state);
	printf("untouched: by who knows\n");
}

static void raw(struct fake_service *s, const void *p, size_t len)
{
	check(send(s->fd, p, len, MSG_NOSIGNAL) == (ssize_t)len, "send");
	check(fake_is_closed(s), "the agent took nonsense");
}

static void test_nonsense(struct agent_vm *a, struct fake_service *s)
{
	struct snapd_msg_pause m = {.h = {.len = sizeof(m), .type = SNAPD_MSG_PAUSE, .req = 1}};
	struct snapd_msg_load load = {.state_bytes = 10};
	int fd = memfd_create("junk", MFD_CLOEXEC);

	raw(s, &m, sizeof(m) - 1);
	reopen(a, s, 0);
	m.h.len = sizeof(m.h);
	raw(s, &m, sizeof(m.h));
	reopen(a, s, 0);
	m.flags = SNAPD_PAUSE_REWRITE;
	m.h.len = SNAPD_1_0_PAUSE_BYTES;
	raw(s, &m, m.h.len);
	reopen(a, s, 0);
	m.h.len = sizeof(m.h);
	m.h.type = 999;
	raw(s, &m, sizeof(m.h));
	reopen(a, s, 0);
	raw(s, "x", 1);
	reopen(a, s, 0);
	fake_send(s, &m, sizeof(m), SNAPD_MSG_PAUSE, fd);
	check(fake_is_closed(s), "a descriptor where none belongs");
	reopen(a, s, 0);
	fake_rewrite(s, (struct snapd_point){1, 1});
	check(fake_is_closed(s), "REWRITE while running");
	reopen(a, s, 0);
	fake_send(s, &load, sizeof(load), SNAPD_MSG_LOAD, fd);
	check(fake_answer(s) == SNAPD_MSG_FAILED, "LOAD while running");
	fake_send(s, &m, sizeof(struct snapd_msg_resume), SNAPD_MSG_RESUME, -1);
	check(fake_answer(s) == SNAPD_MSG_FAILED, "RESUME while running");
	check_runs(a);
	close(fd);
	printf("nonsense: refused\n");
}

int main(void)
{
	static struct agent_vm a;
	static struct fake_service s;
	struct agent_vm_config config = {.data_bytes = DATA_BYTES};

	agent_vm_create(&a, &config);
	agent_vm_add(&a, GUEST_CODE(guest_count), 0, 1, 0, 0);
	agent_vm_add(&a, GUEST_CODE(guest_count), 1, 1, 0, 0);
	fake_open(&a, &s);
	check(s.ready_vcpus == 2, "%u vCPUs", s.ready_vcpus);
	agent_vm_start(&a, 0);
	agent_vm_start(&a, 1);
	check_runs(&a);
	test_snapshots(&a, &s);
	test_rollback(&a, &s);
	test_leaving(&a, &s);
	test_untouched(&a, &s);
	test_nonsense(&a, &s);
	fake_close(&s);
	agent_vm_destroy(&a);
	printf("ok\n");
	return 0;
}
