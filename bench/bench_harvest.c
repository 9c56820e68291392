/* SPDX-License-Identifier: MIT */
/*
 * bench harvest: what harvest adds to the least that a ring costs, per entry.
 *
 * A real guest dirties nr pages (sequential, then scattered), which fills its
 * ring.  Then, in turn within each round:
 *   bare     a loop that marks each entry, then KVM_RESET_DIRTY_RINGS
 *   harvest  harvest_ring() through a slot table, the same RESET, and each frame
 *            published to a set
 * The ratio's goal is for the whole: collect + translate + RESET + publish.
 */
#include "bench/bench.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <linux/kvm.h>

#include "snapd/gpaset.h"
#include "snapd/harvest.h"
#include "tests/lib/kvm_guest.h"

#define ENTRIES	   65536u
#define FILL	   32768u
#define DATA_PAGES 65536u
#define ROUNDS	   21

GUEST_FN static void writer(uint64_t gpa, uint64_t nr, uint64_t stride, uint64_t mask)
{
	for (uint64_t round = 1;; round++) {
		for (uint64_t i = 0; i < nr; i++)
			guest_write(gpa + ((i * stride) & mask) * 4096, round);
		guest_tell(round);
	}
}

struct side {
	struct kvm_guest g;
	struct slot_table table;
	struct harvest_ring ring;
	struct gpaset set;
	uint64_t *frames;
};

static void fill(struct side *s)
{
	uint64_t told;

	if (kvm_guest_run(&s->g, 0) != KVM_EXIT_MMIO || !kvm_guest_told(&s->g, 0, &told))
		bench_die("bench harvest: the guest did not come back");
}

static void reset(struct side *s, uint64_t want)
{
	int r = kvm_guest_reset_rings(&s->g);

	if (r < 0 || (uint64_t)r != want)
		bench_die("bench harvest: RESET gave back %d of %llu", r, (unsigned long long)want);
}

static double bare(struct side *s, double *reset_ns)
{
	uint64_t start, mid;
	uint32_t n;

	fill(s);
	s->g.vcpus[0].next = s->ring.next;
	start = bench_now_ns();
	n = kvm_guest_harvest(&s->g, 0, NULL, UINT32_MAX);
	mid = bench_now_ns();
	reset(s, n);
	*reset_ns = (double)(bench_now_ns() - mid) / n;
	s->ring.next = s->g.vcpus[0].next;
	return (double)(bench_now_ns() - start) / n;
}

static double harvest(struct side *s, double *collect_ns)
{
	struct harvest_result res = {0};
	uint64_t start, mid;
	size_t n;

	fill(s);
	start = bench_now_ns();
	n = harvest_ring(&s->ring, &s->table, s->frames, ENTRIES, &res);
	mid = bench_now_ns();
	reset(s, res.collected);
	for (size_t i = 0; i < n; i++)
		gpaset_add(&s->set, s->frames[i]);
	*collect_ns = (double)(mid - start) / n;
	if (n != res.collected || res.unresolved)
		bench_die("bench harvest: %zu of %llu entries resolved", n,
			  (unsigned long long)res.collected);
	return (double)(bench_now_ns() - start) / n;
}

static void side_init(struct side *s, uint64_t stride)
{
	struct kvm_guest_config config = {
		.ring_entries = ENTRIES,
		.data_bytes = DATA_PAGES * KVM_GUEST_PAGE,
	};
	struct slot_run run = {.nr_frames = DATA_PAGES};
	int r = kvm_guest_create(&s->g, &config);
	int id;

	if (r == -ENODEV || r == -ENOTSUP)
		bench_skip("harvest", "no usable /dev/kvm with a dirty ring");
	if (r < 0 || slot_table_init(&s->table, 256) < 0)
		bench_die("bench harvest: no guest: %s", strerror(-r));
	id = slot_table_add(&s->table, 0, DATA_PAGES, &run, 1);
	if (kvm_guest_slot(&s->g, (uint32_t)id, KVM_MEM_LOG_DIRTY_PAGES, KVM_GUEST_DATA_GPA,
			   config.data_bytes, s->g.data) < 0)
		bench_die("bench harvest: no memslot");
	memset(s->g.data, 1, config.data_bytes);
	if (kvm_guest_add_vcpu(&s->g, GUEST_CODE(writer), KVM_GUEST_DATA_GPA, FILL, stride,
			       DATA_PAGES - 1) < 0)
		bench_die("bench harvest: no vCPU");
	s->ring = (struct harvest_ring){.gfns = s->g.vcpus[0].ring, .nr = ENTRIES};
	s->frames = malloc(ENTRIES * sizeof(*s->frames));
	gpaset_init(&s->set,
		    mmap(NULL, gpaset_bytes(DATA_PAGES), PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
		    DATA_PAGES);
}

static void side_deinit(struct side *s)
{
	munmap(s->set.bits, gpaset_bytes(DATA_PAGES));
	free(s->frames);
	slot_table_deinit(&s->table);
	kvm_guest_destroy(&s->g);
}

static double measure(const char *what, uint64_t stride)
{
	double b[ROUNDS], h[ROUNDS], ratio[ROUNDS], resets[ROUNDS], collects[ROUNDS];
	struct side s = {0};
	double drop, r;

	side_init(&s, stride);
	bare(&s, &drop);
	harvest(&s, &drop);
	for (int i = 0; i < ROUNDS; i++) {
		if (i % 2) {
			h[i] = harvest(&s, &collects[i]);
			b[i] = bare(&s, &resets[i]);
		} else {
			b[i] = bare(&s, &resets[i]);
			h[i] = harvest(&s, &collects[i]);
		}
		ratio[i] = h[i] / b[i];
	}
	side_deinit(&s);
	r = bench_median(ratio, ROUNDS);
	bench_note("%s: %u entries; bare loop + RESET %.1f ns/entry (RESET alone %.1f), "
		   "harvest + RESET + publish %.1f ns/entry (harvest_ring %.1f)",
		   what, FILL, bench_median(b, ROUNDS), bench_median(resets, ROUNDS),
		   bench_median(h, ROUNDS), bench_median(collects, ROUNDS));
	return r;
}

int main(void)
{
	bench_pin(0);
	bench_ratio("harvest", measure("sequential", 1), BENCH_AT_MOST, 1.5);
	bench_ratio("harvest", measure("scattered", 40503), BENCH_AT_MOST, 1.5);
	return 0;
}
