/* SPDX-License-Identifier: MIT */
/*
 * Restore: a new VMM's empty VM becomes what a snapshot was, before it runs its
 * first instruction.  On the VM's thread, when READY has come: all vCPUs are
 * parked, all memory is told.
 *
 * RAM files are emptied (holes where the file system can), then filled in the
 * order in which the pages lie in the store, so that reads are few and large.
 * Pages come in the reader's memory and are copied, in place of being read into RAM: the
 * store may not touch memory that its owner can take away under it.
 *
 * A failure is final for that VMM: the connection is refused with the reason.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "snapd/util/busguard.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/vm/priv.h"

#define SHARE_PAGES (1u << 16) /* placed between two looks at whether to go on */

struct restore {
	struct vm *vm;
	struct goal goal;
	struct page_at *pages; /* owned; by loc */
	size_t nr_pages;
	struct store_reader *reader; /* owned */
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
	loc_t x = ((const struct page_at *)a)->loc, y = ((const struct page_at *)b)->loc;

	return x < y ? -1 : x > y;
}

static int list_pages(struct restore *r, struct err *e)
{
	struct pagemap_iter it;
	struct page_at page;
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

struct places {
	const struct vm *vm;
	const struct placed_page *pages;
	size_t nr;
};

/* How many of the pages from `first` on are neighbours in the piece and in memory. */
static size_t run_length(const struct places *x, size_t first, const struct vm_piece *p)
{
	const struct placed_page *q = &x->pages[first];
	size_t n = 1;

	while (first + n < x->nr && q[n].gfn == q[0].gfn + n && vm_piece_has_gfn(p, q[n].gfn) &&
	       (uint8_t *)q[n].bytes == (uint8_t *)q[0].bytes + n * x->vm->mem.page_size)
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
	const struct places *x = arg;
	size_t n, page_size = x->vm->mem.page_size;
	const struct vm_piece *p = NULL;

	for (size_t i = 0; i < x->nr; i += n) {
		const struct placed_page *q = &x->pages[i];
		uint64_t page;

		if (!vm_piece_has_gfn(p, q->gfn))
			p = vm_mem_by_gfn(&x->vm->mem, q->gfn);
		n = run_length(x, i, p);
		page = q->gfn - p->p.home_gfn;
		if (!write_file(p, q->bytes, n * page_size, (p->p.block_page + page) * page_size))
			memcpy(p->mem + page * page_size, q->bytes, n * page_size);
	}
}

/* On the pool's threads. */
static int place_pages(void *arg, const struct placed_page *pages, size_t nr, struct err *e)
{
	struct places x = {.vm = arg, .pages = pages, .nr = nr};

	return busguard_run(place, &x)
		       ? err_set(e, EFAULT, "the VM's memory file shrank or is out of space")
		       : 0;
}

static int fill_ram(struct restore *r, struct err *e)
{
	int err = 0;

	for (size_t at = 0; !err && at < r->nr_pages; at += SHARE_PAGES) {
		err = vm_interrupted(r->vm, NULL, e);
		if (!err)
			err = store_place_pages(r->reader, r->pages + at,
						MIN(r->nr_pages - at, (size_t)SHARE_PAGES),
						place_pages, r->vm, e);
	}
	return err;
}

/* ---- all of it ---- */

static int prepare(struct restore *r, struct err *e)
{
	struct vm *vm = r->vm;
	int err = store_reader_create(vm->d->store, vm->mem.page_size, &r->reader, e);

	return err ? err : list_pages(r, e);
}

static int run(struct restore *r, struct err *e)
{
	struct snapd_msg_loaded loaded;
	int err = goal_check(r->vm, &r->goal, e);

	if (!err)
		err = prepare(r, e);
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
	store_reader_destroy(r->reader);
	goal_deinit(&r->goal);
	free(r->pages);
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
