/* SPDX-License-Identifier: MIT */
/* A store and one VM in it for benchmarks; see store_run.h. */
#include "bench/store_run.h"

#include <errno.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "bench/bench.h"
#include "snapd/store/pageid.h"
#include "snapd/util/cleanup.h"

#define STAGED 256u

void run_check(int r, const struct err *e)
{
	if (r < 0)
		bench_die("%s", e->text);
}

/* ---- directories ---- */

static char base_dir[4096];

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

static void remove_tree(const char *path)
{
	nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static void remove_base(void)
{
	remove_tree(base_dir);
}

const char *run_dir(const char *prefix)
{
	const char *base = getenv("SNAPD_BENCH_DIR");

	snprintf(base_dir, sizeof(base_dir), "%s/%s-XXXXXX", base ? base : ".", prefix);
	if (!mkdtemp(base_dir))
		bench_die("%s: %s", base_dir, strerror(errno));
	atexit(remove_base);
	return base_dir;
}

/* ---- the store ---- */

static void open_vm(struct store_run *s, const struct store_config *config)
{
	struct err e = {0};

	s->vm = (struct store_vm){.name = "bench", .arch = "x86_64", .page_size = RUN_PAGE};
	run_check(store_open(config, &s->store, &e), &e);
	run_check(store_vm_register(s->store, &s->vm, &e), &e);
}

void store_run_init(struct store_run *s, const struct store_config *config)
{
	struct store_config create = *config;
	struct err e = {0};

	*s = (struct store_run){.dir = strdup(config->dir),
				.staging = aligned_alloc(RUN_PAGE, STAGED * RUN_PAGE)};
	if (!s->dir || !s->staging)
		bench_die("no memory");
	create.create = true;
	open_vm(s, &create);
	run_check(store_timeline_create(s->store, s->vm.id, (struct snapd_point){0}, &s->timeline,
					&e),
		  &e);
	run_check(pagemap_create(true, &s->live), &e);
}

static void move_tree(const char *from, const char *to)
{
	char command[2 * sizeof(base_dir) + 64];

	snprintf(command, sizeof(command), "mv '%s' '%s' && sync -f '%s'", from, to, to);
	if (system(command))
		bench_die("failed: %s", command);
}

void store_run_reopen(struct store_run *s, const struct store_config *config)
{
	struct store_timeline tl;
	struct err e = {0};

	pagemap_destroy(s->live);
	store_close(s->store);
	if (strcmp(s->dir, config->dir)) {
		move_tree(s->dir, config->dir);
		free(s->dir);
		s->dir = strdup(config->dir);
	}
	open_vm(s, config);
	run_check(store_timeline_get(s->store, s->timeline, &tl, &e), &e);
	run_check(store_map_load(s->store, (struct snapd_point){tl.id, tl.head}, true, &s->live,
				 &e),
		  &e);
}

void store_run_add_vm(struct store_run *s, const char *name)
{
	struct err e = {0};

	snprintf(s->vm.name, sizeof(s->vm.name), "%s", name);
	run_check(store_vm_register(s->store, &s->vm, &e), &e);
	run_check(store_timeline_create(s->store, s->vm.id, (struct snapd_point){0}, &s->timeline,
					&e),
		  &e);
	pagemap_destroy(s->live);
	run_check(pagemap_create(true, &s->live), &e);
}

void store_run_deinit(struct store_run *s)
{
	pagemap_destroy(s->live);
	store_close(s->store);
	remove_tree(s->dir);
	free(s->staging);
	free(s->dir);
}

/* ---- epochs ---- */

struct epoch *run_begin(struct store_run *s)
{
	struct epoch *ep;
	struct err e = {0};

	run_check(epoch_begin(s->store, s->vm.id, s->timeline, RUN_PAGE, s->live, &ep, &e), &e);
	return ep;
}

void run_put(struct store_run *s, struct epoch *ep, const uint8_t *ram, const uint32_t *index,
	     uint32_t nr)
{
	const struct page_secret *key = store_secret(s->store);
	struct epoch_page pages[STAGED];
	struct err e = {0};

	for (uint32_t first = 0; first < nr; first += STAGED) {
		uint32_t n = MIN(STAGED, nr - first);

		for (uint32_t i = 0; i < n; i++) {
			uint32_t gfn = index ? index[first + i] : first + i;
			uint32_t next = index && i + 1 < n ? index[first + i + 1] : gfn + 1;
			uint8_t *dst = s->staging + (size_t)i * RUN_PAGE;

			pages[i] = (struct epoch_page){
				gfn, dst,
				pageid_copy_ahead(key, dst, ram + (size_t)gfn * RUN_PAGE,
						  ram + (size_t)next * RUN_PAGE, RUN_PAGE)};
		}
		run_check(epoch_put(ep, pages, n, &e), &e);
	}
}

uint64_t run_commit(struct epoch *ep, struct epoch_stats *ret)
{
	const struct snapshot_meta meta = {0};
	struct epoch_stats stats;
	struct snapd_point point;
	uint64_t snapshot;
	struct err e = {0};

	run_check(epoch_commit(ep, NULL, 0, &meta, &point, &snapshot, ret ? ret : &stats, &e), &e);
	return snapshot;
}

double run_epoch(struct store_run *s, const uint8_t *ram, const uint32_t *index, uint32_t nr,
		 struct epoch_stats *ret)
{
	uint64_t start = bench_now_ns();
	struct epoch *ep = run_begin(s);

	run_put(s, ep, ram, index, nr);
	run_commit(ep, ret);
	return (double)(bench_now_ns() - start) / 1e9;
}

uint64_t run_scattered(struct store_run *s, uint8_t *ram, uint32_t nr, uint32_t nr_pages,
		       uint64_t *seed)
{
	_cleanup_free_ uint32_t *pages = bench_scattered(nr, nr_pages, bench_rand(seed));
	struct epoch *ep = run_begin(s);

	for (uint32_t i = 0; i < nr; i++)
		*(uint64_t *)(ram + (size_t)pages[i] * RUN_PAGE) = bench_rand(seed);
	run_put(s, ep, ram, pages, nr);
	return run_commit(ep, NULL);
}

/* ---- restores ---- */

static int compare_reads(const void *a, const void *b)
{
	loc_t x = ((const struct page_read *)a)->loc, y = ((const struct page_read *)b)->loc;

	return (x > y) - (x < y);
}

/* The pages of the map that have bytes, by place. */
static size_t list_pages(const struct pagemap *m, uint8_t *ram, uint32_t nr_pages,
			 struct page_read **ret)
{
	struct page_read *reads = calloc(pagemap_nr(m) + 1, sizeof(*reads));
	struct pagemap_iter it;
	uint64_t gfn;
	size_t nr = 0;
	loc_t loc;

	if (!reads || pagemap_iter_init(&it, m))
		bench_die("no memory");
	while (pagemap_iter_next(&it, &gfn, &loc)) {
		if (gfn >= nr_pages)
			bench_die("a page beyond the guest");
		if (loc_kind(loc) == LOC_PAGE)
			reads[nr++] = (struct page_read){
				.gfn = gfn, .loc = loc, .dst = ram + gfn * RUN_PAGE};
	}
	pagemap_iter_deinit(&it);
	qsort(reads, nr, sizeof(*reads), compare_reads);
	*ret = reads;
	return nr;
}

double run_restore(struct store_run *s, struct snapd_point at, uint8_t *ram, uint32_t nr_pages)
{
	uint64_t start = bench_now_ns();
	struct store_reader *reader;
	struct page_read *reads;
	struct pagemap *m;
	struct err e = {0};
	size_t nr;

	run_check(store_map_load(s->store, at, false, &m, &e), &e);
	nr = list_pages(m, ram, nr_pages, &reads);
	run_check(store_reader_create(s->store, RUN_PAGE, &reader, &e), &e);
	run_check(store_read_pages(reader, reads, nr, &e), &e);
	store_reader_destroy(reader);
	pagemap_destroy(m);
	free(reads);
	return (double)(bench_now_ns() - start) / 1e9;
}
