/* SPDX-License-Identifier: MIT */
/* cutdisk: see cutdisk.h. */
#include "tests/lib/cutdisk.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/util/cleanup.h"
#include "tests/lib/store_model.h"

#define SECTOR	    512u
#define PENDING_MAX 256u

struct file {
	uint8_t *bytes; /* owned; zeros from `used` on */
	size_t used, cap;
	uint64_t size;
	uint32_t dir; /* of its entry */
	char name[32];
	bool is_dir, linked;
};

enum choice { DROP, KEEP, TORN };

struct run {
	const struct cut *c;
	struct cut_stats *stats;
	struct file *files, *now; /* durable; of the state being made */
	uint32_t nr;
	const struct disk_op *pending[PENDING_MAX];
	uint8_t choice[PENDING_MAX];
	uint32_t nr_pending;
	struct rand rand;
	uint64_t *seen; /* hashes of states; open addressing */
	size_t nr_seen, cap_seen, marks;
	size_t at; /* in the log */
	bool dirty;
	struct file stale; /* what lock.mdb may hold */
};

static char now_text[1024];

const char *cut_now(void)
{
	return now_text;
}

/* ---- files ---- */

static void file_reserve(struct file *f, size_t end)
{
	if (end <= f->cap)
		return;
	f->bytes = realloc(f->bytes, end * 2);
	CHECK(f->bytes);
	memset(f->bytes + f->cap, 0, end * 2 - f->cap);
	f->cap = end * 2;
}

static void file_write(struct file *f, uint64_t at, const uint8_t *data, size_t len)
{
	file_reserve(f, at + len);
	memcpy(f->bytes + at, data, len);
	f->used = MAX(f->used, at + len);
	f->size = MAX(f->size, at + len);
}

static void file_resize(struct file *f, uint64_t size)
{
	if (size < f->used) {
		memset(f->bytes + size, 0, f->used - size);
		f->used = size;
	}
	f->size = size;
}

static void file_copy(struct file *to, const struct file *from)
{
	uint8_t *bytes = to->bytes;
	size_t cap = to->cap, was = to->used;

	*to = *from;
	to->bytes = bytes;
	to->cap = cap;
	file_reserve(to, from->used);
	if (from->used)
		memcpy(to->bytes, from->bytes, from->used);
	if (was > from->used)
		memset(to->bytes + from->used, 0, was - from->used);
}

/* A random part of a write, sector by sector. */
static void write_torn(struct run *r, struct file *f, const struct disk_op *op)
{
	uint64_t end = op->offset + op->len;
	uint32_t how = (uint32_t)rand_below(&r->rand, 3);
	uint64_t cut = op->offset + rand_below(&r->rand, op->len);

	for (uint64_t at = op->offset, next; at < end; at = next) {
		next = MIN(at / SECTOR * SECTOR + SECTOR, end);
		if (how == 0 ? at < cut : how == 1 ? at >= cut : rand_below(&r->rand, 2))
			file_write(f, at, op->data + (at - op->offset), next - at);
	}
}

static bool in_one_sector(const struct disk_op *op)
{
	return !op->len || op->offset / SECTOR == (op->offset + op->len - 1) / SECTOR;
}

static void apply(struct run *r, struct file *files, const struct disk_op *op, enum choice choice)
{
	struct file *f = &files[op->node];

	if (choice == DROP)
		return;
	switch (op->kind) {
	case DISK_WRITE:
		if (choice == TORN)
			write_torn(r, f, op);
		else
			file_write(f, op->offset, op->data, op->len);
		return;
	case DISK_SIZE:
		file_resize(f, op->offset);
		return;
	case DISK_LINK:
		f->linked = true;
		f->is_dir = op->is_dir;
		f->dir = op->dir;
		memcpy(f->name, op->name, sizeof(f->name));
		return;
	case DISK_UNLINK:
		f->linked = false;
		return;
	case DISK_RENAME: /* where the entry was made is not known any more: it is there */
		f->linked = true;
		f->is_dir = op->is_dir;
		f->dir = op->dir;
		memcpy(f->name, op->name, sizeof(f->name));
		if (op->over)
			files[op->over].linked = false;
		return;
	default:
		abort();
	}
}

/* ---- a state on disk ---- */

/* The path of a node, when each directory on the way is there. */
static bool node_path(const struct run *r, uint32_t node, const char *root, char *path, size_t size)
{
	const struct file *f = &r->now[node];
	char above[512];

	if (node == DISK_ROOT) {
		snprintf(path, size, "%s", root);
		return true;
	}
	if (!f->linked || !node_path(r, f->dir, root, above, sizeof(above)))
		return false;
	snprintf(path, size, "%s/%s", above, f->name);
	return true;
}

static void write_file(const struct file *f, const char *path)
{
	_cleanup_fd_ int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	CHECK(fd >= 0 && !ftruncate(fd, (off_t)f->size));
	/* Zeros are holes: a sector at a time would be slow, a page is not. */
	for (size_t at = 0, n; at < f->used; at += n) {
		n = MIN((size_t)65536, f->used - at);
		if (f->bytes[at] || memcmp(f->bytes + at, f->bytes + at + 1, n - 1))
			CHECK(pwrite(fd, f->bytes + at, n, (off_t)at) == (ssize_t)n);
	}
}

/* A later name takes the place of an earlier one. */
static void make_state(const struct run *r, const char *root)
{
	char path[600];

	CHECK(!mkdir(root, 0700));
	for (uint32_t i = 1; i < r->nr; i++) {
		if (!node_path(r, i, root, path, sizeof(path)))
			continue;
		if (r->now[i].is_dir)
			CHECK(!mkdir(path, 0700));
		else if (r->stale.used && r->stats->states % 2 &&
			 !strcmp(r->now[i].name, "lock.mdb"))
			write_file(&r->stale, path);
		else
			write_file(&r->now[i], path);
	}
}

static void load_stale(struct run *r)
{
	_cleanup_fd_ int fd = r->c->stale_lock ? open(r->c->stale_lock, O_RDONLY | O_CLOEXEC) : -1;
	struct stat st;

	if (fd < 0)
		return;
	CHECK(!fstat(fd, &st));
	file_reserve(&r->stale, (size_t)st.st_size);
	CHECK(pread(fd, r->stale.bytes, (size_t)st.st_size, 0) == st.st_size);
	r->stale.used = r->stale.size = (size_t)st.st_size;
}

static uint64_t hash_state(const struct run *r)
{
	XXH3_state_t h;

	XXH3_INITSTATE(&h);
	XXH3_64bits_reset_withSeed(&h, r->marks);
	for (uint32_t i = 1; i < r->nr; i++) {
		const struct file *f = &r->now[i];
		uint64_t head[4] = {i, f->size, f->dir, f->linked};
		size_t used = f->used;

		if (!f->linked)
			continue;
		while (used && !f->bytes[used - 1])
			used--;
		XXH3_64bits_update(&h, head, sizeof(head));
		XXH3_64bits_update(&h, f->name, sizeof(f->name));
		XXH3_64bits_update(&h, f->bytes, used);
	}
	return XXH3_64bits_digest(&h) | 1;
}

static bool first_time(struct run *r, uint64_t hash)
{
	size_t i;

	if (r->nr_seen * 2 >= r->cap_seen) {
		size_t cap = r->cap_seen ? r->cap_seen * 2 : 1024;
		uint64_t *seen = calloc(cap, sizeof(*seen));

		CHECK(seen);
		for (size_t k = 0; k < r->cap_seen; k++)
			if (r->seen[k]) {
				for (i = r->seen[k] % cap; seen[i]; i = (i + 1) % cap)
					;
				seen[i] = r->seen[k];
			}
		free(r->seen);
		r->seen = seen;
		r->cap_seen = cap;
	}
	for (i = hash % r->cap_seen; r->seen[i]; i = (i + 1) % r->cap_seen)
		if (r->seen[i] == hash)
			return false;
	r->seen[i] = hash;
	r->nr_seen++;
	return true;
}

static void describe(const struct run *r)
{
	size_t n = (size_t)snprintf(now_text, sizeof(now_text),
				    "cut before operation %zu, %zu marks behind, open:", r->at,
				    r->marks);

	for (uint32_t i = 0; i < r->nr_pending && n < sizeof(now_text); i++) {
		static const char *const kinds[] = {"write", "size", "link", "unlink", "rename"};
		static const char *const choices[] = {"dropped", "kept", "torn"};
		const struct disk_op *op = r->pending[i];

		n += (size_t)snprintf(now_text + n, sizeof(now_text) - n,
				      " %s of node %u at %llu+%zu %s;", kinds[op->kind], op->node,
				      (unsigned long long)op->offset, op->len,
				      choices[r->choice[i]]);
	}
}

static void visit(struct run *r)
{
	char root[300];

	r->stats->combinations++;
	for (uint32_t i = 0; i < r->nr; i++)
		file_copy(&r->now[i], &r->files[i]);
	for (uint32_t i = 0; i < r->nr_pending; i++)
		apply(r, r->now, r->pending[i], r->choice[i]);
	if (!first_time(r, hash_state(r)) ||
	    (r->c->one_in > 1 && rand_below(&r->rand, r->c->one_in)))
		return;
	r->stats->states++;
	describe(r);
	snprintf(root, sizeof(root), "%s/state-%llu", r->c->dir,
		 (unsigned long long)r->stats->states);
	make_state(r, root);
	r->c->visit(r->c->arg, root, r->marks);
	remove_tree(root);
}

/* ---- combinations ---- */

static uint32_t nr_choices(const struct disk_op *op)
{
	return op->kind == DISK_WRITE && !in_one_sector(op) ? 3 : 2;
}

static void visit_all(struct run *r)
{
	uint32_t i;

	memset(r->choice, DROP, sizeof(r->choice));
	do {
		visit(r);
		for (i = 0; i < r->nr_pending; i++) {
			if (++r->choice[i] < nr_choices(r->pending[i]))
				break;
			r->choice[i] = DROP;
		}
	} while (i < r->nr_pending);
}

static void visit_regular(struct run *r)
{
	for (uint32_t k = 0; k <= r->nr_pending; k++) { /* in order */
		for (uint32_t i = 0; i < r->nr_pending; i++)
			r->choice[i] = i < k ? KEEP : DROP;
		visit(r);
	}
	for (uint32_t one = 0; one < r->nr_pending; one++)
		for (uint32_t but = 0; but < 2; but++) {
			for (uint32_t i = 0; i < r->nr_pending; i++)
				r->choice[i] = (i == one) != but ? KEEP : DROP;
			visit(r);
		}
}

static void visit_sample(struct run *r)
{
	visit_regular(r);
	for (uint32_t n = 0; n < r->c->limit; n++) {
		for (uint32_t i = 0; i < r->nr_pending; i++)
			r->choice[i] = (uint8_t)rand_below(&r->rand, nr_choices(r->pending[i]));
		visit(r);
	}
}

static void explore(struct run *r)
{
	uint64_t nr = 1;

	if (!r->dirty)
		return;
	r->dirty = false;
	r->stats->points++;
	for (uint32_t i = 0; i < r->nr_pending && nr <= r->c->limit; i++)
		nr *= nr_choices(r->pending[i]);
	if (nr <= r->c->limit) {
		r->stats->exhaustive++;
		visit_all(r);
	} else {
		visit_sample(r);
	}
}

/* ---- through the log ---- */

static bool covers(const struct run *r, const struct disk_op *sync, const struct disk_op *op)
{
	if (sync->kind == DISK_DIRSYNC)
		return op->kind >= DISK_LINK && op->kind <= DISK_RENAME && op->dir == sync->dir;
	if ((op->kind != DISK_WRITE && op->kind != DISK_SIZE) || op->node != sync->node)
		return false;
	if (sync->alone)
		return op->began == sync->began;
	return op->done && op->done < sync->began;
}

/* Gone, although the page cache went on to show it. */
static void lose(struct run *r, uint32_t node)
{
	uint32_t left = 0;

	for (uint32_t i = 0; i < r->nr_pending; i++) {
		const struct disk_op *op = r->pending[i];

		if (op->node != node || (op->kind != DISK_WRITE && op->kind != DISK_SIZE))
			r->pending[left++] = op;
	}
	r->nr_pending = left;
}

static void settle(struct run *r, const struct disk_op *sync)
{
	uint32_t left = 0;

	for (uint32_t i = 0; i < r->nr_pending; i++) {
		if (covers(r, sync, r->pending[i]))
			apply(r, r->files, r->pending[i], KEEP);
		else
			r->pending[left++] = r->pending[i];
	}
	r->nr_pending = left;
}

/* Locks mean nothing after a cut: no combinations of what was written to them. */
static bool is_volatile(const struct run *r, const struct disk_op *op)
{
	for (size_t i = 0; i < r->c->log->nr; i++) {
		const struct disk_op *link = &r->c->log->ops[i];

		if (link->kind == DISK_LINK && link->node == op->node)
			return !strcmp(link->name, "lock") || !strcmp(link->name, "lock.mdb");
	}
	return false;
}

static void step(struct run *r, const struct disk_op *op)
{
	switch (op->kind) {
	case DISK_MARK:
		explore(r);
		r->marks++;
		r->dirty = true;
		return;
	case DISK_SYNC:
	case DISK_DIRSYNC:
		explore(r);
		settle(r, op);
		return;
	case DISK_LOST:
		explore(r);
		lose(r, op->node);
		return;
	default:
		if (is_volatile(r, op)) {
			apply(r, r->files, op, KEEP);
			return;
		}
		CHECK(r->nr_pending < PENDING_MAX);
		r->pending[r->nr_pending++] = op;
		r->dirty = true;
	}
}

void cut_run(const struct cut *c, struct cut_stats *stats)
{
	struct run r = {.c = c, .stats = stats, .nr = c->log->nr_nodes, .rand = rand_of(c->seed)};

	r.files = calloc(r.nr, sizeof(*r.files));
	r.now = calloc(r.nr, sizeof(*r.now));
	CHECK(r.files && r.now);
	load_stale(&r);
	for (r.at = 0; r.at < c->log->start; r.at++)
		apply(&r, r.files, &c->log->ops[r.at], KEEP);
	for (; r.at < c->log->nr; r.at++)
		step(&r, &c->log->ops[r.at]);
	explore(&r);
	for (uint32_t i = 0; i < r.nr; i++) {
		free(r.files[i].bytes);
		free(r.now[i].bytes);
	}
	free(r.files);
	free(r.now);
	free(r.seen);
	free(r.stale.bytes);
}
