/* SPDX-License-Identifier: MIT */
/*
 * about: what the VMM says of itself: what the VM is, for people to read, whether it can be
 * snapshotted, that it is complete, and why a callback failed.  Enter: text, from any
 * thread; leave: ABOUT to the service, and the reasons of refused requests.
 */
#include "agent/vm.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of the callback that runs on this thread. */
static _Thread_local char reason[320];

void snapd_vm_reason(struct snapd_vm *vm, const char *text)
{
	snprintf(reason, sizeof(reason), "%s", text);
}

int callback_failed(struct snapd_vm *vm, int code, const char *what, struct err *e)
{
	if (reason[0])
		err_set(e, -code, "%s: %s", what, reason);
	else
		err_errno(e, -code, "%s", what);
	reason[0] = '\0';
	return code;
}

void snapd_vm_ready(struct snapd_vm *vm)
{
	atomic_store(&vm->vmm_ready, true);
	wake_fd(vm->conn_wake);
}

static void replace(char **text, char *by)
{
	free(*text);
	*text = by;
}

int snapd_vm_about(struct snapd_vm *vm, const char *json, const char *refusal)
{
	_cleanup_free_ char *about = strdup(json ? json : "");
	_cleanup_free_ char *why = refusal ? strdup(refusal) : NULL;

	err_clear(&agent_err);
	if (!about || (refusal && !why))
		return err_set(&agent_err, ENOMEM, "no memory for a description");
	if (strlen(about) > SNAPD_ABOUT_MAX)
		return err_set(&agent_err, EINVAL, "a description of %zu bytes, at most %u",
			       strlen(about), SNAPD_ABOUT_MAX);
	pthread_mutex_lock(&vm->about_lock);
	replace(&vm->about, steal_ptr(&about));
	replace(&vm->refusal, steal_ptr(&why));
	vm->about_new = true;
	pthread_mutex_unlock(&vm->about_lock);
	wake_fd(vm->conn_wake);
	return 0;
}

int about_refusal(struct snapd_vm *vm, struct err *e)
{
	int r = 0;

	pthread_mutex_lock(&vm->about_lock);
	if (vm->refusal)
		r = err_set(e, EOPNOTSUPP, "this VM cannot be snapshotted: %s", vm->refusal);
	pthread_mutex_unlock(&vm->about_lock);
	return r;
}

/* The message, zeroed beyond what is said; false: nothing new. */
static bool about_take(struct snapd_vm *vm, struct snapd_msg_about *m)
{
	bool is_new;

	pthread_mutex_lock(&vm->about_lock);
	is_new = vm->about_new;
	vm->about_new = false;
	if (is_new) {
		m->json_len = (uint32_t)strlen(vm->about);
		memcpy(m->json, vm->about, m->json_len);
		if (vm->refusal)
			snprintf(m->refusal, sizeof(m->refusal), "%s", vm->refusal);
	}
	pthread_mutex_unlock(&vm->about_lock);
	return is_new;
}

int about_tell(struct snapd_vm *vm)
{
	_cleanup_free_ struct snapd_msg_about *m = calloc(1, sizeof(*m));

	if (!m || !about_take(vm, m))
		return 0;
	m->h.type = SNAPD_MSG_ABOUT;
	return conn_send(vm, m, sizeof(*m), -1);
}
