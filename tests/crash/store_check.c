/* SPDX-License-Identifier: MIT */
/*
 * Goal: every kind of damage is found and named, with what it costs; a whole store
 * has none.
 * Method: a store of three segments, two VMs, a fork; each case damages one thing
 * (a file cut off, gone, swapped, doubled, another store's; a superblock, a header, a
 * page, a manifest, a state; one record of each database flipped, or deleted), then
 * expects exactly the lines that name it and the losses that follow, and that nothing
 * is found once the damage is taken back.
 */
#include <fcntl.h>
#include <lmdb.h>
#include <stdarg.h>

#include "snapd/store/check.h"
#include "snapd/store/internal.h"
#include "snapd/util/log.h"
#include "tests/lib/store_model.h"

#define PAGE   4096u
#define FRAMES 700u
#define LINES  64u

struct seen {
	struct store_damage damages[LINES];
	struct store_loss losses[LINES];
	size_t nr_damages, nr_losses;
	struct store_check_result result;
	int refused; /* what store_open() said */
	struct err why;
};

struct place {
	struct rec_epoch rec;
	struct snapd_point point;
	uint64_t snapshot;
};

static char *dir, *copy;
static struct place places[8];
static size_t nr_places;
static loc_t last_loc; /* of frame 5 in the last snapshot of the first VM */

/* ---- the store ---- */

static void take(struct store *s, const uint8_t *vm, uint64_t timeline, struct pagemap *live,
		 uint64_t first, uint64_t n, uint64_t value)
{
	_cleanup_free_ uint8_t *buf = aligned_alloc(PAGE, PAGE);
	struct place *p = &places[nr_places++];
	char name[16];
	struct snapshot_meta meta = {.name = name};
	struct epoch *ep;
	struct ix_txn t;

	snprintf(name, sizeof(name), "s%zu", nr_places);
	CHECK_OK(epoch_begin(s, vm, timeline, PAGE, live, &ep, &e));
	for (uint64_t i = first; i < first + n; i++) {
		struct epoch_page page = make_page(s, buf, PAGE, i, value + i);

		CHECK_OK(epoch_put(ep, &page, 1, &e));
	}
	CHECK_OK(epoch_commit(ep, "state", 5, &meta, &p->point, &p->snapshot, NULL, &e));
	CHECK_OK(index_begin(s->index, &t, &e));
	struct snapd_point at = p->point;

	CHECK_OK(store_epoch_record(&t, &at, &p->rec, &e));
	index_end(&t);
}

static void make_store(const char *where)
{
	struct store_vm vm = {.name = "first", .arch = "x86_64", .page_size = PAGE, .uid = 1};
	struct store_vm other = {.name = "other", .arch = "x86_64", .page_size = PAGE, .uid = 2};
	struct store *s = open_store(where);
	struct pagemap *live;
	uint64_t timeline;

	nr_places = 0;
	CHECK_OK(store_vm_register(s, &vm, &e));
	CHECK_OK(store_vm_register(s, &other, &e));
	CHECK_OK(store_timeline_create(s, vm.id, (struct snapd_point){0, 0}, &timeline, &e));
	CHECK(!pagemap_create(true, &live));
	take(s, vm.id, timeline, live, 0, FRAMES, 1000); /* fills segment 1 */
	take(s, vm.id, timeline, live, 0, 100, 50000);
	take(s, vm.id, timeline, live, 0, 200, 60000);
	last_loc = pagemap_get(live, 5);
	pagemap_destroy(live);
	CHECK_OK(store_timeline_create(s, other.id, places[0].point, &timeline, &e));
	CHECK_OK(store_map_load(s, places[0].point, true, &live, &e));
	take(s, other.id, timeline, live, 600, 3, 70000);
	pagemap_destroy(live);
	store_close(s);
}

static void copy_store(const char *from, const char *to)
{
	char command[512];

	remove_tree(to);
	snprintf(command, sizeof(command), "cp -a %s %s", from, to);
	CHECK(!system(command));
}

/* ---- checking it ---- */

static void on_damage(void *opaque, const struct store_damage *d)
{
	struct seen *seen = opaque;

	CHECK(seen->nr_damages < LINES);
	seen->damages[seen->nr_damages++] = *d;
}

static void on_loss(void *opaque, const struct store_loss *l)
{
	struct seen *seen = opaque;

	CHECK(seen->nr_losses < LINES);
	seen->losses[seen->nr_losses++] = *l;
}

static struct seen *look(const char *where, bool read_data)
{
	static struct seen seen;
	struct store_config config = {.dir = where, .read_only = true};
	struct store_check_config c = {
		.read_data = read_data, .damage = on_damage, .loss = on_loss, .opaque = &seen};
	struct store *s;

	seen = (struct seen){0};
	seen.refused = store_open(&config, &s, &seen.why);
	if (seen.refused)
		return &seen;
	CHECK_OK(store_check(s, &c, &seen.result, &e));
	CHECK(seen.result.damages == seen.nr_damages && seen.result.losses == seen.nr_losses);
	store_close(s);
	return &seen;
}

static void fail_with(const struct seen *seen, const char *want)
{
	printf("wanted: %s\nfound (open: %s):\n", want, seen->why.text);
	for (size_t i = 0; i < seen->nr_damages; i++)
		printf("  %s: %s\n", damage_kind_names[seen->damages[i].kind],
		       seen->damages[i].text);
	for (size_t i = 0; i < seen->nr_losses; i++)
		printf("  lost: snapshot %llu: %s, %llu pages, %u ranges from %#llx\n",
		       (unsigned long long)seen->losses[i].snapshot,
		       seen->losses[i].whole ? "whole" : "in part",
		       (unsigned long long)seen->losses[i].nr_pages, seen->losses[i].nr_ranges,
		       (unsigned long long)seen->losses[i].ranges[0][0]);
	fflush(stdout);
	abort();
}

/* Each word after the count is a part of some line's text, in the order of the lines. */
static void expect(struct seen *seen, enum damage_kind kind, size_t nr, ...)
{
	va_list ap;

	va_start(ap, nr);
	for (size_t i = 0; i < nr; i++) {
		const char *want = va_arg(ap, const char *);

		if (seen->nr_damages != nr || seen->damages[i].kind != kind ||
		    !strstr(seen->damages[i].text, want))
			fail_with(seen, want);
	}
	va_end(ap);
	if (seen->nr_damages != nr)
		fail_with(seen, "no more lines");
}

static void expect_losses(const struct seen *seen, size_t nr)
{
	if (seen->nr_losses != nr)
		fail_with(seen, "another number of losses");
}

static void expect_loss(const struct seen *seen, size_t i, uint64_t snapshot, bool whole,
			uint64_t pages, uint64_t first)
{
	const struct store_loss *l = &seen->losses[i];

	if (l->snapshot != snapshot || l->whole != whole || (!whole && l->nr_pages != pages) ||
	    (!whole && l->ranges[0][0] != first))
		fail_with(seen, "another loss");
}

/* ---- damage to files ---- */

static char *segment_path(uint32_t id)
{
	static char paths[4][256];
	static unsigned int next;
	char *path = paths[next++ % 4];

	snprintf(path, sizeof(paths[0]), "%s/segments/%08x.seg", copy, id);
	return path;
}

static void flip(uint32_t segment, uint64_t offset)
{
	_cleanup_fd_ int fd = open(segment_path(segment), O_RDWR | O_CLOEXEC);
	uint8_t byte;

	CHECK(fd >= 0 && pread(fd, &byte, 1, (off_t)offset) == 1);
	byte ^= 0x10;
	CHECK(pwrite(fd, &byte, 1, (off_t)offset) == 1);
}

/* Where in its segment a raw page's bytes are. */
static uint64_t page_offset(loc_t loc)
{
	_cleanup_fd_ int fd = open(segment_path(loc_segment(loc)), O_RDONLY | O_CLOEXEC);
	uint64_t at = (uint64_t)loc_block(loc) * PAGE;
	struct batch_header h;
	struct batch_page p;

	CHECK(fd >= 0 && pread(fd, &h, sizeof(h), (off_t)at) == sizeof(h));
	CHECK(pread(fd, &p, sizeof(p), (off_t)(at + sizeof(h) + loc_entry(loc) * sizeof(p))) ==
	      sizeof(p));
	return at + h.header_bytes + p.offset;
}

static const char *text(const char *fmt, ...)
{
	static char texts[4][200];
	static unsigned int next;
	char *t = texts[next++ % 4];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(t, sizeof(texts[0]), fmt, ap);
	va_end(ap);
	return t;
}

static void test_whole(void)
{
	struct seen *seen = look(copy, true);

	expect(seen, DAMAGE_PAGE, 0);
	CHECK(seen->result.pages_read == FRAMES + 303);
	CHECK(seen->result.segments >= 2 && seen->result.blobs == 8 && seen->result.records > 15);
	CHECK(!look(copy, false)->result.pages_read);
}

static void test_page(void)
{
	uint32_t seg = loc_segment(last_loc), block = loc_block(last_loc);
	struct seen *seen;

	flip(seg, page_offset(last_loc) + 99);
	expect(look(copy, false), DAMAGE_PAGE, 0);
	seen = look(copy, true);
	expect(seen, DAMAGE_PAGE, 1,
	       text("segment %08x block %u entry %u: the bytes of a page first stored for address "
		    "0x5000",
		    seg, block, loc_entry(last_loc)));
	expect_losses(seen, 1);
	expect_loss(seen, 0, places[2].snapshot, false, 1, 5);
}

static void test_header(void)
{
	uint32_t seg = loc_segment(last_loc), block = loc_block(last_loc);
	struct seen *seen;

	flip(seg, (uint64_t)block * PAGE + 300);
	seen = look(copy, false);
	expect(seen, DAMAGE_BATCH, 1, text("segment %08x blocks %u to ", seg, block));
	expect_losses(seen, 1);
	CHECK(seen->losses[0].snapshot == places[2].snapshot && !seen->losses[0].whole &&
	      seen->losses[0].nr_pages >= 1);
}

static void test_superblock(void)
{
	struct seen *seen;

	flip(1, 20);
	seen = look(copy, true);
	expect(seen, DAMAGE_SEGMENT, 1, "segment 00000001: segment superblock is damaged");
	expect_losses(seen, 0);
}

static void test_blobs(void)
{
	const struct place *p = &places[1];
	struct seen *seen;

	flip(p->rec.manifest.last.segment, (uint64_t)(p->rec.manifest.last.block + 1) * PAGE + 1);
	seen = look(copy, false);
	expect(seen, DAMAGE_BLOB, 1, "manifest of epoch 2 of timeline 1");
	/* the third builds on it */
	expect_losses(seen, 2);
	expect_loss(seen, 0, places[1].snapshot, true, 0, 0);
	expect_loss(seen, 1, places[2].snapshot, true, 0, 0);
	copy_store(dir, copy);
	flip(p->rec.state.last.segment, (uint64_t)(p->rec.state.last.block + 1) * PAGE + 1);
	seen = look(copy, false);
	expect(seen, DAMAGE_BLOB, 1, "state of epoch 2 of timeline 1");
	expect_losses(seen, 1);
	expect_loss(seen, 0, places[1].snapshot, true, 0, 0);
}

static void test_missing(void)
{
	uint32_t seg = loc_segment(last_loc);
	struct seen *seen;

	CHECK(!unlink(segment_path(seg)));
	seen = look(copy, false);
	CHECK(seen->nr_damages && seen->damages[0].kind == DAMAGE_SEGMENT);
	CHECK(strstr(seen->damages[0].text, text("segment %08x: the file is missing", seg)));
	for (size_t i = 1; i < seen->nr_damages; i++)
		CHECK(seen->damages[i].kind == DAMAGE_BLOB || seen->damages[i].kind == DAMAGE_LOC);
	CHECK(seen->nr_losses);
}

static void test_cut(void)
{
	struct seen *seen;

	CHECK(!truncate(segment_path(1), 300 * PAGE));
	seen = look(copy, false);
	if (seen->damages[0].kind != DAMAGE_SEGMENT ||
	    !strstr(seen->damages[0].text, "segment 00000001: cut off: 1228800 of 2097152 bytes"))
		fail_with(seen, "the segment is cut off");
	for (size_t i = 1; i < seen->nr_damages; i++) /* headers behind the cut */
		CHECK(seen->damages[i].kind == DAMAGE_BATCH);
	expect_losses(seen, 4);
	CHECK(!truncate(segment_path(1), 0));
	seen = look(copy, false);
	CHECK(seen->nr_damages &&
	      strstr(seen->damages[0].text, "segment 00000001: the file is empty"));
}

static void test_swapped(void)
{
	struct seen *seen;

	CHECK(!rename(segment_path(1), segment_path(99)));
	CHECK(!rename(segment_path(2), segment_path(1)));
	CHECK(!rename(segment_path(99), segment_path(2)));
	seen = look(copy, false);
	CHECK(strstr(seen->damages[0].text,
		     "segment 00000001: the file is that of segment 00000002"));
	CHECK(seen->nr_losses == 4);
}

static void copy_file(const char *from, const char *to)
{
	char command[600];

	snprintf(command, sizeof(command), "cp %s %s", from, to);
	CHECK(!system(command));
}

static void test_doubled(void)
{
	struct seen *seen;

	copy_file(segment_path(1), segment_path(2));
	seen = look(copy, false);
	CHECK(strstr(seen->damages[0].text,
		     "segment 00000002: the file is that of segment 00000001"));
	/* one that the index does not name is nobody's */
	copy_store(dir, copy);
	copy_file(segment_path(1), segment_path(77));
	expect(look(copy, false), DAMAGE_PAGE, 0);
}

static void test_other_store(const char *other)
{
	char path[256];
	struct seen *seen;

	snprintf(path, sizeof(path), "%s/segments/00000001.seg", other);
	copy_file(path, segment_path(1));
	seen = look(copy, false);
	CHECK(strstr(seen->damages[0].text, "segment 00000001: the file is one of another store"));
}

/* ---- damage to index records ---- */

enum wound { FLIP, DELETE };

static void wound_record(const char *db, enum wound wound)
{
	char path[256];
	MDB_val key, v;
	MDB_cursor *c;
	MDB_env *env;
	MDB_txn *txn;
	MDB_dbi dbi;
	uint8_t buf[2048];

	snprintf(path, sizeof(path), "%s/index", copy);
	CHECK(!mdb_env_create(&env));
	mdb_env_set_maxdbs(env, 32);
	CHECK(!mdb_env_open(env, path, MDB_NOTLS, 0600));
	CHECK(!mdb_txn_begin(env, NULL, 0, &txn));
	CHECK(!mdb_dbi_open(txn, db, 0, &dbi));
	CHECK(!mdb_cursor_open(txn, dbi, &c));
	CHECK(!mdb_cursor_get(c, &key, &v, MDB_FIRST));
	if (wound == DELETE) {
		CHECK(!mdb_cursor_del(c, 0));
	} else {
		CHECK(v.mv_size <= sizeof(buf));
		memcpy(buf, v.mv_data, v.mv_size);
		buf[v.mv_size - 1] ^= 1;
		v.mv_data = buf;
		CHECK(!mdb_cursor_put(c, &key, &v, MDB_CURRENT));
	}
	mdb_cursor_close(c);
	CHECK(!mdb_txn_commit(txn));
	mdb_env_close(env);
}

/* Does any line say that? */
static void expect_some(struct seen *seen, enum damage_kind kind, const char *want)
{
	for (size_t i = 0; i < seen->nr_damages; i++)
		if (seen->damages[i].kind == kind && strstr(seen->damages[i].text, want))
			return;
	fail_with(seen, want);
}

static void test_records(void)
{
	static const struct {
		const char *db, *flipped, *deleted;
		bool refused;
	} cases[] = {
		{"meta", "record meta/", "the index has lost its identity", true},
		{"segments", "record segments/00000001 is damaged", NULL, true},
		{"vms", "record vms/", "leads nowhere", false},
		{"vmnames", "record vmnames/", "its name leads nowhere", false},
		{"timelines", "record timelines/0000000000000001 is damaged",
		 "the timeline is not in the index", false},
		{"epochs", "record epochs/00000000000000010000000000000001 is damaged",
		 "epoch 1 of timeline 1 is not in the index", false},
		{"snapshots", "record snapshots/0000000000000001 is damaged",
		 "its snapshot 1 is not in the index", false},
		{"snapnames", "record snapnames/", "leads nowhere", false},
	};

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++)
		for (enum wound w = FLIP; w <= DELETE; w++) {
			const char *want = w == FLIP ? cases[i].flipped : cases[i].deleted;
			struct seen *seen;

			if (!want)
				continue;
			copy_store(dir, copy);
			wound_record(cases[i].db, w);
			seen = look(copy, false);
			if (cases[i].refused && (!seen->refused || !strstr(seen->why.text, want)))
				fail_with(seen, want);
			if (!cases[i].refused)
				expect_some(seen, w == FLIP ? DAMAGE_RECORD : DAMAGE_LINK, want);
		}
}

static void test_cancel(void)
{
	struct store_config config = {.dir = copy, .read_only = true};
	struct store_check_config c = {.read_data = true, .percent = 50};
	struct store_check_result result;
	uint32_t at = 0, steps = 0;
	struct store *s;

	CHECK_OK(store_open(&config, &s, &e));
	CHECK_OK(store_check(s, &c, &result, &e));
	CHECK(result.pages_read < FRAMES + 303 && !result.damages);
	c.percent = 0;
	result.pages_read = 0;
	do {
		struct store_check_result one;

		CHECK_OK(store_scrub_step(s, &c, at, &at, &one, &e));
		result.pages_read += one.pages_read;
		steps++;
	} while (at && steps < 100);
	CHECK(result.pages_read == FRAMES + 303);
	store_close(s);
}

int main(void)
{
	static void (*const cases[])(void) = {test_whole,      test_page,    test_header,
					      test_superblock, test_blobs,   test_missing,
					      test_cut,	       test_swapped, test_doubled,
					      test_records,    test_cancel};
	char *other = temp_dir();

	log_set_level(LOG_LVL_ERR - 1);
	dir = temp_dir();
	copy = temp_dir();
	make_store(other);
	make_store(dir);
	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		copy_store(dir, copy);
		cases[i]();
	}
	copy_store(dir, copy);
	test_other_store(other);
	printf("%zu cases\n", ARRAY_SIZE(cases) + 1);
	remove_tree(dir);
	remove_tree(copy);
	remove_tree(other);
	free(dir);
	free(copy);
	free(other);
	return 0;
}
