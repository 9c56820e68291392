/* SPDX-License-Identifier: MIT */
/*
 * check: what a plain test program needs.  It prints what it sees and exits 0
 * (as expected), 1 (not so) or 77 (cannot be tested here; the reason is the last
 * line).
 */
#pragma once

#include <stdio.h>
#include <stdlib.h>

#define TEST_SKIP 77

#define check(cond, ...)                                                                   \
	do {                                                                               \
		if (!(cond)) {                                                             \
			fflush(stdout);                                                    \
			fprintf(stderr, "%s:%d: not so: %s: ", __FILE__, __LINE__, #cond); \
			fprintf(stderr, __VA_ARGS__);                                      \
			fputc('\n', stderr);                                               \
			exit(1);                                                           \
		}                                                                          \
	} while (0)

#define skip(...)                                \
	do {                                     \
		printf("skipped: " __VA_ARGS__); \
		putchar('\n');                   \
		exit(TEST_SKIP);                 \
	} while (0)
