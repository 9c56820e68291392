/* SPDX-License-Identifier: MIT */
/*
 * bench backends: what each way of dirty tracking costs an epoch of 1 GiB.
 *
 * One vCPU writes a word to every n-th page and says when it is through; then the VM is
 * paused as for a snapshot, which harvests.  Two figures an epoch: how long the harvest took
 * (harvest, RESET or CLEAR or protecting scan, publishing), and how long the guest was at its
 * writes, which is mostly the faults by which its pages are found.  The backends take
 * turns, a VM each, in every round; the figure is the median over the rounds.
 *
 * The ratio of a row: the best backend's time, guest and harvest, by that of the one that
 * --dirty=auto has; the figure is the worst row's.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "bench/bench.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/agent_vm.h"
#include "tests/lib/check.h"

#define PAGES  (1ull << 18)
#define ROUNDS 5u

static const char *const names[] = {"ring", "log", "pagemap"};
#define BACKENDS ARRAY_SIZE(names)

struct guest {
	struct agent_vm a; /* first: its vCPU knows no more */
	struct fake_service s;
	uint64_t passes;
	_Atomic bool go;
	_Atomic uint64_t began_ns;
};

/* A pass each time the host lets it. */
GUEST_FN static void guest_pass(uint64_t gpa, uint64_t nr_pages, uint64_t step)
{
	for (uint64_t n = 1;; n++) {
		while (!guest_ask())
			;
		for (uint64_t p = 0; p < nr_pages; p += step)
			guest_write(gpa + p * 4096, n);
		guest_tell(n);
	}
}

static void on_ask(struct agent_vcpu *v, struct kvm_run *run)
{
	struct guest *g = (struct guest *)v->vm;
	uint64_t yes = atomic_exchange(&g->go, false);

	if (yes)
		atomic_store(&g->began_ns, bench_now_ns());
	else
		usleep(2000); /* others are being measured */
	memcpy(run->mmio.data, &yes, sizeof(yes));
}

/* name NULL: AUTO. */
static void open_guest(struct guest *g, const char *name, uint64_t step)
{
	struct agent_vm_config c = {.data_bytes = PAGES * KVM_GUEST_PAGE,
				    .dirty = name ? agent_backend(name)->dirty : SNAPD_DIRTY_AUTO};

	memset(g, 0, sizeof(*g));
	agent_vm_create(&g->a, &c);
	g->a.mmio = on_ask;
	agent_vm_add(&g->a, GUEST_CODE(guest_pass), KVM_GUEST_DATA_GPA, PAGES, step, 0);
	fake_open(&g->a, &g->s);
	agent_vm_start(&g->a, 0);
}

static void close_guest(struct guest *g)
{
	fake_close(&g->s);
	agent_vm_destroy(&g->a);
}

struct cost {
	double guest_ms, harvest_ms;
};

static struct cost epoch(struct guest *g)
{
	struct cost c;

	atomic_store(&g->go, true);
	g->passes++;
	while (atomic_load(&g->a.vcpus[0].told) < g->passes)
		usleep(20);
	c.guest_ms = (double)(bench_now_ns() - atomic_load(&g->began_ns)) / 1e6;
	close(fake_pause(&g->s, 0));
	c.harvest_ms = (double)g->s.in.paused.harvest_ns / 1e6;
	gpaset_clear(&g->s.dirty, g->s.shm->nr_frames);
	fake_resume(&g->s);
	return c;
}

/* The index of the one that AUTO has on this host. */
static size_t auto_choice(void)
{
	static struct guest g;
	uint32_t dirty;

	open_guest(&g, NULL, PAGES);
	dirty = g.s.hello.dirty_backend;
	close_guest(&g);
	for (size_t b = 0; b < BACKENDS; b++)
		if (agent_backend(names[b])->dirty == dirty)
			return b;
	bench_die("AUTO chose %u", dirty);
}

/* A row; returns best / auto. */
static double row(size_t choice, uint64_t step, double percent)
{
	static struct guest g[BACKENDS];
	double guest[BACKENDS][ROUNDS], harvest[BACKENDS][ROUNDS], total[BACKENDS], best = 1e18;

	for (size_t b = 0; b < BACKENDS; b++) {
		open_guest(&g[b], names[b], step);
		epoch(&g[b]); /* memory is allocated */
	}
	for (uint32_t r = 0; r < ROUNDS; r++)
		for (size_t b = 0; b < BACKENDS; b++) {
			struct cost c = epoch(&g[b]);

			guest[b][r] = c.guest_ms;
			harvest[b][r] = c.harvest_ms;
		}
	printf("  1 GiB, %5.1f %% dirty:", percent);
	for (size_t b = 0; b < BACKENDS; b++) {
		double gm = bench_median(guest[b], ROUNDS), hm = bench_median(harvest[b], ROUNDS);

		total[b] = gm + hm;
		best = MIN(best, total[b]);
		printf("  %s %.2f + %.2f ms", names[b], gm, hm);
		close_guest(&g[b]);
	}
	printf("\n");
	fflush(stdout);
	return best / total[choice];
}

int main(void)
{
	size_t choice = auto_choice();
	double worst = 1;

	printf("  --dirty=auto is %s here; guest + harvest, medians of %u rounds\n", names[choice],
	       ROUNDS);
	worst = MIN(worst, row(choice, 1000, 0.1));
	worst = MIN(worst, row(choice, 100, 1));
	worst = MIN(worst, row(choice, 2, 50));
	bench_ratio("backends", worst, BENCH_AT_LEAST, 0.9);
	return 0;
}
