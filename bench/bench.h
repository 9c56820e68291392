/* SPDX-License-Identifier: MIT */
/*
 * bench: what the benchmark programs share: time, medians of paired runs, and
 * the one line per figure that scripts/bench promises.
 *
 * Runs are paired: each round measures all sides one after another, ratios are
 * taken within a round, and the median over the rounds is reported.  So a noisy
 * neighbour spoils a round, not the figure.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* CLOCK_MONOTONIC. */
uint64_t bench_now_ns(void);
/* Of v[0, nr), nr > 0, which is sorted in place. */
double bench_median(double *v, size_t nr);
/* The q-th quantile (0 .. 1), nearest rank; sorts in place. */
double bench_quantile(double *v, size_t nr, double q);
/* Keep this thread on `cpu` (modulo the CPUs there are). */
void bench_pin(unsigned int cpu);
/* Shared anonymous file memory of `bytes`, as guest RAM is, every page present and
 * filled with pseudo-random bytes; exits with a reason when there is none. */
uint8_t *bench_guest_ram(size_t bytes, uint64_t seed);
void bench_guest_free(uint8_t *ram, size_t bytes);
/* splitmix64 */
uint64_t bench_rand(uint64_t *state);
/* `nr` different page numbers below `nr_pages`, ascending, at random; malloc()ed. */
uint32_t *bench_scattered(uint32_t nr, uint32_t nr_pages, uint64_t seed);

enum bench_goal { BENCH_AT_LEAST, BENCH_AT_MOST };
/* Prints `bench NAME: ratio R (goal >= G)`. */
void bench_ratio(const char *name, double ratio, enum bench_goal goal, double bound);
/* A figure that has no goal: `  text`. */
void bench_note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Prints `bench NAME: skipped: why` and exits 77. */
void bench_skip(const char *name, const char *fmt, ...)
	__attribute__((noreturn, format(printf, 2, 3)));
/* Prints the reason to stderr and exits 1. */
void bench_die(const char *fmt, ...) __attribute__((noreturn, format(printf, 1, 2)));
