/* SPDX-License-Identifier: MIT */
/* hazards on the simulated KVM: two address spaces, backup bitmaps, one thread at a time. */
#include "tests/lib/sim_vm.h"
#include "tests/prop/hazards.h"

static void on_mmio(struct sim_vm *vm, const struct sim_store *st)
{
	on_hole(vm->config.opaque,
		&(const struct store){.as_id = st->as_id, .gpa = st->gpa, .value = st->value});
}

static void create(struct campaign *c, const char *backend)
{
	static struct sim_vm vm;
	const struct sim_vm_config config = {
		.nr_vcpus = VCPUS,
		.ring_entries = RING,
		.harvest_us = 60000000, /* the harvest thread sleeps: who needs it, does it */
		.backup_bitmap = true,
		.callbacks = &hazard_callbacks,
		.opaque = c,
		.mmio = on_mmio,
	};

	sim_vm_create(&vm, &config);
	c->host = &vm;
	c->agent = vm.agent;
	c->listen_fd = vm.listen_fd;
	mem_create(c, LOW, LOW_PAGES);
}

static void destroy(struct campaign *c)
{
	sim_vm_destroy(c->host);
}

static void begin(struct campaign *c, uint32_t i, uint32_t nr)
{
	static struct sim_store stores[MAX_STORES];

	for (uint32_t k = 0; k < nr; k++)
		stores[k] = (struct sim_store){.as_id = c->stores[i][k].as_id,
					       .gpa = c->stores[i][k].gpa,
					       .value = c->stores[i][k].value};
	sim_vm_run(c->host, i, stores, nr);
}

static void join(struct campaign *c, uint32_t i)
{
}

static void kvm_writes(struct campaign *c, uint32_t as_id, uint64_t gpa, uint64_t value)
{
	struct sim_vm *vm = c->host;

	check(!simkvm_write(vm->sim, as_id, gpa, value), "write");
}

static void cut_reset(struct campaign *c, uint32_t entries, uint32_t unprotected)
{
	struct sim_vm *vm = c->host;

	simkvm_interrupt_reset(vm->sim, entries, unprotected);
}

const struct hazard_host hazard_host = {.spaces = 2,
					.replays = true,
					.create = create,
					.destroy = destroy,
					.begin = begin,
					.join = join,
					.write = kvm_writes,
					.cut_reset = cut_reset};
