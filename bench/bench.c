/* SPDX-License-Identifier: MIT */
/* What the benchmark programs share; see bench.h. */
#include "bench/bench.h"

#include <errno.h>
#include <math.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"

uint64_t bench_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static int compare_double(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

double bench_median(double *v, size_t nr)
{
	qsort(v, nr, sizeof(*v), compare_double);
	return nr % 2 ? v[nr / 2] : (v[nr / 2 - 1] + v[nr / 2]) / 2;
}

double bench_quantile(double *v, size_t nr, double q)
{
	size_t rank = (size_t)ceil(q * (double)nr);

	qsort(v, nr, sizeof(*v), compare_double);
	return v[rank ? MIN(rank, nr) - 1 : 0];
}

void bench_pin(unsigned int cpu)
{
	long nr = sysconf(_SC_NPROCESSORS_ONLN);
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu % (unsigned int)(nr > 0 ? nr : 1), &set);
	sched_setaffinity(0, sizeof(set), &set); /* a cpuset may forbid it: measure anyway */
}

uint64_t bench_rand(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15u);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

uint8_t *bench_guest_ram(size_t bytes, uint64_t seed)
{
	_cleanup_fd_ int fd = memfd_create("bench-ram", MFD_CLOEXEC);
	uint64_t *p;

	if (fd < 0 || ftruncate(fd, (off_t)bytes) < 0)
		bench_die("memfd of %zu MiB: %s", bytes >> 20, strerror(errno));
	p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		bench_die("mapping %zu MiB: %s", bytes >> 20, strerror(errno));
	for (size_t i = 0; i < bytes / 8; i++)
		p[i] = bench_rand(&seed);
	return (uint8_t *)p;
}

void bench_guest_free(uint8_t *ram, size_t bytes)
{
	munmap(ram, bytes);
}

uint32_t *bench_scattered(uint32_t nr, uint32_t nr_pages, uint64_t seed)
{
	uint32_t *pages = malloc(nr * sizeof(*pages));
	uint32_t found = 0;

	if (!pages)
		bench_die("no memory");
	/* Knuth's selection sampling: each page with the probability still needed. */
	for (uint32_t i = 0; found < nr && i < nr_pages; i++)
		if (bench_rand(&seed) % (nr_pages - i) < nr - found)
			pages[found++] = i;
	return pages;
}

void bench_ratio(const char *name, double ratio, enum bench_goal goal, double bound)
{
	printf("bench %s: ratio %.2f (goal %s %.2f)\n", name, ratio,
	       goal == BENCH_AT_LEAST ? ">=" : "<=", bound);
	fflush(stdout);
}

void bench_note(const char *fmt, ...)
{
	va_list ap;

	printf("  ");
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf("\n");
	fflush(stdout);
}

void bench_skip(const char *name, const char *fmt, ...)
{
	va_list ap;

	printf("bench %s: skipped: ", name);
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf("\n");
	exit(77);
}

void bench_die(const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "bench: ");
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, "\n");
	exit(1);
}
