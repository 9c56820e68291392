/* SPDX-License-Identifier: MIT */
/*
 * writers: guest memory that is written by someone without a dirty ring.  Enter: what
 * the VMM tells, what devices log, what KVM logs in backup bitmaps; leave: bits in
 * every set.
 *
 *   marks        the VMM wrote, and says so; by GPA, or by file and offset
 *   discards     the VMM gave memory back to the host: it reads as zeros from now on.
 *                Dirty like any other write.  The frame is also a hint for the
 *                service: look for a hole in the file before touching the page, which
 *                would allocate it again.  A hint is never taken for the truth: the
 *                guest may have written the page since, or the discard may have freed
 *                nothing (MADV_DONTNEED on a shared mapping).
 *   device logs  a bitmap by GPA in shared memory, which a device sets bits in after
 *                it wrote (vhost, vhost-user)
 *   backup bitmaps  KVM itself writes without a vCPU: arm64's interrupt controller
 *                tables (KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP)
 *
 * Invariants
 *   D1  A log's bits are taken by an atomic exchange: a bit that a device sets
 *       meanwhile is in what was taken or stays in the log.
 *   D2  Taking and publishing are one step under harvest_lock: whoever has collected
 *       knows that no bit taken by another thread is still to be published.
 *   D3  Bits by GPA become frames before the memory at that GPA changes (gpamap.c).
 *   D4  Nobody here needs room in a ring, and no vCPU waits for anybody here: a ring
 *       that is full is cured without looking at logs.  A mark may wait for a memslot
 *       change under way, a device that logs for nothing.
 */
#include "agent/vm.h"

#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* A bit of a device log is so much, whatever the host's page (vhost.h, VHOST_PAGE_SIZE). */
#define LOG_PAGE_SHIFT 12u
#define LOG_GPA_MAX    (1ull << 52)

/* ---- marks and discards ---- */

/* [gpa, gpa + len_bytes) as GFNs. */
static int gfns_of(const struct snapd_vm *vm, uint64_t gpa, uint64_t len_bytes, uint64_t *gfn,
		   uint64_t *end)
{
	err_clear(&agent_err);
	if (gpa + (len_bytes - 1) < gpa)
		return err_set(&agent_err, EINVAL, "range 0x%" PRIx64 "+0x%" PRIx64 " wraps", gpa,
			       len_bytes);
	*gfn = gpa >> vm->page_shift;
	*end = ((gpa + (len_bytes - 1)) >> vm->page_shift) + 1;
	return 0;
}

int snapd_vm_mark_dirty(struct snapd_vm *vm, uint64_t gpa, uint64_t len_bytes)
{
	uint64_t gfn, end, marked;
	int r;

	if (!len_bytes)
		return 0;
	r = gfns_of(vm, gpa, len_bytes, &gfn, &end);
	if (r < 0)
		return r;
	pthread_rwlock_rdlock(&vm->map_lock);
	marked = gpamap_add_dirty(vm, gfn, end);
	pthread_rwlock_unlock(&vm->map_lock);
	count(&vm->shm->host_marks, marked);
	return 0;
}

/* The part of [page, end) of this file that a piece has, as frames.  slots_lock held. */
static void piece_mark(struct snapd_vm *vm, const struct piece *p, uint64_t page, uint64_t end,
		       bool discarded)
{
	uint64_t lo = MAX(page, p->block_page), hi = MIN(end, p->block_page + p->nr_frames);
	uint64_t first;

	if (lo >= hi)
		return;
	first = p->first_frame + (lo - p->block_page);
	if (discarded)
		gpaset_add_range(&vm->discarded, first, hi - lo);
	sets_add_range(vm, first, hi - lo);
	count(&vm->shm->host_marks, hi - lo);
}

static int mark_file(struct snapd_vm *vm, int fd, uint64_t offset, uint64_t len_bytes,
		     bool discarded)
{
	uint64_t page, end;
	struct stat st;
	int r;

	if (!len_bytes)
		return 0;
	r = gfns_of(vm, offset, len_bytes, &page, &end);
	if (r < 0)
		return r;
	if (fstat(fd, &st) < 0)
		return err_errno(&agent_err, errno, "descriptor %d", fd);
	pthread_mutex_lock(&vm->slots_lock);
	for (size_t i = 0; i < vm->nr_pieces; i++) {
		const struct piece *p = &vm->pieces[i];

		if (!p->gone && block_is(&vm->blocks[p->block], &st))
			piece_mark(vm, p, page, end, discarded);
	}
	pthread_mutex_unlock(&vm->slots_lock);
	return 0;
}

int snapd_vm_mark_file_dirty(struct snapd_vm *vm, int fd, uint64_t offset, uint64_t len_bytes)
{
	return mark_file(vm, fd, offset, len_bytes, false);
}

int snapd_vm_discarded(struct snapd_vm *vm, int fd, uint64_t offset, uint64_t len_bytes)
{
	if (ABLATED(DISCARD_UNTOLD))
		return 0;
	return mark_file(vm, fd, offset, len_bytes, true);
}

/* ---- device logs ---- */

int snapd_devlog_create(struct snapd_vm *vm, uint64_t gpa_end, struct snapd_devlog **ret,
			struct snapd_devlog_mem *mem)
{
	_cleanup_free_ struct snapd_devlog *log = calloc(1, sizeof(*log));
	_cleanup_fd_ int fd = memfd_create("snapd-devlog", MFD_CLOEXEC);
	size_t bytes;
	void *p;

	*ret = NULL;
	err_clear(&agent_err);
	if (!gpa_end || gpa_end > LOG_GPA_MAX)
		return err_set(&agent_err, EINVAL, "a log up to GPA 0x%" PRIx64, gpa_end);
	bytes = ALIGN_UP(DIV_ROUND_UP(gpa_end >> LOG_PAGE_SHIFT, 8ull) + 1, vm->page_size);
	if (!log || fd < 0 || ftruncate(fd, (off_t)bytes) < 0)
		return err_errno(&agent_err, errno, "cannot make a device log");
	p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		return err_errno(&agent_err, errno, "cannot map a device log");
	*log = (struct snapd_devlog){.vm = vm, .words = p, .nr_words = bytes / 8};
	*mem = (struct snapd_devlog_mem){.base = p, .len_bytes = bytes, .fd = fd};
	log->fd = steal_fd(&fd);
	pthread_rwlock_wrlock(&vm->map_lock);
	pthread_mutex_lock(&vm->harvest_lock);
	log->next = vm->devlogs;
	vm->devlogs = log;
	pthread_mutex_unlock(&vm->harvest_lock);
	pthread_rwlock_unlock(&vm->map_lock);
	*ret = steal_ptr(&log);
	return 0;
}

/* D1.  Bits of one word, as set by a device of any byte order that logs by bytes. */
static uint64_t word_take(_Atomic uint64_t *word)
{
	uint64_t v = atomic_load_explicit(word, memory_order_relaxed);

	if (!v)
		return 0;
	if (ABLATED(LOG_NOT_EXCHANGED)) {
		v = atomic_load(word);
		sched_yield(); /* the device sets another bit */
		atomic_store(word, 0);
	} else {
		v = atomic_exchange(word, 0);
	}
	return le64toh(v);
}

/* Runs of set bits of word `index` into the sets. */
static void word_publish(struct snapd_vm *vm, uint64_t index, uint64_t v)
{
	const unsigned int shift = vm->page_shift - LOG_PAGE_SHIFT;

	while (v) {
		unsigned int lo = (unsigned int)__builtin_ctzll(v);
		uint64_t rest = v >> lo;
		unsigned int n = ~rest ? (unsigned int)__builtin_ctzll(~rest) : 64;
		uint64_t first = index * 64 + lo;
		uint64_t marked =
			gpamap_add_dirty(vm, first >> shift, ((first + n - 1) >> shift) + 1);

		count(&vm->shm->host_marks, marked);
		v = lo + n < 64 ? v & (~0ull << (lo + n)) : 0;
	}
}

/* The words that can have bits of GFNs [r->gfn, + nr). */
static void range_collect(struct snapd_vm *vm, struct snapd_devlog *log, const struct gpa_range *r)
{
	const unsigned int shift = vm->page_shift - LOG_PAGE_SHIFT;
	uint64_t word = (r->gfn << shift) / 64,
		 end = DIV_ROUND_UP((r->gfn + r->nr) << shift, 64ull);

	for (end = MIN(end, (uint64_t)log->nr_words); word < end; word++)
		word_publish(vm, word, word_take(&log->words[word]));
}

static void log_collect(struct snapd_vm *vm, struct snapd_devlog *log)
{
	for (size_t i = 0; i < vm->mapped.nr; i++)
		range_collect(vm, log, &vm->mapped.r[i]);
	for (size_t i = 0; i < vm->holes.nr; i++)
		range_collect(vm, log, &vm->holes.r[i]);
}

void devlogs_collect_locked(struct snapd_vm *vm)
{
	pthread_mutex_lock(&vm->harvest_lock); /* D2 */
	for (struct snapd_devlog *log = vm->devlogs; log; log = log->next)
		log_collect(vm, log);
	pthread_mutex_unlock(&vm->harvest_lock);
}

void devlogs_collect(struct snapd_vm *vm)
{
	pthread_rwlock_rdlock(&vm->map_lock);
	devlogs_collect_locked(vm);
	pthread_rwlock_unlock(&vm->map_lock);
}

static void devlog_free(struct snapd_devlog *log)
{
	munmap((void *)log->words, log->nr_words * 8);
	close(log->fd);
	free(log);
}

void snapd_devlog_destroy(struct snapd_devlog *log)
{
	struct snapd_devlog **p;
	struct snapd_vm *vm;

	if (!log)
		return;
	vm = log->vm;
	pthread_rwlock_wrlock(&vm->map_lock);
	devlogs_collect_locked(vm);
	pthread_mutex_lock(&vm->harvest_lock);
	for (p = &vm->devlogs; *p && *p != log;)
		p = &(*p)->next;
	if (*p)
		*p = log->next;
	pthread_mutex_unlock(&vm->harvest_lock);
	pthread_rwlock_unlock(&vm->map_lock);
	devlog_free(log);
}

void devlogs_deinit(struct snapd_vm *vm)
{
	struct snapd_devlog *next;

	for (struct snapd_devlog *log = vm->devlogs; log; log = next) {
		next = log->next;
		devlog_free(log);
	}
	vm->devlogs = NULL;
}

/* ---- backup bitmaps ---- */

/* The part of [page, page + n) of a slot that a run has. */
static void run_publish(struct snapd_vm *vm, const struct slot_run *r, uint64_t page, uint64_t n)
{
	uint64_t lo = MAX(page, r->offset), hi = MIN(page + n, r->offset + r->nr_frames);

	if (lo < hi)
		each_set_add(vm, r->first_frame + (lo - r->offset), hi - lo);
}

static void bitmap_publish(struct snapd_vm *vm, const struct view *v, const uint64_t *words,
			   uint64_t nr_words)
{
	for (uint64_t w = 0; w < nr_words; w++)
		for (uint64_t bits = words[w]; bits; bits &= bits - 1)
			for (uint32_t i = 0; i < v->nr_runs; i++)
				run_publish(vm, &v->runs[i],
					    w * 64 + (uint64_t)__builtin_ctzll(bits), 1);
}

int backup_collect_view(struct snapd_vm *vm, const struct view *v)
{
	uint64_t nr_words = DIV_ROUND_UP(v->m.size_bytes >> vm->page_shift, 64ull);
	_cleanup_free_ uint64_t *words = NULL;
	struct kvm_dirty_log log = {.slot = (uint32_t)v->m.as_id << 16 | v->kernel_id};
	int r;

	if (!vm->backup_bitmap || !v->nr_runs || v->m.flags & SNAPD_SLOT_READONLY)
		return 0;
	words = calloc(nr_words, sizeof(*words));
	log.dirty_bitmap = words;
	r = words ? vm_ioctl(vm, KVM_GET_DIRTY_LOG, &log) : -ENOMEM;
	pthread_mutex_lock(&vm->harvest_lock);
	if (r < 0)
		each_set_add(vm, 0, frames_end(vm)); /* nothing is known any more */
	else
		bitmap_publish(vm, v, words, nr_words);
	pthread_mutex_unlock(&vm->harvest_lock);
	return r;
}

int backup_collect(struct snapd_vm *vm)
{
	int r = 0, first = 0;

	for (size_t i = 0; i < vm->nr_views; i++) {
		r = backup_collect_view(vm, &vm->views[i]);
		first = first < 0 ? first : r;
	}
	return first;
}
