/* SPDX-License-Identifier: MIT */
/*
 * failcalls: preloaded into a process, makes the n-th of its allocations and system calls (those
 * made through libc) fail: whatever that call is, in whatever thread.
 *
 * The test and this share a page, the file $SNAPD_FAIL_FILE: the test writes `left`, n or 0;
 * each call counts it down, and the one that finds 1 fails, is counted in `hits` and named.
 *
 * Left out: allocations of GLib, which ends the process when there is no memory (time zones of
 * policies are its); system calls that liburing and libc make themselves (the store's are failed
 * one by one in tests/crash/fail_nth.c).
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <sys/timerfd.h>
#include <unistd.h>

extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *p, size_t n);
extern void *__libc_memalign(size_t align, size_t n);

static struct shared {
	_Atomic int64_t left;
	_Atomic uint64_t hits;
	char what[48];
	_Atomic int64_t meta; /* n: the n-th of LMDB's meta pages fails instead */
} * shared;

static struct {
	uintptr_t from, to;
} glib;

static int find_glib(struct dl_phdr_info *info, size_t size, void *arg)
{
	if (!strstr(info->dlpi_name, "libglib-2.0"))
		return 0;
	for (int i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *ph = &info->dlpi_phdr[i];

		if (ph->p_type == PT_LOAD && ph->p_flags & PF_X) {
			glib.from = info->dlpi_addr + ph->p_vaddr;
			glib.to = glib.from + ph->p_memsz;
		}
	}
	return 1;
}

__attribute__((constructor)) static void start(void)
{
	const char *path = getenv("SNAPD_FAIL_FILE");
	int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
	void *p = fd >= 0 ? mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
			  : MAP_FAILED;

	if (fd >= 0)
		close(fd);
	dl_iterate_phdr(find_glib, NULL);
	if (p != MAP_FAILED)
		shared = p;
}

static bool strikes(const char *what)
{
	if (!shared || atomic_load(&shared->left) <= 0 || atomic_fetch_sub(&shared->left, 1) != 1)
		return false;
	strncpy(shared->what, what, sizeof(shared->what) - 1);
	atomic_fetch_add(&shared->hits, 1);
	return true;
}

/* ---- allocations ---- */

static bool no_memory(const char *what, const void *caller)
{
	if ((uintptr_t)caller >= glib.from && (uintptr_t)caller < glib.to)
		return false;
	if (!strikes(what))
		return false;
	errno = ENOMEM;
	return true;
}

#define NO_MEMORY(what) no_memory(what, __builtin_return_address(0))

void *malloc(size_t n)
{
	return NO_MEMORY("malloc") ? NULL : __libc_malloc(n);
}

void *calloc(size_t n, size_t size)
{
	return NO_MEMORY("calloc") ? NULL : __libc_calloc(n, size);
}

void *realloc(void *p, size_t n)
{
	return NO_MEMORY("realloc") ? NULL : __libc_realloc(p, n);
}

void *aligned_alloc(size_t align, size_t n)
{
	return NO_MEMORY("aligned_alloc") ? NULL : __libc_memalign(align, n);
}

int posix_memalign(void **ret, size_t align, size_t n)
{
	void *p = NO_MEMORY("posix_memalign") ? NULL : __libc_memalign(align, n);

	if (!p)
		return ENOMEM;
	*ret = p;
	return 0;
}

/* ---- calls ---- */

#define CALL(type, name, failure, error, params, args)                  \
	type name params                                                \
	{                                                               \
		static type(*real) params;                              \
                                                                        \
		if (!real)                                              \
			real = (type(*) params)dlsym(RTLD_NEXT, #name); \
		if (strikes(#name)) {                                   \
			errno = error;                                  \
			return failure;                                 \
		}                                                       \
		return real args;                                       \
	}

CALL(ssize_t, read, -1, EIO, (int fd, void *b, size_t n), (fd, b, n))
CALL(ssize_t, write, -1, EIO, (int fd, const void *b, size_t n), (fd, b, n))
CALL(ssize_t, pread, -1, EIO, (int fd, void *b, size_t n, off_t o), (fd, b, n, o))
CALL(ssize_t, pwrite, -1, EIO, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o))
CALL(int, fsync, -1, EIO, (int fd), (fd))
CALL(int, fdatasync, -1, EIO, (int fd), (fd))
CALL(int, ftruncate, -1, EIO, (int fd, off_t n), (fd, n))
CALL(int, memfd_create, -1, EMFILE, (const char *name, unsigned int f), (name, f))
CALL(int, eventfd, -1, EMFILE, (unsigned int n, int f), (n, f))
CALL(int, timerfd_create, -1, EMFILE, (clockid_t c, int f), (c, f))
CALL(int, socket, -1, EMFILE, (int d, int t, int p), (d, t, p))
CALL(int, poll, -1, ENOMEM, (struct pollfd * p, nfds_t n, int ms), (p, n, ms))
CALL(ssize_t, sendmsg, -1, ECONNRESET, (int fd, const struct msghdr *m, int f), (fd, m, f))
CALL(ssize_t, recvmsg, -1, ECONNRESET, (int fd, struct msghdr *m, int f), (fd, m, f))
CALL(ssize_t, send, -1, ECONNRESET, (int fd, const void *b, size_t n, int f), (fd, b, n, f))
CALL(ssize_t, recv, -1, ECONNRESET, (int fd, void *b, size_t n, int f), (fd, b, n, f))
CALL(int, accept4, -1, EMFILE, (int fd, struct sockaddr *a, socklen_t *n, int f), (fd, a, n, f))
CALL(int, statvfs, -1, EIO, (const char *path, struct statvfs *s), (path, s))
CALL(int, rename, -1, EIO, (const char *from, const char *to), (from, to))
CALL(int, unlink, -1, EIO, (const char *path), (path))
CALL(int, unlinkat, -1, EIO, (int d, const char *path, int f), (d, path, f))
CALL(void *, mmap, MAP_FAILED, ENOMEM, (void *at, size_t n, int p, int f, int fd, off_t o),
     (at, n, p, f, fd, o))

int pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*fn)(void *), void *arg)
{
	static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

	if (!real)
		real = (int (*)(pthread_t *, const pthread_attr_t *, void *(*)(void *),
				void *))dlsym(RTLD_NEXT, "pthread_create");
	return strikes("pthread_create") ? EAGAIN : real(t, a, fn, arg);
}

int open(const char *path, int flags, ...)
{
	static int (*real)(const char *, int, ...);
	va_list ap;
	mode_t mode;

	va_start(ap, flags);
	mode = va_arg(ap, mode_t);
	va_end(ap);
	if (!real)
		real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open");
	if (strikes("open")) {
		errno = EMFILE;
		return -1;
	}
	return real(path, flags, mode);
}

int openat(int dir, const char *path, int flags, ...)
{
	static int (*real)(int, const char *, int, ...);
	va_list ap;
	mode_t mode;

	va_start(ap, flags);
	mode = va_arg(ap, mode_t);
	va_end(ap);
	if (!real)
		real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat");
	if (strikes("openat")) {
		errno = EMFILE;
		return -1;
	}
	return real(dir, path, flags, mode);
}

/* Taking a descriptor out again needs nothing that could be missing. */
int epoll_ctl(int e, int op, int fd, struct epoll_event *ev)
{
	static int (*real)(int, int, int, struct epoll_event *);

	if (!real)
		real = (int (*)(int, int, int, struct epoll_event *))dlsym(RTLD_NEXT, "epoll_ctl");
	if (op == EPOLL_CTL_ADD && strikes("epoll_ctl")) {
		errno = ENOMEM;
		return -1;
	}
	return real(e, op, fd, ev);
}

/* liblmdb's pwrite(), which has not the name of ours (pwrite64).  What it writes in less than
 * a sector is the meta page, which makes a commit valid. */
ssize_t meta_pwrite(int fd, const void *b, size_t n, off_t o) __asm__("pwrite");
ssize_t meta_pwrite(int fd, const void *b, size_t n, off_t o)
{
	static ssize_t (*real)(int fd, const void *b, size_t n, off_t o);

	if (!real)
		real = (ssize_t(*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite");
	if (shared && n < 512 && atomic_load(&shared->meta) > 0 &&
	    atomic_fetch_sub(&shared->meta, 1) == 1) {
		errno = EIO;
		return -1;
	}
	return real(fd, b, n, o);
}
