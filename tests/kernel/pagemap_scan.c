/* SPDX-License-Identifier: MIT */
/*
 * PAGEMAP_SCAN over a mapping that a userfaultfd write-protects asynchronously, as
 * agent/pagemap.c relies on it.  Linux 6.7 has both; on an older one the test says which is
 * missing, and --dirty=pagemap and --track-host are refused there.
 *
 *   told     a store, and read(2) into the mapping, are "written"; a load is not, also of a page
 *            that was never there; a protecting scan tells once, a plain one again and again
 *   dual     one file mapped twice, B watched.  Written through A: not told of B.  And a
 *            protecting scan of B leaves A alone: what is written through A afterwards takes no
 *            fault, where the same through B takes one a page
 *   kvm      the same with a guest.  KVM has A: what it writes again after a scan of B costs no
 *            entry of its dirty ring, since nothing was dropped.  KVM has B: every page faults
 *            and is pushed again
 *   pinned   a device's read is submitted, and its page is "written" with that; a protecting scan
 *            tells so and protects; then the data comes, and nobody is told ever.  Without
 *            that scan, or with one that does not protect, the next one tells.  Hence P1: only
 *            a pause protects, when no I/O is under way
 *   unmap    what a mapping knows goes with it
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "snapd/util/pagemap_scan.h"
#include "tests/lib/check.h"
#include "tests/lib/kvm_guest.h"
#include "tests/lib/slow_file.h"

#define PAGES 64u
#define PAGE  4096u
#define BYTES (PAGES * PAGE)
#define RING  1024u

static int pagemap_fd, uffd;
static struct slow_file slow;

static long kernel_has(void)
{
	struct uffdio_api api = {.api = UFFD_API,
				 .features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED |
					     UFFD_FEATURE_WP_HUGETLBFS_SHMEM};
	struct pm_scan_arg none = {.size = sizeof(none)};

	pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	check(pagemap_fd >= 0, "pagemap: %s", strerror(errno));
	if (ioctl(pagemap_fd, PAGEMAP_SCAN, &none) < 0)
		return -1;
	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	return uffd >= 0 && !ioctl(uffd, UFFDIO_API, &api) ? 0 : -2;
}

static void need_kernel(void)
{
	long r = kernel_has();
	struct utsname u;

	uname(&u);
	if (r < 0)
		skip("Linux %s has no %s (6.7): no --dirty=pagemap, no --track-host here",
		     u.release, r == -1 ? "PAGEMAP_SCAN" : "UFFD_FEATURE_WP_ASYNC");
	printf("Linux %s has PAGEMAP_SCAN and UFFD_FEATURE_WP_ASYNC\n", u.release);
}

static int make_file(void)
{
	int fd = memfd_create("watched", MFD_CLOEXEC);

	check(fd >= 0 && !ftruncate(fd, BYTES), "file: %s", strerror(errno));
	return fd;
}

static uint8_t *map(int fd)
{
	uint8_t *p = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	check(p != MAP_FAILED, "mmap: %s", strerror(errno));
	return p;
}

static void watch(uint8_t *p)
{
	struct uffdio_register reg = {.range = {(uintptr_t)p, BYTES},
				      .mode = UFFDIO_REGISTER_MODE_WP};

	check(!ioctl(uffd, UFFDIO_REGISTER, &reg), "register: %s", strerror(errno));
}

/* How many pages were written; *first: one of them. */
static uint32_t scan(const uint8_t *p, bool protect, uint32_t *first)
{
	struct page_region vec[PAGES];
	struct pm_scan_arg arg = {
		.size = sizeof(arg),
		.flags = PM_SCAN_CHECK_WPASYNC | (protect ? PM_SCAN_WP_MATCHING : 0),
		.start = (uintptr_t)p,
		.end = (uintptr_t)p + BYTES,
		.vec = (uintptr_t)vec,
		.vec_len = PAGES,
		.category_mask = PAGE_IS_WRITTEN,
		.return_mask = PAGE_IS_WRITTEN,
	};
	int n = ioctl(pagemap_fd, PAGEMAP_SCAN, &arg);
	uint32_t total = 0;

	check(n >= 0, "PAGEMAP_SCAN: %s", strerror(errno));
	for (int i = 0; i < n; i++)
		total += (uint32_t)((vec[i].end - vec[i].start) / PAGE);
	if (first && n)
		*first = (uint32_t)((vec[0].start - (uintptr_t)p) / PAGE);
	return total;
}

static void write_all(uint8_t *p)
{
	for (uint32_t i = 0; i < PAGES; i++)
		*(volatile uint64_t *)(p + i * PAGE) += 1;
}

static long faults_of(void (*fn)(uint8_t *p), uint8_t *p)
{
	struct rusage before, after;

	getrusage(RUSAGE_THREAD, &before);
	fn(p);
	getrusage(RUSAGE_THREAD, &after);
	return after.ru_minflt - before.ru_minflt;
}

/* ---- told ---- */

static void test_told(void)
{
	int fd = make_file(), zeros = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	uint8_t *p = map(fd);
	uint32_t at;

	watch(p);
	check(scan(p, true, NULL) == PAGES, "a mapping just watched is written as a whole");
	check(scan(p, true, NULL) == 0, "protected");
	check(*(volatile uint8_t *)(p + 3 * PAGE) == 0, "load");
	check(scan(p, false, NULL) == 0, "a load of a page that was never there is no write");
	*(volatile uint8_t *)(p + 5 * PAGE) = 1;
	check(scan(p, false, &at) == 1 && at == 5, "a store");
	check(scan(p, false, &at) == 1 && at == 5, "a plain scan tells again");
	check(scan(p, true, &at) == 1 && at == 5, "a protecting scan");
	check(scan(p, true, NULL) == 0, "tells once");
	check(read(zeros, p + 7 * PAGE, 16) == 16, "read");
	check(scan(p, true, &at) == 1 && at == 7, "read(2)");
	check(pwrite(fd, "x", 1, 9 * PAGE) == 1, "pwrite");
	check(scan(p, true, NULL) == 0, "write(2) to the file is not seen");
	printf("told: stores and read(2); not loads, nor write(2) to the file\n");
	munmap(p, BYTES);
	close(zeros);
	close(fd);
}

/* ---- dual ---- */

static void test_dual(void)
{
	int fd = make_file();
	uint8_t *a = map(fd), *b = map(fd);
	long n;

	watch(b);
	write_all(a);
	write_all(b);
	(void)scan(b, true, NULL);
	write_all(a);
	check(scan(b, true, NULL) == 0, "written through A, told of B");
	n = faults_of(write_all, a);
	check(n == 0, "a scan of B made %ld pages of A fault", n);
	n = faults_of(write_all, b);
	check(n == PAGES, "%ld faults for %u protected pages", n, PAGES);
	check(scan(b, true, NULL) == PAGES, "written through B");
	printf("dual: a protecting scan of B takes nothing from A\n");
	munmap(a, BYTES);
	munmap(b, BYTES);
	close(fd);
}

/* ---- kvm ---- */

GUEST_FN static void writer(uint64_t gpa, uint64_t nr_pages)
{
	for (uint64_t round = 1;; round++) {
		for (uint64_t i = 0; i < nr_pages; i++)
			guest_write(gpa + i * 4096, round);
		guest_tell(round);
	}
}

static void guest_pass(struct kvm_guest *g)
{
	uint64_t told;
	int r = kvm_guest_run(g, 0);

	check(r == KVM_EXIT_MMIO && kvm_guest_told(g, 0, &told), "exit %d", r);
}

/* Entries that a pass pushes, nothing RESET, after a protecting scan of g.data. */
static uint32_t pushed_after_scan(bool kvm_has_b)
{
	struct kvm_guest_config config = {.ring_entries = RING, .data_bytes = BYTES};
	struct kvm_guest g;
	uint8_t *other;
	uint32_t n;
	int r = kvm_guest_create(&g, &config);

	if (r == -ENODEV || r == -ENOTSUP) {
		printf("kvm: left out, no /dev/kvm with a dirty ring: %s\n", strerror(-r));
		return kvm_has_b ? PAGES : 0;
	}
	check(!r, "VM: %s", strerror(-r));
	other = map(g.data_fd);
	watch(g.data);
	r = kvm_guest_slot(&g, 1, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA, BYTES,
			   kvm_has_b ? g.data : other);
	check(!r, "slot: %s", strerror(-r));
	check(kvm_guest_add_vcpu(&g, GUEST_CODE(writer), KVM_GUEST_DATA_GPA, PAGES, 0, 0) >= 0,
	      "vCPU");
	guest_pass(&g);
	check(kvm_guest_harvest(&g, 0, NULL, RING) == PAGES, "first writes");
	(void)scan(g.data, true, NULL);
	guest_pass(&g);
	check(scan(g.data, true, NULL) == (kvm_has_b ? PAGES : 0), "the guest's writes, in B");
	n = kvm_guest_harvest(&g, 0, NULL, RING);
	munmap(other, BYTES);
	kvm_guest_destroy(&g);
	return n;
}

static void test_kvm(void)
{
	uint32_t n = pushed_after_scan(false);

	check(n == 0, "a scan of B made KVM forget %u pages of A", n);
	n = pushed_after_scan(true);
	check(n == PAGES, "%u of %u pages faulted again", n, PAGES);
	printf("kvm: its mapping is left alone when it has one of its own\n");
}

/* ---- pinned ---- */

static void *read_slowly(void *arg)
{
	check(pread(slow.fd, arg, PAGE, 0) == PAGE, "O_DIRECT: %s", strerror(errno));
	return NULL;
}

/* Is the data told of that comes after the scan? */
static bool told_of_late_data(bool protect)
{
	int fd = make_file();
	uint8_t *p = map(fd);
	pthread_t thread;
	bool told;

	watch(p);
	write_all(p);
	(void)scan(p, true, NULL);
	atomic_store(&slow.reads->is_held, true);
	atomic_store(&slow.reads->fill, 0xa5);
	check(!pthread_create(&thread, NULL, read_slowly, p + 3 * PAGE), "thread");
	while (!atomic_load(&slow.reads->nr_waiting))
		usleep(1000);
	check(scan(p, protect, NULL) == 1, "a page is written when its I/O is submitted");
	check(p[3 * PAGE] != 0xa5, "the data is there already");
	atomic_store(&slow.reads->is_held, false);
	pthread_join(thread, NULL);
	check(p[3 * PAGE] == 0xa5, "no data came");
	told = scan(p, true, NULL) == 1;
	munmap(p, BYTES);
	close(fd);
	return told;
}

static void test_pinned(void)
{
	check(!told_of_late_data(true), "no race any more: P1 could be relaxed");
	check(told_of_late_data(false), "a scan that does not protect lost the page");
	printf("pinned: data that comes after a protecting scan is never told\n");
}

static void test_unmap(void)
{
	int fd = make_file();
	uint8_t *p = map(fd);

	watch(p);
	(void)scan(p, true, NULL);
	*(volatile uint8_t *)p = 1;
	check(mmap(p, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == p, "mmap");
	watch(p);
	check(scan(p, true, NULL) == PAGES, "a new mapping is written as a whole");
	munmap(p, BYTES);
	close(fd);
}

int main(void)
{
	int err = slow_file_open(&slow);

	need_kernel();
	test_told();
	test_dual();
	test_kvm();
	if (err)
		printf("pinned: left out, no FUSE mount: %s\n", strerror(-err));
	else
		test_pinned();
	test_unmap();
	if (!err)
		slow_file_close(&slow);
	return 0;
}
