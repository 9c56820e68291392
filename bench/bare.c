/* SPDX-License-Identifier: MIT */
/*
 * bare: what the parts of a pause and of a rollback cost on this machine with
 * nothing of snapd around them, for bench pause and bench rollback.
 *
 *   bare NPAGES…      prints one JSON object, times in ns, medians
 *     kick        both running vCPUs of a real guest made to leave KVM_RUN
 *     state_save  both vCPUs' state, each on its own thread at once, then the VM's
 *     state_load  the same back
 *     memcpy      {"NPAGES": t}: that many scattered pages, in ascending order, from
 *                 a shared mapping to warm memory
 */
#include "bench/bench.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <linux/kvm.h>

#include "snapd/arch/arch.h"
#include "tests/lib/kvm_guest.h"

#define NR_VCPUS  2
#define ROUNDS	  101
#define RAM_PAGES 65536u
#define PAGE	  4096u

GUEST_FN static void spin(uint64_t gpa)
{
	for (uint64_t n = 0;; n++)
		guest_write(gpa + (n & 63) * 4096, n);
}

enum order { RUN, SAVE, LOAD, QUIT };

struct cpu {
	uint32_t index;
	pthread_t thread;
	struct rig *rig;
	struct snapd_state_writer saved;
	struct snapd_state_reader reader;
	_Atomic bool out; /* left KVM_RUN, or finished the order */
};

struct rig {
	struct kvm_guest g;
	struct arch_vm vm;
	struct cpu cpus[NR_VCPUS];
	struct snapd_state_writer saved;
	struct snapd_state_reader reader;
	pthread_barrier_t go;
	enum order order; /* set before `go` */
};

static void on_kick(int sig)
{
	(void)sig;
}

static void open_reader(struct snapd_state_writer *w, struct snapd_state_reader *r)
{
	const void *blob;
	size_t len;

	if (state_writer_finish(w, &blob, &len) < 0 || state_reader_init(r, blob, len, NULL) < 0)
		bench_die("bare: the state does not read back");
}

static void obey(struct cpu *c)
{
	struct rig *rig = c->rig;
	const struct arch_ops *arch = arch_host();
	struct kvm_guest_vcpu *v = &rig->g.vcpus[c->index];
	struct err e = {0};
	int r = 0;

	if (rig->order == RUN) {
		kvm_guest_run(&rig->g, c->index);
	} else if (rig->order == SAVE) {
		state_writer_deinit(&c->saved);
		state_writer_init(&c->saved);
		r = arch->vcpu_save(&rig->vm, v->fd, v->run, c->index, &c->saved, &e);
	} else if (rig->order == LOAD) {
		r = arch->vcpu_load(&rig->vm, v->fd, v->run, c->index, &c->reader, &e);
	}
	if (r < 0)
		bench_die("bare: vCPU state: %s", e.text);
	atomic_store(&c->out, true);
}

static void *cpu_main(void *arg)
{
	struct cpu *c = arg;

	for (;;) {
		pthread_barrier_wait(&c->rig->go);
		if (c->rig->order == QUIT)
			return NULL;
		obey(c);
	}
}

static void start(struct rig *rig, enum order order)
{
	for (int i = 0; i < NR_VCPUS; i++)
		atomic_store(&rig->cpus[i].out, false);
	rig->order = order;
	pthread_barrier_wait(&rig->go);
}

static void finish(struct rig *rig)
{
	for (int i = 0; i < NR_VCPUS; i++)
		while (!atomic_load(&rig->cpus[i].out))
			__builtin_ia32_pause();
}

static double kick(struct rig *rig)
{
	struct timespec while_ns = {.tv_nsec = 2000000};
	uint64_t t;

	start(rig, RUN);
	nanosleep(&while_ns, NULL);
	t = bench_now_ns();
	for (int i = 0; i < NR_VCPUS; i++) {
		__atomic_store_n(&rig->g.vcpus[i].run->immediate_exit, 1, __ATOMIC_SEQ_CST);
		pthread_kill(rig->cpus[i].thread, SIGUSR1);
	}
	finish(rig);
	t = bench_now_ns() - t;
	for (int i = 0; i < NR_VCPUS; i++)
		rig->g.vcpus[i].run->immediate_exit = 0;
	return (double)t;
}

static double save(struct rig *rig)
{
	struct err e = {0};
	uint64_t t = bench_now_ns();

	start(rig, SAVE);
	finish(rig);
	state_writer_deinit(&rig->saved);
	state_writer_init(&rig->saved);
	if (arch_host()->vm_save(&rig->vm, &rig->saved, &e) < 0)
		bench_die("bare: VM state: %s", e.text);
	t = bench_now_ns() - t;
	open_reader(&rig->saved, &rig->reader);
	for (int i = 0; i < NR_VCPUS; i++)
		open_reader(&rig->cpus[i].saved, &rig->cpus[i].reader);
	return (double)t;
}

static double load(struct rig *rig)
{
	struct err e = {0};
	uint64_t t = bench_now_ns();

	if (arch_host()->vm_load(&rig->vm, &rig->reader, &e) < 0)
		bench_die("bare: VM state: %s", e.text);
	start(rig, LOAD);
	finish(rig);
	return (double)(bench_now_ns() - t);
}

static void rig_init(struct rig *rig)
{
	struct kvm_guest_config config = {.ring_entries = 65536, .data_bytes = 1 << 20};

	signal(SIGUSR1, on_kick);
	if (kvm_guest_create(&rig->g, &config) < 0)
		bench_skip("bare", "no usable /dev/kvm");
	rig->vm = (struct arch_vm){
		.kvm = &arch_kvm_kernel,
		.kvm_fd = rig->g.kvm_fd,
		.vm_fd = rig->g.vm_fd,
	};
	kvm_guest_slot(&rig->g, 0, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA, 1 << 20,
		       rig->g.data);
	pthread_barrier_init(&rig->go, NULL, NR_VCPUS + 1);
	for (uint32_t i = 0; i < NR_VCPUS; i++) {
		struct cpu *c = &rig->cpus[i];

		*c = (struct cpu){.index = i, .rig = rig};
		state_writer_init(&c->saved);
		if (kvm_guest_add_vcpu(&rig->g, GUEST_CODE(spin), KVM_GUEST_DATA_GPA, 0, 0, 0) < 0)
			bench_die("bare: no vCPU");
		pthread_create(&c->thread, NULL, cpu_main, c);
	}
	state_writer_init(&rig->saved);
}

static void rig_deinit(struct rig *rig)
{
	rig->order = QUIT;
	pthread_barrier_wait(&rig->go);
	for (int i = 0; i < NR_VCPUS; i++) {
		pthread_join(rig->cpus[i].thread, NULL);
		state_writer_deinit(&rig->cpus[i].saved);
	}
	state_writer_deinit(&rig->saved);
	kvm_guest_destroy(&rig->g);
}

static double copy_pages(const uint8_t *ram, uint8_t *to, uint32_t nr, uint64_t seed)
{
	uint32_t *pages = bench_scattered(nr, RAM_PAGES, seed);
	uint64_t t = bench_now_ns();

	for (uint32_t i = 0; i < nr; i++)
		memcpy(to + (size_t)i * PAGE, ram + (size_t)pages[i] * PAGE, PAGE);
	t = bench_now_ns() - t;
	free(pages);
	return (double)t;
}

static void print_memcpy(int argc, char **argv)
{
	uint8_t *ram = bench_guest_ram((size_t)RAM_PAGES * PAGE, 1);
	uint8_t *to = mmap(NULL, (size_t)RAM_PAGES * PAGE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	printf("\"memcpy\": {");
	for (int a = 1; a < argc; a++) {
		uint32_t nr = (uint32_t)strtoul(argv[a], NULL, 10);
		double t[15];

		nr = nr > RAM_PAGES ? RAM_PAGES : nr;
		for (int i = 0; i < 15; i++)
			t[i] = copy_pages(ram, to, nr, (uint64_t)i);
		printf("%s\"%s\": %.0f", a > 1 ? ", " : "", argv[a], bench_median(t, 15));
	}
	printf("}");
}

int main(int argc, char **argv)
{
	static struct rig rig;
	double k[ROUNDS], s[ROUNDS], l[ROUNDS];

	rig_init(&rig);
	for (int i = 0; i < ROUNDS; i++) {
		k[i] = kick(&rig);
		s[i] = save(&rig);
		l[i] = load(&rig);
	}
	rig_deinit(&rig);
	printf("{\"kick\": %.0f, \"kick_p99\": %.0f, \"state_save\": %.0f, \"state_load\": %.0f, ",
	       bench_median(k, ROUNDS), bench_quantile(k, ROUNDS, 0.99), bench_median(s, ROUNDS),
	       bench_median(l, ROUNDS));
	print_memcpy(argc, argv);
	printf("}\n");
	return 0;
}
