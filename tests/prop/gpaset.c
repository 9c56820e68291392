/* SPDX-License-Identifier: MIT */
/*
 * gpaset against a model.
 *
 *   model     random operations on a set and on a plain byte array: same answers
 *   threads   adders stamp a page, then add its frame; the taker copies what it
 *             takes: after the last take every copy must hold the last stamp (a
 *             frame lost, or taken before the stamp was visible, is an old copy)
 *   killed    a taker in another process is SIGKILLed at a random instant:
 *             dirty ∪ inflight ∪ what it reported holds every frame (G3), and
 *             after gpaset_rebuild() a take finds them
 */
#include "snapd/gpaset.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "tests/lib/rand.h"

#define FRAMES 16384u

static void *shared(size_t len)
{
	void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED);
	return p;
}

static void model_take(struct gpaset *s, struct gpaset *inflight, uint8_t *model, uint8_t *model_in,
		       struct rand *r)
{
	uint64_t frames[512], limit = rand_below(r, FRAMES + 100), cursor = rand_below(r, FRAMES);
	size_t max = rand_below(r, 512), n;
	uint64_t at = cursor, end = limit < FRAMES ? limit : FRAMES;

	n = gpaset_take(s, inflight, limit, &cursor, frames, max);
	CHECK(n <= max);
	for (size_t i = 0; i < n; at = frames[i] + 1, i++) {
		for (; at < frames[i]; at++)
			CHECK(!model[at]);
		CHECK(frames[i] < end && model[frames[i]]);
		model[frames[i]] = 0;
		if (inflight)
			model_in[frames[i]] = 1;
	}
	for (; n < max && at < end; at++)
		CHECK(!model[at]);
}

static void model_same(const struct gpaset *s, const uint8_t *model)
{
	uint64_t cursor = 0, frames[777], at = 0, total = 0;
	size_t n;

	while ((n = gpaset_peek(s, FRAMES, &cursor, frames, 777))) {
		for (size_t i = 0; i < n; i++, at++, total++) {
			for (; at < frames[i]; at++)
				CHECK(!model[at] && !gpaset_test(s, at));
			CHECK(model[frames[i]] && gpaset_test(s, frames[i]));
		}
	}
	for (; at < FRAMES; at++)
		CHECK(!model[at]);
	CHECK(gpaset_count(s, FRAMES) == total);
}

static void model_range(struct rand *r, uint64_t *first, uint64_t *n)
{
	*first = rand_below(r, FRAMES + 64);
	*n = rand_below(r, 4) ? rand_below(r, 300) : rand_below(r, 2 * FRAMES);
}

static void model_set(uint8_t *model, uint64_t first, uint64_t n, uint8_t v)
{
	if (first < FRAMES)
		memset(model + first, v, first + n > FRAMES ? FRAMES - first : n);
}

static void test_model(struct rand *r)
{
	static uint8_t model[FRAMES], model_in[FRAMES];
	struct gpaset s, in;
	uint64_t first, n;

	gpaset_init(&s, shared(gpaset_bytes(FRAMES)), FRAMES);
	gpaset_init(&in, shared(gpaset_bytes(FRAMES)), FRAMES);
	for (int step = 0; step < 20000; step++) {
		model_range(r, &first, &n);
		switch (rand_below(r, 16)) {
		case 0:
			gpaset_add_range(&s, first, n);
			model_set(model, first, n, 1);
			break;
		case 1:
			gpaset_clear_range(&s, first, n);
			model_set(model, first, n, 0);
			break;
		case 2:
			gpaset_merge(&s, &in, first);
			for (uint64_t i = 0; i < first && i < FRAMES; i++) {
				model[i] |= model_in[i];
				model_in[i] = 0;
			}
			break;
		case 3:
			memset(s.summary, 0, FRAMES / 512);
			gpaset_rebuild(&s, FRAMES);
			break;
		case 4:
			gpaset_clear(&in, first);
			model_set(model_in, 0, first, 0);
			break;
		case 5 ... 7:
			model_take(&s, NULL, model, NULL, r);
			break;
		case 8 ... 9:
			model_take(&s, &in, model, model_in, r);
			break;
		default:
			gpaset_add(&s, first % FRAMES);
			model[first % FRAMES] = 1;
		}
		if (step % 100 == 0) {
			model_same(&s, model);
			model_same(&in, model_in);
		}
	}
	munmap(s.bits, gpaset_bytes(FRAMES));
	munmap(in.bits, gpaset_bytes(FRAMES));
}

#define ADDERS 2
#define STAMPS 300000u

static struct gpaset thread_set;
static _Atomic uint32_t pages[FRAMES];
static uint32_t copies[FRAMES];
static _Atomic int adders_left;

static void *adder(void *seed)
{
	struct rand r = rand_of((uintptr_t)seed);

	for (uint32_t i = 1; i <= STAMPS; i++) {
		uint64_t f = rand_below(&r, 8) ? rand_below(&r, 64) : rand_below(&r, FRAMES);

		/* relaxed: only the set orders it */
		atomic_fetch_add_explicit(&pages[f], 1, memory_order_relaxed);
		if (f % 64 == 63)
			gpaset_add_range(&thread_set, f, 1);
		else
			gpaset_add(&thread_set, f);
	}
	atomic_fetch_sub(&adders_left, 1);
	return NULL;
}

static uint64_t take_all(struct gpaset *inflight, size_t max)
{
	uint64_t cursor = 0, frames[256], total = 0;
	size_t n;

	while ((n = gpaset_take(&thread_set, inflight, FRAMES, &cursor, frames, max))) {
		for (size_t i = 0; i < n; i++)
			copies[frames[i]] =
				atomic_load_explicit(&pages[frames[i]], memory_order_relaxed);
		total += n;
	}
	return total;
}

static void test_threads(struct rand *r)
{
	void *mem = shared(gpaset_bytes(FRAMES));
	pthread_t t[ADDERS];

	gpaset_init(&thread_set, mem, FRAMES);
	atomic_store(&adders_left, ADDERS);
	for (int i = 0; i < ADDERS; i++)
		CHECK(!pthread_create(&t[i], NULL, adder, (void *)(uintptr_t)rand_next(r)));
	while (atomic_load(&adders_left))
		take_all(NULL, 1 + rand_below(r, 256));
	take_all(NULL, 256);
	for (int i = 0; i < ADDERS; i++)
		pthread_join(t[i], NULL);
	for (uint32_t f = 0; f < FRAMES; f++)
		CHECK(copies[f] == atomic_load(&pages[f]));
	CHECK(gpaset_count(&thread_set, FRAMES) == 0);
	munmap(mem, gpaset_bytes(FRAMES));
}

struct killed {
	struct gpaset dirty, inflight;
	_Atomic uint64_t *added; /* a plain bitmap of what was ever added */
};

/* Take for ever, putting things back now and then, as an epoch that fails. */
static void __attribute__((noreturn)) victim(struct killed *k, struct rand *r)
{
	uint64_t frames[64], cursor;

	for (;;) {
		cursor = 0;
		while (gpaset_take(&k->dirty, &k->inflight, FRAMES, &cursor, frames,
				   1 + rand_below(r, 64)))
			;
		gpaset_merge(&k->dirty, &k->inflight, FRAMES);
	}
}

static void kill_once(struct killed *k, struct rand *r)
{
	uint64_t at = 0, frame;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (!pid)
		victim(k, r);
	for (uint64_t i = rand_below(r, 3000); i; i--) {
		frame = rand_below(r, FRAMES);
		gpaset_add(&k->dirty, frame);
		k->added[frame / 64] |= 1ull << (frame % 64);
	}
	sched_yield();
	kill(pid, SIGKILL);
	CHECK(waitpid(pid, NULL, 0) == pid);
	gpaset_rebuild(&k->inflight, FRAMES);
	gpaset_rebuild(&k->dirty, FRAMES);
	gpaset_merge(&k->dirty, &k->inflight, FRAMES);
	for (; at < FRAMES; at++)
		CHECK(gpaset_test(&k->dirty, at) == (k->added[at / 64] >> (at % 64) & 1));
}

static void test_killed(struct rand *r)
{
	size_t len = gpaset_bytes(FRAMES);
	struct killed k;

	gpaset_init(&k.dirty, shared(len), FRAMES);
	gpaset_init(&k.inflight, shared(len), FRAMES);
	k.added = shared(FRAMES / 8);
	for (int i = 0; i < 150; i++) {
		kill_once(&k, r);
		if (rand_below(r, 8) == 0) {
			gpaset_clear(&k.dirty, FRAMES);
			memset((void *)k.added, 0, FRAMES / 8);
		}
	}
	CHECK(gpaset_count(&k.inflight, FRAMES) == 0);
	munmap(k.dirty.bits, len);
	munmap(k.inflight.bits, len);
	munmap((void *)k.added, FRAMES / 8);
}

int main(void)
{
	struct rand r = rand_of(rand_seed());

	test_model(&r);
	test_threads(&r);
	test_killed(&r);
	printf("ok\n");
	return 0;
}
