/* SPDX-License-Identifier: MIT */
/*
 * x86_64: what KVM knows of a VM and its vCPUs, as "x86.*" records and back.
 * In: an arch_vm and vCPU descriptors; out: records (docs/format.md lists their
 * bytes).  VM steps run on the agent's thread, vCPU steps on the vCPU's own.
 *
 * Theory of operation.  Each table below is a sequence of steps; one step is one
 * kind of record, got and set by one pair of ioctls.  The order of the table is
 * the order of loading, and it is the kernel's:
 *
 *   CPUID2 first: XCRS, SREGS2 and MSRs are checked against it.  The kernel
 *   refuses to change it after the first KVM_RUN, so an equal one is left alone.
 *   TSC_KHZ before the TSC.  SREGS2 before LAPIC: it carries the APIC's mode.
 *   XCRS before XSAVE.  LAPIC before MSRs: TSC_DEADLINE arms its timer, and so
 *   comes last of the MSRs, the TSC first.  Nested state wants EFER and the VMX
 *   MSRs.  VCPU_EVENTS last: whatever was set before may queue an event.
 *
 * A step that this KVM does not offer (by capability, by ENOTTY, or, for devices
 * that a VM may lack, by ENXIO or EINVAL) leaves no record.  Every other failure
 * fails the save.  On load each record must be of a known version and of exactly
 * its length; a record that this VM cannot take, or a device that this VM has
 * and the record's VM had not, is refused.
 *
 * Left out: KVM_GET_SUPPORTED_HV_CPUID and Xen state (no such guests), PMU event
 * filters and other VM-wide settings that a VMM makes when it builds the VM.
 */
#include "snapd/arch/x86_64_step.h"

#include <stdio.h>
#include <string.h>

#define IRQCHIPS 3 /* master PIC, slave PIC, IOAPIC */

static_assert(sizeof(struct kvm_regs) == 144, "record x86.regs");
static_assert(sizeof(struct kvm_sregs) == 312, "record x86.sregs");
static_assert(sizeof(struct kvm_sregs2) == 320, "record x86.sregs2");
static_assert(sizeof(struct kvm_fpu) == 416, "record x86.fpu");
static_assert(sizeof(struct kvm_xcrs) == 392, "record x86.xcrs");
static_assert(sizeof(struct kvm_debugregs) == 128, "record x86.debugregs");
static_assert(sizeof(struct kvm_lapic_state) == 1024, "record x86.lapic");
static_assert(sizeof(struct kvm_vcpu_events) == 64, "record x86.events");
static_assert(sizeof(struct kvm_mp_state) == 4, "record x86.mp_state");
static_assert(sizeof(struct kvm_irqchip) == 520, "record x86.irqchip");
static_assert(sizeof(struct kvm_pit_state2) == 112, "record x86.pit2");
static_assert(sizeof(struct kvm_clock_data) == 48, "record x86.clock");

static bool step_offered(const struct x86_target *t, const struct x86_step *s)
{
	if (s->unless_cap && arch_cap(t->vm, s->unless_cap) > 0)
		return false;
	return !s->cap || arch_cap(t->vm, s->cap) > 0;
}

/* The three chips of the in-kernel interrupt controller; instance = chip. */
static int irqchip_save(const struct x86_target *t, const struct x86_step *s,
			struct snapd_state_writer *w, struct err *e)
{
	for (uint32_t i = 0; i < IRQCHIPS; i++) {
		struct kvm_irqchip chip = {.chip_id = i};
		int r = arch_ioctl(t->vm, t->fd, s->get, &chip);

		if (r < 0)
			return i == 0 && x86_is_lacking(s, r) ? 0 : x86_get_failed(t, s, r, e);
		r = x86_put(t, s, i, &chip, sizeof(chip), w, e);
		if (r)
			return r;
	}
	return 0;
}

static int irqchip_load(const struct x86_target *t, const struct x86_step *s,
			const struct snapd_state_reader *reader, struct err *e)
{
	for (uint32_t i = 0; i < IRQCHIPS; i++) {
		struct kvm_irqchip chip = {.chip_id = i};
		const void *data;
		size_t len;
		int r = x86_find(t, s, i, reader, &data, &len, e);

		if (r < 0)
			return r;
		if (r == 0 && i == 0)
			return x86_check_lacking(t, s, &chip, e);
		if (r == 0)
			return err_set(e, E_CORRUPT, "VM: record %s: chip %u is missing", s->record,
				       i);
		if (len != sizeof(chip))
			return x86_bad_length(t, s, len, e);
		memcpy(&chip, data, sizeof(chip));
		chip.chip_id = i;
		r = arch_ioctl(t->vm, t->fd, s->set, &chip);
		if (r < 0)
			return x86_set_failed(t, s, r, e);
	}
	return 0;
}

/* With flags the kernel would move the clock on by the time passed since; a guest
 * that is rolled back sees the clock of the snapshot. */
static int clock_load(const struct x86_target *t, const struct x86_step *s,
		      const struct snapd_state_reader *reader, struct err *e)
{
	struct kvm_clock_data clock = {0}, saved;
	const void *data;
	size_t len;
	int r = x86_find(t, s, t->instance, reader, &data, &len, e);

	if (r <= 0)
		return r;
	if (len != sizeof(saved))
		return x86_bad_length(t, s, len, e);
	memcpy(&saved, data, sizeof(saved));
	clock.clock = saved.clock;
	r = arch_ioctl(t->vm, t->fd, s->set, &clock);
	return r < 0 ? x86_set_failed(t, s, r, e) : 0;
}

/* Without an in-kernel LAPIC each KVM_RUN takes CR8 from the run page: what stands
 * there would undo what was just loaded. */
static int sregs_load(const struct x86_target *t, const struct x86_step *s,
		      const struct snapd_state_reader *reader, struct err *e)
{
	static_assert(offsetof(struct kvm_sregs, cr8) == offsetof(struct kvm_sregs2, cr8),
		      "one place for both");
	const void *data;
	uint64_t cr8;
	size_t len;
	int r = x86_fixed_load(t, s, reader, e);

	if (r < 0 || x86_find(t, s, t->instance, reader, &data, &len, e) <= 0)
		return r;
	memcpy(&cr8, (const uint8_t *)data + offsetof(struct kvm_sregs, cr8), sizeof(cr8));
	t->run->cr8 = cr8;
	return 0;
}

static const struct x86_step vm_steps[] = {
	{.record = "x86.irqchip",
	 .what = "IRQCHIP",
	 .get = KVM_GET_IRQCHIP,
	 .set = KVM_SET_IRQCHIP,
	 .may_lack = true,
	 .save = irqchip_save,
	 .load = irqchip_load},
	{.record = "x86.pit2",
	 .what = "PIT2",
	 .get = KVM_GET_PIT2,
	 .set = KVM_SET_PIT2,
	 .cap = KVM_CAP_PIT_STATE2,
	 .len_bytes = sizeof(struct kvm_pit_state2),
	 .may_lack = true,
	 .save = x86_fixed_save,
	 .load = x86_fixed_load},
	{.record = "x86.clock",
	 .what = "CLOCK",
	 .get = KVM_GET_CLOCK,
	 .set = KVM_SET_CLOCK,
	 .cap = KVM_CAP_ADJUST_CLOCK,
	 .len_bytes = sizeof(struct kvm_clock_data),
	 .save = x86_fixed_save,
	 .load = clock_load},
};

static const struct x86_step vcpu_steps[] = {
	{.record = X86_RECORD_CPUID,
	 .what = "CPUID2",
	 .get = KVM_GET_CPUID2,
	 .set = KVM_SET_CPUID2,
	 .save = x86_cpuid_save,
	 .load = x86_cpuid_load},
	{.record = X86_RECORD_TSC_KHZ,
	 .what = "TSC_KHZ",
	 .get = KVM_GET_TSC_KHZ,
	 .set = KVM_SET_TSC_KHZ,
	 .cap = KVM_CAP_GET_TSC_KHZ,
	 .save = x86_tsc_khz_save,
	 .load = x86_tsc_khz_load},
	{.record = "x86.mp_state",
	 .what = "MP_STATE",
	 .get = KVM_GET_MP_STATE,
	 .set = KVM_SET_MP_STATE,
	 .cap = KVM_CAP_MP_STATE,
	 .len_bytes = sizeof(struct kvm_mp_state),
	 .save = x86_fixed_save,
	 .load = x86_fixed_load},
	{.record = "x86.regs",
	 .what = "REGS",
	 .get = KVM_GET_REGS,
	 .set = KVM_SET_REGS,
	 .len_bytes = sizeof(struct kvm_regs),
	 .required = true,
	 .save = x86_fixed_save,
	 .load = x86_fixed_load},
	{.record = "x86.sregs2",
	 .what = "SREGS2",
	 .get = KVM_GET_SREGS2,
	 .set = KVM_SET_SREGS2,
	 .cap = KVM_CAP_SREGS2,
	 .len_bytes = sizeof(struct kvm_sregs2),
	 .save = x86_fixed_save,
	 .load = sregs_load},
	{.record = "x86.sregs",
	 .what = "SREGS",
	 .get = KVM_GET_SREGS,
	 .set = KVM_SET_SREGS,
	 .unless_cap = KVM_CAP_SREGS2,
	 .len_bytes = sizeof(struct kvm_sregs),
	 .save = x86_fixed_save,
	 .load = sregs_load},
	{.record = "x86.xcrs",
	 .what = "XCRS",
	 .get = KVM_GET_XCRS,
	 .set = KVM_SET_XCRS,
	 .cap = KVM_CAP_XCRS,
	 .len_bytes = sizeof(struct kvm_xcrs),
	 .save = x86_fixed_save,
	 .load = x86_fixed_load},
	{.record = X86_RECORD_XSAVE,
	 .what = "XSAVE",
	 .set = KVM_SET_XSAVE,
	 .cap = KVM_CAP_XSAVE,
	 .save = x86_xsave_save,
	 .load = x86_xsave_load},
	{.record = "x86.fpu",
	 .what = "FPU",
	 .get = KVM_GET_FPU,
	 .set = KVM_SET_FPU,
	 .unless_cap = KVM_CAP_XSAVE,
	 .len_bytes = sizeof(struct kvm_fpu),
	 .save = x86_fixed_save,
	 .load = x86_fixed_load},
	{.record = "x86.debugregs",
	 .what = "DEBUGREGS",
	 .get = KVM_GET_DEBUGREGS,
	 .set = KVM_SET_DEBUGREGS,
	 .cap = KVM_CAP_DEBUGREGS,
	 .len_bytes = sizeof(struct kvm_debugregs),
	 .save = x86_fixed_save,
	 .load = x86_fixed_load},
	{.record = "x86.lapic",
	 .what = "LAPIC",
	 .get = KVM_GET_LAPIC,
	 .set = KVM_SET_LAPIC,
	 .len_bytes = sizeof(struct kvm_lapic_state),
	 .may_lack = true,
	 .save = x86_fixed_save,
	 .load = x86_fixed_load},
	{.record = "x86.msrs",
	 .what = "MSRS",
	 .get = KVM_GET_MSRS,
	 .set = KVM_SET_MSRS,
	 .save = x86_msrs_save,
	 .load = x86_msrs_load},
	{.record = "x86.nested",
	 .what = "NESTED_STATE",
	 .get = KVM_GET_NESTED_STATE,
	 .set = KVM_SET_NESTED_STATE,
	 .cap = KVM_CAP_NESTED_STATE,
	 .save = x86_nested_save,
	 .load = x86_nested_load},
	{.record = "x86.events",
	 .what = "VCPU_EVENTS",
	 .get = KVM_GET_VCPU_EVENTS,
	 .set = KVM_SET_VCPU_EVENTS,
	 .cap = KVM_CAP_VCPU_EVENTS,
	 .len_bytes = sizeof(struct kvm_vcpu_events),
	 .save = x86_fixed_save,
	 .load = x86_fixed_load},
};

static int steps_save(const struct x86_target *t, const struct x86_step *steps, size_t nr,
		      struct snapd_state_writer *w, struct err *e)
{
	for (size_t i = 0; i < nr; i++) {
		int r = 0;

		if (step_offered(t, &steps[i]))
			r = steps[i].save(t, &steps[i], w, e);
		if (r)
			return r;
	}
	return 0;
}

static int steps_load(const struct x86_target *t, const struct x86_step *steps, size_t nr,
		      const struct snapd_state_reader *reader, struct err *e)
{
	for (size_t i = 0; i < nr; i++) {
		int r = steps[i].load(t, &steps[i], reader, e);

		if (r)
			return r;
	}
	return 0;
}

static void vcpu_target(struct x86_target *t, const struct arch_vm *vm, int fd, struct kvm_run *run,
			uint32_t index)
{
	*t = (struct x86_target){.vm = vm, .fd = fd, .run = run, .instance = index};
	snprintf(t->who, sizeof(t->who), "vCPU %u", index);
}

static int x86_vcpu_save(const struct arch_vm *vm, int vcpu_fd, struct kvm_run *run, uint32_t index,
			 struct snapd_state_writer *w, struct err *e)
{
	struct x86_target t;
	int r;

	vcpu_target(&t, vm, vcpu_fd, run, index);
	r = arch_complete_pending(vm, vcpu_fd, run, index, e);
	if (r)
		return r;
	return steps_save(&t, vcpu_steps, ARRAY_SIZE(vcpu_steps), w, e);
}

static int x86_vcpu_load(const struct arch_vm *vm, int vcpu_fd, struct kvm_run *run, uint32_t index,
			 const struct snapd_state_reader *reader, struct err *e)
{
	struct x86_target t;
	int r;

	vcpu_target(&t, vm, vcpu_fd, run, index);
	r = arch_discard_pending(vm, vcpu_fd, run, index, e);
	if (r < 0)
		return r;
	r = steps_load(&t, vcpu_steps, ARRAY_SIZE(vcpu_steps), reader, e);
	if (r)
		return r;
	/* Registers that the VMM keeps in the run page would be set again. */
	run->kvm_dirty_regs = 0;
	/* Tells a guest with kvmclock that it stood still, so that its watchdogs do not
	 * bark; refused by a guest without. */
	arch_ioctl(vm, vcpu_fd, KVM_KVMCLOCK_CTRL, NULL);
	return 0;
}

static int x86_vm_save(const struct arch_vm *vm, struct snapd_state_writer *w, struct err *e)
{
	struct x86_target t = {.vm = vm, .fd = vm->vm_fd, .who = "VM"};

	return steps_save(&t, vm_steps, ARRAY_SIZE(vm_steps), w, e);
}

static int x86_vm_load(const struct arch_vm *vm, const struct snapd_state_reader *reader,
		       struct err *e)
{
	struct x86_target t = {.vm = vm, .fd = vm->vm_fd, .who = "VM"};

	return steps_load(&t, vm_steps, ARRAY_SIZE(vm_steps), reader, e);
}

const struct arch_ops arch_x86_64 = {
	.name = "x86_64",
	.address_spaces = 2,
	.ring_page_offset = KVM_DIRTY_LOG_PAGE_OFFSET,
	.host_save = x86_host_save,
	.host_check = x86_host_check,
	.vm_save = x86_vm_save,
	.vm_load = x86_vm_load,
	.vcpu_save = x86_vcpu_save,
	.vcpu_load = x86_vcpu_load,
	.shadows = x86_shadows,
	.same = x86_same,
};
