/* SPDX-License-Identifier: MIT */
/*
 * ram: blocks of RAM that the VMM tells of as a whole.  Enter: mappings of RAM files;
 * leave: one piece for all of a block that no slot has shown yet, and a mapping
 * for the sources that watch any.  Any thread, under slots_lock.
 *
 * A firmware shows and hides RAM under ROM and video memory, so that what slots have
 * shown differs from boot to boot; the blocks do not.  A slot over a block that was told
 * finds its pieces there.
 */
#include "agent/vm.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

static struct ram *ram_find(struct snapd_vm *vm, const void *hva)
{
	for (size_t i = 0; i < vm->nr_rams; i++)
		if (vm->rams[i].r.hva == hva)
			return &vm->rams[i];
	return NULL;
}

static bool overlaps(const struct snapd_ram *a, const struct snapd_ram *b)
{
	uintptr_t x = (uintptr_t)a->hva, y = (uintptr_t)b->hva;

	return x < y + b->size_bytes && y < x + a->size_bytes;
}

static int ram_check(struct snapd_vm *vm, const struct snapd_ram *r, struct err *e)
{
	if ((r->size_bytes | (uintptr_t)r->hva | r->fd_offset) % vm->page_size || !r->hva ||
	    !r->size_bytes || (uintptr_t)r->hva + r->size_bytes < (uintptr_t)r->hva)
		return err_set(e, EINVAL,
			       "a block of 0x%" PRIx64 " bytes at host %p: not page aligned",
			       r->size_bytes, r->hva);
	for (size_t i = 0; i < vm->nr_rams; i++)
		if (overlaps(r, &vm->rams[i].r))
			return err_set(e, EEXIST, "host %p is of a block that was told already",
				       r->hva);
	return 0;
}

/* As the slot that would show all of it: where no GPA is meant, in an address space whose
 * GPAs name nothing. */
static struct snapd_memslot slot_of(const struct snapd_vm *vm, const struct snapd_ram *r)
{
	bool placed = r->gpa != UINT64_MAX && r->gpa % vm->page_size == 0;

	return (struct snapd_memslot){
		.slot = (uint32_t)vm->nr_rams,
		.as_id = placed ? 0 : 1,
		.gpa = placed ? r->gpa : 0,
		.size_bytes = r->size_bytes,
		.hva = r->hva,
		.fd = r->fd,
		.fd_offset = r->fd_offset,
	};
}

static int ram_add(struct snapd_vm *vm, const struct snapd_ram *r, struct err *e)
{
	const struct snapd_memslot m = slot_of(vm, r);
	struct ram ram = {.r = *r};
	int ret = ram_check(vm, r, e);

	if (ret >= 0)
		ret = backing_check(vm, &m, e);
	if (ret < 0)
		return ret;
	if (!GROW(vm->rams, vm->nr_rams, vm->cap_rams))
		return err_set(e, ENOMEM, "no memory for a block of RAM");
	ret = backing_resolve(vm, &m, &ram.block, &ram.runs, &ram.nr_runs, e);
	if (ret < 0)
		return ret;
	ram.r.fd = vm->blocks[ram.block].fd;
	vm->rams[vm->nr_rams++] = ram;
	ret = sources_ram_adding(vm, &ram, e);
	if (ret < 0) {
		vm->nr_rams--;
		sources_ram_gone(vm, &ram);
		free(ram.runs);
	}
	return ret;
}

int snapd_vm_ram(struct snapd_vm *vm, const struct snapd_ram *ram)
{
	int r;

	err_clear(&agent_err);
	pthread_mutex_lock(&vm->slots_lock);
	slots_wait(vm);
	r = ram_add(vm, ram, &agent_err);
	pthread_mutex_unlock(&vm->slots_lock);
	wake_fd(vm->conn_wake);
	return r;
}

static int ram_drop(struct snapd_vm *vm, const void *hva, struct err *e)
{
	struct ram *r = ram_find(vm, hva), gone;

	if (!r)
		return err_set(e, ENOENT, "no block of RAM begins at host %p", hva);
	gone = *r;
	*r = vm->rams[--vm->nr_rams];
	sources_ram_gone(vm, &gone);
	backing_unplug_runs(vm, gone.runs, gone.nr_runs);
	free(gone.runs);
	return 0;
}

int snapd_vm_ram_gone(struct snapd_vm *vm, const void *hva)
{
	int r;

	err_clear(&agent_err);
	pthread_mutex_lock(&vm->slots_lock);
	slots_wait(vm);
	r = ram_drop(vm, hva, &agent_err);
	pthread_mutex_unlock(&vm->slots_lock);
	wake_fd(vm->conn_wake);
	return r;
}

void rams_deinit(struct snapd_vm *vm)
{
	for (size_t i = 0; i < vm->nr_rams; i++)
		free(vm->rams[i].runs);
	free(vm->rams);
}
