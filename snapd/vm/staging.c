/* SPDX-License-Identifier: MIT */
/* Address space reserved once, filled in ahead of the pause; see staging.h. */
#include "snapd/vm/staging.h"

#include <errno.h>
#include <sys/mman.h>

#include "snapd/util/cleanup.h"

#define STAGING_ALIGN ((size_t)2 << 20) /* a huge page, where the kernel has any to give */

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

int staging_init(struct staging *s, size_t max_bytes)
{
	size_t len = ALIGN_UP(MAX(max_bytes, STAGING_ALIGN), STAGING_ALIGN);
	void *mem = mmap(NULL, len, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (mem == MAP_FAILED)
		return -errno;
	madvise(mem, len, MADV_HUGEPAGE);
	*s = (struct staging){.mem = mem, .max_bytes = len};
	return 0;
}

void staging_deinit(struct staging *s)
{
	if (s->mem)
		munmap(s->mem, s->max_bytes);
	*s = (struct staging){};
}

void staging_prepare(struct staging *s, size_t bytes)
{
	size_t want = MIN(ALIGN_UP(bytes, STAGING_ALIGN), s->max_bytes);

	if (want <= s->ready_bytes)
		return;
	if (!madvise(s->mem + s->ready_bytes, want - s->ready_bytes, MADV_POPULATE_WRITE)) {
		s->ready_bytes = want;
	} else if (errno == EINVAL) { /* Linux before 5.14 */
		for (size_t i = s->ready_bytes; i < want; i += 4096)
			*(volatile uint8_t *)(s->mem + i) = 0;
		s->ready_bytes = want;
	}
}

void staging_trim(struct staging *s, size_t keep_bytes)
{
	size_t keep = ALIGN_UP(keep_bytes, STAGING_ALIGN);

	if (!s->mem || keep >= s->ready_bytes)
		return;
	madvise(s->mem + keep, s->ready_bytes - keep, MADV_DONTNEED);
	s->ready_bytes = keep;
}
