/* SPDX-License-Identifier: MIT */
/*
 * slots: the VMM's memslot calls → KVM's, under kernel slot ids of our own.  Any
 * thread.
 *
 * A slot is added in this order: the generation's entry is in the table before
 * KVM can push for it; it is deleted in this one: KVM first, then the entry is
 * marked dead.  Ids come back at a pass of all rings only (harvest.h), so an
 * entry always means the generation that pushed it (I3).
 */
#include "agent/vm.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct view *view_find(struct snapd_vm *vm, uint32_t as_id, uint32_t slot)
{
	for (size_t i = 0; i < vm->nr_views; i++)
		if (vm->views[i].m.slot == slot && vm->views[i].m.as_id == as_id)
			return &vm->views[i];
	return NULL;
}

/* ---- KVM's slots ---- */

static int kvm_set_slot_flags(struct snapd_vm *vm, const struct view *v, uint64_t size_bytes,
			      uint32_t flags)
{
	struct kvm_userspace_memory_region region = {
		.slot = (uint32_t)v->m.as_id << 16 | v->kernel_id,
		.flags = flags,
		.guest_phys_addr = v->m.gpa,
		.memory_size = size_bytes,
		.userspace_addr = (uintptr_t)v->kvm_hva,
	};

	return vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region);
}

static int kvm_set_slot(struct snapd_vm *vm, const struct view *v, uint64_t size_bytes)
{
	uint32_t log = vm->kvm_logs ? KVM_MEM_LOG_DIRTY_PAGES : 0;

	return kvm_set_slot_flags(vm, v, size_bytes,
				  v->m.flags & SNAPD_SLOT_READONLY ? KVM_MEM_READONLY : log);
}

/* Logging off and on again write-protects a whole slot; nothing may write between. */
int slots_reprotect(struct snapd_vm *vm)
{
	int r = 0;

	for (size_t i = 0; i < vm->nr_views && r >= 0; i++) {
		const struct view *v = &vm->views[i];

		if (v->m.flags & SNAPD_SLOT_READONLY)
			continue;
		r = kvm_set_slot_flags(vm, v, v->m.size_bytes, 0);
		if (r >= 0)
			r = kvm_set_slot(vm, v, v->m.size_bytes);
	}
	return r;
}

#ifdef SNAPD_ABLATION_PUBLISH_BEFORE_DRAIN
/* What I3 forbids: the VMM's id is the kernel's, and means the new slot while
 * rings hold entries of the old one. */
static int table_add(struct snapd_vm *vm, struct view *v)
{
	v->kernel_id = v->m.slot;
	if (v->m.slot >= vm->table.nr_ids)
		return -EINVAL;
	pthread_mutex_lock(&vm->harvest_lock);
	slot_table_overwrite(&vm->table, v->m.as_id, v->kernel_id,
			     v->m.size_bytes >> vm->page_shift, v->runs, v->nr_runs);
	pthread_mutex_unlock(&vm->harvest_lock);
	return 0;
}

static void table_kill(struct snapd_vm *vm, const struct view *v)
{
}

static void table_cancel(struct snapd_vm *vm, const struct view *v)
{
}
#else
/* For whoever reads the rings when this process is dead. */
static void table_show(struct snapd_vm *vm, const struct view *v, uint32_t id)
{
	bool is_one = v->nr_runs == 1;

	vm->shown_slots[v->m.as_id * vm->table.nr_ids + id] =
		(struct snapd_shm_slot){.nr_pages = is_one ? v->runs[0].nr_frames : 0,
					.first_frame = is_one ? v->runs[0].first_frame : 0};
}

static int table_try_add(struct snapd_vm *vm, const struct view *v)
{
	int id;

	pthread_mutex_lock(&vm->harvest_lock);
	id = slot_table_add(&vm->table, v->m.as_id, v->m.size_bytes >> vm->page_shift, v->runs,
			    v->nr_runs);
	if (id >= 0)
		table_show(vm, v, (uint32_t)id);
	pthread_mutex_unlock(&vm->harvest_lock);
	return id;
}

static int table_add(struct snapd_vm *vm, struct view *v)
{
	int id = table_try_add(vm, v);

	if (id == -ENOSPC) { /* all ids wait for a pass */
		reap(vm);
		id = table_try_add(vm, v);
	}
	if (id >= 0)
		v->kernel_id = (uint32_t)id;
	return MIN(id, 0);
}

static void table_kill(struct snapd_vm *vm, const struct view *v)
{
	pthread_mutex_lock(&vm->harvest_lock);
	slot_table_kill(&vm->table, v->m.as_id, v->kernel_id);
	pthread_mutex_unlock(&vm->harvest_lock);
}

static void table_cancel(struct snapd_vm *vm, const struct view *v)
{
	pthread_mutex_lock(&vm->harvest_lock);
	slot_table_cancel(&vm->table, v->m.as_id, v->kernel_id);
	pthread_mutex_unlock(&vm->harvest_lock);
}
#endif

/* Where nothing is mapped: right behind the last slot. */
static uint64_t free_gpa(const struct snapd_vm *vm)
{
	uint64_t end = 1ull << 20;

	for (size_t i = 0; i < vm->nr_views; i++)
		end = MAX(end, vm->views[i].m.gpa + vm->views[i].m.size_bytes);
	return end;
}

/* With SLOT_ZAP_ALL in force, a slot that comes and goes drops every shadow page:
 * those that the service made stale by writing page tables behind KVM's back. */
int shadow_zap_all(struct snapd_vm *vm, struct err *e)
{
	struct view v = {.m = {.slot = vm->table.nr_ids - 1,
			       .gpa = free_gpa(vm),
			       .size_bytes = vm->page_size,
			       .fd = -1}};
	int r = -EEXIST;

	v.m.hva = mmap(NULL, vm->page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		       0);
	v.kvm_hva = v.m.hva;
	if (v.m.hva == MAP_FAILED)
		return err_errno(e, errno, "no memory for a passing slot");
	/* KVM keeps a few slots of its own: step over them. */
	for (int tries = 0; tries < 64 && r == -EEXIST; tries++, v.m.gpa += vm->page_size) {
		r = table_add(vm, &v);
		if (r < 0)
			break;
		r = kvm_set_slot(vm, &v, vm->page_size);
		if (r < 0)
			table_cancel(vm, &v);
	}
	if (r >= 0) {
		r = kvm_set_slot(vm, &v, 0);
		table_kill(vm, &v);
	}
	munmap(v.m.hva, vm->page_size);
	return r < 0 ? err_errno(e, -r, "cannot drop stale shadow pages") : 0;
}

static int slot_check(const struct snapd_vm *vm, const struct snapd_memslot *m, struct err *e)
{
	if (m->as_id >= vm->address_spaces)
		return err_set(e, EINVAL, "slot %u: this KVM has no address space %u", m->slot,
			       m->as_id);
	if (m->flags & ~(SNAPD_SLOT_READONLY | SNAPD_SLOT_GONE | SNAPD_SLOT_PRIVATE))
		return err_set(e, EINVAL, "slot %u: unknown flags 0x%x", m->slot, m->flags);
	if (m->flags & SNAPD_SLOT_PRIVATE && (!vm->vmm_state || m->flags & SNAPD_SLOT_READONLY))
		return err_set(
			e, EINVAL,
			"slot %u: PRIVATE is for what is written, and goes with the state of "
			"a VMM (SNAPD_ATTACH_VMM_STATE)",
			m->slot);
	if (!m->size_bytes)
		return 0;
	if (m->flags & SNAPD_SLOT_GONE)
		return err_set(e, EINVAL, "slot %u: GONE is for deleting", m->slot);
	if ((m->gpa | m->size_bytes | (uintptr_t)m->hva) % vm->page_size || !m->hva ||
	    m->gpa + m->size_bytes < m->gpa || m->size_bytes >> vm->page_shift > UINT32_MAX)
		return err_set(e, EINVAL,
			       "slot %u: 0x%" PRIx64 " bytes at GPA 0x%" PRIx64 ", host %p: not "
			       "page aligned, or too large",
			       m->slot, m->size_bytes, m->gpa, m->hva);
	return 0;
}

static int slot_check_free(struct snapd_vm *vm, const struct snapd_memslot *m, struct err *e)
{
	if (view_find(vm, m->as_id, m->slot))
		return err_set(e, EEXIST, "slot %u exists: delete it first", m->slot);
	for (size_t i = 0; i < vm->nr_views; i++) {
		const struct snapd_memslot *o = &vm->views[i].m;

		if (o->as_id == m->as_id && o->gpa < m->gpa + m->size_bytes &&
		    m->gpa < o->gpa + o->size_bytes)
			return err_set(e, EEXIST, "slot %u overlaps slot %u at GPA 0x%" PRIx64,
				       m->slot, o->slot, MAX(o->gpa, m->gpa));
	}
	return 0;
}

static bool same_rom(const struct snapd_memslot *a, const struct snapd_memslot *b)
{
	return a->as_id == b->as_id && a->gpa == b->gpa && a->size_bytes == b->size_bytes;
}

/* A rollback may have to bring back ROM whose slot is gone: keep where it was. */
static int rom_remember(struct snapd_vm *vm, const struct view *v, struct err *e)
{
	size_t i;

	for (i = 0; i < vm->nr_roms && !same_rom(&vm->roms[i].m, &v->m); i++)
		;
	if (i == vm->nr_roms) {
		if (!GROW(vm->roms, vm->nr_roms, vm->cap_roms))
			return err_set(e, ENOMEM, "no memory for slot %u", v->m.slot);
		vm->nr_roms++;
	}
	vm->roms[i] = *v;
	return 0;
}

static int view_back(struct snapd_vm *vm, struct view *v, struct err *e)
{
	int r;

	if (v->m.flags & SNAPD_SLOT_READONLY && v->m.fd < 0)
		return vm->vmm_state ? 0 : rom_remember(vm, v, e);
	r = v->m.flags & SNAPD_SLOT_PRIVATE ? 0 : backing_check(vm, &v->m, e);
	if (r >= 0)
		r = backing_resolve(vm, &v->m, &v->block, &v->runs, &v->nr_runs, e);
	if (r < 0)
		return r;
	v->m.fd = vm->blocks[v->block].fd;
	r = backing_for_kvm(vm, v->block, &v->m, &v->kvm_hva, e);
	if (r < 0)
		free(v->runs);
	return r;
}

int view_add(struct snapd_vm *vm, const struct snapd_memslot *m, struct err *e)
{
	struct view v = {.m = *m, .kvm_hva = m->hva};
	int r = slot_check_free(vm, m, e);

	if (r < 0)
		return r;
	if (!GROW(vm->views, vm->nr_views, vm->cap_views))
		return err_set(e, ENOMEM, "no memory for slot %u", m->slot);
	r = view_back(vm, &v, e);
	if (r < 0)
		return r;
	r = table_add(vm, &v);
	if (r < 0) {
		free(v.runs);
		return err_errno(e, -r, "slot %u: no kernel slot id", m->slot);
	}
	r = sources_slot_adding(vm, &v, e);
	if (r >= 0) {
		r = kvm_set_slot(vm, &v, m->size_bytes);
		if (r < 0)
			err_errno(e, -r, "KVM refused slot %u", m->slot);
	}
	if (r < 0) {
		sources_slot_cancelled(vm, &v);
		table_cancel(vm, &v);
		free(v.runs);
		return r;
	}
	vm->views[vm->nr_views++] = v;
	gpamap_show(vm, &v);
	count(&vm->shm->slot_changes, 1);
	return 0;
}

int view_delete(struct snapd_vm *vm, struct view *v, struct err *e)
{
	struct view gone = *v;
	int r;

	sources_slot_deleting(vm, &gone);
	r = kvm_set_slot(vm, v, 0);
	if (r >= 0) {
		table_kill(vm, v);
		*v = vm->views[--vm->nr_views];
	}
	sources_slot_deleted(vm, &gone, r);
	if (r < 0)
		return err_errno(e, -r, "KVM did not delete slot %u", gone.m.slot);
	gpamap_hide(vm, &gone);
	free(gone.runs);
	count(&vm->shm->slot_changes, 1);
	return 0;
}

static int slot_delete(struct snapd_vm *vm, const struct snapd_memslot *m, struct err *e)
{
	struct view *v = view_find(vm, m->as_id, m->slot), copy;
	int r;

	if (!v)
		return err_set(e, ENOENT, "no slot %u", m->slot);
	copy = *v;
	copy.runs = malloc(MAX(copy.nr_runs, 1u) * sizeof(*copy.runs));
	if (!copy.runs)
		return err_set(e, ENOMEM, "no memory to delete slot %u", m->slot);
	if (copy.nr_runs)
		memcpy(copy.runs, v->runs, copy.nr_runs * sizeof(*copy.runs));
	quirk_count_delete(vm);
	r = view_delete(vm, v, e);
	if (r >= 0 && m->flags & SNAPD_SLOT_GONE)
		backing_unplug(vm, &copy);
	free(copy.runs);
	return r;
}

void slots_wait(struct snapd_vm *vm)
{
	while (vm->slots_frozen && !on_vcpu_thread(vm))
		pthread_cond_wait(&vm->slots_thawed, &vm->slots_lock);
}

int snapd_vm_memslot(struct snapd_vm *vm, const struct snapd_memslot *slot)
{
	int r;

	err_clear(&agent_err);
	r = slot_check(vm, slot, &agent_err);
	if (r < 0)
		return r;
	pthread_mutex_lock(&vm->slots_lock);
	slots_wait(vm);
	r = slot->size_bytes ? view_add(vm, slot, &agent_err) : slot_delete(vm, slot, &agent_err);
	pthread_mutex_unlock(&vm->slots_lock);
	wake_fd(vm->conn_wake); /* new pieces to tell, or gone ones */
	return r;
}

void slots_freeze(struct snapd_vm *vm, bool frozen)
{
	pthread_mutex_lock(&vm->slots_lock);
	vm->slots_frozen = frozen;
	if (!frozen)
		pthread_cond_broadcast(&vm->slots_thawed);
	pthread_mutex_unlock(&vm->slots_lock);
}

void slots_deinit(struct snapd_vm *vm)
{
	for (size_t i = 0; i < vm->nr_views; i++)
		free(vm->views[i].runs);
	rams_deinit(vm);
	free(vm->views);
	free(vm->roms);
	free(vm->mapped.r);
	free(vm->holes.r);
}
