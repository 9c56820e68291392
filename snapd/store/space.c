/* SPDX-License-Identifier: MIT */
/*
 * Segment files: made, recycled, lent to one epoch at a time, opened for reading.
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
 * Threads: any.  segments_lock guards all of struct seg; files are opened, and at
 * times made, under it, pages are never read or written under it.  At most
 * OPEN_FDS_MAX idle descriptors are kept.
 */
#include "snapd/store/internal.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "snapd/store/walk.h"
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

static int seg_fd_open(struct store *s, uint32_t id, int flags)
{
	char name[16];
	int fd;

	seg_path(id, name);
	flags |= O_CLOEXEC;
	fd = openat(s->segments_fd, name, flags | (s->direct ? O_DIRECT : 0), 0600);
	if (fd < 0 && errno == EINVAL && atomic_exchange(&s->direct, false)) {
		log_notice("store %s: no O_DIRECT on this file system; using the page cache",
			   s->dir);
		fd = openat(s->segments_fd, name, flags & ~O_EXCL, 0600);
	}
	return fd;
}

static void close_idle_fd(struct store *s)
{
	for (uint32_t i = 0; i < s->nr_segs; i++) {
		struct seg *seg = s->segs[i];

		if (seg && seg->fd >= 0 && !seg->users) {
			close(seg->fd);
			seg->fd = -1;
			s->nr_open_fds--;
			return;
		}
	}
}

static int seg_use(struct store *s, struct seg *seg, struct err *e)
{
	if (seg->fd < 0) {
		if (s->nr_open_fds >= OPEN_FDS_MAX)
			close_idle_fd(s);
		seg->fd = seg_fd_open(s, seg->id, s->read_only ? O_RDONLY : O_RDWR);
		if (seg->fd < 0)
			return err_errno(e, errno == ENOENT ? E_CORRUPT : errno,
					 "%s/segments/%08x.seg", s->dir, seg->id);
		s->nr_open_fds++;
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
				    .seal = s->seal};
	memcpy(ident->store, s->uuid, sizeof(ident->store));
	return 0;
}

void seg_close(struct store *s, struct seg *seg)
{
	scoped_lock(&s->segments_lock);
	assert(seg->users);
	seg->users--;
}

/* ---- making and recycling ---- */

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
	seg->state = SEG_OPEN;
	seg->tail = 1;
	seg->pages = 0;
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
	seg->generation = 1;
	seg->segment_bytes = s->segment_bytes;
	seg->tail = 1;
	seg->state = SEG_FREE;
	s->bytes_segments += seg->segment_bytes;
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
	s->bytes_segments -= seg->segment_bytes;
	s->segs[seg->id] = NULL;
	free(seg);
}

/* ---- start and end ---- */

static bool parse_name(const char *name, uint32_t *id)
{
	char again[16];
	char *end;
	unsigned long v = strtoul(name, &end, 16);

	if (end == name || v > SEG_ID_MAX)
		return false;
	seg_path((uint32_t)v, again);
	*id = (uint32_t)v;
	return !strcmp(name, again);
}

static void recover_file(struct store *s, const char *name)
{
	uint32_t id;

	if (name[0] == '.')
		return;
	if (!parse_name(name, &id)) {
		log_warn("store %s: segments/%s is not ours; left alone", s->dir, name);
		return;
	}
	if (seg_find(s, id))
		return;
	if (unlinkat(s->segments_fd, name, 0))
		log_warn("store %s: removing segments/%s: %m", s->dir, name);
	else
		log_info("store %s: removed segments/%s, of an epoch that was never committed",
			 s->dir, name);
}

static void check_sizes(struct store *s)
{
	for (uint32_t i = 0; i < s->nr_segs; i++) {
		struct seg *seg = s->segs[i];
		struct stat st;
		char name[16];

		if (!seg)
			continue;
		seg_path(i, name);
		if (!fstatat(s->segments_fd, name, &st, 0) &&
		    (uint64_t)st.st_size >= seg->segment_bytes)
			continue;
		seg->damaged = true;
		if (seg->state != SEG_FREE)
			log_err("store %s: segment %s is missing or cut off; snapshots that need "
				"it are damaged",
				s->dir, name);
	}
}

static DIR *open_segments(const struct store *s)
{
	int fd = openat(s->segments_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;

	if (!dir && fd >= 0)
		close(fd);
	return dir;
}

static int compare_ids(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

int space_list(struct store *s, uint32_t **ret, size_t *nr, struct err *e)
{
	DIR *dir = open_segments(s);
	uint32_t *ids = NULL, id;
	struct dirent *d;
	size_t cap = 0;

	*nr = 0;
	if (!dir)
		return err_errno(e, errno, "%s/segments", s->dir);
	while ((d = readdir(dir))) {
		if (!parse_name(d->d_name, &id))
			continue;
		if (array_grow(ids, *nr, cap)) {
			closedir(dir);
			free(ids);
			return err_errno(e, ENOMEM, "store %s", s->dir);
		}
		ids[(*nr)++] = id;
	}
	closedir(dir);
	if (*nr)
		qsort(ids, *nr, sizeof(*ids), compare_ids);
	*ret = ids;
	return 0;
}

int space_is_empty(struct store *s, struct err *e)
{
	DIR *dir = open_segments(s);
	struct dirent *d;
	uint32_t id;
	int r = 0;

	if (!dir)
		return err_errno(e, errno, "%s/segments", s->dir);
	while (!r && (d = readdir(dir)))
		if (parse_name(d->d_name, &id))
			r = err_set(
				e, E_CORRUPT,
				"store %s has segments, but no index: snapctl store rebuild-index "
				"makes it again; or move %s/segments away to begin anew",
				s->dir, s->dir);
	closedir(dir);
	return r;
}

/* Records behind the tail are of an epoch that was never committed (J2 of journal.c). */
static int clear_records(struct store *s, const struct seg_ident *ident, int fd, uint32_t from,
			 struct err *e)
{
	static _Alignas(FMT_BLOCK) const uint8_t nothing[FMT_BLOCK];
	_cleanup_(seg_walk_deinit) struct seg_walk w = {0};
	uint32_t nr = 0;

	if (seg_walk_init(&w, fd, ident, (uint32_t)(ident->segment_bytes / FMT_BLOCK)))
		return err_errno(e, ENOMEM, "store %s", s->dir);
	w.block = from;
	for (;;) {
		const struct batch_page *pages;
		const struct batch_header *h;
		uint32_t at;
		int r = seg_walk_next(&w, &at, &h, &pages, NULL);

		if (!r)
			break;
		if (r < 0 || (h->type != BATCH_EPOCH && h->type != BATCH_INDEX))
			continue;
		nr++;
		if (pwrite(fd, nothing, sizeof(nothing), (off_t)at * FMT_BLOCK) != sizeof(nothing))
			return err_errno(e, errno, "segment %08x block %u", ident->segment, at);
	}
	return nr && fdatasync(fd) ? err_errno(e, errno, "syncing segment %08x", ident->segment)
				   : 0;
}

/* Behind the tail of an open segment.  What was never written has nothing in it. */
static int clear_behind(struct store *s, uint32_t id, uint32_t tail, struct err *e)
{
	struct seg_ident ident;
	struct seg *seg;
	off_t data;
	int fd, r;

	r = seg_open(s, id, &seg, &fd, &ident, e);
	if (r)
		return r;
	data = lseek(fd, (off_t)tail * FMT_BLOCK, SEEK_DATA);
	if (data < 0)
		data = errno == ENXIO ? -1 : 0; /* -1: nothing there; 0: who knows */
	if (data >= 0)
		r = clear_records(s, &ident, fd, MAX(tail, (uint32_t)(data / FMT_BLOCK)), e);
	seg_close(s, seg);
	return r;
}

/* So that no batch of an epoch that never was, or is no more, looks like one that is.  Not
 * to be able to is no reason to refuse the store. */
static void clear_leftovers(struct store *s)
{
	for (uint32_t i = 0; i < s->nr_segs; i++) {
		const struct seg *seg = s->segs[i];
		struct err e = {0};

		if (!seg || seg->damaged)
			continue;
		if (seg->state == SEG_FREE)
			seg_retire(s, i);
		else if (seg->state == SEG_OPEN && clear_behind(s, i, seg->tail, &e))
			log_warn("store %s: what a crash left in it: %s", s->dir, e.text);
	}
}

int space_recover(struct store *s, struct err *e)
{
	DIR *dir = open_segments(s);
	struct dirent *d;

	if (!dir)
		return err_errno(e, errno, "%s/segments", s->dir);
	while (!s->read_only && (d = readdir(dir)))
		recover_file(s, d->d_name);
	closedir(dir);
	check_sizes(s);
	if (!s->read_only)
		clear_leftovers(s);
	return 0;
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

/* ---- writers and readers: rings and buffers are worth keeping ---- */

int store_writer_get(struct store *s, struct writer **ret, struct err *e)
{
	struct writer_config config = {.depth = 8,
				       .nr_bufs = 8 + RECENT_MAX + 2,
				       .fault = s->fault,
				       .fault_opaque = s->fault_opaque};

	pthread_mutex_lock(&s->segments_lock);
	*ret = s->nr_idle_writers ? s->idle_writers[--s->nr_idle_writers] : NULL;
	pthread_mutex_unlock(&s->segments_lock);
	return *ret ? 0 : writer_create(&config, ret, e);
}

void store_writer_put(struct store *s, struct writer *w)
{
	writer_reset(w);
	pthread_mutex_lock(&s->segments_lock);
	if (s->nr_idle_writers < s->max_idle)
		s->idle_writers[s->nr_idle_writers++] = steal_ptr(&w);
	pthread_mutex_unlock(&s->segments_lock);
	if (w)
		writer_destroy(w);
}
