/* SPDX-License-Identifier: MIT */
/*
 * Goal: a page is stored once in its domain (VM, owner, store), across epochs, VMs,
 * restarts and within one epoch, and never shared beyond it; what duplicates cost a
 * restore in reads keeps the limit of epoch.c (E5); a table at its limit still finds
 * runs of old pages.
 * Method: epochs of random pages beside a model of what each domain has; extents
 * counted from the committed maps; every epoch read back and compared.
 */
#include "snapd/store/internal.h"
#include "tests/lib/store_model.h"

#define PAGE	4096u
#define FRAMES	1024u
#define VMS	3u
#define VALUES	2000u
#define NR_MANY 9000u /* pages: more than the smallest table has room for */

struct guest {
	uint8_t id[16];
	uint64_t timeline;
	struct pagemap *live;
	struct snapd_point head;
	uint64_t values[NR_MANY];
};

struct world {
	struct rand rand;
	char *dir;
	struct store_config config;
	struct store *s;
	struct guest vms[VMS];	  /* 0 and 1 have the same owner */
	bool stored[VMS][VALUES]; /* by domain */
	_Alignas(4096) uint8_t buf[PAGE];
};

static uint64_t same_gfn(uint32_t i)
{
	return i;
}

static void open_world(struct world *w)
{
	CHECK_OK(store_open(&w->config, &w->s, &e));
	for (uint32_t i = 0; i < VMS; i++) {
		struct store_vm vm = {.arch = "x86_64", .page_size = PAGE, .uid = 1000 + i / 2};

		snprintf(vm.name, sizeof(vm.name), "vm-%u", i);
		CHECK_OK(store_vm_register(w->s, &vm, &e));
		memcpy(w->vms[i].id, vm.id, sizeof(vm.id));
		store_vm_deinit(&vm);
	}
}

static struct world *make_world(uint64_t seed, struct store_config config)
{
	struct world *w = aligned_alloc(4096, ALIGN_UP(sizeof(*w), 4096));

	CHECK(w);
	memset(w, 0, sizeof(*w));
	w->rand = rand_of(seed);
	w->dir = memory_dir();
	w->config = config;
	w->config.dir = w->dir;
	w->config.create = true;
	w->config.segment_bytes = SEG_BYTES_MIN;
	open_world(w);
	for (uint32_t i = 0; i < VMS; i++) {
		struct guest *g = &w->vms[i];

		CHECK_OK(store_timeline_create(w->s, g->id, (struct snapd_point){0}, &g->timeline,
					       &e));
		CHECK(!pagemap_create(true, &g->live));
		memset(g->values, 0xff, sizeof(g->values));
	}
	return w;
}

static void destroy_world(struct world *w)
{
	for (uint32_t i = 0; i < VMS; i++)
		pagemap_destroy(w->vms[i].live);
	store_close(w->s);
	remove_tree(w->dir);
	free(w->dir);
	free(w);
}

static struct epoch *begin(struct world *w, struct guest *g)
{
	struct epoch *ep;

	CHECK_OK(epoch_begin(w->s, g->id, g->timeline, PAGE, g->live, &ep, &e));
	return ep;
}

static void put(struct world *w, struct epoch *ep, struct guest *g, uint32_t i, uint64_t value)
{
	struct epoch_page page = make_page(w->s, w->buf, PAGE, i, value);

	CHECK_OK(epoch_put(ep, &page, 1, &e));
	g->values[i] = value;
}

static struct epoch_stats commit(struct epoch *ep, struct guest *g)
{
	struct epoch_stats stats;

	CHECK_OK(epoch_commit(ep, NULL, 0, NULL, &g->head, NULL, &stats, &e));
	CHECK(!stats.collisions);
	CHECK(stats.pages_in == stats.zero + stats.unchanged + stats.duplicate + stats.stored);
	CHECK(stats.declined <= stats.stored);
	return stats;
}

static void check_guest(struct world *w, const struct guest *g, uint32_t nr)
{
	struct store_reader *reader;

	CHECK_OK(store_reader_create(w->s, PAGE, &reader, &e));
	check_point(w->s, reader, PAGE, g->head, same_gfn, g->values, nr);
	store_reader_destroy(reader);
}

/* ---- domains ---- */

static uint32_t domain_of(const struct world *w, uint32_t vm)
{
	return w->config.dedup == STORE_DEDUP_STORE ? 0
	       : w->config.dedup == STORE_DEDUP_VM  ? vm
						    : vm / 2;
}

/* Random pages of one VM; only those that its domain has not yet are stored. */
static void run_epoch(struct world *w, uint32_t vm)
{
	bool *have = w->stored[domain_of(w, vm)];
	struct guest *g = &w->vms[vm];
	struct epoch *ep = begin(w, g);
	uint64_t fresh = 0, n = rand_below(&w->rand, 300);
	struct epoch_stats stats;

	for (uint64_t i = 0; i < n; i++) {
		uint32_t frame = (uint32_t)(i * FRAMES / n);
		uint64_t value = 1 + rand_below(&w->rand, VALUES - 1);

		fresh += w->config.dedup == STORE_DEDUP_OFF ? g->values[frame] != value
							    : !have[value];
		have[value] = true;
		put(w, ep, g, frame, value);
	}
	stats = commit(ep, g);
	CHECK(stats.stored == fresh && !stats.declined);
	check_guest(w, g, FRAMES);
}

static void abort_epoch(struct world *w, uint32_t vm)
{
	struct guest *g = &w->vms[vm], copy = *g;
	struct epoch *ep = begin(w, g);

	for (uint32_t i = 0; i < 100; i++)
		put(w, ep, g, i, 1 + rand_below(&w->rand, VALUES - 1));
	epoch_abort(ep);
	*g = copy;
}

static void reopen(struct world *w)
{
	store_close(w->s);
	open_world(w);
}

static void test_domain(uint64_t seed, enum store_dedup domain, uint32_t steps)
{
	struct store_config config = {.dedup = domain, .dedup_pages_per_read = 1};
	struct world *w = make_world(seed, config);

	for (uint32_t i = 0; i < steps; i++) {
		uint32_t vm = (uint32_t)rand_below(&w->rand, VMS);

		switch (rand_below(&w->rand, 8)) {
		case 0:
			reopen(w);
			break;
		case 1:
			abort_epoch(w, vm);
			break;
		default:
			run_epoch(w, vm);
		}
	}
	destroy_world(w);
}

/* ---- two epochs at once ---- */

/* What is in flight is a twin for its own epoch only, and after the commit for all. */
static void test_in_flight(uint64_t seed)
{
	struct world *w = make_world(seed, (struct store_config){0});
	struct guest *a = &w->vms[0], *b = &w->vms[1];
	struct epoch *ea = begin(w, a), *eb = begin(w, b);
	struct epoch_stats stats;

	put(w, ea, a, 0, 5);
	put(w, eb, b, 0, 5);
	put(w, ea, a, 1, 5);
	stats = commit(ea, a);
	CHECK(stats.stored == 1 && stats.duplicate == 1);
	put(w, eb, b, 1, 5);
	stats = commit(eb, b);
	CHECK(stats.stored == 1 && stats.duplicate == 1);
	check_guest(w, a, FRAMES);
	check_guest(w, b, FRAMES);
	destroy_world(w);
}

/* What an aborted epoch wrote is written over. */
static void test_aborted(uint64_t seed)
{
	struct world *w = make_world(seed, (struct store_config){0});
	struct guest *a = &w->vms[0], *b = &w->vms[1], *c = &w->vms[2], before = *a;
	struct epoch *ea = begin(w, a), *eb = begin(w, b), *ec;

	for (uint32_t i = 0; i < 600; i++)
		put(w, ea, a, i, 1 + i);
	CHECK_OK(append_settle(&ea->append, &e));
	for (uint32_t i = 0; i < 600; i++)
		put(w, eb, b, i, 1 + i);
	epoch_abort(ea);
	*a = before;
	ec = begin(w, c);
	for (uint32_t i = 0; i < 600; i++)
		put(w, ec, c, i, 10000 + i);
	commit(ec, c);
	CHECK(commit(eb, b).stored == 600);
	check_guest(w, b, FRAMES);
	ea = begin(w, a);
	for (uint32_t i = 0; i < 600; i++)
		put(w, ea, a, i, 1 + i);
	commit(ea, a);
	check_guest(w, a, FRAMES);
	destroy_world(w);
}

/* ---- reads of a restore ---- */

static int compare_locs(const void *a, const void *b)
{
	loc_t x = *(const loc_t *)a, y = *(const loc_t *)b;

	return (x > y) - (x < y);
}

/* Extents of pages that the map after an epoch has and the one before it had not, apart
 * from those in batches that are new. */
static uint64_t count_reads(const struct pagemap *before, const struct pagemap *after,
			    const struct pagemap *others)
{
	loc_t locs[FRAMES];
	uint64_t nr = 0, reads = 0, gfn;
	struct pagemap_iter it;
	loc_t loc;

	CHECK(!pagemap_iter_init(&it, others));
	while (pagemap_iter_next(&it, &gfn, &loc))
		for (uint32_t i = 0; i < FRAMES; i++)
			if (pagemap_get(after, i) == loc && pagemap_get(before, i) != loc) {
				locs[nr++] = loc;
				break;
			}
	pagemap_iter_deinit(&it);
	qsort(locs, nr, sizeof(*locs), compare_locs);
	for (uint64_t i = 0; i < nr; i++)
		reads += !i || loc_batch(locs[i]) != loc_batch(locs[i - 1]) ||
			 locs[i] - locs[i - 1] > 4;
	return reads;
}

/* VM 0 has all values once; VM 1, of the same owner, gets random ones of them. */
static void test_limit(uint64_t seed, uint32_t rounds)
{
	struct world *w = make_world(seed, (struct store_config){0});
	struct guest *a = &w->vms[0], *b = &w->vms[1];
	struct epoch *ep = begin(w, a);
	uint64_t declined = 0, duplicate = 0;

	for (uint32_t i = 0; i < FRAMES; i++)
		put(w, ep, a, i, 1 + i);
	commit(ep, a);
	for (uint32_t round = 0; round < rounds; round++) {
		uint64_t n = 1 + rand_below(&w->rand, FRAMES), run = 1 + rand_below(&w->rand, 12);
		uint64_t value = 0;
		struct pagemap *before;
		struct epoch_stats stats;

		CHECK(!pagemap_clone(b->live, &before));
		ep = begin(w, b);
		for (uint32_t i = 0; i < n; i++) {
			value = i % run ? value + 1 : 1 + rand_below(&w->rand, 3 * FRAMES);
			put(w, ep, b, i, value);
		}
		stats = commit(ep, b);
		CHECK(count_reads(before, b->live, a->live) <=
		      DEDUP_READS_FREE + (stats.stored + stats.duplicate) / DEDUP_PAGES_PER_READ);
		declined += stats.declined;
		duplicate += stats.duplicate;
		check_guest(w, b, FRAMES);
		pagemap_destroy(before);
	}
	CHECK(duplicate && (declined || rounds < 8));
	destroy_world(w);
}

/* ---- a table that forgets ---- */

static void test_forgetting(uint64_t seed)
{
	struct world *w = make_world(seed, (struct store_config){.dedup_bytes = 1});
	struct guest *a = &w->vms[0], *b = &w->vms[1];
	struct epoch *ep = begin(w, a);
	struct epoch_stats stats;

	for (uint32_t i = 0; i < NR_MANY; i++)
		put(w, ep, a, i, 1 + i);
	CHECK(commit(ep, a).stored == NR_MANY);
	CHECK(dedup_evicts(&w->s->dedup) && dedup_bytes(&w->s->dedup) <= 64u << 10);
	/* The oldest of them, in the same order, in another VM. */
	ep = begin(w, b);
	for (uint32_t i = 0; i < NR_MANY / 4; i++)
		put(w, ep, b, i, 1 + i);
	stats = commit(ep, b);
	CHECK(stats.duplicate > NR_MANY / 4 * 3 / 4);
	check_guest(w, b, NR_MANY / 4);
	destroy_world(w);
}

int main(int argc, char **argv)
{
	uint32_t n = argc > 1 ? (uint32_t)atoi(argv[1]) : 12;
	uint64_t seed = rand_seed();

	test_domain(seed, STORE_DEDUP_OWNER, n);
	test_domain(seed + 1, STORE_DEDUP_VM, n);
	test_domain(seed + 2, STORE_DEDUP_STORE, n);
	test_domain(seed + 3, STORE_DEDUP_OFF, n / 2);
	test_in_flight(seed);
	test_aborted(seed);
	test_limit(seed + 4, n);
	test_forgetting(seed + 5);
	printf("%u steps\n", n);
	return 0;
}
