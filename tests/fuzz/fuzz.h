/* SPDX-License-Identifier: MIT */
/*
 * fuzz: what each fuzz_NAME.c has: libFuzzer's entry point.  It may abort (a
 * broken promise of the code under test), and returns 0.  The plain test replays
 * tests/fuzz/corpus/NAME with replay_main.c; `meson setup -Dfuzz=true` with clang
 * builds the fuzzers: build/tests/fuzz/fuzz_NAME tests/fuzz/corpus/NAME
 */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

#define PROMISE(cond)                                                                              \
	do {                                                                                       \
		if (!(cond)) {                                                                     \
			fprintf(stderr, "%s:%d: broken promise: %s\n", __FILE__, __LINE__, #cond); \
			abort();                                                                   \
		}                                                                                  \
	} while (0)
