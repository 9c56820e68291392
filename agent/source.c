/* SPDX-License-Identifier: MIT */
/* source: one call to every dirty source of a VM; see source.h for what each means. */
#include "agent/source.h"

#include <errno.h>

#include "agent/vm.h"

bool dirty_is_known(uint32_t backend)
{
	return backend <= SNAPD_DIRTY_PAGEMAP;
}

/* A ring costs by what was written, a bitmap by what there is. */
static const struct dirty_ops *choose(struct snapd_vm *vm)
{
	switch (vm->want_dirty) {
	case SNAPD_DIRTY_RING:
		return &ring_ops;
	case SNAPD_DIRTY_LOG:
		return &log_ops;
	case SNAPD_DIRTY_PAGEMAP:
		return &pagemap_ops;
	case SNAPD_DIRTY_AUTO:
		break;
	}
	return ring_is_there(vm) ? &ring_ops : &log_ops;
}

int sources_attach(struct snapd_vm *vm, struct err *e)
{
	vm->sources[vm->nr_sources++] = choose(vm);
	vm->kvm_logs = vm->sources[0] != &pagemap_ops;
	if (vm->track_host && vm->kvm_logs)
		vm->sources[vm->nr_sources++] = &pagemap_ops;
	vm->two_mappings = vm->nr_sources > 1;
	for (uint32_t i = 0; i < vm->nr_sources; i++) {
		int r = vm->sources[i]->attach(vm, e);

		if (r < 0)
			return r;
	}
	return 0;
}

void sources_detach(struct snapd_vm *vm)
{
	for (uint32_t i = 0; i < vm->nr_sources; i++)
		if (vm->sources[i]->detach)
			vm->sources[i]->detach(vm);
}

int sources_vcpu_attach(struct snapd_vcpu *v, struct err *e)
{
	int r = 0;

	for (uint32_t i = 0; i < v->vm->nr_sources && r >= 0; i++)
		if (v->vm->sources[i]->vcpu_attach)
			r = v->vm->sources[i]->vcpu_attach(v, e);
	return r;
}

void sources_vcpu_detach(struct snapd_vcpu *v)
{
	for (uint32_t i = 0; i < v->vm->nr_sources; i++)
		if (v->vm->sources[i]->vcpu_detach)
			v->vm->sources[i]->vcpu_detach(v);
}

int sources_slot_adding(struct snapd_vm *vm, const struct view *v, struct err *e)
{
	int r = 0;

	for (uint32_t i = 0; i < vm->nr_sources && r >= 0; i++)
		if (vm->sources[i]->slot_adding)
			r = vm->sources[i]->slot_adding(vm, v, e);
	return r;
}

void sources_slot_cancelled(struct snapd_vm *vm, const struct view *v)
{
	for (uint32_t i = 0; i < vm->nr_sources; i++)
		if (vm->sources[i]->slot_cancelled)
			vm->sources[i]->slot_cancelled(vm, v);
}

void sources_slot_deleting(struct snapd_vm *vm, const struct view *v)
{
	for (uint32_t i = 0; i < vm->nr_sources; i++)
		if (vm->sources[i]->slot_deleting)
			vm->sources[i]->slot_deleting(vm, v);
}

void sources_slot_deleted(struct snapd_vm *vm, const struct view *v, int result)
{
	for (uint32_t i = vm->nr_sources; i-- > 0;)
		if (vm->sources[i]->slot_deleted)
			vm->sources[i]->slot_deleted(vm, v, result);
}

int sources_ram_adding(struct snapd_vm *vm, const struct ram *ram, struct err *e)
{
	int r = 0;

	for (uint32_t i = 0; i < vm->nr_sources && r >= 0; i++)
		if (vm->sources[i]->ram_adding)
			r = vm->sources[i]->ram_adding(vm, ram, e);
	return r;
}

void sources_ram_gone(struct snapd_vm *vm, const struct ram *ram)
{
	for (uint32_t i = 0; i < vm->nr_sources; i++)
		if (vm->sources[i]->ram_gone)
			vm->sources[i]->ram_gone(vm, ram);
}

void sources_frames_gone(struct snapd_vm *vm, uint64_t first, uint64_t n)
{
	for (uint32_t i = 0; i < vm->nr_sources; i++)
		if (vm->sources[i]->frames_gone)
			vm->sources[i]->frames_gone(vm, first, n);
}

uint32_t sources_look(struct snapd_vm *vm)
{
	uint32_t fill = 0;

	for (uint32_t i = 0; i < vm->nr_sources; i++)
		if (vm->sources[i]->look)
			fill = MAX(fill, vm->sources[i]->look(vm));
	return fill;
}

bool sources_can_fill(const struct snapd_vm *vm)
{
	for (uint32_t i = 0; i < vm->nr_sources; i++)
		if (vm->sources[i]->look)
			return true;
	return false;
}

int sources_harvest(struct snapd_vm *vm, bool stopped)
{
	int ret = 0;

	for (uint32_t i = 0; i < vm->nr_sources; i++) {
		const struct dirty_ops *ops = vm->sources[i];
		int r = stopped && ops->pause ? ops->pause(vm) : ops->harvest(vm);

		if (ret >= 0)
			ret = r < 0 ? r : MAX(ret, r);
	}
	return ret;
}

int sources_full(struct snapd_vcpu *v)
{
	for (uint32_t i = 0; i < v->vm->nr_sources; i++)
		if (v->vm->sources[i]->full)
			return v->vm->sources[i]->full(v);
	return err_set(&agent_err, EIO, "vCPU %u: KVM has a full ring that nobody made", v->id);
}
