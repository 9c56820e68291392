/* SPDX-License-Identifier: MIT */
/*
 * layout: the memslots and pieces of a snapshot, as the records "layout" and
 * "pieces" (state.h), and back.  On the connection thread, every vCPU stopped.
 *
 * A slot whose backing is several pieces has several consecutive records, one
 * for each, of the same slot number and neighbouring GPAs.
 *
 * Loading also cures stale shadow pages: the service has rewritten guest memory,
 * page tables included, behind KVM's back, and KVM with shadow paging still has
 * translations made from the old ones.  What drops them for certain is deleting
 * slots: any slot, where KVM still zaps everything then; otherwise each slot that
 * may hold page tables, since KVM then drops the shadow pages of that slot only.
 * (madvise(MADV_DONTNEED) on the RAM mapping drops leaf entries only; an upper
 * level that points to the shadow of another table survives it.)  Where the hardware
 * walks the guest's tables itself there is nothing to cure (arch_ops.shadows).
 *
 * The cure need not wait for the writes: KVM makes a shadow page when a vCPU runs and
 * misses one, and none runs before LOAD is done.  So dropping them all while the
 * service still writes is as good as afterwards.
 */
#include "agent/vm.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define NOT_TRACKED UINT64_MAX

/* A record of "layout", and of "note.slots" beside it. */
struct slot_record {
	struct state_slot slot; /* first: compare_gpa() sorts by it */
	struct state_slot_note note;
};

struct records {
	void *data; /* owned */
	size_t nr, cap;
};

/* ---- record ---- */

static int emit_slot(struct snapd_vm *vm, struct records *out, const struct view *v,
		     uint64_t offset, uint64_t nr_pages, uint64_t home_gfn)
{
	struct slot_record *slots = out->data;

	if (!GROW(slots, out->nr, out->cap))
		return -ENOMEM;
	out->data = slots;
	slots[out->nr++] = (struct slot_record){
		.slot =
			{
				.slot = v->m.slot,
				.as_id = v->m.as_id,
				.flags = v->m.flags & SNAPD_SLOT_READONLY,
				.gpa = v->m.gpa + (offset << vm->page_shift),
				.nr_pages = nr_pages,
				.home_gfn = home_gfn,
			},
		/* Views and generations change together, under slots_lock. */
		.note =
			{
				.generation = vm->table.gens[v->m.as_id][v->kernel_id].generation,
				.kernel_id = v->kernel_id,
			},
	};
	return 0;
}

static int emit_view(struct snapd_vm *vm, struct records *out, const struct view *v)
{
	int r = 0;

	if (!v->nr_runs || v->m.flags & SNAPD_SLOT_PRIVATE)
		return emit_slot(vm, out, v, 0, v->m.size_bytes >> vm->page_shift, NOT_TRACKED);
	for (uint32_t i = 0; i < v->nr_runs && !r; i++) {
		const struct slot_run *run = &v->runs[i];

		for (uint64_t at = 0, n; at < run->nr_frames && !r; at += n) {
			const struct piece *p = piece_of_frame(vm, run->first_frame + at);
			uint64_t skip = run->first_frame + at - p->first_frame;

			n = MIN(run->nr_frames - at, p->nr_frames - skip);
			r = emit_slot(vm, out, v, run->offset + at, n, p->home_gfn + skip);
		}
	}
	return r;
}

/* By place, not by age: equal layouts make equal records. */
static int compare_gpa(const void *a, const void *b)
{
	const struct state_slot *x = &((const struct slot_record *)a)->slot;
	const struct state_slot *y = &((const struct slot_record *)b)->slot;

	if (x->as_id != y->as_id)
		return x->as_id < y->as_id ? -1 : 1;
	return x->gpa < y->gpa ? -1 : x->gpa > y->gpa;
}

static int compare_home(const void *a, const void *b)
{
	const struct state_piece *x = a, *y = b;

	return x->home_gfn < y->home_gfn ? -1 : x->home_gfn > y->home_gfn;
}

static int emit_pieces(struct snapd_vm *vm, struct records *out)
{
	struct state_piece *pieces = calloc(MAX(vm->nr_pieces, (size_t)1), sizeof(*pieces));

	if (!pieces)
		return -ENOMEM;
	out->data = pieces;
	for (size_t i = 0; i < vm->nr_pieces; i++) {
		const struct piece *p = &vm->pieces[i];

		if (!p->gone && !vm->blocks[p->block].is_private)
			pieces[out->nr++] = (struct state_piece){
				.home_gfn = p->home_gfn,
				.nr_pages = p->nr_frames,
				.block = p->block,
				.block_page = p->block_page,
			};
	}
	qsort(pieces, out->nr, sizeof(*pieces), compare_home);
	return 0;
}

/* "layout" and "note.slots" of what was gathered. */
static int put_slots(struct snapd_state_writer *w, const struct slot_record *rec, size_t nr)
{
	struct state_slot *slots = calloc(MAX(nr, (size_t)1), sizeof(*slots));
	struct state_slot_note *notes = calloc(MAX(nr, (size_t)1), sizeof(*notes));
	int r = slots && notes ? 0 : -ENOMEM;

	for (size_t i = 0; !r && i < nr; i++) {
		slots[i] = rec[i].slot;
		notes[i] = rec[i].note;
	}
	if (!r)
		r = state_put(w, "layout", 0, 1, slots, nr * sizeof(*slots));
	if (!r)
		r = state_put(w, "note.slots", 0, 1, notes, nr * sizeof(*notes));
	free(slots);
	free(notes);
	return r;
}

int layout_save(struct snapd_vm *vm, struct snapd_state_writer *w, struct err *e)
{
	struct records slots = {0}, pieces = {0};
	int r = 0;

	pthread_mutex_lock(&vm->slots_lock);
	for (size_t i = 0; i < vm->nr_views && !r; i++)
		r = emit_view(vm, &slots, &vm->views[i]);
	if (!r && slots.nr)
		qsort(slots.data, slots.nr, sizeof(struct slot_record), compare_gpa);
	if (!r)
		r = emit_pieces(vm, &pieces);
	pthread_mutex_unlock(&vm->slots_lock);
	if (!r)
		r = put_slots(w, slots.data, slots.nr);
	if (!r)
		r = state_put(w, "pieces", 0, 1, pieces.data,
			      pieces.nr * sizeof(struct state_piece));
	free(slots.data);
	free(pieces.data);
	return r < 0 ? err_errno(e, -r, "cannot record the memory layout") : 0;
}

/* ---- apply ---- */

struct target {
	struct snapd_memslot *slots; /* owned */
	size_t nr, cap;
};

static int target_rom(struct snapd_vm *vm, const struct state_slot *s, struct snapd_memslot *m,
		      struct err *e)
{
	for (size_t i = 0; i < vm->nr_roms; i++) {
		const struct snapd_memslot *rom = &vm->roms[i].m;

		if (rom->as_id == m->as_id && rom->gpa == m->gpa &&
		    rom->size_bytes == m->size_bytes) {
			m->hva = rom->hva;
			m->fd = -1;
			return 0;
		}
	}
	return err_set(e, ENOENT,
		       "the snapshot has ROM at GPA 0x%" PRIx64 ", this VM never had any", s->gpa);
}

static int target_ram(struct snapd_vm *vm, const struct state_slot *s, struct snapd_memslot *m,
		      struct err *e)
{
	const struct piece *p = piece_of_home(vm, s->home_gfn);
	uint64_t skip;

	if (!p || s->nr_pages > p->nr_frames - (s->home_gfn - p->home_gfn))
		return err_set(e, ENOENT,
			       "the snapshot has %" PRIu64 " pages with home GFN 0x%" PRIx64
			       " that this VM has not",
			       s->nr_pages, s->home_gfn);
	skip = (s->home_gfn - p->home_gfn) << vm->page_shift;
	m->hva = p->hva + skip;
	m->fd = vm->blocks[p->block].fd;
	m->fd_offset = (p->block_page << vm->page_shift) + skip;
	return 0;
}

static int target_of(struct snapd_vm *vm, const struct state_slot *s, struct snapd_memslot *m,
		     struct err *e)
{
	if (s->as_id >= vm->address_spaces || !s->nr_pages ||
	    s->nr_pages > UINT64_MAX >> vm->page_shift || s->gpa % vm->page_size ||
	    s->gpa + (s->nr_pages << vm->page_shift) < s->gpa)
		return err_set(e, E_CORRUPT, "the snapshot's layout names an impossible slot %u",
			       s->slot);
	*m = (struct snapd_memslot){
		.slot = s->slot,
		.as_id = s->as_id,
		.flags = s->flags & SNAPD_SLOT_READONLY,
		.gpa = s->gpa,
		.size_bytes = s->nr_pages << vm->page_shift,
	};
	return s->home_gfn == NOT_TRACKED ? target_rom(vm, s, m, e) : target_ram(vm, s, m, e);
}

/* Does `m` go on where `last` ends, as another piece of one slot? */
static bool continues(const struct snapd_memslot *last, const struct snapd_memslot *m)
{
	return last->slot == m->slot && last->as_id == m->as_id && last->fd >= 0 &&
	       last->gpa + last->size_bytes == m->gpa &&
	       (char *)last->hva + last->size_bytes == m->hva &&
	       last->fd_offset + last->size_bytes == m->fd_offset;
}

/* Pieces that were one slot, which KVM maps from one host address on: where the VMM has
 * them at two by now, there is no such slot to be made. */
static int target_append(struct target *t, const struct snapd_memslot *m, struct err *e)
{
	struct snapd_memslot *last = t->nr ? &t->slots[t->nr - 1] : NULL;

	if (last && continues(last, m)) {
		last->size_bytes += m->size_bytes;
		return 0;
	}
	if (last && last->slot == m->slot && last->as_id == m->as_id)
		return err_set(e, EINVAL,
			       "the snapshot has one memslot at GPA 0x%" PRIx64
			       " of memory that the VMM has mapped in two places",
			       last->gpa);
	if (!GROW(t->slots, t->nr, t->cap))
		return err_set(e, ENOMEM, "no memory for the layout");
	t->slots[t->nr++] = *m;
	return 0;
}

static int target_read(struct snapd_vm *vm, const struct snapd_state_reader *r, struct target *t,
		       struct err *e)
{
	const struct state_slot *s;
	struct snapd_memslot m = {0};
	uint16_t version;
	const void *data;
	size_t len;
	int ret = state_get(r, "layout", 0, &version, &data, &len);

	if (ret < 0)
		return err_set(e, E_CORRUPT, "the snapshot has no layout record");
	if (version != 1 || len % sizeof(*s))
		return err_set(e, ENOTSUP, "layout record of version %u, %zu bytes", version, len);
	s = data;
	for (size_t i = 0; i < len / sizeof(*s); i++) {
		ret = target_of(vm, &s[i], &m, e);
		if (ret >= 0)
			ret = target_append(t, &m, e);
		if (ret < 0)
			return ret;
	}
	return 0;
}

static bool same_slot(const struct snapd_memslot *a, const struct snapd_memslot *b)
{
	return a->slot == b->slot && a->as_id == b->as_id && a->gpa == b->gpa &&
	       a->size_bytes == b->size_bytes && !((a->flags ^ b->flags) & SNAPD_SLOT_READONLY) &&
	       a->hva == b->hva && a->fd_offset == b->fd_offset;
}

static bool target_has(const struct target *t, const struct snapd_memslot *m)
{
	for (size_t i = 0; i < t->nr; i++)
		if (same_slot(&t->slots[i], m))
			return true;
	return false;
}

/* Delete slots: those the target has not, or all of them.  Returns how many. */
static int delete_views(struct snapd_vm *vm, const struct target *keep, struct err *e)
{
	int n = 0, r;

	for (size_t i = vm->nr_views; i-- > 0;) {
		if (keep && target_has(keep, &vm->views[i].m))
			continue;
		r = view_delete(vm, &vm->views[i], e);
		if (r < 0)
			return r;
		n++;
	}
	return n;
}

static int add_missing(struct snapd_vm *vm, const struct target *t, struct err *e)
{
	int n = 0, r;

	for (size_t i = 0; i < t->nr; i++) {
		struct view *v = view_find(vm, t->slots[i].as_id, t->slots[i].slot);

		if (v && same_slot(&v->m, &t->slots[i]))
			continue;
		r = view_add(vm, &t->slots[i], e);
		if (r < 0)
			return r;
		n++;
	}
	return n;
}

static bool is_current(struct snapd_vm *vm, const struct target *t)
{
	for (size_t i = 0; i < vm->nr_views; i++)
		if (!target_has(t, &vm->views[i].m))
			return false;
	return vm->nr_views == t->nr;
}

static int apply(struct snapd_vm *vm, const struct target *t, bool cure, uint64_t *cure_ns,
		 struct err *e)
{
	uint64_t begin = now_ns();
	int r = delete_views(vm, cure && !vm->zap_all ? NULL : t, e);

	if (!r && cure && vm->zap_all)
		r = shadow_zap_all(vm, e);
	if (r >= 0)
		r = add_missing(vm, t, e);
	*cure_ns = now_ns() - begin;
	return r;
}

/* A failure is met again in LOAD, which may fail. */
void layout_cure_ahead(struct snapd_vm *vm)
{
	uint64_t begin = now_ns();

	pthread_mutex_lock(&vm->slots_lock);
	/* Else each slot is deleted and added: not to a VM that may be let go. */
	if (vm->shadows && vm->zap_all)
		vm->cured = shadow_zap_all(vm, NULL) >= 0;
	pthread_mutex_unlock(&vm->slots_lock);
	vm->cure_ns = now_ns() - begin;
}

/* Memory that the snapshot does not know, such as a DIMM plugged in since, is no part of
 * the VM any more: else it would be stored with the next one, and nobody could see it. */
static int drop_unknown(struct snapd_vm *vm, const struct snapd_state_reader *r, struct err *e)
{
	uint16_t version;
	const void *data;
	size_t len;

	if (state_get(r, "pieces", 0, &version, &data, &len) < 0)
		return err_set(e, E_CORRUPT, "the snapshot has no pieces record");
	if (version != 1 || len % sizeof(struct state_piece))
		return err_set(e, ENOTSUP, "pieces record of version %u, %zu bytes", version, len);
	backing_keep(vm, data, len / sizeof(struct state_piece));
	return 0;
}

int layout_check(struct snapd_vm *vm, const struct snapd_state_reader *r, struct err *e)
{
	struct target t = {0};
	int ret;

	pthread_mutex_lock(&vm->slots_lock);
	ret = target_read(vm, r, &t, e);
	pthread_mutex_unlock(&vm->slots_lock);
	free(t.slots);
	return ret;
}

int layout_load(struct snapd_vm *vm, const struct snapd_state_reader *r, uint64_t *layout_ns,
		uint64_t *cure_ns, struct err *e)
{
	uint64_t begin = now_ns();
	bool same = true, cure = !vm->cured;
	struct target t = {0};
	int ret;

	vm->cured = false; /* should this fail, the next is not to rely on it */

	pthread_mutex_lock(&vm->slots_lock);
	if (vm->vmm_state) { /* which brings its slots itself */
		ret = cure && vm->shadows ? shadow_zap_all(vm, e) : 0;
		pthread_mutex_unlock(&vm->slots_lock);
		*cure_ns = now_ns() - begin + vm->cure_ns;
		*layout_ns = vm->cure_ns = 0;
		return MIN(ret, 0);
	}
	ret = target_read(vm, r, &t, e);
	if (ret >= 0) {
		same = is_current(vm, &t);
		ret = apply(vm, &t, cure && (vm->shadows || vm->arch->shadows(&vm->kvm, r)),
			    cure_ns, e);
	}
	if (ret >= 0)
		ret = drop_unknown(vm, r, e);
	pthread_mutex_unlock(&vm->slots_lock);
	if (ret >= 0 && !same && vm->cb.layout)
		vm->cb.layout(vm->opaque, t.slots, t.nr);
	free(t.slots);
	*layout_ns = now_ns() - begin - *cure_ns;
	*cure_ns += vm->cure_ns;
	vm->cure_ns = 0;
	return ret < 0 ? ret : 0;
}
