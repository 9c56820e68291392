/* SPDX-License-Identifier: MIT */
/*
 * simdisk: the log of a recording: which descriptor is which file, and what was done
 * to it.  See simdisk.h.
 */
#include "tests/lib/simdisk_priv.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tests/lib/rand.h"

#define FDS_MAX	  4096
#define NODES_MAX 4096u
#define NO_NODE	  UINT32_MAX

/* ---- the log ---- */

struct node {
	uint32_t dir; /* NO_NODE: not linked (any more) */
	char name[32];
	bool is_dir;
};

static struct {
	pthread_mutex_t lock;
	_Atomic bool on;
	char root[256];
	enum disk_ablation ablation;
	struct disk_log log;
	struct node nodes[NODES_MAX];
	uint32_t nr_nodes;
	uint32_t fd_node[FDS_MAX]; /* node + 1; 0: none of ours */
	bool fd_dsync[FDS_MAX];
	_Atomic uint64_t clock;
	bool replaced; /* by a rename that no sync of a directory followed yet */
} rec = {.lock = PTHREAD_MUTEX_INITIALIZER};

uint64_t sim_clock(void)
{
	return atomic_fetch_add(&rec.clock, 1) + 1;
}

static struct disk_op *log_add(struct disk_log *log, struct disk_op op)
{
	if (log->nr == log->cap) {
		log->cap = log->cap ? log->cap * 2 : 256;
		log->ops = realloc(log->ops, log->cap * sizeof(*log->ops));
		CHECK(log->ops);
	}
	log->ops[log->nr] = op;
	return &log->ops[log->nr++];
}

static bool ends_with(const char *s, const char *end)
{
	size_t n = strlen(s), m = strlen(end);

	return n >= m && !strcmp(s + n - m, end);
}

static bool is_segment(uint32_t node)
{
	return ends_with(rec.nodes[node].name, ".seg");
}

void disk_log_deinit(struct disk_log *log)
{
	for (size_t i = 0; i < log->nr; i++)
		free(log->ops[i].data);
	free(log->ops);
	*log = (struct disk_log){0};
}

/* ---- names ---- */

static uint32_t node_add(uint32_t dir, const char *name, bool is_dir)
{
	struct node *n = &rec.nodes[rec.nr_nodes];

	CHECK(rec.nr_nodes < NODES_MAX && strlen(name) < sizeof(n->name));
	*n = (struct node){.dir = dir, .is_dir = is_dir};
	strcpy(n->name, name);
	return rec.nr_nodes++;
}

static uint32_t node_find(uint32_t dir, const char *name, size_t len)
{
	if (len == 1 && name[0] == '.')
		return dir;
	if (len == 2 && !memcmp(name, "..", 2))
		return dir == DISK_ROOT ? NO_NODE : rec.nodes[dir].dir;
	for (uint32_t i = 1; i < rec.nr_nodes; i++)
		if (rec.nodes[i].dir == dir && strlen(rec.nodes[i].name) == len &&
		    !memcmp(rec.nodes[i].name, name, len))
			return i;
	return NO_NODE;
}

/* The directory of a path and its last name; false: not below the root. */
static bool parent_of(int at, const char *path, uint32_t *dir, const char **last)
{
	size_t root = strlen(rec.root);

	if (!strncmp(path, rec.root, root) && path[root] == '/') {
		*dir = DISK_ROOT;
		path += root + 1;
	} else if (at >= 0 && at < FDS_MAX && rec.fd_node[at] && path[0] != '/') {
		*dir = rec.fd_node[at] - 1;
	} else {
		return false;
	}
	for (const char *slash; (slash = strchr(path, '/')); path = slash + 1) {
		*dir = node_find(*dir, path, (size_t)(slash - path));
		if (*dir == NO_NODE)
			return false;
	}
	*last = path;
	return true;
}

static void link_node(uint32_t node)
{
	const struct node *n = &rec.nodes[node];
	struct disk_op op = {.kind = DISK_LINK, .node = node, .dir = n->dir, .is_dir = n->is_dir};

	memcpy(op.name, n->name, sizeof(op.name));
	op.began = op.done = sim_clock();
	log_add(&rec.log, op);
}

static void note_open(int fd, int at, const char *path, int flags)
{
	const char *last;
	uint32_t dir, node;

	CHECK(fd < FDS_MAX);
	rec.fd_node[fd] = 0;
	if (!rec.on || !parent_of(at, path, &dir, &last))
		return;
	node = node_find(dir, last, strlen(last));
	if (node == NO_NODE && flags & O_CREAT) {
		node = node_add(dir, last, false);
		link_node(node);
	}
	CHECK(node == NO_NODE || !(flags & O_TRUNC));
	rec.fd_node[fd] = node == NO_NODE ? 0 : node + 1;
	rec.fd_dsync[fd] = flags & O_DSYNC;
}

static uint32_t node_of(int fd)
{
	return rec.on && fd >= 0 && fd < FDS_MAX && rec.fd_node[fd] ? rec.fd_node[fd] - 1 : NO_NODE;
}

bool sim_is_recorded(int fd)
{
	return node_of(fd) != NO_NODE;
}

bool sim_recording(void)
{
	return rec.on;
}

/* Nobody may take the number before it is known. */
int sim_open(int at, const char *path, int flags, mode_t mode)
{
	int fd;

	if (!rec.on)
		return (int)syscall(SYS_openat, at, path, flags, mode);
	pthread_mutex_lock(&rec.lock);
	fd = (int)syscall(SYS_openat, at, path, flags, mode);
	if (fd >= 0)
		note_open(fd, at, path, flags);
	pthread_mutex_unlock(&rec.lock);
	return fd;
}

void sim_note_close(int fd)
{
	if (rec.on && fd >= 0 && fd < FDS_MAX)
		rec.fd_node[fd] = 0;
}

/* Changes by a mapping are not seen; those of lock.mdb do not matter. */
bool sim_may_map(int fd)
{
	uint32_t node = node_of(fd);

	return node == NO_NODE || !strcmp(rec.nodes[node].name, "lock.mdb");
}

/* ---- changes ---- */

size_t sim_begin_write(int fd, uint64_t offset, const void *data, size_t len)
{
	struct disk_op op = {.kind = DISK_WRITE, .offset = offset, .len = len};
	size_t ret = 0;

	if (!rec.on)
		return 0;
	pthread_mutex_lock(&rec.lock);
	op.node = node_of(fd);
	if (op.node != NO_NODE) {
		op.data = malloc(len);
		CHECK(op.data);
		memcpy(op.data, data, len);
		op.began = sim_clock();
		log_add(&rec.log, op);
		ret = rec.log.nr;
	}
	pthread_mutex_unlock(&rec.lock);
	return ret;
}

void sim_end_write(size_t n, size_t len)
{
	struct disk_op *op;

	if (!n)
		return;
	pthread_mutex_lock(&rec.lock);
	op = &rec.log.ops[n - 1];
	op->len = len;
	op->done = sim_clock();
	pthread_mutex_unlock(&rec.lock);
}

/* A write that is complete when the call returns. */
void sim_note_write(int fd, uint64_t offset, const void *data, size_t len)
{
	size_t n = sim_begin_write(fd, offset, data, len);

	sim_end_write(n, len);
	if (n && rec.fd_dsync[fd]) {
		struct disk_op op = {.kind = DISK_SYNC, .node = node_of(fd), .alone = true};

		pthread_mutex_lock(&rec.lock);
		op.began = rec.log.ops[n - 1].began;
		op.done = sim_clock();
		log_add(&rec.log, op);
		pthread_mutex_unlock(&rec.lock);
	}
}

static bool ablated(uint32_t node, bool from_ring)
{
	switch (rec.ablation) {
	case ABLATE_SEGMENT_SYNC:
		return is_segment(node) && from_ring;
	case ABLATE_INDEX_SYNC:
		return !strcmp(rec.nodes[node].name, "data.mdb");
	case ABLATE_DIR_SYNC:
		return rec.nodes[node].is_dir;
	case ABLATE_NEW_SYNC:
		return ends_with(rec.nodes[node].name, ".new");
	case ABLATE_RENAME_SYNC:
		return rec.nodes[node].is_dir && rec.replaced;
	default:
		return false;
	}
}

void sim_note_sync(int fd, uint64_t began, bool from_ring)
{
	uint32_t node;

	pthread_mutex_lock(&rec.lock);
	node = node_of(fd);
	if (node != NO_NODE && !ablated(node, from_ring)) {
		bool is_dir = rec.nodes[node].is_dir;
		struct disk_op op = {.kind = is_dir ? DISK_DIRSYNC : DISK_SYNC,
				     .node = node,
				     .dir = node,
				     .began = began,
				     .offset = from_ring,
				     .done = sim_clock()};

		log_add(&rec.log, op);
	}
	if (node != NO_NODE && rec.nodes[node].is_dir)
		rec.replaced = false;
	pthread_mutex_unlock(&rec.lock);
}

void sim_note_lost(int fd)
{
	struct disk_op op = {.kind = DISK_LOST};

	pthread_mutex_lock(&rec.lock);
	op.node = node_of(fd);
	op.began = op.done = sim_clock();
	if (op.node != NO_NODE && !rec.nodes[op.node].is_dir)
		log_add(&rec.log, op);
	pthread_mutex_unlock(&rec.lock);
}

void sim_note_size(int fd, uint64_t size)
{
	struct disk_op op = {.kind = DISK_SIZE, .offset = size};

	pthread_mutex_lock(&rec.lock);
	op.node = node_of(fd);
	op.began = op.done = sim_clock();
	if (op.node != NO_NODE)
		log_add(&rec.log, op);
	pthread_mutex_unlock(&rec.lock);
}

void disk_mark(uint64_t arg)
{
	struct disk_op op = {.kind = DISK_MARK, .offset = arg};

	pthread_mutex_lock(&rec.lock);
	op.began = op.done = sim_clock();
	if (rec.on)
		log_add(&rec.log, op);
	pthread_mutex_unlock(&rec.lock);
}

void sim_note_mkdir(int at, const char *path)
{
	const char *last;
	uint32_t dir;

	pthread_mutex_lock(&rec.lock);
	if (rec.on && parent_of(at, path, &dir, &last))
		link_node(node_add(dir, last, true));
	pthread_mutex_unlock(&rec.lock);
}

void sim_note_unlink(int at, const char *path)
{
	struct disk_op op = {.kind = DISK_UNLINK};
	const char *last;

	pthread_mutex_lock(&rec.lock);
	if (rec.on && parent_of(at, path, &op.dir, &last)) {
		op.node = node_find(op.dir, last, strlen(last));
		CHECK(op.node != NO_NODE && op.node != op.dir);
		memcpy(op.name, rec.nodes[op.node].name, sizeof(op.name));
		op.began = op.done = sim_clock();
		log_add(&rec.log, op);
		rec.nodes[op.node].dir = NO_NODE;
	}
	pthread_mutex_unlock(&rec.lock);
}

/* In one directory. */
void sim_note_rename(int from_at, const char *from, int to_at, const char *to)
{
	struct disk_op op = {.kind = DISK_RENAME};
	const char *last;
	uint32_t to_dir, over;

	pthread_mutex_lock(&rec.lock);
	if (rec.on && parent_of(from_at, from, &op.dir, &last)) {
		op.node = node_find(op.dir, last, strlen(last));
		CHECK(parent_of(to_at, to, &to_dir, &last) && to_dir == op.dir);
		CHECK(op.node != NO_NODE && strlen(last) < sizeof(op.name));
		over = node_find(to_dir, last, strlen(last));
		if (over != NO_NODE && over != op.node) {
			op.over = over;
			rec.nodes[over].dir = NO_NODE;
		}
		op.is_dir = rec.nodes[op.node].is_dir;
		strcpy(op.name, last);
		strcpy(rec.nodes[op.node].name, last);
		op.began = op.done = sim_clock();
		log_add(&rec.log, op);
		rec.replaced |= op.over != 0;
	}
	pthread_mutex_unlock(&rec.lock);
}

/* ---- begin and end ---- */

static void load_file(uint32_t node, const char *path)
{
	int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
	struct disk_op op = {.kind = DISK_WRITE, .node = node};
	struct disk_op size = {.kind = DISK_SIZE, .node = node};
	struct stat st;

	CHECK(fd >= 0 && !fstat(fd, &st));
	op.len = (size_t)st.st_size;
	op.data = malloc(op.len + 1);
	CHECK(op.data && syscall(SYS_pread64, fd, op.data, op.len, 0) == (long)op.len);
	syscall(SYS_close, fd);
	while (op.len && !op.data[op.len - 1])
		op.len--;
	op.began = op.done = size.began = size.done = sim_clock();
	size.offset = (uint64_t)st.st_size;
	log_add(&rec.log, size);
	log_add(&rec.log, op);
}

static void load_dir(uint32_t dir, const char *path)
{
	DIR *d = opendir(path);
	struct dirent *x;

	CHECK(d);
	while ((x = readdir(d))) {
		char sub[512];
		uint32_t node;

		if (x->d_name[0] == '.')
			continue;
		snprintf(sub, sizeof(sub), "%s/%s", path, x->d_name);
		node = node_add(dir, x->d_name, x->d_type == DT_DIR);
		link_node(node);
		if (x->d_type == DT_DIR)
			load_dir(node, sub);
		else
			load_file(node, sub);
	}
	closedir(d);
}

void disk_record(const char *root, enum disk_ablation ablation)
{
	CHECK(!rec.on && strlen(root) < sizeof(rec.root));
	strcpy(rec.root, root);
	rec.ablation = ABLATE_NONE;
	rec.log = (struct disk_log){0};
	rec.nr_nodes = 0;
	rec.replaced = false;
	memset(rec.fd_node, 0, sizeof(rec.fd_node));
	node_add(NO_NODE, "", true);
	load_dir(DISK_ROOT, root);
	rec.log.start = rec.log.nr;
	rec.ablation = ablation;
	rec.on = true;
}

/* Writes and syncs of segments only after the commit that they belong to. */
static void commit_first(struct disk_log *log)
{
	struct disk_log held = {0}, to = {0};

	for (size_t i = 0; i < log->nr; i++) {
		const struct disk_op *op = &log->ops[i];
		bool data = i >= log->start && (op->kind == DISK_WRITE || op->kind == DISK_SYNC) &&
			    is_segment(op->node) && op->offset;

		log_add(data ? &held : &to, *op);
		for (size_t k = 0; op->alone && k < held.nr; k++)
			log_add(&to, held.ops[k]);
		held.nr = op->alone ? 0 : held.nr;
	}
	CHECK(!held.nr);
	to.start = log->start;
	free(held.ops);
	free(log->ops);
	*log = to;
}

void disk_stop(struct disk_log *ret)
{
	rec.on = false;
	if (rec.ablation == ABLATE_COMMIT_FIRST)
		commit_first(&rec.log);
	*ret = rec.log;
	ret->nr_nodes = rec.nr_nodes;
	rec.log = (struct disk_log){0};
}
