/* SPDX-License-Identifier: MIT */
/*
 * Goal: whatever is done to a store, every snapshot holds what the guest held.
 * Method: random histories of several VMs (epochs with new, zero, equal, duplicate
 * and vanished pages; frames given twice; aborts; rollbacks; forks to another VM;
 * deletions; other names, notes, tags and pins; space reclaimed; the store closed and
 * opened again, at times with an index made from the segments alone, which then has
 * every record that it had) beside a model in arrays; after each step the step's own snapshot, now
 * and then all, are compared page by page; and who needs which page of the segments is worked out
 * from all maps and compared with store_account().  Stores are encrypted or not, and compress
 * otherwise each time.  Nine tenths of the steps in memory: a commit's flushes are three
 * of its four parts on a disk.
 */
#include <fcntl.h>
#include <malloc.h>

#include "snapd/store/account.h"
#include "snapd/store/check.h"
#include "snapd/store/mapstream.h"
#include "snapd/store/overlay.h"
#include "snapd/store/rebuild.h"
#include "tests/lib/store_model.h"

#define FRAMES	  700u
#define VMS	  3u
#define SNAPSHOTS 48u

struct model_vm {
	uint8_t id[16];
	uint64_t timeline;
	struct pagemap *live;
	uint64_t values[FRAMES];
};

struct model_snapshot {
	uint64_t id; /* 0: free */
	uint32_t vm;
	struct snapd_point point;
	uint64_t values[FRAMES];
	uint8_t state[300];
	char name[32];
};

struct world {
	struct rand rand;
	char *dir;
	struct store *store;
	struct store_reader *reader;
	uint32_t page_size;
	char key[64]; /* path of a key file; "": not encrypted */
	struct model_vm vms[VMS];
	struct model_snapshot snapshots[SNAPSHOTS];
	uint64_t next_value, steps;
	uint64_t since[2]; /* changes told since a snapshot: there, deleted */
	uint8_t *buf;
};

/* Three regions far apart. */
static uint64_t gfn_of(uint32_t i)
{
	return i < 300 ? i : i < 600 ? ((uint64_t)1 << 20) + i : ((uint64_t)1 << 41) + i;
}

static void open_world(struct world *w)
{
	static const char *const how[] = {NULL, "none", "lz4", "zstd:3"};

	w->store = open_store_as(w->dir, how[rand_below(&w->rand, ARRAY_SIZE(how))],
				 w->key[0] ? w->key : NULL);
	CHECK_OK(store_reader_create(w->store, w->page_size, &w->reader, &e));
}

static void register_vms(struct world *w)
{
	for (uint32_t i = 0; i < VMS; i++) {
		struct store_vm vm = {.page_size = w->page_size, .uid = i / 2, .arch = "x86_64"};

		snprintf(vm.name, sizeof(vm.name), "vm-%u", i);
		vm.cmdline = strdup("snapvm");
		vm.cmdline_len = 7;
		CHECK_OK(store_vm_register(w->store, &vm, &e));
		if (w->vms[i].timeline)
			CHECK(!memcmp(w->vms[i].id, vm.id, 16));
		memcpy(w->vms[i].id, vm.id, 16);
		store_vm_deinit(&vm);
	}
}

static void load_live(struct world *w, struct model_vm *vm)
{
	struct store_timeline tl;

	pagemap_destroy(vm->live);
	CHECK_OK(store_timeline_get(w->store, vm->timeline, &tl, &e));
	CHECK_OK(store_map_load(w->store, (struct snapd_point){tl.id, tl.head}, true, &vm->live,
				&e));
}

static uint64_t random_value(struct world *w)
{
	switch (rand_below(&w->rand, 5)) {
	case 0:
		return 0;
	case 1:
	case 2:
		return 1 + rand_below(&w->rand, 40); /* likely stored somewhere */
	default:
		return ++w->next_value;
	}
}

static void put_one(struct world *w, struct epoch *ep, uint64_t *values, uint32_t i, uint64_t value)
{
	struct epoch_page page = make_page(w->store, w->buf, w->page_size, gfn_of(i), value);

	CHECK_OK(epoch_put(ep, &page, 1, &e));
	values[i] = value;
}

static void change_some(struct world *w, struct epoch *ep, uint64_t *values)
{
	uint32_t style = (uint32_t)rand_below(&w->rand, 4);
	uint32_t n = (uint32_t)rand_below(&w->rand, style ? 60 : FRAMES);

	for (uint32_t k = 0; k < n; k++) {
		uint32_t i = style == 1 ? (uint32_t)rand_below(&w->rand, FRAMES) : k * FRAMES / n;
		bool same = values[i] != NO_PAGE && rand_below(&w->rand, 4) == 0;

		put_one(w, ep, values, i, same ? values[i] : random_value(w));
	}
}

static void unplug(struct world *w, struct epoch *ep, uint64_t *values)
{
	uint32_t region = (uint32_t)rand_below(&w->rand, 3) * 300;
	uint32_t from = region + (uint32_t)rand_below(&w->rand, 100);
	uint32_t n = (uint32_t)rand_below(&w->rand, 60);

	if (from + n > FRAMES)
		n = FRAMES - from;
	CHECK_OK(epoch_gone(ep, gfn_of(from), n, &e));
	for (uint32_t i = from; i < from + n; i++)
		values[i] = NO_PAGE;
}

static struct model_snapshot *free_slot(struct world *w)
{
	for (uint32_t i = 0; i < SNAPSHOTS; i++)
		if (!w->snapshots[i].id)
			return &w->snapshots[i];
	return NULL;
}

static int live_timelines(void *world, uint64_t **ret, size_t *nr);

/* What a sequence of runs says of each frame; 0: nothing. */
static void read_stream(struct mapstream *m, loc_t locs[FRAMES])
{
	struct manifest_run run;
	uint64_t end = 0;
	uint32_t i = 0;
	int rc;

	memset(locs, 0, FRAMES * sizeof(*locs));
	while ((rc = mapstream_next(m, &run, NULL)) == 1) {
		CHECK(run.len && run.gfn >= end);
		end = run.gfn + run.len;
		for (; i < FRAMES && gfn_of(i) < end; i++)
			if (gfn_of(i) >= run.gfn)
				locs[i] = run_from(run, gfn_of(i)).loc;
	}
	CHECK(!rc);
	mapstream_close(m);
}

/* What changed since another, which may be deleted.  Space is reclaimed meanwhile at times. */
static void check_since(struct world *w, const struct model_snapshot *sn,
			const struct model_snapshot *base, struct pagemap *map, size_t memory)
{
	loc_t locs[FRAMES];
	struct mapstream *m;
	uint64_t freed;

	if (!base->point.timeline ||
	    mapstream_open(w->store, sn->point, &base->point, memory, &m, NULL))
		return;
	w->since[!base->id]++;
	if (!rand_below(&w->rand, 64))
		CHECK_OK(store_gc(w->store, live_timelines, w, &freed, &e));
	read_stream(m, locs);
	for (uint32_t i = 0; i < FRAMES; i++)
		if (!locs[i])
			CHECK(base->values[i] == sn->values[i]);
		else
			CHECK(pagemap_get(map, gfn_of(i)) ==
			      (locs[i] == MANIFEST_GONE ? 0 : locs[i]));
}

/* A snapshot's map as a sequence; and what changed since others. */
static void check_streams(struct world *w, const struct model_snapshot *sn)
{
	size_t memory = rand_below(&w->rand, 3) ? rand_below(&w->rand, 3000) : 1 << 20;
	loc_t locs[FRAMES];
	struct mapstream *m;
	struct pagemap *map;

	CHECK_OK(store_map_load(w->store, sn->point, false, &map, &e));
	CHECK_OK(mapstream_open(w->store, sn->point, NULL, memory, &m, &e));
	read_stream(m, locs);
	for (uint32_t i = 0; i < FRAMES; i++)
		CHECK(locs[i] == pagemap_get(map, gfn_of(i)));
	for (int i = 0; i < 4; i++)
		check_since(w, sn, &w->snapshots[rand_below(&w->rand, SNAPSHOTS)], map, memory);
	pagemap_destroy(map);
}

static void check_snapshot(struct world *w, const struct model_snapshot *sn)
{
	struct store_snapshot got;
	void *state;
	size_t len;

	CHECK_OK(store_snapshot_get(w->store, sn->id, &got, &e));
	CHECK(got.point.timeline == sn->point.timeline && got.point.epoch == sn->point.epoch);
	CHECK(!strcmp(got.name, sn->name) && !memcmp(got.vm, w->vms[sn->vm].id, 16));
	CHECK(got.page_size == w->page_size && got.state_bytes == sizeof(sn->state));
	check_point(w->store, w->reader, w->page_size, sn->point, gfn_of, sn->values, FRAMES);
	CHECK_OK(store_state_load(w->store, sn->point, &state, &len, &e));
	CHECK(len == sizeof(sn->state) && !memcmp(state, sn->state, len));
	free(state);
	check_streams(w, sn);
}

static void snapshot(struct world *w, struct epoch *ep, uint32_t v, const uint64_t *values)
{
	struct model_vm *vm = &w->vms[v];
	struct model_snapshot *sn = free_slot(w);
	struct snapshot_meta meta = {.note = "a note", .tags = "a,b"};
	struct epoch_stats stats;

	if (!sn) {
		epoch_abort(ep);
		return;
	}
	memset(sn, 0, sizeof(*sn));
	for (size_t i = 0; i < sizeof(sn->state); i++)
		sn->state[i] = (uint8_t)rand_next(&w->rand);
	if (rand_below(&w->rand, 2)) {
		snprintf(sn->name, sizeof(sn->name), "s%llu", (unsigned long long)w->steps);
		meta.name = sn->name;
	}
	sn->vm = v;
	CHECK_OK(epoch_commit(ep, sn->state, sizeof(sn->state), &meta, &sn->point, &sn->id, &stats,
			      &e));
	CHECK(stats.pages_in == stats.zero + stats.unchanged + stats.duplicate + stats.stored);
	CHECK(!stats.collisions);
	memcpy(sn->values, values, sizeof(sn->values));
	memcpy(vm->values, values, sizeof(vm->values));
	check_snapshot(w, sn);
}

static void run_epoch(struct world *w, uint32_t v)
{
	struct model_vm *vm = &w->vms[v];
	uint64_t values[FRAMES];
	struct epoch *ep;

	memcpy(values, vm->values, sizeof(values));
	CHECK_OK(epoch_begin(w->store, vm->id, vm->timeline, w->page_size, vm->live, &ep, &e));
	for (uint64_t n = rand_below(&w->rand, 4); n; n--) {
		change_some(w, ep, values);
		if (!rand_below(&w->rand, 4))
			unplug(w, ep, values);
	}
	if (rand_below(&w->rand, 5))
		snapshot(w, ep, v, values);
	else
		epoch_abort(ep);
}

static struct model_snapshot *any_snapshot(struct world *w)
{
	struct model_snapshot *sn = &w->snapshots[rand_below(&w->rand, SNAPSHOTS)];

	return sn->id ? sn : NULL;
}

/* A timeline without an epoch is young: gc would keep what it forks from. */
static void commit_unnamed(struct world *w, struct model_vm *vm)
{
	struct snapd_point point;
	struct epoch *ep;

	CHECK_OK(epoch_begin(w->store, vm->id, vm->timeline, w->page_size, vm->live, &ep, &e));
	CHECK_OK(epoch_commit(ep, NULL, 0, NULL, &point, NULL, NULL, &e));
	CHECK(point.timeline == vm->timeline);
}

/* VM v goes on from a snapshot, its own or another VM's. */
static void fork_from(struct world *w, uint32_t v, const struct model_snapshot *sn)
{
	struct model_vm *vm = &w->vms[v];

	if (!sn)
		return;
	commit_unnamed(w, vm);
	CHECK_OK(store_timeline_create(w->store, vm->id, sn->point, &vm->timeline, &e));
	memcpy(vm->values, sn->values, sizeof(vm->values));
	load_live(w, vm);
}

static void delete_one(struct world *w, struct model_snapshot *sn)
{
	struct store_snapshot got;

	if (!sn)
		return;
	CHECK_OK(store_snapshot_delete(w->store, sn->id, &e));
	CHECK(store_snapshot_get(w->store, sn->id, &got, NULL) == -ENOENT);
	CHECK(store_snapshot_delete(w->store, sn->id, NULL) == -ENOENT);
	sn->id = 0;
}

static int live_timelines(void *world, uint64_t **ret, size_t *nr)
{
	const struct world *w = world;

	*ret = calloc(VMS, sizeof(**ret));
	if (!*ret)
		return -ENOMEM;
	for (*nr = 0; *nr < VMS; (*nr)++)
		(*ret)[*nr] = w->vms[*nr].timeline;
	return 0;
}

/* ---- the slow model of accounting: every map, page by page ---- */

struct need {
	loc_t loc;
	uint32_t first; /* root that needs it */
	bool several;
};

static int compare_needs(const void *a, const void *b)
{
	const struct need *x = a, *y = b;

	if (x->loc != y->loc)
		return x->loc < y->loc ? -1 : 1;
	return x->first < y->first ? -1 : x->first > y->first;
}

/* Pages of a map, each with its root; several GFNs may have one page. */
static size_t add_needs(struct world *w, struct snapd_point at, uint32_t root, struct need *needs)
{
	struct pagemap_iter it;
	struct pagemap *m;
	size_t nr = 0;
	uint64_t gfn;
	loc_t loc;

	CHECK_OK(store_map_load(w->store, at, false, &m, &e));
	CHECK(!pagemap_iter_init(&it, m));
	while (pagemap_iter_next(&it, &gfn, &loc))
		if (loc_kind(loc) == LOC_PAGE)
			needs[nr++] = (struct need){.loc = loc, .first = root};
	pagemap_iter_deinit(&it);
	pagemap_destroy(m);
	return nr;
}

/* Distinct locs, and whether one root or several need each. */
static size_t merge_needs(struct need *needs, size_t nr)
{
	size_t out = 0;

	qsort(needs, nr, sizeof(*needs), compare_needs);
	for (size_t i = 0; i < nr; i++) {
		if (out && needs[out - 1].loc == needs[i].loc)
			needs[out - 1].several |= needs[out - 1].first != needs[i].first;
		else
			needs[out++] = needs[i];
	}
	return out;
}

static void check_account(struct world *w)
{
	struct need *needs = calloc((SNAPSHOTS + VMS) * FRAMES, sizeof(*needs));
	struct account_config c = {.live = live_timelines,
				   .live_opaque = w,
				   .pages_at_once = 1 + (uint32_t)rand_below(&w->rand, 4000)};
	uint64_t unique[SNAPSHOTS + 1] = {0}, shared = 0;
	struct store_snapshot *list;
	struct store_account got;
	struct store_stats stats;
	size_t nr, n = 0, sum = 0;

	CHECK(needs);
	CHECK_OK(store_snapshot_list(w->store, NULL, &list, &nr, &e));
	for (size_t i = 0; i < nr; i++)
		n += add_needs(w, list[i].point, (uint32_t)i, needs + n);
	/* All running VMs are one root: "live". */
	for (uint32_t i = 0; i < VMS; i++) {
		struct store_timeline tl;

		CHECK_OK(store_timeline_get(w->store, w->vms[i].timeline, &tl, &e));
		n += add_needs(w, (struct snapd_point){tl.id, tl.head}, (uint32_t)nr, needs + n);
	}
	n = merge_needs(needs, n);
	for (size_t i = 0; i < n; i++) {
		unique[needs[i].first] += !needs[i].several;
		shared += needs[i].several;
	}
	CHECK_OK(store_account(w->store, &c, &got, &e));
	CHECK(got.nr_snapshots == nr);
	for (size_t i = 0; i < nr; i++) {
		CHECK(got.snapshots[i].id == list[i].id);
		CHECK(got.snapshots[i].pages_unique == unique[i]);
		sum += unique[i];
	}
	CHECK(got.pages_unique == sum && got.pages_live + got.pages_shared == unique[nr] + shared);
	CHECK_OK(store_get_stats(w->store, &stats, &e));
	CHECK(got.pages_dead + n == stats.pages_stored);
	store_account_deinit(&got);
	free(list);
	free(needs);
}

/* Every byte, also of compressed and encrypted batches, is as its record says. */
static void check_bytes(struct world *w)
{
	struct store_check_config c = {.read_data = true};
	struct store_check_result r;
	struct store_stats stats;

	CHECK_OK(store_check(w->store, &c, &r, &e));
	CHECK_OK(store_get_stats(w->store, &stats, &e));
	CHECK(!r.damages && !r.losses && r.pages_read == stats.pages_stored);
}

static void reclaim(struct world *w)
{
	uint64_t freed;

	CHECK_OK(store_gc(w->store, live_timelines, w, &freed, &e));
}

static void check_all(struct world *w)
{
	struct store_snapshot *list;
	uint32_t n = 0;
	size_t nr;

	for (uint32_t i = 0; i < SNAPSHOTS; i++) {
		if (!w->snapshots[i].id)
			continue;
		check_snapshot(w, &w->snapshots[i]);
		n++;
	}
	CHECK_OK(store_snapshot_list(w->store, NULL, &list, &nr, &e));
	CHECK(nr == n);
	for (size_t i = 1; i < nr; i++)
		CHECK(list[i - 1].id < list[i].id);
	free(list);
	for (uint32_t i = 0; i < VMS; i++) {
		struct store_timeline tl;

		CHECK_OK(store_timeline_get(w->store, w->vms[i].timeline, &tl, &e));
		check_point(w->store, w->reader, w->page_size, (struct snapd_point){tl.id, tl.head},
			    gfn_of, w->vms[i].values, FRAMES);
	}
}

/* With every snapshot deleted and no VM running, nothing is left. */
static void check_empties(struct world *w)
{
	struct store_stats stats;
	uint64_t freed;

	for (uint32_t i = 0; i < VMS; i++)
		commit_unnamed(w, &w->vms[i]);
	check_all(w);
	for (uint32_t i = 0; i < SNAPSHOTS; i++)
		if (w->snapshots[i].id)
			delete_one(w, &w->snapshots[i]);
	CHECK_OK(store_gc(w->store, NULL, NULL, &freed, &e));
	get_settled_stats(w->store, &stats);
	CHECK(!stats.snapshots && !stats.epochs && !stats.pages_stored && !stats.bytes_used);
	CHECK(!stats.dedup_entries && stats.segments == stats.segments_free);
	CHECK(!w->steps || freed);
}

static void reopen(struct world *w)
{
	store_reader_destroy(w->reader);
	store_close(w->store);
	open_world(w);
	register_vms(w);
	for (uint32_t i = 0; i < VMS; i++)
		load_live(w, &w->vms[i]);
}

/* What people say of a snapshot. */
static void change_one(struct world *w, struct model_snapshot *sn)
{
	struct snapshot_change c = {.note = "another note", .tags = "c"};
	char name[32];

	if (!sn)
		return;
	if (rand_below(&w->rand, 2)) {
		snprintf(name, sizeof(name), "n%llu", (unsigned long long)w->steps);
		if (!rand_below(&w->rand, 4))
			name[0] = '\0';
		c.name = name;
		strcpy(sn->name, name);
	}
	CHECK_OK(store_snapshot_change(w->store, sn->id, &c, &e));
}

static void on_line(void *opaque, const char *line)
{
	printf("rebuild: %s\n", line);
	CHECK(!opaque);
}

static void rebuild(struct world *w)
{
	struct rebuild_config c = {
		.dir = w->dir, .key_file = w->key[0] ? w->key : NULL, .tell = on_line, .opaque = w};
	struct store_snapshot *before, *after;
	struct store_stats was, is;
	struct rebuild_result r;
	size_t nr, n;

	/* A timeline without an epoch is not in the segments. */
	for (uint32_t i = 0; i < VMS; i++)
		commit_unnamed(w, &w->vms[i]);
	CHECK_OK(store_snapshot_list(w->store, NULL, &before, &nr, &e));
	CHECK_OK(store_get_stats(w->store, &was, &e));
	CHECK(store_rebuild_index(&c, &r, NULL) == -EBUSY);
	store_reader_destroy(w->reader);
	store_close(w->store);
	CHECK_OK(store_rebuild_index(&c, &r, &e));
	CHECK(r.journalled && !r.damages && !r.lost_snapshots && r.snapshots == nr);
	CHECK(r.vms == was.vms && r.epochs == was.epochs && r.timelines <= was.timelines);
	open_world(w);
	for (uint32_t i = 0; i < VMS; i++)
		load_live(w, &w->vms[i]);
	CHECK_OK(store_snapshot_list(w->store, NULL, &after, &n, &e));
	CHECK(n == nr && !memcmp(before, after, nr * sizeof(*before)));
	CHECK_OK(store_get_stats(w->store, &is, &e));
	CHECK(is.bytes_logical == was.bytes_logical);
	free(before);
	free(after);
	check_all(w);
	check_bytes(w);
}

static void step(struct world *w)
{
	uint32_t v = (uint32_t)rand_below(&w->rand, VMS);

	w->steps++;
	switch (rand_below(&w->rand, 28)) {
	case 0:
		reopen(w);
		break;
	case 1:
	case 2:
		fork_from(w, v, any_snapshot(w));
		break;
	case 3:
	case 4:
	case 5:
	case 6:
		delete_one(w, any_snapshot(w));
		break;
	case 7:
	case 8:
		reclaim(w);
		break;
	case 9:
		check_all(w);
		check_account(w);
		check_bytes(w);
		break;
	case 10:
		rebuild(w);
		break;
	case 11:
	case 12:
	case 13:
		change_one(w, any_snapshot(w));
		break;
	default:
		run_epoch(w, v);
	}
}

/* A key beside every other store. */
static void make_key(struct world *w)
{
	_cleanup_fd_ int fd = -1;

	if (rand_below(&w->rand, 2))
		return;
	snprintf(w->key, sizeof(w->key), "%s.key", w->dir);
	fd = open(w->key, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	CHECK(fd >= 0 && write(fd, w->buf, 64) == 64);
}

static void run(uint64_t seed, uint32_t page_size, uint32_t steps, char *dir)
{
	struct world *w = calloc(1, sizeof(*w));

	CHECK(w);
	w->rand = rand_of(seed);
	w->page_size = page_size;
	w->dir = dir;
	w->next_value = 1000;
	w->buf = aligned_alloc(4096, page_size);
	page_fill(w->buf, page_size, seed);
	make_key(w);
	open_world(w);
	register_vms(w);
	for (uint32_t i = 0; i < VMS; i++) {
		CHECK_OK(store_timeline_create(w->store, w->vms[i].id, (struct snapd_point){0, 0},
					       &w->vms[i].timeline, &e));
		memset(w->vms[i].values, 0xff, sizeof(w->vms[i].values));
		load_live(w, &w->vms[i]);
	}
	for (uint32_t i = 0; i < steps; i++)
		step(w);
	check_all(w);
	reopen(w);
	check_all(w);
	check_empties(w);
	printf("changes told since a snapshot: %llu times, %llu since a deleted one\n",
	       (unsigned long long)w->since[0], (unsigned long long)w->since[1]);
	CHECK(steps < 300 || w->since[0]);
	for (uint32_t i = 0; i < VMS; i++)
		pagemap_destroy(w->vms[i].live);
	store_reader_destroy(w->reader);
	store_close(w->store);
	remove_tree(w->dir);
	if (w->key[0])
		unlink(w->key);
	free(w->dir);
	free(w->buf);
	free(w);
}

int main(int argc, char **argv)
{
	uint64_t seed = rand_seed();
	uint32_t steps = argc > 1 ? (uint32_t)atoi(argv[1]) : 300;

	/* Buffers come and go with each check: keep their pages. */
	mallopt(M_MMAP_THRESHOLD, 1 << 30);
	mallopt(M_TRIM_THRESHOLD, 1 << 30);
	run(seed, 4096, steps, memory_dir());
	run(seed + 1, 16384, steps / 4, memory_dir());
	run(seed + 2, 65536, steps / 8, memory_dir());
	run(seed + 3, 4096, steps / 12, temp_dir());
	printf("%u steps, %u on a disk\n", steps + steps / 4 + steps / 8, steps / 12);
	return 0;
}
