/* SPDX-License-Identifier: MIT */
/*
 * Any bytes as a manifest: refused with a reason, or runs that ascend, are in
 * range, come out the same after a writer wrote them again, and in no more bytes.
 */
#include <errno.h>

#include "snapd/store/manifest.h"
#include "tests/fuzz/fuzz.h"

static void check_run(const struct manifest_run *run, uint64_t end)
{
	PROMISE(run->len && run->gfn >= end && run->len <= MANIFEST_GFN_MAX);
	PROMISE(run->gfn <= MANIFEST_GFN_MAX - run->len);
	if (loc_kind(run->loc) == LOC_PAGE)
		PROMISE(loc_entry(run->loc) + run->len <= 4096);
	else
		PROMISE(run->loc == LOC_ZERO_PAGE || run->loc == MANIFEST_GONE);
}

/* Frames, and a sum over what each frame maps to, however runs are split. */
struct summary {
	uint64_t frames, sum;
	int result;
};

static struct summary read_all(const uint8_t *data, size_t len, struct manifest_writer *copy)
{
	struct summary s = {0};
	struct manifest_reader r;
	struct manifest_run run;
	uint64_t end = 0;
	struct err e = {0};

	manifest_reader_init(&r, data, len);
	while ((s.result = manifest_next(&r, &run, &e)) == 1) {
		uint64_t step = loc_kind(run.loc) == LOC_PAGE;

		check_run(&run, end);
		if (copy)
			manifest_add_run(copy, run.gfn, run.len, run.loc);
		/* Sum of (gfn + i) * 3 + loc + i * step over the run, in closed form. */
		s.frames += run.len;
		s.sum += run.len * (run.gfn * 3 + run.loc);
		s.sum += (uint64_t)((unsigned __int128)run.len * (run.len - 1) / 2) * (3 + step);
		end = run.gfn + run.len;
	}
	PROMISE(s.result == 0 || (s.result == -EUCLEAN && e.text[0] && e.code == -EUCLEAN));
	return s;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct manifest_writer w = {};
	struct summary first, again;
	const uint8_t *bytes;
	size_t again_len;

	if (manifest_writer_init(&w) < 0)
		return 0;
	first = read_all(data, len, &w);
	PROMISE(manifest_finish(&w, &bytes, &again_len) == 0);
	if (first.result == 0) {
		PROMISE(again_len <= len);
		again = read_all(bytes, again_len, NULL);
		PROMISE(again.result == 0);
		PROMISE(again.frames == first.frames && again.sum == first.sum);
	}
	manifest_writer_deinit(&w);
	return 0;
}
