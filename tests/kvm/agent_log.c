/* SPDX-License-Identifier: MIT */
/*
 * The dirty log's guards (agent/dirtylog.c), each driven to the instant at which its
 * absence loses a page.  KVM is the real one; the test stands between it and the agent,
 * and lets the guest write between two of the agent's calls.
 *
 *   exact   CLEAR gets the bits that the GET before it returned and no others, once; a
 *           page written between the two is found by the next harvest (L2)
 *   order   when CLEAR is called none of its bits is in a set yet (L1)
 *   delete  what was written last is read before a slot goes (L3)
 *   out     no vCPU is in the guest between that GET and the slot's end (L3)
 *   failed  what a GET that fails would have told is dirty: everything, or the slot that goes
 *
 * Slots are 100 and 3001 pages long: no multiple of 64.
 *
 *   agent_log log|log-initially-set|log-get-clears
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/lib/agent_vm.h"
#include "tests/lib/check.h"
#include "tests/lib/rand.h"

#define SMALL	   100u
#define LARGE	   3001u
#define PAGES	   (SMALL + LARGE)
#define SMALL_SLOT AGENT_VM_DATA_SLOT
#define LARGE_SLOT 2u
#define LARGE_GPA  (KVM_GUEST_DATA_GPA + SMALL * KVM_GUEST_PAGE)

static struct agent_vm a;
static struct fake_service s;
static struct fake_copy copy;
static const struct agent_backend *backend;

/* Write the page that the host asks for, and say so. */
GUEST_FN static void guest_obey(uint64_t gpa)
{
	for (uint64_t n = 1;; n++) {
		uint64_t page = guest_ask();

		if (page != ~0ull)
			guest_write(gpa + page * 4096, n << 32 | page);
		guest_tell(n);
	}
}

GUEST_FN static void guest_rush(uint64_t gpa, uint64_t nr_pages)
{
	for (uint64_t n = 1;; n++)
		for (uint64_t p = 0; p < nr_pages; p++)
			guest_write(gpa + p * 4096 + 8, n);
}

/* ---- between the agent and KVM ---- */

static struct {
	uint64_t slot_pages[1 << 15]; /* by kernel slot id */
	_Atomic uint64_t gets, clears;
	/* harvest_lock is held */
	uint64_t words[64]; /* as the last GET returned them */
	uint32_t slot;
	bool is_read; /* GET done, CLEAR not yet */
	/* wishes of the main thread */
	_Atomic int64_t write; /* page to write before the next CLEAR; -1: none */
	_Atomic int rest_us;   /* after a GET */
	_Atomic bool check_sets;
	_Atomic bool fail_gets;
} kvm = {.write = -1};

static _Atomic int64_t asked = -1; /* page that the guest is to write */

static void guest_writes(uint64_t page)
{
	uint64_t told;

	atomic_store(&asked, (int64_t)page);
	wait_until(atomic_load(&asked) < 0);
	told = atomic_load(&a.vcpus[0].told);
	wait_until(atomic_load(&a.vcpus[0].told) > told);
}

static uint64_t nr_words(uint32_t slot)
{
	return (kvm.slot_pages[slot] + 63) / 64;
}

static void on_get(const struct kvm_dirty_log *log)
{
	atomic_fetch_add(&kvm.gets, 1);
	memcpy(kvm.words, log->dirty_bitmap, nr_words(log->slot) * 8);
	kvm.slot = log->slot;
	kvm.is_read = true;
	usleep((useconds_t)atomic_load(&kvm.rest_us));
}

static void check_clear(const struct kvm_clear_dirty_log *log)
{
	const uint64_t *bits = log->dirty_bitmap;
	uint64_t first = log->first_page / 64, end = first + (log->num_pages + 63) / 64;

	check(kvm.is_read && log->slot == kvm.slot, "CLEAR without a GET");
	kvm.is_read = false;
	check(log->first_page % 64 == 0, "from page %llu", (unsigned long long)log->first_page);
	check(log->num_pages % 64 == 0 ||
		      log->first_page + log->num_pages == kvm.slot_pages[log->slot],
	      "%u pages", log->num_pages);
	for (uint64_t w = 0; w < nr_words(log->slot); w++) {
		uint64_t cleared = w < first || w >= end ? 0 : bits[w - first];

		check(cleared == kvm.words[w], "word %llu: cleared %llx, read %llx",
		      (unsigned long long)w, (unsigned long long)cleared,
		      (unsigned long long)kvm.words[w]);
	}
}

static void on_clear(const struct kvm_clear_dirty_log *log)
{
	int64_t page = atomic_exchange(&kvm.write, -1);
	bool check_sets = atomic_exchange(&kvm.check_sets, false);

	atomic_fetch_add(&kvm.clears, 1);
	check_clear(log);
	for (uint32_t i = 0; i < s.nr_pieces && check_sets; i++)
		for (uint64_t f = 0; f < s.pieces[i].nr_frames; f++)
			check(!gpaset_test(&s.dirty, s.pieces[i].first_frame + f),
			      "frame %llu is published before its CLEAR", (unsigned long long)f);
	if (page >= 0)
		guest_writes((uint64_t)page);
}

static int ioctl_op(void *opaque, int fd, unsigned long request, void *arg)
{
	int r;

	if (request == KVM_CHECK_EXTENSION && backend->hide_protect2 &&
	    (uintptr_t)arg == KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
		return 0;
	if (request == KVM_SET_USER_MEMORY_REGION) {
		const struct kvm_userspace_memory_region *m = arg;

		if (m->memory_size)
			kvm.slot_pages[m->slot] = m->memory_size / KVM_GUEST_PAGE;
	}
	if (request == KVM_CLEAR_DIRTY_LOG)
		on_clear(arg);
	if (request == KVM_GET_DIRTY_LOG && atomic_load(&kvm.fail_gets)) {
		errno = EIO;
		return -1;
	}
	r = ioctl(fd, request, arg);
	if (request == KVM_GET_DIRTY_LOG && !r)
		on_get(arg);
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

/* ---- */

static void on_mmio(struct agent_vcpu *v, struct kvm_run *run)
{
	uint64_t at = run->mmio.phys_addr - KVM_GUEST_DATA_GPA;
	int64_t page;

	if (run->mmio.phys_addr == KVM_GUEST_EXIT_GPA) {
		usleep(50);
		page = atomic_exchange(&asked, -1);
		memcpy(run->mmio.data, &page, sizeof(page));
		return;
	}
	check(at < PAGES * KVM_GUEST_PAGE && run->mmio.is_write, "MMIO at 0x%llx",
	      (unsigned long long)run->mmio.phys_addr);
	memcpy(a.g.data + at, run->mmio.data, run->mmio.len);
	check(!snapd_vm_mark_dirty(a.vm, run->mmio.phys_addr, run->mmio.len), "mark");
}

static void large_slot(void)
{
	check(!agent_vm_slot(&a, LARGE_SLOT, LARGE_GPA, SMALL, LARGE), "%s", snapd_vm_error(NULL));
}

static void snapshot(const char *when)
{
	close(fake_pause(&s, 0));
	fake_copy_dirty(&s, &copy);
	fake_copy_check(&copy, when);
	fake_resume(&s);
}

static void open_vm(void (*fn)(void), uint64_t gpa, uint64_t n)
{
	static const struct snapd_kvm_ops ops = {ioctl_op, mmap_op, munmap_op, NULL};
	struct agent_vm_config c = {.data_bytes = PAGES * KVM_GUEST_PAGE,
				    .kvm = &ops,
				    .dirty = backend->dirty,
				    .flags = backend->flags,
				    .no_data_slot = true};

	agent_vm_create(&a, &c);
	a.mmio = on_mmio;
	check(!agent_vm_slot(&a, SMALL_SLOT, KVM_GUEST_DATA_GPA, 0, SMALL), "%s",
	      snapd_vm_error(NULL));
	large_slot();
	agent_vm_add(&a, fn, gpa, n, 0, 0);
	fake_open(&a, &s);
	check(s.hello.dirty_backend == SNAPD_DIRTY_LOG, "HELLO says %u", s.hello.dirty_backend);
	fake_copy_init(&copy, &s);
	agent_vm_start(&a, 0);
	snapshot("first");
}

static void close_vm(bool harvests_failed)
{
	struct snapd_vm_stats st;

	snapd_vm_get_stats(a.vm, &st);
	check(!!st.unresolved == harvests_failed, "%llu harvests failed",
	      (unsigned long long)st.unresolved);
	fake_copy_deinit(&copy);
	fake_close(&s);
	agent_vm_destroy(&a);
}

/* Random pages, and in each harvest one more between GET and CLEAR. */
static void test_exact(struct rand *r)
{
	open_vm(GUEST_CODE(guest_obey), KVM_GUEST_DATA_GPA, 0);
	for (int i = 0; i < 30; i++) {
		for (uint64_t n = 1 + rand_below(r, 4); n; n--)
			guest_writes(rand_below(r, PAGES));
		if (!backend->hide_protect2 && rand_below(r, 2))
			atomic_store(&kvm.write, (int64_t)rand_below(r, PAGES));
		fake_sync(&s);
		fake_copy_dirty(&s, &copy);
		snapshot("exact");
	}
	if (!backend->hide_protect2)
		check(atomic_load(&kvm.clears) > 30, "no CLEAR");
	printf("exact: %llu GETs, %llu CLEARs\n", (unsigned long long)atomic_load(&kvm.gets),
	       (unsigned long long)atomic_load(&kvm.clears));
	close_vm(false);
}

static void test_order(void)
{
	open_vm(GUEST_CODE(guest_obey), KVM_GUEST_DATA_GPA, 0);
	guest_writes(3);
	snapd_vm_pause(a.vm, 0);
	fake_sync(&s);
	fake_copy_dirty(&s, &copy);
	snapd_vm_resume(a.vm);
	guest_writes(99);
	snapd_vm_pause(a.vm, 0);
	gpaset_clear(&s.dirty, s.shm->nr_frames);
	atomic_store(&kvm.check_sets, true);
	fake_sync(&s);
	check(!atomic_load(&kvm.check_sets), "no CLEAR");
	snapd_vm_resume(a.vm);
	close_vm(false);
}

static void test_delete(void)
{
	open_vm(GUEST_CODE(guest_obey), KVM_GUEST_DATA_GPA, 0);
	for (uint64_t i = 0; i < 5; i++) {
		guest_writes(SMALL + i * 64);
		guest_writes(PAGES - 1);
		check(!agent_vm_unslot(&a, LARGE_SLOT, 0), "%s", snapd_vm_error(NULL));
		if (i % 2)
			snapshot("while it is gone");
		large_slot();
		snapshot("after a slot came back");
	}
	close_vm(false);
}

static void test_out(struct rand *r)
{
	open_vm(GUEST_CODE(guest_rush), LARGE_GPA, LARGE);
	for (int i = 0; i < 10; i++) {
		usleep((useconds_t)rand_below(r, 20000));
		atomic_store(&kvm.rest_us, 3000);
		check(!agent_vm_unslot(&a, LARGE_SLOT, 0), "%s", snapd_vm_error(NULL));
		atomic_store(&kvm.rest_us, 0);
		large_slot();
		snapshot("a slot deleted under a running vCPU");
	}
	close_vm(false);
}

static void test_failed(void)
{
	open_vm(GUEST_CODE(guest_obey), KVM_GUEST_DATA_GPA, 0);
	guest_writes(3);
	guest_writes(SMALL + 64);
	atomic_store(&kvm.fail_gets, true);
	snapshot("of logs that can't be read");
	atomic_store(&kvm.fail_gets, false);
	snapshot("of logs that can be read again");
	guest_writes(PAGES - 1);
	atomic_store(&kvm.fail_gets, true);
	check(!agent_vm_unslot(&a, LARGE_SLOT, 0), "%s", snapd_vm_error(NULL));
	atomic_store(&kvm.fail_gets, false);
	large_slot();
	snapshot("of a slot that went with its log unread");
	close_vm(true);
}

int main(int argc, char **argv)
{
	struct rand r = rand_of(rand_seed());

	backend = agent_backend(argc > 1 ? argv[1] : "log");
	test_exact(&r);
	if (!backend->hide_protect2)
		test_order();
	test_delete();
	test_out(&r);
	test_failed();
	printf("ok\n");
	return 0;
}
