/* SPDX-License-Identifier: MIT */
/*
 * The store as a directory: opening, recovery, the index made and put in place.
 *
 * Opening: lock → structure check of the index → LMDB → identity → segments as the
 * index has them → files that it does not name are removed → dedup table from the
 * batch headers.  There is no journal to replay: what the last LMDB commit names
 * is durable, and everything else is free space.
 *
 * A store is made in an order that a crash can't spoil: directories; then the
 * index, with its identity, under another name (LMDB writes a file's first pages
 * without an order); once it is durable it gets its own.  So an index without an
 * identity is always damage.
 *
 * Threads: any, see store.h.
 */
#include "snapd/store/internal.h"

#include <fcntl.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>

#include "snapd/util/log.h"

#define DEDUP_BYTES_MAX ((uint64_t)256 << 20)
#define DEDUP_RAM_SHARE 32u /* of the machine's memory, at most */

uint64_t store_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

void store_unlock(pthread_mutex_t **lock)
{
	pthread_mutex_unlock(*lock);
}

const uint8_t *store_uuid(const struct store *s)
{
	return s->uuid;
}

const struct page_secret *store_secret(const struct store *s)
{
	return &s->secret;
}

/* ---- directories and the lock ---- */

static int open_dir(int at, const char *name, bool create, const char *whole, struct err *e)
{
	int fd;

	if (create && mkdirat(at, name, 0700) && errno != EEXIST)
		return err_errno(e, errno, "making %s of store %s", name, whole);
	fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0 && errno == ENOENT)
		return err_set(e, ENOENT, "there is no store at %s", whole);
	return fd < 0 ? err_errno(e, errno, "%s of store %s", name, whole) : fd;
}

/* The entry of the store in its parent directory must last, too. */
static int sync_parent(const char *dir, struct err *e)
{
	_cleanup_free_ char *parent = NULL;
	_cleanup_fd_ int fd = -1;

	if (asprintf(&parent, "%s/..", dir) < 0)
		return err_errno(e, ENOMEM, "store %s", dir);
	fd = open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0 || fsync(fd))
		return err_errno(e, errno, "syncing %s", parent);
	return 0;
}

static int open_dirs(struct store *s, bool create, struct err *e)
{
	s->dir_fd = open_dir(AT_FDCWD, s->dir, create, s->dir, e);
	if (s->dir_fd < 0)
		return s->dir_fd;
	s->segments_fd = open_dir(s->dir_fd, "segments", create, s->dir, e);
	if (s->segments_fd < 0)
		return s->segments_fd;
	if (create && fsync(s->dir_fd))
		return err_errno(e, errno, "syncing %s", s->dir);
	return create ? sync_parent(s->dir, e) : 0;
}

static int lock_store(struct store *s, struct err *e)
{
	char pid[32] = "";
	ssize_t n;

	s->lock_fd = openat(s->dir_fd, "lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (s->lock_fd < 0)
		return err_errno(e, errno, "%s/lock", s->dir);
	if (flock(s->lock_fd, LOCK_EX | LOCK_NB)) {
		if (errno != EWOULDBLOCK)
			return err_errno(e, errno, "%s/lock", s->dir);
		n = pread(s->lock_fd, pid, sizeof(pid) - 1, 0);
		pid[MAX(n, (ssize_t)0)] = '\0';
		return err_set(e, EBUSY, "another snapd (pid %d) is using the store %s", atoi(pid),
			       s->dir);
	}
	n = snprintf(pid, sizeof(pid), "%d\n", (int)getpid());
	if (ftruncate(s->lock_fd, 0) || pwrite(s->lock_fd, pid, (size_t)n, 0) != n)
		return err_errno(e, errno, "%s/lock", s->dir);
	return 0;
}

/* ---- identity ---- */

static const struct ix_key key_store = {.b = "store", .len = 5};
static const struct ix_key key_counters = {.b = "counters", .len = 8};

int store_random(void *buf, size_t len)
{
	uint8_t *p = buf;

	while (len) {
		ssize_t n = getrandom(p, len, 0);

		if (n < 0 && errno != EINTR)
			return -errno;
		p += MAX(n, (ssize_t)0);
		len -= (size_t)MAX(n, (ssize_t)0);
	}
	return 0;
}

static int create_identity(struct ix_txn *t, void *arg, struct err *e)
{
	struct store *s = arg;
	struct rec_counters counters = {.next_timeline = 1, .next_snapshot = 1, .next_seq = 1};
	int r;

	r = index_put(t, IX_META, &key_store, &s->record, sizeof(s->record), NULL, 0, e);
	if (!r)
		r = index_put(t, IX_META, &key_counters, &counters, sizeof(counters), NULL, 0, e);
	if (!r)
		r = features_put(t, s, e);
	return r ? r : journal_put_empty(t, e);
}

static int make_identity(struct store *s, void *arg, struct err *e)
{
	const char *compression = ((const struct store_config *)arg)->compression;
	struct rec_store *rec = &s->record;
	int r;

	r = features_choose(s, compression ? compression : "lz4", e);
	if (r)
		return r;
	s->features |= 1u << FEATURE_JOURNAL;
	*rec = (struct rec_store){
		.major = FMT_MAJOR, .minor = FMT_MINOR, .created_ns = store_now_ns()};
	if (s->seal) { /* the secret comes from the key, and is nowhere on disk */
		memcpy(rec->uuid, seal_uuid(s->seal), sizeof(rec->uuid));
		return index_update(s->index, create_identity, s, e);
	}
	r = store_random(rec->uuid, sizeof(rec->uuid));
	if (!r)
		r = store_random(rec->secret, sizeof(rec->secret));
	if (r)
		return err_errno(e, -r, "getting random bytes");
	rec->uuid[6] = (rec->uuid[6] & 0x0f) | 0x40;
	rec->uuid[8] = (rec->uuid[8] & 0x3f) | 0x80;
	return index_update(s->index, create_identity, s, e);
}

static int open_identity(struct store *s, const struct store_config *c, struct err *e)
{
	struct rec_counters counters;
	struct ix_txn t;
	int r;

	r = index_begin(s->index, &t, e);
	if (r)
		return r;
	r = index_get(&t, IX_META, &key_store, &s->record, sizeof(s->record), NULL, NULL, e);
	if (!r)
		r = index_get(&t, IX_META, &key_counters, &counters, sizeof(counters), NULL, NULL,
			      e);
	index_end(&t);
	if (r)
		return r == -ENOENT ? err_set(e, E_CORRUPT,
					      "store %s: the index has lost its identity", s->dir)
				    : r;
	if (s->record.major != FMT_MAJOR)
		return err_set(e, EPROTO, "store %s has format %u.%u; this snapd knows %u.x",
			       s->dir, s->record.major, s->record.minor, FMT_MAJOR);
	s->next_seq = counters.next_seq;
	s->next_snapshot = counters.next_snapshot;
	memcpy(s->uuid, s->record.uuid, sizeof(s->uuid));
	memcpy(s->secret.b, s->record.secret, sizeof(s->secret.b));
	if (s->seal) {
		if (memcmp(s->uuid, seal_uuid(s->seal), sizeof(s->uuid)) != 0)
			return err_set(e, E_CORRUPT, "%s/key is of another store", s->dir);
		seal_page_secret(s->seal, &s->secret);
	}
	r = features_load(s, e);
	return r || !c->compression || s->read_only ? r : features_switch(s, c->compression, e);
}

/* ---- opening ---- */

static int load_segment(struct store *s, uint32_t id, const struct rec_segment *rec, struct err *e)
{
	struct seg *seg;

	if (id > SEG_ID_MAX || rec->segment_bytes < SEG_BYTES_MIN ||
	    rec->segment_bytes > SEG_BYTES_MAX || rec->segment_bytes % FMT_BLOCK ||
	    rec->tail > rec->segment_bytes / FMT_BLOCK || rec->state < SEG_OPEN ||
	    rec->state > SEG_FREE)
		return err_set(e, E_CORRUPT, "store %s: record of segment %08x is impossible",
			       s->dir, id);
	if (seg_add(s, id, &seg))
		return err_errno(e, ENOMEM, "store %s", s->dir);
	seg->generation = rec->generation;
	seg->segment_bytes = seg->disk_bytes = rec->segment_bytes;
	seg->tail = rec->tail;
	seg->state = rec->state;
	seg->pages = rec->pages;
	seg->indexed = true;
	s->bytes_segments += rec->segment_bytes;
	return 0;
}

static int load_segments(struct store *s, struct err *e)
{
	struct rec_segment rec;
	struct ix_iter it;
	struct ix_txn t;
	struct ix_key k;
	int r;

	r = index_begin(s->index, &t, e);
	if (r)
		return r;
	r = index_iter_init(&it, &t, IX_SEGMENTS, NULL, e);
	while (!r && (r = index_iter_next(&it, &k, &rec, sizeof(rec), e)) > 0)
		r = load_segment(s, ix_be32(k.b), &rec, e);
	index_iter_deinit(&it);
	index_end(&t);
	return r;
}

static int open_index(struct store *s, const char *name, bool create, struct err *e)
{
	_cleanup_free_ char *dir = NULL;
	struct index_config config = {.create = create, .read_only = s->read_only};

	if (asprintf(&dir, "%s/%s", s->dir, name) < 0)
		return err_errno(e, ENOMEM, "store %s", s->dir);
	config.dir = dir;
	config.key = s->seal ? seal_index_key(s->seal) : NULL;
	return index_open(&config, &s->index, e);
}

static int remove_at(const struct store *s, const char *name, int flags, struct err *e)
{
	if (unlinkat(s->dir_fd, name, flags) && errno != ENOENT)
		return err_errno(e, errno, "removing %s/%s", s->dir, name);
	return 0;
}

int store_make_index(struct store *s, int (*fn)(struct store *s, void *arg, struct err *e),
		     void *arg, struct err *e)
{
	_cleanup_fd_ int fd = -1;
	int r;

	r = remove_at(s, INDEX_UNFINISHED "/data.mdb", 0, e);
	if (!r)
		r = remove_at(s, INDEX_UNFINISHED "/lock.mdb", 0, e);
	if (r)
		return r;
	fd = open_dir(s->dir_fd, INDEX_UNFINISHED, true, s->dir, e);
	if (fd < 0)
		return fd;
	r = open_index(s, INDEX_UNFINISHED, true, e);
	if (!r)
		r = fn(s, arg, e);
	index_close(steal_ptr(&s->index));
	if (!r && fsync(fd))
		r = err_errno(e, errno, "syncing %s/" INDEX_UNFINISHED, s->dir);
	return r;
}

static int remove_index(struct store *s, const char *name, struct err *e)
{
	_cleanup_free_ char *data = NULL, *lock = NULL;
	int r;

	if (asprintf(&data, "%s/data.mdb", name) < 0 || asprintf(&lock, "%s/lock.mdb", name) < 0)
		return err_errno(e, ENOMEM, "store %s", s->dir);
	r = remove_at(s, data, 0, e);
	if (!r)
		r = remove_at(s, lock, 0, e);
	return r ? r : remove_at(s, name, AT_REMOVEDIR, e);
}

/* At each instant there is an index, or a second run makes it again. */
int store_swap_index(struct store *s, struct err *e)
{
	bool has_index = !faccessat(s->dir_fd, "index", F_OK, 0);
	int r = 0;

	if (has_index && !faccessat(s->dir_fd, INDEX_OLD, F_OK, 0))
		r = remove_index(s, "index", e); /* of a run before: what was first stays */
	else if (has_index && renameat(s->dir_fd, "index", s->dir_fd, INDEX_OLD))
		r = err_errno(e, errno, "%s/index", s->dir);
	if (!r && (renameat(s->dir_fd, INDEX_UNFINISHED, s->dir_fd, "index") || fsync(s->dir_fd)))
		r = err_errno(e, errno, "%s/index", s->dir);
	return r;
}

/* Make the index when there is none. */
static int ensure_index(struct store *s, const struct store_config *c, struct err *e)
{
	int r;

	if (!faccessat(s->dir_fd, "index/data.mdb", F_OK, 0))
		return 0;
	if (errno != ENOENT)
		return err_errno(e, errno, "%s/index", s->dir);
	/* An index that was lost is not a new store: its segments would go. */
	r = space_is_empty(s, e);
	if (!r)
		r = store_make_index(s, make_identity, (void *)c, e);
	if (!r)
		r = remove_at(s, "index/lock.mdb", 0, e);
	if (!r)
		r = remove_at(s, "index", AT_REMOVEDIR, e);
	if (r)
		return r;
	if (renameat(s->dir_fd, INDEX_UNFINISHED, s->dir_fd, "index") || fsync(s->dir_fd))
		return err_errno(e, errno, "%s/index", s->dir);
	return 0;
}

/* The key, made beside a new store. */
static int open_seal(struct store *s, const struct store_config *c, bool create, struct err *e)
{
	int r = 0;

	if (create && c->key_file) {
		create = faccessat(s->dir_fd, "index/data.mdb", F_OK, 0) != 0;
		r = create ? space_is_empty(s, e) : 0;
	}
	return r ? r : seal_open(s->dir_fd, s->dir, c->key_file, create, &s->seal, e);
}

static uint64_t dedup_bytes_default(void)
{
	uint64_t ram = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);

	return MIN(ram / DEDUP_RAM_SHARE, DEDUP_BYTES_MAX);
}

static int store_init(struct store *s, const struct store_config *c, struct err *e)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	s->dir_fd = s->segments_fd = s->lock_fd = -1;
	s->read_only = c->read_only;
	s->no_prove = c->no_prove;
	s->segment_bytes = c->segment_bytes ? c->segment_bytes : SEG_BYTES_DEFAULT;
	s->max_bytes = c->max_bytes;
	s->fault = c->fault;
	s->fault_opaque = c->fault_opaque;
	s->pool = c->pool;
	s->direct = true;
	s->max_idle = (uint32_t)MIN(cpus < 1 ? 2 : cpus + 1, (long)ARRAY_SIZE(s->idle_writers));
	pthread_mutex_init(&s->segments_lock, NULL);
	pthread_cond_init(&s->made, NULL);
	pthread_mutex_init(&s->roots_lock, NULL);
	dedup_init(&s->dedup, c->dedup_bytes ? c->dedup_bytes : dedup_bytes_default());
	s->dedup_domain = c->dedup;
	s->dedup_pages_per_read = c->dedup_pages_per_read ? c->dedup_pages_per_read
							  : DEDUP_PAGES_PER_READ;
	codec_list_init(&s->codecs);
	s->dir = strdup(c->dir);
	if (!s->dir)
		return err_errno(e, ENOMEM, "store");
	if (s->segment_bytes < SEG_BYTES_MIN || s->segment_bytes > SEG_BYTES_MAX ||
	    s->segment_bytes % FMT_BLOCK)
		return err_set(e, EINVAL, "segments can't have %u bytes: %u to %u, in blocks of %u",
			       s->segment_bytes, SEG_BYTES_MIN, SEG_BYTES_MAX, FMT_BLOCK);
	return 0;
}

static int store_open_in(struct store *s, const struct store_config *c, struct err *e)
{
	bool create = c->create && !c->read_only;
	int r;

	r = store_init(s, c, e);
	if (!r)
		r = open_dirs(s, create, e);
	if (!r && !s->read_only)
		r = lock_store(s, e);
	if (!r)
		r = open_seal(s, c, create, e);
	if (!r && create)
		r = ensure_index(s, c, e);
	if (!r)
		r = open_index(s, "index", false, e);
	if (!r)
		index_on_doubt(s->index, c->in_doubt, c->in_doubt_opaque);
	if (!r)
		r = open_identity(s, c, e);
	if (!r)
		r = load_segments(s, e);
	if (!r)
		r = space_recover(s, e);
	if (!r)
		r = journal_open(s, e);
	if (!r && !s->read_only && s->dedup_domain != STORE_DEDUP_OFF)
		r = store_dedup_rebuild(s, e);
	if (!r && !s->read_only)
		r = remove_index(s, INDEX_OLD, e);
	return r;
}

int store_open(const struct store_config *config, struct store **ret, struct err *e)
{
	struct store *s = aligned_alloc(64, ALIGN_UP(sizeof(*s), 64));
	int r;

	if (!s)
		return err_errno(e, ENOMEM, "store");
	memset(s, 0, sizeof(*s));
	r = store_open_in(s, config, e);
	if (r) {
		store_close(s);
		return r;
	}
	*ret = s;
	return 0;
}

static void close_fd(int fd)
{
	if (fd >= 0)
		close(fd);
}

void store_close(struct store *s)
{
	if (!s)
		return;
	assert(!s->epochs);
	while (s->nr_idle_writers)
		writer_destroy(s->idle_writers[--s->nr_idle_writers]);
	while (s->nr_idle_scratch)
		scratch_destroy(s->idle_scratch[--s->nr_idle_scratch]);
	while (s->nr_idle_readers)
		store_reader_destroy(s->idle_readers[--s->nr_idle_readers]);
	space_close(s);
	index_close(s->index);
	seal_close(s->seal);
	sodium_memzero(&s->secret, sizeof(s->secret));
	dedup_deinit(&s->dedup);
	codec_list_deinit(&s->codecs);
	close_fd(s->segments_fd);
	close_fd(s->dir_fd);
	close_fd(s->lock_fd); /* last: the lock goes with it */
	pthread_cond_destroy(&s->made);
	pthread_mutex_destroy(&s->segments_lock);
	pthread_mutex_destroy(&s->roots_lock);
	free(s->gc_refs.bits);
	free(s->journal_refs.bits);
	free(s->gc_new);
	free(s->dir);
	free(s);
}

int store_open_bare(const char *dir, const char *key_file, struct store **ret, struct err *e)
{
	struct store_config config = {.dir = dir};
	struct store *s = aligned_alloc(64, ALIGN_UP(sizeof(*s), 64));
	int r;

	if (!s)
		return err_errno(e, ENOMEM, "store");
	memset(s, 0, sizeof(*s));
	r = store_init(s, &config, e);
	if (!r)
		r = open_dirs(s, false, e);
	if (!r)
		r = lock_store(s, e);
	if (!r)
		r = seal_open(s->dir_fd, dir, key_file, false, &s->seal, e);
	if (r)
		store_close(s);
	else
		*ret = s;
	return r;
}

int store_rekey(const char *dir, const char *key_file, const char *new_key_file, struct err *e)
{
	struct store *s;
	int r = store_open_bare(dir, key_file, &s, e);

	if (r)
		return r;
	r = s->seal ? seal_rekey(s->seal, s->dir_fd, dir, new_key_file, e)
		    : err_set(e, EINVAL, "store %s is not encrypted", dir);
	store_close(s);
	return r;
}
