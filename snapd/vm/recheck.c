/* SPDX-License-Identifier: MIT */
/*
 * recheck: after a rollback, while the VM is still paused: is all of its memory,
 * and its state as the agent now reads it back, what the snapshot has?  O(RAM), so
 * only when it was asked for.  On the VM's thread.
 *
 * Left out: pages that are dirty again (devices may write memory while they load),
 * and what runs by itself: clocks, timers' current counts, the host's description; and
 * what a VMM saves in a form of its own.
 */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "snapd/arch/arch.h"
#include "snapd/state.h"
#include "snapd/util/busguard.h"
#include "snapd/util/cleanup.h"
#include "snapd/vm/priv.h"

#define BATCH_PAGES 1024u

/* ---- memory ---- */

struct recheck {
	struct vm *vm;
	struct store_reader *reader;
	uint8_t *buf; /* BATCH_PAGES pages, owned */
	size_t nr;
	struct page_read reqs[BATCH_PAGES];
	uint64_t differs_at; /* GFN */
	bool differs;
};

static bool page_is(const uint8_t *page, const struct page_read *req, size_t page_size)
{
	return req->loc == LOC_ZERO_PAGE ? pageid_bytes_zero(page, page_size)
					 : !memcmp(page, req->dst, page_size);
}

static void compare(void *arg)
{
	struct recheck *r = arg;
	struct vm *vm = r->vm;
	const struct vm_piece *p = NULL;

	for (size_t i = 0; i < r->nr && !r->differs; i++) {
		uint64_t gfn = r->reqs[i].gfn, frame;

		if (!vm_piece_has_gfn(p, gfn))
			p = vm_mem_by_gfn(&vm->mem, gfn);
		if (!p)
			continue;
		frame = p->p.first_frame + gfn - p->p.home_gfn;
		if (gpaset_test(&vm->shm.dirty, frame))
			continue;
		r->differs =
			!page_is(vm_piece_page(&vm->mem, p, frame), &r->reqs[i], vm->mem.page_size);
		r->differs_at = gfn;
	}
}

static int read_batch(struct recheck *r, struct err *e)
{
	struct page_read to_read[BATCH_PAGES];
	size_t n = 0;

	for (size_t i = 0; i < r->nr; i++)
		if (loc_kind(r->reqs[i].loc) == LOC_PAGE)
			to_read[n++] = r->reqs[i];
	return n ? store_read_pages(r->reader, to_read, n, e) : 0;
}

static int check_batch(struct recheck *r, struct err *e)
{
	int err = read_batch(r, e);

	if (!err && busguard_run(compare, r))
		err = err_set(e, EFAULT, "the VM's memory file shrank");
	if (!err && r->differs)
		err = err_set(e, EUCLEAN, "memory at GPA 0x%llx is not the snapshot's",
			      (unsigned long long)r->differs_at * r->vm->mem.page_size);
	r->nr = 0;
	return err;
}

static int check_pages(struct recheck *r, struct err *e)
{
	size_t page_size = r->vm->mem.page_size;
	struct pagemap_iter it;
	uint64_t gfn;
	loc_t loc;
	int err = pagemap_iter_init(&it, r->vm->live);

	if (err)
		return err_set(e, ENOMEM, "out of memory");
	while (!err && pagemap_iter_next(&it, &gfn, &loc)) {
		r->reqs[r->nr] = (struct page_read){
			.gfn = gfn, .loc = loc, .dst = r->buf + r->nr * page_size};
		if (++r->nr == BATCH_PAGES)
			err = check_batch(r, e);
	}
	pagemap_iter_deinit(&it);
	return err ? err : check_batch(r, e);
}

static int check_memory(struct vm *vm, struct err *e)
{
	size_t bytes = (size_t)BATCH_PAGES * vm->mem.page_size;
	struct recheck *r = calloc(1, sizeof(*r));
	int err;

	if (!r)
		return err_set(e, ENOMEM, "out of memory");
	r->vm = vm;
	r->buf = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (r->buf == MAP_FAILED) {
		free(r);
		return err_set(e, ENOMEM, "out of memory");
	}
	err = store_reader_create(vm->d->store, vm->mem.page_size, &r->reader, e);
	if (!err)
		err = check_pages(r, e);
	store_reader_destroy(r->reader);
	munmap(r->buf, bytes);
	free(r);
	return err;
}

/* ---- state ---- */

static bool is_left_out(const char *name, bool vmm_state)
{
	return !strncmp(name, "host.", 5) || !strncmp(name, "note.", 5) ||
	       !strcmp(name, "pieces") || (vmm_state && !strncmp(name, "dev.", 4));
}

static bool same_record(const struct state_record *rec, const struct snapd_state_reader *now,
			bool vmm_state)
{
	const void *data;
	uint16_t version;
	size_t len;

	if (is_left_out(rec->name, vmm_state))
		return true;
	if (state_get(now, rec->name, rec->instance, &version, &data, &len) ||
	    version != rec->version || len != rec->len_bytes)
		return false;
	return arch_host()->same(rec->name, rec + 1, data, len);
}

static int compare_states(const struct goal *g, const void *state, size_t len, bool vmm_state,
			  struct err *e)
{
	struct snapd_state_reader want, now;
	const struct state_record *rec = NULL;
	int err = state_reader_init(&want, g->state, g->state_len, e);

	if (!err)
		err = state_reader_init(&now, state, len, e);
	while (!err && (rec = state_next(&want, rec)))
		if (!same_record(rec, &now, vmm_state))
			err = err_set(e, EUCLEAN, "state '%s' %u is not the snapshot's", rec->name,
				      rec->instance);
	return err;
}

static int check_state(struct vm *vm, const struct goal *g, struct err *e)
{
	_cleanup_free_ void *state = NULL;
	_cleanup_fd_ int fd = -1;
	struct vm_pause pause;
	uint64_t len;
	int err = vm_pause(vm, &fd, &len, &pause, e);

	if (!err)
		err = vm_read_state(fd, len, &state, e);
	return err ? err : compare_states(g, state, len, vm_keeps_state(vm), e);
}

int goal_recheck(struct vm *vm, const struct goal *g, struct err *e)
{
	int err = check_memory(vm, e);

	return err ? err : check_state(vm, g, e);
}
