/* SPDX-License-Identifier: MIT */
/*
 * A new VM becomes what a snapshot was: its vCPUs wait in their first run call
 * until LOAD and RESUME, READY comes when all of them wait, a lost connection only
 * means that it begins anew, and a refusal ends the run call with -EREMOTEIO.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/lib/agent_vm.h"
#include "tests/lib/check.h"

#define PAGES 256u

GUEST_FN static void guest_count(uint64_t first, uint64_t round)
{
	for (;; round++)
		for (uint64_t p = first; p < PAGES; p += 2)
			guest_write(KVM_GUEST_DATA_GPA + p * KVM_GUEST_PAGE, round);
}

static const struct agent_vm_config plain = {.data_bytes = PAGES * KVM_GUEST_PAGE};
static struct fake_copy snap;
static int snap_state;
static uint64_t snap_len, snap_count;

static uint64_t counter(struct agent_vm *a)
{
	return *(volatile uint64_t *)a->g.data;
}

/* Two slots over the data, so that the layout has to be made again. */
static void make_snapshot(void)
{
	struct agent_vm_config config = plain;
	static struct agent_vm a;
	static struct fake_service s;

	config.no_data_slot = true;
	agent_vm_create(&a, &config);
	check(!agent_vm_slot(&a, 5, KVM_GUEST_DATA_GPA, 0, PAGES / 2), "slot");
	check(!agent_vm_slot(&a, 6, KVM_GUEST_DATA_GPA + PAGES / 2 * KVM_GUEST_PAGE, PAGES / 2,
			     PAGES / 2),
	      "slot");
	agent_vm_add(&a, GUEST_CODE(guest_count), 0, 1, 0, 0);
	agent_vm_add(&a, GUEST_CODE(guest_count), 1, 1, 0, 0);
	fake_open(&a, &s);
	agent_vm_start(&a, 0);
	agent_vm_start(&a, 1);
	wait_until(counter(&a) > 1000);
	snap_state = fake_pause(&s, 0);
	snap_len = s.in.paused.state_bytes;
	snap_count = counter(&a);
	fake_copy_init(&snap, &s);
	fake_copy_dirty(&s, &snap);
	fake_copy_check(&snap, "snapshot");
	fake_resume(&s);
	fake_close(&s);
	agent_vm_destroy(&a);
}

static uint32_t layouts;

static void on_layout(void *opaque, const struct snapd_memslot *s, size_t n)
{
	layouts++;
	check(n == 3, "%zu slots", n);
}

static void make_waiting(struct agent_vm *a)
{
	static const struct snapd_vm_callbacks cb = {
		.size_bytes = sizeof(struct snapd_vm_callbacks), .layout = on_layout};
	struct agent_vm_config config = plain;

	config.restore = "test@1";
	config.callbacks = &cb;
	agent_vm_create(a, &config);
	agent_vm_add(a, GUEST_CODE(guest_count), 0, 1, 0, 0);
	agent_vm_add(a, GUEST_CODE(guest_count), 1, 1, 0, 0);
}

static void fill(const struct fake_service *s)
{
	struct fake_copy ram;

	fake_copy_init(&ram, s);
	for (uint32_t i = 0; i < ram.nr; i++)
		memcpy(ram.map[i], snap.ram[i], ram.size[i]);
	fake_copy_deinit(&ram);
}

static void open_restore(struct agent_vm *a, struct fake_service *s)
{
	fake_accept(a, s);
	check(s->hello.flags == SNAPD_HELLO_RESTORE && !strcmp(s->hello.restore, "test@1"),
	      "HELLO: flags %u, restore %s", s->hello.flags, s->hello.restore);
	fake_welcome(s);
}

static void test_restore(void)
{
	struct snapd_msg_resume resume = {0};
	static struct agent_vm a;
	static struct fake_service s;

	make_waiting(&a);
	open_restore(&a, &s);
	agent_vm_start(&a, 0);
	usleep(50000);
	agent_vm_start(&a, 1);
	fake_until_ready(&s);
	check(s.ready_vcpus == 2, "READY with %u vCPUs", s.ready_vcpus);
	check(counter(&a) == 0, "it ran before it was restored");
	fake_send(&s, &resume, sizeof(resume), SNAPD_MSG_RESUME, -1);
	check(fake_answer(&s) == SNAPD_MSG_FAILED, "RESUME before LOAD");
	fill(&s);
	fake_close(&s); /* the service dies in the middle */
	open_restore(&a, &s);
	fake_until_ready(&s);
	fill(&s);
	fake_load(&s, snap_state, snap_len);
	fake_close(&s); /* and after LOAD */
	usleep(20000);
	check(counter(&a) == snap_count, "it runs, and nobody said so");
	open_restore(&a, &s);
	fake_until_ready(&s);
	fill(&s);
	fake_rewrite(&s, (struct snapd_point){1, 1});
	fake_load(&s, snap_state, snap_len);
	check(layouts == 1, "layout told %u times", layouts);
	fake_resume(&s);
	wait_until(counter(&a) > snap_count + 10);
	check(counter(&a) < snap_count + 100000000, "not from where it stood");
	fake_sync(&s);
	fake_close(&s);
	fake_accept(&a, &s);
	check(!s.hello.flags, "restored, and asks again");
	fake_close(&s);
	agent_vm_destroy(&a);
	printf("restore: from round %llu\n", (unsigned long long)snap_count);
}

static void must_end(struct agent_vm *a)
{
	for (uint32_t i = 0; i < 2; i++) {
		wait_until(!atomic_load(&a->vcpus[i].running));
		check(atomic_load(&a->vcpus[i].result) == -EREMOTEIO, "run: %s",
		      strerror(-atomic_load(&a->vcpus[i].result)));
	}
}

static void test_refused(uint16_t how)
{
	struct snapd_msg_error no = {.code = EINVAL, .text = "no snapshot test@1"};
	struct snapd_msg_load junk = {.state_bytes = 8};
	static struct agent_vm a;
	static struct fake_service s;

	make_waiting(&a);
	agent_vm_start(&a, 0);
	agent_vm_start(&a, 1);
	open_restore(&a, &s);
	fake_until_ready(&s);
	if (how == SNAPD_MSG_REJECT) {
		fake_send(&s, &no, sizeof(no), SNAPD_MSG_REJECT, -1);
	} else {
		fake_send(&s, &junk, sizeof(junk), SNAPD_MSG_LOAD, snap_state);
		check(fake_answer(&s) == SNAPD_MSG_FAILED, "junk was loaded");
		printf("refused: %s\n", s.in.error.text);
	}
	must_end(&a);
	fake_close(&s);
	agent_vm_destroy(&a);
}

int main(void)
{
	make_snapshot();
	test_restore();
	test_refused(SNAPD_MSG_REJECT);
	test_refused(SNAPD_MSG_LOAD);
	fake_copy_deinit(&snap);
	close(snap_state);
	printf("ok\n");
	return 0;
}
