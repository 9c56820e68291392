/* SPDX-License-Identifier: MIT */
/*
 * blocks: which RAM file is behind a host address.  Enter: addresses that QEMU gives to KVM,
 * unmaps, or gives back to the host; leave: snapd_vm_ram() and its end, discards.
 *
 * QEMU maps each of its RAM blocks once, as a whole, and holds its file open: so the
 * kernel's list of mappings and the process's open files tell all there is to know, at the
 * few times when a slot comes, and QEMU's own mapping calls need not be followed.
 */
#include "adapters/qemu/adapter.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <linux/magic.h>

#include "snapd/util/cleanup.h"

#define BLOCKS_MAX 256u

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct ram_block blocks[BLOCKS_MAX];
static size_t nr_blocks;

/* ---- what is mapped ---- */

struct mapping {
	uint64_t start, end, offset, ino;
	unsigned int major, minor;
	char perms[5];
};

static bool next_mapping(FILE *f, char **line, size_t *cap, struct mapping *m)
{
	while (getline(line, cap, f) > 0)
		if (sscanf(*line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %x:%x %" SCNu64,
			   &m->start, &m->end, m->perms, &m->offset, &m->major, &m->minor,
			   &m->ino) == 7)
			return true;
	return false;
}

static bool continues(const struct mapping *a, const struct mapping *b)
{
	return a->end == b->start && a->ino == b->ino && a->major == b->major &&
	       a->minor == b->minor && a->offset + (a->end - a->start) == b->offset &&
	       b->perms[3] == 's';
}

/* The shared mapping of a file around `at`, whatever pieces the kernel has it in. */
static int find_mapping(uint64_t at, struct mapping *ret)
{
	_cleanup_free_ char *line = NULL;
	FILE *f = fopen("/proc/self/maps", "re");
	struct mapping m, all = {0};
	size_t cap = 0;

	if (!f)
		return -errno;
	while (next_mapping(f, &line, &cap, &m)) {
		if (all.end && continues(&all, &m)) {
			all.end = m.end;
			continue;
		}
		if (all.start <= at && at < all.end)
			break;
		all = m;
	}
	fclose(f);
	if (at < all.start || at >= all.end || all.perms[3] != 's' || !all.ino)
		return -ENOENT;
	*ret = all;
	return 0;
}

static bool is_file(int fd, const struct mapping *m)
{
	struct stat st;

	return !fstat(fd, &st) && st.st_ino == m->ino && st.st_dev == makedev(m->major, m->minor);
}

/* A duplicate of QEMU's descriptor of that file. */
static int find_file(const struct mapping *m)
{
	DIR *d = opendir("/proc/self/fd");
	struct dirent *ent;
	int ret = -EBADF;

	if (!d)
		return -errno;
	while (ret == -EBADF && (ent = readdir(d))) {
		int fd = atoi(ent->d_name);

		if (ent->d_name[0] != '.' && is_file(fd, m)) {
			ret = fcntl(fd, F_DUPFD_CLOEXEC, 3);
			ret = ret < 0 ? -errno : ret;
		}
	}
	closedir(d);
	return ret;
}

/* ---- blocks ---- */

static bool has(const struct ram_block *b, const char *hva, uint64_t len)
{
	return hva >= b->hva && len <= b->size_bytes &&
	       (uint64_t)(hva - b->hva) <= b->size_bytes - len;
}

static bool known(const char *hva, uint64_t len, struct ram_block *ret)
{
	bool found = false;

	pthread_mutex_lock(&lock);
	for (size_t i = 0; i < nr_blocks && !found; i++) {
		found = has(&blocks[i], hva, len);
		if (found)
			*ret = blocks[i];
	}
	pthread_mutex_unlock(&lock);
	return found;
}

bool blocks_any(void)
{
	bool any;

	pthread_mutex_lock(&lock);
	any = nr_blocks > 0;
	pthread_mutex_unlock(&lock);
	return any;
}

bool blocks_has_file(int fd)
{
	struct stat a, b;
	bool found = false;

	if (fstat(fd, &a) < 0)
		return false;
	pthread_mutex_lock(&lock);
	for (size_t i = 0; i < nr_blocks && !found; i++)
		found = !fstat(blocks[i].fd, &b) && a.st_ino == b.st_ino && a.st_dev == b.st_dev;
	pthread_mutex_unlock(&lock);
	return found;
}

static bool remember(const struct ram_block *b)
{
	bool fits;

	pthread_mutex_lock(&lock);
	fits = nr_blocks < BLOCKS_MAX;
	if (fits)
		blocks[nr_blocks++] = *b;
	pthread_mutex_unlock(&lock);
	return fits;
}

/* NULL, or why this file cannot be the VM's RAM. */
static const char *unfit(int fd)
{
	struct statfs fs;

	if (fstatfs(fd, &fs) < 0)
		return "its file cannot be looked at";
	if (fs.f_type == HUGETLBFS_MAGIC)
		return "it is on hugetlbfs, which nobody has tried";
	if (fs.f_type != TMPFS_MAGIC)
		return "its file is not on tmpfs (memory-backend-memfd, or a file in /dev/shm)";
	return NULL;
}

/* Pages are named by where the block's first one would be: QEMU shows RAM in ascending order,
 * so that this is the same in every boot. */
static int tell(struct snapd_vm *vm, const struct ram_block *b, const char *hva, uint64_t gpa)
{
	uint64_t skip = (uint64_t)(hva - b->hva);
	const struct snapd_ram ram = {
		.hva = b->hva,
		.size_bytes = b->size_bytes,
		.fd_offset = b->fd_offset,
		.gpa = gpa >= skip ? gpa - skip : UINT64_MAX,
		.fd = b->fd,
	};

	return snapd_vm_ram(vm, &ram);
}

int blocks_find(struct snapd_vm *vm, char *hva, uint64_t len, uint64_t gpa, struct ram_block *ret,
		char *why, size_t why_bytes)
{
	const char *reason;
	struct mapping m = {0};
	int r;

	if (known(hva, len, ret))
		return 0;
	r = find_mapping((uintptr_t)hva, &m);
	if (r < 0)
		return r;
	r = find_file(&m);
	/* NOLINTNEXTLINE(performance-no-int-to-ptr): from the kernel's text */
	*ret = (struct ram_block){(char *)(uintptr_t)m.start, m.end - m.start, m.offset, r};
	reason = r < 0 ? "QEMU has closed its file" : unfit(r);
	if (!reason) {
		r = tell(vm, ret, hva, gpa);
		reason = r < 0 ? snapd_vm_error(vm) : remember(ret) ? NULL : "too many blocks";
	}
	if (!reason)
		return 0;
	snprintf(why, why_bytes, "%s", reason);
	cleanup_fd(&ret->fd);
	return -EOPNOTSUPP;
}

void blocks_unmapped(struct snapd_vm *vm, const char *addr, size_t len)
{
	struct ram_block b = {.fd = -1};

	pthread_mutex_lock(&lock);
	for (size_t i = 0; i < nr_blocks && b.fd < 0; i++)
		if (blocks[i].hva >= addr && blocks[i].hva < addr + len) {
			b = blocks[i];
			blocks[i] = blocks[--nr_blocks];
		}
	pthread_mutex_unlock(&lock);
	if (b.fd < 0)
		return;
	snapd_vm_ram_gone(vm, b.hva);
	cleanup_fd(&b.fd);
}

void blocks_removed(struct snapd_vm *vm, const char *addr, size_t len)
{
	struct ram_block b;

	if (known(addr, len, &b))
		snapd_vm_discarded(vm, b.fd, b.fd_offset + (uint64_t)(addr - b.hva), len);
}
