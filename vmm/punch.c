/* SPDX-License-Identifier: MIT */
/*
 * punch: changes memslots under the running guest, in every way that a VMM may.
 *
 * Each change of an area deletes all of its slots and adds others, so at the end its
 * memory is seen whole, in parts, with a hole that stays until the next change, under
 * another id, or at another address.  What the guest touches in the meantime comes to
 * the VMM as MMIO and is done there (vcpu.c); nothing is lost.
 *
 * Two changes have to look like one instant to a snapshot, since memory comes and goes
 * for good: other memory for an area, and the DIMM.  They are done on vCPU 0's thread,
 * when the guest calls for it: a pause waits until that thread is back in its run call.
 *
 * Invariants
 *   P1  area.ids names every slot that the area has in KVM, if area.synced is the
 *       layout generation; else a rollback has set other slots, and the next change
 *       deletes every id that the area can have.
 *   P2  a layout that was set during a change makes the change start again: whatever
 *       of it happened before or after the rollback, it ends as planned.
 *   P3  random choices are drawn in one piece under write_lock, and so are saved and
 *       loaded between two changes.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <time.h>

#include "vmm/machine.h"

#define MAX_VIEWS 4u

struct view {
	uint64_t first_page, nr_pages;
};

struct plan {
	enum punch_pattern pattern;
	uint32_t area;
	bool window; /* seen at the window, not at home */
	struct view views[MAX_VIEWS];
	uint32_t nr_views;
	uint32_t hole_us; /* how long nothing is there */
};

struct puncher {
	struct machine *machine;
	pthread_t thread;
	/* machine.write_lock */
	uint64_t rng;
	struct punch_stats stats;
	/* -1, or the area that vCPU 0's thread is to give other memory.  The puncher sets
	 * it (release) and leaves the area alone until vCPU 0's thread clears it. */
	_Atomic int call_area;
	uint64_t call_gen; /* layout_gen at which the guest was asked last */
};

/* "snapvm.punch" version 1.  Which slots there are is the agent's to record. */
struct punch_state {
	uint64_t rng;
	uint32_t nr_areas;
	uint32_t reserved;
};

static uint64_t draw(struct puncher *p, uint64_t below)
{
	p->rng = guest_rng_next(p->rng);
	return guest_mix(p->rng) % below;
}

static enum punch_pattern draw_pattern(struct puncher *p)
{
	uint32_t mask = p->machine->opt->punch_patterns;
	uint64_t skip = draw(p, (uint64_t)__builtin_popcount(mask));

	for (; skip; skip--)
		mask &= mask - 1;
	return (enum punch_pattern)__builtin_ctz(mask);
}

static void plan_whole(struct plan *plan, uint64_t nr_pages)
{
	plan->views[0] = (struct view){0, nr_pages};
	plan->nr_views = 1;
}

static void plan_hole(struct puncher *p, struct plan *plan, uint64_t nr_pages)
{
	uint64_t first = draw(p, nr_pages);
	uint64_t end = first + 1 + draw(p, MIN(nr_pages - first, nr_pages / 8 + 1));

	if (first)
		plan->views[plan->nr_views++] = (struct view){0, first};
	if (end < nr_pages)
		plan->views[plan->nr_views++] = (struct view){end, nr_pages - end};
}

static void plan_parts(struct puncher *p, struct plan *plan, uint64_t nr_pages)
{
	uint64_t parts = 2 + draw(p, MAX_VIEWS - 1), first = 0, nr;

	while (plan->nr_views + 1 < parts && nr_pages - first > 1) {
		nr = 1 + draw(p, nr_pages - first - 1);
		plan->views[plan->nr_views++] = (struct view){first, nr};
		first += nr;
	}
	plan->views[plan->nr_views++] = (struct view){first, nr_pages - first};
}

/* Slots are made of these. */
static uint64_t host_pages(const struct machine *m, const struct area *a)
{
	return a->nr_pages * GUEST_PAGE / m->page_size;
}

static void plan_draw(struct puncher *p, struct plan *plan)
{
	struct machine *m = p->machine;
	uint64_t nr_pages;

	*plan = (struct plan){0};
	pthread_mutex_lock(&m->write_lock);
	plan->pattern = draw_pattern(p);
	plan->area = (uint32_t)draw(p, m->nr_areas);
	plan->hole_us = (uint32_t)draw(p, 500);
	nr_pages = host_pages(m, &m->areas[plan->area]);
	if (plan->pattern == PUNCH_HOLE)
		plan_hole(p, plan, nr_pages);
	else if (plan->pattern == PUNCH_RESIZE)
		plan_parts(p, plan, nr_pages);
	else
		plan_whole(plan, nr_pages);
	plan->window = plan->pattern == PUNCH_MOVE || plan->pattern == PUNCH_ALIAS;
	p->stats.ops[plan->pattern]++;
	p->stats.total++;
	pthread_mutex_unlock(&m->write_lock);
}

static uint32_t area_slot(struct machine *m, struct area *a, uint32_t id)
{
	return SLOT_AREA0 + (uint32_t)(a - m->areas) * AREA_SLOT_IDS + id;
}

/* Did a rollback set other slots since `gen`? */
static bool layout_changed(struct machine *m, uint64_t gen)
{
	return atomic_load(&m->layout_gen) != gen;
}

static int area_delete(struct machine *m, struct area *a, uint64_t gen, uint32_t flags)
{
	uint32_t id;
	int rc;

	if (a->synced != gen)
		a->ids = (1u << AREA_SLOT_IDS) - 1;
	for (id = 0; id < AREA_SLOT_IDS; id++) {
		if (!(a->ids & 1u << id))
			continue;
		rc = ram_unmap_slot(m, area_slot(m, a, id), flags);
		if (rc && rc != -ENOENT)
			return rc;
		a->ids &= ~(1u << id);
	}
	a->synced = gen;
	return 0;
}

static int area_add(struct machine *m, struct area *a, const struct view *v, uint64_t gpa)
{
	uint32_t id = a->next_id++ % AREA_SLOT_IDS;

	a->ids |= 1u << id;
	return ram_map_slot(m, 0, area_slot(m, a, id), gpa + v->first_page * m->page_size,
			    a->backing, a->backing_offset + v->first_page * m->page_size,
			    v->nr_pages * m->page_size);
}

static void rest_us(uint32_t us)
{
	const struct timespec t = {.tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000L};

	nanosleep(&t, NULL);
}

static int area_change_once(struct machine *m, struct area *a, const struct plan *plan,
			    uint64_t gen)
{
	uint64_t gpa = plan->window ? a->window_gpa : a->gpa;
	uint32_t i;
	int rc = area_delete(m, a, gen, 0);

	if (rc == 0 && !m->opt->punch_paused && !m->opt->lockstep)
		rest_us(plan->hole_us);
	/* Ids of merged areas start again, all others are new ones each time. */
	if (plan->pattern == PUNCH_MERGE)
		a->next_id = 0;
	for (i = 0; rc == 0 && i < plan->nr_views; i++)
		rc = area_add(m, a, &plan->views[i], gpa);
	if (rc == 0 && plan->pattern == PUNCH_ALIAS)
		rc = area_add(m, a, &plan->views[0], a->gpa);
	return rc;
}

/* P2 */
static int area_change(struct machine *m, struct area *a, const struct plan *plan)
{
	uint64_t gen;
	int rc;

	do {
		gen = atomic_load(&m->layout_gen);
		rc = area_change_once(m, a, plan, gen);
	} while (layout_changed(m, gen) && !atomic_load(&m->stopping));
	return rc;
}

static void punch_area(struct machine *m, const struct plan *plan)
{
	struct area *a = &m->areas[plan->area];
	int rc;

	if (m->opt->punch_paused && snapd_vm_pause(m->agent, 0))
		return; /* no pause to be had now; the next change will */
	rc = area_change(m, a, plan);
	if (m->opt->punch_paused)
		snapd_vm_resume(m->agent);
	if (rc && !atomic_load(&m->stopping)) {
		machine_fail(m, "memslot change (%s): %s: %s", punch_names[plan->pattern],
			     strerror(-rc), snapd_vm_error(m->agent));
		return;
	}
	/* Until the guest learns of it, its accesses leave by MMIO: slow but right. */
	ram_store_marked(m, GUEST_SHARED_GPA + offsetof(struct guest_shared, area_gpa[plan->area]),
			 plan->window ? a->window_gpa : a->gpa);
}

/* Is what vCPU 0's thread was asked for yet to be done?  A rollback may take the request
 * out of guest memory: then it is put there again. */
static bool call_pending(struct puncher *p)
{
	struct machine *m = p->machine;

	if (atomic_load(&p->call_area) < 0)
		return false;
	if (layout_changed(m, p->call_gen)) {
		p->call_gen = atomic_load(&m->layout_gen);
		ram_store_marked(m, GUEST_SHARED_GPA + offsetof(struct guest_shared, call), 1);
	}
	return true;
}

static void punch_by_call(struct puncher *p, uint32_t area)
{
	struct machine *m = p->machine;

	p->call_gen = ~0ull;
	atomic_store(&p->call_area, (int)area);
	while (call_pending(p) && !m->opt->lockstep && !atomic_load(&m->stopping))
		rest_us(200);
}

/* Ask the guest to give up the DIMM, or to take it; it answers by a doorbell. */
static void punch_dimm(struct machine *m)
{
	const uint64_t want_gpa = GUEST_SHARED_GPA + offsetof(struct guest_shared, dimm_want);
	const uint64_t on_gpa = GUEST_SHARED_GPA + offsetof(struct guest_shared, dimm_on);
	uint64_t want = atomic_load(ram_word(m, want_gpa));

	if (want == atomic_load(ram_word(m, on_gpa)))
		ram_store_marked(m, want_gpa, !want);
}

static void punch_once(struct puncher *p)
{
	struct plan plan;

	plan_draw(p, &plan);
	if (plan.pattern == PUNCH_REMOVE)
		punch_dimm(p->machine);
	else if (plan.pattern == PUNCH_OTHERBACKING)
		punch_by_call(p, plan.area);
	else
		punch_area(p->machine, &plan);
}

void punch_step(struct machine *m)
{
	if (m->puncher && atomic_load(&m->live) && !call_pending(m->puncher))
		punch_once(m->puncher);
}

static void *punch_thread(void *arg)
{
	struct puncher *p = arg;
	struct machine *m = p->machine;
	uint64_t period_us = (uint64_t)(1e6 / m->opt->punch_rate), waited_us = 0, step_us;

	while (!atomic_load(&m->stopping)) {
		step_us = MIN(period_us, 50000ull);
		rest_us((uint32_t)step_us);
		waited_us += step_us;
		if (waited_us < period_us || !atomic_load(&m->live) || atomic_load(&m->fatal))
			continue;
		waited_us = 0;
		punch_once(p);
	}
	return NULL;
}

int punch_start(struct machine *m)
{
	struct puncher *p;
	int rc;

	if (m->opt->punch_rate <= 0)
		return 0;
	p = calloc(1, sizeof(*p));
	if (!p)
		return -ENOMEM;
	p->machine = m;
	p->rng = guest_mix(m->opt->seed ^ 0x9a0c4) | 1;
	p->call_area = -1;
	pthread_mutex_lock(&m->write_lock);
	m->puncher = p;
	pthread_mutex_unlock(&m->write_lock);
	if (m->opt->lockstep)
		return 0;
	rc = pthread_create(&p->thread, NULL, punch_thread, p);
	if (rc) {
		m->puncher = NULL;
		free(p);
	}
	return -rc;
}

void punch_stop(struct machine *m)
{
	if (m->puncher && !m->opt->lockstep)
		pthread_join(m->puncher->thread, NULL);
}

void punch_get_stats(struct machine *m, struct punch_stats *ret)
{
	pthread_mutex_lock(&m->write_lock);
	*ret = m->puncher ? m->puncher->stats : (struct punch_stats){0};
	pthread_mutex_unlock(&m->write_lock);
}

/* vCPU 0's thread: a word of guest memory, like a store of the guest. */
static void vcpu_store(struct machine *m, size_t shared_field, uint64_t value)
{
	uint64_t gpa = GUEST_SHARED_GPA + shared_field;

	atomic_store(ram_word(m, gpa), value);
	snapd_vm_mark_dirty(m->agent, gpa, sizeof(value));
}

/*
 * Other memory with the same content takes the area's place.  All of the area is made
 * visible first, so that SNAPD_SLOT_GONE gives up all of it; the home GFNs are free
 * then, and the new memory, seen at the same address, gets them.
 */
static int area_replace(struct machine *m, struct area *a)
{
	const struct view whole = {0, host_pages(m, a)};
	uint64_t gen = atomic_load(&m->layout_gen), len = a->nr_pages * GUEST_PAGE;
	struct ram_block fresh = {.fd = -1}, old = a->own;
	int rc = ram_block_create(&fresh, "snapvm-area", len, m->opt->backing);

	if (rc == 0)
		rc = area_delete(m, a, gen, 0);
	if (rc == 0)
		rc = area_add(m, a, &whole, a->gpa);
	if (rc == 0)
		rc = area_delete(m, a, gen, SNAPD_SLOT_GONE);
	if (rc) {
		ram_block_destroy(&fresh);
		return rc;
	}
	memcpy(fresh.hva, (char *)a->backing->hva + a->backing_offset, len);
	if (a->backing == &m->main)
		(void)fallocate(m->main.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				(off_t)a->backing_offset, (off_t)len);
	a->own = fresh;
	a->backing = &a->own;
	a->backing_offset = 0;
	ram_block_destroy(&old);
	return area_add(m, a, &whole, a->gpa);
}

void punch_on_call(struct machine *m)
{
	struct puncher *p = m->puncher;
	int index = p ? atomic_load(&p->call_area) : -1, rc;
	struct area *a;

	vcpu_store(m, offsetof(struct guest_shared, call), 0);
	if (index < 0)
		return; /* asked for before a rollback, and done */
	a = &m->areas[index];
	pthread_mutex_lock(&a->lock);
	rc = area_replace(m, a);
	pthread_mutex_unlock(&a->lock);
	if (rc)
		machine_fail(m, "other memory for an area: %s: %s", strerror(-rc),
			     snapd_vm_error(m->agent));
	vcpu_store(m, offsetof(struct guest_shared, area_gpa) + (size_t)index * 8, a->gpa);
	atomic_store(&p->call_area, -1);
}

void punch_on_eject(struct machine *m)
{
	int rc = ram_unmap_slot(m, SLOT_DIMM, SNAPD_SLOT_GONE);

	if (rc && rc != -ENOENT)
		machine_fail(m, "DIMM out: %s: %s", strerror(-rc), snapd_vm_error(m->agent));
	else
		ram_block_destroy(&m->dimm);
}

void punch_on_plug(struct machine *m)
{
	uint64_t len = m->params.dimm_pages * GUEST_PAGE;
	uint64_t table = GUEST_TABLE_GPA + m->params.main_pages * 8;
	int rc = m->dimm.fd < 0 ? ram_block_create(&m->dimm, "snapvm-dimm", len, m->opt->backing)
				: 0;

	if (rc == 0)
		rc = ram_map_slot(m, 0, SLOT_DIMM, m->params.dimm_gpa, &m->dimm, 0, len);
	if (rc) {
		machine_fail(m, "DIMM in: %s: %s", strerror(-rc), snapd_vm_error(m->agent));
		return;
	}
	memset((char *)m->low.hva + table, 0, m->params.dimm_pages * 8);
	snapd_vm_mark_dirty(m->agent, table, m->params.dimm_pages * 8);
	vcpu_store(m, offsetof(struct guest_shared, dimm_on), 1);
}

int punch_save(struct machine *m, struct snapd_state_writer *w)
{
	struct punch_state s = {.nr_areas = m->nr_areas};

	if (!m->puncher)
		return 0;
	s.rng = m->puncher->rng;
	return snapd_state_put(w, "snapvm.punch", 0, 1, &s, sizeof(s));
}

int punch_load(struct machine *m, const struct snapd_state_reader *r)
{
	struct punch_state s;
	const void *data;
	uint16_t version;
	size_t len;
	int rc;

	if (!m->puncher)
		return 0;
	rc = snapd_state_get(r, "snapvm.punch", 0, &version, &data, &len);
	if (rc == -ENOENT)
		return 0; /* taken without a puncher */
	if (rc)
		return rc;
	if (version != 1 || len != sizeof(s))
		return -EPROTO;
	memcpy(&s, data, sizeof(s));
	if (s.nr_areas != m->nr_areas)
		return -EINVAL;
	m->puncher->rng = s.rng;
	return 0;
}

static void area_set_backing(struct machine *m, struct area *a, const struct snapd_memslot *s,
			     uint64_t offset)
{
	uint64_t main_offset = (uint64_t)((char *)s->hva - (char *)m->main.hva);

	pthread_mutex_lock(&a->lock);
	if (main_offset < m->main.len_bytes) {
		a->backing = &m->main;
		a->backing_offset = main_offset - offset;
	} else if (a->own.fd >= 0) {
		a->backing = &a->own;
		a->backing_offset = 0;
	}
	pthread_mutex_unlock(&a->lock);
}

void punch_layout(struct machine *m, const struct snapd_memslot *slots, size_t nr)
{
	bool dimm = false;
	struct area *a;
	uint64_t offset;
	size_t i;

	for (i = 0; i < nr; i++) {
		dimm |= slots[i].slot == SLOT_DIMM;
		a = ram_area_of(m, slots[i].gpa, &offset);
		if (a)
			area_set_backing(m, a, &slots[i], offset);
	}
	/* It was not there then; the agent has given it up. */
	if (!dimm)
		ram_block_destroy(&m->dimm);
}
