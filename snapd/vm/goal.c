/* SPDX-License-Identifier: MIT */
/*
 * goal: what rollback and restore share: the point that a VM shall become, checked
 * against the VM before anything is touched, and the last step, LOAD.
 *
 * Order around LOAD, so that a crash at any instant leaves the shared page true:
 * the base is made invalid (everything dirty), the sets are emptied, LOAD runs (a
 * device's load callback may mark pages dirty, and those marks count), and only
 * then does the base name the new timeline.  Where LOAD also resumes, the guest may
 * run before that: a crash just then costs an epoch of all memory, and no page.
 *
 * A VMM that keeps all state itself (SNAPD_HELLO_VMM_STATE) writes memory as it loads: after
 * LOADED what it wrote is put right, and so LOAD never resumes such a VM.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "snapd/core/contents.h"
#include "snapd/state.h"
#include "snapd/util/busguard.h"
#include "snapd/util/cleanup.h"
#include "snapd/vm/priv.h"

#define SETTLE_PAGES 256u

void goal_deinit(struct goal *g)
{
	if (g->store && g->fork)
		store_timeline_drop(g->store, g->fork, NULL);
	if (g->store)
		store_unpin(g->store, g->at);
	pagemap_destroy(g->map);
	free(g->state);
	if (g->state_fd >= 0)
		close(g->state_fd);
	*g = GOAL_NONE;
}

/* A point is as private as the VM that it belongs to. */
static int may_read(struct vm *vm, struct snapd_point at, struct err *e)
{
	struct store_vm owner = {};
	struct store_timeline t;
	bool may;
	int err = store_timeline_get(vm->d->store, at.timeline, &t, NULL);

	if (!err)
		err = store_vm_get(vm->d->store, t.vm, &owner, NULL);
	may = !err && (!vm->uid || owner.uid == vm->uid);
	store_vm_deinit(&owner);
	return may ? 0 : err_set(e, ENOENT, "no such snapshot");
}

/* Each vCPU has its registers, in a record of its own, or the VMM tells. */
static uint32_t count_vcpus(const struct snapd_state_reader *r, const struct state_vmm *vmm)
{
	const struct state_record *rec = NULL;
	uint32_t nr = vmm ? vmm->nr_vcpus : 0;

	while ((rec = state_next(r, rec)))
		nr += !strcmp(rec->name, "x86.regs") || !strcmp(rec->name, "arm64.regs");
	return nr;
}

static int check_piece(struct vm *vm, const struct state_piece *sp, struct err *e)
{
	for (uint64_t i = 0; i < sp->nr_pages;) {
		const struct vm_piece *p = vm_mem_by_gfn(&vm->mem, sp->home_gfn + i);

		if (!p)
			return err_set(
				e, EINVAL,
				"the snapshot has memory at GPA 0x%llx, and %s has none there",
				(unsigned long long)(sp->home_gfn + i) * vm->mem.page_size,
				vm->name);
		i = p->p.home_gfn + p->p.nr_frames - sp->home_gfn;
	}
	return 0;
}

static int check_pieces(struct vm *vm, struct goal *g, const struct snapd_state_reader *r,
			struct err *e)
{
	uint64_t nr_pages;
	int err = contents_pieces(r, &g->pieces, &g->nr_pieces, &nr_pages, e);

	for (size_t i = 0; !err && i < g->nr_pieces; i++)
		err = check_piece(vm, &g->pieces[i], e);
	return err;
}

/* A VMM that starts each vCPU as it makes it says READY with fewer than there will
 * be: more may come for a while. */
static bool may_get_more(struct vm *vm, uint32_t wanted)
{
	uint64_t now = now_ns(CLOCK_MONOTONIC);

	if (!(vm->hello.flags & SNAPD_HELLO_RESTORE) || vm->hello.nr_vcpus > wanted)
		return false;
	if (!vm->vcpus_until_ns)
		vm->vcpus_until_ns = now + vm->d->config.vcpus_wait_ms * 1000000ull;
	return now < vm->vcpus_until_ns;
}

/* The record of a VMM that keeps all state itself, or NULL. */
static const struct state_vmm *vmm_of(const struct snapd_state_reader *r)
{
	const void *data;
	uint16_t version;
	size_t len;

	if (state_get(r, STATE_VMM, 0, &version, &data, &len) || version != 1 ||
	    len < sizeof(struct state_vmm))
		return NULL;
	return data;
}

static int check_vcpus(struct vm *vm, const struct snapd_state_reader *r, struct err *e)
{
	const struct state_vmm *vmm = vmm_of(r);
	uint32_t wanted = count_vcpus(r, vmm);

	if (!!vmm != vm_keeps_state(vm))
		return err_set(e, EINVAL, "the snapshot's vCPUs %s, those of %s %s",
			       vmm ? "are in its VMM's own state" : "are KVM's", vm->name,
			       vmm ? "are KVM's" : "are in its VMM's own state");
	if (wanted == vm->hello.nr_vcpus)
		return 0;
	return err_set(e, may_get_more(vm, wanted) ? EAGAIN : EINVAL,
		       "the snapshot has %u vCPUs, %s has %u", wanted, vm->name,
		       vm->hello.nr_vcpus);
}

static int check_state(struct vm *vm, struct goal *g, struct err *e)
{
	struct snapd_state_reader r;
	int err = state_reader_init(&r, g->state, g->state_len, e);

	if (err)
		return err;
	if (contents_postmortem(&r))
		return err_set(e, EINVAL,
			       "the snapshot is post-mortem: memory of a VM at its VMM's death, "
			       "with no vCPU state that could go on; export it instead");
	err = check_vcpus(vm, &r, e);
	return err ? err : check_pieces(vm, g, &r, e);
}

static int make_state_fd(struct goal *g, struct err *e)
{
	g->state_fd = memfd_create("snapd-state", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (g->state_fd < 0)
		return err_errno(e, errno, "memfd for the state");
	for (size_t at = 0; at < g->state_len;) {
		ssize_t n =
			pwrite(g->state_fd, (char *)g->state + at, g->state_len - at, (off_t)at);

		if (n <= 0)
			return err_errno(e, n ? errno : EIO, "write the state");
		at += (size_t)n;
	}
	if (fcntl(g->state_fd, F_ADD_SEALS,
		  F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL))
		return err_errno(e, errno, "seal the state");
	return 0;
}

int goal_load(struct vm *vm, struct snapd_point at, struct goal *g, struct err *e)
{
	int err = may_read(vm, at, e);

	*g = GOAL_NONE;
	g->at = at;
	if (!err)
		err = store_pin(vm->d->store, at, e);
	if (!err)
		g->store = vm->d->store;
	if (!err)
		err = store_state_load(vm->d->store, at, &g->state, &g->state_len, e);
	if (!err)
		err = check_state(vm, g, e);
	if (!err)
		err = store_map_load(vm->d->store, at, true, &g->map, e);
	if (!err)
		err = make_state_fd(g, e);
	if (err)
		goal_deinit(g);
	return err;
}

int goal_check(struct vm *vm, const struct goal *g, struct err *e)
{
	struct snapd_msg_check msg = {.state_bytes = g->state_len};

	if (!vm_speaks(vm, CHECK_MINOR))
		return 0;
	return vm_request(vm, &msg, sizeof(msg), SNAPD_MSG_CHECK, g->state_fd, SNAPD_MSG_CHECKED,
			  sizeof(struct snapd_msg_checked), VM_REQUEST_TIMEOUT_MS, e);
}

/* First piece that ends above gfn, or nr_pieces. */
static size_t piece_above(const struct goal *g, uint64_t gfn)
{
	size_t lo = 0, hi = g->nr_pieces;

	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (g->pieces[mid].home_gfn + g->pieces[mid].nr_pages <= gfn)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

bool goal_has(const struct goal *g, uint64_t gfn)
{
	size_t i = piece_above(g, gfn);

	return i < g->nr_pieces && g->pieces[i].home_gfn <= gfn;
}

int goal_fork(struct vm *vm, struct goal *g, struct err *e)
{
	int err = store_timeline_create(vm->d->store, vm->id, g->at, &g->fork, e);

	if (!err)
		vm_keep_timeline(vm, g->fork);
	return err;
}

/* The parts of a piece that the goal does not have are dirty.  O(pieces). */
static int mark_extra(struct vm *vm, const struct goal *g, const struct snapd_piece *p)
{
	uint64_t gfn = p->home_gfn, end = p->home_gfn + p->nr_frames;
	int err = 0;

	for (size_t i = piece_above(g, gfn); !err && gfn < end; i++) {
		uint64_t from = i < g->nr_pieces ? MIN(g->pieces[i].home_gfn, end) : end;

		if (from > gfn)
			err = vm_shm_add_range(&vm->shm, &vm->shm.dirty,
					       p->first_frame + gfn - p->home_gfn, from - gfn);
		gfn = i < g->nr_pieces ? g->pieces[i].home_gfn + g->pieces[i].nr_pages : end;
	}
	return err;
}

/* The sets say: everything is as at the goal, but memory that it did not have. */
static int reset_sets(struct vm *vm, const struct goal *g)
{
	struct vm_base none = {};
	int err = vm_shm_set_base(&vm->shm, &none);

	if (!err)
		err = vm_shm_clear(&vm->shm, &vm->shm.dirty, vm->mem.frames_end);
	if (!err)
		err = vm_shm_clear(&vm->shm, &vm->shm.inflight, vm->mem.frames_end);
	for (uint32_t i = 0; !err && i < vm->mem.nr_pieces; i++)
		err = mark_extra(vm, g, &vm->mem.by_gfn[i].p);
	return err;
}

static int load(struct vm *vm, struct goal *g, bool runs_on, struct snapd_msg_loaded *ret,
		struct err *e)
{
	struct snapd_msg_load msg = {.state_bytes = g->state_len,
				     .point = {g->fork, 0},
				     .flags = runs_on ? SNAPD_LOAD_RESUME : 0};
	size_t least = runs_on ? sizeof(*ret) : SNAPD_1_0_LOADED_BYTES;
	int err = vm_request(vm, &msg, sizeof(msg), SNAPD_MSG_LOAD, g->state_fd, SNAPD_MSG_LOADED,
			     least, VM_LOAD_TIMEOUT_MS, e);

	*ret = (struct snapd_msg_loaded){};
	if (!err)
		memcpy(ret, vm->in, MIN((size_t)((struct snapd_msg *)vm->in)->len, sizeof(*ret)));
	return err;
}

/* ---- what LOAD wrote ---- */

struct settle {
	struct vm *vm;
	struct store_reader *reader;
	uint8_t *buf; /* SETTLE_PAGES pages, owned */
	uint64_t frames[SETTLE_PAGES];
	struct page_read reqs[SETTLE_PAGES];
	size_t nr;
};

static void settle_write(void *arg)
{
	const struct settle *s = arg;
	uint32_t page_size = s->vm->mem.page_size;

	for (size_t i = 0; i < s->nr; i++) {
		const struct vm_piece *p = vm_mem_by_frame(&s->vm->mem, s->frames[i]);

		memcpy(vm_piece_page(&s->vm->mem, p, s->frames[i]), s->reqs[i].dst, page_size);
	}
}

/* Keep those of `n` taken frames whose page the point has; the others stay as they are,
 * and dirty. */
static int settle_list(struct settle *s, size_t n)
{
	struct vm *vm = s->vm;
	uint64_t rest[SETTLE_PAGES];
	size_t nr_rest = 0;

	s->nr = 0;
	for (size_t i = 0; i < n; i++) {
		uint64_t frame = s->frames[i];
		const struct vm_piece *p = vm_mem_by_frame(&vm->mem, frame);
		uint64_t gfn = p ? p->p.home_gfn + frame - p->p.first_frame : 0;
		loc_t loc = p ? pagemap_get(vm->live, gfn) : 0;

		if (!p)
			continue;
		if (loc_kind(loc) == LOC_NONE) {
			rest[nr_rest++] = frame;
			continue;
		}
		s->frames[s->nr] = frame;
		s->reqs[s->nr] = (struct page_read){
			.gfn = gfn, .loc = loc, .dst = s->buf + s->nr * vm->mem.page_size};
		s->nr++;
	}
	return vm_shm_add(&vm->shm, &vm->shm.inflight, rest, nr_rest);
}

static int settle_read(struct settle *s, struct err *e)
{
	struct page_read to_read[SETTLE_PAGES];
	size_t n = 0;

	for (size_t i = 0; i < s->nr; i++) {
		if (loc_kind(s->reqs[i].loc) == LOC_PAGE)
			to_read[n++] = s->reqs[i];
		else
			memset(s->reqs[i].dst, 0, s->vm->mem.page_size);
	}
	return n ? store_read_pages(s->reader, to_read, n, e) : 0;
}

/* The dirty frames into `inflight`, where they stay until they are as they should be; what
 * the point does not have stays there for the merge. */
static int settle_all(struct settle *s, struct err *e)
{
	struct vm *vm = s->vm;
	uint64_t cursor = 0;
	size_t n;
	int err;

	for (;;) {
		if (vm_shm_take(&vm->shm, vm->mem.frames_end, &cursor, s->frames, SETTLE_PAGES, &n))
			return err_set(e, EFAULT, "the VM's shared memory is gone");
		if (!n)
			return 0;
		err = settle_list(s, n);
		if (!err)
			err = settle_read(s, e);
		if (!err && busguard_run(settle_write, s))
			err = err_set(e, EFAULT, "the VM's memory file shrank");
		for (size_t i = 0; !err && i < s->nr; i++)
			err = vm_shm_clear_range(&vm->shm, &vm->shm.inflight, s->frames[i], 1);
		if (err)
			return err;
	}
}

/* A VMM's devices write memory as they load.  What the snapshot has there is the memory of
 * its instant, and the devices have their state already: so that stays. */
static int settle(struct vm *vm, struct err *e)
{
	struct settle s = {.vm = vm, .buf = malloc((size_t)SETTLE_PAGES * vm->mem.page_size)};
	int err = s.buf ? 0 : err_set(e, ENOMEM, "out of memory");

	if (!err)
		err = store_reader_create(vm->d->store, vm->mem.page_size, &s.reader, e);
	if (!err)
		err = settle_all(&s, e);
	store_reader_destroy(s.reader);
	free(s.buf);
	if (!err && vm_shm_merge(&vm->shm, vm->mem.frames_end, false))
		err = err_set(e, EFAULT, "the VM's shared memory is gone");
	vm->broken = err;
	return err;
}

/* LOADED came: the sets and the base, which names no point since reset_sets(), are true
 * at each instant from then on, whether or not the guest runs already. */
int goal_enter(struct vm *vm, struct goal *g, bool runs_on, struct snapd_msg_loaded *ret,
	       struct err *e)
{
	struct pagemap *map;
	int err = reset_sets(vm, g);

	if (err)
		err_set(e, -err, "the VM's shared memory is gone");
	else
		err = load(vm, g, runs_on, ret, e);
	if (err) {
		vm->broken = true;
		if (vm->sock >= 0)
			vm_make_fresh(vm, NULL);
		return err;
	}
	vm->broken = false;
	vm->nr_gone = 0;
	/* Freeing the old map would be part of the pause: goal_deinit() does it. */
	map = vm->live;
	vm->live = NULL;
	err = vm_set_point(vm, (struct snapd_point){g->fork, 0}, steal_ptr(&g->map), e);
	g->fork = 0;
	g->map = map;
	if (err)
		vm_say_error(vm, SNAPD_MSG_ERROR, e);
	else if (vm_keeps_state(vm))
		err = settle(vm, e);
	return err;
}
