/* SPDX-License-Identifier: MIT */
/*
 * backing: which file, piece and frames are behind a slot.  Enter: what the VMM
 * says of a slot; leave: runs of frames.  Any thread, under slots_lock.
 *
 * Invariants
 *   B1  a page of a file belongs to at most one live piece, for as long as the
 *       VM lives or until it is unplugged: slots only look at pieces;
 *   B2  frames are given out once and never again;
 *   B3  live pieces have disjoint home GFNs.  A piece first shown in address
 *       space 0 gets the GFN it is shown at, unless another live piece has any of
 *       these; everything else gets GFNs from 2^40 up.
 *
 * Private memory is refused: the service maps the file, and would see none of
 * what the guest writes to a private copy.
 */
#include "agent/vm.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <linux/magic.h>

struct mapping {
	uint64_t start, end, offset, ino;
	unsigned int major, minor;
	char perms[5];
};

static bool parse_mapping(const char *line, struct mapping *m)
{
	return sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %x:%x %" SCNu64, &m->start,
		      &m->end, m->perms, &m->offset, &m->major, &m->minor, &m->ino) == 7;
}

/* Is [hva, hva + len) a MAP_SHARED mapping of this file from this offset?  The
 * kernel's own account, since a VMM easily maps the wrong thing. */
static int check_mapping(const struct snapd_memslot *s, const struct stat *st, struct err *e)
{
	uint64_t at = (uintptr_t)s->hva, end = at + s->size_bytes, base = at;
	_cleanup_free_ char *line = NULL;
	FILE *f = fopen("/proc/self/maps", "re");
	const char *wrong = "is not mapped";
	struct mapping m;
	size_t cap = 0;

	if (!f)
		return err_errno(e, errno, "cannot read /proc/self/maps");
	while (at < end && getline(&line, &cap, f) > 0) {
		if (!parse_mapping(line, &m) || m.end <= at)
			continue;
		if (m.start > at)
			break;
		wrong = m.perms[3] != 's' ? "is private memory"
			: m.ino != st->st_ino || makedev(m.major, m.minor) != st->st_dev
				? "is a mapping of another file"
			: m.offset + (at - m.start) != s->fd_offset + (at - base)
				? "is mapped at another offset of the file"
				: NULL;
		if (wrong)
			break;
		at = m.end;
		wrong = "is not mapped";
	}
	fclose(f);
	if (at >= end)
		return 0;
	return err_set(e, EINVAL,
		       "slot %u: host memory at 0x%" PRIx64 " %s; RAM must be a MAP_SHARED mapping "
		       "of its memfd, shm or hugetlbfs file",
		       s->slot, at, wrong);
}

int backing_check(const struct snapd_vm *vm, const struct snapd_memslot *s, struct err *e)
{
	struct statfs fs;
	struct stat st;

	if (s->fd < 0)
		return err_set(
			e, EINVAL,
			"slot %u: private memory (fd -1) cannot be snapshotted; back it with "
			"a memfd mapped MAP_SHARED",
			s->slot);
	if (fstat(s->fd, &st) < 0 || fstatfs(s->fd, &fs) < 0)
		return err_errno(e, errno, "slot %u: descriptor %d", s->slot, s->fd);
	if (fs.f_type != TMPFS_MAGIC && fs.f_type != HUGETLBFS_MAGIC)
		return err_set(e, EINVAL, "slot %u: its file is not on tmpfs or hugetlbfs",
			       s->slot);
	if (s->fd_offset % vm->page_size || s->fd_offset > (uint64_t)st.st_size ||
	    s->size_bytes > (uint64_t)st.st_size - s->fd_offset)
		return err_set(e, EINVAL,
			       "slot %u: 0x%" PRIx64 " bytes at 0x%" PRIx64
			       " are not within its file of 0x%" PRIx64,
			       s->slot, s->size_bytes, s->fd_offset, (uint64_t)st.st_size);
	return check_mapping(s, &st, e);
}

bool block_is(const struct block *b, const struct stat *st)
{
	return b->fd >= 0 && b->dev == st->st_dev && b->ino == st->st_ino;
}

static int block_new(struct snapd_vm *vm, int fd, const struct stat *st, struct err *e)
{
	struct statfs fs;
	struct block *b;
	int copy;

	if (!GROW(vm->blocks, vm->nr_blocks, vm->cap_blocks))
		return err_set(e, ENOMEM, "no memory for a RAM block");
	if (fstatfs(fd, &fs) < 0 || (copy = fcntl(fd, F_DUPFD_CLOEXEC, 3)) < 0)
		return err_errno(e, errno, "cannot duplicate a RAM descriptor");
	b = &vm->blocks[vm->nr_blocks];
	*b = (struct block){.dev = st->st_dev,
			    .ino = st->st_ino,
			    .fd = copy,
			    .size_bytes = (uint64_t)st->st_size,
			    .page_size = fs.f_type == HUGETLBFS_MAGIC ? (uint32_t)fs.f_bsize
								      : vm->page_size,
			    .told = -1};
	return (int)vm->nr_blocks++;
}

/* The one block of all private memory: its pages are numbered by their address. */
static int block_private(struct snapd_vm *vm, struct err *e)
{
	for (size_t i = 0; i < vm->nr_blocks; i++)
		if (vm->blocks[i].is_private)
			return (int)i;
	if (!GROW(vm->blocks, vm->nr_blocks, vm->cap_blocks))
		return err_set(e, ENOMEM, "no memory for a RAM block");
	vm->blocks[vm->nr_blocks] = (struct block){
		.is_private = true, .fd = -1, .page_size = vm->page_size, .told = -1};
	return (int)vm->nr_blocks++;
}

/* A block of that inode that is large enough; its index. */
static int block_get(struct snapd_vm *vm, const struct snapd_memslot *m, struct err *e)
{
	struct stat st;

	if (m->flags & SNAPD_SLOT_PRIVATE)
		return block_private(vm, e);
	if (fstat(m->fd, &st) < 0)
		return err_errno(e, errno, "slot %u: descriptor %d", m->slot, m->fd);
	for (size_t i = 0; i < vm->nr_blocks; i++)
		if (block_is(&vm->blocks[i], &st) &&
		    vm->blocks[i].size_bytes >= m->fd_offset + m->size_bytes)
			return (int)i;
	return block_new(vm, m->fd, &st, e);
}

static bool same_memory(const struct block *a, const struct block *b)
{
	return a->is_private == b->is_private &&
	       (a->is_private || (a->fd >= 0 && a->dev == b->dev && a->ino == b->ino));
}

/* The live piece of this block that has page `page`; else NULL and *next is the
 * first page after it that has one. */
static struct piece *piece_at(struct snapd_vm *vm, uint32_t block, uint64_t page, uint64_t *next)
{
	*next = UINT64_MAX;
	for (size_t i = 0; i < vm->nr_pieces && !ABLATED(ALIAS_IS_ANOTHER_PAGE); i++) {
		struct piece *p = &vm->pieces[i];

		if (p->gone || !same_memory(&vm->blocks[p->block], &vm->blocks[block]))
			continue;
		if (page >= p->block_page && page - p->block_page < p->nr_frames)
			return p;
		if (p->block_page > page)
			*next = MIN(*next, p->block_page);
	}
	return NULL;
}

static bool home_is_taken(const struct snapd_vm *vm, uint64_t gfn, uint64_t n)
{
	for (size_t i = 0; i < vm->nr_pieces; i++) {
		const struct piece *p = &vm->pieces[i];

		if (!p->gone && p->home_gfn < gfn + n && gfn < p->home_gfn + p->nr_frames)
			return true;
	}
	return false;
}

static uint64_t home_choose(struct snapd_vm *vm, const struct snapd_memslot *m, uint64_t gfn,
			    uint64_t n)
{
	uint64_t home = gfn;

	if (m->as_id != 0 || m->flags & SNAPD_SLOT_PRIVATE || gfn + n > 1ull << 40 ||
	    home_is_taken(vm, gfn, n)) {
		home = vm->next_high_gfn;
		vm->next_high_gfn += n;
	}
	return home;
}

/* First page of the block that the slot shows. */
static uint64_t first_page(const struct snapd_vm *vm, const struct snapd_memslot *m)
{
	uint64_t at = m->flags & SNAPD_SLOT_PRIVATE ? (uintptr_t)m->hva : m->fd_offset;

	return at >> vm->page_shift;
}

/* A piece for pages never shown before, dirty in every set. */
static struct piece *piece_new(struct snapd_vm *vm, const struct snapd_memslot *m, uint32_t block,
			       uint64_t offset, uint64_t n, struct err *e)
{
	uint64_t first = frames_end(vm);
	struct piece *p;

	if (!GROW(vm->pieces, vm->nr_pieces, vm->cap_pieces)) {
		err_set(e, ENOMEM, "no memory for a piece");
		return NULL;
	}
	if (n > SNAPD_SHM_FRAMES - first) {
		err_set(e, ENOSPC, "more than %llu pages of guest memory in one VM's life",
			SNAPD_SHM_FRAMES);
		return NULL;
	}
	p = &vm->pieces[vm->nr_pieces];
	*p = (struct piece){
		.block = block,
		.block_page = first_page(vm, m) + offset,
		.nr_frames = n,
		.home_gfn = home_choose(vm, m, (m->gpa >> vm->page_shift) + offset, n),
		.first_frame = first,
		.told = -1,
	};
	vm->nr_pieces++;
	atomic_store(&vm->next_frame, first + n);
	sets_add_range(vm, first, n);
	return p;
}

static struct slot_run *runs_append(struct slot_run *runs, uint32_t *nr, struct slot_run add)
{
	struct slot_run *last = *nr ? &runs[*nr - 1] : NULL, *more;

	if (last && last->first_frame + last->nr_frames == add.first_frame) {
		last->nr_frames += add.nr_frames;
		return runs;
	}
	more = reallocarray(runs, *nr + 1, sizeof(*runs));
	if (!more) {
		free(runs);
		return NULL;
	}
	more[(*nr)++] = add;
	return more;
}

int backing_resolve(struct snapd_vm *vm, const struct snapd_memslot *m, uint32_t *block,
		    struct slot_run **ret, uint32_t *nr_runs, struct err *e)
{
	uint64_t page = first_page(vm, m), end = m->size_bytes >> vm->page_shift;
	struct slot_run *runs = NULL;
	int b = block_get(vm, m, e);

	if (b < 0)
		return b;
	*nr_runs = 0;
	for (uint64_t at = 0, n; at < end; at += n) {
		uint64_t next, skip;
		struct piece *p = piece_at(vm, (uint32_t)b, page + at, &next);

		if (!p) {
			n = MIN(end - at, next - (page + at));
			p = piece_new(vm, m, (uint32_t)b, at, n, e);
			if (!p) {
				free(runs);
				return e->code;
			}
		}
		skip = page + at - p->block_page;
		n = MIN(end - at, p->nr_frames - skip);
		/* Where the whole piece would begin: maybe before this slot, or before address 0.
		 */
		p->hva = (char *)m->hva + (int64_t)((at - skip) << vm->page_shift);
		runs = runs_append(runs, nr_runs, (struct slot_run){at, n, p->first_frame + skip});
		if (!runs)
			return err_set(e, ENOMEM, "no memory for the runs of slot %u", m->slot);
		gpaset_clear_range(&vm->unplugged, p->first_frame + skip, n);
	}
	*block = (uint32_t)b;
	*ret = runs;
	return 0;
}

struct piece *piece_of_frame(struct snapd_vm *vm, uint64_t frame)
{
	size_t lo = 0, hi = vm->nr_pieces; /* ascending by first_frame: B2 */

	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;
		struct piece *p = &vm->pieces[mid];

		if (frame < p->first_frame)
			hi = mid;
		else if (frame - p->first_frame >= p->nr_frames)
			lo = mid + 1;
		else
			return p;
	}
	return NULL;
}

struct piece *piece_of_home(struct snapd_vm *vm, uint64_t gfn)
{
	for (size_t i = 0; i < vm->nr_pieces; i++) {
		struct piece *p = &vm->pieces[i];

		if (!p->gone && gfn >= p->home_gfn && gfn - p->home_gfn < p->nr_frames)
			return p;
	}
	return NULL;
}

static bool is_shown(const struct snapd_vm *vm, const struct piece *p)
{
	for (size_t i = 0; i < vm->nr_views; i++) {
		const struct view *v = &vm->views[i];

		for (uint32_t r = 0; r < v->nr_runs; r++)
			if (v->runs[r].first_frame < p->first_frame + p->nr_frames &&
			    p->first_frame < v->runs[r].first_frame + v->runs[r].nr_frames)
				return true;
	}
	return false;
}

static bool is_unplugged(const struct snapd_vm *vm, const struct piece *p)
{
	for (uint64_t f = 0; f < p->nr_frames; f++)
		if (!gpaset_test(&vm->unplugged, p->first_frame + f))
			return false;
	return true;
}

/* One mapping for the block's life: one for each slot would lose its page tables
 * with every hole punch. */
static int alias_make(struct block *b, struct err *e)
{
	void *p = mmap(NULL, b->size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
		       b->fd, 0);

	if (p == MAP_FAILED)
		return err_errno(e, errno, "cannot map a RAM file a second time");
	(void)madvise(p, b->size_bytes, MADV_DONTDUMP); /* the VMM's has it already */
	(void)madvise(p, b->size_bytes, MADV_DONTFORK);
	b->alias = p;
	return 0;
}

int backing_for_kvm(struct snapd_vm *vm, uint32_t block, const struct snapd_memslot *m, void **ret,
		    struct err *e)
{
	struct block *b = &vm->blocks[block];
	int r;

	*ret = m->hva;
	if (!vm->two_mappings || b->is_private)
		return 0;
	r = b->alias ? 0 : alias_make(b, e);
	if (r >= 0)
		*ret = b->alias + m->fd_offset;
	return r;
}

static void alias_drop(struct block *b)
{
	if (b->alias)
		munmap(b->alias, b->size_bytes);
	b->alias = NULL;
}

static void block_put(struct snapd_vm *vm, uint32_t block)
{
	if (vm->blocks[block].is_private)
		return;
	for (size_t i = 0; i < vm->nr_pieces; i++)
		if (vm->pieces[i].block == block && !vm->pieces[i].gone)
			return;
	alias_drop(&vm->blocks[block]);
	close(vm->blocks[block].fd);
	vm->blocks[block].fd = -1;
}

static void piece_end(struct snapd_vm *vm, struct piece *p)
{
	p->gone = true;
	vm->gone_count++;
	sources_frames_gone(vm, p->first_frame, p->nr_frames);
	if (!ABLATED(GONE_KEEPS_BITS))
		sets_clear_range(vm, p->first_frame, p->nr_frames);
	pthread_rwlock_wrlock(&vm->map_lock);
	ranges_drop_frames(vm, &vm->holes, p->first_frame, p->nr_frames);
	pthread_rwlock_unlock(&vm->map_lock);
	block_put(vm, p->block);
}

void backing_unplug(struct snapd_vm *vm, const struct view *gone)
{
	backing_unplug_runs(vm, gone->runs, gone->nr_runs);
}

void backing_unplug_runs(struct snapd_vm *vm, const struct slot_run *runs, uint32_t nr_runs)
{
	for (uint32_t r = 0; r < nr_runs; r++)
		gpaset_add_range(&vm->unplugged, runs[r].first_frame, runs[r].nr_frames);
	/* Entries of the deleted slot still in rings would set the bits again. */
	reap(vm);
	for (uint32_t r = 0; r < nr_runs; r++) {
		uint64_t at = runs[r].first_frame, end = at + runs[r].nr_frames;

		while (at < end) {
			struct piece *p = piece_of_frame(vm, at);

			at = p->first_frame + p->nr_frames;
			if (!p->gone && !is_shown(vm, p) && is_unplugged(vm, p))
				piece_end(vm, p);
		}
	}
}

/* Is all of this piece among the `nr` pieces of a snapshot (ascending by home GFN)? */
static bool is_among(const struct piece *p, const struct state_piece *kept, size_t nr)
{
	uint64_t at = p->home_gfn, end = at + p->nr_frames;

	for (size_t i = 0; i < nr && at < end; i++)
		if (kept[i].home_gfn <= at && at - kept[i].home_gfn < kept[i].nr_pages)
			at = kept[i].home_gfn + kept[i].nr_pages;
	return at >= end;
}

void backing_keep(struct snapd_vm *vm, const struct state_piece *kept, size_t nr)
{
	reap(vm); /* as in backing_unplug() */
	for (size_t i = 0; i < vm->nr_pieces; i++) {
		struct piece *p = &vm->pieces[i];

		if (!p->gone && !is_shown(vm, p) && !is_among(p, kept, nr))
			piece_end(vm, p);
	}
}

void backing_deinit(struct snapd_vm *vm)
{
	for (size_t i = 0; i < vm->nr_blocks; i++) {
		alias_drop(&vm->blocks[i]);
		cleanup_fd(&vm->blocks[i].fd);
	}
	free(vm->blocks);
	free(vm->pieces);
}
