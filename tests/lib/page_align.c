/* SPDX-License-Identifier: MIT */
/*
 * page_align: the other half of page_size.c: on a host with pages of FA_PAGE bytes a
 * mapping begins at a multiple of that: here one that is shared or whole pages long.
 * Preloaded, or compiled into a program.
 */
#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tests/lib/fake_agent.h"

static void *map(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	/* NOLINTNEXTLINE(performance-no-int-to-ptr): the system call returns a number */
	return (void *)syscall(SYS_mmap, addr, len, prot, flags, fd, offset);
}

void *mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	const size_t spare = FA_PAGE;
	uint8_t *room, *at;

	if (addr || (!(flags & MAP_SHARED) && len % FA_PAGE))
		return map(addr, len, prot, flags, fd, offset);
	room = map(NULL, len + spare, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
		   0);
	if (room == MAP_FAILED)
		return room;
	at = room + (-(uintptr_t)room & (FA_PAGE - 1));
	if (map(at, len, prot, flags | MAP_FIXED, fd, offset) == MAP_FAILED) {
		int err = errno;

		munmap(room, len + spare);
		errno = err;
		return MAP_FAILED;
	}
	len = (len + 4095) & ~(size_t)4095;
	if (at > room)
		munmap(room, (size_t)(at - room));
	if (at + len < room + len + spare)
		munmap(at + len, (size_t)(room + spare - at));
	return at;
}
