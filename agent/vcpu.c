/* SPDX-License-Identifier: MIT */
/*
 * vcpu: runs vCPUs, has them stop when asked, and does work on their threads.  Enter:
 * KVM_RUN's results; leave: only what the VMM must see.  On the vCPUs' own threads; the
 * holding and waiting, which whoever pauses does, is in pause.c.
 *
 *   NO_THREAD ─first run─► IN ◄──► OUT      in KVM_RUN / in the VMM's code
 *                          │ ▲
 *                    pause ▼ │ released
 *                         PARKED            runs jobs: state save and load
 *
 * Invariants
 *   V1  A vCPU counts as stopped only when PARKED, or NO_THREAD: in OUT its
 *       thread may be writing guest memory for a device, or owe KVM the result
 *       of a read.
 *   V2  No kick is lost.  The pauser sets `attention`, then immediate_exit, then
 *       signals; a vCPU clears its kick, then looks at `attention`, then enters
 *       KVM_RUN.  Whichever is first, KVM_RUN is not entered, or left at once.
 *       All three are sequentially consistent.  Should the VMM overwrite
 *       immediate_exit just then, the kick is repeated every millisecond.
 *   V3  immediate_exit is a byte of which the agent uses one bit, KICK_BIT, so
 *       that clearing a kick never clears one of the VMM's own.
 *   V4  A vCPU parks only when KVM owes nothing: an exit that the next KVM_RUN
 *       has to complete is completed first, and if that makes another exit, the
 *       VMM gets it before the vCPU parks.
 */
#include "agent/vm.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define KICK_BIT 0x80

/* What a thread is to the agent; freed at its end. */
struct vcpu_thread {
	pthread_t id;
	struct snapd_vcpu *vcpu; /* bind_lock to change */
};

static pthread_mutex_t bind_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_key_t thread_key;
static pthread_once_t thread_once = PTHREAD_ONCE_INIT;
static _Thread_local struct vcpu_thread *self;
/* For the signal handler: the run page of the vCPU that is inside run. */
static _Thread_local struct kvm_run *volatile kick_run __attribute__((tls_model("initial-exec")));

static _Atomic uint8_t *immediate_exit(struct kvm_run *run)
{
	return (_Atomic uint8_t *)&run->immediate_exit;
}

static void on_kick(int sig)
{
	struct kvm_run *run = kick_run;

	if (run)
		atomic_fetch_or(immediate_exit(run), KICK_BIT);
}

static void thread_ended(void *arg)
{
	struct vcpu_thread *t = arg;

	pthread_mutex_lock(&bind_lock);
	if (t->vcpu) {
		t->vcpu->thread = NULL;
		atomic_store(&t->vcpu->state, VCPU_NO_THREAD);
	}
	pthread_mutex_unlock(&bind_lock);
	free(t);
}

static void make_thread_key(void)
{
	pthread_key_create(&thread_key, thread_ended);
}

int vcpu_signal_init(int sig, struct err *e)
{
	struct sigaction sa = {.sa_handler = on_kick, .sa_flags = SA_RESTART | SA_ONSTACK};

	pthread_once(&thread_once, make_thread_key);
	sigfillset(&sa.sa_mask);
	if (sigaction(sig, &sa, NULL) < 0)
		return err_errno(e, errno, "kick signal %d", sig);
	return 0;
}

/* Make the calling thread the vCPU's. */
static int bind_thread(struct snapd_vcpu *v)
{
	struct vcpu_thread *t = self;
	sigset_t unblock;

	if (!t) {
		t = calloc(1, sizeof(*t));
		if (!t)
			return -ENOMEM;
		t->id = pthread_self();
		pthread_setspecific(thread_key, t);
		self = t;
	}
	pthread_mutex_lock(&bind_lock);
	if (t->vcpu) {
		t->vcpu->thread = NULL;
		atomic_store(&t->vcpu->state, VCPU_NO_THREAD);
	}
	if (v->thread)
		v->thread->vcpu = NULL;
	v->thread = t;
	t->vcpu = v;
	pthread_mutex_unlock(&bind_lock);
	sigemptyset(&unblock);
	sigaddset(&unblock, v->vm->kick_signal);
	pthread_sigmask(SIG_UNBLOCK, &unblock, NULL);
	return 0;
}

bool on_vcpu_thread(const struct snapd_vm *vm)
{
	return self && self->vcpu && self->vcpu->vm == vm;
}

void vcpu_kick(struct snapd_vcpu *v)
{
	uint64_t now = now_ns();

	if (now - v->kicked_ns < KICK_REPEAT_NS)
		return;
	v->kicked_ns = now;
	pthread_mutex_lock(&bind_lock);
	if (v->thread) {
		atomic_fetch_or(immediate_exit(v->run), KICK_BIT);
		pthread_kill(v->thread->id, v->vm->kick_signal);
	}
	pthread_mutex_unlock(&bind_lock);
	count(&v->vm->shm->kicks, 1);
}

/* ---- the vCPU's side ---- */

static bool must_wait(const struct snapd_vm *vm)
{
	return vm->pauses && !vm->stopping && !vm->refused;
}

/* run_lock held; dropped meanwhile.  False: it is time to sleep.  Others' jobs are given
 * already when this is asked for. */
static bool yield_awhile(struct snapd_vm *vm)
{
	if (now_ns() >= atomic_load(&vm->awake_until_ns))
		return false;
	pthread_mutex_unlock(&vm->run_lock);
	while (atomic_load(&vm->attention) && now_ns() < atomic_load(&vm->awake_until_ns))
		sched_yield();
	pthread_mutex_lock(&vm->run_lock);
	return true;
}

static void park(struct snapd_vcpu *v)
{
	struct snapd_vm *vm = v->vm;

	pthread_mutex_lock(&vm->run_lock);
	if (must_wait(vm)) {
		atomic_store(&v->state, VCPU_PARKED);
		v->kicked_ns = 0; /* the next pause kicks at once */
		pthread_cond_broadcast(&vm->run_changed);
		if (atomic_load(&vm->restore_wait))
			wake_fd(vm->conn_wake); /* READY waits for the last to park */
	}
	/* A job taken is finished, even when told to stop: its giver waits. */
	while (must_wait(vm) || (v->job && atomic_load(&v->state) == VCPU_PARKED)) {
		if (v->job)
			vcpu_job_run(v);
		else if (!yield_awhile(vm))
			pthread_cond_wait(&vm->run_changed, &vm->run_lock);
	}
	if (vm->leaving && atomic_load(&v->state) == VCPU_PARKED) {
		vm->left_ns = now_ns();
		if (!--vm->leaving)
			pthread_cond_broadcast(&vm->run_changed);
	}
	atomic_store(&v->state, VCPU_IN);
	pthread_mutex_unlock(&vm->run_lock);
	atomic_fetch_and(immediate_exit(v->run), (uint8_t)~KICK_BIT); /* V2: `attention` is next */
}

static bool vmm_kicked(const struct snapd_vcpu *v)
{
	return atomic_load(immediate_exit(v->run)) & ~KICK_BIT;
}

/* vmm_state: somebody runs the vCPU while the service has the VM paused.  It waits, but not
 * for one who wants it out: the VMM, which may be about to stop it again, kicks it as if it
 * were in KVM_RUN. */
static bool wait_as_guest(struct snapd_vcpu *v)
{
	struct snapd_vm *vm = v->vm;
	bool may_run;

	pthread_mutex_lock(&vm->run_lock);
	atomic_store(&v->state, VCPU_PARKED);
	pthread_cond_broadcast(&vm->run_changed);
	while (must_wait(vm) && !vmm_kicked(v))
		vcpus_wait_changed(vm, KICK_REPEAT_NS);
	may_run = !must_wait(vm);
	atomic_store(&v->state, VCPU_IN);
	pthread_mutex_unlock(&vm->run_lock);
	return may_run;
}

static int kvm_run(struct snapd_vcpu *v)
{
	int r = arch_ioctl(&v->vm->kvm, v->fd, KVM_RUN, NULL);

	/* Left at once or at an exit: what was owed for the last exit is paid. */
	v->io_pending = r >= 0 && v->run->exit_reason != KVM_EXIT_DIRTY_RING_FULL;
	return r;
}

enum next { NEXT_RUN, NEXT_LEAVE };

/* `attention` was up: park, or leave with *ret. */
static enum next attend(struct snapd_vcpu *v, int *ret)
{
	struct snapd_vm *vm = v->vm;

	pthread_mutex_lock(&vm->run_lock);
	*ret = vm->stopping ? -ECANCELED : vm->refused;
	vm->intruded |= vm->pauses > 0;
	pthread_mutex_unlock(&vm->run_lock);
	if (*ret == -ECANCELED)
		return NEXT_LEAVE;
	if (*ret) {
		err_set(&agent_err, -*ret,
			"snapshot \"%s\" was not restored; the log has the reason", vm->restore);
		return NEXT_LEAVE;
	}
	if (vm->vmm_state) {
		*ret = -EINTR;
		return wait_as_guest(v) ? NEXT_RUN : NEXT_LEAVE;
	}
	if (v->io_pending) { /* V4 */
		atomic_fetch_or(immediate_exit(v->run), KICK_BIT);
		*ret = kvm_run(v);
		if (*ret != -EINTR && *ret != -EAGAIN)
			return NEXT_LEAVE;
	}
	park(v);
	return NEXT_RUN;
}

/* KVM_RUN was interrupted: by the agent, or by something the VMM must see? */
static bool was_kicked(struct snapd_vcpu *v)
{
	uint8_t was = atomic_fetch_and(immediate_exit(v->run), (uint8_t)~KICK_BIT);

	return (was & KICK_BIT) && !(was & ~KICK_BIT);
}

static enum next run_once(struct snapd_vcpu *v, int *ret)
{
	if (atomic_load(&v->vm->attention))
		return attend(v, ret);
	/* Relaxed: a round more or less in the guest makes no difference. */
	if (atomic_load_explicit(&v->vm->tracking_dead, memory_order_relaxed)) {
		*ret = err_set(&agent_err, EIO, "vCPU %u: the dirty rings are dead", v->id);
		return NEXT_LEAVE;
	}
	*ret = kvm_run(v);
	if (*ret >= 0 && v->run->exit_reason == KVM_EXIT_DIRTY_RING_FULL) {
		*ret = sources_full(v);
		return *ret < 0 ? NEXT_LEAVE : NEXT_RUN;
	}
	if (*ret >= 0)
		return NEXT_LEAVE;
	if ((*ret == -EINTR || *ret == -EAGAIN) && was_kicked(v))
		return NEXT_RUN;
	if (*ret != -EINTR && *ret != -EAGAIN)
		err_errno(&agent_err, -*ret, "KVM_RUN of vCPU %u", v->id);
	return NEXT_LEAVE;
}

int snapd_vcpu_run(struct snapd_vcpu *vcpu)
{
	int ret;

	agent_err.code = 0;
	if (!self || self->vcpu != vcpu) {
		ret = bind_thread(vcpu);
		if (ret < 0)
			return err_set(&agent_err, ENOMEM, "no memory to bind vCPU %u", vcpu->id);
	}
	kick_run = vcpu->run;
	atomic_store(&vcpu->state, VCPU_IN);
	while (run_once(vcpu, &ret) == NEXT_RUN)
		;
	atomic_store(&vcpu->state, VCPU_OUT);
	kick_run = NULL;
	return ret;
}

/* ---- attaching ---- */

void *vcpu_map(struct snapd_vcpu *v, size_t len, int64_t offset)
{
	const struct snapd_kvm_ops *k = v->vm->kvm.kvm;
	void *p = k->mmap(k->opaque, len, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, offset);

	return p == MAP_FAILED ? NULL : p;
}

static int vcpu_maps(struct snapd_vcpu *v, struct err *e)
{
	struct snapd_vm *vm = v->vm;
	int r = arch_ioctl(&vm->kvm, vm->kvm.kvm_fd, KVM_GET_VCPU_MMAP_SIZE, NULL);

	if (r < (int)sizeof(struct kvm_run))
		return err_set(e, r < 0 ? -r : EINVAL, "KVM_GET_VCPU_MMAP_SIZE returned %d", r);
	v->run_bytes = (size_t)r;
	v->run = vcpu_map(v, v->run_bytes, 0);
	if (!v->run)
		return err_errno(e, errno, "vCPU %u: cannot map kvm_run", v->id);
	return 0;
}

void vcpu_free(struct snapd_vcpu *v)
{
	const struct snapd_kvm_ops *k = v->vm->kvm.kvm;

	pthread_mutex_lock(&bind_lock);
	if (v->thread)
		v->thread->vcpu = NULL;
	pthread_mutex_unlock(&bind_lock);
	sources_vcpu_detach(v);
	if (v->run)
		k->munmap(k->opaque, v->run, v->run_bytes);
	free(v);
}

/* Into the list, where harvests see it; a held VM stays held, since a vCPU looks
 * at `attention` before it enters the guest. */
static int vcpu_link(struct snapd_vcpu *v, struct err *e)
{
	struct snapd_vm *vm = v->vm;
	int r = 0;

	pthread_mutex_lock(&vm->run_lock);
	pthread_mutex_lock(&vm->harvest_lock);
	v->index = atomic_load(&vm->nr_vcpus);
	if (v->index == vm->max_vcpus)
		r = err_set(e, ENOSPC, "more than %u vCPUs: raise max_vcpus", vm->max_vcpus);
	if (!r) {
		vm->vcpus[v->index] = v;
		vm->vcpu_fds[v->index] = v->fd;
		atomic_store(&vm->nr_vcpus, v->index + 1);
	}
	pthread_mutex_unlock(&vm->harvest_lock);
	pthread_mutex_unlock(&vm->run_lock);
	return r;
}

int snapd_vcpu_attach(struct snapd_vm *vm, int vcpu_fd, uint32_t vcpu_id, struct snapd_vcpu **ret)
{
	struct snapd_vcpu *v = calloc(1, sizeof(*v));
	int r;

	*ret = NULL;
	err_clear(&agent_err);
	if (!v)
		return err_set(&agent_err, ENOMEM, "no memory for vCPU %u", vcpu_id);
	v->vm = vm;
	v->fd = vcpu_fd;
	v->id = vcpu_id;
	r = vcpu_maps(v, &agent_err);
	if (r >= 0)
		r = sources_vcpu_attach(v, &agent_err);
	if (r >= 0)
		r = vcpu_link(v, &agent_err);
	if (r < 0) {
		vcpu_free(v);
		return r;
	}
	*ret = v;
	wake_fd(vm->conn_wake);
	return 0;
}

struct kvm_run *snapd_vcpu_kvm_run(struct snapd_vcpu *vcpu)
{
	return vcpu->run;
}
