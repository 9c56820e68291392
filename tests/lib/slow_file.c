/* SPDX-License-Identifier: MIT */
/* A FUSE file system of one file; slow_file.h tells. */
#include "tests/lib/slow_file.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/lib/check.h"

#define FILE_BYTES (1u << 20)
#ifndef FOPEN_NOFLUSH
#define FOPEN_NOFLUSH (1 << 5)
#endif

struct server {
	int fuse_fd;
	struct slow_reads *reads;
};

static void answer(struct server *f, uint64_t unique, int error, const void *data, size_t len)
{
	struct fuse_out_header h = {
		.len = (uint32_t)(sizeof(h) + len), .error = error, .unique = unique};
	struct iovec iov[] = {{&h, sizeof(h)}, {(void *)data, len}};

	(void)!writev(f->fuse_fd, iov, len ? 2 : 1);
}

static void answer_init(struct server *f, const struct fuse_in_header *in,
			const struct fuse_init_in *want)
{
	struct fuse_init_out out = {.major = FUSE_KERNEL_VERSION,
				    .minor = FUSE_KERNEL_MINOR_VERSION,
				    .max_readahead = want->max_readahead,
				    .max_write = 65536};

	answer(f, in->unique, 0, &out, sizeof(out));
}

static void answer_attr(struct server *f, const struct fuse_in_header *in)
{
	struct fuse_attr_out out = {.attr_valid = 60};

	out.attr.ino = 1;
	out.attr.mode = S_IFREG | 0600;
	out.attr.nlink = 1;
	out.attr.size = FILE_BYTES;
	out.attr.blksize = 4096;
	answer(f, in->unique, 0, &out, sizeof(out));
}

static void answer_open(struct server *f, const struct fuse_in_header *in)
{
	struct fuse_open_out out = {.open_flags = FOPEN_DIRECT_IO | FOPEN_NOFLUSH};

	answer(f, in->unique, 0, &out, sizeof(out));
}

static void answer_read(struct server *f, const struct fuse_in_header *in,
			const struct fuse_read_in *want)
{
	static uint8_t data[65536];
	size_t len = want->size < sizeof(data) ? want->size : sizeof(data);

	atomic_fetch_add(&f->reads->nr_waiting, 1);
	while (atomic_load(&f->reads->is_held))
		usleep(100);
	atomic_fetch_sub(&f->reads->nr_waiting, 1);
	memset(data, atomic_load(&f->reads->fill), len);
	answer(f, in->unique, 0, data, len);
}

static void serve(struct server *f)
{
	static _Alignas(8) uint8_t buf[1 << 17];
	const struct fuse_in_header *in = (const void *)buf;

	for (;;) {
		ssize_t n = read(f->fuse_fd, buf, sizeof(buf));

		if (n < 0 && (errno == EINTR || errno == ENOENT || errno == EAGAIN))
			continue;
		if (n < (ssize_t)sizeof(*in))
			return; /* unmounted */
		switch (in->opcode) {
		case FUSE_INIT:
			answer_init(f, in, (const void *)(in + 1));
			break;
		case FUSE_GETATTR:
			answer_attr(f, in);
			break;
		case FUSE_OPEN:
			answer_open(f, in);
			break;
		case FUSE_READ:
			answer_read(f, in, (const void *)(in + 1));
			break;
		case FUSE_FLUSH:
		case FUSE_RELEASE:
			answer(f, in->unique, 0, NULL, 0);
			break;
		case FUSE_FORGET:
		case FUSE_INTERRUPT:
			break;
		default:
			answer(f, in->unique, -ENOSYS, NULL, 0);
			break;
		}
	}
}

static int mount_file(struct slow_file *f, int fuse_fd)
{
	char options[64];
	int fd;

	if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		return -errno;
	strcpy(f->path, "/tmp/snapd-slow-XXXXXX");
	fd = mkstemp(f->path);
	check(fd >= 0, "%s: %s", f->path, strerror(errno));
	close(fd);
	snprintf(options, sizeof(options), "fd=%d,rootmode=100600,user_id=%u,group_id=%u", fuse_fd,
		 getuid(), getgid());
	if (!mount("snapd-test", f->path, "fuse", MS_NOSUID | MS_NODEV, options))
		return 0;
	unlink(f->path);
	return -errno;
}

int slow_file_open(struct slow_file *f)
{
	int fuse_fd = open("/dev/fuse", O_RDWR | O_CLOEXEC), r;

	memset(f, 0, sizeof(*f));
	if (fuse_fd < 0)
		return -errno;
	r = mount_file(f, fuse_fd);
	if (r < 0) {
		close(fuse_fd);
		return r;
	}
	f->reads = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	check(f->reads != MAP_FAILED, "mmap");
	f->server = fork();
	check(f->server >= 0, "fork");
	if (!f->server) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		serve(&(struct server){fuse_fd, f->reads});
		_exit(0);
	}
	close(fuse_fd); /* the server's death ends the mount */
	f->fd = open(f->path, O_RDONLY | O_DIRECT | O_CLOEXEC);
	check(f->fd >= 0, "open: %s", strerror(errno));
	/* The descriptor is enough, and nothing is left behind by a test that fails. */
	umount2(f->path, MNT_DETACH);
	unlink(f->path);
	return 0;
}

void slow_file_close(struct slow_file *f)
{
	close(f->fd);
	kill(f->server, SIGKILL);
	waitpid(f->server, NULL, 0);
	munmap(f->reads, 4096);
}
