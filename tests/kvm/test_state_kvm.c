/* SPDX-License-Identifier: MIT */
/*
 * Saved state on a real KVM: a guest that is put back does again what it did.
 *
 * Two vCPUs compute on memory, on general and on vector registers, ask the host
 * for numbers by MMIO reads and tell their results by MMIO writes.  At a random
 * instant, sometimes with an MMIO read answered but not yet completed, state and
 * memory are saved; the guest runs on and its results are written down.
 *
 *   in place      load into the same VM, 35 times over: same state byte for byte
 *                 (clocks apart), same results
 *   new process   exec this program again, which makes a new VM from the saved
 *                 state and memory: same results
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "snapd/arch/arch.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/kvm_guest.h"
#include "tests/lib/rand.h"

#define VCPUS	   2
#define DATA_BYTES (1u << 20)
#define PAGES_EACH (DATA_BYTES / 4096 / VCPUS)
#define STEPS	   50
#define EVENTS	   200 /* tells and asks written down after each save */
#define ROUNDS	   35

typedef uint64_t v2 __attribute__((vector_size(16)));

/* The "device" answers the n-th question of a vCPU, and so is state, too. */
struct device {
	uint64_t asked[VCPUS];
};

struct saved {
	struct snapd_state_writer w;
	const void *blob;
	size_t blob_bytes;
	uint8_t *sys, *data; /* copies of the guest's memory */
	struct device device;
};

GUEST_FN static void worker(uint64_t gpa, uint64_t nr_pages, uint64_t seed)
{
	v2 acc = {seed, ~seed};
	uint64_t x = seed;

	for (;;) {
		for (int i = 0; i < STEPS; i++) {
			uint64_t at;

			x ^= x << 13;
			x ^= x >> 7;
			x ^= x << 17;
			at = gpa + x % nr_pages * 4096 + (x >> 32) % 512 * 8;
			acc += (v2){guest_read(at), x};
			guest_write(at, acc[0] ^ acc[1]);
		}
		x += guest_ask();
		guest_tell(x ^ acc[0] ^ acc[1]);
	}
}

static struct arch_vm arch_vm(const struct kvm_guest *g)
{
	return (struct arch_vm){.kvm = &arch_kvm_kernel, .kvm_fd = g->kvm_fd, .vm_fd = g->vm_fd};
}

/* One event of vCPU i: a result, or 0 for a question, which is answered. */
static uint64_t run_one(struct kvm_guest *g, struct device *d, uint32_t i)
{
	uint64_t told = 0;
	int r = kvm_guest_run(g, i);

	check(r == KVM_EXIT_MMIO, "vCPU %u: exit %d", i, r);
	if (kvm_guest_asked(g, i))
		kvm_guest_answer(g, i, ++d->asked[i] * 0x9e3779b97f4a7c15ull);
	else
		check(kvm_guest_told(g, i, &told), "vCPU %u: an MMIO exit of its own", i);
	return told;
}

static void run_events(struct kvm_guest *g, struct device *d, uint64_t results[EVENTS])
{
	for (int n = 0; n < EVENTS; n++)
		results[n] = run_one(g, d, n % VCPUS);
}

static void save(struct kvm_guest *g, const struct device *d, struct saved *s)
{
	struct arch_vm vm = arch_vm(g);
	struct err e = {0};
	int r;

	check(state_writer_init(&s->w) == 0, "memory");
	for (uint32_t i = 0; i < VCPUS; i++) {
		r = arch_host()->vcpu_save(&vm, g->vcpus[i].fd, g->vcpus[i].run, i, &s->w, &e);
		check(r == 0, "%s", e.text);
	}
	r = arch_host()->vm_save(&vm, &s->w, &e);
	check(r == 0, "%s", e.text);
	r = arch_host()->host_save(&vm, &s->w, &e);
	check(r == 0, "%s", e.text);
	check(state_writer_finish(&s->w, &s->blob, &s->blob_bytes) == 0, "state does not close");
	s->sys = malloc(KVM_GUEST_SYS_BYTES);
	s->data = malloc(DATA_BYTES);
	check(s->sys && s->data, "memory");
	memcpy(s->sys, g->sys, KVM_GUEST_SYS_BYTES);
	memcpy(s->data, g->data, DATA_BYTES);
	s->device = *d;
}

static void saved_deinit(struct saved *s)
{
	state_writer_deinit(&s->w);
	free(s->sys);
	free(s->data);
}

static void load(struct kvm_guest *g, const void *blob, size_t blob_bytes)
{
	struct arch_vm vm = arch_vm(g);
	struct snapd_state_reader reader;
	struct err e = {0};

	check(state_reader_init(&reader, blob, blob_bytes, &e) == 0, "%s", e.text);
	check(arch_host()->host_check(&vm, NULL, &reader, &e) == 0, "%s", e.text);
	check(arch_host()->vm_load(&vm, &reader, &e) == 0, "%s", e.text);
	for (uint32_t i = 0; i < VCPUS; i++) {
		int r = arch_host()->vcpu_load(&vm, g->vcpus[i].fd, g->vcpus[i].run, i, &reader,
					       &e);

		check(r == 0, "%s", e.text);
	}
}

static bool is_time_msr(uint32_t index)
{
	return index == 0x10 || index == 0x6e0; /* TSC, TSC_DEADLINE */
}

static bool same_msrs(const struct kvm_msr_entry *a, const struct kvm_msr_entry *b, size_t nr)
{
	for (size_t i = 0; i < nr; i++)
		if (a[i].index != b[i].index ||
		    (a[i].data != b[i].data && !is_time_msr(a[i].index)))
			return false;
	return true;
}

/* Same records, in the same order; of clocks only that they are there, and of the
 * host, whose CPUID names the CPU that was asked. */
static void check_same_state(const struct saved *a, const struct saved *b)
{
	const struct state_record *ra = NULL, *rb = NULL;
	struct snapd_state_reader x, y;

	check(state_reader_init(&x, a->blob, a->blob_bytes, NULL) == 0, "state");
	check(state_reader_init(&y, b->blob, b->blob_bytes, NULL) == 0, "state");
	while ((ra = state_next(&x, ra))) {
		bool same;

		rb = state_next(&y, rb);
		check(rb && strcmp(ra->name, rb->name) == 0 && ra->len_bytes == rb->len_bytes,
		      "record %s", ra->name);
		if (strcmp(ra->name, "x86.clock") == 0 || strcmp(ra->name, "x86.pit2") == 0 ||
		    strncmp(ra->name, "host.", 5) == 0)
			continue;
		if (strcmp(ra->name, "x86.msrs") == 0)
			same = same_msrs((void *)(ra + 1), (void *)(rb + 1),
					 ra->len_bytes / sizeof(struct kvm_msr_entry));
		else
			same = memcmp(ra + 1, rb + 1, ra->len_bytes) == 0;
		check(same, "record %s of vCPU %u differs after loading", ra->name, ra->instance);
	}
	check(!state_next(&y, rb), "more records than before");
}

static void make(struct kvm_guest *g, bool irqchip)
{
	struct kvm_guest_config config = {.data_bytes = DATA_BYTES, .irqchip = irqchip};
	int r = kvm_guest_create(g, &config);

	if (r == -ENODEV)
		skip("no usable /dev/kvm");
	check(r == 0, "VM: %s", strerror(-r));
	r = kvm_guest_slot(g, 0, 0, KVM_GUEST_DATA_GPA, DATA_BYTES, g->data);
	check(r == 0, "slot: %s", strerror(-r));
	for (uint32_t i = 0; i < VCPUS; i++) {
		uint64_t gpa = KVM_GUEST_DATA_GPA + i * PAGES_EACH * 4096ull;

		r = kvm_guest_add_vcpu(g, GUEST_CODE(worker), gpa, PAGES_EACH, 0x1234567 + i, 0);
		check(r == (int)i, "vCPU: %s", strerror(-r));
	}
}

static void test_in_place(bool irqchip, struct rand *rnd)
{
	struct device device = {0};
	struct kvm_guest g;

	make(&g, irqchip);
	for (int round = 0; round < ROUNDS; round++) {
		uint64_t first[EVENTS], again[EVENTS];
		struct saved s = {0}, check_s = {0};

		for (uint64_t n = rand_below(rnd, 20); n > 0; n--)
			run_one(&g, &device, rand_below(rnd, VCPUS));
		save(&g, &device, &s);
		run_events(&g, &device, first);
		for (uint64_t n = rand_below(rnd, 4); n > 0; n--) /* may leave a read pending */
			run_one(&g, &device, rand_below(rnd, VCPUS));

		memcpy(g.sys, s.sys, KVM_GUEST_SYS_BYTES);
		memcpy(g.data, s.data, DATA_BYTES);
		device = s.device;
		load(&g, s.blob, s.blob_bytes);
		save(&g, &device, &check_s);
		check_same_state(&s, &check_s);
		run_events(&g, &device, again);
		check(memcmp(first, again, sizeof(first)) == 0,
		      "round %d: the guest does something else after loading", round);
		saved_deinit(&s);
		saved_deinit(&check_s);
	}
	printf("in place, %s in-kernel interrupt controller: %d of %d the same\n",
	       irqchip ? "with" : "without", ROUNDS, ROUNDS);
	kvm_guest_destroy(&g);
}

static int memfd_of(const void *data, size_t len_bytes)
{
	int fd = memfd_create("state-test", 0);

	check(fd >= 0 && write(fd, data, len_bytes) == (ssize_t)len_bytes, "memfd");
	return fd;
}

/* In the new process: descriptors and device state come as arguments. */
static int child_main(char **argv)
{
	bool irqchip = atoi(argv[2]);
	size_t blob_bytes = strtoull(argv[4], NULL, 10);
	struct device device = {
		.asked = {strtoull(argv[7], NULL, 10), strtoull(argv[8], NULL, 10)}};
	_cleanup_free_ uint8_t *blob = malloc(blob_bytes);
	uint64_t results[EVENTS];
	struct kvm_guest g;

	make(&g, irqchip);
	check(pread(atoi(argv[3]), blob, blob_bytes, 0) == (ssize_t)blob_bytes, "reading state");
	check(pread(atoi(argv[5]), g.sys, KVM_GUEST_SYS_BYTES, 0) == (ssize_t)KVM_GUEST_SYS_BYTES,
	      "reading memory");
	check(pread(atoi(argv[6]), g.data, DATA_BYTES, 0) == DATA_BYTES, "reading memory");
	load(&g, blob, blob_bytes);
	run_events(&g, &device, results);
	check(write(atoi(argv[9]), results, sizeof(results)) == sizeof(results), "pipe");
	kvm_guest_destroy(&g);
	return 0;
}

static void run_child(const struct saved *s, bool irqchip, int out_fd)
{
	int fds[] = {memfd_of(s->blob, s->blob_bytes), memfd_of(s->sys, KVM_GUEST_SYS_BYTES),
		     memfd_of(s->data, DATA_BYTES)};
	char args[8][24];
	int status;
	pid_t pid;

	snprintf(args[0], sizeof(args[0]), "%d", irqchip);
	snprintf(args[1], sizeof(args[1]), "%d", fds[0]);
	snprintf(args[2], sizeof(args[2]), "%zu", s->blob_bytes);
	snprintf(args[3], sizeof(args[3]), "%d", fds[1]);
	snprintf(args[4], sizeof(args[4]), "%d", fds[2]);
	snprintf(args[5], sizeof(args[5]), "%llu", (unsigned long long)s->device.asked[0]);
	snprintf(args[6], sizeof(args[6]), "%llu", (unsigned long long)s->device.asked[1]);
	snprintf(args[7], sizeof(args[7]), "%d", out_fd);
	pid = fork();
	check(pid >= 0, "fork");
	if (pid == 0) {
		execl("/proc/self/exe", "test_state_kvm", "child", args[0], args[1], args[2],
		      args[3], args[4], args[5], args[6], args[7], NULL);
		_exit(1);
	}
	check(waitpid(pid, &status, 0) == pid && status == 0, "the new process failed: %x", status);
	for (size_t i = 0; i < ARRAY_SIZE(fds); i++)
		close(fds[i]);
}

static void test_new_process(bool irqchip)
{
	uint64_t here[EVENTS], there[EVENTS];
	int out = memfd_create("results", 0);
	struct device device = {0};
	struct saved s = {0};
	struct kvm_guest g;

	check(out >= 0, "memfd");
	make(&g, irqchip);
	run_events(&g, &device, here);
	save(&g, &device, &s);
	run_child(&s, irqchip, out);
	run_events(&g, &device, here);
	check(pread(out, there, sizeof(there), 0) == sizeof(there), "results");
	check(memcmp(here, there, sizeof(here)) == 0, "the guest does something else there");
	printf("new process, %s in-kernel interrupt controller: the same; state has %zu bytes\n",
	       irqchip ? "with" : "without", s.blob_bytes);
	saved_deinit(&s);
	kvm_guest_destroy(&g);
	close(out);
}

int main(int argc, char **argv)
{
	struct rand rnd;

	if (argc == 10 && strcmp(argv[1], "child") == 0)
		return child_main(argv);
	rnd = rand_of(rand_seed());
	for (int irqchip = 0; irqchip <= 1; irqchip++) {
		test_in_place(irqchip, &rnd);
		test_new_process(irqchip);
	}
	return 0;
}
