/* SPDX-License-Identifier: MIT */
/*
 * The workloads of cut.c: what they do to a store, and what each step has acknowledged.
 */
#include "tests/crash/cut_world.h"

#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <lmdb.h>

#include "tests/lib/cutdisk.h"

#define INDEX_MAP (96u << 10) /* at first, so that it has to grow */

struct world w;

/* The store does not choose so small a map. */
int mdb_env_set_mapsize(MDB_env *env, size_t size)
{
	static int (*real)(MDB_env *, size_t);

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "mdb_env_set_mapsize");
	return real(env, size == (size_t)64 << 20 ? INDEX_MAP : size);
}

time_t clock_ahead_s;

int clock_gettime(clockid_t id, struct timespec *ret)
{
	long r = syscall(SYS_clock_gettime, id, ret);

	ret->tv_sec += clock_ahead_s;
	return (int)r;
}

uint64_t gfn_of(uint32_t i)
{
	return i < FRAMES / 2 ? i : ((uint64_t)1 << 30) + 3 * i;
}

static void note(enum event_kind kind, uint32_t snap)
{
	CHECK(w.nr_events < EVENTS_MAX);
	w.events[w.nr_events].kind = kind;
	w.events[w.nr_events++].snap = snap;
	disk_mark(w.nr_events);
}

static void open_world(const char *dir)
{
	struct store_vm vm = {.name = "guest", .arch = "x86_64", .page_size = PAGE};

	w.s = open_store(dir);
	CHECK_OK(store_vm_register(w.s, &vm, &e));
	memcpy(w.vm, vm.id, sizeof(w.vm));
	store_vm_deinit(&vm);
}

static void line_begin(struct line *l, const struct snap *from)
{
	struct snapd_point parent = from ? from->point : (struct snapd_point){0, 0};

	CHECK_OK(store_timeline_create(w.s, w.vm, parent, &l->timeline, &e));
	CHECK_OK(store_map_load(w.s, (struct snapd_point){l->timeline, 0}, true, &l->live, &e));
	memset(l->values, 0xff, sizeof(l->values));
	if (from)
		memcpy(l->values, from->values, sizeof(l->values));
}

static void line_end(struct line *l)
{
	pagemap_destroy(l->live);
	l->live = NULL;
}

/* New, seen before, zero, or gone. */
uint64_t choose_value(struct rand *r)
{
	switch (rand_below(r, 8)) {
	case 0:
		return 0;
	case 1:
		return NO_PAGE;
	case 2:
		return 1 + rand_below(r, 8);
	default:
		return rand_next(r) >> 1;
	}
}

void put_frame(struct store *s, struct epoch *ep, uint32_t i, uint64_t value)
{
	_cleanup_free_ uint8_t *buf = aligned_alloc(PAGE, PAGE);
	struct epoch_page page;

	if (value == NO_PAGE) {
		CHECK_OK(epoch_gone(ep, gfn_of(i), 1, &e));
		return;
	}
	page = make_page(s, buf, PAGE, gfn_of(i), value);
	CHECK_OK(epoch_put(ep, &page, 1, &e));
}

static void line_write(struct line *l, uint32_t one_in)
{
	CHECK_OK(epoch_begin(w.s, w.vm, l->timeline, PAGE, l->live, &l->ep, &e));
	memcpy(l->next, l->values, sizeof(l->next));
	for (uint32_t i = 0; i < FRAMES; i++) {
		if (rand_below(&w.rand, one_in))
			continue;
		l->next[i] = choose_value(&w.rand);
		put_frame(w.s, l->ep, i, l->next[i]);
	}
}

/* With a name, or (snap NULL) only as the timeline's head. */
static void line_commit(struct line *l, struct snap **snap)
{
	struct snap *sn = &w.snaps[w.nr_snaps];
	struct snapd_point point;
	char name[16];
	struct snapshot_meta meta = {.name = name};

	if (!snap) {
		CHECK_OK(epoch_commit(l->ep, "head", 4, NULL, &point, NULL, NULL, &e));
	} else {
		CHECK(w.nr_snaps < SNAPS_MAX);
		snprintf(name, sizeof(name), "s%u", w.nr_snaps);
		memcpy(sn->values, l->next, sizeof(sn->values));
		note(COMMIT_BEGINS, w.nr_snaps);
		CHECK_OK(epoch_commit(l->ep, sn->values, sizeof(sn->values), &meta, &sn->point,
				      &sn->id, NULL, &e));
		note(COMMITTED, w.nr_snaps++);
		*snap = sn;
	}
	memcpy(l->values, l->next, sizeof(l->values));
}

static void line_epoch(struct line *l, uint32_t one_in, struct snap **snap)
{
	line_write(l, one_in);
	line_commit(l, snap);
}

static void drop(struct snap *sn)
{
	uint32_t n = (uint32_t)(sn - w.snaps);

	note(DELETE_BEGINS, n);
	CHECK_OK(store_snapshot_delete(w.s, sn->id, &e));
	note(DELETED, n);
	sn->id = 0;
}

static int live_lines(void *arg, uint64_t **ret, size_t *nr)
{
	*ret = calloc(LINES, sizeof(**ret));
	if (!*ret)
		return -ENOMEM;
	*nr = 0;
	for (uint32_t i = 0; i < LINES; i++)
		if (w.lines[i].live)
			(*ret)[(*nr)++] = w.lines[i].timeline;
	return 0;
}

static void collect(void)
{
	uint64_t freed;

	CHECK_OK(store_gc(w.s, live_lines, NULL, &freed, &e));
}

/* Every kind of thing that a store does to its disk, as little of each as possible. */
void small_workload(const char *dir)
{
	struct snap *sn[LINES], *kept, *more;

	open_world(dir);
	line_begin(&w.lines[0], NULL);
	line_epoch(&w.lines[0], 1, &kept);
	line_epoch(&w.lines[0], 6, NULL);
	line_epoch(&w.lines[0], 6, &more); /* with a checkpoint */
	for (uint32_t i = 1; i < LINES; i++)
		line_begin(&w.lines[i], kept);
	for (uint32_t i = 0; i < LINES; i++) /* each has a segment of its own */
		line_write(&w.lines[i], 5);
	for (uint32_t i = 0; i < LINES; i++)
		line_commit(&w.lines[i], &sn[i]);
	for (uint32_t i = 2; i < LINES; i++) {
		drop(sn[i]);
		line_end(&w.lines[i]);
	}
	collect();
	line_write(&w.lines[0], 5); /* recycles what gc left */
	line_write(&w.lines[1], 5);
	line_commit(&w.lines[1], &sn[3]);
	line_commit(&w.lines[0], &sn[2]);
	drop(kept);
	drop(more);
	collect();
	line_end(&w.lines[0]);
	line_end(&w.lines[1]);
	store_close(w.s);
	open_world(dir);
	line_begin(&w.lines[0], sn[2]);
	line_epoch(&w.lines[0], 5, &kept);
	line_end(&w.lines[0]);
	store_close(w.s);
}

/* An epoch whose n-th sync fails, until none does; each is done again and acknowledged.
 * Whoever believed a second sync in place of the first would have lost data. */
void failing_workload(const char *dir)
{
	struct line *l = &w.lines[0];
	struct snapd_point point;
	struct snap *sn;
	const char *what;
	uint64_t n = 0;
	bool hit;

	open_world(dir);
	line_begin(l, NULL);
	line_epoch(l, 1, &sn);
	do {
		struct err e = {0};
		int r;

		disk_fail(++n, FAIL_SYNC);
		r = epoch_begin(w.s, w.vm, l->timeline, PAGE, l->live, &l->ep, &e);
		CHECK(!r);
		memcpy(l->next, l->values, sizeof(l->next));
		for (uint32_t i = 0; i < FRAMES; i += 3)
			put_frame(w.s, l->ep, i, l->next[i] = rand_next(&w.rand) >> 1);
		r = epoch_commit(l->ep, "head", 4, NULL, &point, NULL, NULL, &e);
		hit = disk_lift(&what);
		CHECK(hit == (r != 0));
		if (r)
			epoch_abort(l->ep);
		else
			memcpy(l->values, l->next, sizeof(l->values));
		line_epoch(l, 4, &sn);
	} while (hit);
	CHECK(n > 2); /* a segment's and the index's at least */
	line_end(l);
	store_close(w.s);
}

/* Snapshots of guests that have nothing to do with each other, in one segment. */
static void fill_segment(uint32_t nr, struct snap **ret)
{
	for (uint32_t i = 0; i < nr; i++) {
		line_begin(&w.lines[i], NULL);
		line_epoch(&w.lines[i], 1, &ret[i]);
		line_end(&w.lines[i]);
	}
}

static uint64_t pages_stored(void)
{
	struct store_stats stats;

	CHECK_OK(store_get_stats(w.s, &stats, &e));
	return stats.pages_stored;
}

/* gc takes the dead part out of a segment that is open, of the same one again when it is
 * sealed, and of one after the store was opened again; epochs come in between. */
void rewriting_workload(const char *dir)
{
	struct snap *sn[4], *more;
	uint64_t before;

	open_world(dir);
	fill_segment(4, sn);
	for (uint32_t i = 0; i < 3; i++) {
		before = pages_stored();
		drop(sn[i]);
		if (!i)
			drop(sn[++i]);
		collect();
		CHECK(pages_stored() < before);
		line_begin(&w.lines[5], sn[3]);
		line_epoch(&w.lines[5], 4, &more);
		line_end(&w.lines[5]);
	}
	drop(more);
	store_close(w.s);
	open_world(dir);
	collect();
	store_close(w.s);
}

/* gc whose n-th sync fails, until none does; after each an epoch is acknowledged.  Who went
 * on with the file that a rename had put out of its place would lose that. */
void failing_gc_workload(const char *dir)
{
	struct snap *sn[2], *kept;
	uint64_t n = 0, freed;
	const char *what;
	bool hit;

	open_world(dir);
	do {
		struct err e = {0};
		int r;

		fill_segment(2, sn);
		drop(sn[0]);
		disk_fail(++n, FAIL_SYNC);
		r = store_gc(w.s, live_lines, NULL, &freed, &e);
		hit = disk_lift(&what);
		CHECK(!r || hit);
		line_begin(&w.lines[5], sn[1]);
		line_epoch(&w.lines[5], 4, &kept);
		line_end(&w.lines[5]);
		collect();
		if (hit)
			drop(kept);
		drop(sn[1]);
	} while (hit);
	CHECK(n > 5);
	store_close(w.s);
}

static struct snap *random_snapshot(void)
{
	struct snap *sn = w.nr_snaps ? &w.snaps[rand_below(&w.rand, w.nr_snaps)] : NULL;

	return sn && sn->id ? sn : NULL;
}

static void random_step(const char *dir)
{
	struct line *l = &w.lines[rand_below(&w.rand, LINES)];
	struct line *other = &w.lines[rand_below(&w.rand, LINES)];
	struct snap *sn = random_snapshot();

	if (!l->live)
		line_begin(l, sn);
	switch (rand_below(&w.rand, 10)) {
	case 0:
		line_end(l);
		return;
	case 1:
		line_epoch(l, 5, NULL);
		return;
	case 2:
	case 3:
		if (sn)
			drop(sn);
		return;
	case 4:
		collect();
		return;
	case 5:
		store_close(w.s);
		open_world(dir);
		return;
	case 6:
	case 7:
		if (other == l || !other->live)
			return;
		line_write(l, 3);
		line_write(other, 3);
		line_commit(other, &sn);
		line_commit(l, &sn);
		return;
	default:
		line_epoch(l, 1 + (uint32_t)rand_below(&w.rand, 5), &sn);
	}
}

void random_workload(const char *dir)
{
	open_world(dir);
	for (uint32_t i = 0; i < 60; i++)
		random_step(dir);
	for (uint32_t i = 0; i < LINES; i++)
		if (w.lines[i].live)
			line_end(&w.lines[i]);
	store_close(w.s);
}

void forget_world(void)
{
	for (uint32_t i = 0; i < LINES; i++)
		if (w.lines[i].live)
			line_end(&w.lines[i]);
	w.nr_snaps = w.nr_events = 0;
}
