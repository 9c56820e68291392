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
 * Other workloads: segments that are in part dead are written again; each sync fails once,
 * and what it was to cover is lost.
 *
 * Ablations: the log is made as if one kind of sync had been left out, or as if data
 * came after the commit; then a state that fails must be found.
 *
 *   cut [LIMIT [ROUNDS]]   combinations at one point; random workloads besides, of
 *                          which a tenth of the states is looked at
 */
#include <dirent.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "snapd/store/check.h"
#include "snapd/store/index_check.h"
#include "snapd/store/internal.h"
#include "snapd/util/log.h"
#include "tests/crash/cut_world.h"
#include "tests/lib/cutdisk.h"

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
	get_settled_stats(s, &stats);
	CHECK(!stats.snapshots && !stats.epochs && stats.segments == stats.segments_free);
	CHECK(count_files(dir) == stats.segments);
}

/* Headers and figures are what the index says; a reader who can't know holes is warned. */
static void check_segments(struct store *s)
{
	struct store_check_config c = {0};
	struct store_check_result result;

	CHECK_OK(store_check(s, &c, &result, &e));
	CHECK(!result.damages);
	for (uint32_t i = 0; i < s->nr_segs; i++) {
		struct seg_ident ident;
		struct seg *seg;
		int fd;

		if (!s->segs[i] || s->segs[i]->state == SEG_FREE)
			continue;
		CHECK_OK(seg_open(s, i, &seg, &fd, &ident, &e));
		CHECK(!ident.rewrites || s->features & 1u << FEATURE_HOLES);
		seg_close(s, seg);
	}
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
	check_segments(s);
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

static void ablate(void (*workload)(const char *dir), enum disk_ablation ablation, const char *name,
		   uint64_t seed)
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
		cut_workload(workload, ablation, seed, &p, &stats);
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
		[ABLATE_NEW_SYNC] = "fsync before a rename",
		[ABLATE_RENAME_SYNC] = "fsync after a rename",
	};
	uint64_t seed = rand_seed();
	struct plan small = {.limit = argc > 1 ? (uint32_t)atoi(argv[1]) : 27, .nested_in = 50};
	struct plan failing = {.limit = 4};
	struct plan rewriting = {.limit = MIN(small.limit, 9u), .nested_in = 50, .one_in = 3};
	struct plan failing_gc = {.limit = 1, .one_in = 20};
	struct plan big = {.limit = 8, .nested_in = 100, .one_in = 10};
	uint32_t rounds = argc > 2 ? (uint32_t)atoi(argv[2]) : 1;

	log_set_level(LOG_LVL_ERR);
	signal(SIGABRT, say_where);
	disk_exempt(false);
	w.dir = fast_dir();
	cut_and_tell(small_workload, "small", seed, &small);
	cut_and_tell(failing_workload, "failing syncs", seed, &failing);
	cut_and_tell(rewriting_workload, "segments written again", seed, &rewriting);
	cut_and_tell(failing_gc_workload, "the same with failing syncs", seed, &failing_gc);
	for (uint32_t i = 0; i < rounds; i++)
		cut_and_tell(random_workload, "random", seed + i, &big);
	for (enum disk_ablation a = ABLATE_NONE + 1; a < NR_ABLATIONS; a++)
		ablate(a < ABLATE_NEW_SYNC ? small_workload : rewriting_workload, a, left_out[a],
		       seed);
	remove_tree(w.dir);
	free(w.dir);
	return 0;
}
