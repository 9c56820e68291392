/* SPDX-License-Identifier: MIT */
/*
 * The shared page of a VM and its two dirty sets, seen from the service: mapped
 * after checks, and every later touch guarded against SIGBUS; see vm_mem.h and
 * include/snapd/protocol.h (who writes what).
 */
#include "snapd/vm/mem.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>

#include "snapd/util/busguard.h"
#include "snapd/util/cleanup.h"

#define SHM_MAX_FRAMES (1ull << 34) /* 64 TiB of 4 KiB frames */
#define SHM_PAGE       4096u

static int check_shm_file(int fd, uint64_t told_bytes, struct err *e)
{
	struct statfs fs;
	struct stat st;
	int seals;

	if (fstat(fd, &st) || fstatfs(fd, &fs))
		return err_errno(e, errno, "shared memory file");
	seals = fcntl(fd, F_GET_SEALS);
	if (fs.f_type != TMPFS_MAGIC || seals < 0)
		return err_set(e, EINVAL, "shared memory file is not a memfd");
	if ((seals & (F_SEAL_SHRINK | F_SEAL_GROW)) != (F_SEAL_SHRINK | F_SEAL_GROW))
		return err_set(e, EINVAL, "shared memory file is not sealed against resizing");
	if ((uint64_t)st.st_size != told_bytes || st.st_size < (off_t)sizeof(struct snapd_shm))
		return err_set(e, EINVAL, "shared memory file has %lld bytes, told were %llu",
			       (long long)st.st_size, (unsigned long long)told_bytes);
	return 0;
}

static bool set_fits(uint64_t off, uint64_t bytes, uint64_t total)
{
	return off >= SHM_PAGE && off % SHM_PAGE == 0 && off <= total && bytes <= total - off;
}

static int check_header(const struct snapd_shm *h, uint64_t total, struct err *e)
{
	uint64_t bytes, lo, hi;

	if (h->magic != SNAPD_SHM_MAGIC || h->major != SNAPD_PROTO_MAJOR ||
	    h->header_bytes < offsetof(struct snapd_shm, publish_seq) || h->header_bytes > 4096)
		return err_set(e, EPROTO, "shared memory: unknown magic or version");
	if (!h->nr_frames || h->nr_frames % 4096 || h->nr_frames > SHM_MAX_FRAMES)
		return err_set(e, EINVAL, "shared memory: bad number of frames");
	bytes = gpaset_bytes(h->nr_frames);
	lo = MIN(h->dirty_off, h->inflight_off);
	hi = MAX(h->dirty_off, h->inflight_off);
	if (h->total_bytes != total || !set_fits(lo, bytes, total) || !set_fits(hi, bytes, total) ||
	    hi - lo < bytes)
		return err_set(e, EINVAL, "shared memory: the sets are not where they can be");
	return 0;
}

/* The set of hints is newer than the others, and may be missing. */
static bool has_discarded(const struct snapd_shm *h, uint64_t total)
{
	uint64_t bytes = gpaset_bytes(h->nr_frames), end = MAX(h->dirty_off, h->inflight_off);

	return h->header_bytes >= offsetof(struct snapd_shm, discarded_off) + 8 &&
	       h->discarded_off >= end + bytes && set_fits(h->discarded_off, bytes, total);
}

/* And so may the table of slots. */
static bool has_slots(const struct snapd_shm *h, uint64_t total)
{
	return h->header_bytes >= offsetof(struct snapd_shm, nr_slots) + 8 && h->slots_off &&
	       h->nr_slots <= UINT16_MAX + 1 &&
	       set_fits(h->slots_off, 2 * h->nr_slots * sizeof(struct snapd_shm_slot), total);
}

struct header_copy {
	const struct snapd_shm *from;
	struct snapd_shm to;
};

static void copy_header(void *arg)
{
	struct header_copy *c = arg;

	memcpy(&c->to, (const void *)c->from, sizeof(c->to));
}

int vm_shm_map(struct vm_shm *s, int fd, uint64_t told_bytes, struct err *e)
{
	struct header_copy copy;
	int err = check_shm_file(fd, told_bytes, e);
	void *map;

	if (err)
		return err;
	map = mmap(NULL, told_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		return err_errno(e, errno, "map shared memory");
	copy.from = map;
	err = busguard_run(copy_header, &copy);
	if (err)
		err_set(e, EFAULT, "shared memory cannot be read");
	else
		err = check_header(&copy.to, told_bytes, e);
	if (err) {
		munmap(map, told_bytes);
		return err;
	}
	*s = (struct vm_shm){.map = map, .map_bytes = told_bytes, .nr_frames = copy.to.nr_frames};
	gpaset_init(&s->dirty, (uint8_t *)map + copy.to.dirty_off, s->nr_frames);
	gpaset_init(&s->inflight, (uint8_t *)map + copy.to.inflight_off, s->nr_frames);
	if (has_slots(&copy.to, told_bytes)) {
		s->slots = (const void *)((const uint8_t *)map + copy.to.slots_off);
		s->nr_slots = copy.to.nr_slots;
	}
	if (has_discarded(&copy.to, told_bytes))
		gpaset_init(&s->discarded, (uint8_t *)map + copy.to.discarded_off, s->nr_frames);
	return 0;
}

void vm_shm_unmap(struct vm_shm *s)
{
	if (s->map)
		munmap(s->map, s->map_bytes);
	*s = (struct vm_shm){};
}

/* What one guarded touch does and gives. */
struct touch {
	struct vm_shm *s;
	struct gpaset *set;
	const struct gpaset *from;
	struct vm_base *base;
	const struct vm_base *new_base;
	uint64_t limit, first, n, cursor;
	const uint64_t *add;
	uint64_t *frames;
	size_t max, got;
	bool rebuild, *hints;
	struct vm_shm_stats *stats;
};

static void do_get_base(void *arg)
{
	struct touch *t = arg;

	memcpy(t->base->store, t->s->map->store, sizeof(t->base->store));
	t->base->point = t->s->map->base;
}

int vm_shm_get_base(struct vm_shm *s, struct vm_base *ret)
{
	return busguard_run(do_get_base, &(struct touch){.s = s, .base = ret});
}

/* Timeline 0 means "everything is dirty": valid whatever the other fields are. */
static void do_set_base(void *arg)
{
	struct touch *t = arg;
	struct snapd_shm *m = t->s->map;
	const struct vm_base *b = t->new_base;

	if (m->base.timeline == b->point.timeline && !memcmp(m->store, b->store, 16)) {
		__atomic_store_n(&m->base.epoch, b->point.epoch, __ATOMIC_RELEASE);
		return;
	}
	__atomic_store_n(&m->base.timeline, 0, __ATOMIC_SEQ_CST);
	/* A store-release holds earlier stores back, not later ones. */
	atomic_thread_fence(memory_order_release);
	memcpy(m->store, b->store, sizeof(m->store));
	__atomic_store_n(&m->base.epoch, b->point.epoch, __ATOMIC_SEQ_CST);
	__atomic_store_n(&m->base.timeline, b->point.timeline, __ATOMIC_SEQ_CST);
}

int vm_shm_set_base(struct vm_shm *s, const struct vm_base *base)
{
	return busguard_run(do_set_base, &(struct touch){.s = s, .new_base = base});
}

static void do_clear(void *arg)
{
	struct touch *t = arg;

	gpaset_clear(t->set, t->limit);
}

int vm_shm_clear(struct vm_shm *s, struct gpaset *set, uint64_t limit)
{
	return busguard_run(do_clear, &(struct touch){.s = s, .set = set, .limit = limit});
}

static void do_clear_range(void *arg)
{
	struct touch *t = arg;

	gpaset_clear_range(t->set, t->first, t->n);
}

int vm_shm_clear_range(struct vm_shm *s, struct gpaset *set, uint64_t first, uint64_t n)
{
	return busguard_run(do_clear_range,
			    &(struct touch){.s = s, .set = set, .first = first, .n = n});
}

static void do_add_range(void *arg)
{
	struct touch *t = arg;

	gpaset_add_range(t->set, t->first, t->n);
}

int vm_shm_add_range(struct vm_shm *s, struct gpaset *set, uint64_t first, uint64_t n)
{
	return busguard_run(do_add_range,
			    &(struct touch){.s = s, .set = set, .first = first, .n = n});
}

static void do_add(void *arg)
{
	struct touch *t = arg;

	for (size_t i = 0; i < t->max; i++)
		gpaset_add(t->set, t->add[i]);
}

int vm_shm_add(struct vm_shm *s, struct gpaset *set, const uint64_t *frames, size_t nr)
{
	return busguard_run(do_add, &(struct touch){.s = s, .set = set, .add = frames, .max = nr});
}

static void do_merge(void *arg)
{
	struct touch *t = arg;

	if (t->rebuild) {
		gpaset_rebuild(&t->s->inflight, t->limit);
		gpaset_rebuild(&t->s->dirty, t->limit);
	}
	gpaset_merge(&t->s->dirty, &t->s->inflight, t->limit);
}

int vm_shm_merge(struct vm_shm *s, uint64_t limit, bool rebuild)
{
	return busguard_run(do_merge, &(struct touch){.s = s, .limit = limit, .rebuild = rebuild});
}

static void do_count(void *arg)
{
	struct touch *t = arg;

	t->n = gpaset_count(&t->s->dirty, t->limit);
}

int vm_shm_count(struct vm_shm *s, uint64_t limit, uint64_t *ret)
{
	struct touch t = {.s = s, .limit = limit};
	int err = busguard_run(do_count, &t);

	*ret = t.n;
	return err;
}

static void do_take(void *arg)
{
	struct touch *t = arg;

	t->got =
		gpaset_take(&t->s->dirty, &t->s->inflight, t->limit, &t->cursor, t->frames, t->max);
}

int vm_shm_take(struct vm_shm *s, uint64_t limit, uint64_t *cursor, uint64_t *frames, size_t max,
		size_t *ret)
{
	struct touch t = {.s = s, .limit = limit, .cursor = *cursor, .frames = frames, .max = max};
	int err = busguard_run(do_take, &t);

	*cursor = t.cursor;
	*ret = t.got;
	return err;
}

static void do_peek(void *arg)
{
	struct touch *t = arg;

	t->got = gpaset_peek(t->from, t->limit, &t->cursor, t->frames, t->max);
}

int vm_shm_peek(struct vm_shm *s, const struct gpaset *set, uint64_t limit, uint64_t *cursor,
		uint64_t *frames, size_t max, size_t *ret)
{
	struct touch t = {.s = s,
			  .from = set,
			  .limit = limit,
			  .cursor = *cursor,
			  .frames = frames,
			  .max = max};
	int err = busguard_run(do_peek, &t);

	*cursor = t.cursor;
	*ret = t.got;
	return err;
}

static void do_hints(void *arg)
{
	struct touch *t = arg;

	for (size_t i = 0; i < t->max; i++)
		t->hints[i] = gpaset_test(&t->s->discarded, t->add[i]);
}

int vm_shm_hints(struct vm_shm *s, const uint64_t *frames, size_t nr, bool *hints)
{
	memset(hints, 0, nr * sizeof(*hints));
	if (!s->discarded.nr_frames)
		return 0;
	return busguard_run(do_hints,
			    &(struct touch){.s = s, .add = frames, .max = nr, .hints = hints});
}

static void do_stats(void *arg)
{
	struct touch *t = arg;
	struct snapd_shm *m = t->s->map;
	struct vm_shm_stats *r = t->stats;

#define GET(f) r->f = atomic_load_explicit(&m->f, memory_order_acquire)
	GET(harvested);
	GET(reset);
	GET(published);
	GET(ring_full);
	GET(unresolved);
	GET(host_marks);
	GET(kicks);
	GET(pauses);
	GET(reconnects);
	GET(slot_changes);
	GET(pending);
	GET(harvest_ns);
#undef GET
	r->harvests = atomic_load_explicit(&m->publish_seq, memory_order_acquire);
	r->dirty_frames = gpaset_count(&t->s->dirty, t->limit);
}

int vm_shm_stats(struct vm_shm *s, uint64_t limit, struct vm_shm_stats *ret)
{
	*ret = (struct vm_shm_stats){};
	return busguard_run(do_stats, &(struct touch){.s = s, .limit = limit, .stats = ret});
}
