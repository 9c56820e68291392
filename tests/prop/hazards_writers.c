/* SPDX-License-Identifier: MIT */
/* hazards: vCPUs, KVM by itself, the VMM, a device with a log, and the host that takes memory. */
#include <fcntl.h>
#include <sys/mman.h>

#include "tests/prop/hazards.h"

const struct snapd_memslot *slot_seen(const struct campaign *c, uint32_t as_id, uint64_t gpa)
{
	for (uint32_t i = 0; i < c->nr_slots; i++)
		if (c->slots[i].as_id == as_id && gpa - c->slots[i].gpa < c->slots[i].size_bytes)
			return &c->slots[i];
	return NULL;
}

static uint64_t *word_at(const struct snapd_memslot *s, uint64_t gpa)
{
	return (uint64_t *)((uint8_t *)s->hva + (gpa - s->gpa));
}

/* A place to write at: mostly memory, at times a hole. */
static uint64_t any_gpa(struct campaign *c, uint32_t *as_id)
{
	const struct snapd_memslot *s = &c->slots[below(c, c->nr_slots)];

	*as_id = s->as_id;
	if (s->slot == LOW_SLOT)
		return s->gpa + (c->mem[LOW].first * PAGE) +
		       below(c, c->mem[LOW].nr * PAGE / 8) * 8;
	if (below(c, 10))
		return s->gpa + below(c, s->size_bytes / 8) * 8;
	*as_id = 0;
	return MAIN_GPA + (below(c, 2) ? WINDOW : 0) + below(c, MAIN_PAGES) * PAGE;
}

/* The VMM does it. */
void on_hole(struct campaign *c, const struct store *st)
{
	uint64_t at = (st->gpa - MAIN_GPA) % WINDOW;

	if (st->as_id || at >= MAIN_PAGES * PAGE)
		return; /* there is nothing behind it */
	__atomic_store_n((uint64_t *)(c->mem[MAIN].hva + at), st->value, __ATOMIC_RELAXED);
	check(!snapd_vm_mark_file_dirty(c->agent, c->mem[MAIN].fd, at, 8), "mark");
}

/* At times more pages than a ring holds. */
void op_vcpus(struct campaign *c)
{
	uint32_t i = (uint32_t)below(c, VCPUS), n = 1 + (uint32_t)below(c, 30);
	struct store *stores = c->stores[i];

	hazard_host.join(c, i);
	if (below(c, 60) == 0)
		n = MAX_STORES;
	for (uint32_t k = 0; k < n; k++) {
		stores[k].gpa = any_gpa(c, &stores[k].as_id);
		stores[k].value = ++c->counter;
	}
	hazard_host.begin(c, i, n);
}

/* KVM by itself, as for an interrupt controller's tables. */
void op_no_vcpu(struct campaign *c)
{
	uint32_t as_id;
	uint64_t gpa = any_gpa(c, &as_id);

	if (hazard_host.write && slot_seen(c, as_id, gpa))
		hazard_host.write(c, as_id, gpa, ++c->counter);
}

/* As a signal does in the middle of one. */
void op_cut_reset(struct campaign *c)
{
	uint32_t entries = 1 + (uint32_t)below(c, 8);

	if (hazard_host.cut_reset)
		hazard_host.cut_reset(c, entries, 1 + (uint32_t)below(c, entries));
}

/* The VMM writes; what it marks by. */
void host_write(struct campaign *c, bool by_file)
{
	uint32_t as_id;
	uint64_t gpa = any_gpa(c, &as_id);
	const struct snapd_memslot *s = slot_seen(c, as_id, gpa);

	if (!s)
		return;
	__atomic_store_n(word_at(s, gpa), ++c->counter, __ATOMIC_RELAXED);
	if (c->unmarked)
		return;
	if (by_file || s->as_id)
		check(!snapd_vm_mark_file_dirty(c->agent, s->fd, s->fd_offset + gpa - s->gpa, 8),
		      "mark");
	else
		check(!snapd_vm_mark_dirty(c->agent, gpa, 8), "mark");
}

void op_mark(struct campaign *c)
{
	host_write(c, below(c, 2));
}

/* What a vhost worker does: data, then the bit. */
void device_write(struct campaign *c)
{
	uint32_t as_id;
	uint64_t gpa = any_gpa(c, &as_id);
	const struct snapd_memslot *s = slot_seen(c, 0, gpa);

	if (!s)
		return;
	__atomic_store_n(word_at(s, gpa), ++c->counter, __ATOMIC_RELAXED);
	__atomic_fetch_or((uint8_t *)c->log_mem.base + gpa / LOG_PAGE / 8,
			  (uint8_t)(1u << gpa / LOG_PAGE % 8), __ATOMIC_SEQ_CST);
}

void op_device(struct campaign *c)
{
	for (uint64_t n = 1 + below(c, 4); n; n--)
		device_write(c);
}

void op_discard(struct campaign *c)
{
	enum mem_id id = below(c, NR_MEMS);
	const struct mem *m = &c->mem[id];
	uint64_t first, n;

	if (m->fd < 0)
		return;
	first = below(c, m->nr);
	n = 1 + below(c, MIN(m->nr - first, 8ull));
	first += m->first;
	switch (below(c, 3)) {
	case 0:
		check(!fallocate(m->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				 (off_t)(first * PAGE), (off_t)(n * PAGE)),
		      "fallocate");
		break;
	case 1:
		check(!madvise(m->hva + first * PAGE, n * PAGE, MADV_REMOVE), "MADV_REMOVE");
		break;
	case 2: /* frees nothing of a shared file: the bytes stay */
		check(!madvise(m->hva + first * PAGE, n * PAGE, MADV_DONTNEED), "MADV_DONTNEED");
		break;
	}
	check(!snapd_vm_discarded(c->agent, m->fd, first * PAGE, n * PAGE), "discard");
	c->discards++;
}
