/* SPDX-License-Identifier: MIT */
/*
 * The service rewrites page tables behind KVM's back; after LOAD the guest must see
 * the new ones, at the leaf and above it, whether or not deleting a slot drops
 * every shadow page on this KVM.  (Without the cure, shadow paging goes on with
 * the old translations; with EPT or NPT nothing is stale to begin with.)
 */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/lib/agent_vm.h"
#include "tests/lib/check.h"

#define HUGE	  (2ull << 20)
#define VIEW_GPA  0x20000000ull /* a guest-virtual address with nothing behind it at first */
#define OTHER_PD  0x80000ull	/* a free page of SYS for another page directory */
#define LEAF	  0xe7ull
#define TABLE	  0x67ull
#define PDPT0	  (KVM_GUEST_PML4_GPA + 0x1000)
#define PD0	  (KVM_GUEST_PML4_GPA + 0x2000)
#define VIEW_SLOT (VIEW_GPA / HUGE)

/* Copy what the view shows to the last page of data, for ever. */
GUEST_FN static void guest_look(uint64_t out)
{
	for (;;)
		guest_write(out, guest_read(VIEW_GPA));
}

static uint64_t seen(struct agent_vm *a)
{
	return *(volatile uint64_t *)(a->g.data + a->g.data_bytes - KVM_GUEST_PAGE);
}

static void put64(uint8_t *ram, uint64_t gpa, uint64_t value)
{
	memcpy(ram + gpa, &value, sizeof(value));
}

/* PAUSE, REWRITE, one entry of a page table, LOAD of the state of now, RESUME.  In turns,
 * REWRITE comes with PAUSE, and the cure before the write, or beside it. */
static void rewrite(struct fake_service *s, uint8_t *sys, uint64_t gpa, uint64_t value)
{
	static unsigned int turn;
	int state = fake_pause(s, ++turn % 3 ? SNAPD_PAUSE_REWRITE : 0);
	uint64_t len = s->in.paused.state_bytes;

	if (turn % 3 == 0)
		fake_rewrite(s, (struct snapd_point){1, 1});
	if (turn % 3 == 1)
		usleep(5000);
	put64(sys, gpa, value);
	fake_load(s, state, len);
	fake_resume(s);
	close(state);
}

/* Slots come and go until the agent has done away with SLOT_ZAP_ALL. */
static void punch_often(struct agent_vm *a)
{
	struct snapd_memslot m = {
		.slot = 9, .gpa = 3ull << 30, .hva = a->g.data, .fd = a->g.data_fd};

	for (int i = 0; i < 100; i++) {
		m.size_bytes = HUGE;
		check(!snapd_vm_memslot(a->vm, &m), "%s", snapd_vm_error(NULL));
		m.size_bytes = 0;
		check(!snapd_vm_memslot(a->vm, &m), "%s", snapd_vm_error(NULL));
	}
}

static void test(uint32_t flags)
{
	struct agent_vm_config config = {.data_bytes = 4 * HUGE, .flags = flags};
	static struct agent_vm a;
	static struct fake_service s;
	uint64_t *pd;

	agent_vm_create(&a, &config);
	for (uint64_t i = 0; i < 3; i++)
		put64(a.g.data, i * HUGE, i + 100);
	put64(a.g.sys, PD0 + VIEW_SLOT * 8, KVM_GUEST_DATA_GPA | LEAF);
	pd = (uint64_t *)(a.g.sys + OTHER_PD);
	memcpy(pd, a.g.sys + PD0, KVM_GUEST_PAGE);
	pd[VIEW_SLOT] = (KVM_GUEST_DATA_GPA + 2 * HUGE) | LEAF;
	agent_vm_add(&a, GUEST_CODE(guest_look), KVM_GUEST_DATA_GPA + 4 * HUGE - KVM_GUEST_PAGE, 0,
		     0, 0);
	fake_open(&a, &s);
	if (!flags)
		punch_often(&a);
	agent_vm_start(&a, 0);
	wait_until(seen(&a) == 100);
	for (int i = 0; i < 5; i++) {
		rewrite(&s, a.g.sys, PD0 + VIEW_SLOT * 8, (KVM_GUEST_DATA_GPA + HUGE) | LEAF);
		wait_until(seen(&a) == 101);
		rewrite(&s, a.g.sys, PDPT0, OTHER_PD | TABLE);
		wait_until(seen(&a) == 102);
		rewrite(&s, a.g.sys, PDPT0, PD0 | TABLE);
		wait_until(seen(&a) == 101);
		rewrite(&s, a.g.sys, PD0 + VIEW_SLOT * 8, KVM_GUEST_DATA_GPA | LEAF);
		wait_until(seen(&a) == 100);
	}
	printf("flags %u: cure %llu us\n", flags, (unsigned long long)s.in.loaded.cure_ns / 1000);
	fake_close(&s);
	agent_vm_destroy(&a);
}

int main(void)
{
	test(0);
	test(SNAPD_ATTACH_KEEP_ZAP_QUIRK);
	printf("ok\n");
	return 0;
}
