/* SPDX-License-Identifier: MIT */
/*
 * Goal: gc gives back what is dead in segments that hold both live and dead pages, and
 * nothing else; cancelled anywhere, it is finished by the next run.
 * Method: random histories of one VM with more snapshots than stay, some deleted, gc
 * stopped after a random number of bytes, the store opened again in between; then a whole
 * gc, and
 *   - each snapshot has every byte, read by a reader that knows the headers from before, and
 *     in hardly more reads than when it was taken;
 *   - store_check() of every byte finds nothing;
 *   - what is dead and was not named by an epoch that others build on is, at the end, no more
 *     than a third of what the segments take;
 *   - another gc gives nothing back.
 *
 *   gc [HISTORIES]
 */
#include "snapd/store/account.h"
#include "snapd/store/check.h"
#include "snapd/io_uring_reader.h"
#include "tests/lib/store_model.h"

#define FRAMES 2000u
#define PAGE   4096u
#define SNAPS  24u

struct snap {
	uint64_t id, values[FRAMES];
	struct snapd_point point;
	uint64_t reads; /* the first time; 0: not read yet */
};

static struct {
	struct rand rand;
	char *dir;
	const char *how, *key;
	struct store *s;
	struct store_reader *reader;
	uint8_t vm[16], buf[PAGE];
	uint64_t timeline, next, stop_at;
	struct pagemap *live;
	uint64_t values[FRAMES];
	struct snap snaps[SNAPS];
	uint64_t rewrites;
} w;

/* ---- how many reads a round of pages takes (linked with --wrap) ---- */

static uint64_t nr_reads;

void __real_reader_queue(struct reader *r, struct read_group *g, struct read_req *reqs, size_t nr);
void __wrap_reader_queue(struct reader *r, struct read_group *g, struct read_req *reqs, size_t nr);
void __wrap_reader_queue(struct reader *r, struct read_group *g, struct read_req *reqs, size_t nr)
{
	nr_reads += nr;
	__real_reader_queue(r, g, reqs, nr);
}

static uint64_t gfn_of(uint32_t i)
{
	return i;
}

static void open_world(void)
{
	w.s = open_store_as(w.dir, w.how, w.key);
	CHECK_OK(store_reader_create(w.s, PAGE, &w.reader, &e));
}

static void close_world(void)
{
	store_reader_destroy(w.reader);
	store_close(w.s);
}

static void begin(void)
{
	struct store_vm vm = {.name = "guest", .arch = "x86_64", .page_size = PAGE};

	open_world();
	CHECK_OK(store_vm_register(w.s, &vm, &e));
	memcpy(w.vm, vm.id, sizeof(w.vm));
	store_vm_deinit(&vm);
	CHECK_OK(store_timeline_create(w.s, w.vm, (struct snapd_point){0}, &w.timeline, &e));
	CHECK_OK(store_map_load(w.s, (struct snapd_point){w.timeline, 0}, true, &w.live, &e));
	memset(w.values, 0xff, sizeof(w.values));
}

static void take(struct snap *sn, uint32_t changed)
{
	struct epoch_stats stats;
	struct snapshot_meta meta = {.note = ""};
	struct epoch *ep;

	CHECK_OK(epoch_begin(w.s, w.vm, w.timeline, PAGE, w.live, &ep, &e));
	for (uint32_t k = 0; k < changed; k++) {
		uint32_t i = changed == FRAMES ? k : (uint32_t)rand_below(&w.rand, FRAMES);
		struct epoch_page page;

		w.values[i] = rand_below(&w.rand, 8) ? ++w.next : 1 + rand_below(&w.rand, 50);
		page = make_page(w.s, w.buf, PAGE, i, w.values[i]);
		CHECK_OK(epoch_put(ep, &page, 1, &e));
	}
	CHECK_OK(epoch_commit(ep, "state", 5, &meta, &sn->point, &sn->id, &stats, &e));
	memcpy(sn->values, w.values, sizeof(w.values));
	sn->reads = 0;
}

static bool stop(void *opaque, uint64_t done)
{
	(void)opaque;
	return w.stop_at && done >= w.stop_at;
}

/* 1: it was stopped. */
static int gc(uint64_t stop_at, uint64_t *freed)
{
	struct gc_config c = {.live = live_timeline, .live_opaque = &w.timeline, .stop = stop};
	struct err why = {0};
	int r;

	w.stop_at = stop_at;
	r = store_gc_paced(w.s, &c, freed, &why);
	if (r && r != -ECANCELED)
		printf("gc: %d %s\n", r, why.text);
	CHECK(!r || r == -ECANCELED);
	return r != 0;
}

static void check_snaps(void)
{
	struct store_check_config c = {.read_data = true};
	struct store_check_result r;

	for (uint32_t i = 0; i < SNAPS; i++) {
		struct snap *sn = &w.snaps[i];

		if (!sn->id)
			continue;
		nr_reads = 0;
		check_point(w.s, w.reader, PAGE, sn->point, gfn_of, sn->values, FRAMES);
		/* Not one more, but where two neighbours that were read with what lay between
		 * them now go straight to two places. */
		CHECK(nr_reads && (!sn->reads || nr_reads <= sn->reads + sn->reads / 8 + 2));
		sn->reads = sn->reads ? sn->reads : nr_reads;
	}
	CHECK_OK(store_check(w.s, &c, &r, &e));
	CHECK(!r.damages && !r.losses);
}

static void check_space(void)
{
	struct account_config c = {.live = live_timeline, .live_opaque = &w.timeline};
	struct store_account a;
	struct store_stats stats;

	CHECK_OK(store_account(w.s, &c, &a, &e));
	CHECK_OK(store_get_stats(w.s, &stats, &e));
	CHECK(a.pages_unique + a.pages_shared + a.pages_live + a.pages_dead == stats.pages_stored);
	/* Beside that: one open segment, and what the head's manifests name since its checkpoint.
	 */
	CHECK(a.bytes_dead <=
	      (stats.bytes_on_disk - stats.bytes_index) / 3 + SEG_BYTES_MIN + FRAMES / 2 * PAGE);
	store_account_deinit(&a);
}

static void delete_some(void)
{
	for (uint32_t i = 0; i < SNAPS; i++)
		if (w.snaps[i].id && rand_below(&w.rand, 2)) {
			CHECK_OK(store_snapshot_delete(w.s, w.snaps[i].id, &e));
			w.snaps[i].id = 0;
		}
}

static void history(void)
{
	struct store_stats before, after;
	uint64_t freed;

	begin();
	for (uint32_t round = 0; round < 3; round++) {
		for (uint32_t i = 0; i < SNAPS; i++)
			if (!w.snaps[i].id)
				take(&w.snaps[i],
				     i % 8 ? (uint32_t)rand_below(&w.rand, 300) + 1 : FRAMES);
		CHECK(!gc(0, &freed));
		check_snaps(); /* and the reader knows the headers now */
		CHECK_OK(store_get_stats(w.s, &before, &e));
		delete_some();
		for (uint32_t n = (uint32_t)rand_below(&w.rand, 4); n; n--) {
			gc(1 + rand_below(&w.rand, 4u << 20), &freed);
			check_snaps();
			if (rand_below(&w.rand, 2))
				continue;
			close_world();
			open_world();
		}
		CHECK(!gc(0, &freed));
		check_snaps();
		CHECK_OK(store_get_stats(w.s, &after, &e));
		CHECK(after.pages_stored <= before.pages_stored);
		w.rewrites += after.pages_stored < before.pages_stored;
		CHECK(!gc(0, &freed));
		CHECK(!freed);
	}
	for (uint32_t i = 0; i < SNAPS; i++)
		if (i % 8 && w.snaps[i].id) {
			CHECK_OK(store_snapshot_delete(w.s, w.snaps[i].id, &e));
			w.snaps[i].id = 0;
		}
	CHECK(!gc(0, &freed));
	close_world();
	open_world();
	check_snaps();
	check_space();
	close_world();
	pagemap_destroy(w.live);
}

int main(int argc, char **argv)
{
	static const char *const how[] = {"none", "lz4", "zstd:1"};
	uint32_t nr = argc > 1 ? (uint32_t)atoi(argv[1]) : 3;
	char key[64];

	w.rand = rand_of(rand_seed());
	for (uint32_t i = 0; i < nr; i++) {
		w.dir = memory_dir();
		w.how = how[i % 3];
		snprintf(key, sizeof(key), "%s.key", w.dir);
		w.key = i % 3 == 1 ? key : NULL;
		memset(w.snaps, 0, sizeof(w.snaps));
		if (w.key) {
			FILE *f = fopen(key, "we");

			CHECK(f && !fchmod(fileno(f), 0600));
			for (int b = 0; b < 64; b++)
				fputc((int)rand_below(&w.rand, 256), f);
			CHECK(!fclose(f));
		}
		history();
		remove_tree(w.dir);
		unlink(key);
		free(w.dir);
	}
	CHECK(w.rewrites); /* the test is of something */
	printf("%u histories, pages were reclaimed in %llu rounds\n", nr,
	       (unsigned long long)w.rewrites);
	return 0;
}
