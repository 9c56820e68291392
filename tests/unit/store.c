/* SPDX-License-Identifier: MIT */
/*
 * Goal: the store's calls keep what store.h says: names and selectors, who sees
 * what, refusals with their codes, the lock, reading beside a writer, proofs by
 * bytes, maps at any depth, a lost index.
 * Method: one case a function, each in a store of its own.
 */
#include <sys/wait.h>

#include "snapd/store/internal.h"
#include "snapd/util/log.h"
#include "tests/lib/store_model.h"

#define PAGE 4096u

struct fixture {
	char *dir;
	struct store *s;
	uint8_t vm[16];
	uint64_t timeline;
	struct pagemap *live;
	struct epoch *ep;
	struct snapd_point point;
	uint64_t snapshot;
	struct epoch_stats stats;
	_Alignas(4096) uint8_t buf[PAGE];
};

static struct fixture f;

static void add_vm(const char *name, uint32_t uid)
{
	struct store_vm vm = {.arch = "x86_64", .page_size = PAGE, .uid = uid};

	strcpy(vm.name, name);
	CHECK_OK(store_vm_register(f.s, &vm, &e));
	memcpy(f.vm, vm.id, sizeof(f.vm));
	CHECK_OK(store_timeline_create(f.s, f.vm, (struct snapd_point){0, 0}, &f.timeline, &e));
	pagemap_destroy(f.live);
	CHECK(pagemap_create(true, &f.live) == 0);
}

static void setup(void)
{
	memset(&f, 0, sizeof(f));
	f.dir = temp_dir();
	f.s = open_store(f.dir);
	add_vm("guest", 1000);
}

static void teardown(void)
{
	store_close(f.s);
	pagemap_destroy(f.live);
	remove_tree(f.dir);
	free(f.dir);
}

static void begin(void)
{
	CHECK_OK(epoch_begin(f.s, f.vm, f.timeline, PAGE, f.live, &f.ep, &e));
}

static void put(uint64_t gfn, uint64_t value)
{
	struct epoch_page page = make_page(f.s, f.buf, PAGE, gfn, value);

	CHECK_OK(epoch_put(f.ep, &page, 1, &e));
}

static int commit(const char *name)
{
	struct snapshot_meta meta = {.name = name, .pause_ns = 5};
	struct err e = {0};
	int r;

	r = epoch_commit(f.ep, "s", 1, &meta, &f.point, &f.snapshot, &f.stats, &e);
	CHECK(!r == !e.text[0]);
	return r;
}

static void snapshot(const char *name, uint64_t gfn, uint64_t value)
{
	begin();
	put(gfn, value);
	CHECK(commit(name) == 0);
}

static int read_page(uint64_t gfn, uint8_t *buf)
{
	struct store_reader *reader;
	struct page_read read = {.gfn = gfn, .dst = buf};
	struct pagemap *m;
	int r;

	CHECK_OK(store_map_load(f.s, f.point, false, &m, &e));
	read.loc = pagemap_get(m, gfn);
	pagemap_destroy(m);
	CHECK_OK(store_reader_create(f.s, PAGE, &reader, &e));
	r = store_read_pages(reader, &read, 1, NULL);
	store_reader_destroy(reader);
	return r;
}

static void expect_page(uint64_t gfn, uint64_t value)
{
	_Alignas(4096) static uint8_t got[PAGE];

	CHECK(read_page(gfn, got) == 0);
	page_fill(f.buf, PAGE, value);
	CHECK(!memcmp(got, f.buf, PAGE));
}

/* ---- cases ---- */

static void test_lock(void)
{
	struct store_config config = {.dir = f.dir};
	struct err e = {0};
	struct store *other;
	char want[32];

	CHECK(store_open(&config, &other, &e) == -EBUSY);
	snprintf(want, sizeof(want), "(pid %d)", (int)getpid());
	CHECK(strstr(e.text, want));
}

static void test_open(void)
{
	struct store_config config = {.dir = "no-store-here"};
	struct store *other;

	CHECK(store_open(&config, &other, NULL) == -ENOENT);
	config.dir = f.dir;
	config.segment_bytes = 12345;
	CHECK(store_open(&config, &other, NULL) == -EINVAL);
}

static void test_names(void)
{
	static const char *const bad[] = {"12", "a b", "a/b", "x@y", "", NULL};
	char longest[80] = {0};

	for (size_t i = 0; bad[i]; i++) {
		begin();
		CHECK(commit(bad[i]) == -EINVAL);
		CHECK(commit("fine") == (i ? -EEXIST : 0));
		if (i)
			epoch_abort(f.ep);
	}
	memset(longest, 'x', 64);
	begin();
	CHECK(commit(longest) == -EINVAL);
	longest[63] = 0;
	CHECK(commit(longest) == 0);
}

static void expect_found(const char *selector, uint32_t uid, uint64_t id)
{
	struct store_snapshot sn;
	struct err e = {0};
	int r = store_snapshot_find(f.s, selector, uid, &sn, &e);

	CHECK(id ? !r && sn.id == id : r == -ENOENT && e.text[0]);
}

static void test_selectors(void)
{
	struct store_snapshot sn;
	char text[64];
	uint64_t first, taken_ns;

	snapshot("one", 1, 11);
	first = f.snapshot;
	snapshot(NULL, 1, 12);
	snprintf(text, sizeof(text), "%llu", (unsigned long long)first);
	expect_found(text, 0, first);
	expect_found(text, 1000, first);
	expect_found(text, 1001, 0);
	expect_found("guest@one", 0, first);
	expect_found("guest", 0, f.snapshot);
	expect_found("guest", 1001, 0);
	expect_found("other@one", 0, 0);
	expect_found("guest@two", 0, 0);
	expect_found("999999", 0, 0);
	snprintf(text, sizeof(text), "guest@%llu", (unsigned long long)first);
	expect_found(text, 0, first);
	CHECK_OK(store_snapshot_get(f.s, f.snapshot, &sn, &e));
	CHECK_OK(store_snapshot_newest(f.s, sn.vm, &taken_ns, &e));
	CHECK(taken_ns == sn.taken_ns);
	sn.vm[0] ^= 1; /* nobody's */
	CHECK_OK(store_snapshot_newest(f.s, sn.vm, &taken_ns, &e));
	CHECK(!taken_ns);
	CHECK(store_snapshot_find(f.s, "", 0, NULL, NULL) == -EINVAL);
	CHECK(store_snapshot_find(f.s, "@x", 0, NULL, NULL) == -EINVAL);
}

static void test_parents(void)
{
	struct store_snapshot sn;
	uint64_t ids[3];

	for (int i = 0; i < 3; i++) {
		snapshot(NULL, 1, 100 + (uint64_t)i);
		ids[i] = f.snapshot;
	}
	CHECK_OK(store_snapshot_get(f.s, ids[2], &sn, &e));
	CHECK(sn.parent_snapshot == ids[1] && sn.pause_ns == 5);
	CHECK_OK(store_snapshot_delete(f.s, ids[1], &e));
	CHECK_OK(store_snapshot_get(f.s, ids[2], &sn, &e));
	CHECK(sn.parent_snapshot == ids[0]);
	CHECK_OK(store_snapshot_delete(f.s, ids[0], &e));
	CHECK_OK(store_snapshot_get(f.s, ids[2], &sn, &e));
	CHECK(!sn.parent_snapshot);
}

/* A fork of a fork's beginning does not depend on that fork, which gc may remove. */
static void test_fork_of_beginning(void)
{
	struct store_timeline tl;
	uint64_t first, second;

	snapshot("base", 1, 1);
	CHECK_OK(store_timeline_create(f.s, f.vm, f.point, &first, &e));
	CHECK_OK(store_timeline_create(f.s, f.vm, (struct snapd_point){first, 0}, &second, &e));
	CHECK_OK(store_timeline_drop(f.s, f.timeline, &e));
	CHECK_OK(store_timeline_get(f.s, f.timeline, &(struct store_timeline){}, &e));
	CHECK_OK(store_timeline_get(f.s, second, &tl, &e));
	CHECK(tl.parent.timeline == f.point.timeline && tl.parent.epoch == f.point.epoch);
}

/* A pin outlives a restart and holds until it is taken away; names stay unique. */
static void test_changes(void)
{
	struct snapshot_change c = {.name = "two", .pin = SNAPSHOT_PIN_SET};
	struct store_snapshot sn;
	uint64_t first, ids[2];

	snapshot("one", 1, 1);
	first = f.snapshot;
	CHECK_OK(store_snapshot_change(f.s, first, &c, &e));
	snapshot("one", 1, 2);
	CHECK(store_snapshot_change(f.s, f.snapshot, &c, NULL) == -EEXIST);
	CHECK(store_snapshot_change(f.s, 999, &c, NULL) == -ENOENT);
	store_close(f.s);
	f.s = open_store(f.dir);
	expect_found("guest@two", 0, first);
	expect_found("guest@one", 0, f.snapshot);
	ids[0] = f.snapshot;
	ids[1] = first;
	CHECK(store_snapshots_delete(f.s, ids, 2, NULL) == -EBUSY);
	expect_found("guest@one", 0, f.snapshot);
	c = (struct snapshot_change){.name = "", .note = "n", .pin = SNAPSHOT_PIN_CLEAR};
	CHECK_OK(store_snapshot_change(f.s, first, &c, &e));
	CHECK_OK(store_snapshot_get(f.s, first, &sn, &e));
	CHECK(!sn.pinned && !sn.name[0] && !strcmp(sn.note, "n"));
	c = (struct snapshot_change){.name = "two"};
	CHECK_OK(store_snapshot_change(f.s, f.snapshot, &c, &e));
	CHECK_OK(store_snapshots_delete(f.s, ids, 2, &e));
}

/* A VM goes with all its snapshots; what was restored from it stays whole. */
static void test_vm_removal(void)
{
	uint8_t old[16], id[16];
	uint64_t nr, freed;
	struct pagemap *live;
	struct snapd_point base;

	snapshot("base", 7, 70);
	base = f.point;
	snapshot(NULL, 8, 80);
	memcpy(old, f.vm, sizeof(old));
	CHECK_OK(store_map_load(f.s, base, true, &live, &e));
	add_vm("clone", 1000);
	pagemap_destroy(f.live);
	f.live = live;
	CHECK_OK(store_timeline_create(f.s, f.vm, base, &f.timeline, &e));
	begin();
	CHECK(store_vm_remove(f.s, f.vm, &nr, NULL) == -EBUSY);
	put(9, 90);
	CHECK(commit("mine") == 0);
	CHECK_OK(store_vm_remove(f.s, old, &nr, &e));
	CHECK(nr == 2);
	CHECK(store_vm_find(f.s, "guest", 1000, id, NULL) == -ENOENT);
	CHECK_OK(store_vm_find(f.s, "clone", 1000, id, &e));
	CHECK(!memcmp(id, f.vm, sizeof(id)) && store_vm_find(f.s, "clone", 1, id, NULL) == -ENOENT);
	CHECK_OK(store_gc(f.s, NULL, NULL, &freed, &e));
	expect_found("guest@base", 0, 0);
	expect_page(7, 70);
	expect_page(9, 90);
	CHECK(store_vm_remove(f.s, old, &nr, NULL) == -ENOENT);
}

/* Two writers on a timeline: the second commit is refused. */
static void test_conflict(void)
{
	struct pagemap *live;
	struct epoch *second;

	CHECK(pagemap_clone(f.live, &live) == 0);
	CHECK_OK(epoch_begin(f.s, f.vm, f.timeline, PAGE, live, &second, &e));
	snapshot(NULL, 1, 1);
	f.ep = second;
	put(1, 2);
	CHECK(commit(NULL) == -EBUSY);
	CHECK(commit(NULL) == -EBUSY);
	epoch_abort(f.ep);
	pagemap_destroy(live);
}

/* The fingerprints say "unchanged" and "duplicate", the bytes do not. */
static void test_collisions(void)
{
	struct pageid id;
	loc_t loc;

	snapshot(NULL, 1, 11);
	loc = pagemap_get(f.live, 1);
	page_fill(f.buf, PAGE, 12);
	id = pageid_of(store_secret(f.s), f.buf, PAGE);
	CHECK(pagemap_set(f.live, 1, loc, pagemap_fp_of(id.lo)) == 0);
	snapshot(NULL, 1, 12);
	CHECK(!f.stats.collisions && f.stats.read_back == 1 && f.stats.stored == 1 &&
	      !f.stats.unchanged);
	expect_page(1, 12);
	page_fill(f.buf, PAGE, 13);
	id = pageid_of(store_secret(f.s), f.buf, PAGE);
	dedup_put(&f.s->dedup, dedup_key(id.lo, 1001, 12), loc);
	snapshot(NULL, 2, 13);
	CHECK(f.stats.collisions == 1 && f.stats.stored == 1 && !f.stats.duplicate);
	expect_page(2, 13);
}

/* All 128 bits agree, the bytes do not: the page gets an identity of its own. */
static void test_full_collision(void)
{
	struct epoch_page page;
	struct pageid id;

	snapshot(NULL, 1, 11);
	page_fill(f.buf, PAGE, 11);
	id = pageid_of(store_secret(f.s), f.buf, PAGE);
	begin();
	page = make_page(f.s, f.buf, PAGE, 2, 14);
	page.id = id;
	CHECK_OK(epoch_put(f.ep, &page, 1, &e));
	CHECK(commit(NULL) == 0);
	CHECK(f.stats.collisions == 1 && f.stats.stored == 1 && f.stats.read_back == 1);
	expect_page(1, 11);
	expect_page(2, 14);
}

static void test_outcomes(void)
{
	begin();
	put(1, 21);
	put(2, 21);
	put(3, 0);
	put(4, 22);
	put(4, 21);
	CHECK(commit(NULL) == 0);
	CHECK(f.stats.stored == 2 && f.stats.duplicate == 2 && f.stats.zero == 1);
	CHECK(pagemap_get(f.live, 1) == pagemap_get(f.live, 4));
	begin();
	put(1, 21);
	put(3, 0);
	put(9, 21);
	CHECK(commit(NULL) == 0);
	CHECK(f.stats.unchanged == 2 && f.stats.duplicate == 1 && !f.stats.stored);
	CHECK(f.stats.read_back == 2);
	/* another owner's pages are not candidates */
	add_vm("stranger", 1001);
	begin();
	put(1, 21);
	CHECK(commit(NULL) == 0);
	CHECK(f.stats.stored == 1);
	/* nor after a restart, where the owner's are again */
	store_close(f.s);
	f.s = open_store(f.dir);
	begin();
	put(5, 21);
	put(6, 22);
	CHECK(commit(NULL) == 0);
	CHECK(f.stats.duplicate == 1 && f.stats.stored == 1);
}

/* Depth must not matter: a checkpoint comes now and then. */
static void test_depth(void)
{
	struct rec_epoch rec;
	uint32_t longest = 0;
	struct ix_txn t;

	begin();
	for (uint64_t i = 0; i < 3000; i++)
		put(i, i % 7 ? 5 : 0);
	CHECK(commit(NULL) == 0);
	for (uint64_t n = 0; n < 300; n++) {
		snapshot(NULL, n, 1000 + n);
		CHECK_OK(index_begin(f.s->index, &t, &e));
		CHECK_OK(store_epoch_record(&t, &f.point, &rec, &e));
		index_end(&t);
		longest = MAX(longest, rec.chain_epochs);
	}
	CHECK(longest > 10 && longest <= 64);
	for (uint64_t n = 0; n < 300; n += 50)
		expect_page(n, 1000 + n);
	expect_page(301, 0);
}

/* A second process reads while this one writes, and sees what was committed. */
static void test_read_only(void)
{
	struct store_config config = {.dir = f.dir, .read_only = true};
	int status;
	pid_t pid;

	snapshot("seen", 1, 31);
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		struct store_vm vm = {.name = "x", .arch = "y", .page_size = PAGE};

		CHECK_OK(store_open(&config, &f.s, &e));
		expect_page(1, 31);
		expect_found("guest@seen", 0, f.snapshot);
		CHECK(epoch_begin(f.s, f.vm, f.timeline, PAGE, f.live, &f.ep, NULL) == -EROFS);
		CHECK(store_vm_register(f.s, &vm, NULL) == -EROFS);
		store_close(f.s);
		_exit(0);
	}
	for (uint64_t i = 0; i < 20; i++)
		snapshot(NULL, 2 + i, 40 + i);
	CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && !WEXITSTATUS(status));
}

/* Segments without their index are not deleted. */
static void test_lost_index(void)
{
	struct store_config config = {.dir = f.dir, .create = true};
	char path[256];
	struct err e = {0};
	struct store *s;

	snapshot(NULL, 1, 1);
	store_close(f.s);
	snprintf(path, sizeof(path), "%s/index/data.mdb", f.dir);
	CHECK(unlink(path) == 0);
	CHECK(store_open(&config, &s, &e) == -EUCLEAN && strstr(e.text, "segments"));
	snprintf(path, sizeof(path), "%s/segments/00000001.seg", f.dir);
	CHECK(access(path, F_OK) == 0 && unlink(path) == 0);
	f.s = open_store(f.dir);
}

static int put_for_test(struct ix_txn *t, void *arg, struct err *e)
{
	const struct store_vm *vm = arg;
	struct ix_key k = ix_key_id(vm->id);
	struct rec_vm rec = {.page_size = vm->page_size};

	return index_put(t, IX_VMS, &k, &rec, sizeof(rec), vm->cmdline, vm->cmdline_len, e);
}

/* The index outgrows its first map. */
static void test_index_growth(void)
{
	struct index_config config = {.create = true, .map_bytes = 1u << 16};
	struct rec_vm rec = {.uid = 3};
	char dir[128], tail[3000] = "x";
	uint8_t id[16] = {0};
	struct index *ix;
	struct ix_key k;
	uint64_t nr;
	struct ix_txn t;

	snprintf(dir, sizeof(dir), "%s/other", f.dir);
	CHECK(mkdir(dir, 0700) == 0);
	config.dir = dir;
	CHECK_OK(index_open(&config, &ix, &e));
	index_close(ix);
	CHECK_OK(index_open(&config, &ix, &e));
	for (uint32_t i = 0; i < 200; i++) {
		struct store_vm vm = {.name = "n", .arch = "a", .page_size = PAGE};

		memcpy(id, &i, sizeof(i));
		memcpy(vm.id, id, sizeof(id));
		vm.cmdline = tail;
		vm.cmdline_len = sizeof(tail);
		CHECK_OK(index_update(ix, put_for_test, &vm, &e));
	}
	CHECK_OK(index_begin(ix, &t, &e));
	CHECK_OK(index_count(&t, IX_VMS, &nr, &e));
	CHECK(nr == 200);
	k = ix_key_id(id);
	CHECK_OK(index_get(&t, IX_VMS, &k, &rec, sizeof(rec), NULL, NULL, &e));
	index_end(&t);
	index_close(ix);
}

/* Some come, some go; at times all go that came. */
static int churn(struct ix_txn *t, void *arg, struct err *e)
{
	static char tail[3000];
	struct rand *rand = arg;
	struct store_vm vm = {.page_size = PAGE, .cmdline = tail};
	bool empty = !rand_below(rand, 3);
	int r = 0;

	for (uint32_t i = 0; !r && i < 400 + 500 * empty; i++) {
		uint32_t id = i < 400 ? (uint32_t)rand_below(rand, 500) : i - 400;
		struct ix_key k;

		memcpy(vm.id, &id, sizeof(id));
		k = ix_key_id(vm.id);
		vm.cmdline_len = rand_below(rand, 10) ? 200 : sizeof(tail);
		r = i >= 400 || rand_below(rand, 3) ? index_del(t, IX_VMS, &k, e)
						    : put_for_test(t, &vm, e);
	}
	return r;
}

/* Pages that a transaction took and gave back are not written: the file may end
 * before the last page, and is sound. */
static void test_short_index(void)
{
	struct index_config config = {.create = true};
	struct rand r = rand_of(1);
	char dir[128], path[192];
	struct index *ix;
	struct ix_txn t;
	MDB_envinfo info;
	struct stat st;
	uint32_t found = 0;

	snprintf(dir, sizeof(dir), "%s/short", f.dir);
	snprintf(path, sizeof(path), "%s/data.mdb", dir);
	CHECK(mkdir(dir, 0700) == 0);
	config.dir = dir;
	for (uint32_t i = 0; i < 100 && found < 3; i++) {
		CHECK_OK(index_open(&config, &ix, &e));
		CHECK_OK(index_update(ix, churn, &r, &e));
		CHECK_OK(index_begin(ix, &t, &e));
		CHECK(!mdb_env_info(mdb_txn_env(t.txn), &info) && !stat(path, &st));
		found += (uint64_t)st.st_size < (info.me_last_pgno + 1) * 4096;
		index_end(&t);
		index_close(ix);
	}
	CHECK(found == 3);
}

int main(void)
{
	static void (*const cases[])(void) = {
		test_lock,	   test_open,		test_names,
		test_selectors,	   test_parents,	test_conflict,
		test_collisions,   test_full_collision, test_outcomes,
		test_depth,	   test_read_only,	test_lost_index,
		test_index_growth, test_short_index,	test_fork_of_beginning,
		test_changes,	   test_vm_removal,
	};

	log_set_level(LOG_LVL_ERR);
	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		setup();
		cases[i]();
		teardown();
	}
	printf("%zu cases\n", ARRAY_SIZE(cases));
	return 0;
}
