/* SPDX-License-Identifier: MIT */
/*
 * From HELLO to READY: who this VM is, what its memory consists of, and where its
 * dirty sets stand against the store.  On the VM's thread; all input is untrusted.
 *
 * Where the sets stand.  The page says: "dirty ∪ inflight is what differs from
 * `base`".  Believed if and only if
 *   the store is the same, the timeline is one of this very VM, and its head is
 *   base, or the epoch after base: then the service died between its commit and
 *   writing the new base, and that epoch was made from these sets, because only
 *   one connection at a time writes a timeline.
 * In both cases every page that differs from the head is in dirty ∪ inflight.
 * Else everything is dirty.  A VMM that lies here damages its own snapshots only.
 */
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include "snapd/core/name.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/vm/priv.h"

static bool is_text(const char *s, size_t max)
{
	size_t n = strnlen(s, max);

	for (size_t i = 0; i < n; i++)
		if (s[i] < ' ' || s[i] > '~')
			return false;
	return n < max;
}

static int check_hello(const struct snapd_msg_hello *h, struct err *e)
{
	if (h->major != SNAPD_PROTO_MAJOR)
		return err_set(e, EPROTO, "agent speaks protocol %u.%u, this service %u.%u",
			       h->major, h->minor, SNAPD_PROTO_MAJOR, SNAPD_PROTO_MINOR);
	if (h->flags & ~(SNAPD_HELLO_REWRITING | SNAPD_HELLO_RESTORE | SNAPD_HELLO_VMM_STATE))
		return err_set(e, EPROTO, "HELLO with unknown flags 0x%x", h->flags);
	if (!is_text(h->name, sizeof(h->name)))
		return err_set(e, EINVAL, "bad VM name");
	if (name_check("VM name", h->name, e))
		return -EINVAL;
	if (!h->arch[0] || !is_text(h->arch, sizeof(h->arch)))
		return err_set(e, EINVAL, "bad architecture name");
	if (h->page_size != (uint32_t)sysconf(_SC_PAGESIZE))
		return err_set(e, EINVAL, "page size %u is not this host's", h->page_size);
	if (!is_text(h->restore, sizeof(h->restore)) ||
	    !!h->restore[0] != !!(h->flags & SNAPD_HELLO_RESTORE))
		return err_set(e, EINVAL, "bad snapshot name to restore");
	if (h->cmdline_len > sizeof(h->cmdline))
		return err_set(e, EINVAL, "bad command line");
	return 0;
}

static int receive_hello(struct vm *vm, struct err *e)
{
	const struct snapd_msg_hello *h = (const struct snapd_msg_hello *)vm->in;
	int err = vm_recv(vm, VM_HELLO_TIMEOUT_MS, e);

	if (err <= 0)
		return err ? err : err_set(e, ETIMEDOUT, "no HELLO came");
	/* The version stands where it always will, so look before the length. */
	if (h->h.type != SNAPD_MSG_HELLO || h->h.len < offsetof(struct snapd_msg_hello, flags))
		return err_set(e, EPROTO, "first message is not HELLO");
	if (h->major == SNAPD_PROTO_MAJOR && h->h.len < sizeof(*h))
		return err_set(e, EPROTO, "HELLO of %u bytes is too short", h->h.len);
	memset(&vm->hello, 0, sizeof(vm->hello));
	memcpy(&vm->hello, h, MIN((size_t)h->h.len, sizeof(*h)));
	err = check_hello(&vm->hello, e);
	if (!err && vm->in_fd < 0)
		err = err_set(e, EPROTO, "HELLO came without the shared memory file");
	return err;
}

static int map_shm(struct vm *vm, struct err *e)
{
	int err;

	pthread_mutex_lock(&vm->lock);
	err = vm_shm_map(&vm->shm, vm->in_fd, vm->hello.shm_bytes, e);
	pthread_mutex_unlock(&vm->lock);
	if (!err)
		err = vm_mem_init(&vm->mem, vm->hello.page_size, vm->shm.nr_frames);
	return err;
}

static int register_vm(struct vm *vm, struct err *e)
{
	struct store_vm sv = {.uid = vm->uid,
			      .page_size = vm->hello.page_size,
			      .cmdline = vm->hello.cmdline, /* borrowed: not deinit()ed */
			      .cmdline_len = vm->hello.cmdline_len};
	int err;

	memcpy(sv.name, vm->name, sizeof(sv.name));
	memcpy(sv.arch, vm->arch, sizeof(sv.arch));
	err = store_vm_register(vm->d->store, &sv, e);
	memcpy(vm->id, sv.id, sizeof(vm->id));
	return err;
}

/* The point that the sets stand at, by the rule above; {0,0} for none. */
static struct snapd_point find_point(struct vm *vm)
{
	struct snapd_point none = {};
	struct store_timeline t;
	struct vm_base base;

	if (vm_shm_get_base(&vm->shm, &base) || !base.point.timeline ||
	    memcmp(base.store, store_uuid(vm->d->store), sizeof(base.store)) != 0)
		return none;
	if (store_timeline_get(vm->d->store, base.point.timeline, &t, NULL) ||
	    memcmp(t.vm, vm->id, sizeof(t.vm)) != 0)
		return none;
	if (t.head - base.point.epoch > 1) /* unsigned: also when base is ahead */
		return none;
	return (struct snapd_point){t.id, t.head};
}

static bool same_point(struct snapd_point a, struct snapd_point b)
{
	return a.timeline == b.timeline && a.epoch == b.epoch;
}

/* A gc that runs already has its list of live timelines: it learns of this by the pin.
 * Later ones see what vm_keep_timeline() told.  -errno: the point is lost. */
static int load_live(struct vm *vm, struct err *e)
{
	struct store *s = vm->d->store;
	int err = store_pin(s, vm->point, e);

	if (err)
		return err;
	err = store_map_load(s, vm->point, true, &vm->live, e);
	store_unpin(s, vm->point);
	return err;
}

/* Sets vm->point and vm->live; the timeline is kept until the point is published.
 * Takes `known`, the map at `known_at`, or NULL. */
static int find_where_it_stands(struct vm *vm, struct pagemap *known, struct snapd_point known_at,
				struct err *e)
{
	struct err why = {};

	vm->point = find_point(vm);
	vm_keep_timeline(vm, vm->point.timeline);
	if (vm->point.timeline && known && same_point(known_at, vm->point)) {
		vm->live = known;
		return 0;
	}
	pagemap_destroy(known);
	if (!vm->point.timeline)
		return pagemap_create(true, &vm->live);
	if (!load_live(vm, &why))
		return 0;
	log_warn("%s: cannot load where it stood, takes all memory for dirty: %s", vm->name,
		 why.text);
	vm->point = (struct snapd_point){};
	return pagemap_create(true, &vm->live);
}

static int welcome(struct vm *vm, struct err *e)
{
	struct snapd_msg_welcome msg = {.major = SNAPD_PROTO_MAJOR,
					.minor = SNAPD_PROTO_MINOR,
					.flags = rings_wanted(vm) ? SNAPD_WELCOME_RINGS : 0,
					.head = vm->point};

	memcpy(msg.store, store_uuid(vm->d->store), sizeof(msg.store));
	return vm_send(vm, &msg, sizeof(msg), SNAPD_MSG_WELCOME, -1, e);
}

static int attach(struct vm *vm, struct err *e)
{
	struct pagemap *known = NULL;
	struct snapd_point at = {};
	struct store_snapshot snap;
	int err = receive_hello(vm, e);

	if (!err)
		err = map_shm(vm, e);
	if (!err)
		err = vm_claim(vm, &known, &at, e);
	if (!err)
		err = register_vm(vm, e);
	if (!err && vm->hello.restore[0] &&
	    store_snapshot_find(vm->d->store, vm->hello.restore, vm->uid, &snap, NULL))
		err = err_set(e, EINVAL, "there is no snapshot '%s' to restore", vm->hello.restore);
	if (err) {
		pagemap_destroy(known);
		return err;
	}
	err = find_where_it_stands(vm, known, at, e);
	return err ? err : welcome(vm, e);
}

int vm_hello(struct vm *vm)
{
	struct err e = {};
	int err = attach(vm, &e);

	if (!err) {
		atomic_store(&vm->state, VM_TELLING);
		vm_publish(vm);
		vm_keep_timeline(vm, 0);
		return 0;
	}
	if (!e.code)
		err_errno(&e, -err, "attach");
	log_event(LOG_VM_REFUSED, LOG_LVL_WARN, "connection of uid %u, pid %u%s%s refused: %s",
		  vm->uid, vm->pid, vm->name[0] ? ", VM " : "", vm->name, e.text);
	vm_say_error(vm, SNAPD_MSG_REJECT, &e);
	return err;
}

/* ---- what memory consists of ---- */

static int add_gone(struct vm *vm, uint64_t gfn, uint64_t n)
{
	struct gfn_run *v = reallocarray(vm->gone, vm->nr_gone + 1, sizeof(*v));

	if (!v)
		return -ENOMEM;
	vm->gone = v;
	v[vm->nr_gone++] = (struct gfn_run){gfn, n};
	return 0;
}

static int told_gone(struct vm *vm, uint32_t id, struct err *e)
{
	struct snapd_piece p;
	int err = vm_mem_remove_piece(&vm->mem, id, &p, e);

	if (!err)
		err = vm_shm_clear_range(&vm->shm, &vm->shm.inflight, p.first_frame, p.nr_frames);
	if (!err)
		err = vm_shm_clear_range(&vm->shm, &vm->shm.dirty, p.first_frame, p.nr_frames);
	return err ? err : add_gone(vm, p.home_gfn, p.nr_frames);
}

/* Shown to people and never looked into: an object, or there is none. */
static int told_about(struct vm *vm, const struct snapd_msg_about *m, struct err *e)
{
	json_t *about = NULL;

	if (m->json_len > sizeof(m->json) || !is_text(m->refusal, sizeof(m->refusal)))
		return err_set(e, EPROTO, "bad ABOUT");
	if (m->json_len)
		about = json_loadb(m->json, m->json_len, 0, NULL);
	if (about && !json_is_object(about)) {
		json_decref(about);
		about = NULL;
	}
	pthread_mutex_lock(&vm->lock);
	json_decref(vm->pub.about);
	vm->pub.about = about;
	memcpy(vm->pub.refusal, m->refusal, sizeof(vm->pub.refusal));
	pthread_mutex_unlock(&vm->lock);
	return 0;
}

static int told(struct vm *vm, struct err *e)
{
	const struct snapd_msg *h = (const struct snapd_msg *)vm->in;
	static const size_t lens[] = {[SNAPD_MSG_BLOCK] = sizeof(struct snapd_msg_block),
				      [SNAPD_MSG_PIECE] = sizeof(struct snapd_msg_piece),
				      [SNAPD_MSG_GONE] = sizeof(struct snapd_msg_gone),
				      [SNAPD_MSG_READY] = sizeof(struct snapd_msg_ready),
				      [SNAPD_MSG_BYE] = sizeof(struct snapd_msg_bye),
				      [SNAPD_MSG_ABOUT] = sizeof(struct snapd_msg_about),
				      [SNAPD_MSG_VCPU] = sizeof(struct snapd_msg_vcpu)};
	int err;

	if (h->type >= ARRAY_SIZE(lens) || !lens[h->type])
		return err_set(e, EPROTO, "unexpected message type %u", h->type);
	if (h->len < lens[h->type])
		return err_set(e, EPROTO, "message type %u is too short", h->type);
	switch (h->type) {
	case SNAPD_MSG_BLOCK:
		if (vm->in_fd < 0)
			return err_set(e, EPROTO, "BLOCK without its file");
		return vm_mem_add_block(&vm->mem, (const struct snapd_msg_block *)h,
					steal_fd(&vm->in_fd), e);
	case SNAPD_MSG_PIECE:
		err = vm_mem_add_piece(&vm->mem, &((const struct snapd_msg_piece *)h)->p, e);
		if (!err)
			vm_publish(vm);
		return err;
	case SNAPD_MSG_GONE:
		return told_gone(vm, ((const struct snapd_msg_gone *)h)->piece, e);
	case SNAPD_MSG_BYE:
		vm->said_bye = true;
		return 0;
	case SNAPD_MSG_ABOUT:
		return told_about(vm, (const struct snapd_msg_about *)h, e);
	case SNAPD_MSG_VCPU:
		return rings_add(vm, (const struct snapd_msg_vcpu *)h, steal_fd(&vm->in_fd), e);
	default:
		vm->hello.nr_vcpus = ((const struct snapd_msg_ready *)h)->nr_vcpus;
		vm->ready = true;
		return 0;
	}
}

int vm_told(struct vm *vm)
{
	struct err e = {};
	int err = told(vm, &e);

	if (!err)
		return 0;
	if (!e.code)
		err_errno(&e, -err, "memory layout");
	log_warn("%s: disconnected: %s", vm->name, e.text);
	vm_say_error(vm, SNAPD_MSG_ERROR, &e);
	return err;
}

/* ---- the sets after the first READY ---- */

int vm_make_fresh(struct vm *vm, struct err *e)
{
	struct pagemap *empty;
	int err = pagemap_create(true, &empty);

	if (err)
		return err_set(e, ENOMEM, "out of memory");
	for (uint32_t i = 0; !err && i < vm->mem.nr_pieces; i++) {
		const struct snapd_piece *p = &vm->mem.by_frame[i].p;

		err = vm_shm_add_range(&vm->shm, &vm->shm.dirty, p->first_frame, p->nr_frames);
	}
	vm->nr_gone = 0;
	if (!err)
		return vm_set_point(vm, (struct snapd_point){}, empty, e);
	pagemap_destroy(empty);
	return err_set(e, -err, "the VM's shared memory is gone");
}

int vm_set_point(struct vm *vm, struct snapd_point at, struct pagemap *live, struct err *e)
{
	struct vm_base base = {.point = at};
	int err;

	memcpy(base.store, store_uuid(vm->d->store), sizeof(base.store));
	err = vm_shm_set_base(&vm->shm, &base);
	if (vm->live != live)
		pagemap_destroy(vm->live);
	vm->live = live;
	if (vm->point.timeline != at.timeline)
		vm->sound_at = 0;
	vm->point = at;
	vm_publish(vm);
	return err ? err_set(e, -err, "the VM's shared memory is gone") : 0;
}

/* Keys that the store has and this VM has no memory for any more: they went while
 * nobody listened. */
static int find_gone(struct vm *vm)
{
	const struct vm_piece *p = NULL;
	struct pagemap_iter it;
	uint64_t gfn;
	loc_t loc;
	int err = pagemap_iter_init(&it, vm->live);

	if (err)
		return err;
	while (!err && pagemap_iter_next(&it, &gfn, &loc)) {
		if (!vm_piece_has_gfn(p, gfn))
			p = vm_mem_by_gfn(&vm->mem, gfn);
		if (p)
			continue;
		if (vm->nr_gone &&
		    vm->gone[vm->nr_gone - 1].gfn + vm->gone[vm->nr_gone - 1].n == gfn)
			vm->gone[vm->nr_gone - 1].n++;
		else
			err = add_gone(vm, gfn, 1);
	}
	pagemap_iter_deinit(&it);
	return err;
}

static int first_ready(struct vm *vm, struct err *e)
{
	int err;

	vm->told = true;
	if (!vm->point.timeline)
		return vm_make_fresh(vm, e);
	err = find_gone(vm);
	if (!err)
		err = vm_shm_merge(&vm->shm, vm->mem.frames_end, true);
	if (err)
		return err_errno(e, -err, "take over the dirty sets");
	return vm_set_point(vm, vm->point, vm->live, e);
}

/* When the newest snapshot of the VM was taken: what would be lost begins there. */
static void find_newest(struct vm *vm)
{
	uint64_t taken_ns;

	if (store_snapshot_newest(vm->d->store, vm->id, &taken_ns, NULL))
		return;
	pthread_mutex_lock(&vm->lock);
	vm->pub.epochs.taken_ns = taken_ns;
	pthread_mutex_unlock(&vm->lock);
}

int vm_on_ready(struct vm *vm, struct err *e)
{
	int err = vm->told ? 0 : first_ready(vm, e);

	vm->ready = false;
	vm_publish(vm);
	if (err)
		return err;
	if (vm->hello.flags & SNAPD_HELLO_RESTORE) {
		err = restore_vm(vm, e);
		vm->few_vcpus = err == -EAGAIN;
		if (vm->few_vcpus) { /* a later READY will tell of more, or time runs out */
			err_clear(e);
			return 0;
		}
		if (err)
			return err;
		vm->hello.flags &= ~SNAPD_HELLO_RESTORE;
	}
	if (vm->hello.flags & SNAPD_HELLO_REWRITING) {
		vm->hello.flags &= ~SNAPD_HELLO_REWRITING;
		err = rollback_redo(vm, e);
		if (err)
			return err;
	}
	if (vm->state != VM_READY)
		find_newest(vm);
	if (vm->state != VM_READY)
		log_event(LOG_VM_READY, LOG_LVL_INFO, "%s: ready: %u vCPUs, %llu MiB%s", vm->name,
			  vm->hello.nr_vcpus,
			  (unsigned long long)(vm->mem.ram_frames * vm->mem.page_size >> 20),
			  vm->point.timeline ? ", where it was" : "");
	atomic_store(&vm->state, VM_READY);
	return 0;
}
