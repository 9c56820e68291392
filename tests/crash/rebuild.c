/* SPDX-License-Identifier: MIT */
/*
 * Goal: an index that is lost can be made again from the segments, and nothing that was
 * deleted comes with it.
 *
 * Method: random histories of two VMs (epochs, forks, deletions, other names, gc, aborted
 * epochs, closing and opening), each page's value known; then the index goes, and comes
 * back by store_rebuild_index():
 *   undamaged   every snapshot has every byte, its name and note; no other is there
 *   killed      a process is killed in the middle of its work (no last close), and the
 *               rebuild too, some times, before it may end
 *   damaged     blocks of segments are overwritten, files cut off or removed: what a
 *               check then tells as whole is whole, each other snapshot is named by the
 *               rebuild or by the check, and none that was deleted is there
 *   lost        the manifest or the state of one epoch of three
 *
 *   rebuild [ROUNDS]
 */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "snapd/store/check.h"
#include "snapd/store/rebuild.h"
#include "snapd/util/log.h"
#include "tests/lib/store_model.h"

#define FRAMES 60u
#define PAGE   4096u
#define VMS    2u
#define SNAPS  400u

enum fate { NONE, BEGUN, THERE, GOING, GONE };

struct snap {
	enum fate fate;
	uint64_t id;
	struct snapd_point point;
	uint64_t values[FRAMES];
	char name[24], note[24];
};

/* Shared with the process that is killed. */
struct world {
	struct rand rand;
	char dir[64];
	uint64_t next;
	uint32_t nr;
	const struct snap *changing; /* its note is the old one, or the new one */
	struct snap snaps[SNAPS];
};

struct line {
	uint8_t id[16];
	uint64_t timeline;
	struct pagemap *live;
	uint64_t values[FRAMES];
};

static struct world *w;
static struct store *s;
static struct line lines[VMS];
static _Alignas(4096) uint8_t page[PAGE];

static uint64_t gfn_of(uint32_t i)
{
	return i < 30 ? i : 1000 + i;
}

static void start_line(struct line *l, uint32_t i, struct snapd_point parent)
{
	struct store_vm vm = {.page_size = PAGE, .uid = 7, .arch = "x86_64"};

	snprintf(vm.name, sizeof(vm.name), "vm-%u", i);
	CHECK_OK(store_vm_register(s, &vm, &e));
	memcpy(l->id, vm.id, sizeof(l->id));
	CHECK_OK(store_timeline_create(s, l->id, parent, &l->timeline, &e));
	pagemap_destroy(l->live);
	if (parent.timeline)
		CHECK_OK(store_map_load(s, parent, true, &l->live, &e));
	else
		CHECK(!pagemap_create(true, &l->live));
}

static struct snap *any_snap(void)
{
	struct snap *x = w->nr ? &w->snaps[rand_below(&w->rand, w->nr)] : NULL;

	return x && x->fate == THERE ? x : NULL;
}

static void one_epoch(struct line *l)
{
	struct snap *x = &w->snaps[w->nr];
	struct snapshot_meta meta = {.name = x->name, .note = x->note};
	struct epoch *ep;

	if (w->nr == SNAPS)
		return;
	*x = (struct snap){.fate = NONE};
	memcpy(x->values, l->values, sizeof(x->values));
	snprintf(x->name, sizeof(x->name), "s%u", w->nr);
	snprintf(x->note, sizeof(x->note), "note %u", w->nr);
	CHECK_OK(epoch_begin(s, l->id, l->timeline, PAGE, l->live, &ep, &e));
	for (uint32_t n = 1 + (uint32_t)rand_below(&w->rand, FRAMES); n; n--) {
		uint32_t i = (uint32_t)rand_below(&w->rand, FRAMES);
		struct epoch_page p;

		x->values[i] = rand_below(&w->rand, 6) ? ++w->next * 2 : rand_below(&w->rand, 9);
		p = make_page(s, page, PAGE, gfn_of(i), x->values[i]);
		CHECK_OK(epoch_put(ep, &p, 1, &e));
	}
	if (!rand_below(&w->rand, 6)) {
		epoch_abort(ep);
		return;
	}
	x->fate = BEGUN;
	w->nr++;
	CHECK_OK(epoch_commit(ep, "state", 5, &meta, &x->point, &x->id, NULL, &e));
	memcpy(l->values, x->values, sizeof(l->values));
	x->fate = THERE;
}

static void delete (struct snap *x)
{
	if (!x)
		return;
	x->fate = GOING;
	CHECK_OK(store_snapshot_delete(s, x->id, &e));
	x->fate = GONE;
}

static void rename_one(struct snap *x)
{
	struct snapshot_change c = {0};

	if (!x)
		return;
	w->changing = x;
	snprintf(x->note, sizeof(x->note), "other %u", (uint32_t)rand_below(&w->rand, 100));
	c.note = x->note;
	CHECK_OK(store_snapshot_change(s, x->id, &c, &e));
	w->changing = NULL;
}

static void fork_one(uint32_t i, const struct snap *x)
{
	if (!x)
		return;
	memcpy(lines[i].values, x->values, sizeof(x->values));
	start_line(&lines[i], i, x->point);
}

static int live_lines(void *opaque, uint64_t **ret, size_t *nr)
{
	*ret = calloc(VMS, sizeof(**ret));
	if (!*ret)
		return -ENOMEM;
	for (*nr = 0; *nr < VMS; (*nr)++)
		(*ret)[*nr] = lines[*nr].timeline;
	return 0;
}

static void reclaim(void)
{
	uint64_t freed;

	CHECK_OK(store_gc(s, live_lines, NULL, &freed, &e));
}

static void one_step(void)
{
	uint32_t i = (uint32_t)rand_below(&w->rand, VMS);

	switch (rand_below(&w->rand, 12)) {
	case 0:
	case 1:
	case 2:
		delete (any_snap());
		break;
	case 3:
		rename_one(any_snap());
		break;
	case 4:
		fork_one(i, any_snap());
		break;
	case 5:
		reclaim();
		break;
	default:
		one_epoch(&lines[i]);
	}
}

/* What was there goes on; in a store that is new, from nothing. */
static void open_lines(void)
{
	s = open_store(w->dir);
	for (uint32_t i = 0; i < VMS; i++) {
		memset(lines[i].values, 0xff, sizeof(lines[i].values));
		start_line(&lines[i], i, (struct snapd_point){0});
	}
}

static void close_lines(void)
{
	for (uint32_t i = 0; i < VMS; i++) {
		pagemap_destroy(lines[i].live);
		lines[i].live = NULL;
	}
	store_close(s);
}

static void work(uint32_t steps)
{
	open_lines();
	while (steps--)
		one_step();
	close_lines();
}

static void nap(uint64_t us)
{
	struct timespec ts = {.tv_nsec = (long)us * 1000};

	nanosleep(&ts, NULL);
}

/* In a process of its own, killed after a while. */
static void killed(void (*fn)(void), uint64_t after_us)
{
	pid_t pid = fork();
	int status;

	CHECK(pid >= 0);
	if (!pid) {
		fn();
		_exit(0);
	}
	nap(after_us);
	kill(pid, SIGKILL);
	CHECK(waitpid(pid, &status, 0) == pid);
	CHECK(WIFSIGNALED(status) || (WIFEXITED(status) && !WEXITSTATUS(status)));
}

/* ---- the rebuild ---- */

static bool rebuilt;
static uint64_t named[SNAPS];
static uint32_t nr_named;

static void name(uint64_t id)
{
	CHECK(nr_named < SNAPS);
	named[nr_named++] = id;
}

static void on_line(void *opaque, const char *line)
{
	unsigned long long id;

	if (sscanf(line, "snapshot %llu of", &id) == 1)
		name(id);
}

static void on_loss(void *opaque, const struct store_loss *l)
{
	name(l->snapshot);
}

static void rebuild_once(void)
{
	struct rebuild_config c = {.dir = w->dir, .tell = on_line};
	struct rebuild_result r;
	struct err e = {0};
	int rc = store_rebuild_index(&c, &r, &e);

	CHECK(!rc || rc == -ENOENT);
	rebuilt = !rc;
}

/* An empty store has nothing to make an index of. */
static bool is_empty(void)
{
	for (uint32_t i = 0; i < w->nr; i++)
		CHECK(rebuilt || w->snaps[i].fate != THERE);
	return !rebuilt;
}

static void lose_index(void)
{
	char path[96];

	snprintf(path, sizeof(path), "%s/index", w->dir);
	remove_tree(path);
}

/* Of a history whose segments are whole. */
static void check_everything(void)
{
	struct store_reader *r;
	struct store_snapshot *list;
	uint32_t there = 0;
	size_t nr;

	CHECK_OK(store_reader_create(s, PAGE, &r, &e));
	CHECK_OK(store_snapshot_list(s, NULL, &list, &nr, &e));
	for (uint32_t i = 0; i < w->nr; i++) {
		struct snap *x = &w->snaps[i];
		struct store_snapshot got = {0};
		bool is = false;

		for (size_t k = 0; k < nr && !is; k++) {
			is = x->id ? list[k].id == x->id : !strcmp(list[k].name, x->name);
			got = list[k];
		}
		CHECK(x->fate != THERE || is);
		CHECK(x->fate != GONE || !is);
		there += is;
		if (!is)
			continue;
		if (x->fate != BEGUN)
			CHECK(!strcmp(got.name, x->name) &&
			      (x == w->changing || !strcmp(got.note, x->note)));
		check_point(s, r, PAGE, got.point, gfn_of, x->values, FRAMES);
		x->fate = THERE;
		x->id = got.id;
		x->point = got.point;
	}
	CHECK(there == nr);
	for (uint32_t i = 0; i < w->nr; i++)
		if (w->snaps[i].fate != THERE)
			w->snaps[i].fate = GONE;
	free(list);
	store_reader_destroy(r);
}

static void check_store(struct store_check_result *r)
{
	struct store_check_config c = {.read_data = true, .loss = on_loss};

	CHECK_OK(store_check(s, &c, r, &e));
}

static void work_on(void)
{
	work(60);
}

/* ---- damage ---- */

static bool is_named(uint64_t id)
{
	for (uint32_t i = 0; i < nr_named; i++)
		if (named[i] == id)
			return true;
	return false;
}

static void damage_one(void)
{
	uint8_t junk[PAGE];
	char path[96];
	int fd;

	snprintf(path, sizeof(path), "%s/segments/%08x.seg", w->dir,
		 1 + (unsigned)rand_below(&w->rand, 6));
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	for (size_t i = 0; i < sizeof(junk); i++)
		junk[i] = (uint8_t)rand_next(&w->rand);
	if (!rand_below(&w->rand, 8))
		CHECK(!unlink(path));
	else if (!rand_below(&w->rand, 8))
		CHECK(!ftruncate(fd, (off_t)rand_below(&w->rand, 512) * PAGE));
	else
		CHECK(pwrite(fd, junk, sizeof(junk), (off_t)rand_below(&w->rand, 400) * PAGE) ==
		      sizeof(junk));
	close(fd);
}

static void check_rest(void)
{
	struct store_snapshot *list;
	struct store_check_result r;
	struct store_reader *reader;
	size_t nr;

	check_store(&r);
	CHECK_OK(store_reader_create(s, PAGE, &reader, &e));
	CHECK_OK(store_snapshot_list(s, NULL, &list, &nr, &e));
	for (uint32_t i = 0; i < w->nr; i++) {
		const struct snap *x = &w->snaps[i];
		bool is = false;

		for (size_t k = 0; k < nr; k++)
			is |= list[k].id == x->id;
		if (is && !is_named(x->id))
			check_point(s, reader, PAGE, x->point, gfn_of, x->values, FRAMES);
	}
	free(list);
	store_reader_destroy(reader);
}

/* The payload of the n-th batch of this type of the first segment, in the order written. */
static void spoil_batch(enum batch_type type, uint32_t n)
{
	_Alignas(8) uint8_t block[PAGE];
	struct batch_header *h = (struct batch_header *)block;
	char path[96];
	int fd;

	snprintf(path, sizeof(path), "%s/segments/%08x.seg", w->dir, 1u);
	fd = open(path, O_RDWR | O_CLOEXEC);
	CHECK(fd >= 0);
	for (off_t at = PAGE;; at += PAGE) {
		CHECK(pread(fd, block, PAGE, at) == PAGE);
		if (h->magic != BATCH_MAGIC || h->type != type || n--)
			continue;
		memset(block, 0x5a, 8);
		CHECK(pwrite(fd, block, 8, at + h->header_bytes) == 8);
		break;
	}
	close(fd);
}

/* Of three epochs in a row one has lost this: it goes, and is named, and so is what builds
 * on it; the others stay. */
static void lose_second(enum batch_type type)
{
	struct store_snapshot *list;
	size_t nr;

	open_lines();
	while (w->nr < 3)
		one_epoch(&lines[0]);
	close_lines();
	spoil_batch(type, 1);
	lose_index();
	nr_named = 0;
	rebuild_once();
	CHECK(rebuilt && is_named(w->snaps[1].id) && !is_named(w->snaps[0].id));
	s = open_store(w->dir);
	CHECK_OK(store_snapshot_list(s, NULL, &list, &nr, &e));
	CHECK(nr == 3 - nr_named && list[0].id == w->snaps[0].id);
	for (size_t i = 0; i < nr; i++)
		CHECK(!is_named(list[i].id));
	free(list);
	store_close(s);
}

static void manifest_lost(void)
{
	lose_second(BATCH_MANIFEST);
}

static void state_lost(void)
{
	lose_second(BATCH_STATE);
}

/* ---- rounds ---- */

static void undamaged(void)
{
	struct store_check_result r;

	work(40);
	work(40);
	lose_index();
	nr_named = 0;
	rebuild_once();
	CHECK(!nr_named);
	if (is_empty())
		return;
	s = open_store(w->dir);
	check_everything();
	check_store(&r);
	CHECK(!r.damages && !r.losses);
	store_close(s);
	work(20); /* it goes on */
}

static void after_kills(void)
{
	struct store_check_result r;

	work(10);
	killed(work_on, 2000 + rand_below(&w->rand, 150000));
	/* A start cleans up; the index is lost some time after it. */
	s = open_store(w->dir);
	store_close(s);
	lose_index();
	for (uint32_t i = 0; i < 3; i++)
		killed(rebuild_once, rand_below(&w->rand, 8000));
	nr_named = 0;
	rebuild_once();
	CHECK(!nr_named);
	if (is_empty())
		return;
	s = open_store(w->dir);
	check_everything();
	check_store(&r);
	CHECK(!r.damages && !r.losses);
	store_close(s);
}

static void damaged(void)
{
	work(100);
	for (uint32_t n = 1 + (uint32_t)rand_below(&w->rand, 4); n; n--)
		damage_one();
	lose_index();
	nr_named = 0;
	rebuild_once();
	s = NULL;
	if (store_open(&(struct store_config){.dir = w->dir, .read_only = true}, &s, NULL))
		return; /* not even one record was left */
	check_rest();
	store_close(s);
}

static void run(uint64_t seed, void (*kind)(void))
{
	char *dir = memory_dir();

	memset(w, 0, sizeof(*w));
	memset(lines, 0, sizeof(lines));
	w->rand = rand_of(seed);
	w->next = 1000;
	snprintf(w->dir, sizeof(w->dir), "%s", dir);
	kind();
	remove_tree(dir);
	free(dir);
}

int main(int argc, char **argv)
{
	static void (*const kinds[])(void) = {undamaged, after_kills, damaged};
	uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 12;
	uint64_t seed = rand_seed();

	log_set_level(LOG_LVL_ERR);
	w = mmap(NULL, sizeof(*w), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(w != MAP_FAILED);
	for (uint32_t i = 0; i < rounds; i++)
		run(seed + i, kinds[i % ARRAY_SIZE(kinds)]);
	run(seed, manifest_lost);
	run(seed, state_lost);
	printf("%u rounds\n", rounds);
	return 0;
}
