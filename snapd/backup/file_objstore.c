/* SPDX-License-Identifier: MIT */
/*
 * file_objstore: objects as files below a directory, for objstore.h.  In and out: the
 * bytes of objects; a key is the file's path below the directory.
 *
 * A put writes DIR/.put/NAME, syncs it, and renames it to its place: RENAME_NOREPLACE
 * decides who was first.  Then each directory down to the object is synced, whoever made
 * it, also when another was first: the answer promises that the object stays.
 *
 * A file in DIR/.put is locked (flock) by who writes it, so what can be locked was left by
 * one that was killed: open sweeps it.  Whoever makes a file there must lock it before
 * anyone can take it for one of those; it looks whether it did.
 *
 * Deleting leaves directories, so that none vanishes under a put.
 * Threads: any; there is no state but the directory.
 */
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>

#include "snapd/backup/objstore_impl.h"
#include "snapd/util/cleanup.h"

#define PUT_DIR	  ".put"
#define CHUNK_MAX (1u << 20) /* between looks at the limit and at `cancelled` */

struct file_objstore {
	int dir_fd, put_fd;
};

static struct file_objstore *impl(const struct objstore *s)
{
	return s->impl;
}

static void cleanup_dir(DIR **d)
{
	if (*d)
		closedir(*d);
}

/* ---- open ---- */

static void sweep_one(int put_fd, const char *name)
{
	_cleanup_fd_ int fd = openat(put_fd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);

	if (fd >= 0 && !flock(fd, LOCK_EX | LOCK_NB))
		unlinkat(put_fd, name, 0);
}

static void sweep(int put_fd)
{
	_cleanup_(cleanup_dir) DIR *d = NULL;
	int fd = openat(put_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	struct dirent *de;

	d = fd < 0 ? NULL : fdopendir(fd);
	if (!d && fd >= 0)
		close(fd);
	while (d && (de = readdir(d)))
		if (de->d_name[0] != '.')
			sweep_one(put_fd, de->d_name);
}

static int open_dir(int at_fd, const char *name, bool create)
{
	int fd;

	if (create && mkdirat(at_fd, name, 0700) && errno != EEXIST)
		return -errno;
	fd = openat(at_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

static void file_close(struct objstore *s)
{
	struct file_objstore *f = impl(s);

	if (f->put_fd >= 0)
		close(f->put_fd);
	if (f->dir_fd >= 0)
		close(f->dir_fd);
	free(f);
}

static const struct objstore_ops file_ops;

int file_objstore_open(struct objstore *s, const char *path, struct err *e)
{
	struct file_objstore *f = malloc(sizeof(*f));

	if (!f)
		return err_errno(e, ENOMEM, "%s", s->url);
	*f = (struct file_objstore){.dir_fd = -1, .put_fd = -1};
	s->impl = f;
	s->ops = &file_ops;
	f->dir_fd = open_dir(AT_FDCWD, path, s->opts.create);
	if (f->dir_fd < 0)
		return err_errno(e, -f->dir_fd, "%s", s->url);
	f->put_fd = open_dir(f->dir_fd, PUT_DIR, true);
	/* What may only be read can still be read from. */
	if (f->put_fd < 0 && f->put_fd != -EROFS && f->put_fd != -EACCES)
		return err_errno(e, -f->put_fd, "%s/" PUT_DIR, s->url);
	if (f->put_fd >= 0)
		sweep(f->put_fd);
	return 0;
}

/* ---- put ---- */

static int io_err(const struct objstore *s, const char *key, int r, struct err *e)
{
	if (r == -ECANCELED)
		return objstore_cancelled_err(s, e);
	return err_errno(e, -r, "%s/%s", s->url, key);
}

/* A new file in the put directory, locked; its name goes to `name`. */
static int make_file(int put_fd, char name[static 33])
{
	uint8_t bytes[16];

	for (;;) {
		_cleanup_fd_ int fd = -1;
		struct stat st;

		randombytes_buf(bytes, sizeof(bytes));
		sodium_bin2hex(name, 33, bytes, sizeof(bytes));
		fd = openat(put_fd, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
		if (fd < 0)
			return -errno;
		/* Where there are no locks, nothing can be locked and nothing is swept. */
		if (flock(fd, LOCK_EX) && errno == EINTR)
			continue;
		if (fstat(fd, &st))
			return -errno;
		if (st.st_nlink) /* else swept before it was locked */
			return steal_fd(&fd);
	}
}

static int write_chunk(struct objstore *s, int fd, const char *p, size_t len)
{
	objstore_limit(s, &s->up, len);
	if (objstore_cancelled(s))
		return -ECANCELED;
	while (len) {
		ssize_t n = write(fd, p, len);

		if (n < 0 && errno != EINTR)
			return -errno;
		if (n > 0) {
			p += n;
			len -= (size_t)n;
			atomic_fetch_add(&s->bytes_sent, (uint64_t)n);
		}
	}
	return 0;
}

static int write_all(struct objstore *s, int fd, const struct iovec *iov, int nr_iov)
{
	for (int i = 0; i < nr_iov; i++) {
		for (size_t at = 0, len; at < iov[i].iov_len; at += len) {
			int r;

			len = MIN(iov[i].iov_len - at, (size_t)CHUNK_MAX);
			r = write_chunk(s, fd, (const char *)iov[i].iov_base + at, len);
			if (r)
				return r;
		}
	}
	return fsync(fd) ? -errno : 0;
}

static int rename_new(int put_fd, const char *name, int dir_fd, const char *key)
{
	if (!renameat2(put_fd, name, dir_fd, key, RENAME_NOREPLACE))
		return 0;
	/* File systems without it, such as NFS, have links. */
	if (errno != EINVAL && errno != ENOSYS && errno != EOPNOTSUPP)
		return -errno;
	return linkat(put_fd, name, dir_fd, key, 0) || unlinkat(put_fd, name, 0) ? -errno : 0;
}

/* fn for each directory on the way to `key`, the outermost first. */
static int each_dir(int dir_fd, const char *key, int (*fn)(int dir_fd, const char *path))
{
	char path[OBJSTORE_KEY_MAX + 1];
	int r = fn(dir_fd, ".");

	for (const char *p = strchr(key, '/'); p && !r; p = strchr(p + 1, '/')) {
		memcpy(path, key, (size_t)(p - key));
		path[p - key] = '\0';
		r = fn(dir_fd, path);
	}
	return r;
}

static int make_dir(int dir_fd, const char *path)
{
	return mkdirat(dir_fd, path, 0700) && errno != EEXIST ? -errno : 0;
}

static int sync_dir(int dir_fd, const char *path)
{
	_cleanup_fd_ int fd = openat(dir_fd, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	return fd < 0 || fsync(fd) ? -errno : 0;
}

static int sync_parent(int dir_fd, const char *key)
{
	char path[OBJSTORE_KEY_MAX + 1];
	const char *slash = strrchr(key, '/');

	snprintf(path, sizeof(path), "%.*s", slash ? (int)(slash - key) : 1, slash ? key : ".");
	return sync_dir(dir_fd, path);
}

static int put_in_place(struct file_objstore *f, const char *name, const char *key,
			unsigned int flags)
{
	int r = each_dir(f->dir_fd, key, make_dir), synced;

	if (r)
		return r;
	if (flags & OBJSTORE_ONLY_IF_ABSENT)
		r = rename_new(f->put_fd, name, f->dir_fd, key);
	else
		r = renameat(f->put_fd, name, f->dir_fd, key) ? -errno : 0;
	if (r && r != -EEXIST)
		return r;
	synced = each_dir(f->dir_fd, key, sync_dir);
	return synced ?: r;
}

/* 0: made; -EEXIST: another one is there. */
static int make_object(struct objstore *s, const char *key, const struct iovec *iov, int nr_iov,
		       unsigned int flags)
{
	struct file_objstore *f = impl(s);
	_cleanup_fd_ int fd = -1;
	char name[33];
	int r;

	fd = make_file(f->put_fd, name);
	if (fd < 0)
		return fd;
	r = write_all(s, fd, iov, nr_iov);
	if (!r)
		r = put_in_place(f, name, key, flags);
	if (r)
		unlinkat(f->put_fd, name, 0);
	return r;
}

static int file_put(struct objstore *s, const char *key, const struct iovec *iov, int nr_iov,
		    unsigned int flags, struct err *e)
{
	struct file_objstore *f = impl(s);
	int r;

	atomic_fetch_add(&s->requests, 1);
	if (f->put_fd < 0)
		return err_set(e, EROFS, "%s is only open for reading", s->url);
	if ((flags & OBJSTORE_ONLY_IF_ABSENT) && !faccessat(f->dir_fd, key, F_OK, 0))
		r = each_dir(f->dir_fd, key, sync_dir) ?: -EEXIST; /* without writing it first */
	else
		r = make_object(s, key, iov, nr_iov, flags);
	if (r == -EEXIST)
		return err_set(e, EEXIST, "%s/%s is already there", s->url, key);
	return r ? io_err(s, key, r, e) : 0;
}

/* ---- get, head, delete ---- */

/* A file; a directory in its place is no object. */
static int open_object(struct objstore *s, const char *key, struct stat *st, struct err *e)
{
	_cleanup_fd_ int fd =
		openat(impl(s)->dir_fd, key, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);

	atomic_fetch_add(&s->requests, 1);
	if (fd >= 0 && fstat(fd, st))
		return io_err(s, key, -errno, e);
	if (fd < 0 && errno != ENOENT && errno != ENOTDIR)
		return io_err(s, key, -errno, e);
	if (fd < 0 || !S_ISREG(st->st_mode))
		return err_set(e, ENOENT, "%s/%s is not there", s->url, key);
	return steal_fd(&fd);
}

static int file_get(struct objstore *s, const char *key, uint64_t offset, void *buf, size_t len,
		    size_t *ret_len, struct err *e)
{
	struct stat st;
	_cleanup_fd_ int fd = open_object(s, key, &st, e);
	size_t got = 0;

	if (fd < 0)
		return fd;
	while (got < len) {
		size_t want = MIN(len - got, (size_t)CHUNK_MAX);
		ssize_t n;

		objstore_limit(s, &s->down, want);
		if (objstore_cancelled(s))
			return objstore_cancelled_err(s, e);
		n = pread(fd, (char *)buf + got, want, (off_t)(offset + got));
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return io_err(s, key, -errno, e);
		if (!n)
			break;
		got += (size_t)n;
		atomic_fetch_add(&s->bytes_received, (uint64_t)n);
	}
	*ret_len = got;
	return 0;
}

static void fill_info(const struct stat *st, struct objstore_info *ret)
{
	*ret = (struct objstore_info){.size = (uint64_t)st->st_size, .mtime_s = st->st_mtime};
}

static int file_head(struct objstore *s, const char *key, struct objstore_info *ret, struct err *e)
{
	struct stat st;
	_cleanup_fd_ int fd = open_object(s, key, &st, e);

	if (fd < 0)
		return fd;
	fill_info(&st, ret);
	return 0;
}

static int file_delete(struct objstore *s, const char *key, struct err *e)
{
	struct stat st;
	_cleanup_fd_ int fd = open_object(s, key, &st, NULL);
	int r = fd < 0 ? fd : unlinkat(impl(s)->dir_fd, key, 0) ? -errno : 0;

	/* Who deletes next what this one needed relies on the order. */
	if (!r)
		r = sync_parent(impl(s)->dir_fd, key);
	return !r || r == -ENOENT ? 0 : io_err(s, key, r, e);
}

/* ---- list ---- */

struct listing {
	struct objstore *s;
	const char *prefix, *start_after;
	objstore_list_fn fn;
	void *arg;
	struct err *e;
};

struct names {
	char **name; /* of a directory, with '/' at its end: so they sort as keys do */
	size_t nr, room;
};

static void names_free(struct names *n)
{
	for (size_t i = 0; i < n->nr; i++)
		free(n->name[i]);
	free(n->name);
}

static int by_bytes(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

/* May keys that begin with `key` be wanted?  Those are if it is, or leads to, the prefix. */
static bool leads_on(const struct listing *l, const char *key, size_t len)
{
	size_t prefix = strlen(l->prefix);

	return !strncmp(key, l->prefix, MIN(len, prefix)) && strncmp(key, l->start_after, len) >= 0;
}

static int names_add(struct names *n, const char *name, bool is_dir)
{
	if (n->nr == n->room) {
		size_t room = n->room ? 2 * n->room : 64;
		char **p = reallocarray(n->name, room, sizeof(*p));

		if (!p)
			return -ENOMEM;
		n->name = p;
		n->room = room;
	}
	if (asprintf(&n->name[n->nr], "%s%s", name, is_dir ? "/" : "") < 0)
		return -ENOMEM;
	n->nr++;
	return 0;
}

static bool is_dir(DIR *d, const struct dirent *de)
{
	struct stat st;

	if (de->d_type != DT_UNKNOWN)
		return de->d_type == DT_DIR;
	return !fstatat(dirfd(d), de->d_name, &st, AT_SYMLINK_NOFOLLOW) && S_ISDIR(st.st_mode);
}

/* What is in the directory `path`, "" for the outermost. */
static int read_names(int dir_fd, const char *path, struct names *ret)
{
	_cleanup_(cleanup_dir) DIR *d = NULL;
	int fd =
		openat(dir_fd, *path ? path : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
	struct dirent *de;
	int r = 0;

	if (fd < 0)
		return errno == ENOENT ? 0 : -errno;
	d = fdopendir(fd);
	if (!d) {
		r = -errno;
		close(fd);
		return r;
	}
	while (!r && (errno = 0, de = readdir(d)))
		if (de->d_name[0] != '.')
			r = names_add(ret, de->d_name, is_dir(d, de));
	return r ?: -errno;
}

static int list_object(const struct listing *l, const char *key)
{
	struct objstore_info info;
	struct stat st;

	if (strncmp(key, l->prefix, strlen(l->prefix)) != 0 || strcmp(key, l->start_after) <= 0)
		return 0;
	if (fstatat(impl(l->s)->dir_fd, key, &st, AT_SYMLINK_NOFOLLOW))
		return errno == ENOENT ? 0 : io_err(l->s, key, -errno, l->e);
	if (!S_ISREG(st.st_mode) || !objstore_key_ok(key))
		return 0;
	fill_info(&st, &info);
	return l->fn(l->arg, key, &info);
}

/* Depth is bounded by the length of keys. */
static int list_dir(const struct listing *l, const char *path)
{
	_cleanup_(names_free) struct names names = {0};
	int r = read_names(impl(l->s)->dir_fd, path, &names);

	if (r)
		return io_err(l->s, path, r, l->e);
	if (names.nr)
		qsort(names.name, names.nr, sizeof(*names.name), by_bytes);
	for (size_t i = 0; i < names.nr && !r; i++) {
		char key[OBJSTORE_KEY_MAX + 2];
		int len = snprintf(key, sizeof(key), "%s%s", path, names.name[i]);

		if (len >= (int)sizeof(key))
			continue;
		if (objstore_cancelled(l->s))
			return objstore_cancelled_err(l->s, l->e);
		if (key[len - 1] != '/')
			r = list_object(l, key);
		else if (leads_on(l, key, (size_t)len))
			r = list_dir(l, key);
	}
	return r;
}

static int file_list(struct objstore *s, const char *prefix, const char *start_after,
		     objstore_list_fn fn, void *arg, struct err *e)
{
	struct listing l = {
		.s = s, .prefix = prefix, .start_after = start_after, .fn = fn, .arg = arg, .e = e};

	atomic_fetch_add(&s->requests, 1);
	return list_dir(&l, "");
}

static const struct objstore_ops file_ops = {
	.put = file_put,
	.get = file_get,
	.head = file_head,
	.delete = file_delete,
	.list = file_list,
	.close = file_close,
};
