/* SPDX-License-Identifier: MIT */
/*
 * The dirty ring in another process's hands.
 *
 *   - a process that got the vCPU's descriptor by SCM_RIGHTS can map the ring, read
 *     entries and mark them harvested;
 *   - every ioctl of its on VM and vCPU fails with EIO: only the process that made
 *     the VM can RESET.  Hence the agent lives in the VMM;
 *   - what the other process marked, the VMM's RESET takes back;
 *   - after the VMM was killed, ring and memory stay readable through the passed
 *     descriptors, also by a mapping that is made only then: what the rings held is
 *     not lost;
 *   - what the VMM had collected of them and given back by RESET, and told nobody when it
 *     died, is: no ring has it, though memory is another one.  So draining the rings is
 *     not enough, and a dead VM's memory is compared with the store (snapd/vm/postmortem.c).
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/lib/check.h"
#include "tests/lib/kvm_guest.h"

#define ENTRIES	   1024
#define PAGES	   16
#define BYTES	   (PAGES * KVM_GUEST_PAGE)
#define RING_BYTES (ENTRIES * sizeof(struct kvm_dirty_gfn))

enum { FD_VM, FD_VCPU, FD_DATA, NR_FDS };

/* From the third round on the first half only. */
GUEST_FN static void writer(uint64_t gpa, uint64_t nr_pages)
{
	for (uint64_t round = 1;; round++) {
		for (uint64_t i = 0; i < (round < 3 ? nr_pages : nr_pages / 2); i++)
			guest_write(gpa + i * 4096, round);
		guest_tell(round);
	}
}

union fds_control {
	struct cmsghdr header;
	char bytes[CMSG_SPACE(NR_FDS * sizeof(int))];
};

static void send_fds(int sock, const int fds[NR_FDS])
{
	char byte = 0;
	struct iovec iov = {.iov_base = &byte, .iov_len = 1};
	union fds_control control = {0};
	struct msghdr m = {.msg_iov = &iov,
			   .msg_iovlen = 1,
			   .msg_control = &control,
			   .msg_controllen = sizeof(control)};
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(NR_FDS * sizeof(int));
	memcpy(CMSG_DATA(c), fds, NR_FDS * sizeof(int));
	check(sendmsg(sock, &m, 0) == 1, "sendmsg: %s", strerror(errno));
}

/* The VMM gave up, or skipped: it has said why. */
static void exit_as(pid_t pid)
{
	int status;

	waitpid(pid, &status, 0);
	exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
}

static void receive_fds(int sock, pid_t vmm_pid, int fds[NR_FDS])
{
	char byte;
	struct iovec iov = {.iov_base = &byte, .iov_len = 1};
	union fds_control control;
	struct msghdr m = {.msg_iov = &iov,
			   .msg_iovlen = 1,
			   .msg_control = &control,
			   .msg_controllen = sizeof(control)};

	if (recvmsg(sock, &m, MSG_CMSG_CLOEXEC) != 1)
		exit_as(vmm_pid);
	memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&m)), NR_FDS * sizeof(int));
}

static void write_all(struct kvm_guest *g)
{
	uint64_t told;
	int r = kvm_guest_run(g, 0);

	check(r == KVM_EXIT_MMIO && kvm_guest_told(g, 0, &told), "exit %d", r);
}

/* The VMM: writes all pages, hands over, RESETs what the other marked, writes again, and
 * collects and RESETs that as its agent would; writes the first half once more, and waits to
 * be killed before the agent has told anyone. */
static void vmm(int sock)
{
	struct kvm_guest_config config = {.ring_entries = ENTRIES, .data_bytes = BYTES};
	struct kvm_guest g;
	char byte;
	int r = kvm_guest_create(&g, &config);

	if (r == -ENODEV || r == -ENOTSUP)
		skip("no /dev/kvm with a dirty ring: %s", strerror(-r));
	check(r == 0, "VM: %s", strerror(-r));
	r = kvm_guest_slot(&g, 1, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA, BYTES, g.data);
	check(r == 0, "slot: %s", strerror(-r));
	r = kvm_guest_add_vcpu(&g, GUEST_CODE(writer), KVM_GUEST_DATA_GPA, PAGES, 0, 0);
	check(r == 0, "vCPU: %s", strerror(-r));
	write_all(&g);
	send_fds(sock, (int[NR_FDS]){g.vm_fd, g.vcpus[0].fd, g.data_fd});
	check(read(sock, &byte, 1) == 1, "the other process went away");
	r = kvm_guest_reset_rings(&g);
	printf("the VMM's RESET takes back %d entries that the other process marked\n", r);
	check(r == PAGES, "RESET: %d", r);
	g.vcpus[0].next = PAGES;
	write_all(&g);
	check(kvm_guest_harvest(&g, 0, NULL, ENTRIES) == PAGES, "entries of the second round");
	check(kvm_guest_reset_rings(&g) == PAGES, "RESET of the second round");
	write_all(&g);
	fflush(stdout);
	check(write(sock, &byte, 1) == 1, "socket");
	for (;;)
		pause();
}

/* Mark the dirty entries from *next on; returns how many, and the pages in *seen. */
static uint32_t collect(struct kvm_dirty_gfn *ring, uint32_t *next, uint32_t *seen)
{
	uint32_t n = 0;

	*seen = 0;

	while (ring[*next % ENTRIES].flags == KVM_DIRTY_GFN_F_DIRTY && n < ENTRIES) {
		check(ring[*next % ENTRIES].slot == 1, "slot %u", ring[*next % ENTRIES].slot);
		*seen |= 1u << ring[*next % ENTRIES].offset;
		__atomic_store_n(&ring[*next % ENTRIES].flags, KVM_DIRTY_GFN_F_RESET,
				 __ATOMIC_RELEASE);
		(*next)++;
		n++;
	}
	return n;
}

static void expect_eio(int fd, unsigned long request, void *arg, const char *name)
{
	int r = ioctl(fd, request, arg);

	check(r < 0 && errno == EIO, "%s from another process: %d %s", name, r, strerror(errno));
	printf("%s from another process: EIO\n", name);
}

static void *map(int fd, size_t len_bytes, off_t offset)
{
	void *p = mmap(NULL, len_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);

	check(p != MAP_FAILED, "mmap: %s", strerror(errno));
	return p;
}

static void observer(int sock, pid_t vmm_pid)
{
	struct kvm_dirty_gfn *ring;
	struct kvm_regs regs;
	const uint64_t *data;
	uint32_t next = 0, seen;
	int fds[NR_FDS];
	char byte = 0;

	receive_fds(sock, vmm_pid, fds);
	ring = map(fds[FD_VCPU], RING_BYTES, KVM_DIRTY_LOG_PAGE_OFFSET * KVM_GUEST_PAGE);
	data = map(fds[FD_DATA], BYTES, 0);
	check(collect(ring, &next, &seen) == PAGES, "entries in a mapped ring");
	expect_eio(fds[FD_VM], KVM_RESET_DIRTY_RINGS, NULL, "KVM_RESET_DIRTY_RINGS");
	expect_eio(fds[FD_VCPU], KVM_GET_REGS, &regs, "KVM_GET_REGS");
	check(write(sock, &byte, 1) == 1 && read(sock, &byte, 1) == 1, "the VMM went away");

	kill(vmm_pid, SIGKILL);
	waitpid(vmm_pid, NULL, 0);
	munmap(ring, RING_BYTES);
	ring = map(fds[FD_VCPU], RING_BYTES, KVM_DIRTY_LOG_PAGE_OFFSET * KVM_GUEST_PAGE);
	next += PAGES; /* the VMM has collected these itself */
	check(collect(ring, &next, &seen) == PAGES / 2, "entries of a dead VMM, in a new mapping");
	for (uint32_t i = 0; i < PAGES; i++) {
		check(data[i * 512] == (i < PAGES / 2 ? 3 : 2), "page %u of a dead VMM", i);
		check((seen >> i & 1) == (i < PAGES / 2), "an entry of page %u", i);
	}
	printf("after the VMM was killed: %d entries and its memory are there; of %d pages that it "
	       "had collected and told nobody no ring tells\n",
	       PAGES / 2, PAGES / 2);
}

int main(void)
{
	int socks[2];
	pid_t pid;

	check(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, socks) == 0, "socketpair");
	pid = fork();
	check(pid >= 0, "fork");
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(socks[0]);
		vmm(socks[1]);
	}
	close(socks[1]);
	observer(socks[0], pid);
	return 0;
}
