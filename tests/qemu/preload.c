/* SPDX-License-Identifier: MIT */
/*
 * libsnapd-qemu.so by itself, in the process of a small VMM that makes KVM's calls as QEMU
 * does: what that VMM sees of KVM must be what the kernel would say, but for the ways of
 * dirty tracking, which are taken.  On the kernel's KVM, with real guests.
 *
 *   bare      without a monitor to talk to, nothing is changed
 *   caps      no ring, no protocol 2, whoever asks; the kernel has them
 *   log       KVM_GET_DIRTY_LOG: every page that the guest wrote, none that only this process
 *             wrote; for RAM, and for private memory that two slots show
 *   slots     ids that come again with other memory; flags; what KVM refuses
 *   region2   memslots by the newer call; guest_memfd, which nobody else sees, is refused
 *   mappings  KVM's mapping of RAM is not ours
 *   files     memory that is given back to the host, or unmapped: the service hears of it
 *   vfio, dma, vdpa, passed   a device, or another process, gets at memory: refused
 *   faults    userfaultfd's, of memory that KVM maps elsewhere: not for others
 *   children  what is forked neither says goodbye for us nor has the library again
 *
 * The program starts itself again with the library in LD_PRELOAD: preload LIBRARY CASE.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/userfaultfd.h>
#include <linux/vfio.h>
#include <linux/vhost.h>

#include "tests/lib/check.h"
#include "tests/lib/fake_service.h"
#include "tests/lib/kvm_guest.h"
#include "tests/lib/rand.h"

#define PAGES	    256u
#define DATA_SLOT   1u
#define PRIVATE_GPA 0x20000000ull
#define ALIAS_GPA   0x30000000ull
#define ROUNDS	    50u
#define AGAIN	    "SNAPD_TEST_AGAIN"

/* Write one word in each page whose bit is set in four words of 64, then tell. */
static GUEST_FN void write_pages(uint64_t gpa, uint64_t nr_words, uint64_t unused, uint64_t value)
{
	for (;;) {
		for (uint64_t w = 0; w < nr_words; w++) {
			uint64_t bits = guest_ask();

			for (uint64_t i = 0; i < 64; i++)
				if (bits >> i & 1)
					guest_write(gpa + (w * 64 + i) * KVM_GUEST_PAGE, value);
		}
		guest_tell(value);
		value++;
	}
}

static struct kvm_guest g;
static uint32_t vcpus[3];
static struct rand rng;

static void create(void)
{
	const struct kvm_guest_config config = {.data_bytes = PAGES * KVM_GUEST_PAGE};
	int r = kvm_guest_create(&g, &config);

	if (r == -ENODEV)
		skip("no /dev/kvm");
	CHECK(!r);
}

static int kernel_cap(uint32_t cap)
{
	return (int)syscall(SYS_ioctl, g.kvm_fd, KVM_CHECK_EXTENSION, (unsigned long)cap);
}

/* Let the guest write the pages of words[]. */
static void guest_writes(uint32_t vcpu, const uint64_t *words)
{
	uint64_t told = 0;

	for (uint32_t asked = 0; !kvm_guest_told(&g, vcpu, &told) || asked < PAGES / 64;) {
		CHECK(kvm_guest_run(&g, vcpu) == KVM_EXIT_MMIO);
		if (kvm_guest_asked(&g, vcpu))
			kvm_guest_answer(&g, vcpu, words[asked++]);
	}
}

static int get_log(uint32_t slot, uint64_t *words)
{
	struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = words};

	memset(words, 0xee, PAGES / 8);
	return ioctl(g.vm_fd, KVM_GET_DIRTY_LOG, &log) < 0 ? -errno : 0;
}

static void expect_log(uint32_t slot, uint32_t pages, const uint64_t *want, const char *what)
{
	uint64_t got[PAGES / 64];

	CHECK(!get_log(slot, got));
	for (uint32_t i = 0; i < pages / 64; i++)
		if (got[i] != want[i]) {
			printf("%s: slot %u, pages %u..: 0x%" PRIx64 ", not 0x%" PRIx64 "\n", what,
			       slot, i * 64, got[i], want[i]);
			exit(1);
		}
}

static void drain(uint32_t slot)
{
	uint64_t words[PAGES / 64];

	CHECK(!get_log(slot, words));
}

static void random_words(uint64_t *words)
{
	for (uint32_t i = 0; i < PAGES / 64; i++)
		words[i] = rand_next(&rng) & rand_next(&rng) & rand_next(&rng);
}

static int set_slot(uint32_t slot, uint32_t flags, uint64_t gpa, uint32_t pages, void *hva)
{
	return kvm_guest_slot(&g, slot, flags, gpa, pages * KVM_GUEST_PAGE, hva);
}

static void *private_memory(void)
{
	void *p = mmap(NULL, PAGES * KVM_GUEST_PAGE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED);
	return p;
}

/* ---- cases ---- */

static void test_bare(void)
{
	create();
	CHECK(kvm_guest_cap(&g, KVM_CAP_DIRTY_LOG_RING_ACQ_REL) ==
	      kernel_cap(KVM_CAP_DIRTY_LOG_RING_ACQ_REL));
	CHECK(!set_slot(DATA_SLOT, 0, KVM_GUEST_DATA_GPA, PAGES, g.data));
	CHECK(kvm_guest_add_vcpu(&g, GUEST_CODE(write_pages), KVM_GUEST_DATA_GPA, PAGES / 64, 0,
				 1) == 0);
	guest_writes(0, (const uint64_t[PAGES / 64]){5});
	CHECK(*(uint64_t *)g.data == 1 && *(uint64_t *)(g.data + 2 * KVM_GUEST_PAGE) == 1);
}

static void test_caps(void)
{
	static const uint32_t ours[] = {KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
					KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2};
	struct kvm_enable_cap enable = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = {1}};

	create();
	for (size_t i = 0; i < sizeof(ours) / sizeof(*ours); i++) {
		CHECK(kernel_cap(ours[i]) > 0);
		CHECK(!kvm_guest_cap(&g, ours[i]));
		CHECK(!ioctl(g.kvm_fd, KVM_CHECK_EXTENSION, (unsigned long)ours[i]));
	}
	CHECK(kvm_guest_cap(&g, KVM_CAP_USER_MEMORY) == kernel_cap(KVM_CAP_USER_MEMORY));
	CHECK(ioctl(g.vm_fd, KVM_ENABLE_CAP, &enable) < 0 && errno == EINVAL);
}

static void test_log(void)
{
	static const uint64_t none[PAGES / 64];
	void *video = private_memory();
	uint64_t words[PAGES / 64];

	create();
	CHECK(!set_slot(DATA_SLOT, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA, PAGES, g.data));
	CHECK(!set_slot(2, KVM_MEM_LOG_DIRTY_PAGES, PRIVATE_GPA, PAGES, video));
	CHECK(!set_slot(3, KVM_MEM_LOG_DIRTY_PAGES, ALIAS_GPA, PAGES, video));
	vcpus[0] = (uint32_t)kvm_guest_add_vcpu(&g, GUEST_CODE(write_pages), KVM_GUEST_DATA_GPA,
						PAGES / 64, 0, 1);
	vcpus[1] = (uint32_t)kvm_guest_add_vcpu(&g, GUEST_CODE(write_pages), PRIVATE_GPA,
						PAGES / 64, 0, 1);
	vcpus[2] = (uint32_t)kvm_guest_add_vcpu(&g, GUEST_CODE(write_pages), ALIAS_GPA, PAGES / 64,
						0, 1);
	for (uint32_t slot = DATA_SLOT; slot <= 3; slot++)
		drain(slot);
	for (uint32_t round = 0; round < ROUNDS; round++) {
		uint32_t view = 2 + round % 2, other = 5 - view;

		random_words(words);
		guest_writes(0, words);
		g.data[(round % PAGES) * KVM_GUEST_PAGE]++; /* ours: not KVM's to tell */
		expect_log(DATA_SLOT, PAGES, words, "RAM");
		expect_log(DATA_SLOT, PAGES, none, "RAM, again");
		guest_writes(view - 1, words); /* seen through either slot, once */
		expect_log(round & 2 ? view : other, PAGES, words, "private memory");
		expect_log(round & 2 ? other : view, PAGES, none, "private memory, again");
	}
}

static void test_slots(void)
{
	static const uint64_t none[PAGES / 64];
	uint8_t *video = private_memory();
	uint64_t words[PAGES / 64];

	create();
	CHECK(set_slot(DATA_SLOT, 0, 0, 0, NULL) == -EINVAL); /* there is none to delete */
	CHECK(!set_slot(DATA_SLOT, 0, KVM_GUEST_DATA_GPA, PAGES, g.data));
	CHECK(get_log(DATA_SLOT, words) == -ENOENT);
	CHECK(!set_slot(DATA_SLOT, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA, PAGES, g.data));
	drain(DATA_SLOT);
	CHECK(set_slot(4, 0, KVM_GUEST_DATA_GPA, PAGES, video) == -EEXIST); /* overlaps */
	CHECK(set_slot(DATA_SLOT, 0, KVM_GUEST_DATA_GPA, PAGES / 2, g.data) == -EINVAL);
	CHECK(!set_slot(4, KVM_MEM_READONLY, PRIVATE_GPA, PAGES, video));
	CHECK(get_log(4, words) == -ENOENT);
	CHECK(kvm_guest_add_vcpu(&g, GUEST_CODE(write_pages), KVM_GUEST_DATA_GPA, PAGES / 64, 0,
				 1) == 0);
	for (uint32_t round = 0; round < ROUNDS; round++) {
		uint32_t shift = round % 2 ? PAGES / 2 : 0;

		/* The pages written through the id's last life are not those of the next. */
		random_words(words);
		guest_writes(0, words);
		CHECK(!set_slot(DATA_SLOT, 0, 0, 0, NULL));
		CHECK(!set_slot(DATA_SLOT, KVM_MEM_LOG_DIRTY_PAGES, ALIAS_GPA, PAGES / 2,
				video + (uint64_t)shift * KVM_GUEST_PAGE));
		if (round >= 2)
			expect_log(DATA_SLOT, PAGES / 2, none, "another life of the slot");
		else
			drain(DATA_SLOT); /* memory that was never shown before */
		CHECK(!set_slot(DATA_SLOT, 0, 0, 0, NULL));
		CHECK(!set_slot(DATA_SLOT, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA, PAGES,
				g.data));
		expect_log(DATA_SLOT, PAGES, words, "what was written before the slot went");
	}
}

/* As Linux 6.8 has it, as struct kvm_userspace_memory_region2. */
struct region2 {
	struct kvm_userspace_memory_region r;
	uint64_t guest_memfd_offset;
	uint32_t guest_memfd, pad[29];
};
#define SET_REGION2 _IOW(KVMIO, 0x49, struct region2)

static void test_region2(void)
{
	struct region2 r = {.r = {.slot = DATA_SLOT,
				  .guest_phys_addr = KVM_GUEST_DATA_GPA,
				  .memory_size = PAGES * KVM_GUEST_PAGE}};
	uint64_t words[PAGES / 64] = {6};

	create();
	r.r.userspace_addr = (uintptr_t)g.data;
	r.r.flags = 1u << 2; /* KVM_MEM_GUEST_MEMFD */
	CHECK(ioctl(g.vm_fd, SET_REGION2, &r) < 0 && errno == EOPNOTSUPP);
	r.r.flags = KVM_MEM_LOG_DIRTY_PAGES;
	CHECK(!ioctl(g.vm_fd, SET_REGION2, &r));
	drain(DATA_SLOT);
	CHECK(kvm_guest_add_vcpu(&g, GUEST_CODE(write_pages), KVM_GUEST_DATA_GPA, PAGES / 64, 0,
				 1) == 0);
	guest_writes(0, words);
	expect_log(DATA_SLOT, PAGES, words, "RAM of the newer call");
	r.r.memory_size = 0;
	CHECK(!ioctl(g.vm_fd, SET_REGION2, &r));
	CHECK(get_log(DATA_SLOT, words) == -ENOENT);
}

static void test_mappings(void)
{
	uint32_t nr = 0;
	char line[512];
	FILE *f;

	create();
	CHECK(!set_slot(DATA_SLOT, 0, KVM_GUEST_DATA_GPA, PAGES, g.data));
	f = fopen("/proc/self/maps", "re");
	CHECK(f);
	while (fgets(line, sizeof(line), f))
		nr += strstr(line, "memfd:guest-data") != NULL;
	fclose(f);
	CHECK(nr >= 2);
}

/* The piece that has the data's first page. */
static uint32_t piece_of_data(const struct fake_service *s)
{
	for (uint32_t i = 0; i < s->nr_pieces; i++)
		if (s->pieces[i].home_gfn == KVM_GUEST_DATA_GPA / KVM_GUEST_PAGE)
			return i;
	CHECK(!"the data was told");
	return 0;
}

static void test_files(void)
{
	char dir[64], path[96];
	int listen_fd = fake_listen(dir, sizeof(dir), path, sizeof(path));
	static struct fake_service s;
	uint64_t first;
	uint32_t piece;

	setenv("SNAPD_AGENT_SOCKET", path, 1);
	create();
	CHECK(!set_slot(DATA_SLOT, 0, KVM_GUEST_DATA_GPA, PAGES / 2, g.data));
	fake_accept_on(listen_fd, &s);
	fake_welcome(&s);
	fake_sync(&s);
	piece = piece_of_data(&s);
	first = s.pieces[piece].first_frame;
	CHECK(s.pieces[piece].nr_frames == PAGES); /* more than the slot shows */
	gpaset_clear(&s.dirty, SNAPD_SHM_FRAMES);
	CHECK(!fallocate(g.data_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 5 * KVM_GUEST_PAGE,
			 KVM_GUEST_PAGE));
	CHECK(gpaset_test(&s.dirty, first + 5) && !gpaset_test(&s.dirty, first + 6));
	CHECK(!madvise(g.data + 9 * KVM_GUEST_PAGE, KVM_GUEST_PAGE, MADV_REMOVE));
	CHECK(gpaset_test(&s.dirty, first + 9) && !gpaset_test(&s.dirty, first + 10));
	CHECK(!set_slot(DATA_SLOT, 0, 0, 0, NULL));
	fake_sync(&s);
	CHECK(!s.gone[piece]); /* out of sight is not gone */
	CHECK(!munmap(g.data, PAGES * KVM_GUEST_PAGE));
	fake_sync(&s);
	CHECK(s.gone[piece]);
	fake_unlisten(listen_fd, dir, path);
}

/* ---- what must not be snapshotted ---- */

static struct fake_service service;

static void attach_to_service(void)
{
	char dir[64], path[96];
	int listen_fd = fake_listen(dir, sizeof(dir), path, sizeof(path));

	setenv("SNAPD_AGENT_SOCKET", path, 1);
	create();
	CHECK(!set_slot(DATA_SLOT, 0, KVM_GUEST_DATA_GPA, PAGES, g.data));
	fake_accept_on(listen_fd, &service);
	fake_welcome(&service);
	fake_sync(&service);
	fake_unlisten(listen_fd, dir, path);
	CHECK(!*service.about.refusal);
}

static void expect_refusal(const char *want)
{
	fake_sync(&service);
	if (!strstr(service.about.refusal, want)) {
		printf("refused for '%s', not for %s\n", service.about.refusal, want);
		exit(1);
	}
}

static void test_vfio(void)
{
	struct kvm_create_device dev = {.type = KVM_DEV_TYPE_VFIO, .flags = KVM_CREATE_DEVICE_TEST};

	attach_to_service();
	if (ioctl(g.vm_fd, KVM_CREATE_DEVICE, &dev) < 0)
		skip("this kernel has no kvm-vfio");
	fake_sync(&service);
	CHECK(!*service.about.refusal); /* it was a question */
	dev.flags = 0;
	CHECK(!ioctl(g.vm_fd, KVM_CREATE_DEVICE, &dev));
	expect_refusal("VFIO");
}

/* There need not be such a device: the call is what tells. */
static void test_dma(void)
{
	struct vfio_iommu_type1_dma_map map = {.argsz = sizeof(map)};

	attach_to_service();
	CHECK(ioctl(g.data_fd, VFIO_IOMMU_MAP_DMA, &map) < 0 && errno == ENOTTY);
	expect_refusal("VFIO");
}

static void test_vdpa(void)
{
	uint32_t id;

	attach_to_service();
	CHECK(ioctl(g.data_fd, VHOST_VDPA_GET_DEVICE_ID, &id) < 0 && errno == ENOTTY);
	expect_refusal("vDPA");
}

static void pass(int fd)
{
	char control[CMSG_SPACE(sizeof(int))] = {0}, byte = 0;
	struct iovec iov = {&byte, 1};
	struct msghdr msg = {.msg_iov = &iov,
			     .msg_iovlen = 1,
			     .msg_control = control,
			     .msg_controllen = sizeof(control)};
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
	int pair[2];

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &fd, sizeof(fd));
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	CHECK(sendmsg(pair[0], &msg, 0) == 1);
	close(pair[0]);
	close(pair[1]);
}

/* As vhost-user does with all RAM. */
static void test_passed(void)
{
	int other = memfd_create("other", MFD_CLOEXEC), again;

	attach_to_service();
	pass(other);
	fake_sync(&service);
	CHECK(!*service.about.refusal);
	again = fcntl(g.data_fd, F_DUPFD_CLOEXEC, 3);
	CHECK(other >= 0 && again >= 0);
	pass(again);
	expect_refusal("vhost-user");
}

static int ask_for_faults(void)
{
	struct uffdio_api api = {.api = UFFD_API};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY), r;

	CHECK(fd >= 0);
	r = ioctl(fd, UFFDIO_API, &api) < 0 ? -errno : 0;
	close(fd);
	return r;
}

static void test_faults(void)
{
	CHECK(!ask_for_faults());
	create();
	CHECK(!set_slot(DATA_SLOT, 0, KVM_GUEST_DATA_GPA, PAGES, g.data));
	CHECK(ask_for_faults() == -EOPNOTSUPP);
}

static void test_children(void)
{
	int status;
	char byte;
	pid_t pid;

	attach_to_service();
	CHECK(!getenv("SNAPD_QEMU_QMP") && !getenv("LD_PRELOAD"));
	pid = fork();
	CHECK(pid >= 0);
	if (!pid)
		exit(0);
	CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && !WEXITSTATUS(status));
	fake_sync(&service);
	CHECK(!service.said_bye);
	/* Nor did it hang up on the monitor, whose other end is here. */
	CHECK(recv(atoi(getenv(AGAIN)), &byte, 1, MSG_DONTWAIT) < 0 && errno == EAGAIN);
}

static const struct {
	const char *name;
	void (*run)(void);
} cases[] = {{"vfio", test_vfio},	  {"region2", test_region2}, {"dma", test_dma},
	     {"vdpa", test_vdpa},	  {"passed", test_passed},   {"faults", test_faults},
	     {"children", test_children}, {"bare", test_bare},	     {"caps", test_caps},
	     {"log", test_log},		  {"slots", test_slots},     {"mappings", test_mappings},
	     {"files", test_files}};

/* The monitor's other end stays with this process, and says nothing. */
static void become(char **argv)
{
	char where[32], end[32];
	int fds[2];

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, fds));
	snprintf(where, sizeof(where), "fd:%d", fds[0]);
	snprintf(end, sizeof(end), "%d", fds[1]);
	setenv(AGAIN, end, 1);
	setenv("LD_PRELOAD", argv[1], 1);
	setenv("SNAPD_AGENT_SOCKET", "/nonexistent/agent.sock", 1);
	if (strcmp(argv[2], "bare") != 0)
		setenv("SNAPD_QEMU_QMP", where, 1);
	execv("/proc/self/exe", argv);
	perror("execv");
	exit(1);
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	if (!getenv(AGAIN))
		become(argv);
	rng = rand_of(rand_seed());
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++)
		if (!strcmp(argv[2], cases[i].name)) {
			cases[i].run();
			printf("%s: as KVM is\n", argv[2]);
			return 0;
		}
	return 2;
}
