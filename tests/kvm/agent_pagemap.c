/* SPDX-License-Identifier: MIT */
/*
 * What the VMM itself writes is found without a mark (agent/pagemap.c), and an epoch is
 * whole whatever is in flight.
 *
 *   writes    stores, read(2), and O_DIRECT reads into guest memory, beside two running
 *             vCPUs; memslots come and go meanwhile
 *   pinned    a device's read is submitted, its page is harvested, then the data comes:
 *             the next pause has to find it.  A harvest that protects pages while the
 *             VM runs loses it (P1)
 *   replaced  the VMM maps its memory anew under a live slot: all of it is dirty (P2)
 *   unmapped  written, deleted, unmapped, mapped elsewhere and added again: nothing is
 *             lost (P3)
 *   remote    KVM has a mapping of its own: what the guest writes is not in the scan's
 *             answer, what the VMM writes is not in the ring
 *
 *   agent_pagemap [BACKEND [pinned]]     pagemap, ring+pagemap, log+pagemap
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/lib/agent_vm.h"
#include "tests/lib/check.h"
#include "tests/lib/rand.h"
#include "tests/lib/slow_file.h"

#define PAGES	  2048u
#define HALF	  (PAGES / 2)
#define HIGH_SLOT 2u
#define HIGH_GPA  (KVM_GUEST_DATA_GPA + HALF * KVM_GUEST_PAGE)

static struct agent_vm a;
static struct fake_service s;
static struct fake_copy copy;
static struct slow_file slow;
static bool have_slow;
static const struct agent_backend *backend;

/* The lower half only. */
GUEST_FN static void guest_scatter(uint64_t first, uint64_t step)
{
	for (uint64_t n = 1, p = first;; n++) {
		guest_write(KVM_GUEST_DATA_GPA + p * KVM_GUEST_PAGE + first * 8, n);
		p = (p + step) % HALF;
	}
}

static void snapshot(const char *when)
{
	close(fake_pause(&s, 0));
	fake_copy_dirty(&s, &copy);
	fake_copy_check(&copy, when);
	fake_resume(&s);
}

static void high_slot(uint8_t *hva)
{
	struct snapd_memslot m = {.slot = HIGH_SLOT,
				  .gpa = HIGH_GPA,
				  .size_bytes = HALF * KVM_GUEST_PAGE,
				  .hva = hva,
				  .fd = a.g.data_fd,
				  .fd_offset = HALF * KVM_GUEST_PAGE};

	check(!snapd_vm_memslot(a.vm, &m), "%s", snapd_vm_error(NULL));
}

static uint8_t *page(uint64_t index)
{
	return a.g.data + index * KVM_GUEST_PAGE;
}

static void open_vm(bool run)
{
	struct agent_vm_config c = {.data_bytes = PAGES * KVM_GUEST_PAGE,
				    .dirty = backend->dirty,
				    .flags = backend->flags,
				    .no_data_slot = true};

	agent_vm_create(&a, &c);
	check(!agent_vm_slot(&a, AGENT_VM_DATA_SLOT, KVM_GUEST_DATA_GPA, 0, HALF), "%s",
	      snapd_vm_error(NULL));
	high_slot(page(HALF));
	agent_vm_add(&a, GUEST_CODE(guest_scatter), 0, 1, 0, 0);
	agent_vm_add(&a, GUEST_CODE(guest_scatter), 1, 257, 0, 0);
	fake_open(&a, &s);
	fake_copy_init(&copy, &s);
	for (uint32_t i = 0; i < 2 && run; i++)
		agent_vm_start(&a, i);
	snapshot("first");
}

static void close_vm(void)
{
	fake_copy_deinit(&copy);
	fake_close(&s);
	agent_vm_destroy(&a);
}

static void write_some(struct rand *r, int zero_fd)
{
	for (uint64_t n = rand_below(r, 20); n; n--) {
		uint8_t *p = page(rand_below(r, PAGES));

		switch (rand_below(r, have_slow ? 3 : 2)) {
		case 0:
			*(volatile uint64_t *)(p + 512) = rand_next(r);
			break;
		case 1:
			check(read(zero_fd, p + 1024, 64) == 64, "read");
			break;
		default:
			atomic_store(&slow.reads->fill, (uint8_t)rand_next(r));
			check(pread(slow.fd, p, 4096, 0) == 4096, "O_DIRECT: %s", strerror(errno));
		}
	}
}

static void test_writes(struct rand *r)
{
	int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);

	open_vm(true);
	for (int i = 0; i < 60; i++) {
		write_some(r, fd);
		if (rand_below(r, 4) == 0) {
			check(!agent_vm_unslot(&a, HIGH_SLOT, 0), "%s", snapd_vm_error(NULL));
			high_slot(page(HALF));
		}
		if (rand_below(r, 2)) {
			fake_sync(&s);
			fake_copy_dirty(&s, &copy);
			write_some(r, fd);
		}
		snapshot("writes");
	}
	close(fd);
	close_vm();
}

static void *read_slowly(void *arg)
{
	check(pread(slow.fd, arg, 4096, 0) == 4096, "O_DIRECT: %s", strerror(errno));
	return NULL;
}

static void test_pinned(void)
{
	open_vm(false);
	for (uint64_t i = 0; i < 8; i++) {
		pthread_t thread;

		atomic_store(&slow.reads->is_held, true);
		atomic_store(&slow.reads->fill, (uint8_t)(0xa0 + i));
		check(!pthread_create(&thread, NULL, read_slowly, page(HALF + i)), "thread");
		wait_until(atomic_load(&slow.reads->nr_waiting));
		fake_sync(&s);
		fake_copy_dirty(&s, &copy);
		atomic_store(&slow.reads->is_held, false);
		pthread_join(thread, NULL);
		check(*page(HALF + i) == 0xa0 + i, "not read");
		snapshot("data that came after its page was harvested");
	}
	close_vm();
}

static void test_replaced(void)
{
	const size_t len = HALF * KVM_GUEST_PAGE;

	open_vm(true);
	check(mmap(page(HALF), len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, a.g.data_fd,
		   (off_t)len) != MAP_FAILED,
	      "mmap");
	*page(HALF + 5) = 5;
	snapshot("mapped anew");
	*page(HALF + 6) = 6;
	snapshot("written after that");
	close_vm();
}

static void test_unmapped(void)
{
	const size_t len = HALF * KVM_GUEST_PAGE;
	uint8_t *other;

	open_vm(true);
	other = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, a.g.data_fd, (off_t)len);
	check(other != MAP_FAILED, "mmap");
	*page(HALF + 7) = 7;
	check(!agent_vm_unslot(&a, HIGH_SLOT, 0), "%s", snapd_vm_error(NULL));
	check(mmap(page(HALF), len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
		   -1, 0) != MAP_FAILED,
	      "mmap");
	snapshot("gone, and its memory unmapped");
	high_slot(other);
	snapshot("shown through another mapping");
	other[8 * KVM_GUEST_PAGE] = 8;
	snapshot("written through it");
	check(!agent_vm_unslot(&a, HIGH_SLOT, 0), "%s", snapd_vm_error(NULL));
	munmap(other, len);
	close_vm();
}

static void test_remote(void)
{
	struct snapd_vm_stats st[3];

	open_vm(false);
	snapd_vm_get_stats(a.vm, &st[0]);
	*page(3) = 3;
	fake_sync(&s);
	snapd_vm_get_stats(a.vm, &st[1]);
	check(st[1].harvested - st[0].harvested == 1, "%llu pages for one",
	      (unsigned long long)(st[1].harvested - st[0].harvested));
	check(st[1].reset == st[0].reset, "KVM saw it");
	snapshot("one page");
	snapd_vm_get_stats(a.vm, &st[1]);
	agent_vm_start(&a, 0);
	usleep(50000);
	check(!snapd_vm_pause(a.vm, 0), "%s", snapd_vm_error(NULL));
	fake_sync(&s);
	snapd_vm_get_stats(a.vm, &st[2]);
	if (backend->dirty == SNAPD_DIRTY_RING)
		check(st[2].harvested - st[1].harvested == st[2].reset - st[1].reset,
		      "the guest's writes are in the VMM's mapping");
	check(st[2].harvested > st[1].harvested, "the guest's writes were not found");
	snapd_vm_resume(a.vm);
	close_vm();
}

int main(int argc, char **argv)
{
	struct rand r = rand_of(rand_seed());
	int err = slow_file_open(&slow);

	backend = agent_backend(argc > 1 ? argv[1] : "ring+pagemap");
	have_slow = !err;
	if (argc > 2 && !strcmp(argv[2], "pinned")) {
		if (err)
			skip("no FUSE mount: %s", strerror(-err));
		test_pinned();
		return 0;
	}
	test_writes(&r);
	if (have_slow)
		test_pinned();
	else
		printf("pinned: left out, no FUSE mount: %s\n", strerror(-err));
	test_replaced();
	test_unmapped();
	if (backend->flags & SNAPD_ATTACH_TRACK_HOST_WRITES)
		test_remote();
	if (have_slow)
		slow_file_close(&slow);
	printf("ok\n");
	return 0;
}
