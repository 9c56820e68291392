/* SPDX-License-Identifier: MIT */
/*
 * Goal (I7): after SIGKILL at any instant every acknowledged snapshot is whole, at
 * most the one that was being committed is there besides, whole as well, and
 * nothing else is visible.
 * Method: a child commits epochs, deletes old snapshots and reclaims space in a
 * loop, and says over a pipe what it is about to delete and what was acknowledged;
 * it is killed after a random while.  A snapshot's state is the list of its pages'
 * values, so each one proves itself.  The next child first reads everything; a part
 * of the kills comes while it opens and reads.  The first kills are on a real disk,
 * where writes are under way when the process dies, the others in memory.
 *
 * gc: the same aimed at gc.  Snapshots out of the middle go, so that it writes segments
 * again; it dies before one of the calls that change files, chosen at random, or the next
 * child does while it opens the store.  Every byte is checked each time, and exactly what
 * was acknowledged is there.
 *
 *   store_kill [KILLS [gc]]
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

#include <liburing.h>

#include "snapd/store/check.h"
#include "snapd/store/internal.h"
#include "snapd/util/log.h"
#include "tests/lib/store_model.h"

#define FRAMES 64u
#define PAGE   4096u
#define KEEP   5u
#define CALLS \
	160u /* of a gc that writes a segment again, and opening a store after it, are fewer */

struct message {
	char what; /* 'a' acknowledged, 'd' about to be deleted, 'k' seen, 'c' all were seen */
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

/* To pin and clear the writer's buffers would take a short-lived child most of its
 * time; without, they are written unregistered. */
int io_uring_register_buffers(struct io_uring *ring, const struct iovec *iov, unsigned nr)
{
	return -ENOMEM;
}

int madvise(void *addr, size_t len, int advice)
{
	return 0;
}

/* ---- death at a call ---- */

static bool at_gc;	       /* this is the campaign */
static _Atomic int calls_left; /* 0: none is the last */

static void *before(const char *name)
{
	if (calls_left && !--calls_left)
		kill(getpid(), SIGKILL);
	return dlsym(RTLD_NEXT, name);
}

/* A function that changes files; sym: its name, which with 64-bit offsets need not be `fn`. */
#define CALL(ret, fn, sym, params, args)                            \
	ret die_##fn params __asm__(sym);                           \
	ret die_##fn params                                         \
	{                                                           \
		return ((ret(*) params)(uintptr_t)before(sym))args; \
	}

CALL(ssize_t, pwrite, "pwrite", (int fd, const void *b, size_t n, off_t at), (fd, b, n, at))
CALL(ssize_t, pwrite64, "pwrite64", (int fd, const void *b, size_t n, off_t at), (fd, b, n, at))
CALL(ssize_t, write, "write", (int fd, const void *buf, size_t n), (fd, buf, n))
CALL(ssize_t, writev, "writev", (int fd, const struct iovec *v, int nr), (fd, v, nr))
CALL(int, fsync, "fsync", (int fd), (fd))
CALL(int, fdatasync, "fdatasync", (int fd), (fd))
CALL(int, ftruncate, "ftruncate64", (int fd, off_t len), (fd, len))
CALL(int, renameat, "renameat", (int from_fd, const char *from, int to_fd, const char *to),
     (from_fd, from, to_fd, to))
CALL(int, unlinkat, "unlinkat", (int fd, const char *name, int flags), (fd, name, flags))
CALL(int, submit, "io_uring_submit", (struct io_uring * ring), (ring))

static void die_soon(struct rand *r, uint32_t most)
{
	calls_left = at_gc ? 1 + (int)rand_below(r, most) : 0;
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

static void drop_old(struct store *s, struct rand *r, int fd, uint64_t timeline)
{
	struct store_snapshot *list;
	uint64_t freed;
	size_t nr;

	CHECK_OK(store_snapshot_list(s, NULL, &list, &nr, &e));
	for (size_t i = 0; nr > KEEP && i < nr - KEEP; i++) {
		if (at_gc && rand_below(r, 3))
			continue;
		say(fd, 'd', list[i].id);
		CHECK_OK(store_snapshot_delete(s, list[i].id, &e));
	}
	free(list);
	die_soon(r, CALLS);
	CHECK_OK(store_gc(s, live_timeline, &timeline, &freed, &e));
	calls_left = 0;
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

/* How many segments have been written again; clean: none is unfinished. */
static uint32_t count_rewritten(const char *dir, bool clean)
{
	_Alignas(FMT_BLOCK) uint8_t block[FMT_BLOCK];
	struct seg_ident ident;
	uint32_t nr = 0;

	for (uint32_t id = 1; id < 64; id++) {
		_cleanup_free_ char *path = NULL;
		_cleanup_fd_ int fd = -1;

		CHECK(asprintf(&path, "%s/segments/%08x.new", dir, id) > 0);
		CHECK(!clean || access(path, F_OK));
		memcpy(path + strlen(path) - 3, "seg", 3);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		nr += fd >= 0 && pread(fd, block, sizeof(block), 0) == sizeof(block) &&
		      !seg_super_decode(block, &ident, NULL) && ident.rewrites;
	}
	return nr;
}

static void check_bytes(struct store *s)
{
	struct store_check_config c = {.read_data = true};
	struct store_check_result r;

	CHECK_OK(store_check(s, &c, &r, &e));
	CHECK(!r.damages && !r.losses);
	CHECK(!count_rewritten(s->dir, true) || s->features & 1u << FEATURE_HOLES);
}

/* All that was acknowledged is there, and whole is whatever is there. */
static void check_store(struct store *s, const struct known *k, int fd)
{
	struct store_snapshot *list;
	struct store_reader *reader;
	uint32_t found = 0;
	size_t nr;

	CHECK_OK(store_reader_create(s, PAGE, &reader, &e));
	CHECK_OK(store_snapshot_list(s, NULL, &list, &nr, &e));
	for (size_t i = 0; i < nr; i++) {
		check_one(s, reader, &list[i]);
		found += is_known(k, list[i].id);
		say(fd, 'k', list[i].id);
	}
	CHECK(found == k->nr);
	if (at_gc)
		check_bytes(s);
	say(fd, 'c', 0);
	free(list);
	store_reader_destroy(reader);
}

static void child(const char *dir, const struct known *k, uint64_t seed, bool early, int fd)
{
	struct store_vm vm = {.name = "guest", .arch = "x86_64", .page_size = PAGE};
	struct rand r = rand_of(seed);
	struct store *s;
	uint64_t values[FRAMES], timeline;
	struct store_snapshot newest;
	struct pagemap *live;

	if (early)
		die_soon(&r, CALLS / 8);
	s = open_store(dir);
	calls_left = 0;
	check_store(s, k, fd);
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
			drop_old(s, &r, fd, timeline);
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

static void add_known(struct known *k, uint64_t id)
{
	if (k->nr == k->cap) {
		k->cap = k->cap ? k->cap * 2 : 64;
		k->ids = realloc(k->ids, k->cap * sizeof(*k->ids));
		CHECK(k->ids);
	}
	k->ids[k->nr++] = id;
}

/* What there is now is known from here on. */
static void take_known(struct known *k, const struct known *seen)
{
	k->nr = 0;
	for (size_t i = 0; i < seen->nr; i++)
		add_known(k, seen->ids[i]);
}

static void listen_to(struct known *k, int fd)
{
	struct message m;

	while (read(fd, &m, sizeof(m)) == sizeof(m)) {
		if (m.what == 'd')
			forget(k, m.id);
		else
			add_known(k, m.id);
	}
}

/* Until the child has seen everything, or (false) it ended before. */
static bool wait_checked(struct known *k, int fd)
{
	struct known seen = {0};
	struct message m = {0};

	while (m.what != 'c' && read(fd, &m, sizeof(m)) == sizeof(m))
		if (m.what == 'k')
			add_known(&seen, m.id);
	if (m.what == 'c')
		take_known(k, &seen);
	free(seen.ids);
	return m.what == 'c';
}

/* The child dies by itself, and what it saw is what was known: nothing was under way. */
static void listen_to_gc(struct known *k, int fd)
{
	size_t had = k->nr;

	if (wait_checked(k, fd))
		CHECK(k->nr == had);
	listen_to(k, fd);
}

/* Returns how many there are that nobody acknowledged since the last look. */
static uint32_t run_and_kill(const char *dir, struct known *k, struct rand *r)
{
	bool early = !rand_below(r, 5);
	struct timespec nap = {.tv_nsec = (long)rand_below(r, early ? 3000000 : 5000000)};
	uint32_t unknown = 0, had = (uint32_t)k->nr;
	uint64_t seed = rand_next(r);
	int fds[2], status;
	pid_t pid;

	CHECK(pipe(fds) == 0);
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		close(fds[0]);
		child(dir, k, seed, early, fds[1]);
	}
	close(fds[1]);
	if (at_gc) {
		listen_to_gc(k, fds[0]);
	} else if (early || wait_checked(k, fds[0])) {
		unknown = early ? 0 : (uint32_t)k->nr - had;
		nanosleep(&nap, NULL);
		CHECK(kill(pid, SIGKILL) == 0);
	}
	CHECK(waitpid(pid, &status, 0) == pid);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	if (early && !at_gc)
		wait_checked(k, fds[0]);
	listen_to(k, fds[0]);
	close(fds[0]);
	return unknown;
}

static void campaign(char *dir, uint32_t kills, struct rand *r)
{
	uint32_t unknown = 0;
	struct known k = {0};

	for (uint32_t i = 0; i < kills; i++) {
		uint32_t more = run_and_kill(dir, &k, r);

		/* One commit whose acknowledgement was cut off for each child since, and
		 * deletions that had been announced but not done. */
		CHECK(more <= 8 + 2 * KEEP);
		unknown += more;
	}
	printf("%s: %u kills, %u snapshots beyond the acknowledged, %u segments written again\n",
	       dir, kills, unknown, count_rewritten(dir, false));
	free(k.ids);
	remove_tree(dir);
	free(dir);
}

int main(int argc, char **argv)
{
	uint32_t kills = argc > 1 ? (uint32_t)atoi(argv[1]) : 1000;
	char name[64] = "/dev/shm/snapd-kill-XXXXXX";
	struct rand r = rand_of(rand_seed());

	log_set_level(LOG_LVL_WARN);
	at_gc = argc > 2 && !strcmp(argv[2], "gc");
	if (!at_gc)
		campaign(temp_dir(), kills / 5, &r);
	campaign(mkdtemp(name) ? strdup(name) : temp_dir(), at_gc ? kills : kills - kills / 5, &r);
	return 0;
}
