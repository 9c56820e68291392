/* SPDX-License-Identifier: MIT */
/*
 * Goal: a reader that knows the headers of a segment does not take them for those of another
 * segment that has its number later.
 * Method: a history of more segments than gc keeps free is read, deleted and reclaimed; another
 * one, whose batches have other sizes, is read by the same reader.
 */
#include "tests/lib/store_model.h"

#define PAGE	4096u
#define FRAMES	4000u /* eight segments, since they do not compress */
#define HISTORY 3u

static struct store *s;
static uint8_t vm_id[16], buf[PAGE];

static uint64_t gfn_of(uint32_t i)
{
	return i;
}

static int nobody(void *opaque, uint64_t **ret, size_t *nr)
{
	(void)opaque;
	*ret = NULL;
	*nr = 0;
	return 0;
}

/* A timeline with one snapshot, in epochs of `step` pages. */
static uint64_t take(uint64_t first_value, uint32_t step, uint64_t *values, struct snapd_point *at)
{
	struct snapshot_meta meta = {.name = "s"};
	struct pagemap *live;
	uint64_t timeline, id;

	CHECK_OK(store_timeline_create(s, vm_id, (struct snapd_point){0}, &timeline, &e));
	CHECK(!pagemap_create(true, &live));
	for (uint32_t i = 0; i < FRAMES;) {
		bool last = i + step >= FRAMES;
		struct epoch *ep;

		CHECK_OK(epoch_begin(s, vm_id, timeline, PAGE, live, &ep, &e));
		for (uint32_t k = 0; k < step && i < FRAMES; k++, i++) {
			struct epoch_page p;

			values[i] = 2 * (first_value + i);
			p = make_page(s, buf, PAGE, i, values[i]);
			CHECK_OK(epoch_put(ep, &p, 1, &e));
		}
		CHECK_OK(epoch_commit(ep, NULL, 0, last ? &meta : NULL, at, last ? &id : NULL, NULL,
				      &e));
	}
	pagemap_destroy(live);
	return id;
}

int main(void)
{
	static uint64_t values[FRAMES];
	struct store_vm vm = {.name = "guest", .arch = "x86_64", .page_size = PAGE};
	char *dir = memory_dir();
	struct store_reader *reader;
	struct store_stats before, after;

	s = open_store_as(dir, "none", NULL);
	CHECK_OK(store_vm_register(s, &vm, &e));
	memcpy(vm_id, vm.id, sizeof(vm_id));
	store_vm_deinit(&vm);
	CHECK_OK(store_reader_create(s, PAGE, &reader, &e));
	for (uint32_t i = 0; i < HISTORY; i++) {
		struct snapd_point at;
		uint64_t freed, id = take(1 + (uint64_t)i * FRAMES, 200 - 60 * i, values, &at);

		check_point(s, reader, PAGE, at, gfn_of, values, FRAMES);
		CHECK_OK(store_get_stats(s, &before, &e));
		CHECK_OK(store_snapshot_delete(s, id, &e));
		CHECK_OK(store_gc(s, nobody, NULL, &freed, &e));
		CHECK_OK(store_get_stats(s, &after, &e));
		CHECK(after.segments <
		      before.segments); /* files went, so their numbers come again */
	}
	store_reader_destroy(reader);
	store_close(s);
	remove_tree(dir);
	free(dir);
	return 0;
}
