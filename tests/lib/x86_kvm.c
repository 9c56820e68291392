/* SPDX-License-Identifier: MIT */
/* A scripted KVM with everything that x86_64 state asks for; x86_kvm.h tells. */
#include "tests/lib/x86_kvm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/arch/x86_64.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"

struct scripted_kvm kvm;
struct kvm_run run;
const struct arch_vm vm = {.kvm = &kvm.ops, .kvm_fd = 3, .vm_fd = 4};
uint8_t filler[SCRIPT_BYTES];
struct kvm_cpuid2 *vcpu_cpuid, *host_cpuid;

struct fake_msr msrs[NR_MSRS] = {
	{0x6e0, 60},		     /* TSC_DEADLINE */
	{0x174, 74},		     /* SYSENTER_CS */
	{0x11, 11},		     /* a command: must not be written */
	{0x666, 0, .no_get = true},  /* listed, but this vCPU has none */
	{0x10a, 10, .no_set = true}, /* read-only */
	{0xc0000080, 80},	     /* EFER */
	{0x10, 16},		     /* TSC */
};
uint32_t set_log[64];
size_t nr_set_log;

static int msr_list(void *opaque, void *arg)
{
	struct kvm_msr_list *l = arg;
	uint32_t room = l->nmsrs;

	l->nmsrs = ARRAY_SIZE(msrs);
	if (room < ARRAY_SIZE(msrs))
		return -E2BIG;
	for (size_t i = 0; i < ARRAY_SIZE(msrs); i++)
		l->indices[i] = msrs[i].index;
	return 0;
}

long msr_find(uint32_t index)
{
	for (size_t i = 0; i < ARRAY_SIZE(msrs); i++)
		if (msrs[i].index == index)
			return i;
	return -1;
}

static int msrs_get(void *opaque, void *arg)
{
	struct kvm_msrs *call = arg;

	for (uint32_t i = 0; i < call->nmsrs; i++) {
		long at = msr_find(call->entries[i].index);

		if (at < 0 || msrs[at].no_get)
			return i;
		call->entries[i].data = msrs[at].value;
	}
	return call->nmsrs;
}

static int msrs_set(void *opaque, void *arg)
{
	struct kvm_msrs *call = arg;

	for (uint32_t i = 0; i < call->nmsrs; i++) {
		long at = msr_find(call->entries[i].index);

		if (at < 0 || msrs[at].no_set)
			return i;
		msrs[at].value = call->entries[i].data;
		set_log[nr_set_log++] = call->entries[i].index;
	}
	return call->nmsrs;
}

static int cpuid_out(const struct kvm_cpuid2 *c, struct kvm_cpuid2 *arg)
{
	if (arg->nent < c->nent)
		return -E2BIG;
	memcpy(arg, c, sizeof(*c) + c->nent * sizeof(c->entries[0]));
	return 0;
}

static int cpuid_get(void *opaque, void *arg)
{
	return cpuid_out(vcpu_cpuid, arg);
}

static int supported_cpuid(void *opaque, void *arg)
{
	return cpuid_out(host_cpuid, arg);
}

static int nested_get(void *opaque, void *arg)
{
	struct kvm_nested_state *s = arg;

	check(s->size == 4096, "size %u", s->size);
	s->size = sizeof(*s);
	return 0;
}

int irqchip_get(void *opaque, void *arg)
{
	struct kvm_irqchip *chip = arg;

	memset(&chip->chip, 0x10 + chip->chip_id, sizeof(chip->chip));
	return 0;
}

static struct kvm_cpuid2 *make_cpuid(void)
{
	struct kvm_cpuid2 *c = calloc(1, sizeof(*c) + 8 * sizeof(c->entries[0]));

	check(c, "memory");
	c->nent = 3;
	c->entries[0] = (struct kvm_cpuid_entry2){.function = 0x1, .ecx = 0x1 << 28 | 0x1 << 20};
	c->entries[1] = (struct kvm_cpuid_entry2){
		.function = 0x7, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .ebx = 1 << 5};
	c->entries[2] = (struct kvm_cpuid_entry2){.function = 0x80000001, .edx = 1u << 29};
	return c;
}

void script_everything(void)
{
	static const uint32_t caps[] = {KVM_CAP_PIT_STATE2,  KVM_CAP_ADJUST_CLOCK,
					KVM_CAP_GET_TSC_KHZ, KVM_CAP_MP_STATE,
					KVM_CAP_SREGS2,	     KVM_CAP_XCRS,
					KVM_CAP_XSAVE,	     KVM_CAP_DEBUGREGS,
					KVM_CAP_VCPU_EVENTS};

	scripted_kvm_init(&kvm);
	memset(filler, 0x5a, sizeof(filler));
	memset(&run, 0, sizeof(run));
	for (size_t i = 0; i < ARRAY_SIZE(caps); i++)
		scripted_cap(&kvm, caps[i], 1);
	scripted_cap(&kvm, KVM_CAP_XSAVE2, SCRIPT_BYTES);
	scripted_cap(&kvm, KVM_CAP_NESTED_STATE, 4096);
	scripted_answer(&kvm, KVM_RUN, -EINTR, NULL, 0);
	scripted_call(&kvm, KVM_GET_IRQCHIP, irqchip_get);
	scripted_answer(&kvm, KVM_SET_IRQCHIP, 0, NULL, 0);
	FIXED(PIT2, struct kvm_pit_state2);
	FIXED(CLOCK, struct kvm_clock_data);
	scripted_call(&kvm, KVM_GET_CPUID2, cpuid_get);
	scripted_answer(&kvm, KVM_SET_CPUID2, 0, NULL, 0);
	scripted_call(&kvm, KVM_GET_SUPPORTED_CPUID, supported_cpuid);
	scripted_answer(&kvm, KVM_GET_TSC_KHZ, KHZ, NULL, 0);
	scripted_answer(&kvm, KVM_SET_TSC_KHZ, 0, NULL, 0);
	FIXED(MP_STATE, struct kvm_mp_state);
	FIXED(REGS, struct kvm_regs);
	FIXED(SREGS2, struct kvm_sregs2);
	FIXED(XCRS, struct kvm_xcrs);
	scripted_answer(&kvm, KVM_GET_XSAVE2, 0, filler, SCRIPT_BYTES);
	scripted_answer(&kvm, KVM_SET_XSAVE, 0, NULL, 0);
	FIXED(DEBUGREGS, struct kvm_debugregs);
	FIXED(LAPIC, struct kvm_lapic_state);
	scripted_call(&kvm, KVM_GET_MSR_INDEX_LIST, msr_list);
	scripted_call(&kvm, KVM_GET_MSRS, msrs_get);
	scripted_call(&kvm, KVM_SET_MSRS, msrs_set);
	scripted_call(&kvm, KVM_GET_NESTED_STATE, nested_get);
	scripted_answer(&kvm, KVM_SET_NESTED_STATE, 0, NULL, 0);
	FIXED(VCPU_EVENTS, struct kvm_vcpu_events);
	nr_set_log = 0;
}

int save(struct snapd_state_writer *w, struct err *e)
{
	int r;

	check(state_writer_init(w) == 0, "memory");
	kvm.nr_log = 0;
	r = arch_x86_64.host_save(&vm, w, e);
	if (!r)
		r = arch_x86_64.vm_save(&vm, w, e);
	if (!r)
		r = arch_x86_64.vcpu_save(&vm, 5, &run, 0, w, e);
	return r;
}

static int load_blob(const void *blob, size_t len, struct err *e)
{
	struct snapd_state_reader reader;
	int r;

	check(state_reader_init(&reader, blob, len, e) == 0, "%s", e->text);
	kvm.nr_log = 0;
	nr_set_log = 0;
	r = arch_x86_64.vm_load(&vm, &reader, e);
	if (!r)
		r = arch_x86_64.vcpu_load(&vm, 5, &run, 0, &reader, e);
	return r;
}

int load(struct snapd_state_writer *w, struct err *e)
{
	const void *blob;
	size_t len;

	check(state_writer_finish(w, &blob, &len) == 0, "finish");
	return load_blob(blob, len, e);
}

int host_check(struct snapd_state_writer *w, struct err *e)
{
	struct snapd_state_reader reader;
	const void *blob;
	size_t len;

	check(state_writer_finish(w, &blob, &len) == 0, "finish");
	check(state_reader_init(&reader, blob, len, e) == 0, "%s", e->text);
	return arch_x86_64.host_check(&vm, NULL, &reader, e);
}

void saved(struct snapd_state_writer *w)
{
	struct err e = {0};

	script_everything();
	check(save(w, &e) == 0, "%s", e.text);
}

void expect_refused(int r, int want, const struct err *e, const char *word)
{
	check(r == want, "%d instead of %d: %s", r, want, e->text);
	check(strstr(e->text, word), "no word of %s: %s", word, e->text);
}

void x86_kvm_init(void)
{
	vcpu_cpuid = make_cpuid();
	host_cpuid = make_cpuid();
}

void x86_kvm_deinit(void)
{
	free(vcpu_cpuid);
	free(host_cpuid);
}
