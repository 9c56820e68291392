/* SPDX-License-Identifier: MIT */
/*
 * The structure of an LMDB 0.9 file, checked without LMDB; see index_check.h.
 *
 * In: a path.  Out: sound, or one line about the first damage.  Pure reading with
 * pread(), one page buffer per tree level; nothing is mapped, so a file that
 * shrinks underneath gives an error and no signal.
 *
 * The file is sound if and only if
 *   C1 both meta pages hold magic and version, and their transaction numbers are
 *      neighbours, each on the page of its parity (LMDB writes them in turn; a
 *      flip in one would otherwise silently select the older state);
 *   C2 the file holds every page that a tree or a value uses; behind its end there
 *      are only free pages (LMDB does not write what one transaction took and gave
 *      back), each named by 8 bytes of the free list, which bounds their number;
 *   C3 each of the trees (free list, main, and each database named in main) has
 *      pages of the right kind at the right depth, with node offsets and sizes
 *      inside the page, keys ascending and inside the bounds that the parents
 *      give, and the counts of pages and entries that its record says;
 *   C4 each page is used exactly once, by a tree, by an overflow value, or by the
 *      free list.
 * Values are opaque here; index.c proves them by their own hash.
 */
#include "snapd/store/index_check.h"

#include <assert.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "snapd/util/cleanup.h"

#define LMDB_MAGIC     0xBEEFC0DEu
#define LMDB_VERSION   1u
#define PAGE_HEAD      16u
#define NODE_HEAD      8u
#define NODE_MAX_KEY   511u
#define TREE_DEPTH_MAX 32u
#define NO_PAGE	       UINT64_MAX

enum page_flags { P_BRANCH = 0x01, P_LEAF = 0x02, P_OVERFLOW = 0x04, P_META = 0x08 };
enum node_flags { F_BIGDATA = 0x01, F_SUBDATA = 0x02 };
enum db_flags { DB_INTEGERKEY = 0x08 };

struct page_head {
	uint64_t number;
	uint16_t pad;
	uint16_t flags;
	union {
		struct {
			uint16_t lower, upper;
		};
		uint32_t pages; /* overflow */
	};
};
static_assert(sizeof(struct page_head) == PAGE_HEAD, "LMDB format");

struct node {
	uint16_t lo, hi; /* leaf: size of the value; branch: page number, low bits */
	uint16_t flags;	 /* branch: page number, high bits */
	uint16_t key_len;
};
static_assert(sizeof(struct node) == NODE_HEAD, "LMDB format");

struct db {
	uint32_t pad;
	uint16_t flags, depth;
	uint64_t branch_pages, leaf_pages, overflow_pages, entries, root;
};
static_assert(sizeof(struct db) == 48, "LMDB format");

struct meta {
	uint32_t magic, version;
	uint64_t address, map_bytes;
	struct db free, main;
	uint64_t last_page, txn;
};
static_assert(sizeof(struct meta) == 136, "LMDB format");

struct key {
	const uint8_t *p; /* borrowed from a page buffer of a level above */
	uint32_t len;
};

struct check {
	int fd;
	const char *path;
	uint32_t page_bytes;
	struct meta meta;
	uint8_t *used;	  /* a bit a page */
	uint8_t *buffers; /* TREE_DEPTH_MAX pages for the main tree, as many for others, one more */
	struct err *e;
};

/* One tree that is being walked. */
struct tree {
	const char *name;
	const struct db *db;
	uint8_t *buffers;
	uint64_t branch_pages, leaf_pages, overflow_pages, entries;
	int (*leaf)(struct check *c, const struct node *n, const uint8_t *value, uint32_t len);
	bool integer_keys;
	bool sub_dbs; /* the main tree: values are records of databases */
};

#define damaged(c, fmt, ...)                                                                    \
	err_set((c)->e, E_CORRUPT, "index file %s is damaged: " fmt "; segments are untouched", \
		(c)->path, ##__VA_ARGS__)

static int read_at(struct check *c, void *buf, size_t len, uint64_t at)
{
	uint8_t *p = buf;

	while (len) {
		ssize_t n = pread(c->fd, p, len, (off_t)at);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return err_errno(c->e, errno, "reading %s", c->path);
		if (!n)
			return damaged(c, "it ends before byte %llu", (unsigned long long)at);
		p += n;
		at += (uint64_t)n;
		len -= (size_t)n;
	}
	return 0;
}

/* C4: first use of `n` pages from `page` on. */
static int use_pages(struct check *c, uint64_t page, uint64_t n, const char *by)
{
	if (page < 2 || n > c->meta.last_page || page > c->meta.last_page + 1 - n)
		return damaged(c, "%s refers to page %llu of %llu", by, (unsigned long long)page,
			       (unsigned long long)c->meta.last_page + 1);
	for (uint64_t i = page; i < page + n; i++) {
		if (c->used[i / 8] & 1u << i % 8)
			return damaged(c, "%s uses page %llu, which is in use", by,
				       (unsigned long long)i);
		c->used[i / 8] |= (uint8_t)(1u << i % 8);
	}
	return 0;
}

static int read_page(struct check *c, const char *by, uint64_t page, unsigned flags, uint8_t *buf)
{
	struct page_head h;
	int r;

	r = use_pages(c, page, 1, by);
	if (!r)
		r = read_at(c, buf, c->page_bytes, page * c->page_bytes);
	if (r)
		return r;
	memcpy(&h, buf, sizeof(h));
	if (h.number != page || h.flags != flags || h.pad)
		return damaged(c, "page %llu of %s says number %llu, flags 0x%x, pad %u",
			       (unsigned long long)page, by, (unsigned long long)h.number, h.flags,
			       h.pad);
	if (h.lower < PAGE_HEAD || h.lower > h.upper || h.upper > c->page_bytes ||
	    (h.lower - PAGE_HEAD) % 2)
		return damaged(c, "page %llu of %s has bounds %u, %u", (unsigned long long)page, by,
			       h.lower, h.upper);
	return 0;
}

static int key_compare(const struct tree *t, const struct key *a, const struct key *b)
{
	uint32_t n = MIN(a->len, b->len);
	int r;

	if (t->integer_keys) {
		uint64_t x, y;

		memcpy(&x, a->p, sizeof(x));
		memcpy(&y, b->p, sizeof(y));
		return x < y ? -1 : x > y;
	}
	r = memcmp(a->p, b->p, n);
	if (r)
		return r;
	return a->len < b->len ? -1 : a->len > b->len;
}

/* Node `i` of a page that read_page() accepted; its header and key lie inside. */
static int node_at(struct check *c, const struct tree *t, const uint8_t *page, uint32_t i,
		   struct node *ret, struct key *key)
{
	struct page_head h;
	uint16_t at;

	memcpy(&h, page, sizeof(h));
	memcpy(&at, page + PAGE_HEAD + 2 * i, sizeof(at));
	if (at < h.upper || at > c->page_bytes - NODE_HEAD || at % 2)
		goto bad;
	memcpy(ret, page + at, sizeof(*ret));
	if (ret->key_len > NODE_MAX_KEY || ret->key_len > c->page_bytes - NODE_HEAD - at)
		goto bad;
	*key = (struct key){.p = page + at + NODE_HEAD, .len = ret->key_len};
	return 0;
bad:
	return damaged(c, "page %llu of %s: node %u at offset %u leaves the page",
		       (unsigned long long)h.number, t->name, i, at);
}

static int key_in_order(struct check *c, const struct tree *t, const uint8_t *page,
			const struct key *key, const struct key *low, bool low_inclusive,
			const struct key *high)
{
	struct page_head h;

	memcpy(&h, page, sizeof(h));
	if (!key->len || (t->integer_keys && key->len != sizeof(uint64_t)))
		return damaged(c, "page %llu of %s has a key of %u bytes",
			       (unsigned long long)h.number, t->name, key->len);
	if (low && key_compare(t, low, key) >= (low_inclusive ? 1 : 0))
		goto bad;
	if (high && key_compare(t, key, high) >= 0)
		goto bad;
	return 0;
bad:
	return damaged(c, "page %llu of %s has a key out of order", (unsigned long long)h.number,
		       t->name);
}

/* ---- leaves ---- */

/* The value of a leaf node: in the page, or in pages of its own (read into the
 * spare buffer, as far as one page goes: only the free list looks into values). */
static int check_value(struct check *c, struct tree *t, const uint8_t *page, const struct node *n,
		       const struct key *key)
{
	uint32_t len = n->lo | (uint32_t)n->hi << 16;
	const uint8_t *value = key->p + key->len;
	size_t room = (size_t)(page + c->page_bytes - value);
	_cleanup_free_ uint8_t *big = NULL;

	if (n->flags & F_BIGDATA) {
		uint64_t first, pages = (PAGE_HEAD - 1 + (uint64_t)len) / c->page_bytes + 1;
		struct page_head h;
		int r;

		if (room < sizeof(first))
			return damaged(c, "a value of %s leaves its page", t->name);
		memcpy(&first, value, sizeof(first));
		r = use_pages(c, first, pages, t->name);
		if (!r)
			r = read_at(c, &h, sizeof(h), first * c->page_bytes);
		if (r)
			return r;
		if (h.number != first || h.flags != P_OVERFLOW || h.pad || h.pages < pages)
			return damaged(c, "page %llu of %s is no overflow page of %llu",
				       (unsigned long long)first, t->name,
				       (unsigned long long)pages);
		r = h.pages > pages ? use_pages(c, first + pages, h.pages - pages, t->name) : 0;
		if (r)
			return r;
		t->overflow_pages += h.pages;
		if (!t->leaf)
			return 0;
		big = malloc(len);
		if (!big)
			return err_errno(c->e, ENOMEM, "checking %s", c->path);
		r = read_at(c, big, len, first * c->page_bytes + PAGE_HEAD);
		if (r)
			return r;
		value = big;
	} else if (len > room) {
		return damaged(c, "a value of %s leaves its page", t->name);
	}
	return t->leaf ? t->leaf(c, n, value, len) : 0;
}

static int check_leaf(struct check *c, struct tree *t, const uint8_t *page, const struct key *low,
		      const struct key *high)
{
	struct key before = {0};
	struct page_head h;
	uint32_t nr;

	memcpy(&h, page, sizeof(h));
	nr = (h.lower - PAGE_HEAD) / 2u;
	for (uint32_t i = 0; i < nr; i++) {
		struct node n;
		struct key key;
		int r = node_at(c, t, page, i, &n, &key);

		if (!r)
			r = key_in_order(c, t, page, &key, i ? &before : low, !i, high);
		if (!r && n.flags & ~(t->sub_dbs ? F_SUBDATA : F_BIGDATA))
			r = damaged(c, "page %llu of %s has a node of kind 0x%x",
				    (unsigned long long)h.number, t->name, n.flags);
		if (!r)
			r = check_value(c, t, page, &n, &key);
		if (r)
			return r;
		before = key;
	}
	t->entries += nr;
	t->leaf_pages++;
	return nr ? 0
		  : damaged(c, "page %llu of %s is empty", (unsigned long long)h.number, t->name);
}

/* ---- trees ---- */

static int walk(struct check *c, struct tree *t, uint64_t number, uint32_t depth,
		const struct key *low, const struct key *high);

/* Each child lies between its key and its right neighbour's. */
static int check_branch(struct check *c, struct tree *t, const uint8_t *page, uint32_t depth,
			const struct key *low, const struct key *high)
{
	struct key key = {0}, next = {0};
	struct node n = {0}, next_n;
	struct page_head h;
	uint32_t nr;
	int r;

	memcpy(&h, page, sizeof(h));
	nr = (h.lower - PAGE_HEAD) / 2u;
	if (nr < 2)
		return damaged(c, "page %llu of %s has %u children", (unsigned long long)h.number,
			       t->name, nr);
	t->branch_pages++;
	r = node_at(c, t, page, 0, &n, &key);
	for (uint32_t i = 0; !r && i < nr; i++) {
		bool last = i + 1 == nr;
		uint64_t child = n.lo | (uint64_t)n.hi << 16 | (uint64_t)n.flags << 32;

		if (!last)
			r = node_at(c, t, page, i + 1, &next_n, &next);
		if (!r && !last)
			r = key_in_order(c, t, page, &next, i ? &key : low, false, high);
		if (!r)
			r = walk(c, t, child, depth + 1, i ? &key : low, last ? high : &next);
		key = next;
		n = next_n;
	}
	return r;
}

static int walk(struct check *c, struct tree *t, uint64_t number, uint32_t depth,
		const struct key *low, const struct key *high)
{
	uint8_t *page = t->buffers + (size_t)depth * c->page_bytes;
	bool leaf = depth + 1 == t->db->depth;
	int r;

	assert(depth < TREE_DEPTH_MAX);
	r = read_page(c, t->name, number, leaf ? P_LEAF : P_BRANCH, page);
	if (r)
		return r;
	return leaf ? check_leaf(c, t, page, low, high)
		    : check_branch(c, t, page, depth, low, high);
}

static int check_tree(struct check *c, struct tree *t)
{
	const struct db *db = t->db;

	if (db->root == NO_PAGE || !db->depth) {
		if (db->root != NO_PAGE || db->depth || db->entries || db->leaf_pages ||
		    db->branch_pages || db->overflow_pages)
			return damaged(c, "%s is half empty", t->name);
		return 0;
	}
	if (db->depth > TREE_DEPTH_MAX)
		return damaged(c, "%s has a depth of %u", t->name, db->depth);
	if (walk(c, t, db->root, 0, NULL, NULL))
		return c->e->code;
	if (t->entries != db->entries || t->leaf_pages != db->leaf_pages ||
	    t->branch_pages != db->branch_pages || t->overflow_pages != db->overflow_pages)
		return damaged(c, "%s has %llu entries on %llu pages, its record says %llu on %llu",
			       t->name, (unsigned long long)t->entries,
			       (unsigned long long)(t->leaf_pages + t->branch_pages),
			       (unsigned long long)db->entries,
			       (unsigned long long)(db->leaf_pages + db->branch_pages));
	return 0;
}

static uint8_t *buffers_at(const struct check *c, uint32_t level)
{
	return c->buffers + (size_t)level * c->page_bytes;
}

/* A record in the main tree: a database. */
static int check_sub_db(struct check *c, const struct node *n, const uint8_t *value, uint32_t len)
{
	char name[64] = "database ";
	struct tree t = {.name = name, .buffers = buffers_at(c, TREE_DEPTH_MAX)};
	struct db db;

	if (n->flags != F_SUBDATA || len != sizeof(db))
		return damaged(c, "a record of the main tree is no database");
	for (uint32_t i = 0; i < MIN((uint32_t)n->key_len, 40u); i++) {
		uint8_t ch = (value - n->key_len)[i];

		name[9 + i] = ch > ' ' && ch < 127 ? (char)ch : '?';
	}
	memcpy(&db, value, sizeof(db));
	if (db.flags || db.pad)
		return damaged(c, "%s has flags 0x%x", name, db.flags);
	t.db = &db;
	return check_tree(c, &t);
}

/* A record of the free list: a count and page numbers, descending. */
static int check_free_record(struct check *c, const struct node *n, const uint8_t *value,
			     uint32_t len)
{
	uint64_t nr, page = 0;

	if (len < sizeof(nr))
		return damaged(c, "a record of the free list has %u bytes", len);
	memcpy(&nr, value, sizeof(nr));
	if (nr > len / sizeof(nr) - 1)
		return damaged(c, "a record of the free list is too short");
	for (uint64_t i = 0; i < nr; i++) {
		uint64_t before = page;
		int r;

		memcpy(&page, value + (i + 1) * sizeof(page), sizeof(page));
		if (i && page >= before)
			return damaged(c, "a record of the free list is out of order");
		r = use_pages(c, page, 1, "the free list");
		if (r)
			return r;
	}
	return 0;
}

/* ---- the file ---- */

static int read_meta(struct check *c, uint32_t which, uint32_t page_bytes, struct meta *ret)
{
	struct page_head h;
	int r;

	r = read_at(c, &h, sizeof(h), (uint64_t)which * page_bytes);
	if (!r)
		r = read_at(c, ret, sizeof(*ret), (uint64_t)which * page_bytes + sizeof(h));
	if (r)
		return r;
	if (h.number != which || h.flags != P_META || ret->magic != LMDB_MAGIC ||
	    ret->version != LMDB_VERSION)
		return damaged(c, "meta page %u is not one", which);
	if (ret->free.flags != DB_INTEGERKEY || ret->main.flags || ret->main.pad || ret->address)
		return damaged(c, "meta page %u has flags 0x%x, 0x%x", which, ret->free.flags,
			       ret->main.flags);
	return 0;
}

/* C1, C2 */
static int check_metas(struct check *c)
{
	struct meta m[2];
	struct stat st;
	int r, newest;

	r = read_meta(c, 0, 0, &m[0]);
	if (r)
		return r;
	c->page_bytes = m[0].free.pad;
	if (c->page_bytes < 512 || c->page_bytes > 65536 || c->page_bytes & (c->page_bytes - 1))
		return damaged(c, "it has pages of %u bytes", c->page_bytes);
	r = read_meta(c, 1, c->page_bytes, &m[1]);
	if (r)
		return r;
	newest = m[1].txn > m[0].txn;
	if (m[1].free.pad != c->page_bytes)
		return damaged(c, "its meta pages differ in page size");
	if (m[newest].txn &&
	    (m[newest].txn - m[!newest].txn != 1 || (m[newest].txn & 1) != (uint64_t)newest))
		return damaged(c, "its meta pages are of transactions %llu and %llu",
			       (unsigned long long)m[0].txn, (unsigned long long)m[1].txn);
	c->meta = m[newest];
	if (fstat(c->fd, &st))
		return err_errno(c->e, errno, "%s", c->path);
	if (c->meta.last_page < 1 ||
	    c->meta.last_page >= (uint64_t)st.st_size / c->page_bytes + (uint64_t)st.st_size / 8)
		return damaged(c, "it has %lld bytes, but %llu pages of %u", (long long)st.st_size,
			       (unsigned long long)c->meta.last_page + 1, c->page_bytes);
	return 0;
}

static int check_all_used(struct check *c)
{
	for (uint64_t i = 2; i <= c->meta.last_page; i++)
		if (!(c->used[i / 8] & 1u << i % 8))
			return damaged(c, "page %llu belongs to nothing", (unsigned long long)i);
	return 0;
}

static int check_trees(struct check *c)
{
	struct tree free_list = {.name = "the free list",
				 .db = &c->meta.free,
				 .leaf = check_free_record,
				 .integer_keys = true};
	struct tree main_tree = {.name = "the main tree",
				 .db = &c->meta.main,
				 .leaf = check_sub_db,
				 .sub_dbs = true};
	int r;

	c->used = calloc(1, c->meta.last_page / 8 + 1);
	c->buffers = malloc(2 * (size_t)TREE_DEPTH_MAX * c->page_bytes);
	if (!c->used || !c->buffers)
		return err_errno(c->e, ENOMEM, "checking %s", c->path);
	main_tree.buffers = free_list.buffers = buffers_at(c, 0);
	r = check_tree(c, &main_tree);
	if (!r)
		r = check_tree(c, &free_list);
	return r ? r : check_all_used(c);
}

static int check_once(struct check *c)
{
	int r = check_metas(c);

	if (!r)
		r = check_trees(c);
	free(c->used);
	free(c->buffers);
	c->used = c->buffers = NULL;
	return r;
}

int index_check(const char *path, bool beside_writer, struct err *e)
{
	_cleanup_fd_ int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;
	int r = 0;

	if (fd < 0)
		return errno == ENOENT ? err_set(e, ENOENT, "%s: no index there", path)
				       : err_errno(e, errno, "%s", path);
	if (fstat(fd, &st))
		return err_errno(e, errno, "%s", path);
	if (!st.st_size) /* a crash before the first write: LMDB starts afresh */
		return err_set(e, ENOENT, "%s: the index is empty", path);
	for (int tries = 0; tries < (beside_writer ? 20 : 1); tries++) {
		struct err one = {0};
		struct check c = {.fd = fd, .path = path, .e = &one}, again = c;
		struct err ignored = {0};

		r = check_once(&c);
		if (!r)
			return 0;
		again.e = &ignored;
		if (tries + 1 < 20 && beside_writer && r == -E_CORRUPT && !check_metas(&again) &&
		    again.meta.txn != c.meta.txn)
			continue;
		if (e && !e->code)
			*e = one;
		return r;
	}
	return r;
}
