/* SPDX-License-Identifier: MIT */
/*
 * simcalls: the calls themselves: fail, or be done by a plain system call and noted.
 * See simdisk.h.
 */
#include "tests/lib/simdisk_priv.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "tests/lib/rand.h"

static long set_errno(int error)
{
	errno = error;
	return -1;
}

#define RETURN_IF_FAILS(what, writes, len)                    \
	do {                                                  \
		int error_ = sim_may_fail(what, writes, len); \
		if (error_)                                   \
			return (typeof(0))set_errno(error_);  \
	} while (0)

static int open_at(int at, const char *path, int flags, mode_t mode)
{
	RETURN_IF_FAILS("open", flags & O_CREAT, NULL);
	return sim_open(at, path, flags, mode);
}

static mode_t mode_arg(int flags, va_list ap)
{
	return flags & (O_CREAT | O_TMPFILE) ? va_arg(ap, mode_t) : 0;
}

int open(const char *path, int flags, ...)
{
	mode_t mode;
	va_list ap;

	va_start(ap, flags);
	mode = mode_arg(flags, ap);
	va_end(ap);
	return open_at(AT_FDCWD, path, flags, mode);
}

int openat(int at, const char *path, int flags, ...)
{
	mode_t mode;
	va_list ap;

	va_start(ap, flags);
	mode = mode_arg(flags, ap);
	va_end(ap);
	return open_at(at, path, flags, mode);
}

int close(int fd)
{
	sim_note_close(fd);
	return (int)syscall(SYS_close, fd);
}

ssize_t pread(int fd, void *buf, size_t len, off_t at)
{
	RETURN_IF_FAILS("pread", false, NULL);
	return syscall(SYS_pread64, fd, buf, len, at);
}

ssize_t pwrite(int fd, const void *buf, size_t len, off_t at)
{
	bool commit = fcntl(fd, F_GETFL) & O_DSYNC;
	int error = sim_may_fail(commit ? "commit" : "pwrite", true, &len);
	ssize_t n;

	if (error && !sim_done_all_the_same())
		return set_errno(error);
	n = syscall(SYS_pwrite64, fd, buf, len, at);
	if (error)
		return set_errno(error);
	if (n > 0)
		sim_note_write(fd, (uint64_t)at, buf, (size_t)n);
	return n;
}

ssize_t write(int fd, const void *buf, size_t len)
{
	CHECK(!sim_is_recorded(fd));
	return syscall(SYS_write, fd, buf, len);
}

static void note_writev(int fd, const struct iovec *iov, off_t at, size_t len)
{
	for (size_t n; len; len -= n, at += (off_t)n, iov++) {
		n = len < iov->iov_len ? len : iov->iov_len;
		sim_note_write(fd, (uint64_t)at, iov->iov_base, n);
	}
}

ssize_t writev(int fd, const struct iovec *iov, int nr)
{
	off_t at = lseek(fd, 0, SEEK_CUR);
	size_t len = 0, all;
	ssize_t n;

	for (int i = 0; i < nr; i++)
		len += iov[i].iov_len;
	all = len;
	if (at >= 0) /* logs go on */
		RETURN_IF_FAILS("writev", true, &len);
	if (len == all)
		n = syscall(SYS_writev, fd, iov, nr);
	else
		n = syscall(SYS_write, fd, iov[0].iov_base, iov[0].iov_len / 2);
	if (n > 0)
		note_writev(fd, iov, at, (size_t)n);
	return n;
}

static int sync_call(int fd, long nr, const char *what)
{
	uint64_t began = sim_clock();
	int r = sim_may_fail(what, true, NULL);

	if (r) {
		sim_note_lost(fd);
		return (int)set_errno(r);
	}
	r = (int)syscall(nr, fd);
	if (!r)
		sim_note_sync(fd, began, false);
	return r;
}

int fsync(int fd)
{
	return sync_call(fd, SYS_fsync, "fsync");
}

int fdatasync(int fd)
{
	return sync_call(fd, SYS_fdatasync, "fdatasync");
}

int ftruncate(int fd, off_t size)
{
	int r;

	RETURN_IF_FAILS("ftruncate", true, NULL);
	r = (int)syscall(SYS_ftruncate, fd, size);
	if (!r)
		sim_note_size(fd, (uint64_t)size);
	return r;
}

/* Space that was never written reads as zeros, allocated or not. */
int fallocate(int fd, int mode, off_t offset, off_t len)
{
	RETURN_IF_FAILS("fallocate", true, NULL);
	CHECK(!mode && !offset);
	if (syscall(SYS_ftruncate, fd, len))
		return -1;
	sim_note_size(fd, (uint64_t)len);
	return 0;
}

int mkdirat(int at, const char *path, mode_t mode)
{
	int r;

	RETURN_IF_FAILS("mkdir", true, NULL);
	r = (int)syscall(SYS_mkdirat, at, path, mode);
	if (!r)
		sim_note_mkdir(at, path);
	return r;
}

int unlinkat(int at, const char *path, int flags)
{
	int r;

	RETURN_IF_FAILS("unlink", true, NULL);
	r = (int)syscall(SYS_unlinkat, at, path, flags);
	if (!r)
		sim_note_unlink(at, path);
	return r;
}

int renameat(int from_at, const char *from, int to_at, const char *to)
{
	int r;

	RETURN_IF_FAILS("rename", true, NULL);
	r = (int)syscall(SYS_renameat2, from_at, from, to_at, to, 0);
	if (!r)
		sim_note_rename(from_at, from, to_at, to);
	return r;
}

/* ---- what only looks ---- */

/* sym: its name, which with 64-bit offsets is not that of the function. */
#define LOOK(type, fn, sym, params, args)                             \
	type fn params                                                \
	{                                                             \
		static type(*real) params;                            \
                                                                      \
		if (!real)                                            \
			real = (type(*) params)dlsym(RTLD_NEXT, sym); \
		RETURN_IF_FAILS(#fn, false, NULL);                    \
		return real args;                                     \
	}

LOOK(int, fstat, "fstat64", (int fd, struct stat *st), (fd, st))
LOOK(int, fstatat, "fstatat64", (int at, const char *path, struct stat *st, int flags),
     (at, path, st, flags))
LOOK(int, statvfs, "statvfs64", (const char *path, struct statvfs *fs), (path, fs))
LOOK(int, flock, "flock", (int fd, int how), (fd, how))

/* A null pointer says that it failed. */
DIR *fdopendir(int fd)
{
	static DIR *(*real)(int);
	int error = sim_may_fail("fdopendir", false, NULL);

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "fdopendir");
	if (!error)
		return real(fd);
	errno = error;
	return NULL;
}

struct dirent *readdir(DIR *dir)
{
	static struct dirent *(*real)(DIR *);
	int error = sim_may_fail("readdir", false, NULL);

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "readdir64");
	if (!error)
		return real(dir);
	errno = error;
	return NULL;
}

/* Only where it asks the file system. */
off_t lseek(int fd, off_t at, int whence)
{
	if (whence == SEEK_DATA || whence == SEEK_HOLE)
		RETURN_IF_FAILS("lseek", false, NULL);
	return syscall(SYS_lseek, fd, at, whence);
}

/* Not in the model: whoever begins to use them has to extend it. */
int msync(void *addr, size_t len, int flags)
{
	CHECK(!sim_recording());
	return (int)syscall(SYS_msync, addr, len, flags);
}

int rename(const char *from, const char *to)
{
	CHECK(!sim_recording());
	return (int)syscall(SYS_rename, from, to);
}

void *mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	if (sim_no_memory("mmap")) {
		errno = ENOMEM;
		return MAP_FAILED;
	}
	CHECK(!(prot & PROT_WRITE) || !(flags & MAP_SHARED) || sim_may_map(fd));
	return (void *)syscall(SYS_mmap, addr, len, prot, flags, fd, offset);
}

/* Libraries that were built without large files know the calls by their other names. */
#define ALSO(name) \
	__asm__(".globl " #name "\n.set " #name ", " #name "64\n.type " #name ", @function")
ALSO(open);
ALSO(openat);
ALSO(pread);
ALSO(pwrite);
ALSO(ftruncate);
ALSO(fallocate);
ALSO(mmap);
