/* SPDX-License-Identifier: MIT */
/*
 * x86_cpu: records whose length is the CPU's own: CPUID, the TSC's frequency, the XSAVE area,
 * nested state.  On the vCPU's own thread.
 */
#include "snapd/arch/x86_64_step.h"

#include <stdlib.h>
#include <string.h>

#include "snapd/util/log.h"

#define LEGACY_XSAVE_BYTES 4096

static_assert(sizeof(struct kvm_nested_state) == 128, "record x86.nested");

/* A vCPU's CPUID, as KVM holds it now.  *ret is the caller's to free. */
static int cpuid_get(const struct x86_target *t, const struct x86_step *s, struct kvm_cpuid2 **ret,
		     struct err *e)
{
	struct kvm_cpuid2 *c =
		calloc(1, sizeof(*c) + X86_CPUID_MAX * sizeof(struct kvm_cpuid_entry2));
	int r;

	if (!c) {
		err_errno(e, ENOMEM, "%s: CPUID", t->who);
		return -ENOMEM;
	}
	c->nent = X86_CPUID_MAX;
	r = arch_ioctl(t->vm, t->fd, s->get, c);
	if (r < 0) {
		free(c);
		return r;
	}
	*ret = c;
	return 0;
}

int x86_cpuid_save(const struct x86_target *t, const struct x86_step *s,
		   struct snapd_state_writer *w, struct err *e)
{
	struct x86_cpuid_entry out[X86_CPUID_MAX];
	_cleanup_free_ struct kvm_cpuid2 *c = NULL;
	int r = cpuid_get(t, s, &c, e);

	if (r < 0)
		return x86_is_lacking(s, r) ? 0 : x86_get_failed(t, s, r, e);
	if (c->nent == 0)
		return 0;
	for (uint32_t i = 0; i < c->nent; i++)
		out[i] = x86_cpuid_pack(&c->entries[i]);
	return x86_put(t, s, t->instance, out, c->nent * sizeof(out[0]), w, e);
}

static bool cpuid_equal(const struct kvm_cpuid2 *a, const struct kvm_cpuid2 *b)
{
	if (a->nent != b->nent)
		return false;
	for (uint32_t i = 0; i < a->nent; i++) {
		struct x86_cpuid_entry x = x86_cpuid_pack(&a->entries[i]);
		struct x86_cpuid_entry y = x86_cpuid_pack(&b->entries[i]);

		x86_cpuid_clear_runtime(&x);
		x86_cpuid_clear_runtime(&y);
		if (memcmp(&x, &y, sizeof(x)) != 0)
			return false;
	}
	return true;
}

int x86_cpuid_load(const struct x86_target *t, const struct x86_step *s,
		   const struct snapd_state_reader *reader, struct err *e)
{
	_cleanup_free_ struct kvm_cpuid2 *now = NULL, *want = NULL;
	const struct x86_cpuid_entry *in;
	const void *data;
	size_t len;
	int r = x86_find(t, s, t->instance, reader, &data, &len, e);

	if (r <= 0)
		return r;
	if (len % sizeof(*in) || len / sizeof(*in) > X86_CPUID_MAX)
		return x86_bad_length(t, s, len, e);
	r = cpuid_get(t, s, &now, e);
	if (r < 0)
		return x86_get_failed(t, s, r, e);
	want = calloc(1, sizeof(*want) + X86_CPUID_MAX * sizeof(want->entries[0]));
	if (!want)
		return err_errno(e, ENOMEM, "%s: CPUID", t->who);
	in = data;
	want->nent = len / sizeof(*in);
	for (uint32_t i = 0; i < want->nent; i++)
		x86_cpuid_unpack(&in[i], &want->entries[i]);
	if (cpuid_equal(now, want))
		return 0;
	r = arch_ioctl(t->vm, t->fd, s->set, want);
	if (r == -EINVAL)
		return err_set(e, ENOTSUP,
			       "%s: KVM_SET_CPUID2 refused: the vCPU has run with another CPUID, "
			       "or this host cannot give the snapshot's",
			       t->who);
	return r < 0 ? x86_set_failed(t, s, r, e) : 0;
}

int x86_tsc_khz_save(const struct x86_target *t, const struct x86_step *s,
		     struct snapd_state_writer *w, struct err *e)
{
	int r = arch_ioctl(t->vm, t->fd, s->get, NULL);
	uint32_t khz = r;

	if (r < 0)
		return x86_is_lacking(s, r) ? 0 : x86_get_failed(t, s, r, e);
	return khz ? x86_put(t, s, t->instance, &khz, sizeof(khz), w, e) : 0;
}

/* A host that cannot scale the TSC runs the guest all the same, its clock a
 * little off; that is the VM owner's to judge, so it only warns. */
int x86_tsc_khz_load(const struct x86_target *t, const struct x86_step *s,
		     const struct snapd_state_reader *reader, struct err *e)
{
	const void *data;
	uint32_t khz;
	size_t len;
	int r = x86_find(t, s, t->instance, reader, &data, &len, e);

	if (r <= 0)
		return r;
	if (len != sizeof(khz))
		return x86_bad_length(t, s, len, e);
	memcpy(&khz, data, sizeof(khz));
	r = arch_ioctl(t->vm, t->fd, s->get, NULL);
	if (r == (int)khz)
		return 0;
	if (arch_ioctl_value(t->vm, t->fd, s->set, khz) < 0)
		log_warn("%s: TSC runs at %d kHz here, the snapshot's at %u, and cannot be scaled",
			 t->who, r, khz);
	return 0;
}

static size_t xsave_bytes(const struct arch_vm *vm)
{
	size_t n = arch_cap(vm, KVM_CAP_XSAVE2);

	return MAX(n, (size_t)LEGACY_XSAVE_BYTES);
}

/* KVM_GET_XSAVE copies 4096 bytes and fails where the vCPU has more. */
int x86_xsave_save(const struct x86_target *t, const struct x86_step *s,
		   struct snapd_state_writer *w, struct err *e)
{
	size_t len = xsave_bytes(t->vm);
	unsigned long get = arch_cap(t->vm, KVM_CAP_XSAVE2) > 0 ? KVM_GET_XSAVE2 : KVM_GET_XSAVE;
	_cleanup_free_ void *buf = calloc(1, len);
	int r;

	if (!buf)
		return err_errno(e, ENOMEM, "%s: XSAVE area", t->who);
	r = arch_ioctl(t->vm, t->fd, get, buf);
	if (r < 0)
		return x86_is_lacking(s, r) ? 0 : x86_get_failed(t, s, r, e);
	return x86_put(t, s, t->instance, buf, len, w, e);
}

/* KVM_SET_XSAVE reads as much as this vCPU's area holds, so a shorter record is
 * extended with zeroes: components that it did not have are in their reset state. */
int x86_xsave_load(const struct x86_target *t, const struct x86_step *s,
		   const struct snapd_state_reader *reader, struct err *e)
{
	size_t room = xsave_bytes(t->vm), len;
	_cleanup_free_ void *buf = NULL;
	const void *data;
	int r = x86_find(t, s, t->instance, reader, &data, &len, e);

	if (r <= 0)
		return r;
	if (len < LEGACY_XSAVE_BYTES)
		return x86_bad_length(t, s, len, e);
	if (len > room)
		return err_set(e, ENOTSUP, "%s: XSAVE area of %zu bytes, this host has %zu", t->who,
			       len, room);
	buf = calloc(1, room);
	if (!buf)
		return err_errno(e, ENOMEM, "%s: XSAVE area", t->who);
	memcpy(buf, data, len);
	r = arch_ioctl(t->vm, t->fd, s->set, buf);
	return r < 0 ? x86_set_failed(t, s, r, e) : 0;
}

int x86_nested_save(const struct x86_target *t, const struct x86_step *s,
		    struct snapd_state_writer *w, struct err *e)
{
	size_t room = arch_cap(t->vm, s->cap);
	_cleanup_free_ struct kvm_nested_state *state = NULL;
	int r;

	if (room < sizeof(*state))
		return 0;
	state = calloc(1, room);
	if (!state)
		return err_errno(e, ENOMEM, "%s: nested state", t->who);
	state->size = room;
	r = arch_ioctl(t->vm, t->fd, s->get, state);
	if (r < 0)
		return x86_is_lacking(s, r) ? 0 : x86_get_failed(t, s, r, e);
	return x86_put(t, s, t->instance, state, state->size, w, e);
}

int x86_nested_load(const struct x86_target *t, const struct x86_step *s,
		    const struct snapd_state_reader *reader, struct err *e)
{
	_cleanup_free_ struct kvm_nested_state *state = NULL;
	const void *data;
	size_t len;
	int r = x86_find(t, s, t->instance, reader, &data, &len, e);

	if (r <= 0)
		return r;
	if (len < sizeof(*state))
		return x86_bad_length(t, s, len, e);
	state = malloc(len);
	if (!state)
		return err_errno(e, ENOMEM, "%s: nested state", t->who);
	memcpy(state, data, len);
	if (state->size != len)
		return x86_bad_length(t, s, len, e);
	r = arch_ioctl(t->vm, t->fd, s->set, state);
	return r < 0 ? x86_set_failed(t, s, r, e) : 0;
}
