/* SPDX-License-Identifier: MIT */
/*
 * Any bytes as a batch of an encrypted store.  As they are, authentication refuses all;
 * so they are also sealed with the store's key first, as a hostile writer that has it
 * would, to reach what lies behind.  First byte: what to do.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "snapd/store/segment.h"
#include "snapd/util/cleanup.h"
#include "tests/fuzz/fuzz.h"

#define BATCH_MAX (8u * FMT_BLOCK)

static struct seal *seal;

/* A key in a directory that is gone afterwards. */
static void make_seal(void)
{
	char dir[] = "/tmp/fuzz-sealed-XXXXXX", path[64];
	struct err e = {0};
	int fd;

	PROMISE(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/user", dir);
	fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	PROMISE(fd >= 0 && write(fd, dir, sizeof(dir)) == sizeof(dir) &&
		write(fd, dir, sizeof(dir)) == sizeof(dir) && !close(fd));
	fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	PROMISE(fd >= 0 && !seal_open(fd, dir, path, true, &seal, &e));
	PROMISE(!unlinkat(fd, "key", 0) && !unlinkat(fd, "user", 0) && !close(fd) && !rmdir(dir));
}

static void check_pages(struct batch_header *h, const struct batch_page *p, size_t len)
{
	uint32_t page_size = 1u << h->page_shift;
	uint8_t *page = malloc(page_size);

	for (uint32_t i = 0; i < h->nr_entries; i++) {
		uint64_t at = (uint64_t)h->header_bytes + p[i].offset;

		PROMISE(page_stored_bytes(&p[i]) <= page_size);
		PROMISE(p[i].offset + (uint64_t)page_stored_bytes(&p[i]) <= h->payload_bytes);
		PROMISE(batch_page_tag(h, i) + SEAL_TAG_BYTES <= (uint8_t *)h + h->header_bytes);
		if (at + page_stored_bytes(&p[i]) <= len)
			unseal_page(seal, h, i, page, (uint8_t *)h + at, page_stored_bytes(&p[i]));
	}
	free(page);
}

static void decode(struct batch_header *h, size_t len, const struct seg_ident *where,
		   uint32_t block)
{
	const struct batch_header *got;
	const struct batch_page *p;
	struct err e = {0};
	int r = batch_decode(h, len, where, block, &got, &p, &e);

	PROMISE(r == 0 || r == -EUCLEAN || r == -EPROTO ||
		(r == -ENODATA && len < batch_header_max(seal)));
	PROMISE(r == -ENODATA || (r == 0) == !e.text[0]);
	if (r)
		return;
	if (p)
		check_pages(h, p, len);
	else if (h->header_bytes + h->payload_bytes <= len)
		batch_blob_check(seal, h, (uint8_t *)h + h->header_bytes, NULL);
}

/* The numbers that the sealing itself relies on, as far as they have to be right. */
static void seal_all(struct batch_header *h, size_t len)
{
	h->magic = BATCH_MAGIC;
	h->version = BATCH_SEALED;
	seal_begin(h);
	if (h->type == BATCH_PAGES) {
		h->nr_entries %= BATCH_PAGES_MAX + 1;
		h->header_bytes = batch_header_bytes_of(BATCH_SEALED, h->nr_entries);
		if (h->header_bytes > len)
			h->nr_entries = 0;
		seal_records(seal, h);
	} else {
		h->header_bytes = FMT_BLOCK;
		h->payload_bytes %= len - FMT_BLOCK + 1;
		seal_blob(seal, h, (uint8_t *)h + FMT_BLOCK);
	}
	if (h->header_bytes > len)
		h->header_bytes = FMT_BLOCK;
	batch_seal(h);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct seg_ident where = {.segment_bytes = SEG_BYTES_DEFAULT};
	size_t bytes = len ? MIN(ALIGN_UP(len, FMT_BLOCK) + FMT_BLOCK, (size_t)BATCH_MAX) : 0;
	struct batch_header *h;

	if (!seal)
		make_seal();
	if (!len)
		return 0;
	where.seal = seal;
	h = aligned_alloc(64, bytes);
	memset(h, 0, bytes);
	memcpy(h, data + 1, MIN(len - 1, bytes));
	if (data[0] & 1)
		seal_all(h, bytes);
	if (data[0] & 2 && bytes > 300) /* and something is changed afterwards */
		((uint8_t *)h)[data[0]] ^= 1;
	memcpy(where.store, h->store, sizeof(where.store));
	where.segment = h->segment;
	where.generation = h->generation;
	decode(h, bytes, &where, h->block);
	free(h);
	return 0;
}
