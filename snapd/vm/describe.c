/* SPDX-License-Identifier: MIT */
/*
 * vm_describe: what others may see of a VM.  Its thread publishes, anyone reads, under
 * vm.lock: figures, counters of the shared page, JSON of the API.
 */
#include <string.h>

#include "snapd/vm/priv.h"

#include "include/snapd/agent.h"
#include "snapd/core/tags.h"
#include "snapd/util/cleanup.h"

bool vm_is(const struct vm *vm, const char *name, uint32_t uid)
{
	return vm->uid == uid && !strcmp(vm->name, name);
}

uint64_t vm_dirty_frames(struct vm *vm)
{
	struct vm_shm_stats stats = {};

	pthread_mutex_lock(&vm->lock);
	if (vm->shm.map)
		vm_shm_stats(&vm->shm, vm->pub.frames_end, &stats);
	pthread_mutex_unlock(&vm->lock);
	return stats.dirty_frames + stats.pending;
}

void vm_keep_timeline(struct vm *vm, uint64_t timeline)
{
	pthread_mutex_lock(&vm->lock);
	vm->pub.fork = timeline;
	pthread_mutex_unlock(&vm->lock);
}

void vm_publish(struct vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	vm->pub.nr_vcpus = vm->hello.nr_vcpus;
	vm->pub.ring_entries = vm->hello.ring_entries;
	vm->pub.page_size = vm->hello.page_size;
	vm->pub.dirty_backend = vm->hello.dirty_backend;
	vm->pub.ram_frames = vm->mem.ram_frames;
	vm->pub.frames_end = vm->mem.frames_end;
	vm->pub.point = vm->point;
	vm->pub.broken = vm->broken;
	pthread_mutex_unlock(&vm->lock);
}

static json_t *pause_json(const struct vm_pause *p)
{
	return json_pack("{s:I,s:I,s:I,s:I,s:I,s:I,s:I}", "total_ns", (json_int_t)p->total_ns,
			 "stop_ns", (json_int_t)p->stop_ns, "state_ns", (json_int_t)p->state_ns,
			 "harvest_ns", (json_int_t)p->harvest_ns, "copy_ns", (json_int_t)p->copy_ns,
			 "service_ns", (json_int_t)p->service_ns, "pages", (json_int_t)p->pages);
}

static json_t *counters_json(const struct vm_shm_stats *s)
{
	json_t *o = json_object();

#define PUT(f) json_object_set_new(o, #f, json_integer((json_int_t)s->f))
	PUT(harvested);
	PUT(reset);
	PUT(published);
	PUT(ring_full);
	PUT(unresolved);
	PUT(host_marks);
	PUT(kicks);
	PUT(pauses);
	PUT(reconnects);
	PUT(slot_changes);
	PUT(pending);
	PUT(harvest_ns);
	PUT(harvests);
#undef PUT
	return o;
}

static json_t *epochs_json(const struct vm_epochs *ep)
{
	return json_pack("{s:I,s:I,s:I,s:I,s:I,s:I}", "durable", (json_int_t)ep->nr, "paused_ns",
			 (json_int_t)ep->pause_ns.sum, "changed_bytes",
			 (json_int_t)ep->epoch_bytes.sum, "pages_stored",
			 (json_int_t)ep->pages_stored, "bytes_written",
			 (json_int_t)ep->bytes_written, "taken_ns", (json_int_t)ep->taken_ns);
}

/* Any number may come; an agent that does not tell has rings. */
static const char *dirty_backend_name(uint32_t backend)
{
	static const char *const names[] = {[SNAPD_DIRTY_AUTO] = "ring",
					    [SNAPD_DIRTY_RING] = "ring",
					    [SNAPD_DIRTY_LOG] = "log",
					    [SNAPD_DIRTY_PAGEMAP] = "pagemap"};

	return backend < ARRAY_SIZE(names) ? names[backend] : "unknown";
}

json_t *vm_describe(struct vm *vm)
{
	struct vm_shm_stats stats = {};
	const char *running, *refusal;
	char tags[VM_TAGS_MAX];
	json_t *about;
	struct vm_pub pub;
	json_int_t ram_bytes;
	uint32_t queued;

	pthread_mutex_lock(&vm->lock);
	pub = vm->pub;
	ram_bytes = (json_int_t)pub.ram_frames * pub.page_size;
	queued = vm->nr_queued;
	running = vm->running ? job_kind_names[vm->running->kind] : NULL;
	about = json_incref(pub.about);
	if (vm->shm.map)
		vm_shm_stats(&vm->shm, pub.frames_end, &stats);
	pthread_mutex_unlock(&vm->lock);
	refusal = pub.refusal[0] ? pub.refusal : NULL;
	vm_tags_of(vm->d->tags, vm->name, vm->uid, tags);
	return json_pack(
		"{s:s,s:s,s:s,s:i,s:i,s:s,s:I,s:i,s:s,s:i,s:i,s:I,s:I,s:I,s:b,s:{s:I,s:I},s:I,"
		"s:I,s:I,s:I,"
		"s:s?,s:i,"
		"s:o,s:o,s:o,s:o?,s:s?}",
		"name", vm->name, "tags", tags, "state", vm_state_names[vm->state], "uid",
		(int)vm->uid, "pid", (int)vm->pid, "arch", vm->arch, "attached_ns",
		(json_int_t)vm->attached_ns, "vcpus", (int)pub.nr_vcpus, "dirty_backend",
		dirty_backend_name(pub.dirty_backend), "ring_entries", (int)pub.ring_entries,
		"page_size", (int)pub.page_size, "ram_bytes", ram_bytes, "dirty_frames",
		(json_int_t)stats.dirty_frames, "head_snapshot", (json_int_t)pub.head_snapshot,
		"broken", pub.broken, "point", "timeline", (json_int_t)pub.point.timeline, "epoch",
		(json_int_t)pub.point.epoch, "snapshots", (json_int_t)pub.snapshots, "failures",
		(json_int_t)pub.failures, "self_checks", (json_int_t)pub.self_checks,
		"missed_pages", (json_int_t)pub.missed_pages, "job", running, "queued", (int)queued,
		"last_pause", pause_json(&pub.pause), "epochs", epochs_json(&pub.epochs),
		"counters", counters_json(&stats), "vmm", about, "refusal", refusal);
}

json_t *vm_list_json(struct daemon *d, uint32_t uid)
{
	json_t *list = json_array();

	pthread_mutex_lock(&d->vms_lock);
	for (struct vm *v = d->vms; v; v = v->next)
		if (v->claimed && (!uid || v->uid == uid))
			json_array_append_new(list, vm_describe(v));
	pthread_mutex_unlock(&d->vms_lock);
	return list;
}
