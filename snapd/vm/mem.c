/* SPDX-License-Identifier: MIT */
/* RAM blocks and pieces as told by an agent: checks, mappings, lookup; see vm_mem.h. */
#include "snapd/vm/mem.h"

#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>

#include "snapd/util/cleanup.h"

int vm_mem_init(struct vm_mem *m, uint32_t page_size, uint64_t max_frames)
{
	*m = (struct vm_mem){.page_size = page_size, .max_frames = max_frames, .last_piece = -1};
	m->blocks = calloc(VM_MAX_BLOCKS, sizeof(*m->blocks));
	if (!m->blocks)
		return -ENOMEM;
	for (uint32_t i = 0; i < VM_MAX_BLOCKS; i++)
		m->blocks[i].fd = -1;
	return 0;
}

void vm_mem_deinit(struct vm_mem *m)
{
	for (uint32_t i = 0; m->blocks && i < VM_MAX_BLOCKS; i++) {
		if (m->blocks[i].fd < 0)
			continue;
		munmap(m->blocks[i].map, m->blocks[i].size_bytes);
		close(m->blocks[i].fd);
	}
	free(m->blocks);
	free(m->by_frame);
	free(m->by_gfn);
	*m = (struct vm_mem){};
}

static int check_file(int fd, uint64_t told_bytes, bool *is_tmpfs, struct err *e)
{
	struct statfs fs;
	struct stat st;

	if (fstat(fd, &st) || fstatfs(fd, &fs))
		return err_errno(e, errno, "memory file");
	if (!S_ISREG(st.st_mode) ||
	    (fs.f_type != TMPFS_MAGIC && fs.f_type != (__typeof__(fs.f_type))HUGETLBFS_MAGIC))
		return err_set(e, EINVAL, "memory file is not a memfd, shm or hugetlbfs file");
	if (st.st_size < 0 || (uint64_t)st.st_size != told_bytes)
		return err_set(e, EINVAL, "memory file has %lld bytes, told were %llu",
			       (long long)st.st_size, (unsigned long long)told_bytes);
	*is_tmpfs = fs.f_type == TMPFS_MAGIC;
	return 0;
}

int vm_mem_add_block(struct vm_mem *m, const struct snapd_msg_block *msg, int fd_taken,
		     struct err *e)
{
	_cleanup_fd_ int fd = fd_taken;
	struct vm_block *b;
	bool is_tmpfs = false;
	void *map;
	int err;

	if (msg->block >= VM_MAX_BLOCKS || m->blocks[msg->block].fd >= 0)
		return err_set(e, EINVAL, "block %u: told twice, or too many (at most %u)",
			       msg->block, VM_MAX_BLOCKS);
	if (!msg->size_bytes || msg->size_bytes % m->page_size || msg->size_bytes > INT64_MAX)
		return err_set(e, EINVAL, "block %u: %llu bytes are not whole pages", msg->block,
			       (unsigned long long)msg->size_bytes);
	err = check_file(fd, msg->size_bytes, &is_tmpfs, e);
	if (err)
		return err;
	map = mmap(NULL, msg->size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		return err_errno(e, errno, "block %u: map %llu bytes", msg->block,
				 (unsigned long long)msg->size_bytes);
	b = &m->blocks[msg->block];
	b->fd = steal_fd(&fd);
	b->map = map;
	b->size_bytes = msg->size_bytes;
	b->is_tmpfs = is_tmpfs;
	return 0;
}

/* First index whose start is above `key`. */
static uint32_t upper(const struct vm_piece *v, uint32_t n, uint64_t key, bool gfn)
{
	uint32_t lo = 0;

	while (lo < n) {
		uint32_t mid = lo + (n - lo) / 2;

		if ((gfn ? v[mid].p.home_gfn : v[mid].p.first_frame) <= key)
			lo = mid + 1;
		else
			n = mid;
	}
	return lo;
}

static bool overlaps(const struct vm_piece *v, uint32_t n, uint64_t start, uint64_t len, bool gfn)
{
	uint32_t i = upper(v, n, start + len - 1, gfn);
	uint64_t at;

	if (!i)
		return false;
	at = gfn ? v[i - 1].p.home_gfn : v[i - 1].p.first_frame;
	return at + v[i - 1].p.nr_frames > start;
}

static int check_piece(const struct vm_mem *m, const struct snapd_piece *p, struct err *e)
{
	const struct vm_block *b;
	uint64_t pages;

	if (p->piece >= VM_MAX_PIECES * 16 || (int64_t)p->piece <= m->last_piece ||
	    m->nr_pieces >= VM_MAX_PIECES)
		return err_set(e, EINVAL, "piece %u: out of order, or too many", p->piece);
	if (p->block >= VM_MAX_BLOCKS || m->blocks[p->block].fd < 0)
		return err_set(e, EINVAL, "piece %u: no block %u", p->piece, p->block);
	b = &m->blocks[p->block];
	pages = b->size_bytes / m->page_size;
	if (!p->nr_frames || p->nr_frames > pages || p->block_page > pages - p->nr_frames)
		return err_set(e, EINVAL, "piece %u: outside block %u", p->piece, p->block);
	if (p->nr_frames > m->max_frames || p->first_frame > m->max_frames - p->nr_frames)
		return err_set(e, EINVAL, "piece %u: frames beyond the sets", p->piece);
	if (p->home_gfn >= VM_GFN_END - p->nr_frames)
		return err_set(e, EINVAL, "piece %u: home GFN too high", p->piece);
	if (overlaps(m->by_frame, m->nr_pieces, p->first_frame, p->nr_frames, false) ||
	    overlaps(m->by_gfn, m->nr_pieces, p->home_gfn, p->nr_frames, true))
		return err_set(e, EINVAL, "piece %u: overlaps another", p->piece);
	return 0;
}

static void insert(struct vm_piece *v, uint32_t n, const struct vm_piece *p, bool gfn)
{
	uint32_t i = upper(v, n, gfn ? p->p.home_gfn : p->p.first_frame, gfn);

	memmove(&v[i + 1], &v[i], (n - i) * sizeof(*v));
	v[i] = *p;
}

static int grow(struct vm_mem *m)
{
	size_t cap = MAX((uint32_t)16, m->nr_pieces * 2);
	struct vm_piece *v;

	/* Powers of two from 16 on: full exactly when the count is one. */
	if (m->nr_pieces && (m->nr_pieces < 16 || m->nr_pieces & (m->nr_pieces - 1)))
		return 0;
	v = realloc(m->by_frame, cap * sizeof(*v));
	if (!v)
		return -ENOMEM;
	m->by_frame = v;
	v = realloc(m->by_gfn, cap * sizeof(*v));
	if (!v)
		return -ENOMEM;
	m->by_gfn = v;
	return 0;
}

int vm_mem_add_piece(struct vm_mem *m, const struct snapd_piece *p, struct err *e)
{
	int err = check_piece(m, p, e);
	struct vm_piece v;

	if (err)
		return err;
	if (grow(m))
		return err_set(e, ENOMEM, "piece %u: out of memory", p->piece);
	v = (struct vm_piece){.p = *p, .block = &m->blocks[p->block]};
	v.mem = v.block->map + p->block_page * m->page_size;
	insert(m->by_frame, m->nr_pieces, &v, false);
	insert(m->by_gfn, m->nr_pieces, &v, true);
	m->nr_pieces++;
	m->last_piece = p->piece;
	m->frames_end = MAX(m->frames_end, p->first_frame + p->nr_frames);
	m->ram_frames += p->nr_frames;
	return 0;
}

static void drop(struct vm_piece *v, uint32_t n, uint32_t i)
{
	memmove(&v[i], &v[i + 1], (n - i - 1) * sizeof(*v));
}

int vm_mem_remove_piece(struct vm_mem *m, uint32_t id, struct snapd_piece *ret, struct err *e)
{
	uint32_t f = 0, g;

	while (f < m->nr_pieces && m->by_frame[f].p.piece != id)
		f++;
	if (f == m->nr_pieces)
		return err_set(e, EINVAL, "piece %u: gone, but was never told", id);
	*ret = m->by_frame[f].p;
	g = upper(m->by_gfn, m->nr_pieces, ret->home_gfn, true) - 1;
	drop(m->by_frame, m->nr_pieces, f);
	drop(m->by_gfn, m->nr_pieces, g);
	m->nr_pieces--;
	m->nr_removed++;
	m->ram_frames -= ret->nr_frames;
	return 0;
}

const struct vm_piece *vm_mem_by_frame(const struct vm_mem *m, uint64_t frame)
{
	uint32_t i = upper(m->by_frame, m->nr_pieces, frame, false);

	return i && vm_piece_has_frame(&m->by_frame[i - 1], frame) ? &m->by_frame[i - 1] : NULL;
}

const struct vm_piece *vm_mem_by_gfn(const struct vm_mem *m, uint64_t gfn)
{
	uint32_t i = upper(m->by_gfn, m->nr_pieces, gfn, true);

	return i && vm_piece_has_gfn(&m->by_gfn[i - 1], gfn) ? &m->by_gfn[i - 1] : NULL;
}
