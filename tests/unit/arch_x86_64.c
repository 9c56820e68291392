/* SPDX-License-Identifier: MIT */
/*
 * x86_64 state against a scripted KVM: the order in which the kernel is asked,
 * what absent calls and failures lead to, and that no record is taken
 * whose version or length is not the known one.
 */
#include <errno.h>
#include <string.h>

#include "snapd/arch/x86_64.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/x86_kvm.h"

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

int main(void)
{
	x86_kvm_init();
	test_order();
	test_values_come_back();
	test_bare();
	test_older_calls();
	test_failures();
	test_bad_records();
	test_devices_must_agree();
	test_no_state_for_vcpu();
	test_pending_exits();
	x86_kvm_deinit();
	return 0;
}
