/* SPDX-License-Identifier: MIT */
/*
 * Goal: a damaged index or segment gives a one-line reason, never a crash and
 * never other bytes than were stored; what is not damaged stays readable.
 * Method: a small real store, its whole contents taken down once.  Then, again and
 * again: bits flipped, bytes overwritten or the end cut off at random places of
 * data.mdb, or of a segment; the store is opened and everything in it read.
 *   index:   either -EUCLEAN (or -EPROTO) with a reason, or exactly the contents;
 *   segment: every page either as it was, or -EUCLEAN; a flip in the record or
 *            bytes of one page leaves the pages of other batches readable.
 * Each round runs in a child, so that a crash is a failure with its seed.
 */
#include <fcntl.h>
#include <sys/wait.h>

#include "snapd/util/log.h"
#include "tests/lib/store_model.h"

#define FRAMES	 400u
#define EPOCHS	 24u
#define PAGE	 4096u
#define FILE_MAX ((size_t)16 << 20)

struct contents {
	uint64_t ids[EPOCHS];
	struct snapd_point points[EPOCHS];
	uint64_t values[EPOCHS][FRAMES];
};

static uint64_t gfn_of(uint32_t i)
{
	return i < 200 ? i : ((uint64_t)1 << 30) + i;
}

static void one_epoch(struct store *s, struct rand *r, const uint8_t *vm, uint64_t timeline,
		      struct pagemap *live, struct contents *c, uint32_t n)
{
	_cleanup_free_ uint8_t *buf = aligned_alloc(PAGE, PAGE);
	char name[16];
	struct snapshot_meta meta = {.name = name};
	struct epoch *ep;

	if (n)
		memcpy(c->values[n], c->values[n - 1], sizeof(c->values[n]));
	snprintf(name, sizeof(name), "snap%u", n);
	CHECK_OK(epoch_begin(s, vm, timeline, PAGE, live, &ep, &e));
	for (uint32_t i = 0; i < FRAMES; i++) {
		struct epoch_page page;

		if (n && rand_below(r, 8))
			continue;
		c->values[n][i] = i < 8 || rand_below(r, 6) ? rand_next(r) : rand_below(r, 4);
		page = make_page(s, buf, PAGE, gfn_of(i), c->values[n][i]);
		CHECK_OK(epoch_put(ep, &page, 1, &e));
	}
	CHECK_OK(epoch_commit(ep, "state", 5, &meta, &c->points[n], &c->ids[n], NULL, &e));
}

static void make_store(const char *dir, struct contents *c, struct rand *r)
{
	struct store *s = open_store(dir);
	struct pagemap *live;
	uint64_t timeline, freed;

	for (uint32_t i = 0; i < 40; i++) { /* branch pages in the index */
		struct store_vm vm = {.arch = "x86_64", .page_size = PAGE};

		snprintf(vm.name, sizeof(vm.name), "other-%u", i);
		vm.cmdline = calloc(1, 4096);
		vm.cmdline_len = 4000; /* overflow pages */
		CHECK_OK(store_vm_register(s, &vm, &e));
		CHECK_OK(
			store_timeline_create(s, vm.id, (struct snapd_point){0, 0}, &timeline, &e));
		store_vm_deinit(&vm);
	}
	struct store_vm vm = {.name = "guest", .arch = "x86_64", .page_size = PAGE};

	CHECK_OK(store_vm_register(s, &vm, &e));
	CHECK_OK(store_timeline_create(s, vm.id, (struct snapd_point){0, 0}, &timeline, &e));
	CHECK(pagemap_create(true, &live) == 0);
	for (uint32_t n = 0; n < EPOCHS; n++)
		one_epoch(s, r, vm.id, timeline, live, c, n);
	pagemap_destroy(live);
	CHECK_OK(store_snapshot_delete(s, c->ids[3], &e));
	c->ids[3] = 0;
	CHECK_OK(store_gc(s, live_timeline, &timeline, &freed, &e));
	store_close(s);
}

/* ---- damage ---- */

static size_t load_file(const char *path, uint8_t *buf)
{
	_cleanup_fd_ int fd = open(path, O_RDONLY);
	ssize_t n;

	CHECK(fd >= 0);
	n = read(fd, buf, FILE_MAX);
	CHECK(n > 0);
	return (size_t)n;
}

static void save_file(const char *path, const uint8_t *buf, size_t len)
{
	_cleanup_fd_ int fd = open(path, O_WRONLY | O_TRUNC);

	CHECK(fd >= 0 && write(fd, buf, len) == (ssize_t)len);
}

/* Structure lies at the beginning of pages: half of the flips go there. */
static size_t random_place(struct rand *r, size_t len)
{
	size_t at = rand_below(r, len);

	return rand_below(r, 2) ? at : MIN(at / 4096 * 4096 + rand_below(r, 64), len - 1);
}

static size_t damage(struct rand *r, uint8_t *buf, size_t len)
{
	size_t at = random_place(r, len);

	switch (rand_below(r, 8)) {
	case 0:
		return rand_below(r, 2) ? at : at / 4096 * 4096;
	case 1:
		memset(buf + at, (int)rand_next(r),
		       MIN(len - at, (size_t)(1 + rand_below(r, 4096))));
		return len;
	case 2: /* a page in the place of another */
		memcpy(buf + at / 4096 * 4096, buf + rand_below(r, len / 4096) * 4096, 4096);
		return len;
	default:
		buf[at] ^= (uint8_t)(1u << rand_below(r, 8));
		return len;
	}
}

/* ---- what is left ---- */

static void expect_damage(int r, const struct err *e)
{
	if (r != -EUCLEAN && r != -EPROTO && r != -ENOENT) {
		printf("error %d: %s\n", r, e->text);
		fflush(stdout);
		abort();
	}
	CHECK(e->text[0]);
}

/* 0 as it was; -1 a reason was given. */
static int read_point(struct store *s, struct store_reader *reader, struct snapd_point at,
		      const uint64_t *values, uint32_t *good)
{
	static uint8_t bytes[FRAMES][PAGE] __attribute__((aligned(4096)));
	static uint8_t want[PAGE];
	struct page_read reads[FRAMES];
	struct pagemap *m;
	struct err e = {0};
	int r, bad = 0;

	r = store_map_load(s, at, false, &m, &e);
	if (r) {
		expect_damage(r, &e);
		return -1;
	}
	for (uint32_t i = 0; i < FRAMES; i++)
		reads[i] = (struct page_read){
			.gfn = gfn_of(i), .loc = pagemap_get(m, gfn_of(i)), .dst = bytes[i]};
	pagemap_destroy(m);
	r = store_read_pages(reader, reads, FRAMES, &e);
	for (uint32_t i = 0; i < FRAMES; i++) {
		uint32_t frame = (uint32_t)(((uint8_t(*)[PAGE])reads[i].dst) - bytes);

		if (reads[i].err) {
			CHECK(reads[i].err == -EUCLEAN && r);
			bad = -1;
			continue;
		}
		page_fill(want, PAGE, values[frame]);
		CHECK(!memcmp(bytes[frame], want, PAGE));
		(*good)++;
	}
	CHECK(!bad == !r);
	if (r)
		expect_damage(r, &e);
	return bad;
}

/* 0: everything as it was. */
static int read_all(struct store *s, const struct contents *c, uint32_t *good)
{
	struct store_snapshot *list;
	struct store_reader *reader;
	struct err e = {0};
	size_t nr, at = 0;
	int r, bad = 0;

	r = store_snapshot_list(s, NULL, &list, &nr, &e);
	if (r) {
		expect_damage(r, &e);
		return -1;
	}
	CHECK(store_reader_create(s, PAGE, &reader, &e) == 0);
	for (uint32_t i = 0; i < EPOCHS; i++) {
		void *state;
		size_t len;

		if (!c->ids[i])
			continue;
		CHECK(at < nr && list[at].id == c->ids[i]);
		CHECK(list[at].point.timeline == c->points[i].timeline &&
		      list[at].point.epoch == c->points[i].epoch);
		at++;
		if (read_point(s, reader, c->points[i], c->values[i], good))
			bad = -1;
		err_clear(&e);
		r = store_state_load(s, c->points[i], &state, &len, &e);
		if (r) {
			expect_damage(r, &e);
			bad = -1;
			continue;
		}
		CHECK(len == 5 && !memcmp(state, "state", 5));
		free(state);
	}
	CHECK(at == nr);
	store_reader_destroy(reader);
	free(list);
	return bad;
}

enum outcome { SAME = 10, REFUSED = 11, PARTLY = 12 };

static int open_and_read(const char *dir, const struct contents *c, bool read_only,
			 uint32_t min_good)
{
	struct store_config config = {.dir = dir, .read_only = read_only};
	struct err e = {0};
	struct store *s;
	uint32_t good = 0;
	int r;

	r = store_open(&config, &s, &e);
	if (r) {
		expect_damage(r, &e);
		return REFUSED;
	}
	r = read_all(s, c, &good);
	store_close(s);
	CHECK(good >= min_good);
	return r ? PARTLY : SAME;
}

/* In a child: a crash of ours is not one of the test. */
static int child_outcome(const char *dir, const struct contents *c, bool read_only,
			 uint32_t min_good)
{
	int status;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		log_set_level(LOG_LVL_ERR - 1);
		_exit(open_and_read(dir, c, read_only, min_good));
	}
	CHECK(waitpid(pid, &status, 0) == pid);
	if (!WIFEXITED(status) || WEXITSTATUS(status) < SAME) {
		printf("the reader ended with status 0x%x\n", status);
		fflush(stdout);
		abort();
	}
	return WEXITSTATUS(status);
}

static void index_rounds(const char *dir, const struct contents *c, struct rand *r, uint32_t rounds)
{
	_cleanup_free_ uint8_t *good = malloc(FILE_MAX), *bad = malloc(FILE_MAX);
	uint32_t seen[3] = {0};
	char path[4096];
	size_t len;

	snprintf(path, sizeof(path), "%s/index/data.mdb", dir);
	len = load_file(path, good);
	for (uint32_t i = 0; i < rounds; i++) {
		size_t new_len = len;

		memcpy(bad, good, len);
		for (uint32_t k = rand_below(r, 8) ? 1 : 3; k; k--)
			new_len = MIN(new_len, damage(r, bad, len));
		save_file(path, bad, new_len);
		seen[child_outcome(dir, c, rand_below(r, 2), 0) - SAME]++;
	}
	save_file(path, good, len);
	CHECK(child_outcome(dir, c, false, 0) == SAME);
	printf("index of %zu bytes: %u without effect, %u refused at open, %u when read\n", len,
	       seen[0], seen[1], seen[2]);
	CHECK(seen[1]);
}

static uint32_t count_segments(const char *dir)
{
	char path[4096];
	uint32_t nr = 0;

	do
		snprintf(path, sizeof(path), "%s/segments/%08x.seg", dir, ++nr);
	while (!access(path, F_OK));
	return nr - 1;
}

static void segment_rounds(const char *dir, const struct contents *c, struct rand *r,
			   uint32_t rounds)
{
	_cleanup_free_ uint8_t *good = malloc(FILE_MAX), *bad = malloc(FILE_MAX);
	uint32_t seen[3] = {0}, segments = count_segments(dir);
	char path[4096];
	size_t len;

	CHECK(segments > 1);
	for (uint32_t i = 0; i < rounds; i++) {
		snprintf(path, sizeof(path), "%s/segments/%08x.seg", dir,
			 1 + (uint32_t)rand_below(r, segments));
		len = load_file(path, good);
		memcpy(bad, good, len);
		save_file(path, bad, damage(r, bad, len));
		seen[child_outcome(dir, c, rand_below(r, 2), 0) - SAME]++;
		save_file(path, good, len);
	}
	CHECK(child_outcome(dir, c, false, 0) == SAME);
	printf("segments: %u without effect, %u refused at open, %u when read\n", seen[0], seen[1],
	       seen[2]);
	CHECK(!seen[1] && seen[2]);
}

/* One flipped bit in the bytes of one page: the others are read. */
static void one_page(const char *dir, const struct contents *c)
{
	_cleanup_free_ uint8_t *buf = malloc(FILE_MAX);
	char path[4096];
	size_t len;

	snprintf(path, sizeof(path), "%s/segments/00000001.seg", dir);
	len = load_file(path, buf);
	buf[4 * 4096 + 77] ^= 1; /* superblock, two header blocks, first page, second */
	save_file(path, buf, len);
	CHECK(child_outcome(dir, c, false, (FRAMES - 1) * (EPOCHS - 1)) == PARTLY);
	buf[4 * 4096 + 77] ^= 1;
	save_file(path, buf, len);
	CHECK(child_outcome(dir, c, false, 0) == SAME);
}

int main(int argc, char **argv)
{
	uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 150;
	struct rand r = rand_of(rand_seed());
	static struct contents c;
	char *dir = temp_dir();

	make_store(dir, &c, &r);
	CHECK(child_outcome(dir, &c, false, FRAMES * (EPOCHS - 1)) == SAME);
	index_rounds(dir, &c, &r, rounds);
	segment_rounds(dir, &c, &r, rounds / 8);
	one_page(dir, &c);
	remove_tree(dir);
	free(dir);
	return 0;
}
