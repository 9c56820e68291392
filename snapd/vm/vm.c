/* SPDX-License-Identifier: MIT */
/*
 * One attached VM: its thread, its queue of jobs, and the list of all VMs.  The struct
 * and its life are drawn in priv.h.
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

#include "snapd/vm/capture.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"

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
	rings_deinit(&vm->rings);
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

void vm_wake(struct vm *vm)
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
		vm_wake(vm);
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

bool vm_process_is_dead(const struct vm *vm)
{
	struct pollfd p = {.fd = vm->peer_fd, .events = POLLIN};

	return vm->peer_fd >= 0 && poll(&p, 1, 0) > 0;
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
	if (keep && vm_process_is_dead(vm)) {
		give_name_up(vm);
		postmortem(vm);
	}
	release_memory(vm);
	if (was_ready)
		log_event(LOG_VM_ENDED, LOG_LVL_INFO, "%s: %s", vm->name,
			  vm_process_is_dead(vm) ? "the VMM has ended" : "detached");
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
		vm_wake(v);
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
