/* SPDX-License-Identifier: MIT */
/*
 * Goal: each rule by which rebuild.c decides what counts.
 * Method: for each a store in which a wrong answer shows: what a rule is to leave out is
 * there to be found, and what it needs is taken away where gc might have.  Batches are
 * found in the segment files, in the order of seq, and wiped, damaged or changed there.
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <lmdb.h>
#include <stdio.h>
#include <unistd.h>

#include "snapd/store/check.h"
#include "snapd/store/internal.h"
#include "snapd/store/rebuild.h"
#include "snapd/store/reclog.h"
#include "snapd/util/log.h"
#include "tests/lib/store_model.h"

#define PAGE	    4096u
#define BATCHES_MAX 128u
#define SEGMENTS    8u
#define FILLS	    700u /* pages that do not fit into one segment */

struct line {
	uint8_t vm[16];
	uint64_t timeline;
	struct pagemap *live;
};

/* A batch on disk. */
struct spot {
	uint32_t segment, block, blocks;
	uint64_t seq, generation;
};

static char *dir;
static struct store *s;
static struct rebuild_result result;
static uint32_t nr_lines; /* of the last rebuild */
static uint64_t named[8]; /* snapshots in them */
static uint32_t nr_named;
static void (*before_commit)(void); /* in the next transaction's place, then forgotten */

int mdb_txn_begin(MDB_env *env, MDB_txn *parent, unsigned int flags, MDB_txn **ret)
{
	static int (*real)(MDB_env *, MDB_txn *, unsigned int, MDB_txn **);
	void (*fn)(void) = before_commit;

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "mdb_txn_begin");
	if (fn && !(flags & MDB_RDONLY)) {
		before_commit = NULL;
		fn();
	}
	return real(env, parent, flags, ret);
}

/* ---- the store ---- */

static void begin_line(struct line *l, const char *name)
{
	struct store_vm vm = {.arch = "x86_64", .page_size = PAGE, .uid = 7};

	snprintf(vm.name, sizeof(vm.name), "%s", name);
	CHECK_OK(store_vm_register(s, &vm, &e));
	memcpy(l->vm, vm.id, sizeof(l->vm));
	CHECK_OK(store_timeline_create(s, l->vm, (struct snapd_point){0}, &l->timeline, &e));
	CHECK(!pagemap_create(true, &l->live));
}

static void end_line(struct line *l)
{
	pagemap_destroy(l->live);
	l->live = NULL;
}

static void put_page(struct epoch *ep, uint64_t gfn, uint64_t value)
{
	static _Alignas(4096) uint8_t buf[PAGE];
	struct epoch_page p = make_page(s, buf, PAGE, gfn, value);

	CHECK_OK(epoch_put(ep, &p, 1, &e));
}

static struct epoch *write_pages(struct line *l, uint64_t first, uint64_t nr, uint64_t value)
{
	struct epoch *ep;

	CHECK_OK(epoch_begin(s, l->vm, l->timeline, PAGE, l->live, &ep, &e));
	/* Even ones do not compress: a page takes its block. */
	for (uint64_t i = first; i < first + nr; i++)
		put_page(ep, i, 2 * (value + i));
	return ep;
}

static uint64_t commit(struct epoch *ep, const char *name)
{
	struct snapshot_meta meta = {.name = name};
	struct snapd_point at;
	uint64_t id;

	CHECK_OK(epoch_commit(ep, "state", 5, &meta, &at, &id, NULL, &e));
	return id;
}

static uint64_t take(struct line *l, uint64_t first, uint64_t nr, uint64_t value, const char *name)
{
	return commit(write_pages(l, first, nr, value), name);
}

static void set_note(uint64_t id, const char *note)
{
	struct snapshot_change c = {.note = note};

	CHECK_OK(store_snapshot_change(s, id, &c, &e));
}

static void image(void)
{
	CHECK_OK(store_update_image(s, NULL, NULL, &e));
}

static int nobody(void *opaque, uint64_t **ret, size_t *nr)
{
	*ret = NULL;
	*nr = 0;
	return 0;
}

static void gc(void)
{
	uint64_t freed;

	CHECK_OK(store_gc(s, nobody, NULL, &freed, &e));
}

static void delete (uint64_t id)
{
	CHECK_OK(store_snapshot_delete(s, id, &e));
}

/* ---- batches on disk ---- */

static int open_segment(uint32_t id)
{
	char path[128];

	snprintf(path, sizeof(path), "%s/segments/%08x.seg", dir, id);
	return open(path, O_RDWR | O_CLOEXEC);
}

static int by_seq(const void *a, const void *b)
{
	const struct spot *x = a, *y = b;

	return x->seq < y->seq ? -1 : x->seq > y->seq;
}

/* Those of a type, in all segments, free ones too. */
static uint32_t list_batches(enum batch_type type, struct spot *ret)
{
	uint32_t nr = 0;

	for (uint32_t id = 1; id <= SEGMENTS; id++) {
		_cleanup_fd_ int fd = open_segment(id);
		struct batch_header h;

		for (uint32_t block = 1;
		     fd >= 0 && pread(fd, &h, sizeof(h), (off_t)block * PAGE) == sizeof(h);
		     block++) {
			if (h.magic != BATCH_MAGIC || h.type != type || h.block != block)
				continue;
			CHECK(nr < BATCHES_MAX);
			ret[nr++] = (struct spot){id, block, batch_blocks(&h), h.seq, h.generation};
		}
	}
	qsort(ret, nr, sizeof(*ret), by_seq);
	return nr;
}

static struct spot newest(enum batch_type type)
{
	struct spot all[BATCHES_MAX];
	uint32_t nr = list_batches(type, all);

	CHECK(nr);
	return all[nr - 1];
}

/* As if gc had taken it out. */
static void wipe(struct spot x)
{
	_cleanup_free_ uint8_t *zeroes = calloc(x.blocks, PAGE);
	_cleanup_fd_ int fd = open_segment(x.segment);

	CHECK(pwrite(fd, zeroes, (size_t)x.blocks * PAGE, (off_t)x.block * PAGE) ==
	      (ssize_t)x.blocks * PAGE);
}

/* A batch with records is one that nothing leads to. */
static void disown(struct spot x)
{
	_Alignas(8) uint8_t block[PAGE];
	struct batch_header *h = (struct batch_header *)block;
	_cleanup_fd_ int fd = open_segment(x.segment);

	CHECK(pread(fd, block, PAGE, (off_t)x.block * PAGE) == PAGE);
	h->type = BATCH_STATE;
	batch_seal(h);
	CHECK(pwrite(fd, block, PAGE, (off_t)x.block * PAGE) == PAGE);
}

static void spoil_payload(struct spot x)
{
	_cleanup_fd_ int fd = open_segment(x.segment);

	CHECK(pwrite(fd, "damaged", 7, ((off_t)x.block + 1) * PAGE) == 7);
}

/* What becomes of a record when its batch is written anew. */
enum fate { STAYS, GOES, SPOILED };

/* An EPOCH batch with other records, all else right. */
static void change_records(struct spot x, enum fate (*fate)(const struct reclog_record *))
{
	_cleanup_free_ uint8_t *buf = aligned_alloc(PAGE, BATCH_BYTES_MAX);
	_cleanup_(reclog_deinit) struct reclog log = {0};
	struct batch_header *h = (struct batch_header *)buf;
	_cleanup_fd_ int fd = open_segment(x.segment);
	struct reclog_reader reader;
	struct reclog_record rec;

	CHECK(pread(fd, buf, (size_t)x.blocks * PAGE, (off_t)x.block * PAGE) ==
	      (ssize_t)x.blocks * PAGE);
	reclog_reader_init(&reader, buf + PAGE, h->payload_bytes);
	while (reclog_next(&reader, &rec, NULL) > 0) {
		enum fate f = fate(&rec);

		CHECK(!rec.removed);
		if (f == SPOILED)
			((uint8_t *)rec.value)[rec.len - 1] ^= 1;
		if (f != GOES)
			CHECK(!reclog_add(&log, rec.db, rec.key, rec.key_len, rec.value, rec.len,
					  NULL, 0));
	}
	memset(buf + PAGE, 0, (size_t)(x.blocks - 1) * PAGE);
	memcpy(buf + PAGE, log.bytes, log.len);
	h->payload_bytes = log.len;
	batch_blob_finish(NULL, h, buf + PAGE);
	batch_seal(h);
	CHECK(batch_blocks(h) == x.blocks);
	CHECK(pwrite(fd, buf, (size_t)x.blocks * PAGE, (off_t)x.block * PAGE) ==
	      (ssize_t)x.blocks * PAGE);
}

static enum fate without_journal(const struct reclog_record *rec)
{
	return rec->db == IX_META && rec->key_len == 7 && !memcmp(rec->key, "journal", 7) ? GOES
											  : STAYS;
}

/* The segments as a snapd before there was a journal would have left them. */
static void take_journal_away(void)
{
	struct spot all[BATCHES_MAX];
	uint32_t nr = list_batches(BATCH_INDEX, all);

	for (uint32_t i = 0; i < nr; i++)
		disown(all[i]);
	nr = list_batches(BATCH_EPOCH, all);
	for (uint32_t i = 0; i < nr; i++)
		change_records(all[i], without_journal);
}

/* ---- the rebuild ---- */

static void on_line(void *opaque, const char *line)
{
	unsigned long long id;

	nr_lines++;
	if (sscanf(line, "snapshot %llu of", &id) == 1) {
		CHECK(nr_named < ARRAY_SIZE(named));
		named[nr_named++] = id;
	}
}

/* The index goes, and comes back; the store is open before and after. */
static void close_store(void)
{
	store_close(s);
}

static void rebuild_closed(void)
{
	struct rebuild_config c = {.dir = dir, .tell = on_line};
	char path[128];

	snprintf(path, sizeof(path), "%s/index", dir);
	remove_tree(path);
	nr_lines = nr_named = 0;
	CHECK_OK(store_rebuild_index(&c, &result, &e));
	s = open_store(dir);
}

static void rebuild(void)
{
	close_store();
	rebuild_closed();
}

static bool is_there(uint64_t id)
{
	struct store_snapshot sn;

	return !store_snapshot_get(s, id, &sn, NULL);
}

static bool has_note(uint64_t id, const char *note)
{
	struct store_snapshot sn;

	CHECK_OK(store_snapshot_get(s, id, &sn, &e));
	return !strcmp(sn.note, note);
}

static bool has_name(uint64_t id, const char *name)
{
	struct store_snapshot sn;

	CHECK_OK(store_snapshot_get(s, id, &sn, &e));
	return !strcmp(sn.name, name);
}

static void on_damage(void *opaque, const struct store_damage *d)
{
	printf("%s: %s\n", damage_kind_names[d->kind], d->text);
}

static void check_is_clean(void)
{
	struct store_check_config c = {.read_data = true, .damage = on_damage};
	struct store_check_result r;

	CHECK_OK(store_check(s, &c, &r, &e));
	CHECK(!r.damages && !r.losses);
}

/* ---- images and what came before and after ---- */

/* What an image replaced does not come back, though a step of it is still there. */
static void image_replaces(void)
{
	struct spot second;
	struct line l;
	uint64_t id;

	begin_line(&l, "guest");
	id = take(&l, 0, 3, 100, "s");
	set_note(id, "first");
	set_note(id, "second");
	second = newest(BATCH_INDEX);
	image();
	end_line(&l);
	close_store();
	wipe(second);
	rebuild_closed();
	CHECK(has_note(id, "second"));
}

/* The newest image counts: what was deleted since the one before is not in it. */
static void newest_image(void)
{
	struct spot deletion;
	struct line l;
	uint64_t id;

	begin_line(&l, "guest");
	id = take(&l, 0, 3, 100, "s");
	image();
	delete (id);
	deletion = newest(BATCH_INDEX);
	image();
	end_line(&l);
	close_store();
	wipe(deletion);
	rebuild_closed();
	CHECK(!is_there(id));
}

/* Records count in the order of seq, not of their places. */
static void order(void)
{
	struct epoch *ep;
	struct line l;
	uint64_t id;

	begin_line(&l, "guest");
	id = take(&l, 0, 3, 100, "s");
	ep = write_pages(&l, 0, 1, 200); /* has segment 1 for itself */
	set_note(id, "first");
	CHECK(newest(BATCH_INDEX).segment == 2);
	epoch_abort(ep);
	set_note(id, "second");
	CHECK(newest(BATCH_INDEX).segment == 1);
	end_line(&l);
	rebuild();
	CHECK(!nr_lines && has_note(id, "second"));
}

/* Later than the image: everything, deletions and names too. */
static void after_image(void)
{
	uint64_t a, b, c;
	struct line l;

	begin_line(&l, "guest");
	a = take(&l, 0, 3, 100, "a");
	b = take(&l, 1, 1, 200, "b");
	image();
	set_note(a, "late");
	delete (b);
	c = take(&l, 2, 1, 300, "c");
	end_line(&l);
	rebuild();
	CHECK(!nr_lines && !result.damages);
	CHECK(has_note(a, "late") && !is_there(b) && has_name(c, "c"));
	check_is_clean();
}

/* R1: an epoch before the image that was committed after it is there. */
static void on_its_way(void)
{
	struct epoch *ep;
	struct line l;
	uint64_t id;

	begin_line(&l, "guest");
	take(&l, 0, 30, 100, "before");
	ep = write_pages(&l, 1, 1, 200);
	before_commit = image;
	id = commit(ep, "late");
	CHECK(!before_commit);
	end_line(&l);
	rebuild();
	CHECK(!nr_lines && has_name(id, "late"));
	check_is_clean();
}

/* R1: an epoch before the image that the image does not have was deleted. */
static void deleted_before(void)
{
	struct line l, other;
	uint64_t kept, gone;

	begin_line(&l, "guest");
	begin_line(&other, "other");
	kept = take(&l, 0, 30, 100, "kept");
	gone = take(&other, 0, 2, 200, "gone");
	delete (gone);
	end_line(&l);
	end_line(&other);
	gc();
	image();
	rebuild();
	CHECK(!nr_lines && is_there(kept) && !is_there(gone) && result.epochs == 1);
	check_is_clean();
}

/* An image of several parts is one; its first ones are no batches with records. */
static void long_image(void)
{
	static char cmdline[64 << 10];
	struct line l;
	uint64_t id;

	memset(cmdline, 'x', sizeof(cmdline) - 1);
	begin_line(&l, "guest");
	id = take(&l, 0, 3, 100, "s");
	for (uint32_t i = 0; i < 40; i++) {
		struct store_vm vm = {.arch = "x86_64",
				      .page_size = PAGE,
				      .uid = 7,
				      .cmdline = cmdline,
				      .cmdline_len = sizeof(cmdline)};

		snprintf(vm.name, sizeof(vm.name), "vm-%u", i);
		CHECK_OK(store_vm_register(s, &vm, &e));
	}
	image();
	end_line(&l);
	rebuild();
	CHECK(!nr_lines && !result.damages && result.vms == 41 && is_there(id));
}

/* ---- what is lost ---- */

/* The second of four epochs: those that build on it go with it, and the timeline goes on
 * from the first. */
static void lost_parent(void)
{
	struct spot all[BATCHES_MAX];
	struct store_timeline tl;
	struct line l;
	uint64_t ids[4];

	begin_line(&l, "guest");
	ids[0] = take(&l, 0, 60, 100, "s0");
	for (uint32_t i = 1; i < 4; i++)
		ids[i] = take(&l, i, 1, 1000 * i, NULL);
	end_line(&l);
	close_store();
	CHECK(list_batches(BATCH_MANIFEST, all) == 4);
	CHECK(!list_batches(BATCH_CHECKPOINT, all + 4));
	spoil_payload(all[1]);
	rebuild_closed();
	CHECK(is_there(ids[0]) && result.epochs == 1 && result.snapshots == 1);
	for (uint32_t i = 1; i < 4; i++)
		CHECK(!is_there(ids[i]) && named[i - 1] == ids[i]);
	CHECK(nr_named == 3 && result.lost_snapshots == 3);
	CHECK_OK(store_timeline_get(s, l.timeline, &tl, &e));
	CHECK(tl.head == 1);
	CHECK_OK(store_map_load(s, (struct snapd_point){l.timeline, 1}, true, &l.live, &e));
	CHECK(is_there(take(&l, 5, 1, 9000, "on")));
	end_line(&l);
	/* The lost one's batches are dead now. */
	gc();
	check_is_clean();
}

/* One record of an epoch is damaged: the others count, and agree with each other. */
static enum fate spoil_snapshot(const struct reclog_record *rec)
{
	return rec->db == IX_SNAPSHOTS ? SPOILED : STAYS;
}

static void damaged_record(void)
{
	struct line l;
	uint64_t id;

	begin_line(&l, "guest");
	id = take(&l, 0, 3, 100, "s");
	end_line(&l);
	close_store();
	change_records(newest(BATCH_EPOCH), spoil_snapshot);
	rebuild_closed();
	CHECK(nr_lines == 1 && result.damages == 1 && result.epochs == 1 && !is_there(id));
	check_is_clean();
}

/* ---- where segments end, what is numbered next ---- */

static uint32_t read_segments(struct rec_segment *ret)
{
	struct ix_iter it;
	struct ix_txn t;
	struct ix_key k;
	uint32_t nr = 0;

	CHECK_OK(index_begin(s->index, &t, &e));
	CHECK_OK(index_iter_init(&it, &t, IX_SEGMENTS, NULL, &e));
	while (index_iter_next(&it, &k, &ret[nr], sizeof(*ret), NULL) == 1)
		CHECK(++nr < SEGMENTS);
	index_iter_deinit(&it);
	index_end(&t);
	return nr;
}

/* Behind the last batch that something leads to: an epoch that was given up is behind it. */
static void tails(void)
{
	struct rec_segment before[SEGMENTS], after[SEGMENTS];
	uint32_t nr;
	struct line l;

	begin_line(&l, "guest");
	take(&l, 0, FILLS, 100, "s");
	nr = read_segments(before);
	epoch_abort(write_pages(&l, 0, 20, 5000));
	end_line(&l);
	close_store();
	rebuild_closed();
	/* A segment more: opened the first time, a store writes an image. */
	CHECK(nr == 2 && read_segments(after) == nr + 1);
	for (uint32_t i = 0; i < nr; i++)
		CHECK(after[i].tail == before[i].tail && after[i].pages == before[i].pages &&
		      after[i].generation == before[i].generation &&
		      after[i].segment_bytes == before[i].segment_bytes);
	CHECK(!result.damages);
	check_is_clean();
}

/* What is written after a rebuild is newer than what was there; nothing has a number twice,
 * be it that its first bearer is gone. */
static void numbers(void)
{
	uint64_t kept, gone, timeline, nr;
	struct line l, other;

	begin_line(&l, "guest");
	kept = take(&l, 0, 3, 100, "kept");
	set_note(kept, "before");
	begin_line(&other, "other");
	gone = take(&other, 0, 1, 200, "gone");
	timeline = other.timeline;
	CHECK_OK(store_vm_remove(s, other.vm, &nr, &e));
	image();
	end_line(&other);
	rebuild();
	set_note(kept, "after");
	end_line(&l);
	rebuild();
	CHECK(!nr_lines && has_note(kept, "after"));
	begin_line(&l, "third");
	CHECK(l.timeline > timeline);
	CHECK(take(&l, 0, 1, 300, "new") > gone);
	end_line(&l);
}

/* The same where the counters of the batches are of before their own records. */
static enum fate without_counters(const struct reclog_record *rec)
{
	return rec->db == IX_META && rec->key_len == 8 && !memcmp(rec->key, "counters", 8) ? GOES
											   : STAYS;
}

static void numbers_of_records(void)
{
	struct spot all[BATCHES_MAX];
	uint64_t id, timeline;
	struct line l;

	begin_line(&l, "guest");
	id = take(&l, 0, 3, 100, "s");
	timeline = l.timeline;
	end_line(&l);
	close_store();
	for (uint32_t nr = list_batches(BATCH_INDEX, all); nr--;)
		wipe(all[nr]);
	change_records(newest(BATCH_EPOCH), without_counters);
	rebuild_closed();
	begin_line(&l, "other");
	CHECK(l.timeline > timeline);
	CHECK(take(&l, 0, 1, 300, "new") > id);
	end_line(&l);
}

/* ---- segments that were written again ---- */

static uint32_t features(void)
{
	CHECK_OK(features_load(s, &e));
	return s->features;
}

/* What only the segments show of the features is in the new index. */
static void holes(void)
{
	struct line l, other;
	uint64_t kept, gone;

	begin_line(&l, "guest");
	kept = take(&l, 0, 100, 100, "kept");
	begin_line(&other, "other");
	gone = take(&other, 0, 300, 10000, "gone");
	delete (gone);
	end_line(&l);
	end_line(&other);
	CHECK(!(features() & 1u << FEATURE_HOLES));
	gc();
	CHECK(features() & 1u << FEATURE_HOLES);
	rebuild();
	CHECK(!nr_lines && is_there(kept) && !is_there(gone));
	CHECK(features() & 1u << FEATURE_HOLES);
	check_is_clean();
}

static enum fate spoil_features(const struct reclog_record *rec)
{
	return rec->db == IX_META && rec->key_len == 8 && !memcmp(rec->key, "features", 8) ? SPOILED
											   : STAYS;
}

static void codecs(void)
{
	struct epoch *ep;
	struct line l;

	begin_line(&l, "guest");
	CHECK_OK(epoch_begin(s, l.vm, l.timeline, PAGE, l.live, &ep, &e));
	CHECK_OK(epoch_compress(ep, "zstd", &e));
	put_page(ep, 0, 101); /* compresses */
	commit(ep, "s");
	end_line(&l);
	close_store();
	change_records(newest(BATCH_EPOCH), spoil_features);
	rebuild_closed();
	CHECK(features() & 1u << FEATURE_ZSTD);
	check_is_clean();
}

/* ---- without a journal (R2) ---- */

/* A snapshot whose pages fill segment 1 but for some of another one's, and go on in segment 2,
 * where its manifest and record are, beside so much else that it stays as it is. */
static void spill(uint64_t others, uint64_t *kept, uint64_t *gone)
{
	struct line a, b, c;

	begin_line(&a, "first");
	begin_line(&b, "second");
	begin_line(&c, "third");
	if (others)
		kept[0] = take(&a, 0, others, 1000, "first");
	*gone = take(&b, 0, 520 - others, 20000, "gone");
	kept[1] = take(&c, 0, 300, 40000, "third");
	delete (*gone);
	gc();
	end_line(&a);
	end_line(&b);
	end_line(&c);
}

/* Its pages are out of the segment. */
static void reclaimed_in_part(void)
{
	uint64_t kept[2], gone;

	spill(100, kept, &gone);
	CHECK(features() & 1u << FEATURE_HOLES);
	close_store();
	take_journal_away();
	rebuild_closed();
	CHECK(!result.journalled && is_there(kept[0]) && is_there(kept[1]) && !is_there(gone));
	CHECK(nr_named == 1 && named[0] == gone);
	check_is_clean();
}

/* Its segment is that of others now. */
static void recycled(void)
{
	struct spot all[BATCHES_MAX];
	uint64_t kept[2], gone;
	struct line l;
	uint32_t nr;

	spill(0, kept, &gone);
	begin_line(&l, "fourth");
	kept[0] = take(&l, 0, 511, 60000, "fourth");
	end_line(&l);
	close_store();
	nr = list_batches(BATCH_PAGES, all);
	for (uint32_t i = 0; i < nr; i++)
		CHECK((all[i].segment == 1) == (all[i].generation == 2));
	take_journal_away();
	rebuild_closed();
	CHECK(is_there(kept[0]) && is_there(kept[1]) && !is_there(gone));
	CHECK(nr_named == 1 && named[0] == gone);
	check_is_clean();
}

/* Who took a name later has it, of VMs and of snapshots. */
static void names(void)
{
	uint64_t before[4], after[4], nr;
	uint8_t ids[4][16], found[16];
	char name[16];
	struct line l;

	for (uint32_t i = 0; i < 8; i++) {
		snprintf(name, sizeof(name), "vm-%u", i % 4);
		begin_line(&l, name);
		if (i < 4) {
			before[i] = take(&l, 0, 3, 1000 * i, "a");
			CHECK_OK(store_vm_remove(s, l.vm, &nr, &e));
		} else {
			struct snapshot_change c = {.name = "b"};

			memcpy(ids[i - 4], l.vm, sizeof(l.vm));
			before[i - 4] = take(&l, 0, 3, 1000 * i, "a");
			CHECK_OK(store_snapshot_change(s, before[i - 4], &c, &e));
			after[i - 4] = take(&l, 0, 3, 1000 * i + 100, "a");
		}
		end_line(&l);
	}
	close_store();
	take_journal_away();
	rebuild_closed();
	CHECK(result.vms == 8);
	for (uint32_t i = 0; i < 4; i++) {
		snprintf(name, sizeof(name), "vm-%u", i);
		CHECK_OK(store_vm_find(s, name, 7, found, &e));
		CHECK(!memcmp(found, ids[i], sizeof(found)));
		CHECK(has_name(before[i], "") && has_name(after[i], "a"));
	}
	check_is_clean();
}

static void in_a_store(void (*fn)(void))
{
	dir = memory_dir();
	s = open_store(dir);
	fn();
	store_close(s);
	remove_tree(dir);
	free(dir);
}

int main(void)
{
	static const struct {
		const char *name;
		void (*fn)(void);
	} cases[] = {
		{"an image replaces what was before it", image_replaces},
		{"the newest image counts", newest_image},
		{"the order of seq", order},
		{"what came after the image", after_image},
		{"an epoch on its way while the image was made", on_its_way},
		{"an epoch deleted before the image", deleted_before},
		{"an image of several parts", long_image},
		{"a lost epoch, and what builds on it", lost_parent},
		{"a damaged record among others", damaged_record},
		{"tails", tails},
		{"numbers", numbers},
		{"numbers that only records tell", numbers_of_records},
		{"segments written again", holes},
		{"a codec that only pages tell", codecs},
		{"no journal: reclaimed in part", reclaimed_in_part},
		{"no journal: recycled", recycled},
		{"no journal: names", names},
	};

	log_set_level(LOG_LVL_ERR);
	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		printf("%s\n", cases[i].name);
		fflush(stdout);
		in_a_store(cases[i].fn);
	}
	return 0;
}
