/* SPDX-License-Identifier: MIT */
/*
 * vm_claim: one name, one connection.  Enter: a VM that said HELLO; leave: it has its name,
 * and what an earlier connection of the same instance knew; or the reason why not.  On the
 * VM's own thread, which waits for an earlier connection's to end.
 */
#include "snapd/vm/priv.h"

#include <string.h>
#include <time.h>

#include "snapd/util/cleanup.h"

#define CLAIM_GRACE_NS 1000000000ull  /* for the end of a connection to be noticed */
#define CLAIM_MAX_NS   30000000000ull /* for an earlier connection's thread to end */

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
	if (!is_same_instance(vm, rival) && rival->state != VM_LOST && !vm_process_is_dead(rival))
		return false;
	atomic_store(&rival->stop, true);
	vm_wake(rival);
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
