/* SPDX-License-Identifier: MIT */
/*
 * Goal: nothing that a visible manifest of a backup repository refers to is ever deleted, in
 * whatever order the steps of pushes, forgets and prunes of several hosts happen.
 *
 * Method: the real repo.c and prune.c on an object store in memory with a clock of its own.
 * Each actor is a thread, and at every call to the store hands over to one that is picked at
 * random, when the clock may go on, too; only one ever runs.  A push puts packs, relies on
 * packs of others that it knows of or on a base, and commits; in between it may be held up for
 * longer than the grace time.  After every call that changed anything, every visible
 * manifest is followed to its packs.  What repo.h assumes of a store is made so: a put or a list
 * that takes longer than G - W fails.  Guards are taken away one by one (--without N): then
 * something must be lost.
 *
 *   backup_race [ROUNDS] [--without window|marks|base]
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "snapd/backup/memory.h"
#include "snapd/backup/pack.h"
#include "snapd/backup/repo.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/turn_store.h"

#define NR_STEPS 24 /* things that an actor does in a round */
#define PAGE	 4096u

enum without { NOTHING, WINDOW, MARKS, BASE };
static enum without without;

static uint64_t nr_lost, nr_commits, nr_stale;

struct actor {
	pthread_t thread;
	struct repo *r;
	struct packset known;	   /* packs that it has seen, here or elsewhere */
	struct manifest bases[64]; /* maps are owned */
	uint32_t nr_bases;
};
static struct actor actors[NR_ACTORS];

/* ---- what must hold ---- */

static int pack_there(void *arg, const struct layer_run *run, struct err *e)
{
	return 0;
}

/* The objects that a manifest needs; false: one is gone.  Without steps: the main world only. */
static bool is_whole(struct repo *r, const struct object *o)
{
	struct bk_name name, state;
	_cleanup_free_ uint8_t *payload = NULL;
	struct packset packs = {0};
	struct manifest m;
	char key[REPO_KEY_BYTES];
	bool whole = true;
	size_t len;

	CHECK(!name_parse(o->key + strlen(repo_rooms[REPO_SNAPSHOTS]), &name));
	CHECK(!blob_decode(&r->keys, BK_MANIFEST, &name, o->bytes, o->len, &payload, &len, NULL));
	CHECK(!manifest_decode(payload, len, &m, NULL));
	memcpy(state.b, m.m.state, sizeof(state.b));
	whole = find_object(repo_key(REPO_BLOBS, &state, key));
	for (uint32_t i = 0; i < m.m.nr_maps; i++) {
		const struct object *map = find_object(repo_key(REPO_BLOBS, &m.maps[i], key));
		_cleanup_free_ uint8_t *text = NULL;

		if (!map) {
			whole = false;
			continue;
		}
		CHECK(!blob_decode(&r->keys, BK_MAP, &m.maps[i], map->bytes, map->len, &text, &len,
				   NULL));
		CHECK(!layer_decode(text, len, &packs, pack_there, NULL, NULL));
	}
	for (uint32_t i = 0; i < packs.nr; i++)
		whole &= find_object(repo_key(REPO_PACKS, &packs.names[i], key)) != NULL;
	packset_deinit(&packs);
	manifest_deinit(&m);
	return whole;
}

static void look_at_all(void)
{
	for (size_t i = 0; i < world.nr; i++) {
		const struct object *o = &world.all[i];
		char tomb[REPO_KEY_BYTES];

		if (!o->there || strncmp(o->key, "snapshots/", 10) != 0)
			continue;
		snprintf(tomb, sizeof(tomb), "forgotten/%s", o->key + 10);
		if (!find_object(tomb) && !is_whole(actors[0].r, o))
			nr_lost++;
	}
}

/* ---- what actors do ---- */

static int64_t model_ms(void *arg)
{
	return world.now_ms;
}

/* A guard that is taken away: time stands still while a push looks, so no window is missed. */
static int64_t frozen_ms(void *arg)
{
	return 0;
}

static void put_pack(struct actor *a, struct bk_name *ret)
{
	struct pack_builder b;
	uint8_t *scratch = malloc(PACK_SCRATCH_BYTES), page[PAGE];
	const void *pages[] = {page};
	struct bk_name name;
	char key[REPO_KEY_BYTES];
	struct iovec iov[2];

	for (size_t i = 0; i < PAGE; i++)
		page[i] = (uint8_t)rand_next(&rng);
	CHECK(!pack_builder_init(&b, &a->r->keys));
	pack_begin(&b, PAGE);
	b.scratch = scratch;
	keys_page_name(&a->r->keys, page, PAGE, &name);
	pack_reserve(&b, &name);
	pack_add(&b, NULL, pages);
	CHECK(!pack_finish(&b));
	iov[0] = (struct iovec){b.head, b.head_bytes};
	iov[1] = (struct iovec){b.data, b.data_bytes};
	*ret = b.name;
	CHECK(!objstore_put(a->r->os, repo_key(REPO_PACKS, ret, key), iov, 2,
			    OBJSTORE_ONLY_IF_ABSENT, NULL));
	pack_builder_deinit(&b);
	free(scratch);
}

static void rely_on(struct repo_relied *relied, size_t *nr, const struct bk_name *name,
		    bool is_pack, bool sent)
{
	relied[(*nr)++] = (struct repo_relied){
		.name = *name, .is_pack = is_pack, .sent = sent, .sent_ms = world.now_ms};
}

static void describe(struct manifest *m, const struct bk_name *state)
{
	m->m.page_size = PAGE;
	m->m.state_bytes = 1;
	memcpy(m->m.state, state->b, sizeof(m->m.state));
	strcpy(m->m.vm, "vm");
}

/* A snapshot of a new pack, an old one or two that somebody has sent, and a base (NULL: none). */
static int push_over(struct actor *a, const struct manifest *base)
{
	struct packset packs = {0};
	struct repo_relied relied[16];
	struct manifest m = {0};
	struct layer_writer w;
	struct bk_name mine, state, map;
	const struct bk_name *base_name = NULL;
	bool base_lost = false;
	size_t nr = 0, len;
	uint64_t sent = 0, frames, gfn = 0;
	uint8_t *payload;
	uint32_t n;
	int rc;

	put_pack(a, &mine);
	CHECK(!packset_add(&packs, &mine, &n));
	rely_on(relied, &nr, &mine, true, true);
	for (uint32_t i = 0; i < 3 && a->known.nr; i++) {
		const struct bk_name *other = &a->known.names[rand_below(&rng, a->known.nr)];

		if (packset_find(&packs, other) >= 0)
			continue;
		CHECK(!packset_add(&packs, other, &n));
		rely_on(relied, &nr, other, true, false);
	}
	layer_writer_init(&w, &packs);
	for (uint32_t i = 0; i < packs.nr; i++)
		CHECK(!layer_put(&w,
				 &(struct layer_run){
					 .gfn = gfn++, .nr = 1, .kind = LAYER_PAGES, .pack = i}));
	CHECK(!layer_finish(&w, &payload, &len, &frames));
	layer_writer_deinit(&w);
	CHECK(!repo_put_blob(a->r, REPO_BLOBS, BK_MAP, payload, len, &map, &sent, NULL));
	free(payload);
	rely_on(relied, &nr, &map, false, true);
	CHECK(!repo_put_blob(a->r, REPO_BLOBS, BK_STATE, "s", 1, &state, &sent, NULL));
	rely_on(relied, &nr, &state, false, true);
	if (base && base->m.nr_layers < 8) {
		base_name = &base->name;
		m.m.nr_layers = base->m.nr_layers;
		memcpy(m.layers, base->layers, sizeof(m.layers));
		for (uint32_t i = 0; i < base->m.nr_maps; i++)
			CHECK(!manifest_add_map(&m, &base->maps[i]));
	}
	m.layers[m.m.nr_layers++] = (struct bk_layer){.nr_maps = 1, .nr_frames = frames};
	CHECK(!manifest_add_map(&m, &map));
	describe(&m, &state);
	/* Held up: packs that it found may go meanwhile. */
	if (!rand_below(&rng, 4))
		world.now_ms += (int64_t)rand_below(&rng, 4 * GRACE_S * 1000);
	rc = repo_commit(a->r, &m, without == BASE ? NULL : base_name, &base_lost, relied,
			 without == MARKS ? 0 : nr, NULL);
	CHECK(!rc || rc == -ESTALE || rc == -ETIMEDOUT);
	nr_commits += !rc;
	nr_stale += rc == -ESTALE;
	if (!rc)
		look_at_all();
	if (!rc && a->nr_bases < ARRAY_SIZE(a->bases))
		a->bases[a->nr_bases++] = m;
	else
		manifest_deinit(&m);
	if (!rc)
		for (int i = 0; i < NR_ACTORS; i++)
			CHECK(!packset_add(&actors[i].known, &mine, &n));
	packset_deinit(&packs);
	return rc;
}

static void push(struct actor *a)
{
	bool over = a->nr_bases && rand_below(&rng, 2);

	push_over(a, over ? &a->bases[rand_below(&rng, a->nr_bases)] : NULL);
}

static int pick_name(void *arg, const struct bk_name *name, const struct objstore_info *info)
{
	struct packset *set = arg;
	uint32_t n;

	return packset_add(set, name, &n);
}

static void forget(struct actor *a)
{
	struct packset names = {0};

	if (!repo_each(a->r, REPO_SNAPSHOTS, pick_name, &names, NULL) && names.nr) {
		const struct bk_name *name = &names.names[rand_below(&rng, names.nr)];

		CHECK(!repo_forget(a->r, name, NULL));
	}
	packset_deinit(&names);
}

static void prune(struct actor *a)
{
	struct prune_stats stats;
	struct err e = {0};
	int rc = repo_prune(a->r, false, NULL, NULL, &stats, &e);

	/* Without a guard it may well find that something is missing. */
	if (rc && rc != -EBUSY && rc != -ETIMEDOUT && without == NOTHING)
		fprintf(stderr, "prune: %s\n", e.text);
	CHECK(!rc || rc == -EBUSY || rc == -ETIMEDOUT || without != NOTHING);
}

static void *run_actor(void *arg)
{
	struct actor *a = arg;

	begin_turns((int)(a - actors));
	for (int i = 0; i < NR_STEPS; i++) {
		uint64_t dice = rand_below(&rng, 10);

		if (dice < 5)
			push(a);
		else if (dice < 7)
			forget(a);
		else
			prune(a);
	}
	alive[a - actors] = false;
	pass_turn();
	return NULL;
}

/* ---- rounds ---- */

static void open_repos(const char *dir)
{
	struct repo_config c = {.os = &world,
				.cache_dir = dir,
				.create = true,
				.grace_s = GRACE_S,
				.now_ms = without == WINDOW ? frozen_ms : model_ms};

	for (int i = 0; i < NR_ACTORS; i++) {
		actors[i] = (struct actor){0};
		alive[i] = true;
		CHECK(!repo_open(&c, &actors[i].r, NULL));
	}
}

static void close_repos(void)
{
	for (int i = 0; i < NR_ACTORS; i++) {
		for (uint32_t k = 0; k < actors[i].nr_bases; k++)
			manifest_deinit(&actors[i].bases[k]);
		packset_deinit(&actors[i].known);
		repo_close(actors[i].r);
	}
}

static void run_round(const char *dir)
{
	clear_world();
	open_repos(dir);
	for (int i = 0; i < NR_ACTORS; i++)
		CHECK(!pthread_create(&actors[i].thread, NULL, run_actor, &actors[i]));
	pass_turn();
	for (int i = 0; i < NR_ACTORS; i++)
		pthread_join(actors[i].thread, NULL);
	look_at_all();
	close_repos();
}

/* ---- a pusher that is held up between its look and its put ---- */

static struct bk_name held_pack;

static void prune_twice(const char *key)
{
	char want[REPO_KEY_BYTES];
	struct prune_stats stats;

	if (strcmp(key, repo_key(REPO_PACKS, &held_pack, want)) != 0)
		return;
	world.after_head = NULL;
	for (int i = 0; i < 2; i++) {
		CHECK(!repo_prune(actors[1].r, false, NULL, NULL, &stats, NULL));
		world.now_ms += GRACE_S * 1000;
	}
	CHECK(!find_object(want));
}

/* It relies on an old pack that nothing refers to, and that goes while it is held up. */
static void hold_up(const char *dir)
{
	struct actor *a = &actors[0];
	uint32_t n;

	clear_world();
	open_repos(dir);
	put_pack(a, &held_pack);
	world.now_ms += 2 * GRACE_S * 1000;
	CHECK(!packset_add(&a->known, &held_pack, &n));
	world.after_head = prune_twice;
	push(a);
	CHECK(!world.after_head || without == MARKS);
	world.after_head = NULL;
	look_at_all();
	close_repos();
}

/* It relies on a pack that it saw once, and that a prune has taken since. */
static void lose_pack(const char *dir)
{
	struct actor *a = &actors[0];
	struct prune_stats stats;
	struct bk_name pack;
	uint32_t n;

	clear_world();
	open_repos(dir);
	put_pack(a, &pack);
	for (int i = 0; i < 3; i++) {
		world.now_ms += 2 * GRACE_S * 1000;
		CHECK(!repo_prune(actors[1].r, false, NULL, NULL, &stats, NULL));
	}
	CHECK(!packset_add(&a->known, &pack, &n));
	push(a);
	look_at_all();
	close_repos();
}

/* Its base is forgotten and pruned before it is done. */
static void lose_base(const char *dir)
{
	struct actor *a = &actors[0];
	struct prune_stats stats;

	clear_world();
	open_repos(dir);
	push(a);
	CHECK(a->nr_bases == 1 && !repo_forget(a->r, &a->bases[0].name, NULL));
	/* Its manifest is there still, and may be taken by a prune that began before the commit. */
	CHECK(without == BASE || push_over(a, &a->bases[0]) == -ESTALE);
	for (int i = 0; i < 3; i++) {
		world.now_ms += GRACE_S * 1000;
		CHECK(!repo_prune(a->r, false, NULL, NULL, &stats, NULL));
	}
	packset_deinit(&a->known);
	for (int i = 0; i < 8; i++) /* with and without the base, as it falls */
		push(a);
	look_at_all();
	close_repos();
}

static enum without parse_without(const char *word)
{
	static const char *const words[] = {
		[WINDOW] = "window", [MARKS] = "marks", [BASE] = "base"};

	for (int i = WINDOW; i <= BASE; i++)
		if (!strcmp(words[i], word))
			return (enum without)i;
	CHECK(!"a guard");
	return NOTHING;
}

int main(int argc, char **argv)
{
	uint64_t rounds = argc > 1 ? strtoull(argv[1], NULL, 10) : 20;
	char dir[] = "/dev/shm/backup-race-XXXXXX", command[128];

	rng = rand_of(rand_seed());
	if (argc > 3 && !strcmp(argv[2], "--without"))
		without = parse_without(argv[3]);
	CHECK(mkdtemp(dir));
	world.after_delete = look_at_all;
	hold_up(dir);
	lose_pack(dir);
	lose_base(dir);
	for (uint64_t i = 0; i < rounds && !(without && nr_lost); i++)
		run_round(dir);
	clear_world();
	snprintf(command, sizeof(command), "rm -rf %s", dir);
	CHECK(!system(command));
	printf("%llu commits, %llu refused, %llu deleted, %llu lost\n",
	       (unsigned long long)nr_commits, (unsigned long long)nr_stale,
	       (unsigned long long)world.nr_deleted, (unsigned long long)nr_lost);
	CHECK(nr_commits && world.nr_deleted && (without || nr_stale));
	CHECK(without ? nr_lost : !nr_lost);
	return 0;
}
