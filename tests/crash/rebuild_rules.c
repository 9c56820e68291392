/* SPDX-License-Identifier: MIT */
/*
 * Goal: each rule by which rebuild.c decides what counts.
 * Method: for each a store in which a wrong answer shows: what a rule is to leave out is
 * there to be found, and what it needs is taken away where gc might have.  Batches are
 * found in the segment files, in the order of seq, and wiped, damaged or changed there.
 */
#include "snapd/util/log.h"
#include "tests/crash/rebuild_world.h"

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
	CHECK(!is_there(id) && !nr_named);
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

static int forget_records(struct ix_txn *t, void *arg, struct err *e)
{
	struct line *l = arg;
	struct ix_key k = ix_key_point((struct snapd_point){l->timeline, 1});
	struct rec_epoch rec;
	int r = index_get(t, IX_EPOCHS, &k, &rec, sizeof(rec), NULL, NULL, e);

	rec.record = (struct batch_ref){0};
	return r ? r : index_put(t, IX_EPOCHS, &k, &rec, sizeof(rec), NULL, 0, e);
}

/* An epoch without pages, of a store from before epochs had batches of their own, is in the
 * journal alone: the journal is not given up for having no page beside it. */
static void nothing_but_records(void)
{
	struct snapshot_meta meta = {.name = "empty"};
	struct snapd_point at;
	uint64_t id, freed;
	struct line l;

	begin_line(&l, "guest");
	CHECK_OK(epoch_commit(write_pages(&l, 0, 0, 0), NULL, 0, &meta, &at, &id, NULL, &e));
	CHECK_OK(store_update_image(s, forget_records, &l, &e));
	CHECK_OK(store_gc(s, NULL, NULL, &freed, &e));
	end_line(&l);
	rebuild();
	CHECK(!nr_lines && has_name(id, "empty"));
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

/* Of a deletion only the half is left: the epoch says that it has no snapshot. */
static enum fate without_removals(const struct reclog_record *rec)
{
	return rec->removed ? GOES : STAYS;
}

static void half_a_deletion(void)
{
	struct line l;
	uint64_t id;

	begin_line(&l, "guest");
	id = take(&l, 0, 3, 100, "s");
	take(&l, 0, 1, 200, "t");
	delete (id);
	end_line(&l);
	close_store();
	change_records(newest(BATCH_INDEX), without_removals);
	rebuild_closed();
	CHECK(!is_there(id) && nr_named == 1 && named[0] == id);
	check_is_clean();
}

/* ---- where segments end, what is numbered next ---- */

/* All of a database, one after the other. */
static uint32_t read_records(enum index_db db, size_t size, void *ret)
{
	struct ix_iter it;
	struct ix_txn t;
	struct ix_key k;
	uint32_t nr = 0;

	CHECK_OK(index_begin(s->index, &t, &e));
	CHECK_OK(index_iter_init(&it, &t, db, NULL, &e));
	while (index_iter_next(&it, &k, (uint8_t *)ret + nr * size, size, NULL) == 1)
		CHECK(++nr < SEGMENTS);
	index_iter_deinit(&it);
	index_end(&t);
	return nr;
}

static uint32_t read_segments(struct rec_segment *ret)
{
	return read_records(IX_SEGMENTS, sizeof(*ret), ret);
}

/* The records of segments and epochs, before and after. */
static void check_tails(void)
{
	struct rec_epoch epochs[SEGMENTS], epochs_after[SEGMENTS];
	struct rec_segment before[SEGMENTS], after[SEGMENTS];
	uint32_t nr_epochs = read_records(IX_EPOCHS, sizeof(*epochs), epochs);
	uint32_t nr = read_segments(before);

	rebuild();
	/* A segment more: opened the first time, a store writes an image. */
	CHECK(read_segments(after) == nr + 1);
	for (uint32_t i = 0; i < nr; i++)
		CHECK(after[i].tail == before[i].tail && after[i].pages == before[i].pages &&
		      after[i].generation == before[i].generation &&
		      after[i].segment_bytes == before[i].segment_bytes);
	CHECK(read_records(IX_EPOCHS, sizeof(*epochs), epochs_after) == nr_epochs);
	CHECK(!memcmp(epochs, epochs_after, nr_epochs * sizeof(*epochs)));
	CHECK(!result.damages);
	check_is_clean();
}

/* What was given up is behind the tail, be it damaged or not. */
static void given_up(void)
{
	struct spot all[BATCHES_MAX];
	struct line l;
	uint32_t nr;

	begin_line(&l, "guest");
	take(&l, 0, 100, 100, "s");
	nr = list_batches(BATCH_PAGES, all);
	epoch_abort(write_pages(&l, 0, FILLS, 5000));
	end_line(&l);
	CHECK(list_batches(BATCH_PAGES, all) > nr + 1);
	wipe(all[nr]);
	check_tails();
}

/* Each kind of batch is the last one of a segment once: what comes then has the next. */
static void tails(void)
{
	static uint8_t state[120 * PAGE];
	struct snapshot_meta meta = {0};
	struct snapd_point at;
	struct line l;

	for (uint32_t blocks = 90; blocks < 112; blocks++) {
		struct epoch *ep;

		begin_line(&l, "guest");
		ep = write_pages(&l, 0, 400, 1000 * blocks);
		CHECK_OK(
			epoch_commit(ep, state, (size_t)blocks * PAGE, &meta, &at, NULL, NULL, &e));
		end_line(&l);
	}
	check_tails();
}

/* Blocks before the tail that hold no batch are told. */
static void gap(void)
{
	struct spot all[BATCHES_MAX];
	struct line l;

	begin_line(&l, "guest");
	take(&l, 0, FILLS, 100, "s");
	end_line(&l);
	close_store();
	CHECK(list_batches(BATCH_PAGES, all) >= 3);
	wipe(all[0]);
	rebuild_closed();
	CHECK(nr_lines == 1 && result.damages == 1);
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
	end_line(&other);
	gc();
	image();
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

/* Snapshots of three VMs, the second is deleted.  It has the end of segment 1, more, and the
 * beginning of the last segment, where its manifest and record are, among so much else that
 * these stay as they are.  Each hundredth page of the third one is one of it. */
static void spill(uint64_t first, uint64_t second, uint64_t *kept, uint64_t *gone)
{
	struct line a, b, c;
	struct epoch *ep;

	begin_line(&a, "first");
	begin_line(&b, "second");
	begin_line(&c, "third");
	kept[0] = take(&a, 0, first, 1000, "first");
	*gone = take(&b, 0, second, 20000, "gone");
	ep = write_pages(&c, 0, 300, 40000);
	for (uint64_t i = 50; first < 200 && i < second; i += 100)
		put_page(ep, 1000 + i, 2 * (20000 + i));
	kept[1] = commit(ep, "third");
	delete (*gone);
	gc();
	end_line(&a);
	end_line(&b);
	end_line(&c);
}

static void check_gone(const uint64_t *kept, uint64_t gone)
{
	close_store();
	take_journal_away();
	rebuild_closed();
	CHECK(!result.journalled && is_there(kept[0]) && is_there(kept[1]) && !is_there(gone));
	CHECK(nr_named == 1 && named[0] == gone);
	check_is_clean();
}

/* Its pages are out of segment 1, but the headers of their batches are there. */
static void reclaimed_in_part(void)
{
	uint64_t kept[2], gone;

	spill(100, 420, kept, &gone);
	CHECK(features() & 1u << FEATURE_HOLES);
	check_gone(kept, gone);
}

/* Segment 2 is that of others now, whose batches lie as its own did. */
static void recycled(void)
{
	struct spot all[BATCHES_MAX];
	uint64_t kept[2], gone;
	struct line l;
	uint32_t nr;

	spill(400, 620, kept, &gone);
	begin_line(&l, "fourth");
	take(&l, 0, 900, 60000, "fourth");
	end_line(&l);
	nr = list_batches(BATCH_PAGES, all);
	for (uint32_t i = 0; i < nr; i++)
		CHECK((all[i].segment == 2) == (all[i].generation == 2));
	CHECK(!(features() & 1u << FEATURE_HOLES));
	check_gone(kept, gone);
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
		{"nothing but records", nothing_but_records},
		{"an image of several parts", long_image},
		{"a lost epoch, and what builds on it", lost_parent},
		{"a damaged record among others", damaged_record},
		{"half a deletion", half_a_deletion},
		{"tails", tails},
		{"behind the tail", given_up},
		{"a gap", gap},
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
