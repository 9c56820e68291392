/* SPDX-License-Identifier: MIT */
/*
 * Goal: a page that nothing names any more, but that an epoch in flight has taken for its
 * own, is not reclaimed from a segment in part dead; nor does an epoch take one from a
 * segment that is being written again.
 *
 * Method: two guests in one segment; the snapshot of the first is deleted.  An epoch of a
 * third one has the same pages, all proved and found stored,
 *   - before gc begins: the segment stays as it is until that epoch was committed;
 *   - while gc writes the segment again: they are stored once more.
 * It is committed when gc is done, and has every byte; so has the second guest's snapshot,
 * also to one who knew the segment's headers from before, and to one who reads beside gc
 * in a process of its own.
 */
#include <dirent.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "snapd/store/check.h"
#include "snapd/store/internal.h"
#include "snapd/store/walk.h"
#include "tests/lib/store_model.h"

#define FRAMES 1200u
#define PAGE   4096u
#define SPARE  700u /* of the second guest: the segment has room for both */

static struct store *s;
static char *dir;
static uint8_t vm[16], buf[PAGE];

struct guest {
	uint64_t timeline, id, values[FRAMES];
	struct pagemap *live;
	struct epoch *ep;
	struct snapd_point point;
};

static uint64_t gfn_of(uint32_t i)
{
	return i;
}

static void put_all(struct guest *g, uint64_t first, uint32_t nr)
{
	memset(g, 0, sizeof(*g));
	memset(g->values, 0xff, sizeof(g->values));
	CHECK_OK(store_timeline_create(s, vm, (struct snapd_point){0}, &g->timeline, &e));
	CHECK_OK(store_map_load(s, (struct snapd_point){g->timeline, 0}, true, &g->live, &e));
	CHECK_OK(epoch_begin(s, vm, g->timeline, PAGE, g->live, &g->ep, &e));
	for (uint32_t i = 0; i < nr; i++) {
		struct epoch_page page = make_page(s, buf, PAGE, i, first + 2 * i);

		g->values[i] = first + 2 * i;
		CHECK_OK(epoch_put(g->ep, &page, 1, &e));
	}
}

static void commit(struct guest *g, struct epoch_stats *stats)
{
	struct snapshot_meta meta = {.note = ""};

	CHECK_OK(epoch_commit(g->ep, "state", 5, &meta, &g->point, &g->id, stats, &e));
	pagemap_destroy(g->live);
}

static void check(const struct guest *g, struct store_reader *reader)
{
	check_point(s, reader, PAGE, g->point, gfn_of, g->values, FRAMES);
}

static bool is_writing(void)
{
	_cleanup_free_ char *path = NULL;
	struct dirent *x;
	bool found = false;
	DIR *d;

	CHECK(asprintf(&path, "%s/segments", dir) > 0);
	d = opendir(path);
	CHECK(d);
	while ((x = readdir(d)))
		found |= strstr(x->d_name, ".new") != NULL;
	closedir(d);
	return found;
}

static struct guest first, second, third;
static bool in_between;
static struct seg *held; /* open since then */
static struct seg_ident held_ident;
static int held_fd;

/* In the middle of gc. */
static bool look(void *opaque, uint64_t done)
{
	if (in_between || !is_writing())
		return false;
	in_between = true;
	CHECK_OK(seg_open(s, 1, &held, &held_fd, &held_ident, &e));
	put_all(&third, 2, FRAMES);
	return false;
}

/* Whoever has the segment open has the file that it was. */
static void check_held(void)
{
	_cleanup_(seg_walk_deinit) struct seg_walk walk = {0};
	const struct batch_header *h;
	const struct batch_page *pages;
	struct seg_ident now;
	struct seg *seg;
	uint32_t at;
	int fd;

	CHECK(!held_ident.rewrites);
	CHECK(!seg_walk_init(&walk, held_fd, &held_ident, held->tail));
	while (walk.block < walk.end)
		CHECK(seg_walk_next(&walk, &at, &h, &pages, NULL) == 1);
	CHECK_OK(seg_open(s, 1, &seg, &fd, &now, &e));
	CHECK(seg != held && now.rewrites == 1);
	seg_close(s, seg);
	seg_close(s, held);
}

static uint64_t gc(bool (*stop)(void *opaque, uint64_t done))
{
	struct gc_config c = {.stop = stop};
	uint64_t freed;

	CHECK_OK(store_gc_paced(s, &c, &freed, &e));
	return freed;
}

/* ---- a reader beside it, in a process of its own ---- */

static pid_t beside;
static int talk;

static void turn(int fd)
{
	char c = 0;

	CHECK(write(fd, &c, 1) == 1);
}

static void await(int fd)
{
	char c;

	CHECK(read(fd, &c, 1) == 1);
}

static void read_beside(int fd)
{
	struct store_config config = {.dir = dir, .read_only = true};
	struct store_check_config c = {.read_data = true};
	struct store_check_result r;
	struct store_reader *reader;

	await(fd);
	CHECK_OK(store_open(&config, &s, &e));
	CHECK_OK(store_reader_create(s, PAGE, &reader, &e));
	turn(fd);
	await(fd); /* gc is done; what is open here is not that file */
	CHECK(read(fd, &second, sizeof(second)) == sizeof(second));
	check(&second, reader);
	CHECK_OK(store_check(s, &c, &r, &e));
	CHECK(!r.damages && !r.losses);
	store_reader_destroy(reader);
	store_close(s);
	_exit(0);
}

/* Before the store is opened here. */
static void start_beside(void)
{
	int fds[2];

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
	beside = fork();
	CHECK(beside >= 0);
	if (!beside) {
		close(fds[0]);
		read_beside(fds[1]);
	}
	close(fds[1]);
	talk = fds[0];
}

static void end_beside(void)
{
	int status;

	turn(talk);
	CHECK(write(talk, &second, sizeof(second)) == sizeof(second));
	CHECK(waitpid(beside, &status, 0) == beside);
	CHECK(WIFEXITED(status) && !WEXITSTATUS(status));
	close(talk);
}

/* ---- both orders ---- */

static void begin(struct store_reader **reader, bool also_beside)
{
	struct store_vm rec = {.name = "guest", .arch = "x86_64", .page_size = PAGE};
	struct store_config config = {
		.create = true, .segment_bytes = 16u << 20, .compression = "none"};

	dir = memory_dir();
	config.dir = dir;
	if (also_beside)
		start_beside();
	CHECK_OK(store_open(&config, &s, &e));
	CHECK_OK(store_vm_register(s, &rec, &e));
	memcpy(vm, rec.id, sizeof(vm));
	store_vm_deinit(&rec);
	put_all(&first, 2, FRAMES);
	commit(&first, NULL);
	put_all(&second, 100002, SPARE);
	commit(&second, NULL);
	CHECK_OK(store_reader_create(s, PAGE, reader, &e));
	check(&second, *reader);
	if (also_beside) {
		turn(talk);
		await(talk);
	}
	CHECK_OK(store_snapshot_delete(s, first.id, &e));
}

static void end(struct store_reader *reader)
{
	struct store_check_config c = {.read_data = true};
	struct store_check_result r;

	check(&second, reader);
	check(&third, reader);
	CHECK_OK(store_check(s, &c, &r, &e));
	CHECK(!r.damages && !r.losses);
	store_reader_destroy(reader);
	store_close(s);
	remove_tree(dir);
	free(dir);
}

static void taken_before(void)
{
	struct store_reader *reader;
	struct epoch_stats stats;

	begin(&reader, false);
	put_all(&third, 2, FRAMES);
	CHECK(!gc(NULL));
	commit(&third, &stats);
	CHECK(stats.duplicate > FRAMES / 2);
	gc(NULL);
	end(reader);
}

static void taken_meanwhile(void)
{
	struct store_reader *reader;
	struct epoch_stats stats;

	begin(&reader, true);
	CHECK(gc(look) >= FRAMES * PAGE / 2);
	CHECK(in_between);
	check_held();
	end_beside();
	commit(&third, &stats);
	CHECK(stats.stored == FRAMES);
	end(reader);
}

int main(void)
{
	taken_before();
	taken_meanwhile();
	return 0;
}
