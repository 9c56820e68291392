/* SPDX-License-Identifier: MIT */
/*
 * Changes of an index (lmdb_file.h): what index_check() lets through, LMDB and the record
 * decoders read without harm.
 */
#include <errno.h>

#include "snapd/store/index.h"
#include "snapd/store/index_check.h"
#include "snapd/util/cleanup.h"
#include "tests/fuzz/lmdb_file.h"

static char dir[] = "/tmp/fuzz-index-XXXXXX";
static struct lmdb_file file;

static int fill(struct ix_txn *t, void *arg, struct err *e)
{
	for (uint64_t i = 1; i < 200; i++) {
		struct ix_key k = ix_key_u64(i), vm = ix_key_id((const uint8_t *)"fifteen letters");
		struct rec_timeline tl = {.last = i};
		struct rec_vm rec = {.name = "guest"};
		static const char cmdline[3000];

		vm.b[0] = (uint8_t)i;
		if (index_put(t, IX_TIMELINES, &k, &tl, sizeof(tl), NULL, 0, e) ||
		    (i < 4 &&
		     index_put(t, IX_VMS, &vm, &rec, sizeof(rec), cmdline, sizeof(cmdline), e)))
			return -EIO;
	}
	return 0;
}

static void clean_up(void)
{
	lmdb_file_remove(&file);
}

static void make_base(void)
{
	struct index_config config = {.dir = dir, .create = true};
	struct index *ix;
	struct err e = {0};

	PROMISE(mkdtemp(dir));
	atexit(clean_up);
	PROMISE(!index_open(&config, &ix, &e) && !index_update(ix, fill, NULL, &e));
	index_close(ix);
	lmdb_file_take(&file, dir);
}

static void read_all(struct ix_txn *t)
{
	static union {
		struct rec_head head;
		uint8_t bytes[1024];
	} rec;
	static const size_t sizes[IX_NR_DBS] = {
		[IX_META] = sizeof(struct rec_counters),
		[IX_VMS] = sizeof(struct rec_vm),
		[IX_VMNAMES] = sizeof(struct rec_vmname),
		[IX_TIMELINES] = sizeof(struct rec_timeline),
		[IX_EPOCHS] = sizeof(struct rec_epoch),
		[IX_SNAPSHOTS] = sizeof(struct rec_snapshot),
		[IX_SNAPNAMES] = sizeof(struct rec_snapname),
		[IX_SEGMENTS] = sizeof(struct rec_segment),
	};

	for (int db = 0; db < IX_NR_DBS; db++) {
		struct ix_iter it;
		struct ix_key k;
		unsigned int n = 0;

		if (!sizes[db])
			continue;
		if (!index_iter_init(&it, t, (enum index_db)db, NULL, NULL))
			while (index_iter_next(&it, &k, &rec, sizes[db], NULL) == 1)
				PROMISE(n++ < 100000);
		index_iter_deinit(&it);
	}
	for (uint64_t i = 0; i < 210; i++) {
		struct ix_key k = ix_key_u64(i);

		index_get(t, IX_TIMELINES, &k, &rec, sizeof(struct rec_timeline), NULL, NULL, NULL);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct index_config config = {.dir = dir, .read_only = true};
	struct index *ix = NULL;
	struct err e = {0};
	struct ix_txn t;
	int r;

	if (!file.base)
		make_base();
	lmdb_file_write(&file, data, len);
	r = index_check(file.path, false, &e);
	PROMISE((r == 0) == !e.text[0]);
	if (r || index_open(&config, &ix, &e))
		return 0;
	if (!index_begin(ix, &t, &e)) {
		read_all(&t);
		index_end(&t);
	}
	index_close(ix);
	return 0;
}
