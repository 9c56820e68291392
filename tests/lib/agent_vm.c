/* SPDX-License-Identifier: MIT */
/* A small real guest under the agent; agent_vm.h tells. */
#include "tests/lib/agent_vm.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"

const struct agent_backend *agent_backend(const char *name)
{
	static const struct agent_backend all[] = {
		{"ring", SNAPD_DIRTY_RING},
		{"log", SNAPD_DIRTY_LOG},
		{"log-initially-set", SNAPD_DIRTY_LOG, SNAPD_ATTACH_LOG_INITIALLY_SET},
		{"pagemap", SNAPD_DIRTY_PAGEMAP},
		{"ring+pagemap", SNAPD_DIRTY_RING, SNAPD_ATTACH_TRACK_HOST_WRITES},
		{"log+pagemap", SNAPD_DIRTY_LOG, SNAPD_ATTACH_TRACK_HOST_WRITES},
		{"log-get-clears", SNAPD_DIRTY_LOG, .hide_protect2 = true},
	};

	for (size_t i = 0; i < ARRAY_SIZE(all); i++)
		if (!strcmp(all[i].name, name))
			return &all[i];
	check(false, "no backend is called %s", name);
	return NULL;
}

static int sys_slot(struct agent_vm *a)
{
	struct snapd_memslot m = {.slot = AGENT_VM_SYS_SLOT,
				  .size_bytes = KVM_GUEST_SYS_BYTES,
				  .hva = a->g.sys,
				  .fd = a->g.sys_fd};

	return snapd_vm_memslot(a->vm, &m);
}

void agent_vm_create(struct agent_vm *a, const struct agent_vm_config *config)
{
	struct kvm_guest_config gc = {
		.data_bytes = config->data_bytes, .data_fd = config->data_fd, .no_slots = true};
	struct snapd_vm_config vc = {
		.size_bytes = sizeof(vc),
		.flags = config->flags,
		.name = "test",
		.socket = a->socket,
		.restore = config->restore,
		.ring_entries = config->ring_entries,
		.harvest_min_us = config->harvest_us,
		.harvest_max_us = config->harvest_us,
		.callbacks = config->callbacks,
		.kvm = config->kvm,
		.opaque = config->opaque,
		.dirty = config->dirty,
	};
	int r;

	memset(a, 0, sizeof(*a));
	r = kvm_guest_create(&a->g, &gc);
	if (r == -ENODEV)
		skip("no usable /dev/kvm");
	check(!r, "%s", strerror(-r));
	a->listen_fd = fake_listen(a->dir, sizeof(a->dir), a->socket, sizeof(a->socket));
	vc.kvm_fd = a->g.kvm_fd;
	vc.vm_fd = a->g.vm_fd;
	r = snapd_vm_attach(&vc, &a->vm);
	if (r == -ENOTSUP)
		skip("%s", snapd_vm_error(NULL));
	check(!r, "%s", snapd_vm_error(NULL));
	check(config->no_sys_slot || !sys_slot(a), "%s", snapd_vm_error(NULL));
	if (config->data_bytes && !config->no_data_slot)
		check(!agent_vm_slot(a, AGENT_VM_DATA_SLOT, KVM_GUEST_DATA_GPA, 0,
				     config->data_bytes / KVM_GUEST_PAGE),
		      "%s", snapd_vm_error(NULL));
}

int agent_vm_slot(struct agent_vm *a, uint32_t slot, uint64_t gpa, uint64_t page, uint64_t n)
{
	struct snapd_memslot m = {.slot = slot,
				  .gpa = gpa,
				  .size_bytes = n * KVM_GUEST_PAGE,
				  .hva = a->g.data + page * KVM_GUEST_PAGE,
				  .fd = a->g.data_fd,
				  .fd_offset = page * KVM_GUEST_PAGE};

	return snapd_vm_memslot(a->vm, &m);
}

int agent_vm_unslot(struct agent_vm *a, uint32_t slot, uint16_t flags)
{
	struct snapd_memslot m = {.slot = slot, .flags = flags};

	return snapd_vm_memslot(a->vm, &m);
}

void agent_vm_add(struct agent_vm *a, void (*fn)(void), uint64_t x, uint64_t y, uint64_t z,
		  uint64_t w)
{
	int i = kvm_guest_add_vcpu(&a->g, fn, x, y, z, w);
	struct agent_vcpu *v;

	check(i >= 0, "vCPU: %s", strerror(-i));
	v = &a->vcpus[i];
	v->vm = a;
	v->index = (uint32_t)i;
	check(!snapd_vcpu_attach(a->vm, a->g.vcpus[i].fd, (uint32_t)i, &v->v), "%s",
	      snapd_vm_error(NULL));
}

static void on_mmio(struct agent_vcpu *v, struct kvm_run *run)
{
	uint64_t value;

	if (run->mmio.phys_addr == KVM_GUEST_EXIT_GPA && run->mmio.is_write) {
		memcpy(&value, run->mmio.data, sizeof(value));
		atomic_store(&v->told, value);
	} else {
		check(v->vm->mmio, "vCPU %u: MMIO at 0x%llx", v->index,
		      (unsigned long long)run->mmio.phys_addr);
		v->vm->mmio(v, run);
	}
}

static void *vcpu_loop(void *arg)
{
	struct agent_vcpu *v = arg;
	struct kvm_run *run = snapd_vcpu_kvm_run(v->v);
	int r;

	for (;;) {
		r = snapd_vcpu_run(v->v);
		if (r == -EINTR) {
			__atomic_store_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
			atomic_fetch_add(&v->interrupted, 1);
			if (!atomic_load(&v->leave))
				continue;
		}
		if (r < 0)
			break;
		atomic_fetch_add(&v->exits, 1);
		check(run->exit_reason == KVM_EXIT_MMIO, "vCPU %u: exit %u", v->index,
		      run->exit_reason);
		on_mmio(v, run);
	}
	atomic_store(&v->result, r);
	atomic_store(&v->running, false);
	return NULL;
}

void agent_vm_start(struct agent_vm *a, uint32_t i)
{
	atomic_store(&a->vcpus[i].running, true);
	check(!pthread_create(&a->vcpus[i].thread, NULL, vcpu_loop, &a->vcpus[i]), "thread");
}

void agent_vm_stop(struct agent_vm *a)
{
	snapd_vm_stop(a->vm);
	for (uint32_t i = 0; i < a->g.nr_vcpus; i++)
		if (a->vcpus[i].thread) {
			pthread_join(a->vcpus[i].thread, NULL);
			a->vcpus[i].thread = 0;
		}
}

void agent_vm_destroy(struct agent_vm *a)
{
	agent_vm_stop(a);
	snapd_vm_detach(a->vm);
	kvm_guest_destroy(&a->g);
	fake_unlisten(a->listen_fd, a->dir, a->socket);
}

void fake_accept(struct agent_vm *a, struct fake_service *s)
{
	fake_accept_on(a->listen_fd, s);
}

void fake_open(struct agent_vm *a, struct fake_service *s)
{
	fake_open_on(a->listen_fd, s);
}
