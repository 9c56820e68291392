/* SPDX-License-Identifier: MIT */
/*
 * Segment files: made, recycled, lent to one epoch at a time.
 *
 *   (none) ──make──► OPEN ──fills up──► SEALED ──gc──► FREE ──recycle──► OPEN
 *                     │                                 │ └──► (none)
 *                     └── returned without a commit ──► FREE, ready ──► OPEN
 *
 * A file counts only once the index has a record of it, which the commit of the
 * first epoch in it makes; files without one are removed at the next start.  A
 * superblock is durable, and the directory entry too, before the first batch is
 * written.  A recycled segment gets a higher generation, so batches of its former
 * life can't be taken for new ones.
 *
 * Making a file takes two journal commits, 10 ms and more behind a disk queue that
 * is kept full.  So when an epoch has filled half of its segment, a thread of its
 * own makes or recycles the next one ahead, if none is in reserve: it takes one and
 * returns it, ready.
 *
 * Threads: any, under segments_lock but for I/O (segtable.c).
 */
#include "snapd/store/internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "snapd/util/log.h"

static int write_super(struct store *s, struct seg_ident *ident, int fd, struct err *e)
{
	_Alignas(FMT_BLOCK) uint8_t block[FMT_BLOCK];
	ssize_t n;
	int r;

	memcpy(ident->store, s->uuid, sizeof(ident->store));
	seg_super_encode(block, ident);
	r = s->fault ? s->fault(s->fault_opaque, fd, 0, sizeof(block)) : 0;
	if (r < 0)
		return err_errno(e, -r, "writing the superblock of segment %08x", ident->segment);
	n = pwrite(fd, block, sizeof(block), 0);
	if (n != sizeof(block))
		return err_errno(e, n < 0 ? errno : EIO, "writing the superblock of segment %08x",
				 ident->segment);
	return fsync(fd) ? err_errno(e, errno, "syncing segment %08x", ident->segment) : 0;
}

/* A file of that name which nobody could remove means nothing. */
static int create_file(struct store *s, uint32_t id)
{
	int fd = seg_fd_open(s, id, O_RDWR | O_CREAT | O_EXCL);
	char name[16];

	if (fd >= 0 || errno != EEXIST)
		return fd;
	seg_path(id, name);
	return unlinkat(s->segments_fd, name, 0) ? -1
						 : seg_fd_open(s, id, O_RDWR | O_CREAT | O_EXCL);
}

static int make_file(struct store *s, const struct seg *seg, struct err *e)
{
	struct seg_ident ident = {.segment = seg->id,
				  .generation = seg->generation,
				  .segment_bytes = seg->segment_bytes};
	_cleanup_fd_ int fd = create_file(s, seg->id);
	int r;

	if (fd < 0)
		return err_errno(e, errno, "making segment %08x in %s", seg->id, s->dir);
	if (fallocate(fd, 0, 0, (off_t)seg->segment_bytes)) {
		if (errno != EOPNOTSUPP)
			return err_errno(e, errno, "%s: allocating a segment of %llu bytes", s->dir,
					 (unsigned long long)seg->segment_bytes);
		if (ftruncate(fd, (off_t)seg->segment_bytes))
			return err_errno(e, errno, "%s: segment %08x", s->dir, seg->id);
	}
	r = write_super(s, &ident, fd, e);
	if (!r && fsync(s->segments_fd))
		r = err_errno(e, errno, "%s/segments", s->dir);
	return r;
}

/* The generation that a free segment's file already carries: a recycling that was
 * never committed may have raised it. */
static uint64_t file_generation(const struct store *s, int fd)
{
	_Alignas(FMT_BLOCK) uint8_t block[FMT_BLOCK];
	struct seg_ident ident;

	if (pread(fd, block, sizeof(block), 0) != sizeof(block) ||
	    seg_super_decode(block, &ident, NULL))
		return 0;
	return ident.generation;
}

/* A busy free segment becomes an open one. */
static int recycle(struct store *s, struct seg *seg, struct err *e)
{
	struct seg_ident ident = {.segment = seg->id, .segment_bytes = seg->segment_bytes};
	int r;

	ident.generation = MAX(seg->generation, file_generation(s, seg->fd)) + 1;
	r = write_super(s, &ident, seg->fd, e);
	if (r)
		return r;
	pthread_mutex_lock(&s->segments_lock);
	seg->generation = ident.generation;
	seg->named = (struct seg_named){0};
	seg->state = SEG_OPEN;
	seg->tail = 1;
	seg->pages = 0;
	seg->rewrites = 0;
	seg->proven = true;
	seg->condemned = false;
	pthread_mutex_unlock(&s->segments_lock);
	return 0;
}

/* A free segment that nobody uses gets its next life now: no batch in it is valid any
 * more, and who takes it has nothing to do. */
void seg_retire(struct store *s, uint32_t id)
{
	struct err e = {0};
	struct seg *seg;
	int r;

	pthread_mutex_lock(&s->segments_lock);
	seg = seg_find(s, id);
	r = seg && seg->state == SEG_FREE && !seg->busy && !seg->users && !seg->damaged
		    ? seg_use(s, seg, &e)
		    : 1;
	if (!r)
		seg->busy = true;
	pthread_mutex_unlock(&s->segments_lock);
	if (r == 1)
		return;
	if (!r)
		r = recycle(s, seg, &e);
	if (r)
		log_warn("store %s: segment %08x stays as it is: %s", s->dir, id, e.text);
	pthread_mutex_lock(&s->segments_lock);
	if (seg->busy) {
		seg->busy = false;
		seg->users--;
		seg->state = SEG_FREE;
		seg->ready = !r;
	}
	pthread_mutex_unlock(&s->segments_lock);
}

/* First look at a segment since start: is it what the index says? */
static bool super_matches(struct store *s, struct seg *seg)
{
	_Alignas(FMT_BLOCK) uint8_t block[FMT_BLOCK];
	struct seg_ident ident;
	bool ok;

	if (seg->proven)
		return true;
	if (seg_use(s, seg, NULL))
		return false;
	ok = pread(seg->fd, block, sizeof(block), 0) == sizeof(block) &&
	     !seg_super_decode(block, &ident, NULL) && ident.segment == seg->id &&
	     ident.generation == seg->generation && ident.segment_bytes == seg->segment_bytes &&
	     !memcmp(ident.store, s->uuid, sizeof(s->uuid));
	seg->users--;
	if (!ok)
		log_warn("store %s: superblock of segment %08x is damaged; it takes no more data",
			 s->dir, seg->id);
	seg->proven = ok;
	seg->damaged |= !ok;
	return ok;
}

static bool can_append(struct store *s, struct seg *seg)
{
	return seg && seg->state == SEG_OPEN && !seg->busy && !seg->damaged && !seg->condemned &&
	       seg->segment_bytes / FMT_BLOCK >= seg->tail + SEG_TAIL_MIN_BLOCKS &&
	       super_matches(s, seg);
}

static uint32_t free_id(const struct store *s)
{
	uint32_t id = 1;

	while (id < s->nr_segs && s->segs[id])
		id++;
	return id;
}

/* A number and its space, nothing on disk yet. */
static int reserve(struct store *s, struct seg **ret, struct err *e)
{
	uint32_t id = free_id(s);
	struct seg *seg;

	if (id > SEG_ID_MAX)
		return err_set(e, ENOSPC, "store %s: no segment number left", s->dir);
	if (s->max_bytes && s->bytes_segments + s->segment_bytes > s->max_bytes)
		return err_set(e, ENOSPC,
			       "store %s: the limit of %llu bytes is reached (%llu in segments); "
			       "delete snapshots or raise the limit",
			       s->dir, (unsigned long long)s->max_bytes,
			       (unsigned long long)s->bytes_segments);
	if (seg_add(s, id, &seg))
		return err_errno(e, ENOMEM, "store %s", s->dir);
	seg->generation = MAX(s->first_generation, 1);
	seg->segment_bytes = seg->disk_bytes = s->segment_bytes;
	seg->tail = 1;
	seg->state = SEG_FREE;
	s->bytes_segments += seg->disk_bytes;
	*ret = seg;
	return 0;
}

/* Make the file of a reserved, busy segment. */
static int make_segment(struct store *s, struct seg *seg, struct err *e)
{
	int r = make_file(s, seg, e);

	pthread_mutex_lock(&s->segments_lock);
	if (r) {
		seg_drop(s, seg);
	} else {
		seg->state = SEG_OPEN;
		seg->proven = true;
	}
	pthread_mutex_unlock(&s->segments_lock);
	return r;
}

/* One with room; else a free one, best one that is ready; else NULL. */
static struct seg *pick(struct store *s)
{
	struct seg *found = NULL;

	for (uint32_t i = 0; i < s->nr_segs; i++)
		if (can_append(s, s->segs[i]))
			return s->segs[i];
	for (uint32_t i = 0; i < s->nr_segs; i++) {
		struct seg *seg = s->segs[i];

		if (seg && seg->state == SEG_FREE && !seg->busy && !seg->users && !seg->damaged &&
		    (!found || (seg->ready && !found->ready)))
			found = seg;
	}
	return found;
}

/* A segment that whoever needs one next can have at once. */
static bool has_reserve(const struct store *s)
{
	for (uint32_t i = 0; i < s->nr_segs; i++) {
		const struct seg *seg = s->segs[i];

		if (seg && seg->ready && !seg->busy && !seg->damaged)
			return true;
	}
	return false;
}

static void make_busy(struct seg *seg)
{
	seg->busy = true;
	if (seg->ready)
		seg->state = SEG_OPEN;
	seg->ready = false;
}

/* Whoever made a segment busy is the only one to change it. */
static int take(struct store *s, bool ahead, struct seg **ret, struct err *e)
{
	bool fresh, recycled;
	struct seg *seg;
	int r;

	pthread_mutex_lock(&s->segments_lock);
	while (!(seg = pick(s)) && s->making_ahead && !ahead)
		pthread_cond_wait(&s->made, &s->segments_lock);
	fresh = !seg;
	r = fresh ? reserve(s, &seg, e) : seg_use(s, seg, e);
	recycled = !r && !fresh && seg->state == SEG_FREE && !seg->ready;
	if (!r)
		make_busy(seg);
	pthread_mutex_unlock(&s->segments_lock);
	if (r)
		return r;
	if (fresh)
		r = make_segment(s, seg, e);
	if (r)
		return r;
	if (recycled)
		r = recycle(s, seg, e);
	pthread_mutex_lock(&s->segments_lock);
	if (!r && fresh)
		r = seg_use(s, seg, e);
	seg->busy = !r;
	if (r && !fresh)
		seg->users--;
	pthread_mutex_unlock(&s->segments_lock);
	if (!r)
		*ret = seg;
	return r;
}

int seg_take(struct store *s, struct seg **ret, struct err *e)
{
	return take(s, false, ret, e);
}

/* A failure is not reported: whoever needs the segment will meet it. */
static void *make_ahead(void *arg)
{
	struct store *s = arg;
	struct seg *seg;

	if (!take(s, true, &seg, NULL))
		seg_return(s, seg);
	pthread_mutex_lock(&s->segments_lock);
	s->making_ahead = false;
	pthread_cond_broadcast(&s->made);
	pthread_mutex_unlock(&s->segments_lock);
	return NULL;
}

static void space_settle(struct store *s)
{
	if (s->has_maker)
		pthread_join(s->maker, NULL);
	s->has_maker = false;
}

void seg_reserve_ahead(struct store *s)
{
	scoped_lock(&s->segments_lock);

	/* Injected faults count operations: those of an epoch have to stay in order. */
	if (s->fault || s->making_ahead || has_reserve(s))
		return;
	space_settle(s); /* it has ended, or is about to */
	s->has_maker = !pthread_create(&s->maker, NULL, make_ahead, s);
	s->making_ahead = s->has_maker;
}

void seg_return(struct store *s, struct seg *seg)
{
	scoped_lock(&s->segments_lock);
	assert(seg->busy && seg->users);
	seg->busy = false;
	seg->users--;
	if (seg->tail == 1) { /* nothing in it counts */
		seg->state = SEG_FREE;
		seg->ready = true;
	}
}

void seg_drop(struct store *s, struct seg *seg)
{
	char name[16];

	if (seg->fd >= 0) {
		close(seg->fd);
		s->nr_open_fds--;
	}
	seg_path(seg->id, name);
	if (unlinkat(s->segments_fd, name, 0) && errno != ENOENT)
		log_warn("store %s: removing segment %s: %m", s->dir, name);
	s->bytes_segments -= seg->disk_bytes;
	/* The next file of this name is not taken for it by who has its headers cached. */
	s->first_generation = MAX(s->first_generation, seg->generation + 1);
	s->segs[seg->id] = NULL;
	free(seg);
}

void space_close(struct store *s)
{
	space_settle(s);
	for (uint32_t i = 0; i < s->nr_segs; i++) {
		struct seg *seg = s->segs[i];

		if (!seg)
			continue;
		assert(!seg->users && !seg->busy);
		if (seg->fd >= 0)
			close(seg->fd);
		free(seg);
	}
	free(s->segs);
	s->segs = NULL;
	s->nr_segs = 0;
}
