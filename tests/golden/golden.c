/* SPDX-License-Identifier: MIT */
/*
 * golden: the store's own side of the golden stores.
 *
 *   golden make STORE COMPRESSION STATE_BYTES [KEY]
 *                                         a small store with every kind of record: zero
 *                                         and vanished frames, duplicates, raw and
 *                                         compressed pages, forks, checkpoints, blobs
 *                                         of several parts, two page sizes
 *   golden holes STORE COMPRESSION [KEY]  takes some of it away again, so that gc writes
 *                                         segments again: parts of batches, whole ones, blobs
 *   golden dump STORE OUT [KEY]           each snapshot as read_store.py writes it: OUT.ID;
 *                                         says their ids, a line each
 *   golden rebuild STORE [KEY]            make its index again from the segments
 *
 * What `make` writes depends on nothing but its arguments and random ids.
 */
#include <string.h>

#include "snapd/store/rebuild.h"
#include "tests/lib/store_model.h"

#define FRAMES 48u

static _Alignas(4096) uint8_t buf[65536];

struct maker {
	struct store *s;
	struct store_vm vm;
	uint64_t timeline, next;
	struct pagemap *live;
};

static void put(struct maker *m, struct epoch *ep, uint64_t gfn, uint64_t value)
{
	struct epoch_page page = make_page(m->s, buf, m->vm.page_size, gfn, value);

	CHECK_OK(epoch_put(ep, &page, 1, &e));
}

/* `nr` changed frames from `first` on: one in eight zero, some equal to older pages,
 * now and then one that does not compress. */
static void one_epoch(struct maker *m, const char *name, uint64_t first, uint32_t nr,
		      size_t state_len)
{
	_cleanup_free_ uint8_t *state = malloc(state_len + 1);
	struct snapshot_meta meta = {.name = name, .note = "golden", .taken_ns = 1700000000};
	struct snapd_point point;
	struct epoch *ep;

	for (size_t i = 0; i < state_len; i++)
		state[i] = (uint8_t)(i * 7 >> 9);
	CHECK_OK(epoch_begin(m->s, m->vm.id, m->timeline, m->vm.page_size, m->live, &ep, &e));
	for (uint32_t i = 0; i < nr; i++) {
		uint64_t value = 2 * ++m->next + 1;

		if (i % 8 == 3)
			value = 0;
		if (i % 8 == 5)
			value = 2 * (m->next / 3) + 1;
		if (i % 16 == 7)
			value = 2 * m->next;
		put(m, ep, first + i + (i > nr / 2 ? 1u << 20 : 0), value);
	}
	if (nr < FRAMES)
		CHECK_OK(epoch_gone(ep, first + nr, 2, &e));
	CHECK_OK(epoch_commit(ep, state, state_len, &meta, &point, NULL, NULL, &e));
}

static void start_vm(struct maker *m, const char *name, uint32_t page_size)
{
	m->vm = (struct store_vm){.arch = "x86_64", .page_size = page_size, .uid = 1000};
	strcpy(m->vm.name, name);
	CHECK_OK(store_vm_register(m->s, &m->vm, &e));
	CHECK_OK(store_timeline_create(m->s, m->vm.id, (struct snapd_point){0}, &m->timeline, &e));
	CHECK(pagemap_create(true, &m->live) == 0);
}

static void fork_at(struct maker *m, uint64_t epoch)
{
	struct snapd_point at = {m->timeline, epoch};

	CHECK_OK(store_timeline_create(m->s, m->vm.id, at, &m->timeline, &e));
	pagemap_destroy(m->live);
	CHECK_OK(store_map_load(m->s, at, true, &m->live, &e));
}

static int make(const char *dir, const char *compression, size_t state_len, const char *key)
{
	struct maker m = {.s = open_store_as(dir, compression, key)};

	start_vm(&m, "guest", 4096);
	one_epoch(&m, "first", 16, FRAMES, state_len);
	one_epoch(&m, "second", 20, 9, 100);
	one_epoch(&m, "third", 30, 8, 0);
	one_epoch(&m, "fourth", 10, 16, 100); /* a checkpoint */
	one_epoch(&m, "fifth", 12, 4, 100);
	fork_at(&m, 2);
	one_epoch(&m, "fork", 40, 5, 10);
	pagemap_destroy(m.live);
	start_vm(&m, "large-pages", 65536);
	m.next += 1000;
	one_epoch(&m, "large", 0, 5, 10);
	pagemap_destroy(m.live);
	store_close(m.s);
	return 0;
}

static int no_timeline(void *opaque, uint64_t **ret, size_t *nr)
{
	*ret = NULL;
	*nr = 0;
	return 0;
}

/* A VM comes and goes, but for a few of its pages, which another one has, too; two snapshots out
 * of the middle go. */
static int holes(const char *dir, const char *compression, const char *key)
{
	struct maker m = {.s = open_store_as(dir, compression, key)};
	struct store_vm gone;
	uint64_t freed;

	start_vm(&m, "gone", 4096);
	for (uint32_t i = 0; i < 3; i++) {
		m.next = 5000 * (i + 1);
		one_epoch(&m, NULL, 200, FRAMES, 300000);
	}
	pagemap_destroy(m.live);
	gone = m.vm;
	start_vm(&m, "heir", 4096);
	m.next = 5000;
	one_epoch(&m, NULL, 0, 5, 100);
	pagemap_destroy(m.live);
	CHECK_OK(store_vm_remove(m.s, gone.id, &freed, &e));
	for (uint64_t id = 2; id <= 5; id += 3)
		CHECK_OK(store_snapshot_delete(m.s, id, &e));
	CHECK_OK(store_gc(m.s, no_timeline, NULL, &freed, &e));
	CHECK(freed);
	store_close(m.s);
	return 0;
}

static struct store *open_only(const char *dir, const char *key)
{
	struct store_config config = {.dir = dir, .read_only = true, .key_file = key};
	struct store *s;

	CHECK_OK(store_open(&config, &s, &e));
	return s;
}

static void dump_page(struct store_reader *r, FILE *f, uint64_t gfn, loc_t loc, uint32_t page_size)
{
	struct page_read read = {.gfn = gfn, .loc = loc, .dst = buf};

	CHECK_OK(store_read_pages(r, &read, 1, &e));
	CHECK(fwrite(&gfn, sizeof(gfn), 1, f) == 1 && fwrite(buf, page_size, 1, f) == 1);
}

static void dump(struct store *s, const struct store_snapshot *snap, const char *out)
{
	_cleanup_free_ char *path = NULL;
	struct store_reader *r;
	struct pagemap_iter it;
	struct pagemap *m;
	uint64_t gfn;
	void *state;
	size_t len;
	loc_t loc;
	FILE *f;

	CHECK(asprintf(&path, "%s.%llu", out, (unsigned long long)snap->id) > 0);
	f = fopen(path, "we");
	CHECK(f);
	CHECK_OK(store_map_load(s, snap->point, false, &m, &e));
	CHECK_OK(store_reader_create(s, snap->page_size, &r, &e));
	CHECK(pagemap_iter_init(&it, m) == 0);
	while (pagemap_iter_next(&it, &gfn, &loc))
		dump_page(r, f, gfn, loc, snap->page_size);
	pagemap_iter_deinit(&it);
	CHECK_OK(store_state_load(s, snap->point, &state, &len, &e));
	CHECK(fwrite(state, 1, len, f) == len && !fclose(f));
	free(state);
	store_reader_destroy(r);
	pagemap_destroy(m);
}

static int dump_all(const char *dir, const char *out, const char *key)
{
	struct store *s = open_only(dir, key);
	struct store_snapshot *snaps;
	size_t nr;

	CHECK_OK(store_snapshot_list(s, NULL, &snaps, &nr, &e));
	for (size_t i = 0; i < nr; i++) {
		dump(s, &snaps[i], out);
		printf("%llu\n", (unsigned long long)snaps[i].id);
	}
	free(snaps);
	store_close(s);
	return 0;
}

static int rebuild(const char *dir, const char *key)
{
	struct rebuild_config c = {.dir = dir, .key_file = key};
	struct rebuild_result r;

	CHECK_OK(store_rebuild_index(&c, &r, &e));
	CHECK(!r.damages && !r.lost_snapshots);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc >= 5 && !strcmp(argv[1], "make"))
		return make(argv[2], argv[3], strtoull(argv[4], NULL, 10), argv[5]);
	if (argc >= 4 && !strcmp(argv[1], "holes"))
		return holes(argv[2], argv[3], argv[4]);
	if (argc >= 4 && !strcmp(argv[1], "dump"))
		return dump_all(argv[2], argv[3], argv[4]);
	if (argc >= 3 && !strcmp(argv[1], "rebuild"))
		return rebuild(argv[2], argv[3]);
	fprintf(stderr, "usage: golden make|holes|dump|rebuild STORE ...\n");
	return 2;
}
