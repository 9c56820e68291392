/* SPDX-License-Identifier: MIT */
/*
 * Goal (I7): after SIGKILL at any instant every acknowledged snapshot is whole, at
 * most the one that was being committed is there besides, whole as well, and
 * nothing else is visible.
 * Method: a child commits epochs, deletes old snapshots and reclaims space in a
 * loop, and says over a pipe what it is about to delete and what was acknowledged;
 * it is killed after a random while.  A snapshot's state is the list of its pages'
 * values, so each one proves itself.  Every few rounds the store is opened by the
 * parent, too, and everything is read.
 */
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

#include "snapd/util/log.h"
#include "tests/lib/store_model.h"

#define FRAMES 200u
#define PAGE   4096u
#define KEEP   8u

struct message {
	char what; /* 'a' acknowledged, 'd' about to be deleted */
	uint64_t id;
};

struct known {
	uint64_t *ids; /* acknowledged, and not about to be deleted */
	size_t nr, cap;
};

static uint64_t gfn_of(uint32_t i)
{
	return i;
}

/* ---- the child ---- */

static void say(int fd, char what, uint64_t id)
{
	struct message m;

	memset(&m, 0, sizeof(m));
	m.what = what;
	m.id = id;
	CHECK(write(fd, &m, sizeof(m)) == sizeof(m));
}

static void drop_old(struct store *s, int fd, uint64_t timeline)
{
	struct store_snapshot *list;
	uint64_t freed;
	size_t nr;

	CHECK_OK(store_snapshot_list(s, NULL, &list, &nr, &e));
	for (size_t i = 0; nr > KEEP && i < nr - KEEP; i++) {
		say(fd, 'd', list[i].id);
		CHECK_OK(store_snapshot_delete(s, list[i].id, &e));
	}
	free(list);
	CHECK_OK(store_gc(s, live_timeline, &timeline, &freed, &e));
}

static void one_epoch(struct store *s, struct rand *r, const uint8_t *vm, uint64_t timeline,
		      struct pagemap *live, uint64_t *values, int fd)
{
	_cleanup_free_ uint8_t *buf = aligned_alloc(PAGE, PAGE);
	struct snapshot_meta meta = {.note = "kill"};
	struct snapd_point point;
	struct epoch *ep;
	uint64_t id;

	CHECK_OK(epoch_begin(s, vm, timeline, PAGE, live, &ep, &e));
	for (uint32_t i = 0; i < FRAMES; i++) {
		struct epoch_page page;

		if (values[i] != NO_PAGE && rand_below(r, 6))
			continue;
		values[i] = rand_below(r, 4) ? rand_next(r) : rand_below(r, 20);
		page = make_page(s, buf, PAGE, gfn_of(i), values[i]);
		CHECK_OK(epoch_put(ep, &page, 1, &e));
	}
	CHECK_OK(epoch_commit(ep, values, FRAMES * sizeof(*values), &meta, &point, &id, NULL, &e));
	say(fd, 'a', id);
}

static void child(const char *dir, uint64_t seed, int fd)
{
	struct store_vm vm = {.name = "guest", .arch = "x86_64", .page_size = PAGE};
	struct store *s = open_store(dir);
	struct rand r = rand_of(seed);
	uint64_t values[FRAMES], timeline;
	struct store_snapshot newest;
	struct pagemap *live;

	CHECK_OK(store_vm_register(s, &vm, &e));
	memset(values, 0xff, sizeof(values));
	if (!store_snapshot_find(s, "guest", 0, &newest, NULL)) {
		void *state;
		size_t len;

		CHECK_OK(store_state_load(s, newest.point, &state, &len, &e));
		CHECK(len == sizeof(values));
		memcpy(values, state, len);
		free(state);
	} else {
		newest.point = (struct snapd_point){0, 0};
	}
	CHECK_OK(store_timeline_create(s, vm.id, newest.point, &timeline, &e));
	CHECK_OK(store_map_load(s, newest.point, true, &live, &e));
	for (;;) {
		one_epoch(s, &r, vm.id, timeline, live, values, fd);
		if (!rand_below(&r, 4))
			drop_old(s, fd, timeline);
	}
}

/* ---- the parent ---- */

static void forget(struct known *k, uint64_t id)
{
	for (size_t i = 0; i < k->nr; i++)
		if (k->ids[i] == id) {
			k->ids[i] = k->ids[--k->nr];
			return;
		}
}

static void listen_to(struct known *k, int fd)
{
	struct message m;

	while (read(fd, &m, sizeof(m)) == sizeof(m)) {
		if (m.what == 'd') {
			forget(k, m.id);
			continue;
		}
		if (k->nr == k->cap) {
			k->cap = k->cap ? k->cap * 2 : 64;
			k->ids = realloc(k->ids, k->cap * sizeof(*k->ids));
			CHECK(k->ids);
		}
		k->ids[k->nr++] = m.id;
	}
}

static bool is_known(const struct known *k, uint64_t id)
{
	for (size_t i = 0; i < k->nr; i++)
		if (k->ids[i] == id)
			return true;
	return false;
}

static void check_one(struct store *s, struct store_reader *reader, const struct store_snapshot *sn)
{
	uint64_t *values;
	size_t len;

	CHECK_OK(store_state_load(s, sn->point, (void **)&values, &len, &e));
	CHECK(len == FRAMES * sizeof(*values));
	check_point(s, reader, PAGE, sn->point, gfn_of, values, FRAMES);
	free(values);
}

/* Returns how many are there that nobody acknowledged since the last look. */
static uint32_t check_store(const char *dir, struct known *k)
{
	struct store *s = open_store(dir);
	struct store_snapshot *list;
	struct store_reader *reader;
	uint32_t unknown = 0, found = 0;
	size_t nr;

	CHECK_OK(store_reader_create(s, PAGE, &reader, &e));
	CHECK_OK(store_snapshot_list(s, NULL, &list, &nr, &e));
	for (size_t i = 0; i < nr; i++) {
		check_one(s, reader, &list[i]);
		if (is_known(k, list[i].id))
			found++;
		else
			unknown++;
	}
	CHECK(found == k->nr);
	/* What is there now is known from here on. */
	k->nr = 0;
	CHECK(k->cap >= nr || (k->ids = realloc(k->ids, (k->cap = nr + 64) * sizeof(*k->ids))));
	for (size_t i = 0; i < nr; i++)
		k->ids[k->nr++] = list[i].id;
	free(list);
	store_reader_destroy(reader);
	store_close(s);
	return unknown;
}

static void run_and_kill(const char *dir, struct known *k, struct rand *r)
{
	struct timespec nap = {.tv_nsec = (long)(2000000 + rand_below(r, 60000000))};
	int fds[2], status;
	pid_t pid;

	CHECK(pipe(fds) == 0);
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		close(fds[0]);
		child(dir, rand_next(r), fds[1]);
	}
	close(fds[1]);
	nanosleep(&nap, NULL);
	CHECK(kill(pid, SIGKILL) == 0);
	CHECK(waitpid(pid, &status, 0) == pid);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	listen_to(k, fds[0]);
	close(fds[0]);
}

int main(int argc, char **argv)
{
	uint32_t kills = argc > 1 ? (uint32_t)atoi(argv[1]) : 200, unknown = 0;
	struct rand r = rand_of(rand_seed());
	struct known k = {0};
	char *dir = temp_dir();

	log_set_level(LOG_LVL_WARN);
	for (uint32_t i = 0; i < kills; i++) {
		uint32_t more;

		rand_next(&r);
		run_and_kill(dir, &k, &r);
		more = check_store(dir, &k);
		/* One commit whose acknowledgement was cut off, and one deletion that had
		 * been announced but not done, for each of those it was about to do. */
		CHECK(more <= 1 + 2 * KEEP);
		unknown += more;
	}
	printf("%u kills, %u snapshots beyond the acknowledged\n", kills, unknown);
	free(k.ids);
	remove_tree(dir);
	free(dir);
	return 0;
}
