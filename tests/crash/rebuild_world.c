/* SPDX-License-Identifier: MIT */
/* The store of rebuild_rules.c; see rebuild_world.h. */
#include "tests/crash/rebuild_world.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <lmdb.h>
#include <stdio.h>
#include <unistd.h>

#include "snapd/store/check.h"

char *dir;
struct store *s;
struct rebuild_result result;
uint32_t nr_lines;
uint64_t named[NAMED_MAX];
uint32_t nr_named;
void (*before_commit)(void);

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

void begin_line(struct line *l, const char *name)
{
	struct store_vm vm = {.arch = "x86_64", .page_size = PAGE, .uid = 7};

	snprintf(vm.name, sizeof(vm.name), "%s", name);
	CHECK_OK(store_vm_register(s, &vm, &e));
	memcpy(l->vm, vm.id, sizeof(l->vm));
	CHECK_OK(store_timeline_create(s, l->vm, (struct snapd_point){0}, &l->timeline, &e));
	CHECK(!pagemap_create(true, &l->live));
}

void end_line(struct line *l)
{
	pagemap_destroy(l->live);
	l->live = NULL;
}

void put_page(struct epoch *ep, uint64_t gfn, uint64_t value)
{
	static _Alignas(4096) uint8_t buf[PAGE];
	struct epoch_page p = make_page(s, buf, PAGE, gfn, value);

	CHECK_OK(epoch_put(ep, &p, 1, &e));
}

struct epoch *write_pages(struct line *l, uint64_t first, uint64_t nr, uint64_t value)
{
	struct epoch *ep;

	CHECK_OK(epoch_begin(s, l->vm, l->timeline, PAGE, l->live, &ep, &e));
	/* Even ones do not compress: a page takes its block. */
	for (uint64_t i = first; i < first + nr; i++)
		put_page(ep, i, 2 * (value + i));
	return ep;
}

uint64_t commit(struct epoch *ep, const char *name)
{
	struct snapshot_meta meta = {.name = name};
	struct snapd_point at;
	uint64_t id;

	CHECK_OK(epoch_commit(ep, "state", 5, &meta, &at, &id, NULL, &e));
	return id;
}

uint64_t take(struct line *l, uint64_t first, uint64_t nr, uint64_t value, const char *name)
{
	return commit(write_pages(l, first, nr, value), name);
}

void set_note(uint64_t id, const char *note)
{
	struct snapshot_change c = {.note = note};

	CHECK_OK(store_snapshot_change(s, id, &c, &e));
}

void image(void)
{
	CHECK_OK(store_update_image(s, NULL, NULL, &e));
}

static int nobody(void *opaque, uint64_t **ret, size_t *nr)
{
	*ret = NULL;
	*nr = 0;
	return 0;
}

void gc(void)
{
	uint64_t freed;

	CHECK_OK(store_gc(s, nobody, NULL, &freed, &e));
}

void delete (uint64_t id)
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

uint32_t list_batches(enum batch_type type, struct spot *ret)
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

struct spot newest(enum batch_type type)
{
	struct spot all[BATCHES_MAX];
	uint32_t nr = list_batches(type, all);

	CHECK(nr);
	return all[nr - 1];
}

void wipe(struct spot x)
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

void spoil_payload(struct spot x)
{
	_cleanup_fd_ int fd = open_segment(x.segment);

	CHECK(pwrite(fd, "damaged", 7, ((off_t)x.block + 1) * PAGE) == 7);
}

void change_records(struct spot x, enum fate (*fate)(const struct reclog_record *))
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

		if (rec.removed && f == STAYS)
			CHECK(!reclog_add_removed(&log, rec.db, rec.key, rec.key_len));
		if (rec.removed)
			continue;
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

void take_journal_away(void)
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

void close_store(void)
{
	store_close(s);
}

void rebuild_closed(void)
{
	struct rebuild_config c = {.dir = dir, .tell = on_line};
	char path[128];

	snprintf(path, sizeof(path), "%s/index", dir);
	remove_tree(path);
	nr_lines = nr_named = 0;
	CHECK_OK(store_rebuild_index(&c, &result, &e));
	s = open_store(dir);
}

void rebuild(void)
{
	close_store();
	rebuild_closed();
}

bool is_there(uint64_t id)
{
	struct store_snapshot sn;

	return !store_snapshot_get(s, id, &sn, NULL);
}

bool has_note(uint64_t id, const char *note)
{
	struct store_snapshot sn;

	CHECK_OK(store_snapshot_get(s, id, &sn, &e));
	return !strcmp(sn.note, note);
}

bool has_name(uint64_t id, const char *name)
{
	struct store_snapshot sn;

	CHECK_OK(store_snapshot_get(s, id, &sn, &e));
	return !strcmp(sn.name, name);
}

static void on_damage(void *opaque, const struct store_damage *d)
{
	printf("%s: %s\n", damage_kind_names[d->kind], d->text);
}

void check_is_clean(void)
{
	struct store_check_config c = {.read_data = true, .damage = on_damage};
	struct store_check_result r;

	CHECK_OK(store_check(s, &c, &r, &e));
	CHECK(!r.damages && !r.losses);
}
