/* SPDX-License-Identifier: MIT */
/*
 * Goal: when a write fails, is cut short, or the disk is full, at whichever point,
 * the epoch fails with a reason, the live map is as before, nothing committed is
 * lost, and the same epoch succeeds when the disk is well again.
 * Method: (1) fail the n-th write or sync of segments for every n, in three ways;
 * (2) the store's own limit; (3) a tmpfs of a few MiB, filled to the brim, where
 * the index's writes fail too (needs root and mount namespaces, else left out).
 */
#include <sched.h>
#include <sys/mount.h>

#include "snapd/util/log.h"
#include "tests/lib/store_model.h"

#define FRAMES 700u
#define PAGE   4096u

static uint64_t gfn_of(uint32_t i)
{
	return 3 * (uint64_t)i;
}

/* ---- one guest and its model ---- */

struct guest {
	struct store *s;
	struct store_reader *reader;
	uint8_t vm[16];
	uint64_t timeline;
	struct pagemap *live;
	uint64_t values[FRAMES];   /* at the head */
	uint64_t next[FRAMES];	   /* with the epoch that is tried */
	uint64_t old[512][FRAMES]; /* by snapshot */
	struct snapd_point points[512];
	uint64_t ids[512];
	uint32_t nr;
	struct rand rand;
};

static void guest_open(struct guest *g, const struct store_config *config)
{
	struct store_vm vm = {.name = "guest", .arch = "x86_64", .page_size = PAGE};

	CHECK_OK(store_open(config, &g->s, &e));
	CHECK_OK(store_reader_create(g->s, PAGE, &g->reader, &e));
	CHECK_OK(store_vm_register(g->s, &vm, &e));
	memcpy(g->vm, vm.id, sizeof(g->vm));
	store_vm_deinit(&vm);
	if (!g->timeline) {
		CHECK_OK(store_timeline_create(g->s, g->vm, (struct snapd_point){0, 0},
					       &g->timeline, &e));
		memset(g->values, 0xff, sizeof(g->values));
		CHECK(pagemap_create(true, &g->live) == 0);
	}
}

static void guest_close(struct guest *g)
{
	store_reader_destroy(g->reader);
	store_close(g->s);
}

static void choose_next(struct guest *g, uint32_t one_in)
{
	memcpy(g->next, g->values, sizeof(g->next));
	for (uint32_t i = 0; i < FRAMES; i++)
		if (!rand_below(&g->rand, one_in))
			g->next[i] = rand_below(&g->rand, 8) ? rand_next(&g->rand)
							     : rand_below(&g->rand, 3);
}

static int put_next(struct guest *g, struct epoch *ep, struct err *e)
{
	_cleanup_free_ uint8_t *buf = aligned_alloc(PAGE, PAGE);
	int r = 0;

	for (uint32_t i = 0; !r && i < FRAMES; i++) {
		struct epoch_page page;

		if (g->next[i] == g->values[i])
			continue;
		page = make_page(g->s, buf, PAGE, gfn_of(i), g->next[i]);
		r = epoch_put(ep, &page, 1, e);
	}
	return r;
}

static int try_epoch(struct guest *g, struct err *e)
{
	struct snapshot_meta meta = {.note = "try"};
	struct epoch *ep;
	int r;

	r = epoch_begin(g->s, g->vm, g->timeline, PAGE, g->live, &ep, e);
	if (r)
		return r;
	r = put_next(g, ep, e);
	if (!r)
		r = epoch_commit(ep, g->next, sizeof(g->next), &meta, &g->points[g->nr],
				 &g->ids[g->nr], NULL, e);
	if (r) {
		CHECK(e->text[0]);
		epoch_abort(ep);
		return r;
	}
	memcpy(g->values, g->next, sizeof(g->values));
	memcpy(g->old[g->nr++], g->next, sizeof(g->next));
	return 0;
}

static void check_snapshots(struct guest *g)
{
	struct store_snapshot *list;
	uint32_t kept = 0;
	size_t nr;

	for (uint32_t i = 0; i < g->nr; i++) {
		if (!g->ids[i])
			continue;
		check_point(g->s, g->reader, PAGE, g->points[i], gfn_of, g->old[i], FRAMES);
		kept++;
	}
	CHECK_OK(store_snapshot_list(g->s, NULL, &list, &nr, &e));
	CHECK(nr == kept);
	free(list);
}

/* The live map is that of the head, and no more. */
static void check_live(struct guest *g)
{
	struct pagemap *m;
	uint64_t *gfns;
	size_t nr;

	if (!g->nr)
		return;
	CHECK_OK(store_map_load(g->s, g->points[g->nr - 1], false, &m, &e));
	CHECK(pagemap_diff(m, g->live, &gfns, &nr) == 0 && nr == 0);
	free(gfns);
	pagemap_destroy(m);
}

/* ---- the n-th write ---- */

enum how { FAIL_EIO, FAIL_ENOSPC, FAIL_SHORT, NR_HOWS };
struct fault {
	uint32_t calls, at; /* at 0: well */
	enum how how;
	bool hit;
};

static int inject(void *opaque, int fd, uint64_t offset, size_t len)
{
	struct fault *f = opaque;

	if (!f->at || ++f->calls != f->at)
		return 0;
	f->hit = true;
	switch (f->how) {
	case FAIL_EIO:
		return -EIO;
	case FAIL_ENOSPC:
		return -ENOSPC;
	default:
		return len > FMT_BLOCK ? (int)(len / 2 / FMT_BLOCK * FMT_BLOCK) : 0;
	}
}

static uint32_t faulty_history(enum how how, uint32_t first, uint32_t step)
{
	static struct guest g;
	struct fault f = {.how = how};
	char *dir = temp_dir();
	struct store_config config = {.dir = dir,
				      .create = true,
				      .segment_bytes = SEG_BYTES_MIN,
				      .fault = inject,
				      .fault_opaque = &f};
	uint32_t n = 0;

	memset(&g, 0, sizeof(g));
	g.rand = rand_of(how + 77);
	guest_open(&g, &config);
	choose_next(&g, 1);
	CHECK_OK(try_epoch(&g, &e));
	for (f.at = first;; f.at += step) {
		struct err e1 = {0};
		int r;

		f.calls = 0;
		f.hit = false;
		choose_next(&g, 2);
		r = try_epoch(&g, &e1);
		if (!f.hit) {
			CHECK(!r);
			break;
		}
		n++;
		CHECK(how == FAIL_SHORT ? !r : r == (how == FAIL_EIO ? -EIO : -ENOSPC));
		check_live(&g);
		if (r) {
			uint32_t at = f.at;

			f.at = 0;
			CHECK_OK(try_epoch(&g, &e));
			f.at = at;
		}
		if (f.at % 4 == 0) {
			check_snapshots(&g);
			guest_close(&g);
			guest_open(&g, &config);
		}
	}
	check_snapshots(&g);
	guest_close(&g);
	pagemap_destroy(g.live);
	remove_tree(dir);
	free(dir);
	return n;
}

/* ---- full ---- */

/* Fill until -ENOSPC, delete the older half, reclaim, go on. */
static void fill_and_reclaim(struct guest *g, const char *what)
{
	struct err e1 = {0};
	uint32_t filled;
	uint64_t freed;
	int r;

	do {
		choose_next(g, 1);
		r = try_epoch(g, &e1);
	} while (!r && g->nr < 500);
	CHECK(r == -ENOSPC);
	printf("%s: full after %u epochs: %s\n", what, g->nr, e1.text);
	filled = g->nr;
	CHECK(filled > 3);
	check_live(g);
	check_snapshots(g);
	for (uint32_t i = 0; i < filled - 2; i++) {
		CHECK_OK(store_snapshot_delete(g->s, g->ids[i], &e));
		g->ids[i] = 0;
	}
	CHECK_OK(store_gc(g->s, live_timeline, &g->timeline, &freed, &e));
	CHECK(freed);
	CHECK_OK(try_epoch(g, &e));
	check_snapshots(g);
}

static void full_limit(void)
{
	static struct guest g;
	char *dir = temp_dir();
	struct store_config config = {
		.dir = dir, .create = true, .segment_bytes = SEG_BYTES_MIN, .max_bytes = 24u << 20};

	g.rand = rand_of(5);
	guest_open(&g, &config);
	fill_and_reclaim(&g, "limit");
	guest_close(&g);
	guest_open(&g, &config);
	check_snapshots(&g);
	guest_close(&g);
	pagemap_destroy(g.live);
	remove_tree(dir);
	free(dir);
}

/* Segments have room, but nothing else can grow: the index's own write fails. */
static void full_index(struct guest *g, const char *dir)
{
	_cleanup_free_ char *block = calloc(1, 4096);
	struct err e1 = {0};
	char path[4096];
	FILE *filler;
	int r = 0;

	snprintf(path, sizeof(path), "%s/filler", dir);
	filler = fopen(path, "w");
	CHECK(filler);
	setvbuf(filler, NULL, _IONBF, 0);
	while (fwrite(block, 4096, 1, filler) == 1)
		;
	fclose(filler);
	for (int i = 0; i < 300 && !r; i++) {
		choose_next(g, FRAMES);
		r = try_epoch(g, &e1);
	}
	printf("index: %s after %u epochs\n", e1.text, g->nr);
	CHECK(r == -ENOSPC);
	check_live(g);
	check_snapshots(g);
	CHECK(unlink(path) == 0);
	CHECK_OK(try_epoch(g, &e));
	check_snapshots(g);
}

static void full_disk(void)
{
	static struct guest g;
	struct store_config config = {.create = true, .segment_bytes = SEG_BYTES_MIN};
	char *dir = temp_dir();

	config.dir = dir;
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    mount("tmpfs", dir, "tmpfs", 0, "size=33m")) {
		printf("full disk: left out, no permission to mount a small tmpfs\n");
		rmdir(dir);
		free(dir);
		return;
	}
	g.rand = rand_of(6);
	guest_open(&g, &config);
	fill_and_reclaim(&g, "disk");
	full_index(&g, dir);
	guest_close(&g);
	guest_open(&g, &config);
	check_snapshots(&g);
	guest_close(&g);
	pagemap_destroy(g.live);
	umount2(dir, MNT_DETACH);
	rmdir(dir);
	free(dir);
}

int main(int argc, char **argv)
{
	uint32_t step = argc > 1 ? (uint32_t)atoi(argv[1]) : 1;

	log_set_level(LOG_LVL_ERR);
	for (enum how how = 0; how < NR_HOWS; how++)
		printf("%u points of failure, way %d\n", faulty_history(how, 1, step), how);
	full_limit();
	full_disk();
	return 0;
}
