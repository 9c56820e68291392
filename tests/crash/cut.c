/* SPDX-License-Identifier: MIT */
/*
 * Goal: I7.  After a power cut at any instant every acknowledged snapshot is whole,
 * every other one is invisible, the store takes new epochs, and space comes back.
 *
 * Method: a workload is recorded on simdisk.h: creation, epochs of several
 * timelines at once, deletions, gc that frees, recycles and removes segments,
 * checkpoints, growth of the index's map, closing and opening.  Then cutdisk.h makes
 * each state that a disk may be in afterwards, and the real code opens it:
 *   - what was acknowledged is there, what was deleted is not, what was under way is
 *     one or the other; each snapshot has every byte and its state;
 *   - the index passes its structure check;
 *   - one more epoch is written on top, and everything is as before;
 *   - after all snapshots were deleted, gc leaves no segment in use.
 * Recovery itself is recorded for some states, and cut in the same way.
 *
 * In another workload each sync fails once, and what it was to cover is lost.
 *
 * Ablations: the log is made as if one kind of sync had been left out, or as if data
 * came after the commit; then a state that fails must be found.
 *
 *   cut [LIMIT [ROUNDS]]   combinations at one point; random workloads besides, of
 *                          which a tenth of the states is looked at
 */
#include <dirent.h>
#include <dlfcn.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <lmdb.h>

#include "snapd/store/index_check.h"
#include "snapd/util/log.h"
#include "tests/lib/cutdisk.h"
#include "tests/lib/store_model.h"

#define FRAMES	   40u
#define PAGE	   4096u
#define LINES	   6u
#define SNAPS_MAX  512u
#define EVENTS_MAX 2048u
#define INDEX_MAP  (96u << 10) /* at first, so that it has to grow */

enum event_kind { COMMIT_BEGINS, COMMITTED, DELETE_BEGINS, DELETED };

struct snap {
	uint64_t values[FRAMES];
	uint64_t id;
	struct snapd_point point;
};

/* A timeline that the workload writes to. */
struct line {
	uint64_t timeline;
	struct pagemap *live;
	uint64_t values[FRAMES], next[FRAMES];
	struct epoch *ep;
};

static struct world {
	char *dir; /* of everything */
	struct store *s;
	uint8_t vm[16];
	struct rand rand;
	struct line lines[LINES];
	struct snap snaps[SNAPS_MAX];
	uint32_t nr_snaps;
	struct {
		enum event_kind kind;
		uint32_t snap;
	} events[EVENTS_MAX];
	uint32_t nr_events;
} w;

/* The store does not choose so small a map. */
int mdb_env_set_mapsize(MDB_env *env, size_t size)
{
	static int (*real)(MDB_env *, size_t);

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "mdb_env_set_mapsize");
	return real(env, size == (size_t)64 << 20 ? INDEX_MAP : size);
}

static time_t clock_ahead_s;

int clock_gettime(clockid_t id, struct timespec *ret)
{
	long r = syscall(SYS_clock_gettime, id, ret);

	ret->tv_sec += clock_ahead_s;
	return (int)r;
}

static uint64_t gfn_of(uint32_t i)
{
	return i < FRAMES / 2 ? i : ((uint64_t)1 << 30) + 3 * i;
}

/* ---- the workload ---- */

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
static uint64_t choose_value(struct rand *r)
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

static void put_frame(struct store *s, struct epoch *ep, uint32_t i, uint64_t value)
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
static void small_workload(const char *dir)
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
static void failing_workload(const char *dir)
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

static void random_workload(const char *dir)
{
	open_world(dir);
	for (uint32_t i = 0; i < 60; i++)
		random_step(dir);
	for (uint32_t i = 0; i < LINES; i++)
		if (w.lines[i].live)
			line_end(&w.lines[i]);
	store_close(w.s);
}

/* ---- what has to be there ---- */

enum status { ABSENT, MAY, MUST };

static void status_at(size_t marks, uint8_t *status)
{
	static const enum status after[] = {[COMMIT_BEGINS] = MAY,
					    [COMMITTED] = MUST,
					    [DELETE_BEGINS] = MAY,
					    [DELETED] = ABSENT};

	memset(status, ABSENT, SNAPS_MAX);
	CHECK(marks <= w.nr_events);
	for (size_t i = 0; i < marks; i++)
		status[w.events[i].snap] = after[w.events[i].kind];
}

static void check_snapshot(struct store *s, struct store_reader *reader,
			   const struct store_snapshot *sn, const uint64_t *values)
{
	void *state;
	size_t len;

	CHECK_OK(store_state_load(s, sn->point, &state, &len, &e));
	CHECK(len == FRAMES * sizeof(*values) && !memcmp(state, values, len));
	free(state);
	check_point(s, reader, PAGE, sn->point, gfn_of, values, FRAMES);
}

/* Every snapshot that is there is whole; returns the values of one, or NULL. */
static const struct snap *check_snapshots(struct store *s, size_t marks, const struct snap *added,
					  struct snapd_point *at)
{
	uint8_t status[SNAPS_MAX];
	struct store_snapshot *list;
	struct store_reader *reader;
	const struct snap *newest = NULL;
	size_t nr;

	status_at(marks, status);
	CHECK_OK(store_reader_create(s, PAGE, &reader, &e));
	CHECK_OK(store_snapshot_list(s, NULL, &list, &nr, &e));
	for (size_t i = 0; i < nr; i++) {
		uint32_t n = (uint32_t)strtoul(list[i].name + 1, NULL, 10);
		const struct snap *sn = list[i].name[0] == 's' ? &w.snaps[n] : added;

		CHECK(sn && n < SNAPS_MAX);
		CHECK(sn == added || status[n] != ABSENT);
		if (sn != added)
			status[n] = ABSENT; /* seen */
		check_snapshot(s, reader, &list[i], sn->values);
		newest = sn;
		*at = list[i].point;
	}
	for (uint32_t i = 0; i < SNAPS_MAX; i++)
		CHECK(status[i] != MUST);
	free(list);
	store_reader_destroy(reader);
	return newest;
}

/* One more epoch, upon the newest snapshot. */
static void write_on(struct store *s, const struct snap *from, struct snapd_point at,
		     struct snap *ret)
{
	struct store_vm vm = {.name = "guest", .arch = "x86_64", .page_size = PAGE};
	struct snapshot_meta meta = {.name = "after"};
	struct rand r = rand_of(99);
	struct pagemap *live;
	struct epoch *ep;
	uint64_t timeline;

	CHECK_OK(store_vm_register(s, &vm, &e));
	CHECK_OK(store_timeline_create(s, vm.id, from ? at : (struct snapd_point){0, 0}, &timeline,
				       &e));
	CHECK_OK(store_map_load(s, (struct snapd_point){timeline, 0}, true, &live, &e));
	memset(ret->values, 0xff, sizeof(ret->values));
	if (from)
		memcpy(ret->values, from->values, sizeof(ret->values));
	CHECK_OK(epoch_begin(s, vm.id, timeline, PAGE, live, &ep, &e));
	for (uint32_t i = 0; i < FRAMES; i += 3) {
		ret->values[i] = choose_value(&r);
		put_frame(s, ep, i, ret->values[i]);
	}
	CHECK_OK(epoch_commit(ep, ret->values, sizeof(ret->values), &meta, &ret->point, &ret->id,
			      NULL, &e));
	pagemap_destroy(live);
	store_vm_deinit(&vm);
}

static uint32_t count_files(const char *dir)
{
	_cleanup_free_ char *path = NULL;
	struct dirent *x;
	uint32_t nr = 0;
	DIR *d;

	CHECK(asprintf(&path, "%s/segments", dir) > 0);
	d = opendir(path);
	CHECK(d);
	while ((x = readdir(d)))
		nr += x->d_name[0] != '.';
	closedir(d);
	return nr;
}

static void check_empties(struct store *s, const char *dir)
{
	struct store_snapshot *list;
	struct store_stats stats;
	uint64_t freed;
	size_t nr;

	CHECK_OK(store_snapshot_list(s, NULL, &list, &nr, &e));
	for (size_t i = 0; i < nr; i++)
		CHECK_OK(store_snapshot_delete(s, list[i].id, &e));
	free(list);
	clock_ahead_s = 2 * 3600; /* timelines without epochs are not young any more */
	CHECK_OK(store_gc(s, NULL, NULL, &freed, &e));
	clock_ahead_s = 0;
	CHECK_OK(store_get_stats(s, &stats, &e));
	CHECK(!stats.snapshots && !stats.epochs && stats.segments == stats.segments_free);
	CHECK(count_files(dir) == stats.segments);
}

static void check_index(const char *dir)
{
	_cleanup_free_ char *path = NULL;

	CHECK(asprintf(&path, "%s/index/data.mdb", dir) > 0);
	CHECK_OK(index_check(path, false, &e));
}

static void check_state(const char *root, size_t marks, bool empty_it)
{
	_cleanup_free_ char *dir = NULL;
	const struct snap *newest;
	struct snapd_point at;
	struct snap added;
	struct store *s;

	CHECK(asprintf(&dir, "%s/store", root) > 0);
	s = open_store(dir);
	newest = check_snapshots(s, marks, NULL, &at);
	write_on(s, newest, at, &added);
	check_snapshots(s, marks, &added, &at);
	if (empty_it)
		check_empties(s, dir);
	store_close(s);
	check_index(dir);
}

/* ---- cutting ---- */

struct plan {
	uint32_t limit;
	uint32_t nested_in; /* recovery is cut, too, in one of so many states */
	uint32_t one_in;    /* of the states, so many are visited */
	uint64_t states, nested;
};

static void visit_nested(void *arg, const char *root, size_t nested_marks)
{
	check_state(root, *(size_t *)arg, false);
}

/* The same state again, with what recovery does to it recorded. */
static void cut_recovery(const char *root, size_t marks, struct plan *p, uint64_t seed)
{
	_cleanup_free_ char *store = NULL;
	struct cut_stats stats = {0};
	struct disk_log log;
	char dir[512];
	struct cut c = {.log = &log,
			.dir = dir,
			.seed = seed,
			.limit = p->limit / 4 + 1,
			.visit = visit_nested,
			.arg = &marks};

	snprintf(dir, sizeof(dir), "%s-nested", root);
	CHECK(!mkdir(dir, 0700));
	CHECK(asprintf(&store, "%s/store", root) > 0);
	disk_record(root, ABLATE_NONE);
	store_close(open_store(store));
	disk_stop(&log);
	cut_run(&c, &stats);
	disk_log_deinit(&log);
	remove_tree(dir);
	p->nested += stats.states;
}

static void visit_state(void *arg, const char *root, size_t marks)
{
	struct plan *p = arg;
	uint64_t n = p->states++;

	if (p->nested_in && n % p->nested_in == 0)
		cut_recovery(root, marks, p, n);
	check_state(root, marks, n % 4 == 0);
}

static void forget_world(void)
{
	for (uint32_t i = 0; i < LINES; i++)
		if (w.lines[i].live)
			line_end(&w.lines[i]);
	w.nr_snaps = w.nr_events = 0;
}

static void cut_workload(void (*workload)(const char *dir), enum disk_ablation ablation,
			 uint64_t seed, struct plan *p, struct cut_stats *stats)
{
	_cleanup_free_ char *root = NULL, *dir = NULL, *lock = NULL, *states = NULL;
	struct disk_log log;
	struct cut c = {.log = &log,
			.seed = seed,
			.limit = p->limit,
			.one_in = p->one_in,
			.visit = visit_state,
			.arg = p};

	CHECK(asprintf(&root, "%s/live", w.dir) > 0 && asprintf(&dir, "%s/store", root) > 0 &&
	      asprintf(&lock, "%s/index/lock.mdb", dir) > 0 &&
	      asprintf(&states, "%s/states", w.dir) > 0);
	CHECK(!mkdir(root, 0700) && !mkdir(states, 0700));
	w.rand = rand_of(seed);
	disk_ring_seed(seed);
	disk_record(root, ablation);
	workload(dir);
	disk_stop(&log);
	c.dir = states;
	c.stale_lock = lock;
	cut_run(&c, stats);
	disk_log_deinit(&log);
	forget_world();
	remove_tree(states);
	remove_tree(root);
}

/* ---- ablations ---- */

static void ablate(enum disk_ablation ablation, const char *name, uint64_t seed)
{
	struct plan p = {.limit = 16};
	struct cut_stats stats = {0};
	int status;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		signal(SIGABRT, SIG_DFL);
		CHECK(freopen("/dev/null", "w", stdout));
		log_set_level(LOG_LVL_ERR - 1);
		cut_workload(small_workload, ablation, seed, &p, &stats);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
	printf("without %s: noticed\n", name);
	remove_tree(w.dir);
	CHECK(!mkdir(w.dir, 0700));
}

static void say_where(int signal)
{
	const char *text = cut_now();

	(void)!write(STDOUT_FILENO, text, strlen(text));
	(void)!write(STDOUT_FILENO, "\n", 1);
}

/* In memory where that is possible: what matters is the order, not the disk. */
static char *fast_dir(void)
{
	char name[64] = "/dev/shm/snapd-cut-XXXXXX";

	return mkdtemp(name) ? strdup(name) : temp_dir();
}

static void cut_and_tell(void (*workload)(const char *dir), const char *name, uint64_t seed,
			 struct plan *p)
{
	struct cut_stats stats = {0};

	p->states = p->nested = 0;
	cut_workload(workload, ABLATE_NONE, seed, p, &stats);
	printf("%s: %llu points, %llu of them exhaustive; %llu combinations, %llu states, %llu of "
	       "recovery\n",
	       name, (unsigned long long)stats.points, (unsigned long long)stats.exhaustive,
	       (unsigned long long)stats.combinations, (unsigned long long)stats.states,
	       (unsigned long long)p->nested);
}

int main(int argc, char **argv)
{
	static const char *const left_out[NR_ABLATIONS] = {
		[ABLATE_SEGMENT_SYNC] = "fdatasync of segments",
		[ABLATE_DIR_SYNC] = "fsync of directories",
		[ABLATE_INDEX_SYNC] = "fdatasync of the index",
		[ABLATE_COMMIT_FIRST] = "data before the commit",
	};
	uint64_t seed = rand_seed();
	struct plan small = {.limit = argc > 1 ? (uint32_t)atoi(argv[1]) : 27, .nested_in = 50};
	struct plan failing = {.limit = 4};
	struct plan big = {.limit = 8, .nested_in = 100, .one_in = 10};
	uint32_t rounds = argc > 2 ? (uint32_t)atoi(argv[2]) : 1;

	log_set_level(LOG_LVL_ERR);
	signal(SIGABRT, say_where);
	disk_exempt(false);
	w.dir = fast_dir();
	cut_and_tell(small_workload, "small", seed, &small);
	cut_and_tell(failing_workload, "failing syncs", seed, &failing);
	for (uint32_t i = 0; i < rounds; i++)
		cut_and_tell(random_workload, "random", seed + i, &big);
	for (enum disk_ablation a = ABLATE_NONE + 1; a < NR_ABLATIONS; a++)
		ablate(a, left_out[a], seed);
	remove_tree(w.dir);
	free(w.dir);
	return 0;
}
