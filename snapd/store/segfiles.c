/* SPDX-License-Identifier: MIT */
/*
 * Segment files at start: which are there, which mean nothing and go, which are
 * damaged, and what a crash left behind the tails.
 *
 * Threads: the one that opens the store.
 */
#include "snapd/store/internal.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "snapd/store/walk.h"
#include "snapd/util/log.h"

static bool parse_name(const char *name, uint32_t *id)
{
	char again[16];
	char *end;
	unsigned long v = strtoul(name, &end, 16);

	if (end == name || v > SEG_ID_MAX)
		return false;
	seg_path((uint32_t)v, again);
	*id = (uint32_t)v;
	return !strcmp(name, again);
}

/* A segment that was being written again. */
static bool is_unfinished(const char *name)
{
	char other[16];
	uint32_t id;

	if (strlen(name) != 12 || strcmp(name + 8, ".new") != 0)
		return false;
	memcpy(other, name, 8);
	memcpy(other + 8, ".seg", 5);
	return parse_name(other, &id);
}

static void recover_file(struct store *s, const char *name)
{
	uint32_t id;

	if (name[0] == '.')
		return;
	if (is_unfinished(name)) {
		unlinkat(s->segments_fd, name, 0);
		return;
	}
	if (!parse_name(name, &id)) {
		log_warn("store %s: segments/%s is not ours; left alone", s->dir, name);
		return;
	}
	if (seg_find(s, id))
		return;
	if (unlinkat(s->segments_fd, name, 0))
		log_warn("store %s: removing segments/%s: %m", s->dir, name);
	else
		log_info("store %s: removed segments/%s, of an epoch that was never committed",
			 s->dir, name);
}

/* One that is open will be filled, whatever it has now. */
static void seg_learn_blocks(struct store *s, struct seg *seg, const struct stat *st)
{
	uint64_t bytes = MIN((uint64_t)st->st_blocks * 512, seg->segment_bytes);

	if (seg->state != SEG_SEALED)
		return;
	s->bytes_segments -= seg->disk_bytes - bytes;
	seg->disk_bytes = bytes;
}

static void check_sizes(struct store *s)
{
	for (uint32_t i = 0; i < s->nr_segs; i++) {
		struct seg *seg = s->segs[i];
		struct stat st;
		char name[16];

		if (!seg)
			continue;
		seg_path(i, name);
		if (!fstatat(s->segments_fd, name, &st, 0) &&
		    (uint64_t)st.st_size >= seg->segment_bytes) {
			seg_learn_blocks(s, seg, &st);
			continue;
		}
		seg->damaged = true;
		if (seg->state != SEG_FREE)
			log_err("store %s: segment %s is missing or cut off; snapshots that need "
				"it are damaged",
				s->dir, name);
	}
}

static DIR *open_segments(const struct store *s)
{
	int fd = openat(s->segments_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;

	if (!dir && fd >= 0)
		close(fd);
	return dir;
}

/* The next entry; NULL: an error, or (0) there is none. */
static int next_entry(struct store *s, DIR *dir, struct dirent **ret, struct err *e)
{
	errno = 0;
	*ret = readdir(dir);
	return *ret || !errno ? 0 : err_errno(e, errno, "reading %s/segments", s->dir);
}

static int compare_ids(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

int space_list(struct store *s, uint32_t **ret, size_t *nr, struct err *e)
{
	DIR *dir = open_segments(s);
	uint32_t *ids = NULL, id;
	struct dirent *d;
	size_t cap = 0;
	int r;

	*nr = 0;
	if (!dir)
		return err_errno(e, errno, "%s/segments", s->dir);
	while (!(r = next_entry(s, dir, &d, e)) && d) {
		if (!parse_name(d->d_name, &id))
			continue;
		if (array_grow(ids, *nr, cap)) {
			r = err_errno(e, ENOMEM, "store %s", s->dir);
			break;
		}
		ids[(*nr)++] = id;
	}
	closedir(dir);
	if (r) {
		free(ids);
		return r;
	}
	if (*nr)
		qsort(ids, *nr, sizeof(*ids), compare_ids);
	*ret = ids;
	return 0;
}

int space_is_empty(struct store *s, struct err *e)
{
	DIR *dir = open_segments(s);
	struct dirent *d;
	uint32_t id;
	int r = 0;

	if (!dir)
		return err_errno(e, errno, "%s/segments", s->dir);
	while (!r && !(r = next_entry(s, dir, &d, e)) && d)
		if (parse_name(d->d_name, &id))
			r = err_set(
				e, E_CORRUPT,
				"store %s has segments, but no index: snapctl store rebuild-index "
				"makes it again; or move %s/segments away to begin anew",
				s->dir, s->dir);
	closedir(dir);
	return r;
}

/* Records behind the tail are of an epoch that was never committed (J2 of journal.c). */
static int clear_records(struct store *s, const struct seg_ident *ident, int fd, uint32_t from,
			 struct err *e)
{
	static _Alignas(FMT_BLOCK) const uint8_t nothing[FMT_BLOCK];
	_cleanup_(seg_walk_deinit) struct seg_walk w = {0};
	uint32_t nr = 0;

	if (seg_walk_init(&w, fd, ident, (uint32_t)(ident->segment_bytes / FMT_BLOCK)))
		return err_errno(e, ENOMEM, "store %s", s->dir);
	w.block = from;
	for (;;) {
		const struct batch_page *pages;
		const struct batch_header *h;
		uint32_t at;
		int r = seg_walk_next(&w, &at, &h, &pages, NULL);

		if (!r)
			break;
		if (r < 0 || (h->type != BATCH_EPOCH && h->type != BATCH_INDEX))
			continue;
		nr++;
		if (pwrite(fd, nothing, sizeof(nothing), (off_t)at * FMT_BLOCK) != sizeof(nothing))
			return err_errno(e, errno, "segment %08x block %u", ident->segment, at);
	}
	return nr && fdatasync(fd) ? err_errno(e, errno, "syncing segment %08x", ident->segment)
				   : 0;
}

/* Behind the tail of an open segment.  What was never written has nothing in it. */
static int clear_behind(struct store *s, uint32_t id, uint32_t tail, struct err *e)
{
	struct seg_ident ident;
	struct seg *seg;
	off_t data;
	int fd, r;

	r = seg_open(s, id, &seg, &fd, &ident, e);
	if (r)
		return r;
	data = lseek(fd, (off_t)tail * FMT_BLOCK, SEEK_DATA);
	if (data < 0)
		data = errno == ENXIO ? -1 : 0; /* -1: nothing there; 0: who knows */
	if (data >= 0)
		r = clear_records(s, &ident, fd, MAX(tail, (uint32_t)(data / FMT_BLOCK)), e);
	seg_close(s, seg);
	return r;
}

/* So that no batch of an epoch that never was, or is no more, looks like one that is.  Not
 * to be able to is no reason to refuse the store. */
static void clear_leftovers(struct store *s)
{
	for (uint32_t i = 0; i < s->nr_segs; i++) {
		const struct seg *seg = s->segs[i];
		struct err e = {0};

		if (!seg || seg->damaged)
			continue;
		if (seg->state == SEG_FREE)
			seg_retire(s, i);
		else if (seg->state == SEG_OPEN && clear_behind(s, i, seg->tail, &e))
			log_warn("store %s: what a crash left in it: %s", s->dir, e.text);
	}
}

int space_recover(struct store *s, struct err *e)
{
	DIR *dir = open_segments(s);
	struct dirent *d;
	int r = 0;

	if (!dir)
		return err_errno(e, errno, "%s/segments", s->dir);
	while (!s->read_only && !(r = next_entry(s, dir, &d, e)) && d)
		recover_file(s, d->d_name);
	closedir(dir);
	if (r)
		return r;
	check_sizes(s);
	if (!s->read_only)
		clear_leftovers(s);
	return 0;
}
