/* SPDX-License-Identifier: MIT */
/*
 * One attached VM: its thread, its queue of jobs, the list of all VMs, and what
 * others may see of it.  The struct and its life are drawn in vm_priv.h.
 *
 * In: a connected socket from the control thread; jobs from anyone.  The thread
 * waits for its agent and for jobs, and runs one job at a time to its end.
 *
 * Limits: VM_MAX_CONNECTIONS in all and VM_MAX_PER_UID of one user, so that no user
 * can use up the threads; VM_QUEUE_MAX jobs waiting; HELLO within 5 s.
 */
#include "snapd/vm/priv.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "include/snapd/agent.h"
#include "snapd/daemon/tags.h"
#include "snapd/vm/capture.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"

#define CLAIM_GRACE_NS 1000000000ull  /* for the end of a connection to be noticed */
#define CLAIM_MAX_NS   30000000000ull /* for an earlier connection's thread to end */

const char *const vm_state_names[VM_NR_STATES] = {
	[VM_HELLO] = "hello", [VM_TELLING] = "telling", [VM_READY] = "ready",
	[VM_LOST] = "lost",   [VM_GONE] = "gone",
};

uint64_t now_ns(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

/* ---- references ---- */

struct vm *vm_ref(struct vm *vm)
{
	atomic_fetch_add(&vm->refs, 1);
	return vm;
}

/* What needs the connection: mappings of the VMM's memory, and buffers. */
static void release_memory(struct vm *vm)
{
	capture_destroy(vm->capture);
	vm->capture = NULL;
	staging_deinit(&vm->staging);
	vm_mem_deinit(&vm->mem);
	pthread_mutex_lock(&vm->lock);
	vm_shm_unmap(&vm->shm);
	pthread_mutex_unlock(&vm->lock);
}

void vm_unref(struct vm *vm)
{
	if (!vm || atomic_fetch_sub(&vm->refs, 1) != 1)
		return;
	vm_disconnect(vm);
	release_memory(vm);
	pagemap_destroy(vm->live);
	free(vm->gone);
	json_decref(vm->pub.about);
	if (vm->event_fd >= 0)
		close(vm->event_fd);
	if (vm->peer_fd >= 0)
		close(vm->peer_fd);
	pthread_mutex_destroy(&vm->lock);
	free(vm);
}

static void wake_thread(struct vm *vm)
{
	uint64_t one = 1;

	(void)!write(vm->event_fd, &one, sizeof(one));
}

/* ---- jobs ---- */

struct vm *vm_of_job(struct job *job)
{
	return job->vm;
}

int vm_submit(struct vm *vm, struct job *job)
{
	int err = 0;

	pthread_mutex_lock(&vm->lock);
	if (vm->state != VM_READY || vm->stop) {
		err = -ENOTCONN;
	} else if (vm->nr_queued >= VM_QUEUE_MAX) {
		err = -EBUSY;
	} else {
		job->vm = vm;
		job->next = NULL;
		*vm->queue_tail = job_ref(job);
		vm->queue_tail = &job->next;
		vm->nr_queued++;
	}
	pthread_mutex_unlock(&vm->lock);
	if (!err)
		wake_thread(vm);
	return err;
}

/* The first in the queue, with the queue's reference; NULL: none. */
static struct job *pop_job(struct vm *vm)
{
	struct job *job;

	pthread_mutex_lock(&vm->lock);
	job = vm->queue;
	if (job) {
		vm->queue = job->next;
		if (!vm->queue)
			vm->queue_tail = &vm->queue;
		vm->nr_queued--;
	}
	vm->running = job;
	pthread_mutex_unlock(&vm->lock);
	return job;
}

static void run_jobs(struct vm *vm)
{
	struct job *job;

	while (vm->sock >= 0 && !vm->stop && (job = pop_job(vm))) {
		job_run(job);
		pthread_mutex_lock(&vm->lock);
		vm->running = NULL;
		pthread_mutex_unlock(&vm->lock);
		job_unref(job);
	}
}

static void fail_jobs(struct vm *vm)
{
	struct job *job;

	while ((job = pop_job(vm))) {
		job_fail(job, ENOTCONN, "%s: %s", vm->name,
			 vm->d->stopping ? "the service is stopping" : "the VM went away");
		job_unref(job);
	}
}

int vm_interrupted(struct vm *vm, struct job *job, struct err *e)
{
	if (vm->stop)
		return err_set(e, ECANCELED,
			       vm->d->stopping ? "the service is stopping"
					       : "the VM connected anew");
	if (job && atomic_load(&job->cancel))
		return err_set(e, ECANCELED, "cancelled");
	return 0;
}

/* ---- one name, one connection ---- */

static bool process_is_dead(const struct vm *vm)
{
	struct pollfd p = {.fd = vm->peer_fd, .events = POLLIN};

	return vm->peer_fd >= 0 && poll(&p, 1, 0) > 0;
}

static bool is_same_instance(const struct vm *a, const struct vm *b)
{
	return !memcmp(a->instance, b->instance, sizeof(a->instance));
}

/* Another VM of this owner that has the name or is the same instance. */
static struct vm *find_rival(struct vm *vm)
{
	struct vm *v;

	for (v = vm->d->vms; v; v = v->next)
		if (v != vm && v->claimed && v->uid == vm->uid &&
		    (is_same_instance(v, vm) || !strcmp(v->name, vm->name)))
			return v;
	return NULL;
}

static void wait_for_change(struct daemon *d, uint64_t ns)
{
	uint64_t at = now_ns(CLOCK_MONOTONIC) + ns;
	struct timespec ts = {.tv_sec = (time_t)(at / 1000000000),
			      .tv_nsec = (long)(at % 1000000000)};

	pthread_cond_clockwait(&d->vms_changed, &d->vms_lock, CLOCK_MONOTONIC, &ts);
}

/* May the rival's place be taken?  It is asked to end then. */
static bool supersede(struct vm *vm, struct vm *rival)
{
	if (!is_same_instance(vm, rival) && rival->state != VM_LOST && !process_is_dead(rival))
		return false;
	atomic_store(&rival->stop, true);
	wake_thread(rival);
	return true;
}

/* Under vms_lock.  It may be reaped now; accepts NULL. */
static void let_go(struct vm *former)
{
	if (!former)
		return;
	former->heirs--;
	daemon_wake(former->d);
	vm_unref(former);
}

/* Under vms_lock.  Returns with no rival left, or an error. */
static int push_rivals_out(struct vm *vm, struct vm **former, struct err *e)
{
	uint64_t begun = now_ns(CLOCK_MONOTONIC);
	struct vm *rival;

	while ((rival = find_rival(vm))) {
		uint64_t waited = now_ns(CLOCK_MONOTONIC) - begun;

		if (is_same_instance(vm, rival) && rival != *former) {
			let_go(*former);
			*former = vm_ref(rival);
			rival->heirs++;
		}
		if (!supersede(vm, rival) && waited > CLAIM_GRACE_NS)
			return err_set(e, EEXIST, "a VM named '%s' is attached already (pid %u)",
				       vm->name, rival->pid);
		if (waited > CLAIM_MAX_NS)
			return err_set(e, EBUSY, "an earlier connection of '%s' does not end",
				       vm->name);
		if (vm->stop)
			return err_set(e, ECANCELED, "the service is stopping");
		wait_for_change(vm->d, 20000000);
	}
	return 0;
}

int vm_claim(struct vm *vm, struct pagemap **live, struct snapd_point *at, struct err *e)
{
	struct vm *former = NULL;
	int err;

	pthread_mutex_lock(&vm->d->vms_lock);
	memcpy(vm->name, vm->hello.name, sizeof(vm->name));
	memcpy(vm->arch, vm->hello.arch, sizeof(vm->arch));
	memcpy(vm->instance, vm->hello.instance, sizeof(vm->instance));
	err = push_rivals_out(vm, &former, e);
	if (!err) {
		vm->claimed = true;
		if (former) {
			*live = steal_ptr(&former->live);
			*at = former->point;
			vm_keep_timeline(vm, former->point.timeline);
		}
	}
	let_go(former);
	pthread_mutex_unlock(&vm->d->vms_lock);
	return err;
}

/* ---- the thread ---- */

#define FEW_VCPUS_LOOK_MS 200

static void handle_message(struct vm *vm)
{
	struct err e = {};

	if (vm_recv(vm, 0, &e) <= 0) {
		if (e.code == -EPROTO)
			log_warn("%s: disconnected: %s", vm->name, e.text);
		return;
	}
	if (vm_told(vm) || !vm->ready || !vm_on_ready(vm, &e))
		return;
	log_event(LOG_VM_REFUSED, LOG_LVL_WARN, "%s: refused: %s", vm->name, e.text);
	vm_say_error(vm, SNAPD_MSG_REJECT, &e);
}

static void serve(struct vm *vm)
{
	struct pollfd p[2] = {{.fd = vm->event_fd, .events = POLLIN},
			      {.fd = vm->sock, .events = POLLIN}};
	uint64_t n;

	while (vm->sock >= 0 && !vm->stop) {
		if (poll(p, 2, vm->few_vcpus ? FEW_VCPUS_LOOK_MS : -1) < 0 && errno != EINTR)
			break;
		if (p[1].revents)
			handle_message(vm);
		if (p[0].revents)
			(void)!read(vm->event_fd, &n, sizeof(n));
		run_jobs(vm);
		/* told while a job waited; or vCPUs are waited for */
		if ((vm->ready || vm->few_vcpus) && vm->sock >= 0) {
			struct err e = {};

			if (vm_on_ready(vm, &e))
				vm_say_error(vm, SNAPD_MSG_REJECT, &e);
		}
	}
}

/* Keep what is known for the agent's return, until the VMM has ended. */
static void linger(struct vm *vm)
{
	uint64_t end = now_ns(CLOCK_MONOTONIC) + VM_LINGER_MS * 1000000ull;

	while (!vm->stop) {
		struct pollfd p[2] = {{.fd = vm->event_fd, .events = POLLIN},
				      {.fd = vm->peer_fd, .events = POLLIN}};
		uint64_t now = now_ns(CLOCK_MONOTONIC), n;

		if (now >= end || poll(p, 2, (int)((end - now) / 1000000) + 1) == 0 || p[1].revents)
			break;
		if (p[0].revents)
			(void)!read(vm->event_fd, &n, sizeof(n));
	}
}

static void change_state(struct vm *vm, enum vm_state state)
{
	pthread_mutex_lock(&vm->lock);
	atomic_store(&vm->state, state);
	pthread_mutex_unlock(&vm->lock);
	pthread_mutex_lock(&vm->d->vms_lock);
	if (state == VM_GONE) {
		vm->ended = true;
		vm->claimed = false;
	}
	pthread_cond_broadcast(&vm->d->vms_changed);
	pthread_mutex_unlock(&vm->d->vms_lock);
	daemon_wake(vm->d);
}

/* From now on the name is anybody's, and nobody's claim stops this thread. */
static void give_name_up(struct vm *vm)
{
	pthread_mutex_lock(&vm->d->vms_lock);
	vm->claimed = false;
	atomic_store(&vm->stop, vm->d->stopping);
	pthread_cond_broadcast(&vm->d->vms_changed);
	pthread_mutex_unlock(&vm->d->vms_lock);
}

static void *vm_thread(void *arg)
{
	struct vm *vm = arg;
	bool was_ready, keep;

	log_about()->vm = vm->name; /* empty until it is claimed */
	if (!vm_hello(vm))
		serve(vm);
	was_ready = vm->state == VM_READY;
	vm_disconnect(vm);
	change_state(vm, VM_LOST);
	fail_jobs(vm);
	keep = was_ready && postmortem_wanted(vm);
	if (!keep)
		release_memory(vm);
	if (was_ready && !vm->stop) {
		log_event(LOG_VM_LOST, LOG_LVL_INFO, "%s: connection lost", vm->name);
		linger(vm);
	}
	if (keep && process_is_dead(vm)) {
		give_name_up(vm);
		postmortem(vm);
	}
	release_memory(vm);
	if (was_ready)
		log_event(LOG_VM_ENDED, LOG_LVL_INFO, "%s: %s", vm->name,
			  process_is_dead(vm) ? "the VMM has ended" : "detached");
	change_state(vm, VM_GONE);
	return NULL;
}

/* ---- the list ---- */

static struct vm *vm_new(struct daemon *d, int fd, const struct ucred *peer)
{
	struct vm *vm = calloc(1, sizeof(*vm));

	if (!vm) {
		close(fd);
		return NULL;
	}
	vm->d = d;
	vm->refs = 1;
	vm->sock = fd;
	vm->in_fd = -1;
	vm->uid = peer->uid;
	vm->pid = (uint32_t)peer->pid;
	vm->peer_fd = peer->pid > 0 ? (int)syscall(SYS_pidfd_open, peer->pid, 0) : -1;
	vm->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	vm->queue_tail = &vm->queue;
	vm->attached_ns = now_ns(CLOCK_REALTIME);
	pthread_mutex_init(&vm->lock, NULL);
	return vm;
}

/* Under vms_lock. */
static bool too_many(struct daemon *d, uint32_t uid)
{
	uint32_t all = 0, own = 0;

	for (struct vm *v = d->vms; v; v = v->next) {
		all++;
		own += v->uid == uid;
	}
	return all >= VM_MAX_CONNECTIONS || own >= VM_MAX_PER_UID;
}

static int start(struct daemon *d, struct vm *vm)
{
	int err = vm->event_fd < 0 ? EMFILE : 0;

	pthread_mutex_lock(&d->vms_lock);
	if (!err && too_many(d, vm->uid))
		err = EUSERS;
	if (!err)
		err = pthread_create(&vm->thread, NULL, vm_thread, vm);
	if (!err) {
		vm->next = d->vms;
		d->vms = vm;
	}
	pthread_mutex_unlock(&d->vms_lock);
	return -err;
}

int vm_accept(struct daemon *d, int fd)
{
	struct ucred peer;
	socklen_t len = sizeof(peer);
	struct vm *vm;
	int err;

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len)) {
		err = -errno;
		close(fd);
		return err;
	}
	vm = vm_new(d, fd, &peer);
	if (!vm)
		return -ENOMEM;
	err = start(d, vm);
	if (err) {
		struct err e = {};

		err_errno(&e, -err, "uid %u: no more connections", vm->uid);
		log_warn("%s", e.text);
		vm_say_error(vm, SNAPD_MSG_REJECT, &e);
		vm_unref(vm);
	}
	return err;
}

/* Take one out of the list: any, or one that has ended and that nobody takes over from. */
static struct vm *unlist(struct daemon *d, bool any)
{
	struct vm **at, *vm = NULL;

	pthread_mutex_lock(&d->vms_lock);
	for (at = &d->vms; *at && !any && (!(*at)->ended || (*at)->heirs); at = &(*at)->next)
		;
	if (*at) {
		vm = *at;
		*at = vm->next;
		vm->next = NULL;
	}
	pthread_mutex_unlock(&d->vms_lock);
	return vm;
}

static void join_all(struct daemon *d, bool any)
{
	struct vm *vm;

	while ((vm = unlist(d, any))) {
		pthread_join(vm->thread, NULL);
		vm_unref(vm);
	}
}

void vm_reap(struct daemon *d)
{
	join_all(d, false);
}

void vm_stop_all(struct daemon *d)
{
	pthread_mutex_lock(&d->vms_lock);
	for (struct vm *v = d->vms; v; v = v->next) {
		atomic_store(&v->stop, true);
		wake_thread(v);
	}
	pthread_mutex_unlock(&d->vms_lock);
	join_all(d, true);
}

/* "UID/NAME" or "NAME". */
static bool matches(const struct vm *v, const char *name, uint32_t uid)
{
	char full[SNAPD_NAME_MAX + 16];

	if (!v->claimed || (uid && v->uid != uid))
		return false;
	snprintf(full, sizeof(full), "%u/%s", v->uid, v->name);
	return !strcmp(v->name, name) || !strcmp(full, name);
}

struct vm *vm_find(struct daemon *d, const char *name, uint32_t uid)
{
	struct vm *found = NULL;

	pthread_mutex_lock(&d->vms_lock);
	for (struct vm *v = d->vms; v; v = v->next)
		if (matches(v, name, uid) && (!found || v->uid == uid))
			found = v;
	if (found)
		vm_ref(found);
	pthread_mutex_unlock(&d->vms_lock);
	return found;
}

int vm_list_ready(struct daemon *d, struct vm_name **ret, size_t *nr)
{
	size_t n = 0;

	pthread_mutex_lock(&d->vms_lock);
	for (struct vm *v = d->vms; v; v = v->next)
		n++;
	*nr = 0;
	*ret = calloc(n + 1, sizeof(**ret));
	for (struct vm *v = d->vms; *ret && v; v = v->next) {
		if (!v->claimed || v->state != VM_READY)
			continue;
		memcpy((*ret)[*nr].name, v->name, sizeof(v->name));
		(*ret)[(*nr)++].uid = v->uid;
	}
	pthread_mutex_unlock(&d->vms_lock);
	return *ret ? 0 : -ENOMEM;
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

int vm_live_timelines(struct daemon *d, uint64_t **ret, size_t *nr)
{
	size_t n = 0;
	int err = 0;

	pthread_mutex_lock(&d->vms_lock);
	for (struct vm *v = d->vms; v; v = v->next)
		n += 2;
	*ret = calloc(n + 1, sizeof(**ret));
	*nr = 0;
	if (!*ret)
		err = -ENOMEM;
	for (struct vm *v = d->vms; !err && v; v = v->next) {
		pthread_mutex_lock(&v->lock);
		if (v->pub.point.timeline)
			(*ret)[(*nr)++] = v->pub.point.timeline;
		if (v->pub.fork)
			(*ret)[(*nr)++] = v->pub.fork;
		pthread_mutex_unlock(&v->lock);
	}
	pthread_mutex_unlock(&d->vms_lock);
	return err;
}

/* ---- what others see ---- */

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
