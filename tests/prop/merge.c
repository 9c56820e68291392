/* SPDX-License-Identifier: MIT */
/*
 * Goal: a snapshot deleted in the middle of a chain gives back, at the next gc, every page
 * that it alone held, and nothing else changes.
 * Method: random histories of one VM (new, zero, vanished pages; epochs that write a
 * checkpoint; forks), random deletions, gc, at times cancelled.  Every value is stored once, so
 * which pages are needed is known from the values alone:
 *   - the places that the index names are those, exactly, where nothing forks;
 *   - each snapshot has every byte; a full check finds nothing;
 *   - accounting says what it says of a fresh store with what remains, snapshot by snapshot;
 *   - the index made again from the segments has the same epochs, bit by bit;
 *   - what changed since a deleted snapshot, merged away, is still told.
 * Then one by one: a reader with a pin goes on while gc runs, one without begins again; what
 * is not worth its manifests waits; no merge without its record in the journal.
 *
 *   merge [HISTORIES]
 */
#include "snapd/store/account.h"
#include "snapd/store/check.h"
#include "snapd/store/internal.h"
#include "snapd/store/mapstream.h"
#include "snapd/store/overlay.h"
#include "snapd/store/rebuild.h"
#include "tests/lib/store_model.h"

#define FRAMES 6000u
#define PAGE   4096u
#define SNAPS  40u

struct snap {
	uint64_t id; /* 0: deleted */
	struct snapd_point point;
	uint32_t nr_values;
	uint64_t values[];
};

static struct {
	struct rand rand;
	char *dir;
	struct store *s;
	struct store_reader *reader;
	uint8_t vm[16];
	uint64_t timeline, next, stop_at;
	struct pagemap *live;
	uint32_t frames;
	uint64_t values[FRAMES];
	struct snap *snaps[SNAPS];
	uint32_t nr_snaps;
	bool forked;
	uint64_t since, fewer;
} w;

/* ---- in between: linked with --wrap ---- */

static void (*on_read)(void); /* once, before that blob is read; it is gone then, or not */
static struct batch_ref read_of;
static bool read_fails;
static int index_error;

int __real_store_blob_read(struct store *s, const struct rec_blob *blob, enum batch_type type,
			   const char *what, const struct blob_ahead *ahead, void **ret,
			   struct err *e);
int __wrap_store_blob_read(struct store *s, const struct rec_blob *blob, enum batch_type type,
			   const char *what, const struct blob_ahead *ahead, void **ret,
			   struct err *e);
int __wrap_store_blob_read(struct store *s, const struct rec_blob *blob, enum batch_type type,
			   const char *what, const struct blob_ahead *ahead, void **ret,
			   struct err *e)
{
	void (*fn)(void) = on_read;

	if (!fn || memcmp(&blob->last, &read_of, sizeof(read_of)) != 0)
		return __real_store_blob_read(s, blob, type, what, ahead, ret, e);
	on_read = NULL;
	fn();
	if (read_fails)
		return err_set(e, E_CORRUPT, "test: it is gone");
	return __real_store_blob_read(s, blob, type, what, NULL, ret, e);
}

int __real_append_blob(struct appender *a, enum batch_type type, const void *bytes, size_t len,
		       struct rec_blob *ret, struct err *e);
int __wrap_append_blob(struct appender *a, enum batch_type type, const void *bytes, size_t len,
		       struct rec_blob *ret, struct err *e);
int __wrap_append_blob(struct appender *a, enum batch_type type, const void *bytes, size_t len,
		       struct rec_blob *ret, struct err *e)
{
	if (type == BATCH_INDEX && index_error)
		return err_errno(e, index_error, "test");
	return __real_append_blob(a, type, bytes, len, ret, e);
}

/* ---- a history ---- */

static uint64_t gfn_of(uint32_t i)
{
	return i;
}

static void open_world(void)
{
	w.s = open_store_as(w.dir, NULL, NULL);
	CHECK_OK(store_reader_create(w.s, PAGE, &w.reader, &e));
}

static void close_world(void)
{
	store_reader_destroy(w.reader);
	store_close(w.s);
}

static void load_live(void)
{
	struct store_timeline tl;

	pagemap_destroy(w.live);
	CHECK_OK(store_timeline_get(w.s, w.timeline, &tl, &e));
	CHECK_OK(store_map_load(w.s, (struct snapd_point){tl.id, tl.head}, true, &w.live, &e));
}

static void begin(uint32_t frames)
{
	struct store_vm vm = {.name = "guest", .arch = "x86_64", .page_size = PAGE};

	w.dir = memory_dir();
	open_world();
	CHECK_OK(store_vm_register(w.s, &vm, &e));
	memcpy(w.vm, vm.id, sizeof(w.vm));
	store_vm_deinit(&vm);
	CHECK_OK(store_timeline_create(w.s, w.vm, (struct snapd_point){0}, &w.timeline, &e));
	load_live();
	w.frames = frames;
	w.nr_snaps = 0;
	w.forked = false;
	memset(w.values, 0xff, sizeof(w.values));
}

static void end(void)
{
	for (uint32_t i = 0; i < w.nr_snaps; i++)
		free(w.snaps[i]);
	pagemap_destroy(w.live);
	w.live = NULL;
	close_world();
	remove_tree(w.dir);
	free(w.dir);
}

static void put(struct epoch *ep, uint32_t i, uint64_t value)
{
	static uint8_t buf[PAGE];
	struct epoch_page page;

	w.values[i] = value;
	if (value == NO_PAGE) {
		CHECK_OK(epoch_gone(ep, gfn_of(i), 1, &e));
		return;
	}
	page = make_page(w.s, buf, PAGE, gfn_of(i), value);
	CHECK_OK(epoch_put(ep, &page, 1, &e));
}

static struct snap *commit(struct epoch *ep)
{
	struct snap *sn = malloc(sizeof(*sn) + w.frames * sizeof(*sn->values));
	struct snapshot_meta meta = {.note = ""};

	CHECK(sn && w.nr_snaps < SNAPS);
	CHECK_OK(epoch_commit(ep, "state", 5, &meta, &sn->point, &sn->id, NULL, &e));
	sn->nr_values = w.frames;
	memcpy(sn->values, w.values, w.frames * sizeof(*sn->values));
	return w.snaps[w.nr_snaps++] = sn;
}

static struct epoch *begin_epoch(void)
{
	struct epoch *ep;

	CHECK_OK(epoch_begin(w.s, w.vm, w.timeline, PAGE, w.live, &ep, &e));
	return ep;
}

/* The frames from `from`, `step` apart. */
static struct snap *take(uint32_t from, uint32_t nr, uint32_t step)
{
	struct epoch *ep = begin_epoch();

	for (uint32_t k = 0; k < nr; k++)
		put(ep, (from + k * step) % w.frames, ++w.next);
	return commit(ep);
}

static void take_random(void)
{
	uint32_t n = (uint32_t)rand_below(&w.rand, rand_below(&w.rand, 4) ? 60 : w.frames);
	struct epoch *ep = begin_epoch();

	while (n--) {
		uint32_t i = (uint32_t)rand_below(&w.rand, w.frames);
		uint64_t what = rand_below(&w.rand, 8);

		put(ep, i, what == 0 ? 0 : what == 1 ? NO_PAGE : ++w.next);
	}
	commit(ep);
}

/* Others go on from here; what it had is in nobody's head. */
static void fork_from(const struct snap *sn)
{
	CHECK_OK(store_timeline_create(w.s, w.vm, sn->point, &w.timeline, &e));
	memcpy(w.values, sn->values, w.frames * sizeof(*w.values));
	load_live();
	w.forked = true;
}

static void drop(struct snap *sn)
{
	if (sn->id)
		CHECK_OK(store_snapshot_delete(w.s, sn->id, &e));
	sn->id = 0;
}

static bool stop(void *opaque, uint64_t done)
{
	(void)opaque;
	return w.stop_at && done >= w.stop_at;
}

static void gc(uint64_t stop_at)
{
	struct gc_config c = {.live = live_timeline, .live_opaque = &w.timeline, .stop = stop};
	uint64_t freed;
	int r;

	w.stop_at = stop_at;
	r = store_gc_paced(w.s, &c, &freed, NULL);
	CHECK(!r || (stop_at && r == -ECANCELED));
}

/* ---- what has to be ---- */

static int compare_values(const void *a, const void *b)
{
	const uint64_t *x = a, *y = b;

	return *x < *y ? -1 : *x > *y;
}

/* Pages that somebody needs: values are stored once. */
static uint64_t needed(void)
{
	uint64_t *all = calloc((w.nr_snaps + 1) * w.frames, sizeof(*all)), n = 0, nr = 0;

	CHECK(all);
	for (uint32_t k = 0; k <= w.nr_snaps; k++) {
		const uint64_t *v = k < w.nr_snaps ? w.snaps[k]->values : w.values;

		for (uint32_t i = 0; (k == w.nr_snaps || w.snaps[k]->id) && i < w.frames; i++)
			if (v[i] && v[i] != NO_PAGE)
				all[n++] = v[i];
	}
	qsort(all, n, sizeof(*all), compare_values);
	for (uint64_t i = 0; i < n; i++)
		nr += !i || all[i] != all[i - 1];
	free(all);
	return nr;
}

static uint64_t named(void)
{
	uint64_t sum = 0;

	for (uint32_t i = 0; i < w.s->nr_segs; i++)
		sum += w.s->segs[i] ? w.s->segs[i]->named.pages : 0;
	return sum;
}

/* Bytes of pages, of one store, as accounting has them. */
static void account(struct store *s, uint64_t *timeline, struct store_account *ret)
{
	struct account_config c = {.live = live_timeline, .live_opaque = timeline};

	CHECK_OK(store_account(s, &c, ret, &e));
}

static uint64_t write_again(struct store *s, const uint8_t vm[16], uint64_t timeline)
{
	static uint8_t buf[PAGE];
	struct snapshot_meta meta = {.note = ""};
	uint64_t *before = malloc(w.frames * sizeof(*before)), nr = 0;
	struct pagemap *live;

	CHECK(before);
	memset(before, 0xff, w.frames * sizeof(*before));
	CHECK_OK(store_map_load(s, (struct snapd_point){timeline, 0}, true, &live, &e));
	for (uint32_t k = 0; k <= w.nr_snaps; k++) {
		const uint64_t *v = k < w.nr_snaps ? w.snaps[k]->values : w.values;
		struct snapd_point point;
		struct epoch *ep;
		uint64_t id;

		if (k < w.nr_snaps && !w.snaps[k]->id)
			continue;
		CHECK_OK(epoch_begin(s, vm, timeline, PAGE, live, &ep, &e));
		for (uint32_t i = 0; i < w.frames; i++) {
			struct epoch_page page = {0};

			if (v[i] == before[i])
				continue;
			if (v[i] == NO_PAGE) {
				CHECK_OK(epoch_gone(ep, gfn_of(i), 1, &e));
				continue;
			}
			page = make_page(s, buf, PAGE, gfn_of(i), v[i]);
			CHECK_OK(epoch_put(ep, &page, 1, &e));
		}
		CHECK_OK(epoch_commit(ep, "state", 5, k < w.nr_snaps ? &meta : NULL, &point, &id,
				      NULL, &e));
		memcpy(before, v, w.frames * sizeof(*before));
		nr++;
	}
	free(before);
	pagemap_destroy(live);
	return nr;
}

/* As in a store in which nothing was ever deleted. */
static void check_account(void)
{
	struct store_vm vm = {.name = "guest", .arch = "x86_64", .page_size = PAGE};
	char *dir = memory_dir();
	struct store *s = open_store(dir);
	struct store_account got, want;
	uint64_t timeline;

	CHECK_OK(store_vm_register(s, &vm, &e));
	CHECK_OK(store_timeline_create(s, vm.id, (struct snapd_point){0}, &timeline, &e));
	write_again(s, vm.id, timeline);
	account(w.s, &w.timeline, &got);
	account(s, &timeline, &want);
	CHECK(got.nr_snapshots == want.nr_snapshots && !want.pages_dead);
	for (size_t i = 0; i < got.nr_snapshots; i++) {
		CHECK(got.snapshots[i].pages_unique == want.snapshots[i].pages_unique);
		CHECK(got.snapshots[i].bytes_unique == want.snapshots[i].bytes_unique);
		CHECK(got.snapshots[i].bytes_logical == want.snapshots[i].bytes_logical);
	}
	CHECK(got.pages_unique == want.pages_unique && got.bytes_unique == want.bytes_unique);
	CHECK(got.pages_shared == want.pages_shared && got.bytes_shared == want.bytes_shared);
	CHECK(got.pages_live == want.pages_live && got.bytes_live == want.bytes_live);
	store_account_deinit(&got);
	store_account_deinit(&want);
	store_vm_deinit(&vm);
	store_close(s);
	remove_tree(dir);
	free(dir);
}

static void check_snaps(void)
{
	struct store_check_config c = {.read_data = true};
	struct store_check_result r;

	for (uint32_t i = 0; i < w.nr_snaps; i++)
		if (w.snaps[i]->id)
			check_point(w.s, w.reader, PAGE, w.snaps[i]->point, gfn_of,
				    w.snaps[i]->values, w.snaps[i]->nr_values);
	CHECK_OK(store_check(w.s, &c, &r, &e));
	CHECK(!r.damages && !r.losses);
}

/* What a stream told, from `base`: no frame that differs is missing. */
static void check_stream(struct mapstream *m, const struct snap *sn, const struct snap *base)
{
	struct manifest_run run;
	uint64_t end = 0;
	int r;

	while ((r = mapstream_next(m, &run, NULL)) == 1) {
		for (; end < run.gfn; end++)
			CHECK(end >= w.frames || sn->values[end] == base->values[end]);
		for (; end < run.gfn + run.len; end++)
			CHECK((loc_kind(run_from(run, end).loc) == LOC_PAGE) ==
			      (sn->values[end] && sn->values[end] != NO_PAGE));
	}
	CHECK(!r);
	for (; end < w.frames; end++)
		CHECK(sn->values[end] == base->values[end]);
	mapstream_close(m);
}

static void check_since(void)
{
	for (uint32_t i = 1; i < w.nr_snaps; i++) {
		const struct snap *sn = w.snaps[i];
		const struct snap *base = w.snaps[rand_below(&w.rand, i)];
		struct mapstream *m;

		if (!sn->id || mapstream_open(w.s, sn->point, &base->point, 1 << 16, &m, NULL))
			continue;
		w.since += !base->id;
		check_stream(m, sn, base);
	}
}

struct epochs {
	struct snapd_point at[256];
	struct rec_epoch rec[256];
	uint32_t nr;
};

static void list_epochs(struct epochs *ret)
{
	struct ix_iter it;
	struct ix_txn t;
	struct ix_key k;
	int r;

	memset(ret, 0, sizeof(*ret));
	CHECK_OK(index_begin(w.s->index, &t, &e));
	CHECK_OK(index_iter_init(&it, &t, IX_EPOCHS, NULL, &e));
	while ((r = index_iter_next(&it, &k, &ret->rec[ret->nr], sizeof(*ret->rec), NULL)) > 0) {
		ret->at[ret->nr++] = (struct snapd_point){ix_be64(k.b), ix_be64(k.b + 8)};
		/* A rebuilt index does not need to know where it was found. */
		ret->rec[ret->nr - 1].record = (struct batch_ref){0};
		ret->rec[ret->nr - 1].head.hash = 0;
		CHECK(ret->nr < ARRAY_SIZE(ret->at));
	}
	CHECK(!r);
	index_iter_deinit(&it);
	index_end(&t);
}

static void check_rebuild(void)
{
	struct rebuild_config c = {.dir = w.dir};
	static struct epochs before, after;
	struct rebuild_result r;

	list_epochs(&before);
	close_world();
	CHECK_OK(store_rebuild_index(&c, &r, &e));
	CHECK(r.journalled && !r.damages && !r.lost_snapshots);
	open_world();
	list_epochs(&after);
	CHECK(!memcmp(&before, &after, sizeof(before)));
	load_live();
}

/* ---- histories ---- */

static void history(bool forks)
{
	uint32_t epochs;
	struct store_stats stats;

	begin(300);
	for (uint32_t round = 0; round < 3; round++) {
		for (uint32_t i = 0; i < 12; i++) {
			if (forks && w.nr_snaps && !rand_below(&w.rand, 4) &&
			    w.snaps[w.nr_snaps - 1]->id)
				fork_from(w.snaps[w.nr_snaps - 1]);
			take_random();
		}
		if (rand_below(&w.rand, 2))
			gc(0);
		for (uint32_t i = 0; i < w.nr_snaps; i++)
			if (rand_below(&w.rand, 3))
				drop(w.snaps[i]);
		CHECK_OK(store_get_stats(w.s, &stats, &e));
		epochs = (uint32_t)stats.epochs;
		while (rand_below(&w.rand, 2))
			gc(1 + rand_below(&w.rand, 50000));
		gc(0);
		CHECK(forks ? named() >= needed() : named() == needed());
		CHECK_OK(store_get_stats(w.s, &stats, &e));
		w.fewer += epochs - stats.epochs;
		check_snaps();
		check_since();
		if (!forks)
			check_account();
		check_rebuild();
		check_snaps();
	}
	end();
}

/* ---- one by one ---- */

static void merge_now(void)
{
	gc(0);
}

/* M3: a pin's chain stays as it is; what came of it is given back by the next run. */
static void held_by_pin(void)
{
	struct snap *base, *mid, *top;
	struct mapstream *m;

	begin(300);
	base = take(0, 300, 1);
	mid = take(0, 50, 1);
	top = take(20, 50, 1);
	take(100, 10, 1);
	drop(mid);
	CHECK_OK(store_pin(w.s, top->point, &e));
	CHECK_OK(mapstream_open(w.s, top->point, &base->point, 1 << 16, &m, &e));
	gc(0);
	CHECK(named() == needed() + 30);
	check_stream(m, top, base);
	store_unpin(w.s, top->point);
	gc(0);
	CHECK(named() == needed());
	check_snaps();
	end();
}

/* Pinned when the new manifest was made already. */
static struct snap *pin_this;

static void read_manifest_of(const struct snap *sn, void (*fn)(void), bool fails)
{
	struct ix_key k = ix_key_point(sn->point);
	struct rec_epoch rec;
	struct ix_txn t;

	CHECK_OK(index_begin(w.s->index, &t, &e));
	CHECK_OK(index_get(&t, IX_EPOCHS, &k, &rec, sizeof(rec), NULL, NULL, &e));
	index_end(&t);
	read_of = rec.manifest.last;
	on_read = fn;
	read_fails = fails;
}

static void pin_now(void)
{
	CHECK_OK(store_pin(w.s, pin_this->point, &e));
}

static void held_late(void)
{
	struct snap *mid;

	begin(300);
	take(0, 300, 1);
	mid = take(0, 50, 1);
	pin_this = take(20, 50, 1);
	gc(0); /* counts all: what it named is read when the new one is made */
	drop(mid);
	read_manifest_of(pin_this, pin_now, false);
	gc(0);
	CHECK(!on_read && named() == needed() + 30);
	store_unpin(w.s, pin_this->point);
	gc(0);
	CHECK(named() == needed());
	end();
}

/* Without a pin: the manifests are merged, and gone, before they are read. */
static void begins_again(void)
{
	struct snap *mid, *top;
	struct store_account a;

	for (uint32_t who = 0; who < 3; who++) {
		struct store_check_config c = {.read_data = true};
		struct store_check_result r;

		begin(300);
		take(0, 300, 1);
		mid = take(0, 60, 1);
		top = take(20, 50, 1);
		take(10, 20, 1);
		gc(0);
		drop(mid);
		read_manifest_of(top, merge_now, true);
		if (who == 0)
			check_point(w.s, w.reader, PAGE, top->point, gfn_of, top->values, 300);
		if (who == 1)
			account(w.s, &w.timeline, &a);
		if (who == 1)
			store_account_deinit(&a);
		if (who == 2) {
			CHECK_OK(store_check(w.s, &c, &r, &e));
			CHECK(!r.damages && !r.losses);
		}
		CHECK(!on_read);
		end();
	}
}

/* M4: one page is not worth a manifest of all frames, forty are. */
static void not_worth_it(void)
{
	uint32_t frames = FRAMES;
	struct snap *big, *mid;

	begin(frames);
	take(0, 1, 1);
	take(0, frames, 7); /* scattered: eleven bytes a frame */
	big = w.snaps[1];
	mid = take(5, 1, 1);
	take(5, 1, 1);
	drop(big);
	(void)mid;
	gc(0);
	CHECK(named() == needed() + 1);
	take(5, 40, 1);
	drop(w.snaps[2]);
	drop(w.snaps[3]);
	gc(0);
	CHECK(named() == needed());
	end();
}

/* What changed since one that was merged away; one that two build on stays. */
static void since_merged(void)
{
	static struct epochs before, after;
	struct snap *mid, *top;
	struct mapstream *m;

	begin(300);
	take(0, 300, 1);
	mid = take(0, 50, 1);
	top = take(20, 50, 1);
	drop(mid);
	gc(0);
	CHECK(named() == needed());
	CHECK_OK(mapstream_open(w.s, top->point, &mid->point, 1 << 16, &m, &e));
	check_stream(m, top, mid);
	mid = take(30, 30, 1);
	top = take(40, 5, 1);
	fork_from(mid);
	take(50, 5, 1);
	drop(mid);
	list_epochs(&before);
	gc(0);
	list_epochs(&after);
	CHECK(!memcmp(&before.rec, &after.rec, sizeof(before.rec)) && top->id);
	end();
}

/* M1: no room for the record of it. */
static void no_journal(void)
{
	static struct epochs before, after;
	struct snap *mid;

	begin(300);
	take(0, 300, 1);
	mid = take(0, 50, 1);
	take(20, 50, 1);
	gc(0);
	drop(mid);
	list_epochs(&before);
	index_error = ENOSPC;
	gc(0);
	list_epochs(&after);
	CHECK(!memcmp(&before, &after, sizeof(before)));
	index_error = 0;
	gc(0);
	CHECK(named() == needed());
	check_rebuild();
	check_snaps();
	end();
}

int main(int argc, char **argv)
{
	uint32_t nr = argc > 1 ? (uint32_t)atoi(argv[1]) : 3;

	w.rand = rand_of(rand_seed());
	for (uint32_t i = 0; i < nr; i++)
		history(i % 3 == 2);
	CHECK(w.fewer && (w.since || nr < 20)); /* the test is of something */
	held_by_pin();
	held_late();
	begins_again();
	not_worth_it();
	since_merged();
	no_journal();
	printf("%u histories: %llu epochs went, changes since %llu deleted ones\n", nr,
	       (unsigned long long)w.fewer, (unsigned long long)w.since);
	return 0;
}
