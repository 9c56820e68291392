/* SPDX-License-Identifier: MIT */
/*
 * pagemap: the kernel's page tables as a source: PAGEMAP_SCAN over mappings that a
 * userfaultfd write-protects asynchronously.  Enter: pages of a mapping written since they
 * were last protected, whoever wrote through that mapping; leave: bits in every set.
 *
 * Two uses.  As sources[0] it watches the VMM's mapping, which KVM uses too: it sees
 * vCPUs and devices alike.  Behind another source it finds what that cannot see, the
 * VMM's own writes: then KVM gets a second mapping of the same file (block.alias) and only
 * the VMM's is watched, since protecting a mapping makes KVM drop what it derived from it,
 * 10 µs a page to make again.
 *
 * Invariants
 *   P1  Only a pause protects.  A device's page is pinned when its I/O is submitted, and
 *       with that "written"; protect it then, let the device write: nobody is told,
 *       since it does not write through the mapping.  At a pause no I/O is in flight
 *       (quiesce).  A harvest between pauses looks without protecting: whatever it tells
 *       is told again by the pause.
 *   P2  What a mapping knows is in its page tables, not here.  A slot that comes back
 *       over the same mapping finds it as it was; a mapping that is new, or replaced
 *       behind our back, is written as a whole.
 *   P3  When a slot goes the VMM may unmap its memory: it is looked at once more, after
 *       KVM has let it go.
 *   P4  A block of RAM is protected when it is told, since no I/O is in flight into it yet
 *       (agent.h).  The sets hold all of it then; unprotected, each of its pages would be
 *       told once more by the first pause, which would have to copy them all.
 *
 * Not seen: writes through other mappings, write(2) to the file, and discards; those
 * are marked (agent.h).  A scan costs by what is mapped, 0.3 to 3 ms/GiB.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent/vm.h"
#include "snapd/util/pagemap_scan.h"

#define FEATURES \
	(UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
#define VEC_LEN 1024u

/* ---- attaching ---- */

static int scan(struct snapd_vm *vm, struct pm_scan_arg *arg)
{
	int n;

	do
		n = ioctl(vm->pagemap.fd, PAGEMAP_SCAN, arg);
	while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

static int open_all(struct snapd_vm *vm)
{
	struct uffdio_api api = {.api = UFFD_API, .features = FEATURES};
	struct pm_scan_arg none = {.size = sizeof(none)};
	struct pagemap_source *p = &vm->pagemap;

	p->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	if (p->uffd < 0 || ioctl(p->uffd, UFFDIO_API, &api) < 0)
		return -errno;
	p->fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	return p->fd < 0 ? -errno : scan(vm, &none);
}

static int pagemap_attach(struct snapd_vm *vm, struct err *e)
{
	int r = open_all(vm);

	if (vm->sources[0] == &pagemap_ops)
		vm->ring_entries = 0;
	if (r < 0)
		return err_set(e, ENOTSUP,
			       "this kernel does not tell which pages were written: PAGEMAP_SCAN "
			       "and asynchronous userfaultfd write-protection (Linux 6.7): %s",
			       strerror(-r));
	vm->pagemap.vec = malloc(VEC_LEN * sizeof(*vm->pagemap.vec));
	return vm->pagemap.vec ? 0 : err_set(e, ENOMEM, "no memory for scans");
}

static void pagemap_detach(struct snapd_vm *vm)
{
	cleanup_fd(&vm->pagemap.uffd); /* every mapping is as it was before */
	cleanup_fd(&vm->pagemap.fd);
	free(vm->pagemap.vec);
	free(vm->pagemap.regions);
}

/* ---- harvesting ---- */

/* P4.  Where it fails the first pause protects. */
static void protect(struct snapd_vm *vm, const struct snapd_ram *r)
{
	struct uffdio_writeprotect wp = {.range = {(uintptr_t)r->hva, r->size_bytes},
					 .mode = UFFDIO_WRITEPROTECT_MODE_WP};

	(void)ioctl(vm->pagemap.uffd, UFFDIO_WRITEPROTECT, &wp);
}

static void publish(struct snapd_vm *vm, const struct watched *w, int n)
{
	uint64_t total = 0;

	for (int i = 0; i < n; i++) {
		const struct page_region *r = &vm->pagemap.vec[i];
		uint64_t first = (r->start - (uintptr_t)w->hva) >> vm->page_shift;
		uint64_t pages = (r->end - r->start) >> vm->page_shift;

		each_set_add_host(vm, w->first_frame + first, pages);
		total += pages;
	}
	count(&vm->shm->harvested, total);
	count(&vm->shm->published, total);
}

static int watch(struct snapd_vm *vm, void *hva, uint64_t len_bytes)
{
	struct uffdio_register reg = {.range = {(uintptr_t)hva, len_bytes},
				      .mode = UFFDIO_REGISTER_MODE_WP};

	return ioctl(vm->pagemap.uffd, UFFDIO_REGISTER, &reg) < 0 ? -errno : 0;
}

/* P2.  The mapping is not the one that was watched: all of it, and watch the new one. */
static void lost(struct snapd_vm *vm, const struct watched *w)
{
	count(&vm->shm->unresolved, 1);
	each_set_add_host(vm, w->first_frame, w->nr_pages);
	(void)watch(vm, w->hva, w->nr_pages << vm->page_shift); /* fails: lost again next time */
}

static void look_at(struct snapd_vm *vm, const struct watched *w, bool protect)
{
	struct pm_scan_arg arg = {
		.size = sizeof(arg),
		.flags = PM_SCAN_CHECK_WPASYNC | (protect ? PM_SCAN_WP_MATCHING : 0),
		.start = (uintptr_t)w->hva,
		.end = (uintptr_t)w->hva + (w->nr_pages << vm->page_shift),
		.vec = (uintptr_t)vm->pagemap.vec,
		.vec_len = VEC_LEN,
		.category_mask = PAGE_IS_WRITTEN,
		.return_mask = PAGE_IS_WRITTEN,
	};

	while (arg.start < arg.end) {
		int n = scan(vm, &arg);

		if (n < 0) {
			lost(vm, w);
			return;
		}
		publish(vm, w, n);
		arg.start = arg.walk_end;
	}
}

static int look_at_all(struct snapd_vm *vm, bool protect)
{
	for (size_t i = 0; i < vm->pagemap.nr; i++)
		look_at(vm, &vm->pagemap.regions[i], protect);
	return 0;
}

static int pagemap_harvest(struct snapd_vm *vm)
{
#ifdef SNAPD_ABLATION_PROTECT_WHILE_RUNNING
	return look_at_all(vm, true); /* what P1 forbids */
#else
	return look_at_all(vm, false);
#endif
}

static int pagemap_pause(struct snapd_vm *vm)
{
	return look_at_all(vm, true);
}

/* ---- slots ---- */

static int compare_hva(const void *a, const void *b)
{
	const struct watched *x = a, *y = b;

	return x->hva < y->hva ? -1 : x->hva > y->hva;
}

/* Several slots may show one mapping: each page once. */
static size_t drop_repeats(struct watched *w, size_t nr, uint32_t page_shift)
{
	const char *end = NULL;
	size_t out = 0;

	for (size_t i = 0; i < nr; i++) {
		uint64_t skip = end > w[i].hva ? (uint64_t)(end - w[i].hva) >> page_shift : 0;

		if (skip >= w[i].nr_pages)
			continue;
		w[out] = (struct watched){w[i].hva + (skip << page_shift), w[i].nr_pages - skip,
					  w[i].first_frame + skip};
		end = w[out].hva + (w[out].nr_pages << page_shift);
		out++;
	}
	return out;
}

static void append_runs(struct snapd_vm *vm, const char *hva, const struct slot_run *runs,
			uint32_t nr_runs, struct watched *w, size_t *nr)
{
	for (uint32_t i = 0; i < nr_runs; i++)
		w[(*nr)++] = (struct watched){(char *)hva + (runs[i].offset << vm->page_shift),
					      runs[i].nr_frames, runs[i].first_frame};
}

/* Private memory is the VMM's to watch. */
static bool is_watched(const struct view *v)
{
	return v->nr_runs && !(v->m.flags & SNAPD_SLOT_PRIVATE);
}

static void append_view(struct snapd_vm *vm, const struct view *v, struct watched *w, size_t *nr)
{
	if (is_watched(v))
		append_runs(vm, v->m.hva, v->runs, v->nr_runs, w, nr);
}

/* The blocks, what the slots of now show, and a slot that is about to come, or NULL. */
static int regions_renew(struct snapd_vm *vm, const struct view *coming)
{
	size_t nr = coming ? coming->nr_runs : 0;
	struct watched *w;

	for (size_t i = 0; i < vm->nr_rams; i++)
		nr += vm->rams[i].nr_runs;
	for (size_t i = 0; i < vm->nr_views; i++)
		nr += vm->views[i].nr_runs;
	w = calloc(MAX(nr, (size_t)1), sizeof(*w));
	if (!w)
		return -ENOMEM;
	nr = 0;
	if (coming)
		append_view(vm, coming, w, &nr);
	for (size_t i = 0; i < vm->nr_rams; i++)
		append_runs(vm, vm->rams[i].r.hva, vm->rams[i].runs, vm->rams[i].nr_runs, w, &nr);
	for (size_t i = 0; i < vm->nr_views; i++)
		append_view(vm, &vm->views[i], w, &nr);
	qsort(w, nr, sizeof(*w), compare_hva);
	nr = drop_repeats(w, nr, vm->page_shift);
	pthread_mutex_lock(&vm->harvest_lock);
	free(vm->pagemap.regions);
	vm->pagemap.regions = w;
	vm->pagemap.nr = nr;
	pthread_mutex_unlock(&vm->harvest_lock);
	return 0;
}

static int pagemap_slot_adding(struct snapd_vm *vm, const struct view *v, struct err *e)
{
	int r;

	if (!is_watched(v))
		return 0;
	r = watch(vm, v->m.hva, v->m.size_bytes);
	if (r < 0)
		return err_errno(e, -r, "slot %u: userfaultfd cannot watch its memory", v->m.slot);
	r = regions_renew(vm, v);
	return r < 0 ? err_set(e, ENOMEM, "no memory to watch slot %u", v->m.slot) : 0;
}

static void pagemap_slot_cancelled(struct snapd_vm *vm, const struct view *v)
{
	(void)regions_renew(vm, NULL);
}

/* P3: the VMM may unmap it now. */
static void look_once_more(struct snapd_vm *vm, const struct view *v)
{
#ifndef SNAPD_ABLATION_NO_LOOK_AFTER_DELETE
	for (uint32_t i = 0; i < v->nr_runs; i++) {
		const struct slot_run *r = &v->runs[i];
		const struct watched w = {(char *)v->m.hva + (r->offset << vm->page_shift),
					  r->nr_frames, r->first_frame};

		look_at(vm, &w, false);
	}
#endif
}

/* Without memory for a new list the old one stands: it only knows too much. */
static void pagemap_slot_deleted(struct snapd_vm *vm, const struct view *v, int result)
{
	if (!is_watched(v) || result < 0)
		return;
	pthread_mutex_lock(&vm->harvest_lock);
	look_once_more(vm, v);
	pthread_mutex_unlock(&vm->harvest_lock);
	(void)regions_renew(vm, NULL);
}

/* The block is in vm.rams already. */
static int pagemap_ram_adding(struct snapd_vm *vm, const struct ram *ram, struct err *e)
{
	int r = watch(vm, ram->r.hva, ram->r.size_bytes);

	if (r < 0)
		return err_errno(e, -r, "userfaultfd cannot watch a block of RAM");
	protect(vm, &ram->r);
	r = regions_renew(vm, NULL);
	return r < 0 ? err_set(e, ENOMEM, "no memory to watch a block of RAM") : 0;
}

/* And in vm.rams no more. */
static void pagemap_ram_gone(struct snapd_vm *vm, const struct ram *ram)
{
	(void)regions_renew(vm, NULL);
}

const struct dirty_ops pagemap_ops = {
	.backend = SNAPD_DIRTY_PAGEMAP,
	.attach = pagemap_attach,
	.detach = pagemap_detach,
	.slot_adding = pagemap_slot_adding,
	.slot_cancelled = pagemap_slot_cancelled,
	.slot_deleted = pagemap_slot_deleted,
	.ram_adding = pagemap_ram_adding,
	.ram_gone = pagemap_ram_gone,
	.harvest = pagemap_harvest,
	.pause = pagemap_pause,
};
