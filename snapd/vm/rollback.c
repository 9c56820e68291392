/* SPDX-License-Identifier: MIT */
/*
 * Rollback in place: a running VM becomes what a snapshot was, by writing only the
 * pages that differ.  On the VM's thread.
 *
 * What differs: RAM now is live ⊕ (dirty ∪ inflight); so all frames of dirty ∪
 * inflight, and all GFNs of which the live map and the goal's map name different
 * places.  Frames that the goal has no memory for are left alone (their memslots
 * vanish with the layout) and are dirty afterwards.
 *
 *   guest runs   SYNC; plan the pages; read them into staging memory; again, as long as
 *                many more became dirty meanwhile
 *   PAUSE        with REWRITE: from the answer on the agent waits for LOAD; it drops
 *                stale shadow pages while this side
 *                adds what became dirty since, and reads it;
 *                plan → inflight: from here on a crash finds them marked;
 *                writes; more windows of read + write if staging memory is too small
 *   LOAD         with RESUME: goal.c.  To be checked: LOAD, recheck.c, RESUME
 *
 * A failure before the first write leaves the VM as it was, running (RESUME with
 * UNTOUCHED).  One after it leaves it paused and `broken`: another rollback, to any
 * snapshot, cures it.  If this process dies between PAUSED and LOADED, written or not,
 * the agent says so in its next HELLO and the same rollback runs again: base and sets
 * still tell the truth about RAM.
 *
 * Agents from before protocol 1.2, and a VM that stands paused from a rollback before, get
 * REWRITE as a message, which has no answer, and SYNC behind it, which has.
 */
#include <assert.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "snapd/core/json.h"
#include "snapd/util/pool.h"
#include "snapd/util/busguard.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/vm/priv.h"

#define READ_PAGES	   2048u
#define PARALLEL_MIN_PAGES 4096u
#define ROUNDS_MAX	   4u
#define LATE_PAGES	   16u /* that many are read in the pause: one deep read */
#define NO_SLOT		   UINT32_MAX

struct rb_page {
	uint64_t frame;
	loc_t loc;     /* in the goal */
	uint32_t slot; /* in staging memory; NO_SLOT: a zero page, or not read */
};

struct rollback {
	struct vm *vm;
	struct job *job; /* NULL: redo */
	bool check;	 /* compare before the VM runs on */
	struct goal goal;
	struct store_reader *reader;
	bool paused_already; /* by an earlier service, or a rollback that failed */
	bool told_rewrite;   /* the agent knows, and waits for LOAD */
	bool touched;	     /* RAM was written to */
	bool runs_on;	     /* LOAD resumed the VM */
	uint64_t nr_removed; /* vm->mem's, when the goal was checked against it */
	/* the pages to write, in no special order; owned */
	struct rb_page *plan;
	size_t nr, cap;
	size_t nr_read; /* plan[0, nr_read) is read; */
	size_t written; /* plan[0, written) is written */
	uint32_t slots_used, slots_max;
	/* frames in the plan, private; behind mem */
	struct gpaset planned;
	void *mem;
	size_t mem_bytes;
	struct vm_pause pause;
	struct snapd_msg_loaded loaded;
	uint64_t nr_late, nr_zero, write_ns;
};

static void set_phase(struct rollback *r, const char *phase)
{
	if (r->job)
		r->job->phase = phase;
}

/* ---- the plan ---- */

static int plan_frame(struct rollback *r, const struct vm_piece *p, uint64_t frame, struct err *e)
{
	uint64_t gfn = p->p.home_gfn + frame - p->p.first_frame;
	struct rb_page *page;

	if (gpaset_test(&r->planned, frame) || !goal_has(&r->goal, gfn))
		return 0;
	if (r->nr == r->cap) {
		size_t cap = r->cap ? r->cap * 2 : 4096;

		page = reallocarray(r->plan, cap, sizeof(*page));
		if (!page)
			return err_set(e, ENOMEM, "out of memory");
		r->plan = page;
		r->cap = cap;
	}
	page = &r->plan[r->nr];
	*page = (struct rb_page){frame, pagemap_get(r->goal.map, gfn), NO_SLOT};
	if (loc_kind(page->loc) == LOC_NONE)
		return err_set(e, EUCLEAN, "the store does not know the page at GPA 0x%llx",
			       (unsigned long long)gfn * r->vm->mem.page_size);
	gpaset_add(&r->planned, frame);
	r->nr_zero += page->loc == LOC_ZERO_PAGE;
	r->nr++;
	return 0;
}

static int plan_frames(struct rollback *r, const uint64_t *frames, size_t n, struct err *e)
{
	const struct vm_piece *p = NULL;
	int err = 0;

	for (size_t i = 0; !err && i < n; i++) {
		if (!vm_piece_has_frame(p, frames[i]))
			p = vm_mem_by_frame(&r->vm->mem, frames[i]);
		if (p)
			err = plan_frame(r, p, frames[i], e);
	}
	return err;
}

static int plan_set(struct rollback *r, const struct gpaset *set, struct err *e)
{
	uint64_t frames[1024], cursor = 0;
	size_t n;
	int err = 0;

	do {
		if (vm_shm_peek(&r->vm->shm, set, r->vm->mem.frames_end, &cursor, frames,
				ARRAY_SIZE(frames), &n))
			return err_set(e, EFAULT, "the VM's shared memory is gone");
		err = plan_frames(r, frames, n, e);
	} while (!err && n);
	return err;
}

static int plan_diff(struct rollback *r, struct err *e)
{
	_cleanup_free_ uint64_t *gfns = NULL;
	const struct vm_piece *p = NULL;
	size_t n;
	int err = pagemap_diff(r->vm->live, r->goal.map, &gfns, &n);

	if (err)
		return err_errno(e, -err, "compare two points");
	for (size_t i = 0; !err && i < n; i++) {
		if (!vm_piece_has_gfn(p, gfns[i]))
			p = vm_mem_by_gfn(&r->vm->mem, gfns[i]);
		if (p)
			err = plan_frame(r, p, p->p.first_frame + gfns[i] - p->p.home_gfn, e);
	}
	return err;
}

static int plan(struct rollback *r, struct err *e)
{
	int err = plan_set(r, &r->vm->shm.dirty, e);

	if (!err)
		err = plan_set(r, &r->vm->shm.inflight, e);
	return err ? err : plan_diff(r, e);
}

/* ---- read and write ---- */

/* Pages that became dirty late raise the total. */
static void report(struct rollback *r)
{
	if (!r->job)
		return;
	r->job->unit = "pages";
	r->job->total = r->nr;
	r->job->done = r->nr_read;
}

/* Read plan[nr_read, …) as far as staging memory goes. */
static int read_more(struct rollback *r, struct err *e)
{
	static _Thread_local struct page_read reqs[READ_PAGES];
	uint32_t page_size = r->vm->mem.page_size;
	const struct vm_piece *p = NULL;
	int err = 0;

	while (!err && r->nr_read < r->nr && r->slots_used < r->slots_max) {
		size_t n = 0;

		for (; r->nr_read < r->nr && r->slots_used < r->slots_max && n < READ_PAGES;
		     r->nr_read++) {
			struct rb_page *page = &r->plan[r->nr_read];

			if (page->loc == LOC_ZERO_PAGE)
				continue;
			if (!vm_piece_has_frame(p, page->frame))
				p = vm_mem_by_frame(&r->vm->mem, page->frame);
			assert(p); /* check_layout() */
			page->slot = r->slots_used++;
			reqs[n++] = (struct page_read){
				.gfn = p->p.home_gfn + page->frame - p->p.first_frame,
				.loc = page->loc,
				.dst = r->vm->staging.mem + (size_t)page->slot * page_size,
			};
		}
		if (n)
			err = store_read_pages(r->reader, reqs, n, e);
		report(r);
	}
	return err;
}

struct write_part {
	struct rollback *r;
	uint64_t first, n;
};

static void write_part(void *arg)
{
	const struct write_part *part = arg;
	struct vm *vm = part->r->vm;
	uint32_t page_size = vm->mem.page_size;
	const struct vm_piece *p = NULL;

	for (uint64_t i = part->first; i < part->first + part->n; i++) {
		const struct rb_page *page = &part->r->plan[i];
		uint8_t *dst;

		if (!vm_piece_has_frame(p, page->frame))
			p = vm_mem_by_frame(&vm->mem, page->frame);
		assert(p); /* check_layout() */
		dst = vm_piece_page(&vm->mem, p, page->frame);
		if (page->slot == NO_SLOT)
			memset(dst, 0, page_size);
		else
			memcpy(dst, vm->staging.mem + (size_t)page->slot * page_size, page_size);
	}
}

static int write_guarded(void *arg, uint64_t first, uint64_t n)
{
	struct rollback *r = arg;
	struct write_part part = {.r = r, .first = r->written + first, .n = n};

	return busguard_run(write_part, &part);
}

static int write_read(struct rollback *r, struct err *e)
{
	int err = pool_ranges(r->vm->d->pool, r->nr_read - r->written, PARALLEL_MIN_PAGES,
			      write_guarded, r);

	r->written = r->nr_read;
	r->slots_used = 0;
	return err ? err_set(e, EFAULT, "the VM's memory file shrank") : 0;
}

/* ---- the steps ---- */

/* Goal and plan name memory of a VM that goes on changing while it runs. */
static int check_layout(const struct rollback *r, struct err *e)
{
	if (r->vm->mem.nr_removed == r->nr_removed)
		return 0;
	return err_set(e, EAGAIN, "memory of %s was unplugged meanwhile: try again", r->vm->name);
}

/* The pages that the guest dirtied while others were read would have to be read in the
 * pause: read them now, for as long as each round leaves fewer for the next. */
static int follow(struct rollback *r, struct err *e)
{
	size_t before, last = SIZE_MAX;
	int err = 0;

	for (uint32_t i = 0; !err && i < ROUNDS_MAX && last > LATE_PAGES; i++) {
		before = r->nr;
		err = vm_sync(r->vm, e);
		if (!err)
			err = check_layout(r, e);
		if (!err)
			err = plan_set(r, &r->vm->shm.dirty, e);
		if (!err)
			err = read_more(r, e);
		if (r->nr - before > last / 2)
			break;
		last = r->nr - before;
	}
	return err;
}

static int prepare(struct rollback *r, struct err *e)
{
	struct vm *vm = r->vm;
	int err;

	if (!vm->staging.mem && staging_init(&vm->staging, vm->d->config.staging_max_bytes))
		return err_set(e, ENOMEM, "out of memory for staging");
	r->slots_max =
		(uint32_t)MIN(vm->staging.max_bytes / vm->mem.page_size, (size_t)NO_SLOT - 1);
	r->mem_bytes = gpaset_bytes(vm->shm.nr_frames);
	r->mem = mmap(NULL, r->mem_bytes, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (r->mem == MAP_FAILED)
		return err_set(e, ENOMEM, "out of memory for a rollback");
	gpaset_init(&r->planned, r->mem, vm->shm.nr_frames);
	err = store_reader_create(vm->d->store, vm->mem.page_size, &r->reader, e);
	if (!err && !r->paused_already)
		err = vm_sync(vm, e);
	if (!err)
		err = check_layout(r, e);
	if (!err)
		err = plan(r, e);
	staging_prepare(&vm->staging, (r->nr - r->nr_zero) * vm->mem.page_size);
	if (!err)
		err = read_more(r, e);
	if (!err)
		err = goal_fork(vm, &r->goal, e);
	return err || r->paused_already ? err : follow(r, e);
}

/* What became dirty while the plan was made and read. */
static int add_late(struct rollback *r, struct err *e)
{
	uint64_t frames[1024], cursor = 0;
	size_t n, before = r->nr;
	int err = 0;

	do {
		if (vm_shm_take(&r->vm->shm, r->vm->mem.frames_end, &cursor, frames,
				ARRAY_SIZE(frames), &n))
			return err_set(e, EFAULT, "the VM's shared memory is gone");
		err = plan_frames(r, frames, n, e);
	} while (!err && n);
	r->nr_late = r->nr - before;
	return err ? err : read_more(r, e);
}

/* All of the plan to inflight: rewritten pages differ from the base. */
static int mark_plan(struct rollback *r, struct err *e)
{
	uint64_t frames[1024];
	int err = 0;

	for (size_t i = 0; !err && i < r->nr;) {
		size_t n = 0;

		while (i < r->nr && n < ARRAY_SIZE(frames))
			frames[n++] = r->plan[i++].frame;
		err = vm_shm_add(&r->vm->shm, &r->vm->shm.inflight, frames, n);
	}
	return err ? err_set(e, EFAULT, "the VM's shared memory is gone") : 0;
}

/* REWRITE has no answer.  Before the agent has seen it, the end of its lease would let
 * the guest run on in half rewritten memory. */
static int tell_rewrite(struct rollback *r, struct err *e)
{
	struct snapd_msg_rewrite msg = {.to = r->goal.at};
	int err = vm_send(r->vm, &msg, sizeof(msg), SNAPD_MSG_REWRITE, -1, e);

	if (!err)
		err = vm_sync(r->vm, e);
	if (err && r->vm->sock >= 0)
		vm_say_error(r->vm, SNAPD_MSG_ERROR, e);
	return err;
}

static int rewrite(struct rollback *r, struct err *e)
{
	uint64_t begun = now_ns(CLOCK_MONOTONIC);
	int err = r->told_rewrite ? 0 : tell_rewrite(r, e);

	if (err)
		return err;
	r->touched = true;
	err = write_read(r, e);
	if (!err && r->written < r->nr)
		log_notice(
			"%s: rollback of %zu pages exceeds staging_max: the pause includes reads",
			r->vm->name, r->nr);
	while (!err && r->written < r->nr) {
		err = read_more(r, e);
		if (!err)
			err = write_read(r, e);
	}
	r->write_ns = now_ns(CLOCK_MONOTONIC) - begun;
	return err;
}

static int while_paused(struct rollback *r, struct err *e)
{
	uint64_t begun = now_ns(CLOCK_MONOTONIC);
	int err = check_layout(r, e);

	if (!err)
		err = add_late(r, e);
	if (!err)
		err = mark_plan(r, e);
	if (!err)
		err = rewrite(r, e);
	if (!err)
		err = goal_enter(r->vm, &r->goal, r->runs_on, &r->loaded, e);
	r->pause.service_ns = now_ns(CLOCK_MONOTONIC) - begun;
	return err;
}

/* The VM was not touched: it goes on, with the sets as they were. */
static void let_go(struct rollback *r)
{
	struct vm *vm = r->vm;

	if (vm->sock >= 0 && r->told_rewrite)
		vm_resume_untouched(vm, NULL);
	else if (vm->sock >= 0 && !r->paused_already)
		vm_resume(vm, NULL, NULL);
	if (vm->shm.map && vm_shm_merge(&vm->shm, vm->mem.frames_end, false))
		vm_disconnect(vm);
}

static int run(struct rollback *r, struct err *e)
{
	struct vm *vm = r->vm;
	int err;

	set_phase(r, "reading");
	err = prepare(r, e);
	if (!err)
		err = vm_interrupted(vm, r->job, e);
	set_phase(r, "paused");
	if (!err && !r->paused_already)
		err = vm_pause_to_rewrite(vm, r->goal.at, &r->pause, e);
	if (err)
		return err;
	r->told_rewrite = !r->paused_already && vm_speaks(vm, REWRITE_MINOR);
	r->runs_on = !r->check && !vm_keeps_state(vm) && vm_speaks(vm, REWRITE_MINOR);
	err = while_paused(r, e);
	if (!err && r->runs_on) {
		r->pause.total_ns = r->loaded.paused_ns;
		return 0;
	}
	if (!err && r->check) {
		set_phase(r, "checking");
		err = goal_recheck(vm, &r->goal, e);
	}
	if (!err)
		return vm_resume(vm, &r->pause, e);
	if (!r->touched)
		let_go(r);
	else
		vm->broken = true;
	vm_publish(vm);
	return err;
}

static void rollback_deinit(struct rollback *r)
{
	vm_keep_timeline(r->vm, 0);
	store_reader_destroy(r->reader);
	goal_deinit(&r->goal);
	free(r->plan);
	if (r->mem && r->mem != MAP_FAILED)
		munmap(r->mem, r->mem_bytes);
	staging_trim(&r->vm->staging, (size_t)64 << 20);
}

/* The agent may know of memory that went and that has not been told yet: nothing is wrong
 * with the snapshot then, and another try may tell more. */
static int check_with_agent(struct rollback *r, struct err *e)
{
	struct err gone = {0};
	int err = goal_check(r->vm, &r->goal, e);

	if (err != -ENOENT || vm_sync(r->vm, &gone) || !check_layout(r, &gone))
		return err;
	*e = gone;
	return -EAGAIN;
}

/* `r` has vm, job, paused_already; the rest zero. */
static int rollback_to(struct rollback *r, struct snapd_point at, struct err *e)
{
	struct vm *vm = r->vm;
	int err;

	r->nr_removed = vm->mem.nr_removed;
	err = goal_load(vm, at, &r->goal, e);
	if (!err && !r->paused_already)
		err = check_with_agent(r, e);
	if (!err)
		err = run(r, e);
	if (err)
		log_event(LOG_ROLLBACK_FAILED, vm->broken ? LOG_LVL_ERR : LOG_LVL_WARN,
			  "%s: rollback failed%s: %s", vm->name,
			  vm->broken ? " half way, the VM stays paused" : "", e->text);
	else
		log_event(LOG_ROLLED_BACK, LOG_LVL_INFO,
			  "%s: rolled back: %zu pages written, %llu of them late, paused %llu us",
			  vm->name, r->nr, (unsigned long long)r->nr_late,
			  (unsigned long long)r->pause.total_ns / 1000);
	rollback_deinit(r);
	return err;
}

static json_t *result(const struct rollback *r, const struct store_snapshot *snap)
{
	return json_pack("{s:o,s:{s:I,s:I},s:I,s:I,s:I,s:b,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I}",
			 "snapshot", snapshot_json(snap), "point", "timeline",
			 (json_int_t)r->vm->point.timeline, "epoch", (json_int_t)r->vm->point.epoch,
			 "pages", (json_int_t)r->nr, "zero", (json_int_t)r->nr_zero, "late",
			 (json_int_t)r->nr_late, "checked", r->check, "pause_ns",
			 (json_int_t)r->pause.total_ns, "stop_ns", (json_int_t)r->pause.stop_ns,
			 "harvest_ns", (json_int_t)r->pause.harvest_ns, "write_ns",
			 (json_int_t)r->write_ns, "layout_ns", (json_int_t)r->loaded.layout_ns,
			 "cure_ns", (json_int_t)r->loaded.cure_ns, "load_ns",
			 (json_int_t)r->loaded.load_ns, "service_ns",
			 (json_int_t)r->pause.service_ns);
}

int rollback_job(struct job *job, struct err *e)
{
	struct vm *vm = vm_of_job(job);
	struct rollback r = {.vm = vm, .job = job, .paused_already = vm->broken};
	struct store_snapshot snap;
	const char *id;
	int check = 0, err;

	if (json_unpack(job->args, "{s:s,s?b}", "snapshot", &id, "check", &check))
		return err_set(e, EINVAL, "rollback wants \"snapshot\", a number as text");
	r.check = check;
	err = store_snapshot_get(vm->d->store, strtoull(id, NULL, 10), &snap, e);
	if (!err)
		err = rollback_to(&r, snap.point, e);
	if (err)
		return err;
	pthread_mutex_lock(&vm->lock);
	vm->pub.head_snapshot = snap.id;
	pthread_mutex_unlock(&vm->lock);
	job->result = result(&r, &snap);
	return 0;
}

int rollback_redo(struct vm *vm, struct err *e)
{
	struct rollback r = {.vm = vm, .paused_already = true};
	struct err why = {};
	int err;

	log_notice("%s: finishes the rollback that was interrupted", vm->name);
	err = rollback_to(&r, vm->hello.rewrite_to, &why);
	if (!err)
		return 0;
	if (vm->sock < 0)
		return err_set(e, -err, "%s", why.text);
	/* It stays attached, for somebody to roll it back to another snapshot. */
	vm->broken = true;
	vm_publish(vm);
	return 0;
}
