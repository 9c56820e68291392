/* SPDX-License-Identifier: MIT */
/*
 * rand: the seed of a property test and its numbers.  SNAPD_SEED replays a run;
 * the seed is printed first, so that a failed run's log has it.
 */
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

struct rand {
	uint64_t state;
};

static inline struct rand rand_of(uint64_t seed)
{
	return (struct rand){.state = seed * 0x9e3779b97f4a7c15ull + 1};
}

static inline uint64_t rand_seed(void)
{
	const char *env = getenv("SNAPD_SEED");
	struct timespec ts;
	uint64_t seed;

	clock_gettime(CLOCK_REALTIME, &ts);
	seed = env ? strtoull(env, NULL, 0) : (uint64_t)ts.tv_nsec ^ (uint64_t)getpid() << 32;
	printf("seed: SNAPD_SEED=%llu\n", (unsigned long long)seed);
	fflush(stdout);
	return seed;
}

/* splitmix64 */
static inline uint64_t rand_next(struct rand *r)
{
	uint64_t z = (r->state += 0x9e3779b97f4a7c15ull);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

/* 0 .. n-1 */
static inline uint64_t rand_below(struct rand *r, uint64_t n)
{
	return rand_next(r) % n;
}

#define CHECK(cond)                                                                             \
	do {                                                                                    \
		if (!(cond)) {                                                                  \
			printf("%s:%d: %s: not so: %s\n", __FILE__, __LINE__, __func__, #cond); \
			fflush(stdout);                                                         \
			abort();                                                                \
		}                                                                               \
	} while (0)
