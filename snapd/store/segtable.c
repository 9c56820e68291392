/* SPDX-License-Identifier: MIT */
/*
 * The table of segments: found by number, in sets, open for reading or writing.
 *
 * Threads: any.  segments_lock guards all of struct seg; files are opened under it, pages
 * are never read or written under it.  At most OPEN_FDS_MAX idle descriptors are kept.
 */
#include "snapd/store/internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "snapd/util/log.h"

#define OPEN_FDS_MAX 256u

void seg_path(uint32_t id, char name[16])
{
	snprintf(name, 16, "%08x.seg", id);
}

struct seg *seg_find(const struct store *s, uint32_t id)
{
	return id < s->nr_segs ? s->segs[id] : NULL;
}

int seg_add(struct store *s, uint32_t id, struct seg **ret)
{
	struct seg *seg;

	if (id >= s->nr_segs) {
		uint32_t nr = MAX(id + 1, s->nr_segs * 2);
		struct seg **segs = realloc(s->segs, nr * sizeof(*segs));

		if (!segs)
			return -ENOMEM;
		memset(segs + s->nr_segs, 0, (nr - s->nr_segs) * sizeof(*segs));
		s->segs = segs;
		s->nr_segs = nr;
	}
	seg = calloc(1, sizeof(*seg));
	if (!seg)
		return -ENOMEM;
	seg->id = id;
	seg->fd = -1;
	s->segs[id] = seg;
	*ret = seg;
	return 0;
}

/* ---- references ---- */

static int refs_grow(struct seg_refs *refs, uint32_t nr)
{
	uint32_t bytes = (nr + 7) / 8, had = (refs->nr + 7) / 8;
	uint8_t *bits;

	if (nr <= refs->nr)
		return 0;
	bits = realloc(refs->bits, bytes);
	if (!bits)
		return -ENOMEM;
	memset(bits + had, 0, bytes - had);
	refs->bits = bits;
	refs->nr = bytes * 8;
	return 0;
}

bool seg_refs_has(const struct seg_refs *refs, uint32_t id)
{
	return id < refs->nr && refs->bits[id / 8] & 1u << id % 8;
}

int seg_refs_add(struct seg_refs *refs, uint32_t id)
{
	int r = refs_grow(refs, id + 1);

	if (!r)
		refs->bits[id / 8] |= (uint8_t)(1u << id % 8);
	return r;
}

int seg_refs_merge(struct seg_refs *to, const struct seg_refs *from)
{
	int r = refs_grow(to, from->nr);

	for (uint32_t i = 0; !r && i < from->nr / 8; i++)
		to->bits[i] |= from->bits[i];
	return r;
}

bool seg_ref(struct store *s, struct seg_refs *refs, loc_t loc)
{
	uint32_t id = loc_segment(loc);
	scoped_lock(&s->segments_lock);
	const struct seg *seg = seg_find(s, id);

	if (!seg || seg->state == SEG_FREE || seg->condemned || loc_block(loc) >= seg->tail ||
	    seg_refs_add(refs, id))
		return false;
	return true;
}

/* ---- descriptors ---- */

int seg_file_open(struct store *s, const char *name, int flags)
{
	int fd;

	flags |= O_CLOEXEC;
	fd = openat(s->segments_fd, name, flags | (s->direct ? O_DIRECT : 0), 0600);
	if (fd < 0 && errno == EINVAL && atomic_exchange(&s->direct, false)) {
		log_notice("store %s: no O_DIRECT on this file system; using the page cache",
			   s->dir);
		fd = openat(s->segments_fd, name, flags & ~O_EXCL, 0600);
	}
	return fd;
}

int seg_fd_open(struct store *s, uint32_t id, int flags)
{
	char name[16];

	seg_path(id, name);
	return seg_file_open(s, name, flags);
}

static void close_fd(struct store *s, struct seg *seg)
{
	if (seg->fd < 0)
		return;
	close(seg->fd);
	seg->fd = -1;
	s->nr_open_fds--;
}

static void close_idle_fd(struct store *s)
{
	for (uint32_t i = 0; i < s->nr_segs; i++) {
		struct seg *seg = s->segs[i];

		if (seg && seg->fd >= 0 && !seg->users) {
			close_fd(s, seg);
			return;
		}
	}
}

/* Of the file that was just opened.  To a reader beside the process that writes it may be
 * another one each time, also in place of one that was not full when the index was read. */
static void probe_rewrites(const struct store *s, struct seg *seg)
{
	_Alignas(FMT_BLOCK) uint8_t block[FMT_BLOCK];
	struct seg_ident ident;

	if (!s->read_only && (seg->state != SEG_SEALED || seg->probed))
		return;
	seg->probed = true;
	seg->rewrites = 0;
	if (pread(seg->fd, block, sizeof(block), 0) == sizeof(block) &&
	    !seg_super_decode(block, &ident, NULL))
		seg->rewrites = ident.rewrites;
}

int seg_use(struct store *s, struct seg *seg, struct err *e)
{
	if (seg->fd < 0) {
		if (s->nr_open_fds >= OPEN_FDS_MAX)
			close_idle_fd(s);
		seg->fd = seg_fd_open(s, seg->id, s->read_only ? O_RDONLY : O_RDWR);
		if (seg->fd < 0)
			return err_errno(e, errno == ENOENT ? E_CORRUPT : errno,
					 "%s/segments/%08x.seg", s->dir, seg->id);
		s->nr_open_fds++;
		probe_rewrites(s, seg);
	}
	seg->users++;
	return 0;
}

int seg_open(struct store *s, uint32_t id, struct seg **ret, int *fd, struct seg_ident *ident,
	     struct err *e)
{
	scoped_lock(&s->segments_lock);
	struct seg *seg = seg_find(s, id);
	int r;

	if (!seg || seg->state == SEG_FREE)
		return err_set(e, E_CORRUPT, "segment %08x does not exist", id);
	r = seg_use(s, seg, e);
	if (r)
		return r;
	*ret = seg;
	*fd = seg->fd;
	*ident = (struct seg_ident){.segment = id,
				    .generation = seg->generation,
				    .segment_bytes = seg->segment_bytes,
				    .rewrites = seg->rewrites,
				    .seal = s->seal};
	memcpy(ident->store, s->uuid, sizeof(ident->store));
	return 0;
}

void seg_close(struct store *s, struct seg *seg)
{
	scoped_lock(&s->segments_lock);
	assert(seg->users);
	if (--seg->users || !seg->orphan)
		return;
	close_fd(s, seg);
	free(seg);
}

void seg_replace(struct store *s, struct seg *seg, struct seg *with)
{
	scoped_lock(&s->segments_lock);
	struct seg fresh = *seg;

	assert(!seg->busy && s->segs[seg->id] == seg);
	fresh.fd = with->fd;
	fresh.users = 0;
	fresh.rewrites = with->rewrites;
	fresh.pages = with->pages;
	fresh.disk_bytes = with->disk_bytes;
	fresh.state = SEG_SEALED;
	fresh.probed = true;
	*with = fresh;
	s->bytes_segments -= seg->disk_bytes - with->disk_bytes;
	s->nr_open_fds++;
	s->segs[seg->id] = with;
	seg->orphan = true;
	if (!seg->users) {
		close_fd(s, seg);
		free(seg);
	}
}
