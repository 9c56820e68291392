/* SPDX-License-Identifier: MIT */
/*
 * x86_64 state against a scripted KVM: the order in which the kernel is asked,
 * what absent calls and refused values lead to, and that no record is taken
 * whose version or length is not the known one.
 */
#include <errno.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <string.h>

#include "snapd/arch/host.h"
#include "snapd/arch/x86_64.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/scripted_kvm.h"

#define KHZ 2500000

/* A KVM with everything, and the MSRs behind it. */
static struct scripted_kvm kvm;
static struct kvm_run run;
static const struct arch_vm vm = {.kvm = &kvm.ops, .kvm_fd = 3, .vm_fd = 4};
static uint8_t filler[SCRIPT_BYTES];
static struct kvm_cpuid2 *vcpu_cpuid, *host_cpuid;

static struct {
	uint32_t index;
	uint64_t value;
	bool no_get, no_set;
} msrs[] = {
	{0x6e0, 60},		     /* TSC_DEADLINE */
	{0x174, 74},		     /* SYSENTER_CS */
	{0x11, 11},		     /* a command: must not be written */
	{0x666, 0, .no_get = true},  /* listed, but this vCPU has none */
	{0x10a, 10, .no_set = true}, /* read-only */
	{0xc0000080, 80},	     /* EFER */
	{0x10, 16},		     /* TSC */
};
static uint32_t set_log[64]; /* MSRs in the order in which they were set */
static size_t nr_set_log;

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

static long msr_find(uint32_t index)
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

static int irqchip_get(void *opaque, void *arg)
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

#define FIXED(name, type)                                                       \
	do {                                                                    \
		scripted_answer(&kvm, KVM_GET_##name, 0, filler, sizeof(type)); \
		scripted_answer(&kvm, KVM_SET_##name, 0, NULL, 0);              \
	} while (0)

static void script_everything(void)
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

static int save(struct snapd_state_writer *w, struct err *e)
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

static int load(struct snapd_state_writer *w, struct err *e)
{
	const void *blob;
	size_t len;

	check(state_writer_finish(w, &blob, &len) == 0, "finish");
	return load_blob(blob, len, e);
}

static int host_check(struct snapd_state_writer *w, struct err *e)
{
	struct snapd_state_reader reader;
	const void *blob;
	size_t len;

	check(state_writer_finish(w, &blob, &len) == 0, "finish");
	check(state_reader_init(&reader, blob, len, e) == 0, "%s", e->text);
	return arch_x86_64.host_check(&vm, NULL, &reader, e);
}

/* Save on a whole KVM, into *w. */
static void saved(struct snapd_state_writer *w)
{
	struct err e = {0};

	script_everything();
	check(save(w, &e) == 0, "%s", e.text);
}

static void expect_refused(int r, int want, const struct err *e, const char *word)
{
	check(r == want, "%d instead of %d: %s", r, want, e->text);
	check(strstr(e->text, word), "no word of %s: %s", word, e->text);
}

static void test_order(void)
{
	/* kvm_run first; CPUID is equal, so that it is not set. */
	static const unsigned long order[] = {
		KVM_SET_IRQCHIP,   KVM_SET_IRQCHIP,   KVM_SET_IRQCHIP,	    KVM_SET_PIT2,
		KVM_SET_CLOCK,	   KVM_RUN,	      KVM_GET_CPUID2,	    KVM_GET_TSC_KHZ,
		KVM_SET_MP_STATE,  KVM_SET_REGS,      KVM_SET_SREGS2,	    KVM_SET_XCRS,
		KVM_SET_XSAVE,	   KVM_SET_DEBUGREGS, KVM_SET_LAPIC,	    KVM_SET_MSRS,
		KVM_SET_MSRS,	   KVM_GET_MSRS,      KVM_SET_NESTED_STATE, KVM_SET_VCPU_EVENTS,
		KVM_KVMCLOCK_CTRL,
	};
	static const uint32_t msr_order[] = {0x10, 0x174, 0xc0000080, 0x6e0};
	struct snapd_state_writer w;
	struct err e = {0};

	saved(&w);
	check(kvm.log[0] != KVM_RUN, "the host is described first");
	check(scripted_at(&kvm, KVM_RUN, 0) < scripted_at(&kvm, KVM_GET_REGS, 0),
	      "pending reads are completed before registers are read");
	check(load(&w, &e) == 0, "%s", e.text);
	check(kvm.nr_log == ARRAY_SIZE(order), "%zu calls", kvm.nr_log);
	for (size_t i = 0; i < ARRAY_SIZE(order); i++)
		check(kvm.log[i] == order[i], "call %zu is 0x%lx", i, kvm.log[i]);
	check(nr_set_log == ARRAY_SIZE(msr_order), "%zu MSRs set", nr_set_log);
	for (size_t i = 0; i < ARRAY_SIZE(msr_order); i++)
		check(set_log[i] == msr_order[i], "MSR %zu is 0x%x", i, set_log[i]);
	state_writer_deinit(&w);
}

static void test_values_come_back(void)
{
	struct snapd_state_writer w;
	struct kvm_clock_data clock;
	struct kvm_irqchip chip;
	struct err e = {0};

	saved(&w);
	check(load(&w, &e) == 0, "%s", e.text);
	for (size_t i = 0; i < kvm.nr_answers; i++) {
		const struct script_answer *a = &kvm.answers[i];

		if (a->request == KVM_SET_REGS)
			check(!memcmp(a->in, filler, sizeof(struct kvm_regs)), "registers");
		if (a->request == KVM_SET_LAPIC)
			check(!memcmp(a->in, filler, sizeof(struct kvm_lapic_state)), "LAPIC");
		if (a->request == KVM_SET_XSAVE)
			check(!memcmp(a->in, filler, SCRIPT_BYTES), "XSAVE");
		if (a->request == KVM_SET_CLOCK) {
			memcpy(&clock, a->in, sizeof(clock));
			check(clock.flags == 0 && clock.clock == 0x5a5a5a5a5a5a5a5aull, "clock");
		}
		if (a->request == KVM_SET_IRQCHIP) {
			memcpy(&chip, a->in, sizeof(chip));
			check(chip.chip_id == 2 && chip.chip.dummy[0] == 0x12, "IOAPIC");
		}
	}
	check(run.cr8 == 0x5a5a5a5a5a5a5a5aull, "CR8 in the run page");
	state_writer_deinit(&w);
}

/* A KVM with next to nothing: a simulated one, or a very old one. */
static void test_bare(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	scripted_kvm_init(&kvm);
	scripted_answer(&kvm, KVM_RUN, -EINTR, NULL, 0);
	FIXED(REGS, struct kvm_regs);
	check(save(&w, &e) == 0, "%s", e.text);
	check(host_check(&w, &e) == 0, "%s", e.text);
	check(load(&w, &e) == 0, "%s", e.text);
	state_writer_deinit(&w);

	scripted_forget(&kvm, KVM_GET_REGS);
	expect_refused(save(&w, &e), -ENOTTY, &e, "KVM_GET_REGS");
	state_writer_deinit(&w);
}

static void test_older_calls(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	script_everything();
	scripted_cap(&kvm, KVM_CAP_SREGS2, 0);
	scripted_cap(&kvm, KVM_CAP_XSAVE2, 0);
	FIXED(SREGS, struct kvm_sregs);
	scripted_answer(&kvm, KVM_GET_XSAVE, 0, filler, 4096);
	check(save(&w, &e) == 0, "%s", e.text);
	check(scripted_at(&kvm, KVM_GET_SREGS2, 0) < 0, "SREGS2 without its capability");
	check(scripted_at(&kvm, KVM_GET_XSAVE, 0) >= 0, "XSAVE");
	check(load(&w, &e) == 0, "%s", e.text);
	check(scripted_at(&kvm, KVM_SET_SREGS, 0) >= 0, "SREGS");
	check(scripted_at(&kvm, KVM_SET_SREGS2, 0) < 0, "SREGS2");
	state_writer_deinit(&w);
}

/* Each GET and each SET failing for real fails the whole, with its name. */
static void test_failures(void)
{
	static const struct {
		unsigned long request;
		const char *name;
	} gets[] = {{KVM_GET_IRQCHIP, "IRQCHIP"}, {KVM_GET_CLOCK, "CLOCK"},
		    {KVM_GET_REGS, "REGS"},	  {KVM_GET_SREGS2, "SREGS2"},
		    {KVM_GET_XSAVE2, "XSAVE"},	  {KVM_GET_LAPIC, "LAPIC"},
		    {KVM_GET_MSRS, "MSRS"},	  {KVM_GET_VCPU_EVENTS, "VCPU_EVENTS"},
		    {KVM_RUN, "KVM_RUN"},	  {KVM_GET_NESTED_STATE, "NESTED"}},
	  sets[] = {{KVM_SET_IRQCHIP, "IRQCHIP"}, {KVM_SET_PIT2, "PIT2"},
		    {KVM_SET_REGS, "REGS"},	  {KVM_SET_SREGS2, "SREGS2"},
		    {KVM_SET_XSAVE, "XSAVE"},	  {KVM_SET_XCRS, "XCRS"},
		    {KVM_SET_MSRS, "MSRS"},	  {KVM_SET_VCPU_EVENTS, "VCPU_EVENTS"},
		    {KVM_RUN, "KVM_RUN"},	  {KVM_SET_NESTED_STATE, "NESTED"}};
	struct snapd_state_writer w;

	for (size_t i = 0; i < ARRAY_SIZE(gets); i++) {
		struct err e = {0};

		script_everything();
		scripted_answer(&kvm, gets[i].request, -EIO, NULL, 0);
		expect_refused(save(&w, &e), -EIO, &e, gets[i].name);
		state_writer_deinit(&w);
	}
	for (size_t i = 0; i < ARRAY_SIZE(sets); i++) {
		struct err e = {0};

		saved(&w);
		scripted_answer(&kvm, sets[i].request, -EIO, NULL, 0);
		expect_refused(load(&w, &e), -EIO, &e, sets[i].name);
		state_writer_deinit(&w);
	}
}

/* The saved records again, with record `at` changed in version or length. */
static void copy_records(const struct snapd_state_writer *from, struct snapd_state_writer *to,
			 uint32_t at, uint16_t version, int longer)
{
	struct snapd_state_reader reader = {.buf = from->buf, .len = from->len};
	const struct state_record *rec = NULL;
	uint32_t n = 0;

	check(state_writer_init(to) == 0, "memory");
	while ((rec = state_next(&reader, rec))) {
		bool this = n++ == at;
		size_t len = rec->len_bytes + (this ? longer : 0);
		_cleanup_free_ uint8_t *payload = calloc(1, len + 8);

		check(payload, "memory");
		memcpy(payload, rec + 1, MIN(len, rec->len_bytes));
		state_put(to, rec->name, rec->instance, this ? version : rec->version, payload,
			  len);
	}
}

static void test_bad_records(void)
{
	struct snapd_state_writer w, bad;
	uint32_t tested = 0;

	saved(&w);
	for (uint32_t i = 0; i < w.nr_records; i++) {
		struct snapd_state_reader reader = {.buf = w.buf, .len = w.len};
		const struct state_record *rec = state_next(&reader, NULL);

		for (uint32_t n = 0; n < i; n++)
			rec = state_next(&reader, rec);
		if (strncmp(rec->name, "x86.", 4) != 0)
			continue;
		tested++;
		for (int longer = -1; longer <= 1; longer++) {
			struct err e = {0};

			copy_records(&w, &bad, i, longer ? 1 : 2, longer);
			if (strcmp(rec->name, "x86.xsave") == 0 && longer > 0)
				expect_refused(load(&bad, &e), -ENOTSUP, &e, "XSAVE");
			else
				expect_refused(load(&bad, &e), longer ? -EUCLEAN : -ENOTSUP, &e,
					       rec->name);
			state_writer_deinit(&bad);
		}
	}
	check(tested >= 16, "only %u records", tested);
	state_writer_deinit(&w);
}

static void test_devices_must_agree(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	/* saved with, loaded without */
	saved(&w);
	scripted_answer(&kvm, KVM_SET_IRQCHIP, -ENXIO, NULL, 0);
	expect_refused(load(&w, &e), -ENXIO, &e, "IRQCHIP");
	state_writer_deinit(&w);
	err_clear(&e);

	/* saved without, loaded with */
	script_everything();
	scripted_answer(&kvm, KVM_GET_IRQCHIP, -ENXIO, NULL, 0);
	scripted_answer(&kvm, KVM_GET_PIT2, -ENXIO, NULL, 0);
	scripted_answer(&kvm, KVM_GET_LAPIC, -EINVAL, NULL, 0);
	check(save(&w, &e) == 0, "%s", e.text);
	check(load(&w, &e) == 0, "%s", e.text);
	scripted_call(&kvm, KVM_GET_IRQCHIP, irqchip_get);
	expect_refused(load(&w, &e), -ENOTSUP, &e, "IRQCHIP");
	err_clear(&e);
	scripted_answer(&kvm, KVM_GET_IRQCHIP, -ENXIO, NULL, 0);
	scripted_answer(&kvm, KVM_GET_LAPIC, 0, filler, sizeof(struct kvm_lapic_state));
	expect_refused(load(&w, &e), -ENOTSUP, &e, "LAPIC");
	state_writer_deinit(&w);
}

static void test_no_state_for_vcpu(void)
{
	struct snapd_state_writer w;
	struct snapd_state_reader reader;
	struct err e = {0};
	const void *blob;
	size_t len;

	saved(&w);
	check(state_writer_finish(&w, &blob, &len) == 0, "finish");
	check(state_reader_init(&reader, blob, len, &e) == 0, "%s", e.text);
	expect_refused(arch_x86_64.vcpu_load(&vm, 5, &run, 1, &reader, &e), -EUCLEAN, &e, "vCPU 1");
	state_writer_deinit(&w);
}

static int runs_left;
static int run_exits(void *opaque, void *arg)
{
	check(run.immediate_exit, "a KVM_RUN that would run the guest");
	return runs_left-- > 0 ? 0 : -EINTR;
}

static void test_pending_exits(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	script_everything();
	scripted_call(&kvm, KVM_RUN, run_exits);
	runs_left = 1;
	expect_refused(save(&w, &e), -EAGAIN, &e, "exit");
	check(!run.immediate_exit, "immediate_exit stays set");
	state_writer_deinit(&w);
	err_clear(&e);
	check(save(&w, &e) == 0, "%s", e.text);

	runs_left = 3;
	run.immediate_exit = 1; /* someone's kick, which must not get lost */
	check(load(&w, &e) == 0, "%s", e.text);
	check(run.immediate_exit == 1, "a kick got lost");
	run.immediate_exit = 0;
	runs_left = 1000;
	expect_refused(load(&w, &e), -EIO, &e, "pending");
	check(!run.immediate_exit, "immediate_exit stays set");
	state_writer_deinit(&w);
}

static void test_cpuid(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	saved(&w);
	vcpu_cpuid->entries[0].ecx ^= 1u << 27; /* OSXSAVE follows CR4 */
	check(load(&w, &e) == 0, "%s", e.text);
	check(scripted_at(&kvm, KVM_SET_CPUID2, 0) < 0, "an equal CPUID was set");

	vcpu_cpuid->entries[1].ebx ^= 1u << 8;
	check(load(&w, &e) == 0, "%s", e.text);
	check(scripted_at(&kvm, KVM_SET_CPUID2, 0) >= 0, "another CPUID was not set");
	scripted_answer(&kvm, KVM_SET_CPUID2, -EINVAL, NULL, 0);
	expect_refused(load(&w, &e), -ENOTSUP, &e, "CPUID");
	vcpu_cpuid->entries[1].ebx ^= 1u << 8;
	vcpu_cpuid->entries[0].ecx ^= 1u << 27;
	state_writer_deinit(&w);
}

static void test_msrs(void)
{
	struct snapd_state_writer w;
	struct err e = {0};
	long ro = msr_find(0x10a);

	/* read-only with another value than the snapshot's */
	saved(&w);
	msrs[ro].value = 99;
	expect_refused(load(&w, &e), -ENOTSUP, &e, "MSR 0x10a");
	msrs[ro].value = 10;
	/* refused, but not the last one: those behind it are set all the same */
	msrs[msr_find(0x174)].value = 0;
	err_clear(&e);
	check(load(&w, &e) == 0, "%s", e.text);
	check(msrs[msr_find(0x174)].value == 74, "an MSR was not set");
	state_writer_deinit(&w);

	/* unknown here, and not 0 in the snapshot */
	saved(&w);
	msrs[ro].no_get = true;
	expect_refused(load(&w, &e), -ENOTSUP, &e, "MSR 0x10a");
	msrs[ro].no_get = false;
	state_writer_deinit(&w);

	/* unknown here, at its reset value */
	msrs[ro].value = 0;
	saved(&w);
	msrs[ro].no_get = true;
	err_clear(&e);
	check(load(&w, &e) == 0, "%s", e.text);
	msrs[ro].no_get = false;
	msrs[ro].value = 10;
	state_writer_deinit(&w);
}

static void test_tsc_khz(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	saved(&w);
	scripted_answer(&kvm, KVM_GET_TSC_KHZ, KHZ + 1, NULL, 0);
	scripted_answer(&kvm, KVM_SET_TSC_KHZ, -EINVAL, NULL, 0);
	check(load(&w, &e) == 0, "a TSC that cannot be scaled only warns: %s", e.text);
	check(scripted_at(&kvm, KVM_SET_TSC_KHZ, 0) >= 0, "the TSC's frequency was not set");
	check(host_check(&w, &e) == 0, "%s", e.text);
	state_writer_deinit(&w);
}

static void test_host_features(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	saved(&w);
	check(host_check(&w, &e) == 0, "%s", e.text);

	host_cpuid->entries[1].ebx &= ~(1u << 5);
	expect_refused(host_check(&w, &e), -ENOTSUP, &e, "AVX2 (CPUID 0x7.0 EBX bit 5)");
	host_cpuid->entries[1].ebx |= 1u << 5;
	err_clear(&e);

	host_cpuid->nent = 2; /* no leaf 0x80000001 */
	expect_refused(host_check(&w, &e), -ENOTSUP, &e, "long mode");
	host_cpuid->nent = 3;
	err_clear(&e);

	scripted_cap(&kvm, KVM_CAP_XSAVE2, 0);
	check(host_check(&w, &e) == 0, "4096 bytes fit everywhere: %s", e.text);
	state_writer_deinit(&w);
}

static void put_machine(struct snapd_state_writer *w, const char *arch, uint32_t page_size)
{
	struct host_machine m = {.page_size = page_size};

	snprintf(m.arch, sizeof(m.arch), "%s", arch);
	check(state_writer_init(w) == 0, "memory");
	state_put(w, "host.machine", 0, 1, &m, sizeof(m));
}

static void test_host_machine(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	script_everything();
	put_machine(&w, "x86_64", 4096);
	check(host_check(&w, &e) == 0, "%s", e.text);
	state_writer_deinit(&w);

	put_machine(&w, "x86_64", 4096);
	state_put(&w, "dev.mine!", 0, 1, NULL, 0);
	check(host_check(&w, &e) == 0, "%s", e.text);
	state_put(&w, "x86.new!", 0, 1, NULL, 0);
	expect_refused(host_check(&w, &e), -ENOTSUP, &e, "x86.new!");
	state_writer_deinit(&w);
	err_clear(&e);

	put_machine(&w, "aarch64", 4096);
	expect_refused(host_check(&w, &e), -ENOTSUP, &e, "aarch64");
	state_writer_deinit(&w);
	err_clear(&e);

	put_machine(&w, "x86_64", 65536);
	expect_refused(host_check(&w, &e), -ENOTSUP, &e, "65536");
	state_writer_deinit(&w);
	err_clear(&e);

	check(state_writer_init(&w) == 0, "memory");
	expect_refused(host_check(&w, &e), -EUCLEAN, &e, "host");
	state_writer_deinit(&w);
}

int main(void)
{
	vcpu_cpuid = make_cpuid();
	host_cpuid = make_cpuid();
	test_order();
	test_values_come_back();
	test_bare();
	test_older_calls();
	test_failures();
	test_bad_records();
	test_devices_must_agree();
	test_no_state_for_vcpu();
	test_pending_exits();
	test_cpuid();
	test_msrs();
	test_tsc_khz();
	test_host_features();
	test_host_machine();
	free(vcpu_cpuid);
	free(host_cpuid);
	return 0;
}
