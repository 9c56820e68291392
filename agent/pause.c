/* SPDX-License-Identifier: MIT */
/*
 * pause: stops vCPUs, waits until they have, gives them work, lets them go.  Enter: who
 * wants the VM to stand, and for how long at most; leave: vCPUs parked, or the one that did
 * not come.  On the pauser's thread, but vcpu_job_run(), which is a vCPU's.  The vCPU's side,
 * its states and the invariants V1 to V4 are in vcpu.c.
 */
#include "agent/vm.h"

#include <errno.h>
#include <pthread.h>
#include <time.h>

#define PAUSE_DEFAULT_MS 10000u
#define LEAVE_MAX_NS	 100000000u
#define AWAKE_NS	 300000u

/* run_lock held. */
static void attention_update(struct snapd_vm *vm)
{
	atomic_store(&vm->attention, vm->pauses || vm->stopping || vm->refused);
	pthread_cond_broadcast(&vm->run_changed);
}

/* run_lock held. */
static uint32_t count_parked(struct snapd_vm *vm)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < atomic_load(&vm->nr_vcpus); i++)
		n += atomic_load(&vm->vcpus[i]->state) == VCPU_PARKED;
	return n;
}

void vcpus_hold(struct snapd_vm *vm)
{
	pthread_mutex_lock(&vm->run_lock);
	vm->pauses++;
	vm->leaving = 0; /* who has not left stays */
	vm->intruded = false;
	attention_update(vm);
	pthread_mutex_unlock(&vm->run_lock);
}

void vcpus_release(struct snapd_vm *vm)
{
	pthread_mutex_lock(&vm->run_lock);
	vm->pauses--;
	vm->leaving = vm->pauses ? 0 : count_parked(vm);
	vm->left_ns = now_ns();
	atomic_store(&vm->awake_until_ns, 0);
	attention_update(vm);
	pthread_mutex_unlock(&vm->run_lock);
}

void vcpus_stay_awake(struct snapd_vm *vm)
{
	atomic_store(&vm->awake_until_ns, now_ns() + AWAKE_NS);
}

static void kick_all(struct snapd_vm *vm)
{
	for (uint32_t i = 0; i < atomic_load(&vm->nr_vcpus); i++)
		if (atomic_load(&vm->vcpus[i]->state) == VCPU_IN) {
			vm->vcpus[i]->kicked_ns = 0; /* nobody repeats this one: never skip it */
			vcpu_kick(vm->vcpus[i]);
		}
}

void vcpus_refuse(struct snapd_vm *vm, int code)
{
	pthread_mutex_lock(&vm->run_lock);
	vm->refused = code;
	attention_update(vm);
	kick_all(vm);
	pthread_mutex_unlock(&vm->run_lock);
}

void snapd_vm_stop(struct snapd_vm *vm)
{
	pthread_mutex_lock(&vm->run_lock);
	vm->stopping = true;
	attention_update(vm);
	kick_all(vm);
	pthread_mutex_unlock(&vm->run_lock);
}

/* run_lock held.  V1; and after stop, one that is out will never run again. */
static bool is_stopped(const struct snapd_vcpu *v)
{
	int state = atomic_load(&v->state);

	return state == VCPU_PARKED || state == VCPU_NO_THREAD ||
	       (state == VCPU_OUT && v->vm->stopping);
}

/* V2: one that is out looks at `attention` before it enters the guest. */
static bool is_out(const struct snapd_vcpu *v)
{
	return atomic_load(&v->state) != VCPU_IN;
}

/* Kick who runs; how many have not stopped, and one of them in *who. */
static uint32_t press(struct snapd_vm *vm, bool (*is_done)(const struct snapd_vcpu *v),
		      struct snapd_vcpu **who)
{
	uint32_t left = 0;

	for (uint32_t i = 0; i < atomic_load(&vm->nr_vcpus); i++) {
		if (is_done(vm->vcpus[i]))
			continue;
		left++;
		*who = vm->vcpus[i];
		if (atomic_load(&vm->vcpus[i]->state) == VCPU_IN)
			vcpu_kick(vm->vcpus[i]);
	}
	return left;
}

void vcpus_wait_changed(struct snapd_vm *vm, uint64_t timeout_ns)
{
	uint64_t end = now_ns() + timeout_ns;
	struct timespec ts = {(time_t)(end / 1000000000u), (long)(end % 1000000000u)};

	pthread_cond_timedwait(&vm->run_changed, &vm->run_lock, &ts);
}

/* A pause lasts until the guest runs again, and not until somebody was told so.  To
 * wait here also leaves the processor to the vCPUs. */
uint64_t vcpus_wait_left(struct snapd_vm *vm)
{
	uint64_t end = now_ns() + LEAVE_MAX_NS, at;

	pthread_mutex_lock(&vm->run_lock);
	while (vm->leaving && now_ns() < end)
		vcpus_wait_changed(vm, LEAVE_MAX_NS);
	at = vm->leaving ? now_ns() : vm->left_ns;
	pthread_mutex_unlock(&vm->run_lock);
	return at;
}

static int wait_all(struct snapd_vm *vm, bool (*is_done)(const struct snapd_vcpu *v),
		    uint32_t timeout_ms, struct err *e)
{
	uint64_t end = now_ns() + (timeout_ms ? timeout_ms : PAUSE_DEFAULT_MS) * 1000000ull;
	struct snapd_vcpu *who = NULL;
	int r = 0;

	pthread_mutex_lock(&vm->run_lock);
	while (press(vm, is_done, &who)) {
		if (now_ns() >= end || atomic_load(&vm->exiting)) {
			r = err_set(e, ETIMEDOUT, "vCPU %u did not stop within %u ms: it %s",
				    who->id, timeout_ms ? timeout_ms : PAUSE_DEFAULT_MS,
				    atomic_load(&who->state) == VCPU_IN
					    ? "stays in the guest"
					    : "has not come back to snapd_vcpu_run()");
			break;
		}
		vcpus_wait_changed(vm, KICK_REPEAT_NS);
	}
	pthread_mutex_unlock(&vm->run_lock);
	return r;
}

int vcpus_wait_stopped(struct snapd_vm *vm, uint32_t timeout_ms, struct err *e)
{
	return wait_all(vm, is_stopped, timeout_ms, e);
}

int vcpus_wait_out(struct snapd_vm *vm, uint32_t timeout_ms, struct err *e)
{
	return wait_all(vm, is_out, timeout_ms, e);
}

bool vcpus_intruded(struct snapd_vm *vm)
{
	bool ret;

	pthread_mutex_lock(&vm->run_lock);
	ret = vm->intruded;
	for (uint32_t i = 0; i < atomic_load(&vm->nr_vcpus); i++)
		ret |= atomic_load(&vm->vcpus[i]->state) == VCPU_IN;
	pthread_mutex_unlock(&vm->run_lock);
	return ret;
}

bool vcpus_all_parked(struct snapd_vm *vm)
{
	uint32_t n = atomic_load(&vm->nr_vcpus);

	for (uint32_t i = 0; i < n; i++)
		if (atomic_load(&vm->vcpus[i]->state) != VCPU_PARKED)
			return false;
	return n;
}

/* run_lock held; dropped while the job runs. */
void vcpu_job_run(struct snapd_vcpu *v)
{
	vcpu_job_fn fn = v->job;
	int r;

	v->job = NULL;
	v->job_busy = true;
	pthread_mutex_unlock(&v->vm->run_lock);
	r = fn(v, &v->job_err);
	pthread_mutex_lock(&v->vm->run_lock);
	v->job_result = r;
	v->job_busy = false;
	pthread_cond_broadcast(&v->vm->run_changed);
}

static bool jobs_left(struct snapd_vm *vm, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		if (vm->vcpus[i]->job || vm->vcpus[i]->job_busy)
			return true;
	return false;
}

int vcpus_do(struct snapd_vm *vm, vcpu_job_fn fn, uint32_t n, struct err *e)
{
	uint32_t i;
	int r = 0;

	pthread_mutex_lock(&vm->run_lock);
	for (i = 0; i < n; i++) {
		vm->vcpus[i]->job_err.code = 0;
		vm->vcpus[i]->job = fn;
	}
	pthread_cond_broadcast(&vm->run_changed);
	for (i = 0; i < n; i++)
		if (vm->vcpus[i]->job && atomic_load(&vm->vcpus[i]->state) != VCPU_PARKED)
			vcpu_job_run(vm->vcpus[i]);
	while (jobs_left(vm, n))
		pthread_cond_wait(&vm->run_changed, &vm->run_lock);
	for (i = 0; i < n && r >= 0; i++) {
		r = vm->vcpus[i]->job_result;
		if (r < 0 && e && !e->code)
			*e = vm->vcpus[i]->job_err;
	}
	pthread_mutex_unlock(&vm->run_lock);
	return r;
}

int snapd_vm_pause(struct snapd_vm *vm, uint32_t timeout_ms)
{
	int r;

	err_clear(&agent_err);
	if (on_vcpu_thread(vm))
		return err_set(&agent_err, EDEADLK, "a vCPU's thread cannot wait for its own stop");
	vcpus_hold(vm);
	r = vcpus_wait_stopped(vm, timeout_ms, &agent_err);
	if (r < 0)
		vcpus_release(vm);
	else
		count(&vm->shm->pauses, 1);
	return r;
}

void snapd_vm_resume(struct snapd_vm *vm)
{
	vcpus_release(vm);
}
