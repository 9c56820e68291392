/* SPDX-License-Identifier: MIT */
/*
 * Runs a fuzz target over the files of a directory, and over damaged forms of each
 * (cut at every length up to a limit, random bits flipped), so that the corpus is a
 * plain test under any compiler and sanitizer.  usage: replay DIR [FORMS]; FORMS of
 * each input, 1000 if not given.
 *
 * Each input lies in a heap block of exactly its size, 64-aligned: a read behind
 * its end is one that ASan sees.
 */
#include <dirent.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"
#include "tests/fuzz/fuzz.h"
#include "tests/lib/rand.h"

#define INPUT_MAX (1u << 20)
#define FORMS	  1000u

static void run_copy(const uint8_t *data, size_t len, size_t flips, struct rand *r)
{
	void *copy = NULL;

	CHECK(posix_memalign(&copy, 64, len ? len : 1) == 0);
	memcpy(copy, data, len);
	for (size_t i = 0; len && i < flips; i++)
		((uint8_t *)copy)[rand_below(r, len)] ^= (uint8_t)(1u << rand_below(r, 8));
	LLVMFuzzerTestOneInput(copy, len);
	free(copy);
}

static void run_input(const uint8_t *data, size_t len, size_t forms, struct rand *r)
{
	size_t nr_cuts = forms * 3 / 5;

	run_copy(data, len, 0, r);
	for (size_t i = 0; i < nr_cuts && i < len; i++)
		run_copy(data, len <= nr_cuts ? i : rand_below(r, len), 0, r);
	for (size_t i = 0; i < forms - nr_cuts; i++)
		run_copy(data, len, 1 + rand_below(r, 4), r);
}

static bool run_file(const char *dir, const char *name, size_t forms, struct rand *r)
{
	_cleanup_free_ uint8_t *data = malloc(INPUT_MAX);
	char path[4096];
	size_t len;
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	f = fopen(path, "re");
	if (!f || !data) {
		printf("%s: %s\n", path, strerror(errno));
		return false;
	}
	len = fread(data, 1, INPUT_MAX, f);
	fclose(f);
	run_input(data, len, forms, r);
	return true;
}

int main(int argc, char **argv)
{
	struct rand r = rand_of(rand_seed());
	struct dirent *d;
	size_t forms = argc > 2 ? strtoul(argv[2], NULL, 10) : FORMS;
	unsigned int nr = 0;
	DIR *dir;

	if (argc < 2 || !(dir = opendir(argv[1]))) {
		fprintf(stderr, "usage: %s CORPUS-DIRECTORY [FORMS]\n", argv[0]);
		return 2;
	}
	while ((d = readdir(dir)) != NULL)
		if (d->d_name[0] != '.') {
			if (!run_file(argv[1], d->d_name, forms, &r))
				return 1;
			nr++;
		}
	closedir(dir);
	printf("%u inputs, each also cut and with bits flipped\n", nr);
	return nr ? 0 : 1;
}
