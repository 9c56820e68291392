/* SPDX-License-Identifier: MIT */
/* A VM on the simulated KVM under the agent; sim_vm.h tells. */
#include "tests/lib/sim_vm.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "tests/lib/check.h"
#include "tests/lib/fake_service.h"

/* One store a step.  A step may be run again: `at` moves on after its last access. */
static void step(struct simkvm_cpu *cpu, uint64_t rdi, void *opaque)
{
	struct sim_vm *vm = opaque;
	struct sim_vcpu *v = &vm->vcpus[rdi];

	if (v->at == v->nr) {
		simkvm_leave(cpu);
		(void)simkvm_load(cpu, 0); /* leaves before it */
		return;
	}
	simkvm_enter_space(cpu, v->stores[v->at].as_id);
	simkvm_store(cpu, v->stores[v->at].gpa, v->stores[v->at].value);
	v->at++;
}

static int call(struct sim_vm *vm, int fd, unsigned long request, void *arg)
{
	int rc = vm->ops.ioctl(vm->ops.opaque, fd, request, arg);

	check(rc >= 0, "ioctl 0x%lx: %s", request, strerror(errno));
	return rc;
}

static void vcpu_create(struct sim_vm *vm, uint32_t i)
{
	struct kvm_regs regs = {.rdi = i};
	struct sim_vcpu *v = &vm->vcpus[i];

	v->vm = vm;
	/* NOLINTNEXTLINE(performance-no-int-to-ptr): the ioctl takes a number */
	v->fd = call(vm, vm->vm_fd, KVM_CREATE_VCPU, (void *)(uintptr_t)i);
	call(vm, v->fd, KVM_SET_REGS, &regs);
	check(!snapd_vcpu_attach(vm->agent, v->fd, i, &v->agent), "%s", snapd_vm_error(NULL));
}

void sim_vm_create(struct sim_vm *vm, const struct sim_vm_config *config)
{
	const struct simkvm_config sc = {
		.step = step, .opaque = vm, .backup_bitmap = config->backup_bitmap};
	struct snapd_vm_config vc = {
		.size_bytes = sizeof(vc),
		.name = "test",
		.ring_entries = config->ring_entries,
		.harvest_min_us = config->harvest_us,
		.harvest_max_us = config->harvest_us,
		.callbacks = config->callbacks,
		.opaque = config->opaque,
		.kvm = &vm->ops,
	};

	memset(vm, 0, sizeof(*vm));
	vm->config = *config;
	check(!simkvm_create(&sc, &vm->sim), "simulated KVM");
	simkvm_get_ops(vm->sim, &vm->ops);
	vm->kvm_fd = simkvm_open(vm->sim);
	vm->vm_fd = call(vm, vm->kvm_fd, KVM_CREATE_VM, NULL);
	vm->listen_fd = fake_listen(vm->dir, sizeof(vm->dir), vm->socket, sizeof(vm->socket));
	vc.socket = vm->socket;
	vc.kvm_fd = vm->kvm_fd;
	vc.vm_fd = vm->vm_fd;
	check(!snapd_vm_attach(&vc, &vm->agent), "%s", snapd_vm_error(NULL));
	for (uint32_t i = 0; i < config->nr_vcpus; i++)
		vcpu_create(vm, i);
}

void sim_vm_destroy(struct sim_vm *vm)
{
	snapd_vm_stop(vm->agent);
	for (uint32_t i = 0; i < vm->config.nr_vcpus; i++)
		sim_vm_join(vm, i);
	snapd_vm_detach(vm->agent);
	for (uint32_t i = 0; i < vm->config.nr_vcpus; i++)
		close(vm->vcpus[i].fd);
	close(vm->vm_fd);
	close(vm->kvm_fd);
	simkvm_destroy(vm->sim);
	fake_unlisten(vm->listen_fd, vm->dir, vm->socket);
}

static void *vcpu_thread(void *arg)
{
	struct sim_vcpu *v = arg;
	struct kvm_run *run = snapd_vcpu_kvm_run(v->agent);
	int rc;

	while (v->at < v->nr) {
		rc = snapd_vcpu_run(v->agent);
		if (rc == -ECANCELED)
			break;
		if (rc == -EINTR) {
			__atomic_store_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
			continue;
		}
		check(rc == 0 && run->exit_reason == KVM_EXIT_MMIO && run->mmio.is_write,
		      "run: %d, exit %u: %s", rc, run->exit_reason, snapd_vm_error(NULL));
		check(v->vm->config.mmio, "a store into a hole at 0x%llx",
		      (unsigned long long)run->mmio.phys_addr);
		v->vm->config.mmio(v->vm, &v->stores[v->at]);
	}
	return NULL;
}

void sim_vm_begin(struct sim_vm *vm, uint32_t i, const struct sim_store *stores, uint32_t nr)
{
	struct sim_vcpu *v = &vm->vcpus[i];

	v->stores = stores;
	v->nr = nr;
	v->at = 0;
	check(!pthread_create(&v->thread, NULL, vcpu_thread, v), "thread");
}

void sim_vm_join(struct sim_vm *vm, uint32_t i)
{
	struct sim_vcpu *v = &vm->vcpus[i];

	if (v->thread)
		pthread_join(v->thread, NULL);
	v->thread = 0;
	v->nr = v->at = 0;
}

void sim_vm_run(struct sim_vm *vm, uint32_t i, const struct sim_store *stores, uint32_t nr)
{
	sim_vm_begin(vm, i, stores, nr);
	sim_vm_join(vm, i);
}
