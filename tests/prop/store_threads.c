/* SPDX-License-Identifier: MIT */
/*
 * Goal: the store keeps its word when everything happens at once.
 * Method: threads of three VMs of one owner (so they share duplicates) commit
 * epochs, fork and go on; beside them one thread deletes and reclaims space all
 * the time, and two pin, load and read snapshots.  A snapshot's state is the list
 * of its pages' values, so each one proves itself.  Meant for ThreadSanitizer, too.
 */
#include <pthread.h>
#include <stdatomic.h>

#include "snapd/util/log.h"
#include "tests/lib/store_model.h"

#define FRAMES	150u
#define PAGE	4096u
#define WRITERS 3u
#define READERS 2u
#define KEEP	6u

struct shared {
	struct store *s;
	_Atomic uint32_t writers; /* still at work */
	_Atomic uint64_t timelines[WRITERS];
	uint64_t seed;
	uint32_t epochs;
	_Atomic uint64_t reads, freed;
};

struct actor {
	struct shared *sh;
	uint32_t index;
	pthread_t thread;
	struct rand rand;
};

static uint64_t gfn_of(uint32_t i)
{
	return i;
}

/* ---- writers ---- */

static int put_some(struct actor *a, struct epoch *ep, uint64_t *values)
{
	_cleanup_free_ uint8_t *buf = aligned_alloc(PAGE, PAGE);

	for (uint32_t i = 0; i < FRAMES; i++) {
		struct epoch_page page;

		if (values[i] != NO_PAGE && rand_below(&a->rand, 5))
			continue;
		values[i] = rand_below(&a->rand, 3) ? rand_next(&a->rand)
						    : rand_below(&a->rand, 20);
		page = make_page(a->sh->s, buf, PAGE, gfn_of(i), values[i]);
		CHECK_OK(epoch_put(ep, &page, 1, &e));
	}
	return 0;
}

static void write_epochs(struct actor *a, const uint8_t *vm)
{
	struct store *s = a->sh->s;
	struct snapshot_meta meta = {.note = "threads"};
	uint64_t values[FRAMES], timeline;
	struct snapd_point at = {0, 0};
	struct pagemap *live;

	memset(values, 0xff, sizeof(values));
	CHECK(pagemap_create(true, &live) == 0);
	CHECK_OK(store_timeline_create(s, vm, at, &timeline, &e));
	for (uint32_t n = 0; n < a->sh->epochs; n++) {
		struct epoch *ep;

		atomic_store(&a->sh->timelines[a->index], timeline);
		if (!rand_below(&a->rand, 8) && at.timeline)
			CHECK_OK(store_timeline_create(s, vm, at, &timeline, &e));
		CHECK_OK(epoch_begin(s, vm, timeline, PAGE, live, &ep, &e));
		put_some(a, ep, values);
		CHECK_OK(epoch_commit(ep, values, sizeof(values), &meta, &at, NULL, NULL, &e));
	}
	pagemap_destroy(live);
}

static void *writer_main(void *arg)
{
	struct actor *a = arg;
	struct store_vm vm = {.arch = "x86_64", .page_size = PAGE, .uid = 7};

	snprintf(vm.name, sizeof(vm.name), "guest-%u", a->index);
	CHECK_OK(store_vm_register(a->sh->s, &vm, &e));
	store_vm_deinit(&vm);
	write_epochs(a, vm.id);
	atomic_fetch_sub(&a->sh->writers, 1);
	return NULL;
}

/* ---- deleting and reclaiming ---- */

static int live_timelines(void *shared, uint64_t **ret, size_t *nr)
{
	struct shared *sh = shared;

	*ret = calloc(WRITERS, sizeof(**ret));
	if (!*ret)
		return -ENOMEM;
	for (*nr = 0; *nr < WRITERS; (*nr)++)
		(*ret)[*nr] = atomic_load(&sh->timelines[*nr]);
	return 0;
}

static void *reclaimer_main(void *arg)
{
	struct actor *a = arg;
	struct shared *sh = a->sh;

	while (atomic_load(&sh->writers)) {
		struct store_snapshot *list;
		uint64_t freed;
		size_t nr;

		CHECK_OK(store_snapshot_list(sh->s, NULL, &list, &nr, &e));
		for (size_t i = 0; nr > KEEP && i < nr - KEEP; i++)
			if (rand_below(&a->rand, 2))
				CHECK_OK(store_snapshot_delete(sh->s, list[i].id, &e));
		free(list);
		CHECK_OK(store_gc(sh->s, live_timelines, sh, &freed, &e));
		atomic_fetch_add(&sh->freed, freed);
	}
	return NULL;
}

/* ---- reading ---- */

static void read_one(struct shared *sh, struct store_reader *reader,
		     const struct store_snapshot *sn)
{
	uint64_t *values;
	size_t len;

	if (store_pin(sh->s, sn->point, NULL))
		return; /* gone already */
	CHECK_OK(store_state_load(sh->s, sn->point, (void **)&values, &len, &e));
	CHECK(len == FRAMES * sizeof(*values));
	check_point(sh->s, reader, PAGE, sn->point, gfn_of, values, FRAMES);
	free(values);
	store_unpin(sh->s, sn->point);
	atomic_fetch_add(&sh->reads, 1);
}

static void *reader_main(void *arg)
{
	struct actor *a = arg;
	struct shared *sh = a->sh;
	struct store_reader *reader;

	CHECK_OK(store_reader_create(sh->s, PAGE, &reader, &e));
	while (atomic_load(&sh->writers)) {
		struct store_snapshot *list;
		size_t nr;

		CHECK_OK(store_snapshot_list(sh->s, NULL, &list, &nr, &e));
		if (nr)
			read_one(sh, reader, &list[rand_below(&a->rand, nr)]);
		free(list);
	}
	store_reader_destroy(reader);
	return NULL;
}

int main(int argc, char **argv)
{
	static struct shared sh;
	struct actor actors[WRITERS + READERS + 1];
	struct store_snapshot *list;
	struct store_reader *reader;
	char *dir = temp_dir();
	uint64_t freed;
	size_t nr;

	log_set_level(LOG_LVL_WARN);
	sh.seed = rand_seed();
	sh.epochs = argc > 1 ? (uint32_t)atoi(argv[1]) : 100;
	sh.writers = WRITERS;
	sh.s = open_store(dir);
	for (uint32_t i = 0; i < ARRAY_SIZE(actors); i++) {
		void *(*fn)(void *) = i < WRITERS    ? writer_main
				      : i == WRITERS ? reclaimer_main
						     : reader_main;

		actors[i] = (struct actor){.sh = &sh, .index = i, .rand = rand_of(sh.seed + i)};
		CHECK(pthread_create(&actors[i].thread, NULL, fn, &actors[i]) == 0);
	}
	for (uint32_t i = 0; i < ARRAY_SIZE(actors); i++)
		pthread_join(actors[i].thread, NULL);
	store_close(sh.s);
	sh.s = open_store(dir);
	CHECK_OK(store_reader_create(sh.s, PAGE, &reader, &e));
	CHECK_OK(store_snapshot_list(sh.s, NULL, &list, &nr, &e));
	for (size_t i = 0; i < nr; i++)
		read_one(&sh, reader, &list[i]);
	for (size_t i = 0; i < nr - KEEP; i++)
		CHECK_OK(store_snapshot_delete(sh.s, list[i].id, &e));
	CHECK_OK(store_gc(sh.s, NULL, NULL, &freed, &e));
	sh.freed += freed;
	for (size_t i = nr - KEEP; i < nr; i++)
		read_one(&sh, reader, &list[i]);
	printf("%zu snapshots left, %llu read, %llu bytes reclaimed\n", nr,
	       (unsigned long long)sh.reads, (unsigned long long)sh.freed);
	CHECK(sh.freed && sh.reads);
	free(list);
	store_reader_destroy(reader);
	store_close(sh.s);
	remove_tree(dir);
	free(dir);
	return 0;
}
