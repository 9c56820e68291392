/* SPDX-License-Identifier: MIT */
/*
 * x86_msr: record "x86.msrs": all that KVM would have saved, TSC first and TSC_DEADLINE, which
 * arms the LAPIC's timer, last.  On the vCPU's own thread.
 */
#include "snapd/arch/x86_64_step.h"

#include <stdlib.h>
#include <string.h>

#define MSRS_PER_CALL 128 /* the kernel takes fewer than 256 */

#define MSR_IA32_TSC	       0x10
#define MSR_IA32_TSC_DEADLINE  0x6e0
#define MSR_KVM_WALL_CLOCK     0x11
#define MSR_KVM_WALL_CLOCK_NEW 0x4b564d00

static_assert(sizeof(struct kvm_msr_entry) == 16, "record x86.msrs");

/* Which MSRs this KVM would have saved.  *ret is the caller's to free. */
static int msr_list(const struct x86_target *t, struct kvm_msr_list **ret, struct err *e)
{
	struct kvm_msr_list probe = {0}, *l;
	int r = arch_ioctl(t->vm, t->vm->kvm_fd, KVM_GET_MSR_INDEX_LIST, &probe);

	if (r == -ENOTTY)
		return r;
	if (r < 0 && r != -E2BIG) {
		err_errno(e, -r, "KVM_GET_MSR_INDEX_LIST");
		return r;
	}
	l = calloc(1, sizeof(*l) + probe.nmsrs * sizeof(l->indices[0]));
	if (!l) {
		err_errno(e, ENOMEM, "MSR list");
		return -ENOMEM;
	}
	l->nmsrs = probe.nmsrs;
	r = arch_ioctl(t->vm, t->vm->kvm_fd, KVM_GET_MSR_INDEX_LIST, l);
	if (r < 0) {
		free(l);
		err_errno(e, -r, "KVM_GET_MSR_INDEX_LIST");
		return r;
	}
	*ret = l;
	return 0;
}

/*
 * Give `nr` MSRs to KVM_GET_MSRS or KVM_SET_MSRS, which stop at the first that
 * they refuse: step over it and go on.  refused[] (nr entries) tells which.
 */
static int msrs_call(const struct x86_target *t, unsigned long request, struct kvm_msr_entry *msrs,
		     uint32_t nr, bool *refused)
{
	_Alignas(8)
		uint8_t buf[sizeof(struct kvm_msrs) + MSRS_PER_CALL * sizeof(struct kvm_msr_entry)];
	struct kvm_msrs *call = (void *)buf;
	uint32_t i = 0;

	while (i < nr) {
		uint32_t n = MIN(nr - i, (uint32_t)MSRS_PER_CALL);
		int done;

		memset(call, 0, sizeof(*call));
		call->nmsrs = n;
		memcpy(call->entries, msrs + i, n * sizeof(*msrs));
		done = arch_ioctl(t->vm, t->fd, request, call);
		if (done < 0)
			return done;
		memcpy(msrs + i, call->entries, (uint32_t)done * sizeof(*msrs));
		memset(refused + i, false, done);
		i += done;
		if ((uint32_t)done < n)
			refused[i++] = true;
	}
	return 0;
}

int x86_msrs_save(const struct x86_target *t, const struct x86_step *s,
		  struct snapd_state_writer *w, struct err *e)
{
	_cleanup_free_ struct kvm_msr_entry *msrs = NULL;
	_cleanup_free_ struct kvm_msr_list *list = NULL;
	_cleanup_free_ bool *refused = NULL;
	uint32_t nr = 0;
	int r = msr_list(t, &list, e);

	if (r < 0)
		return x86_is_lacking(s, r) ? 0 : r;
	msrs = calloc(list->nmsrs + 1, sizeof(*msrs));
	refused = calloc(list->nmsrs + 1, sizeof(*refused));
	if (!msrs || !refused)
		return err_errno(e, ENOMEM, "%s: MSRs", t->who);
	for (uint32_t i = 0; i < list->nmsrs; i++)
		msrs[i].index = list->indices[i];
	r = msrs_call(t, s->get, msrs, list->nmsrs, refused);
	if (r < 0)
		return x86_is_lacking(s, r) ? 0 : x86_get_failed(t, s, r, e);
	for (uint32_t i = 0; i < list->nmsrs; i++)
		if (!refused[i])
			msrs[nr++] = msrs[i];
	return x86_put(t, s, t->instance, msrs, nr * sizeof(*msrs), w, e);
}

/* Writing one of these makes KVM write the time of day into guest memory: that is
 * a command of the guest's, carried out long ago, and not state. */
static bool msr_is_command(uint32_t index)
{
	return index == MSR_KVM_WALL_CLOCK || index == MSR_KVM_WALL_CLOCK_NEW;
}

static int msr_rank(uint32_t index)
{
	if (index == MSR_IA32_TSC)
		return 0;
	return index == MSR_IA32_TSC_DEADLINE ? 2 : 1;
}

static uint32_t msrs_in_order(const struct kvm_msr_entry *in, uint32_t nr,
			      struct kvm_msr_entry *out)
{
	uint32_t n = 0;

	for (int rank = 0; rank <= 2; rank++)
		for (uint32_t i = 0; i < nr; i++)
			if (msr_rank(in[i].index) == rank && !msr_is_command(in[i].index))
				out[n++] = in[i];
	return n;
}

/* A refused MSR is right all the same if it has that value already (read-only
 * ones), or does not exist here and was at its reset value of 0. */
static int msr_refused(const struct x86_target *t, const struct kvm_msr_entry *want, struct err *e)
{
	struct kvm_msr_entry now = {.index = want->index};
	bool unknown;
	int r = msrs_call(t, KVM_GET_MSRS, &now, 1, &unknown);

	if (r < 0)
		return err_errno(e, -r, "%s: KVM_GET_MSRS", t->who);
	if (unknown ? want->data == 0 : want->data == now.data)
		return 0;
	return err_set(e, ENOTSUP, "%s: this host refuses MSR 0x%x = 0x%llx", t->who, want->index,
		       (unsigned long long)want->data);
}

int x86_msrs_load(const struct x86_target *t, const struct x86_step *s,
		  const struct snapd_state_reader *reader, struct err *e)
{
	_cleanup_free_ struct kvm_msr_entry *msrs = NULL;
	_cleanup_free_ bool *refused = NULL;
	const void *data;
	uint32_t nr;
	size_t len;
	int r = x86_find(t, s, t->instance, reader, &data, &len, e);

	if (r <= 0)
		return r;
	if (len % sizeof(*msrs) || len / sizeof(*msrs) > X86_MSRS_MAX)
		return x86_bad_length(t, s, len, e);
	nr = len / sizeof(*msrs);
	msrs = calloc(nr + 1, sizeof(*msrs));
	refused = calloc(nr + 1, sizeof(*refused));
	if (!msrs || !refused)
		return err_errno(e, ENOMEM, "%s: MSRs", t->who);
	nr = msrs_in_order(data, nr, msrs);
	r = msrs_call(t, s->set, msrs, nr, refused);
	if (r < 0)
		return x86_set_failed(t, s, r, e);
	for (uint32_t i = 0; i < nr && r == 0; i++)
		if (refused[i])
			r = msr_refused(t, &msrs[i], e);
	return r;
}
