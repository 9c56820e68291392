/* SPDX-License-Identifier: MIT */
/*
 * Goal: whichever call or allocation fails, the store says so in one line and goes
 * on: no crash, no leak, nothing committed is lost, and the same operation succeeds
 * when the failure is over.
 *
 * Method: for each operation of the store, for n = 1, 2, …: the n-th allocation,
 * open, read, write, sync, mapping or request of the ring fails (simdisk.h), until
 * the operation gets through without meeting the failure; writes and syncs fail in
 * several ways, up to a commit that reaches the disk, says that it did not, and is the
 * last write that the disk takes.  After each:
 *   - an error has a reason, on one line;
 *   - every snapshot that was committed is whole, and there is no other;
 *   - the operation is done again and succeeds;
 *   - when the store is closed, as many allocations and descriptors are left as
 *     before it was opened (under ASan: LeakSanitizer's verdict).
 * When the index could not say whether a commit reached the disk, the store refuses
 * everything until it is opened again; then either is right, and nothing between.
 *
 *   fail_nth [FRAMES]   of the guest
 */
#include <dirent.h>
#include <signal.h>
#include <unistd.h>

#include "snapd/store/check.h"
#include "snapd/store/internal.h"
#include "snapd/util/log.h"
#include "tests/lib/simdisk.h"
#include "tests/lib/store_model.h"

#define FRAMES_MAX 4096u
#define PAGE	   4096u
#define SNAPS_MAX  4u

struct snap {
	uint64_t id; /* 0: none */
	char name[16];
	uint64_t *values;
	struct snapd_point point;
};

static struct guest {
	char *dir;
	struct store *s;
	uint8_t vm[16];
	uint64_t timeline;
	struct pagemap *live;
	uint64_t *values, *next;
	struct snap snaps[SNAPS_MAX]; /* oldest first */
	uint32_t nr_snaps;
	struct snap tried; /* a commit of which nobody knows */
	uint64_t deleting; /* a deletion of which nobody knows */
	uint32_t nr_names, frames, nr_reopened, nr_doubts;
	struct rand rand;
	char now[128];
} g;

static uint64_t gfn_of(uint32_t i)
{
	return 2 * (uint64_t)i;
}

static uint64_t *copy_values(const uint64_t *values)
{
	uint64_t *ret;

	disk_exempt(true);
	ret = malloc(g.frames * sizeof(*ret));
	disk_exempt(false);
	CHECK(ret);
	memcpy(ret, values, g.frames * sizeof(*ret));
	return ret;
}

static void close_store(void)
{
	store_close(g.s);
	g.s = NULL;
}

/* ---- operations: each may fail, and may be done again ---- */

/* With faults of its own kind to be expected, the store makes no segment ahead: a
 * thread would make calls between those that are counted. */
static int no_fault(void *opaque, int fd, uint64_t offset, size_t len)
{
	return 0;
}

static int op_open(struct err *e)
{
	struct store_config config = {
		.dir = g.dir, .create = true, .segment_bytes = SEG_BYTES_MIN, .fault = no_fault};

	return g.s ? 0 : store_open(&config, &g.s, e);
}

static int op_register(struct err *e)
{
	struct store_vm vm = {.name = "guest", .arch = "x86_64", .page_size = PAGE};
	struct store_vm again;
	int r = store_vm_register(g.s, &vm, e);

	if (!r)
		memcpy(g.vm, vm.id, sizeof(g.vm));
	if (!r && !(r = store_vm_get(g.s, vm.id, &again, e)))
		store_vm_deinit(&again);
	store_vm_deinit(&vm);
	return r;
}

static int op_fork(struct err *e)
{
	const struct snap *from = g.nr_snaps ? &g.snaps[g.nr_snaps - 1] : NULL;
	struct snapd_point at = from ? from->point : (struct snapd_point){0, 0};
	struct pagemap *live;
	uint64_t timeline;
	int r;

	r = store_timeline_create(g.s, g.vm, at, &timeline, e);
	if (!r)
		r = store_map_load(g.s, (struct snapd_point){timeline, 0}, true, &live, e);
	if (r)
		return r;
	pagemap_destroy(g.live);
	g.live = live;
	g.timeline = timeline;
	if (from)
		memcpy(g.values, from->values, g.frames * sizeof(*g.values));
	return 0;
}

/* Always the same frames, so that a trial makes the calls that the one before made. */
static void choose_next(void)
{
	struct rand r = rand_of(1);

	memcpy(g.next, g.values, g.frames * sizeof(*g.next));
	for (uint32_t i = 0; i < g.frames; i++) {
		bool change = !rand_below(&r, 3), known = !rand_below(&r, 4);

		if (g.values[i] == NO_PAGE || change)
			g.next[i] = known ? rand_below(&r, 5) : rand_next(&g.rand) >> 1;
	}
}

static int put_pages(struct epoch *ep, struct err *e)
{
	static uint8_t buf[PAGE] __attribute__((aligned(PAGE)));
	int r = 0;

	for (uint32_t i = 0; !r && i < g.frames; i++) {
		struct epoch_page page;

		if (g.next[i] == g.values[i] && i % 8)
			continue;
		page = make_page(g.s, buf, PAGE, gfn_of(i), g.next[i]);
		r = epoch_put(ep, &page, 1, e);
	}
	return r ? r : epoch_gone(ep, gfn_of(g.frames), 5, e);
}

static void drop_oldest(void)
{
	free(g.snaps[0].values);
	memmove(&g.snaps[0], &g.snaps[1], sizeof(g.snaps) - sizeof(g.snaps[0]));
	g.nr_snaps--;
}

static void add_snapshot(const struct snap *sn)
{
	CHECK(g.nr_snaps < SNAPS_MAX);
	g.snaps[g.nr_snaps] = *sn;
	g.snaps[g.nr_snaps++].values = copy_values(g.next);
	memcpy(g.values, g.next, g.frames * sizeof(*g.values));
}

static int epoch_on(uint64_t timeline, struct pagemap *live, struct err *e)
{
	struct snapshot_meta meta = {.name = g.tried.name, .note = "n", .tags = "a,b"};
	struct epoch *ep;
	int r;

	choose_next();
	snprintf(g.tried.name, sizeof(g.tried.name), "s%u", g.nr_names++);
	r = epoch_begin(g.s, g.vm, timeline, PAGE, live, &ep, e);
	if (r)
		return r;
	r = put_pages(ep, e);
	if (!r)
		r = epoch_commit(ep, g.next, g.frames * sizeof(*g.next), &meta, &g.tried.point,
				 &g.tried.id, NULL, e);
	if (r)
		epoch_abort(ep);
	else
		add_snapshot(&g.tried);
	return r;
}

static int op_epoch(struct err *e)
{
	return epoch_on(g.timeline, g.live, e);
}

/* A segment takes SEG_PAGES of them at most. */
#define SEG_PAGES (SEG_BYTES_MIN / PAGE)
static int put_much(struct epoch *ep, uint32_t pages, struct err *e)
{
	static uint8_t buf[PAGE] __attribute__((aligned(PAGE)));
	int r = 0;

	for (uint64_t i = 0; !r && i < pages; i++) {
		struct epoch_page page = make_page(g.s, buf, PAGE, i, rand_next(&g.rand) | 1);

		r = epoch_put(ep, &page, 1, e);
	}
	return r;
}

/* Another VM's epoch is under way; if the one of interest fails, it goes on, and takes
 * whichever segment comes next. */
static int op_beside(struct err *ret)
{
	struct snapd_point none = {0, 0}, point;
	struct err ignored = {0};
	struct pagemap *live;
	struct epoch *other;
	uint64_t timeline;
	int r;

	disk_exempt(true);
	CHECK_OK(store_timeline_create(g.s, g.vm, none, &timeline, &e));
	CHECK(!pagemap_create(true, &live));
	CHECK_OK(epoch_begin(g.s, g.vm, timeline, PAGE, live, &other, &e));
	CHECK_OK(put_much(other, SEG_PAGES, &e));
	disk_exempt(false);
	r = op_epoch(ret);
	disk_exempt(true);
	if (r)
		put_much(other, 3 * SEG_PAGES, &ignored);
	if (epoch_commit(other, "", 0, NULL, &point, NULL, NULL, &ignored))
		epoch_abort(other);
	pagemap_destroy(live);
	disk_exempt(false);
	return r;
}

/* A map that has to grow. */
static int op_first_epoch(struct err *e)
{
	_cleanup_free_ uint64_t *values = copy_values(g.values);
	struct pagemap *live;
	uint64_t timeline;
	int r;

	r = store_timeline_create(g.s, g.vm, (struct snapd_point){0, 0}, &timeline, e);
	if (!r && pagemap_create(true, &live))
		r = err_errno(e, ENOMEM, "test");
	if (r)
		return r;
	memset(g.values, 0xff, g.frames * sizeof(*g.values));
	r = epoch_on(timeline, live, e);
	if (r) {
		pagemap_destroy(live);
		memcpy(g.values, values, g.frames * sizeof(*values));
		return r;
	}
	pagemap_destroy(g.live);
	g.live = live;
	g.timeline = timeline;
	return 0;
}

static int read_back(struct store_reader *reader, const struct snap *sn, struct err *e)
{
	static uint8_t bytes[FRAMES_MAX][PAGE] __attribute__((aligned(PAGE)));
	static struct page_read reads[FRAMES_MAX];
	struct pagemap *m;
	int r;

	r = store_map_load(g.s, sn->point, false, &m, e);
	if (r)
		return r;
	for (uint32_t i = 0; i < g.frames; i++)
		reads[i] = (struct page_read){
			.gfn = gfn_of(i), .loc = pagemap_get(m, gfn_of(i)), .dst = bytes[i]};
	pagemap_destroy(m);
	return store_read_pages(reader, reads, g.frames, e);
}

static int op_read(struct err *e)
{
	const struct snap *sn = &g.snaps[0];
	struct store_snapshot *list, one;
	struct store_reader *reader;
	struct store_stats stats;
	size_t nr, len;
	void *state;
	int r;

	r = store_pin(g.s, sn->point, e);
	if (r)
		return r;
	r = store_reader_create(g.s, PAGE, &reader, e);
	if (!r) {
		r = read_back(reader, sn, e);
		store_reader_destroy(reader);
	}
	store_unpin(g.s, sn->point);
	if (!r && !(r = store_state_load(g.s, sn->point, &state, &len, e)))
		free(state);
	if (!r && !(r = store_snapshot_list(g.s, NULL, &list, &nr, e)))
		free(list);
	if (!r)
		r = store_snapshot_find(g.s, "guest", 0, &one, e);
	return r ? r : store_get_stats(g.s, &stats, e);
}

static int op_delete(struct err *e)
{
	int r;

	if (g.nr_snaps < SNAPS_MAX - 1) /* done, but in doubt */
		return 0;
	g.deleting = g.snaps[0].id;
	r = store_snapshot_delete(g.s, g.deleting, e);
	if (!r) {
		g.deleting = 0;
		drop_oldest();
	}
	return r;
}

static int op_gc(struct err *e)
{
	uint64_t freed;

	return store_gc(g.s, live_timeline, &g.timeline, &freed, e);
}

/* With a segment in which most is dead. */
static int op_rewrite(struct err *ret)
{
	struct snapd_point none = {0, 0}, point;
	struct pagemap *live;
	struct epoch *ep;
	uint64_t timeline;
	int r;

	disk_exempt(true);
	CHECK_OK(store_timeline_create(g.s, g.vm, none, &timeline, &e));
	CHECK(!pagemap_create(true, &live));
	CHECK_OK(epoch_begin(g.s, g.vm, timeline, PAGE, live, &ep, &e));
	CHECK_OK(put_much(ep, 60, &e));
	CHECK_OK(epoch_commit(ep, "", 0, NULL, &point, NULL, NULL, &e));
	pagemap_destroy(live);
	disk_exempt(false);
	r = op_gc(ret);
	if (!r)
		CHECK(g.s->features & 1u << FEATURE_HOLES);
	return r;
}

/* What can't be read is damage: told, and not there the next time. */
static int op_check(struct err *e)
{
	struct store_check_config c = {.read_data = true};
	struct store_check_result res;
	int r = store_check(g.s, &c, &res, e);

	return !r && res.damages ? err_set(e, EIO, "%llu damages", (unsigned long long)res.damages)
				 : r;
}

/* ---- what is there ---- */

static struct snap *find(uint64_t id)
{
	for (uint32_t i = 0; i < g.nr_snaps; i++)
		if (g.snaps[i].id == id)
			return &g.snaps[i];
	return NULL;
}

/* The store was opened again: what nobody knew is known now. */
static void learn(const struct store_snapshot *list, size_t nr)
{
	bool deleted = g.deleting != 0;

	for (size_t i = 0; i < nr; i++) {
		deleted &= list[i].id != g.deleting;
		if (find(list[i].id))
			continue;
		CHECK(!strcmp(list[i].name, g.tried.name));
		g.tried.id = list[i].id;
		g.tried.point = list[i].point;
		add_snapshot(&g.tried);
		g.nr_doubts++;
	}
	if (deleted)
		drop_oldest();
	g.deleting = 0;
}

static void check_all(bool reopened)
{
	struct store_snapshot *list;
	struct store_reader *reader;
	size_t nr;

	CHECK_OK(store_snapshot_list(g.s, NULL, &list, &nr, &e));
	if (reopened)
		learn(list, nr);
	CHECK(nr == g.nr_snaps);
	CHECK_OK(store_reader_create(g.s, PAGE, &reader, &e));
	for (size_t i = 0; i < nr; i++) {
		const struct snap *sn = find(list[i].id);

		CHECK(sn && !strcmp(sn->name, list[i].name));
		check_point(g.s, reader, PAGE, sn->point, gfn_of, sn->values, g.frames);
	}
	store_reader_destroy(reader);
	free(list);
}

/* The live map is that of the head, and no more. */
static void check_live(void)
{
	struct pagemap *m;
	uint64_t *gfns;
	size_t nr;

	CHECK_OK(store_map_load(g.s, g.snaps[g.nr_snaps - 1].point, false, &m, &e));
	CHECK(!pagemap_diff(m, g.live, &gfns, &nr) && !nr);
	free(gfns);
	pagemap_destroy(m);
}

static uint32_t count_fds(void)
{
	DIR *d = opendir("/proc/self/fd");
	uint32_t nr = 0;

	CHECK(d);
	while (readdir(d))
		nr++;
	closedir(d);
	return nr;
}

/* ---- trials ---- */

struct op {
	const char *name;
	int (*run)(struct err *e);
	bool needs_room; /* for one more snapshot */
	bool changes_live;
	enum disk_failure first; /* the ways before this one make no difference */
	uint32_t stride;	 /* of the calls, one in so many, but for the long test; 0: all */
};

static const struct op ops[] = {
	{"open", op_open, false, false},
	{"register", op_register, false, false},
	{"fork", op_fork, false, true},
	{"epoch", op_epoch, true, true},
	{"first epoch", op_first_epoch, true, true},
	{"epoch beside another", op_beside, true, true, FAIL_COMMIT},
	{"read", op_read, false, false},
	{"delete", op_delete, false, false},
	{"gc", op_gc, false, false},
	{"gc that writes a segment again", op_rewrite, false, false},
	{"check", op_check, false, false, .stride = 7},
};

/* Between trials: a store with some snapshots, one of which is to be deleted. */
static void prepare(const struct op *op)
{
	if (op->run == op_open)
		return;
	CHECK_OK(op_open(&e));
	if (op->run == op_delete)
		while (g.nr_snaps < SNAPS_MAX - 1)
			CHECK_OK(op_epoch(&e));
	while (g.nr_snaps >= SNAPS_MAX - op->needs_room)
		CHECK_OK(op_delete(&e));
}

/* After an error: as before, or refusing everything until it is opened again. */
static void after_error(const struct err *got, bool is_closed)
{
	struct store_snapshot one;
	struct err probe = {0};
	bool reopened = false;
	int r;

	CHECK(got->text[0] && !strchr(got->text, '\n'));
	if (is_closed)
		return;
	r = store_snapshot_find(g.s, "guest", 0, &one, &probe);
	if (r == -EIO) {
		CHECK(strstr(probe.text, "restart snapd"));
		close_store();
		CHECK_OK(op_open(&e));
		reopened = true;
		g.nr_reopened++;
	} else {
		CHECK(!r);
		g.deleting = 0;
	}
	check_all(reopened);
	if (reopened)
		CHECK_OK(op_fork(&e));
	check_live();
}

/* False: the failure was not met. */
static bool trial(const struct op *op, uint64_t n, enum disk_failure how)
{
	long allocations = disk_allocations();
	uint32_t fds = count_fds();
	const char *what;
	struct err e1 = {0};
	bool hit;
	int r;

	snprintf(g.now, sizeof(g.now), "%s, call %llu, failure %u\n", op->name,
		 (unsigned long long)n, how);
	prepare(op);
	disk_fail(n, how);
	r = op->run(&e1);
	hit = disk_lift(&what);
	CHECK(hit || !r);
	if (r) {
		after_error(&e1, op->run == op_open);
		CHECK_OK(op->run(&e));
	}
	if (n % 8 == 0)
		check_all(false);
	if (op->changes_live)
		check_live();
	close_store();
	/* The live map belongs to the test, and what it knows of snapshots. */
	if (!op->changes_live && op->run != op_delete)
		CHECK(disk_allocations() == allocations);
	CHECK(count_fds() == fds);
	return hit;
}

static uint32_t all_calls(const struct op *op, bool thorough)
{
	uint32_t stride = thorough || !op->stride ? 1 : op->stride, trials = 0;

	for (uint32_t how = op->first; how < NR_FAILURES; how++)
		for (uint64_t n = 1 + rand_below(&g.rand, stride), misses = 0; misses < 4;
		     n += stride, trials++)
			misses = trial(op, n, how) ? 0 : misses + 1;
	return trials;
}

static void say_where(int signal)
{
	(void)!write(STDOUT_FILENO, g.now, strlen(g.now));
}

int main(int argc, char **argv)
{
	char name[64] = "/dev/shm/snapd-fail-XXXXXX";

	g.frames = argc > 1 ? (uint32_t)atoi(argv[1]) : 24;
	CHECK(g.frames <= FRAMES_MAX);
	g.rand = rand_of(rand_seed());
	disk_exempt(false);
	log_set_level(LOG_LVL_ERR - 1);
	signal(SIGABRT, say_where);
	g.dir = mkdtemp(name) ? strdup(name) : temp_dir();
	g.values = malloc(g.frames * sizeof(*g.values));
	g.next = malloc(g.frames * sizeof(*g.next));
	CHECK(g.values && g.next);
	memset(g.values, 0xff, g.frames * sizeof(*g.values));
	CHECK_OK(op_open(&e));
	CHECK_OK(op_register(&e));
	CHECK_OK(op_fork(&e));
	CHECK_OK(op_epoch(&e));
	CHECK_OK(op_epoch(&e));
	close_store();
	for (size_t i = 0; i < ARRAY_SIZE(ops); i++)
		printf("%s: %u trials\n", ops[i].name, all_calls(&ops[i], argc > 1));
	printf("%u times the index had to be opened again; %u commits were there all the same\n",
	       g.nr_reopened, g.nr_doubts);
	CHECK(g.nr_reopened && g.nr_doubts);
	CHECK_OK(op_open(&e));
	check_all(false);
	close_store();
	while (g.nr_snaps)
		drop_oldest();
	pagemap_destroy(g.live);
	free(g.values);
	free(g.next);
	remove_tree(g.dir);
	free(g.dir);
	return 0;
}
