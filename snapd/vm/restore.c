/* SPDX-License-Identifier: MIT */
/*
 * Restore: a new VMM's empty VM becomes what a snapshot was, before it runs its
 * first instruction.  On the VM's thread, when READY has come: all vCPUs are
 * parked, all memory is told.
 *
 * RAM files are emptied (holes where the file system can), then filled in the
 * order in which the pages lie in the store, so that reads are few and large.
 * Pages go through a buffer: the store may not touch memory that its owner can
 * take away under it.
 *
 * A batch is read, checked and copied by one task, with a reader of its own; so many
 * tasks are under way that while some wait for the disk, others check and copy.
 *
 * A failure is final for that VMM: the connection is refused with the reason.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "snapd/util/pool.h"
#include "snapd/util/busguard.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/vm/priv.h"

#define BATCH_PAGES 2048u
#define NR_BATCHES  4u

struct fill_page {
	uint64_t gfn;
	loc_t loc;
};

struct batch {
	struct pool_task task;
	struct vm *vm;
	struct store_reader *reader; /* owned */
	uint8_t *buf;		     /* BATCH_PAGES pages; borrowed from restore.mem */
	uint32_t nr;
	bool busy;
	int err;
	struct err why;
	struct page_read reqs[BATCH_PAGES]; /* the store reorders them: dst names the buffer */
};

struct restore {
	struct vm *vm;
	struct goal goal;
	struct fill_page *pages; /* owned; by loc */
	size_t nr_pages;
	struct batch *batches; /* NR_BATCHES, owned */
	uint8_t *mem;	       /* owned */
	size_t mem_bytes;
};

/* ---- empty ---- */

struct zero_range {
	uint8_t *p;
	size_t len;
};

static void zero(void *arg)
{
	struct zero_range *z = arg;

	memset(z->p, 0, z->len);
}

/* A hole where that is exact; huge pages would be punched only whole. */
static int empty_piece(const struct vm *vm, const struct vm_piece *p)
{
	uint64_t page_size = vm->mem.page_size;
	struct zero_range z = {p->mem, p->p.nr_frames * page_size};

	if (p->block->is_tmpfs &&
	    !fallocate(p->block->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		       (off_t)(p->p.block_page * page_size), (off_t)z.len))
		return 0;
	return busguard_run(zero, &z);
}

static int empty_ram(struct vm *vm, struct err *e)
{
	int err = 0;

	for (uint32_t i = 0; !err && i < vm->mem.nr_pieces; i++)
		err = empty_piece(vm, &vm->mem.by_gfn[i]);
	return err ? err_set(e, EFAULT, "the VM's memory file shrank or is out of space") : 0;
}

/* ---- fill ---- */

static int by_loc(const void *a, const void *b)
{
	loc_t x = ((const struct fill_page *)a)->loc, y = ((const struct fill_page *)b)->loc;

	return x < y ? -1 : x > y;
}

static int list_pages(struct restore *r, struct err *e)
{
	struct pagemap_iter it;
	struct fill_page page;
	bool sorted = true;

	r->pages = calloc(pagemap_nr_pages(r->goal.map) + 1, sizeof(*r->pages));
	if (!r->pages || pagemap_iter_init(&it, r->goal.map))
		return err_set(e, ENOMEM, "out of memory");
	while (pagemap_iter_next(&it, &page.gfn, &page.loc)) {
		if (loc_kind(page.loc) != LOC_PAGE || !goal_has(&r->goal, page.gfn))
			continue;
		sorted = sorted && (!r->nr_pages || r->pages[r->nr_pages - 1].loc <= page.loc);
		r->pages[r->nr_pages++] = page;
	}
	pagemap_iter_deinit(&it);
	if (!sorted)
		qsort(r->pages, r->nr_pages, sizeof(*r->pages), by_loc);
	return 0;
}

/* How many of the batch's pages from `first` on are neighbours in the piece and in the
 * buffer. */
static uint32_t run_length(const struct batch *b, uint32_t first, const struct vm_piece *p)
{
	const struct page_read *r = &b->reqs[first];
	uint32_t n = 1;

	while (first + n < b->nr && r[n].gfn == r[0].gfn + n && vm_piece_has_gfn(p, r[n].gfn) &&
	       (uint8_t *)r[n].dst == (uint8_t *)r[0].dst + (size_t)n * b->vm->mem.page_size)
		n++;
	return n;
}

/* A write to tmpfs needs no fault, no zeroing and no page table for a page that is not
 * there yet: half the cost.  A file that takes no writes is mapped all the same. */
static bool write_file(const struct vm_piece *p, const uint8_t *from, size_t len, uint64_t at)
{
	if (!p->block->is_tmpfs || fcntl(p->block->fd, F_GETFL) & O_APPEND)
		return false; /* the end is where O_APPEND would write */
	while (len) {
		ssize_t n = pwrite(p->block->fd, from, len, (off_t)at);

		if (n <= 0)
			break;
		from += n;
		at += (uint64_t)n;
		len -= (size_t)n;
	}
	return !len;
}

static void place(void *arg)
{
	const struct batch *b = arg;
	size_t page_size = b->vm->mem.page_size;
	const struct vm_piece *p = NULL;
	uint32_t n;

	for (uint32_t i = 0; i < b->nr; i += n) {
		uint64_t page;

		if (!vm_piece_has_gfn(p, b->reqs[i].gfn))
			p = vm_mem_by_gfn(&b->vm->mem, b->reqs[i].gfn);
		n = run_length(b, i, p);
		page = b->reqs[i].gfn - p->p.home_gfn;
		if (!write_file(p, b->reqs[i].dst, n * page_size,
				(p->p.block_page + page) * page_size))
			memcpy(p->mem + page * page_size, b->reqs[i].dst, n * page_size);
	}
}

static void fill_task(struct pool_task *task)
{
	struct batch *b = (struct batch *)((char *)task - offsetof(struct batch, task));

	b->err = store_read_pages(b->reader, b->reqs, b->nr, &b->why);
	if (!b->err && busguard_run(place, b))
		b->err = err_set(&b->why, EFAULT, "the VM's memory file shrank or is out of space");
}

static int wait_batch(struct restore *r, struct batch *b, struct err *e)
{
	if (!b->busy)
		return 0;
	pool_wait(r->vm->d->pool, &b->task);
	b->busy = false;
	return b->err ? err_set(e, -b->err, "%s", b->why.text) : 0;
}

static void start_batch(struct restore *r, struct batch *b, const struct fill_page *pages, size_t n)
{
	b->nr = (uint32_t)n;
	b->err = 0;
	err_clear(&b->why);
	for (size_t i = 0; i < n; i++)
		b->reqs[i] = (struct page_read){.gfn = pages[i].gfn,
						.loc = pages[i].loc,
						.dst = b->buf + i * r->vm->mem.page_size};
	b->busy = true;
	pool_submit(r->vm->d->pool, &b->task);
}

static int fill_ram(struct restore *r, struct err *e)
{
	size_t at = 0;
	int err = 0, last = 0;

	for (uint32_t i = 0; !err && at < r->nr_pages; i++) {
		struct batch *b = &r->batches[i % NR_BATCHES];
		size_t n = MIN(r->nr_pages - at, (size_t)BATCH_PAGES);

		err = vm_interrupted(r->vm, NULL, e);
		if (!err)
			err = wait_batch(r, b, e);
		if (!err)
			start_batch(r, b, r->pages + at, n);
		at += n;
	}
	for (uint32_t i = 0; i < NR_BATCHES; i++)
		last = wait_batch(r, &r->batches[i], err ? NULL : e) ?: last;
	return err ? err : last;
}

/* ---- all of it ---- */

static int prepare(struct restore *r, struct err *e)
{
	struct vm *vm = r->vm;
	size_t buf_bytes = (size_t)BATCH_PAGES * vm->mem.page_size;
	int err = 0;

	r->mem_bytes = NR_BATCHES * buf_bytes;
	r->mem = mmap(NULL, r->mem_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		      0);
	r->batches = calloc(NR_BATCHES, sizeof(*r->batches));
	if (r->mem == MAP_FAILED || !r->batches)
		return err_set(e, ENOMEM, "out of memory for a restore");
	for (uint32_t i = 0; !err && i < NR_BATCHES; i++) {
		r->batches[i].vm = vm;
		r->batches[i].buf = r->mem + i * buf_bytes;
		r->batches[i].task.fn = fill_task;
		err = store_reader_create(vm->d->store, vm->mem.page_size, &r->batches[i].reader,
					  e);
	}
	return err ? err : list_pages(r, e);
}

static int run(struct restore *r, struct err *e)
{
	struct snapd_msg_loaded loaded;
	int err = prepare(r, e);

	if (!err)
		err = empty_ram(r->vm, e);
	if (!err)
		err = fill_ram(r, e);
	if (!err)
		err = goal_fork(r->vm, &r->goal, e);
	if (!err)
		err = goal_enter(r->vm, &r->goal, false, &loaded, e);
	return err ? err : vm_resume(r->vm, NULL, e);
}

static void restore_deinit(struct restore *r)
{
	vm_keep_timeline(r->vm, 0);
	for (uint32_t i = 0; r->batches && i < NR_BATCHES; i++)
		store_reader_destroy(r->batches[i].reader);
	goal_deinit(&r->goal);
	free(r->pages);
	free(r->batches);
	if (r->mem && r->mem != MAP_FAILED)
		munmap(r->mem, r->mem_bytes);
}

static int check_snapshot(struct vm *vm, const struct store_snapshot *snap, struct err *e)
{
	struct store_vm source = {};
	int err = store_vm_get(vm->d->store, snap->vm, &source, e);

	if (!err && strcmp(source.arch, vm->arch) != 0)
		err = err_set(e, EINVAL, "the snapshot is of a %s machine, this is %s", source.arch,
			      vm->arch);
	if (!err && snap->page_size != vm->mem.page_size)
		err = err_set(e, EINVAL, "the snapshot has pages of %u bytes, this host of %u",
			      snap->page_size, vm->mem.page_size);
	store_vm_deinit(&source);
	return err;
}

int restore_vm(struct vm *vm, struct err *e)
{
	struct restore r = {.vm = vm, .goal = GOAL_NONE};
	uint64_t begun = now_ns(CLOCK_MONOTONIC);
	struct store_snapshot snap;
	int err = store_snapshot_find(vm->d->store, vm->hello.restore, vm->uid, &snap, e);

	if (!err)
		err = check_snapshot(vm, &snap, e);
	if (!err)
		err = goal_load(vm, snap.point, &r.goal, e);
	if (!err)
		err = run(&r, e);
	restore_deinit(&r);
	if (err) {
		/* The agent tries again on any other code: EINVAL says that it is final. */
		if (e && e->code != -ENOTCONN && e->code != -EAGAIN)
			e->code = -EINVAL;
		return err;
	}
	pthread_mutex_lock(&vm->lock);
	vm->pub.head_snapshot = snap.id;
	pthread_mutex_unlock(&vm->lock);
	log_event(LOG_RESTORED, LOG_LVL_INFO,
		  "%s: restored from snapshot %llu: %zu pages read in %llu ms", vm->name,
		  (unsigned long long)snap.id, r.nr_pages,
		  (unsigned long long)(now_ns(CLOCK_MONOTONIC) - begun) / 1000000);
	return 0;
}
