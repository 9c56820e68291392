/* SPDX-License-Identifier: MIT */
/*
 * devices: in-kernel devices that the VMM handed over, whose state only their own
 * descriptors give (arm64's interrupt controllers).  Enter: descriptors, from any
 * thread; leave: the VM as arch_ops.vm_save and .vm_load want it, on the connection
 * thread.  The list only grows: an entry is complete before nr_devices counts it.
 */
#include "agent/vm.h"

#include <errno.h>

static bool is_known(const struct arch_ops *arch, uint32_t type)
{
	for (uint32_t i = 0; i < arch->nr_devices; i++)
		if (arch->devices[i] == type)
			return true;
	return false;
}

int snapd_vm_device(struct snapd_vm *vm, uint32_t type, int device_fd)
{
	uint32_t n;
	int r = 0;

	err_clear(&agent_err);
	if (!is_known(vm->arch, type))
		return err_set(&agent_err, EOPNOTSUPP, "%s has no device of type %u to save",
			       vm->arch->name, type);
	pthread_mutex_lock(&vm->slots_lock);
	n = atomic_load(&vm->nr_devices);
	if (n == SNAPD_DEVICES_MAX) {
		r = err_set(&agent_err, ENOSPC, "more than %u devices", SNAPD_DEVICES_MAX);
	} else {
		vm->devices[n] = (struct arch_device){.type = type, .fd = device_fd};
		atomic_store(&vm->nr_devices, n + 1);
	}
	pthread_mutex_unlock(&vm->slots_lock);
	return r;
}

struct arch_vm arch_vm_whole(struct snapd_vm *vm)
{
	struct arch_vm whole = vm->kvm;

	whole.nr_vcpus = atomic_load(&vm->nr_vcpus);
	whole.vcpu_fds = vm->vcpu_fds;
	whole.nr_devices = atomic_load(&vm->nr_devices);
	whole.devices = vm->devices;
	return whole;
}
