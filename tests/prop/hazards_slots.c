/* SPDX-License-Identifier: MIT */
/* hazards: memory files, and the memslots that show them in two address spaces. */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/prop/hazards.h"

void mem_create(struct campaign *c, enum mem_id id, uint64_t pages)
{
	struct mem *m = &c->mem[id];

	*m = (struct mem){.fd = memfd_create("hazards", MFD_CLOEXEC), .pages = pages, .nr = pages};
	check(m->fd >= 0 && !ftruncate(m->fd, (off_t)(pages * PAGE)), "memory");
	m->hva = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
	check(m->hva != MAP_FAILED, "memory");
}

void mem_destroy(struct mem *m)
{
	if (m->fd < 0)
		return;
	munmap(m->hva, m->pages * PAGE);
	close(m->fd);
	m->fd = -1;
}

enum mem_id mem_of(const struct campaign *c, const struct snapd_memslot *s)
{
	uintptr_t at = (uintptr_t)s->hva;

	for (enum mem_id i = 0; i < NR_MEMS; i++)
		if (c->mem[i].fd >= 0 && at - (uintptr_t)c->mem[i].hva < c->mem[i].pages * PAGE)
			return i;
	check(false, "a slot of no memory");
}

static bool slot_fits(const struct campaign *c, const struct snapd_memslot *n)
{
	for (uint32_t i = 0; i < c->nr_slots; i++) {
		const struct snapd_memslot *o = &c->slots[i];

		if (o->as_id == n->as_id &&
		    (o->slot == n->slot ||
		     (o->gpa < n->gpa + n->size_bytes && n->gpa < o->gpa + o->size_bytes)))
			return false;
	}
	return c->nr_slots < MAX_SLOTS;
}

/* Show [first, first + n) of a memory; nothing happens where something is in the way. */
void slot_add(struct campaign *c, uint32_t id, uint32_t as_id, uint64_t gpa, enum mem_id mem,
	      uint64_t first, uint64_t n)
{
	const struct mem *m = &c->mem[mem];
	struct snapd_memslot s = {.slot = id,
				  .as_id = (uint16_t)as_id,
				  .gpa = gpa,
				  .size_bytes = n * PAGE,
				  .hva = m->hva + first * PAGE,
				  .fd = m->fd,
				  .fd_offset = first * PAGE};

	if (m->fd < 0 || !slot_fits(c, &s))
		return;
	check(!snapd_vm_memslot(c->agent, &s), "%s", snapd_vm_error(NULL));
	c->slots[c->nr_slots++] = s;
}

static void slot_delete(struct campaign *c, uint32_t i, uint32_t flags)
{
	struct snapd_memslot s = {.slot = c->slots[i].slot,
				  .as_id = c->slots[i].as_id,
				  .flags = (uint16_t)flags,
				  .fd = -1};

	check(!snapd_vm_memslot(c->agent, &s), "%s", snapd_vm_error(NULL));
	c->slots[i] = c->slots[--c->nr_slots];
}

void op_slot_add(struct campaign *c)
{
	uint32_t as_id = any_space(c), id = (uint32_t)below(c, 12);
	uint64_t first = below(c, CHUNKS), n = 1 + below(c, CHUNKS - first);
	uint64_t gpa = MAIN_GPA + first * CHUNK_PAGES * PAGE + (below(c, 3) ? 0 : WINDOW);

	slot_add(c, id, as_id, gpa, MAIN, first * CHUNK_PAGES, n * CHUNK_PAGES);
}

void op_slot_delete(struct campaign *c)
{
	uint32_t i = (uint32_t)below(c, c->nr_slots);

	if (c->slots[i].slot != LOW_SLOT)
		slot_delete(c, i, 0);
}

/* Only address space 1 has SMRAM, where the other may have something else. */
void op_smram(struct campaign *c)
{
	if (hazard_host.spaces > 1)
		slot_add(c, 20, 1, MAIN_GPA, SMRAM, 0, SMRAM_PAGES);
}

void forget_saved(struct campaign *c)
{
	if (c->saved_state >= 0)
		close(c->saved_state);
	c->saved_state = -1;
}

/* All of it must be seen when it goes, or it would not be all of it. */
static void dimm_unplug(struct campaign *c, enum mem_id dimm)
{
	for (uint32_t i = 0; i < c->nr_slots;) {
		if (mem_of(c, &c->slots[i]) == dimm || c->slots[i].gpa == DIMM_GPA)
			slot_delete(c, i, 0);
		else
			i++;
	}
	slot_add(c, 30, 0, DIMM_GPA, dimm, 0, DIMM_PAGES);
	slot_delete(c, c->nr_slots - 1, SNAPD_SLOT_GONE);
	mem_destroy(&c->mem[dimm]);
	if (c->mem[dimm].in_saved)
		forget_saved(c);
}

/* Plug in, show through the other address space too, hide, unplug. */
void op_dimm(struct campaign *c)
{
	enum mem_id dimm = below(c, 2) ? DIMM0 : DIMM1;

	if (c->mem[dimm].fd < 0)
		mem_create(c, dimm, DIMM_PAGES);
	else if (below(c, 4) == 0)
		dimm_unplug(c, dimm);
	slot_add(c, 30 + (uint32_t)dimm, any_space(c), DIMM_GPA, dimm, 0, DIMM_PAGES);
}
