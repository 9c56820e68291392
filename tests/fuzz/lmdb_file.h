/* SPDX-License-Identifier: MIT */
/*
 * Changes of an LMDB file that real code made, so that a few bytes of input reach any structure
 * in it.  Input: u16 length of the file in pages (0: as it is), then changes of 4 bytes: u24
 * offset, byte.
 */
#pragma once

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "tests/fuzz/fuzz.h"

#define FILE_MAX (1u << 20)

struct lmdb_file {
	const char *dir; /* data.mdb is in it */
	char path[64];
	uint8_t *base, *file; /* owned; FILE_MAX each */
	size_t base_len;
};

/* For atexit(). */
static inline void lmdb_file_remove(const struct lmdb_file *f)
{
	int fd = open(f->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	unlinkat(fd, "data.mdb", 0);
	unlinkat(fd, "lock.mdb", 0);
	close(fd);
	rmdir(f->dir);
}

/* The file that is there now is what will be changed. */
static inline void lmdb_file_take(struct lmdb_file *f, const char *dir)
{
	int fd;

	f->dir = dir;
	snprintf(f->path, sizeof(f->path), "%s/data.mdb", dir);
	f->base = malloc(FILE_MAX);
	f->file = malloc(FILE_MAX);
	PROMISE(f->base && f->file);
	fd = open(f->path, O_RDONLY | O_CLOEXEC);
	f->base_len = (size_t)read(fd, f->base, FILE_MAX);
	close(fd);
	PROMISE(f->base_len > 8 * 4096 && f->base_len < FILE_MAX);
}

static inline size_t lmdb_file_change(struct lmdb_file *f, const uint8_t *data, size_t len)
{
	size_t pages = len >= 2 ? (size_t)(data[0] | data[1] << 8) : 0;

	memcpy(f->file, f->base, f->base_len);
	for (size_t i = 2; i + 4 <= len; i += 4)
		f->file[(size_t)(data[i] | data[i + 1] << 8 | data[i + 2] << 16) % f->base_len] =
			data[i + 3];
	return pages && pages * 4096 < f->base_len ? pages * 4096 : f->base_len;
}

static inline void lmdb_file_write(struct lmdb_file *f, const uint8_t *data, size_t len)
{
	size_t bytes = lmdb_file_change(f, data, len);
	int fd = open(f->path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	PROMISE(fd >= 0 && write(fd, f->file, bytes) == (ssize_t)bytes && !close(fd));
}
