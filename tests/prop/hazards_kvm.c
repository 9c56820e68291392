/* SPDX-License-Identifier: MIT */
/*
 * hazards on the kernel's KVM, with any way of dirty tracking: one address space, and vCPUs that
 * write while slots change, the service copies, and pauses come.
 *
 * The guest asks for a number, does as many of the stores that lie in its list, and asks again.
 * 0 is the answer where it is to rest.  A rollback may bring back registers from the middle
 * of another list: then stores of this one are done twice or not, which is nobody's business
 * but the oracle's, who sees memory only.
 */
#include <errno.h>
#include <string.h>

#include "tests/lib/agent_vm.h"
#include "tests/prop/hazards.h"

#define LIST_GPA   0x140000ull /* in the guest's own memory, whose middle is free */
#define LIST_BYTES (MAX_STORES * 16ull)
#define FREE_PAGE  (0x180000ull / KVM_GUEST_PAGE)

struct kvm_host {
	struct agent_vm a;
	struct campaign *c;
	uint32_t nr[VCPUS]; /* stores still to be asked for; its thread's, while there is one */
	struct list_vcpu {
		struct kvm_host *h;
		uint32_t i;
		pthread_t thread; /* 0: none */
	} vcpus[VCPUS];
};

GUEST_FN static void guest_stores(uint64_t list)
{
	for (;;) {
		uint64_t n = guest_ask();

		for (uint64_t at = list; n; n--, at += 16)
			guest_write(guest_read(at), guest_read(at + 8));
	}
}

/* False: the vCPU rests. */
static bool on_exit_of(struct list_vcpu *v, struct kvm_run *run)
{
	struct store st = {.gpa = run->mmio.phys_addr};
	uint64_t n = v->h->nr[v->i];

	check(run->exit_reason == KVM_EXIT_MMIO, "exit %u", run->exit_reason);
	if (run->mmio.phys_addr == KVM_GUEST_EXIT_GPA) {
		v->h->nr[v->i] = 0;
		memcpy(run->mmio.data, &n, sizeof(n));
		return n;
	}
	check(run->mmio.is_write && run->mmio.len == 8, "a load of 0x%llx",
	      (unsigned long long)run->mmio.phys_addr);
	memcpy(&st.value, run->mmio.data, 8);
	on_hole(v->h->c, &st);
	return true;
}

static void *vcpu_thread(void *arg)
{
	struct list_vcpu *v = arg;
	struct snapd_vcpu *vcpu = v->h->a.vcpus[v->i].v;
	struct kvm_run *run = snapd_vcpu_kvm_run(vcpu);
	bool runs = true;

	while (runs) {
		int rc = snapd_vcpu_run(vcpu);

		if (rc == -ECANCELED)
			break;
		if (rc == -EINTR) {
			__atomic_store_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
			continue;
		}
		check(rc >= 0, "run: %d: %s", rc, snapd_vm_error(NULL));
		runs = on_exit_of(v, run);
	}
	return NULL;
}

static void join(struct campaign *c, uint32_t i)
{
	struct kvm_host *h = c->host;

	if (h->vcpus[i].thread)
		pthread_join(h->vcpus[i].thread, NULL);
	h->vcpus[i].thread = 0;
}

static void begin(struct campaign *c, uint32_t i, uint32_t nr)
{
	struct kvm_host *h = c->host;
	uint64_t at = LIST_GPA + i * LIST_BYTES;
	uint64_t *list = (uint64_t *)(c->mem[LOW].hva + at);

	for (uint32_t k = 0; k < nr; k++) {
		__atomic_store_n(&list[2 * k], c->stores[i][k].gpa, __ATOMIC_RELAXED);
		__atomic_store_n(&list[2 * k + 1], c->stores[i][k].value, __ATOMIC_RELAXED);
	}
	check(!snapd_vm_mark_file_dirty(c->agent, c->mem[LOW].fd, at, nr * 16ull), "mark");
	h->nr[i] = nr;
	check(!pthread_create(&h->vcpus[i].thread, NULL, vcpu_thread, &h->vcpus[i]), "thread");
}

static void create(struct campaign *c, const char *backend)
{
	static struct kvm_host h;
	const struct agent_backend *b = agent_backend(backend);
	const struct agent_vm_config config = {
		.ring_entries = RING,
		.harvest_us = 60000000, /* the harvest thread sleeps: who needs it, does it */
		.callbacks = &hazard_callbacks,
		.opaque = c,
		.dirty = b->dirty,
		.flags = b->flags,
		.no_sys_slot = true,
	};

	memset(&h, 0, sizeof(h));
	h.c = c;
	agent_vm_create(&h.a, &config);
	c->host = &h;
	c->agent = h.a.vm;
	c->listen_fd = h.a.listen_fd;
	c->unmarked = b->dirty == SNAPD_DIRTY_PAGEMAP || b->flags & SNAPD_ATTACH_TRACK_HOST_WRITES;
	c->mem[LOW] = (struct mem){.fd = h.a.g.sys_fd,
				   .hva = h.a.g.sys,
				   .pages = KVM_GUEST_SYS_BYTES / KVM_GUEST_PAGE,
				   .first = FREE_PAGE,
				   .nr = LOW_PAGES};
	for (uint32_t i = 0; i < VCPUS; i++) {
		h.vcpus[i] = (struct list_vcpu){.h = &h, .i = i};
		agent_vm_add(&h.a, GUEST_CODE(guest_stores), LIST_GPA + i * LIST_BYTES, 0, 0, 0);
	}
}

static void destroy(struct campaign *c)
{
	struct kvm_host *h = c->host;

	agent_vm_destroy(&h->a);
	c->mem[LOW].fd = -1; /* was the guest's */
}

const struct hazard_host hazard_host = {.spaces = 1,
					.backends = "ring",
					.create = create,
					.destroy = destroy,
					.begin = begin,
					.join = join};
