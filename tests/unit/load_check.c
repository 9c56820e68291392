/* SPDX-License-Identifier: MIT */
/*
 * A state that a VM cannot load is refused before anything is touched, on the simulated
 * KVM with the test as the service.
 *
 *   one slot of two pieces; then the VMM maps the second one elsewhere, and shows the two as
 *   slots of their own.  KVM maps a slot from one host address on, so the old layout cannot be
 *   made again: CHECK says so while the VM runs, LOAD before it has deleted a slot, and the
 *   VM goes on.  Mapped where it was, both are content.
 */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/lib/check.h"
#include "tests/lib/fake_service.h"
#include "tests/lib/sim_vm.h"

#define PAGES 32u
#define HALF  (PAGES / 2)
#define GPA   0x100000ull
#define BYTES (PAGES * FAKE_PAGE)

static struct sim_vm vm;
static struct fake_service service;
static int fd;

static uint8_t *map(uint64_t first, uint64_t nr)
{
	uint8_t *p = mmap(NULL, nr * FAKE_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
			  (off_t)(first * FAKE_PAGE));

	check(p != MAP_FAILED, "mmap");
	return p;
}

static void show(uint32_t id, uint64_t first, uint64_t nr, uint8_t *hva)
{
	struct snapd_memslot s = {.slot = id,
				  .gpa = GPA + first * FAKE_PAGE,
				  .size_bytes = nr * FAKE_PAGE,
				  .hva = hva,
				  .fd = fd,
				  .fd_offset = first * FAKE_PAGE};

	check(!snapd_vm_memslot(vm.agent, &s), "%s", snapd_vm_error(NULL));
}

static void hide(uint32_t id)
{
	struct snapd_memslot s = {.slot = id, .fd = -1};

	check(!snapd_vm_memslot(vm.agent, &s), "%s", snapd_vm_error(NULL));
}

static uint16_t ask(uint16_t type, int state, uint64_t len)
{
	struct snapd_msg_load m = {.state_bytes = len};
	size_t bytes = type == SNAPD_MSG_CHECK ? sizeof(struct snapd_msg_check) : sizeof(m);

	fake_send(&service, &m, bytes, type, state);
	return fake_answer(&service);
}

static uint64_t changes(void)
{
	struct snapd_vm_stats st;

	snapd_vm_get_stats(vm.agent, &st);
	return st.slot_changes;
}

static void refused(uint16_t type, int state, uint64_t len)
{
	uint64_t before = changes();

	check(ask(type, state, len) == SNAPD_MSG_FAILED, "type %u", type);
	check(strstr(service.in.error.text, "mapped in two places"), "%s", service.in.error.text);
	check(changes() == before, "memslots were changed");
}

int main(void)
{
	const struct sim_vm_config config = {
		.nr_vcpus = 1, .ring_entries = 256, .harvest_us = 60000000};
	struct sim_store stores[] = {{.gpa = GPA, .value = 1},
				     {.gpa = GPA + BYTES - FAKE_PAGE, .value = 2}};
	uint8_t *whole, *second;
	uint64_t len;
	int state;

	fd = memfd_create("ram", MFD_CLOEXEC);
	check(fd >= 0 && !ftruncate(fd, (off_t)BYTES), "memory");
	sim_vm_create(&vm, &config);
	whole = map(0, PAGES);
	second = map(HALF, HALF);
	show(0, 0, HALF, whole); /* two slots: two pieces */
	show(1, HALF, HALF, whole + HALF * FAKE_PAGE);
	hide(0);
	hide(1);
	show(0, 0, PAGES, whole);
	fake_open_on(vm.listen_fd, &service);
	sim_vm_run(&vm, 0, stores, 2);
	state = fake_pause(&service, 0);
	len = service.in.paused.state_bytes;
	fake_resume(&service);
	check(ask(SNAPD_MSG_CHECK, state, len) == SNAPD_MSG_CHECKED, "%s", service.in.error.text);

	hide(0);
	show(0, 0, HALF, whole);
	show(1, HALF, HALF, second);
	refused(SNAPD_MSG_CHECK, state, len);
	check(ask(SNAPD_MSG_CHECK, fd, len) == SNAPD_MSG_FAILED, "CHECK of garbage");
	sim_vm_run(&vm, 0, stores, 2); /* it runs */
	close(fake_pause(&service, SNAPD_PAUSE_NO_STATE));
	fake_rewrite(&service, (struct snapd_point){1, 1});
	refused(SNAPD_MSG_LOAD, state, len);

	/* A layout that can be made: the VM gets out of it. */
	state = fake_pause(&service, 0);
	len = service.in.paused.state_bytes;
	fake_load(&service, state, len);
	fake_resume(&service);
	hide(1);
	show(1, HALF, HALF, whole + HALF * FAKE_PAGE);
	sim_vm_run(&vm, 0, stores, 2);
	fake_close(&service);
	sim_vm_destroy(&vm);
	printf("ok\n");
	return 0;
}
