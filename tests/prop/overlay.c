/* SPDX-License-Identifier: MIT */
/*
 * Goal: layers laid over each other as a sequence of runs are what they are in an array.
 * Method: random layers of random runs; each frame's value is looked up from the lowest layer to
 * the uppermost; the overlay's runs must ascend, name exactly these frames and have these values.
 */
#include "snapd/store/overlay.h"

#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"
#include "tests/lib/rand.h"

#define FRAMES 400u
#define LAYERS 12u

struct layer {
	struct manifest_run runs[FRAMES];
	uint32_t nr, at;
};

static int next_run(void *arg, struct manifest_run *ret, struct err *e)
{
	struct layer *l = arg;

	if (l->at == l->nr)
		return 0;
	*ret = l->runs[l->at++];
	return 1;
}

static loc_t random_loc(struct rand *r)
{
	switch (rand_below(r, 4)) {
	case 0:
		return LOC_ZERO_PAGE;
	case 1:
		return MANIFEST_GONE;
	default:
		return loc_make((uint32_t)rand_below(r, 1000), (uint32_t)rand_below(r, 1000), 0);
	}
}

static void make_layer(struct rand *r, struct layer *l, loc_t *frames)
{
	uint64_t gfn = rand_below(r, 50), longest = 1 + rand_below(r, 60);

	*l = (struct layer){0};
	while (gfn < FRAMES) {
		struct manifest_run run = {
			.gfn = gfn, .len = 1 + rand_below(r, longest), .loc = random_loc(r)};

		run.len = MIN(run.len, FRAMES - gfn);
		for (uint64_t i = 0; i < run.len; i++)
			frames[gfn + i] = run_from(run, gfn + i).loc;
		gfn += run.len + (rand_below(r, 3) ? rand_below(r, longest) : 0);
		l->runs[l->nr++] = run;
	}
}

static void one_round(struct rand *r)
{
	static struct layer layers[LAYERS];
	uint32_t nr = (uint32_t)rand_below(r, LAYERS + 1);
	loc_t frames[FRAMES] = {0}, got[FRAMES] = {0};
	void *args[LAYERS];
	struct manifest_run run;
	struct overlay o;
	uint64_t gfn = 0;

	for (uint32_t i = nr; i-- > 0;) {
		args[i] = &layers[i];
		make_layer(r, &layers[i], frames);
	}
	CHECK(!overlay_init(&o, next_run, args, nr, NULL));
	while (overlay_next(&o, &run, NULL) == 1) {
		CHECK(run.gfn >= gfn && run.len && run.gfn + run.len <= FRAMES);
		gfn = run.gfn + run.len;
		for (uint64_t i = 0; i < run.len; i++)
			got[run.gfn + i] = run_from(run, run.gfn + i).loc;
	}
	overlay_deinit(&o);
	CHECK(!memcmp(frames, got, sizeof(frames)));
}

int main(int argc, char **argv)
{
	int rounds = argc > 1 ? atoi(argv[1]) : 3000;
	struct rand r = rand_of(rand_seed());

	for (int i = 0; i < rounds; i++)
		one_round(&r);
	return 0;
}
