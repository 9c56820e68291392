/* SPDX-License-Identifier: MIT */
/*
 * The pause of an epoch: all that is still dirty, and what a self-check finds, to staging memory
 * while nothing runs; and from there to the store when the guest runs again.  On the VM's thread,
 * with the pool's help.  Why nothing is lost: capture.c.
 */
#include <string.h>
#include <time.h>

#include "snapd/util/busguard.h"
#include "snapd/util/cleanup.h"
#include "snapd/vm/capture_impl.h"
#include "snapd/vm/selfcheck.h"

#define PARALLEL_MIN_PAGES 4096u /* below it, waking a helper costs more than it saves */

/* A part of the copy in the pause. */
struct copy_part {
	struct capture *c;
	uint64_t first, nr;
};

/* ---- in the pause ---- */

static void copy_part(void *arg)
{
	struct copy_part *part = arg;
	struct capture *c = part->c;
	const struct vm_piece *p = NULL;

	for (uint64_t i = part->first; i < part->first + part->nr; i++) {
		uint64_t frame = c->staged[i];

		if (!vm_piece_has_frame(p, frame))
			p = vm_mem_by_frame(&c->vm->mem, frame);
		if (gpaset_test(&c->vm->shm.discarded, frame) && capture_still_hole(c, p, frame))
			memset(c->vm->staging.mem + i * c->page_size, 0, c->page_size);
		else
			memcpy(c->vm->staging.mem + i * c->page_size,
			       vm_piece_page(&c->vm->mem, p, frame), c->page_size);
		/* Its piece may be unplugged before the page is handed on. */
		c->staged[i] = p->p.home_gfn + frame - p->p.first_frame;
	}
}

static int copy_guarded(void *arg, uint64_t first, uint64_t n)
{
	struct copy_part part = {.c = arg, .first = first, .nr = n};

	return busguard_run(copy_part, &part);
}

/* All of `dirty`, to where the hot pages wait already. */
static int gather_late(struct capture *c)
{
	uint64_t frames[1024], cursor = 0;
	size_t n;
	int err;

	for (;;) {
		err = vm_shm_take(&c->vm->shm, c->vm->mem.frames_end, &cursor, frames,
				  ARRAY_SIZE(frames), &n);
		if (err || !n)
			return err;
		for (size_t i = 0; i < n; i++)
			gpaset_add(&c->late, frames[i]);
	}
}

/* Frames that still have memory, ascending, to staged[]. */
static int list_late(struct capture *c, uint64_t max)
{
	uint64_t frames[1024], cursor = 0;
	const struct vm_piece *p = NULL;
	size_t n;

	while ((n = gpaset_take(&c->late, NULL, c->vm->mem.frames_end, &cursor, frames,
				ARRAY_SIZE(frames)))) {
		for (size_t i = 0; i < n; i++) {
			if (!vm_piece_has_frame(p, frames[i]))
				p = vm_mem_by_frame(&c->vm->mem, frames[i]);
			if (!p)
				continue;
			if (c->nr_staged == max)
				return -ENOBUFS;
			c->staged[c->nr_staged++] = frames[i];
		}
	}
	return 0;
}

int capture_paused(struct capture *c, struct err *e)
{
	uint64_t begun = now_ns(CLOCK_MONOTONIC), max = c->vm->staging.max_bytes / c->page_size;
	int err = gather_late(c);

	c->gone_at_pause = c->vm->nr_gone;
	if (!err && c->check)
		err = selfcheck_run(c->check, &c->late,
				    c->vm->d->config.self_check_max_ms * 1000000ull, e);
	if (!err)
		err = list_late(c, max);
	if (err == -ENOBUFS)
		return err_set(e, ENOBUFS,
			       "more than %llu MiB change faster than they are captured; raise "
			       "staging_max",
			       (unsigned long long)(c->vm->staging.max_bytes >> 20));
	if (!err)
		err = pool_ranges(c->vm->d->pool, c->nr_staged, PARALLEL_MIN_PAGES, copy_guarded,
				  c);
	c->stats.paused_pages = c->nr_staged;
	c->stats.copy_ns = now_ns(CLOCK_MONOTONIC) - begun;
	return err ? err_set(e, EFAULT, "the VM's memory file shrank or cannot be read") : 0;
}

/* ---- after the pause ---- */

int capture_drain(struct capture *c, struct job *job, struct err *e)
{
	uint64_t begun = now_ns(CLOCK_MONOTONIC);
	struct chunk *k;
	int err = capture_tell_gone(c, c->gone_at_pause, e);

	for (uint64_t i = 0; !err && i < c->nr_staged;) {
		err = vm_interrupted(c->vm, job, e);
		if (!err)
			err = capture_next_chunk(c, &k, e);
		for (; !err && i < c->nr_staged && k->nr < CHUNK_PAGES; i++) {
			const uint8_t *bytes = c->vm->staging.mem + i * c->page_size;

			capture_chunk_add(c, k, c->staged[i], bytes, bytes);
		}
		if (err)
			break;
		if (job)
			job->done += k->nr;
		capture_submit_chunk(c, k, true);
	}
	if (!err)
		err = capture_hand_on_all(c, e);
	c->stats.drain_ns = now_ns(CLOCK_MONOTONIC) - begun;
	return err;
}
