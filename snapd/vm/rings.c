/* SPDX-License-Identifier: MIT */
/*
 * The dirty rings of a dead VMM → its dirty set.  On the VM's thread; all input is untrusted.
 *
 * KVM keeps rings as long as somebody has the vCPU, and this process has: after the VMM's
 * death they can be mapped and read (tests/kernel/ring_foreign.c), though no ioctl works.  Nobody
 * writes them any more, so an entry that has a flag names a page that was written and that no set
 * may have: pushed and not collected, or collected and on its way to a RESET.  Where
 * collecting stood need not be known.
 *
 * Slot ids are the agent's, and are not used again before every ring was emptied; what each
 * means is in the shared memory, written before KVM had the slot.  So an entry means what
 * its id means now.
 *
 * What no ring has, a frame between RESET and publishing or a device's write, the comparison
 * with the store finds (postmortem.c).
 */
#include "snapd/vm/rings.h"

#include <linux/kvm.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "snapd/util/busguard.h"
#include "snapd/util/cleanup.h"
#include "snapd/vm/priv.h"

#define RING_MAX_ENTRIES 65536u
#define RING_MAX_OFFSET	 (1u << 23) /* 64 pages of 64 KiB, and room */
#define PART_ENTRIES	 1024u
#define SPACES		 2u

bool rings_wanted(const struct vm *vm)
{
	return vm->d->config.post_mortem;
}

/* A file system of the client's own could block us: KVM's vCPU, or, where KVM is
 * simulated, a memfd. */
static bool is_vcpu(int fd)
{
	static const char name[] = "anon_inode:kvm-vcpu";
	char path[32], target[sizeof(name)];
	struct statfs fs;

	if (!fstatfs(fd, &fs) && fs.f_type == TMPFS_MAGIC)
		return true;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return readlink(path, target, sizeof(target)) >= (ssize_t)sizeof(name) - 1 &&
	       !memcmp(target, name, sizeof(name) - 1);
}

static int check_ring(const struct vm *vm, const struct snapd_msg_vcpu *m, int fd, struct err *e)
{
	if (!rings_wanted(vm))
		return err_set(e, EPROTO, "VCPU was not asked for");
	if (m->vcpu != vm->rings.nr || vm->rings.nr == VM_MAX_RINGS)
		return err_set(e, EPROTO, "VCPU %u after %u others", m->vcpu, vm->rings.nr);
	if (!m->nr_entries || m->nr_entries > RING_MAX_ENTRIES ||
	    m->nr_entries & (m->nr_entries - 1) || m->offset > RING_MAX_OFFSET ||
	    m->offset % vm->mem.page_size)
		return err_set(e, EPROTO, "VCPU with a ring of %u entries at %llu", m->nr_entries,
			       (unsigned long long)m->offset);
	if (fd < 0 || !is_vcpu(fd))
		return err_set(e, EPROTO, "VCPU without a vCPU");
	return 0;
}

int rings_add(struct vm *vm, const struct snapd_msg_vcpu *msg, int fd, struct err *e)
{
	_cleanup_fd_ int own = fd;
	struct rings *r = &vm->rings;
	struct vm_ring *v;
	int err = check_ring(vm, msg, fd, e);

	if (err)
		return err;
	v = reallocarray(r->v, r->nr + 1, sizeof(*v));
	if (!v)
		return err_set(e, ENOMEM, "out of memory");
	r->v = v;
	v[r->nr++] = (struct vm_ring){
		.fd = steal_fd(&own), .nr_entries = msg->nr_entries, .offset = msg->offset};
	return 0;
}

void rings_deinit(struct rings *r)
{
	for (uint32_t i = 0; i < r->nr; i++)
		close(r->v[i].fd);
	free(r->v);
	*r = (struct rings){};
}

/* ---- draining ---- */

/* Part of a ring. */
struct part {
	const struct vm *vm;
	const struct kvm_dirty_gfn *gfns;
	uint32_t nr;
	uint64_t frames[PART_ENTRIES];
	size_t nr_frames;
	uint64_t entries;
};

static bool resolve(const struct vm_shm *shm, const struct kvm_dirty_gfn *g, uint64_t *frame)
{
	uint32_t space = g->slot >> 16, id = g->slot & UINT16_MAX;
	struct snapd_shm_slot s;

	if (!shm->slots || space >= SPACES || id >= shm->nr_slots)
		return false;
	s = shm->slots[space * shm->nr_slots + id];
	*frame = s.first_frame + g->offset;
	return g->offset < s.nr_pages && *frame >= s.first_frame;
}

static void read_part(void *arg)
{
	struct part *p = arg;

	for (uint32_t i = 0; i < p->nr; i++) {
		struct kvm_dirty_gfn g = p->gfns[i];
		uint64_t frame;

		if (!(g.flags & (KVM_DIRTY_GFN_F_DIRTY | KVM_DIRTY_GFN_F_RESET)))
			continue;
		p->entries++;
		if (!resolve(&p->vm->shm, &g, &frame) || !vm_mem_by_frame(&p->vm->mem, frame) ||
		    gpaset_test(&p->vm->shm.dirty, frame))
			continue;
		p->frames[p->nr_frames++] = frame;
	}
}

static int drain_part(struct vm *vm, const struct kvm_dirty_gfn *gfns, uint32_t nr,
		      struct rings_found *found)
{
	struct part p = {.vm = vm, .gfns = gfns, .nr = nr};

	if (busguard_run(read_part, &p))
		return 0; /* the file is shorter than was told */
	found->entries += p.entries;
	return vm_shm_add(&vm->shm, &vm->shm.dirty, p.frames, p.nr_frames);
}

static int drain(struct vm *vm, const struct vm_ring *r, struct rings_found *found)
{
	size_t bytes = r->nr_entries * sizeof(struct kvm_dirty_gfn);
	const struct kvm_dirty_gfn *gfns =
		mmap(NULL, bytes, PROT_READ, MAP_SHARED, r->fd, (off_t)r->offset);
	int err = 0;

	if (gfns == MAP_FAILED)
		return 0;
	for (uint32_t i = 0; !err && i < r->nr_entries; i += PART_ENTRIES)
		err = drain_part(vm, gfns + i, MIN(PART_ENTRIES, r->nr_entries - i), found);
	munmap((void *)gfns, bytes);
	return err;
}

int rings_drain(struct vm *vm, struct rings_found *ret)
{
	uint64_t before, after = 0;
	int err = vm_shm_count(&vm->shm, vm->mem.frames_end, &before);

	*ret = (struct rings_found){};
	for (uint32_t i = 0; !err && i < vm->rings.nr; i++)
		err = drain(vm, &vm->rings.v[i], ret);
	if (!err)
		err = vm_shm_count(&vm->shm, vm->mem.frames_end, &after);
	ret->pages = err ? 0 : after - before;
	return err;
}
