/* SPDX-License-Identifier: MIT */
/* KVM calls that a test answers; see scripted_kvm.h. */
#include "tests/lib/scripted_kvm.h"

#include <errno.h>
#include <linux/kvm.h>
#include <string.h>

#include "tests/lib/check.h"

static struct script_answer *find(struct scripted_kvm *k, unsigned long request)
{
	for (size_t i = 0; i < k->nr_answers; i++)
		if (k->answers[i].request == request)
			return &k->answers[i];
	return NULL;
}

static int result(int r)
{
	if (r >= 0)
		return r;
	errno = -r;
	return -1;
}

static int check_extension(const struct scripted_kvm *k, uint32_t cap)
{
	for (size_t i = 0; i < k->nr_caps; i++)
		if (k->caps[i].cap == cap)
			return k->caps[i].value;
	return 0;
}

static int scripted_ioctl(void *opaque, int fd, unsigned long request, void *arg)
{
	struct scripted_kvm *k = opaque;
	struct script_answer *a = find(k, request);

	if (request == KVM_CHECK_EXTENSION)
		return check_extension(k, (uintptr_t)arg);
	check(k->nr_log < SCRIPT_LOG_MAX, "too many calls");
	k->log[k->nr_log++] = request;
	if (!a)
		return result(-ENOTTY);
	/* The direction says nothing: KVM_SET_IRQCHIP, for one, is declared as _IOR. */
	if (_IOC_DIR(request) && arg && _IOC_SIZE(request) <= sizeof(a->in))
		memcpy(a->in, arg, _IOC_SIZE(request));
	if (a->call)
		return result(a->call(k, arg));
	if (a->result >= 0 && a->out)
		memcpy(arg, a->out, a->out_bytes);
	return result(a->result);
}

void scripted_kvm_init(struct scripted_kvm *k)
{
	memset(k, 0, sizeof(*k));
	k->ops.ioctl = scripted_ioctl;
	k->ops.opaque = k;
}

struct script_answer *scripted_answer(struct scripted_kvm *k, unsigned long request, int r,
				      const void *out, size_t out_bytes)
{
	struct script_answer *a = find(k, request);

	if (!a) {
		check(k->nr_answers < SCRIPT_MAX, "too many answers");
		a = &k->answers[k->nr_answers++];
	}
	*a = (struct script_answer){
		.request = request, .result = r, .out = out, .out_bytes = out_bytes};
	return a;
}

struct script_answer *scripted_call(struct scripted_kvm *k, unsigned long request,
				    int (*call)(void *opaque, void *arg))
{
	struct script_answer *a = scripted_answer(k, request, 0, NULL, 0);

	a->call = call;
	return a;
}

void scripted_forget(struct scripted_kvm *k, unsigned long request)
{
	scripted_answer(k, request, -ENOTTY, NULL, 0);
}

void scripted_cap(struct scripted_kvm *k, uint32_t cap, int value)
{
	for (size_t i = 0; i < k->nr_caps; i++) {
		if (k->caps[i].cap == cap) {
			k->caps[i].value = value;
			return;
		}
	}
	check(k->nr_caps < SCRIPT_MAX, "too many capabilities");
	k->caps[k->nr_caps].cap = cap;
	k->caps[k->nr_caps++].value = value;
}

long scripted_at(const struct scripted_kvm *k, unsigned long request, size_t n)
{
	for (size_t i = 0; i < k->nr_log; i++)
		if (k->log[i] == request && n-- == 0)
			return i;
	return -1;
}
