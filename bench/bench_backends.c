/* SPDX-License-Identifier: MIT */
/*
 * bench backends: what each way of dirty tracking costs an epoch of 1 and of 8 GiB.
 *
 * One vCPU writes a word to every n-th page and says when it is through; then the VM is
 * paused as for a snapshot, which harvests.  Two figures an epoch: how long the harvest took
 * (harvest, RESET or CLEAR or protecting scan, publishing), and how long the guest was at its
 * writes, which is mostly the faults by which its pages are found.  "none" is the same guest
 * with nothing logged: what the others' guest time is more than its, per page, is the guest's
 * slow-down.
 *
 * The backends take turns, a VM each over one RAM file, in every round, each time another
 * one first.  A row has a ratio for each backend: the time, guest and harvest, of the one
 * that --dirty=auto has by its own, within a round; the median over the rounds.  The figure
 * is the greatest of all: what auto costs by what the best would.  Each harvest is looked
 * through: all that was written is in it, in every epoch that is measured.
 *
 *   bench_backends [GIB [PERCENT [BACKEND...]]]      only the rows of that size, only that
 *                                row, and of those beside auto only the ones named
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bench/bench.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/agent_vm.h"
#include "tests/lib/check.h"

#define GIB_PAGES  (1ull << 18)
#define DATA_GPA   (4ull << 30)
#define MAX_ROUNDS 31u
#define ROW_MAX_NS 50000000000ull

enum { NONE = 0, FIRST = 1 };
static const char *const names[] = {"none", "ring", "log", "pagemap"};
#define BACKENDS ARRAY_SIZE(names)

struct guest {
	struct agent_vm a; /* first: its vCPU knows no more */
	struct fake_service s;
	uint64_t passes;
	_Atomic bool go;
	_Atomic uint64_t began_ns;
	bool is_logged;
};

/* Memory, part of it dirty in each epoch, and how often that is measured. */
struct row {
	uint64_t gib, step;
	double percent;
	uint32_t rounds;
};

static bool is_measured[BACKENDS];

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

/* ---- a KVM that is told to log nothing ---- */

static int unlogged_ioctl(void *opaque, int fd, unsigned long request, void *arg)
{
	if (request == KVM_SET_USER_MEMORY_REGION)
		((struct kvm_userspace_memory_region *)arg)->flags &= ~KVM_MEM_LOG_DIRTY_PAGES;
	return ioctl(fd, request, arg);
}

static void *kernel_mmap(void *opaque, size_t len, int prot, int flags, int fd, int64_t offset)
{
	return mmap(NULL, len, prot, flags, fd, offset);
}

static int kernel_munmap(void *opaque, void *addr, size_t len)
{
	return munmap(addr, len);
}

static const struct snapd_kvm_ops unlogged = {
	.ioctl = unlogged_ioctl, .mmap = kernel_mmap, .munmap = kernel_munmap};

/* name NULL: AUTO.  All measure the same pages: what the host has behind each (its page size,
 * its caches) differs by more than the backends do. */
static void open_guest(struct guest *g, const char *name, const struct row *r, int fd)
{
	bool is_none = name && !strcmp(name, names[NONE]);
	struct agent_vm_config c = {.data_bytes = r->gib * GIB_PAGES * KVM_GUEST_PAGE,
				    .data_fd = fd,
				    .dirty = !name || is_none ? SNAPD_DIRTY_AUTO
							      : agent_backend(name)->dirty,
				    .kvm = is_none ? &unlogged : NULL,
				    .no_data_slot = true};

	memset(g, 0, sizeof(*g));
	agent_vm_create(&g->a, &c);
	check(!agent_vm_slot(&g->a, AGENT_VM_DATA_SLOT, DATA_GPA, 0, r->gib * GIB_PAGES), "%s",
	      snapd_vm_error(NULL));
	g->a.mmio = on_ask;
	g->is_logged = !is_none;
	agent_vm_add(&g->a, GUEST_CODE(guest_pass), DATA_GPA, r->gib * GIB_PAGES, r->step, 0);
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

/* The frame of the data's first page. */
static uint64_t data_frame(const struct guest *g, const struct row *r)
{
	for (uint32_t i = 0; i < g->s.nr_pieces; i++)
		if (g->s.pieces[i].home_gfn == DATA_GPA / KVM_GUEST_PAGE &&
		    g->s.pieces[i].nr_frames == r->gib * GIB_PAGES)
			return g->s.pieces[i].first_frame;
	bench_die("the data was not told");
}

static void check_harvest(struct guest *g, const struct row *r)
{
	uint64_t first = data_frame(g, r);

	for (uint64_t p = 0; p < r->gib * GIB_PAGES; p += r->step)
		check(gpaset_test(&g->s.dirty, first + p), "page %llu was written and is not there",
		      (unsigned long long)p);
}

static struct cost epoch(struct guest *g, const struct row *r)
{
	struct cost c;

	atomic_store(&g->go, true);
	g->passes++;
	while (atomic_load(&g->a.vcpus[0].told) < g->passes)
		usleep(20 + (useconds_t)(r->gib * GIB_PAGES / r->step / 500));
	c.guest_ms = (double)(bench_now_ns() - atomic_load(&g->began_ns)) / 1e6;
	close(fake_pause(&g->s, 0));
	c.harvest_ms = (double)g->s.in.paused.harvest_ns / 1e6;
	if (g->is_logged)
		check_harvest(g, r);
	gpaset_clear(&g->s.dirty, g->s.shm->nr_frames);
	fake_resume(&g->s);
	return c;
}

/* The index of the one that AUTO has on this host. */
static size_t auto_choice(void)
{
	static const struct row one = {.gib = 1, .step = GIB_PAGES};
	static struct guest g;
	uint32_t dirty;

	open_guest(&g, NULL, &one, 0);
	dirty = g.s.hello.dirty_backend;
	close_guest(&g);
	for (size_t b = FIRST; b < BACKENDS; b++)
		if (agent_backend(names[b])->dirty == dirty)
			return b;
	bench_die("AUTO chose %u", dirty);
}

static struct cost costs[BACKENDS][MAX_ROUNDS];

static double median_of(size_t b, const struct row *r, bool guest)
{
	double v[MAX_ROUNDS];

	for (uint32_t i = 0; i < r->rounds; i++)
		v[i] = guest ? costs[b][i].guest_ms : costs[b][i].harvest_ms;
	return bench_median(v, r->rounds);
}

static double total(size_t b, uint32_t round)
{
	return costs[b][round].guest_ms + costs[b][round].harvest_ms;
}

/* The time of `choice` by that of b. */
static double ratio_to(size_t choice, size_t b, const struct row *r)
{
	double ratio[MAX_ROUNDS];

	for (uint32_t i = 0; i < r->rounds; i++)
		ratio[i] = total(choice, i) / total(b, i);
	return bench_median(ratio, r->rounds);
}

static double report(size_t choice, const struct row *r)
{
	double pages = (double)DIV_ROUND_UP(r->gib * GIB_PAGES, r->step), worst = 1;
	double idle_ms = median_of(NONE, r, true);

	printf("  %llu GiB, %4.1f %% dirty:  unwatched %.2f ms", (unsigned long long)r->gib,
	       r->percent, idle_ms);
	for (size_t b = FIRST; b < BACKENDS; b++) {
		double gm = median_of(b, r, true);

		if (!is_measured[b])
			continue;
		printf("  %s %.2f + %.2f ms (%.1f us/page)", names[b], gm, median_of(b, r, false),
		       (gm - idle_ms) * 1e3 / pages);
		worst = MAX(worst, ratio_to(choice, b, r));
	}
	printf("  auto %.2f of the best\n", worst);
	fflush(stdout);
	return worst;
}

/* Measures a row, in fewer rounds where they take long: the time of auto by that of the best. */
static double measure(size_t choice, struct row *r)
{
	uint64_t begun_ns = bench_now_ns();
	static struct guest g[BACKENDS];
	int fd = memfd_create("bench-ram", MFD_CLOEXEC);

	if (fd < 0)
		bench_die("no memory for a guest");
	for (size_t b = 0; b < BACKENDS; b++) {
		if (!is_measured[b])
			continue;
		open_guest(&g[b], names[b], r, fd);
		epoch(&g[b], r); /* memory is allocated */
	}
	for (uint32_t i = 0; i < r->rounds; i++) {
		if (i && bench_now_ns() - begun_ns > ROW_MAX_NS)
			r->rounds = i;
		for (size_t k = 0; k < BACKENDS && i < r->rounds; k++) {
			size_t b = (i + k) % BACKENDS;

			if (is_measured[b])
				costs[b][i] = epoch(&g[b], r);
		}
	}
	for (size_t b = 0; b < BACKENDS; b++)
		if (is_measured[b])
			close_guest(&g[b]);
	close(fd);
	return report(choice, r);
}

static void choose_measured(size_t choice, int nr, char **wanted)
{
	for (size_t b = 0; b < BACKENDS; b++)
		is_measured[b] = !nr || b == NONE || b == choice;
	for (int i = 0; i < nr; i++) {
		size_t b = FIRST;

		while (b < BACKENDS && strcmp(names[b], wanted[i]) != 0)
			b++;
		if (b == BACKENDS)
			bench_die("no backend is called %s", wanted[i]);
		is_measured[b] = true;
	}
}

/* What is written, and the machine's own needs. */
static bool fits(const struct row *r)
{
	uint64_t free_pages = (uint64_t)sysconf(_SC_AVPHYS_PAGES);

	return r->gib * GIB_PAGES / r->step + GIB_PAGES < free_pages;
}

int main(int argc, char **argv)
{
	uint64_t gib = argc > 1 ? strtoull(argv[1], NULL, 10) : 0;
	double percent = argc > 2 ? strtod(argv[2], NULL) : 0;
	static struct row rows[] = {
		{1, 1000, 0.1, 31}, {1, 100, 1, 15}, {1, 2, 50, 5},
		{8, 1000, 0.1, 15}, {8, 100, 1, 7},  {8, 2, 50, 3},
	};
	size_t choice = auto_choice();
	double worst = 1;

	choose_measured(choice, argc > 3 ? argc - 3 : 0, argv + 3);
	printf("  --dirty=auto is %s here; guest + harvest, medians\n", names[choice]);
	for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
		if ((gib && rows[i].gib != gib) || (percent > 0 && rows[i].percent != percent))
			continue;
		if (fits(&rows[i])) {
			double ratio = measure(choice, &rows[i]);

			worst = MAX(worst, ratio);
		} else {
			printf("  %llu GiB, %4.1f %% dirty:  left out, too little free memory\n",
			       (unsigned long long)rows[i].gib, rows[i].percent);
		}
	}
	bench_ratio("backends", worst, BENCH_AT_MOST, 1.1);
	return 0;
}
