/* SPDX-License-Identifier: MIT */
/*
 * aarch64 state against a scripted KVM: registers of every size come back, in KVM's
 * order, one that KVM refuses must hold its value already; counters go on by the
 * route that the VM had; and no record is taken whose version or length lies.
 */
#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "snapd/arch/aarch64.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/scripted_kvm.h"

#define REG_BYTES 256

static struct scripted_kvm kvm;
static struct kvm_run run;
static const int vcpu_fds[] = {5};
static const struct arch_vm vm = {
	.kvm = &kvm.ops, .kvm_fd = 3, .vm_fd = 4, .vcpu_fds = vcpu_fds, .nr_vcpus = 1};
static uint64_t set_log[256]; /* registers in the order in which they were set */
static size_t nr_set;
static struct kvm_arm_counter_offset offset_set;
static bool fixed_offset; /* KVM ignores the counts */
static uint8_t filler[64];

static struct {
	uint64_t id;
	uint8_t value[REG_BYTES];
	bool no_set, counts;
} regs[] = {
	{KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | 0, {1}},
	{KVM_REG_ARM64 | KVM_REG_SIZE_U32 | KVM_REG_ARM_CORE | 212, {2}},
	{KVM_REG_ARM64 | KVM_REG_SIZE_U128 | KVM_REG_ARM_CORE | 84, {3}},
	{KVM_REG_ARM64 | KVM_REG_SIZE_U2048 | KVM_REG_ARM64_SVE, {4}},
	{KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG | 7, {5}, .no_set = true},
	{KVM_REG_ARM_TIMER_CNT, {6}, .counts = true},
	{KVM_REG_ARM_PTIMER_CNT, {7}, .counts = true},
	{KVM_REG_ARM_TIMER_CTL, {8}},
	{KVM_REG_ARM_FW_REG(0), {9}},
	{REG_ID_AA64PFR1_EL1, {10}},
	{KVM_REG_ARM64_SVE_VLS, {11}},
	{ARM64_SYS_REG(3, 0, 2, 0, 0), {12}},
};

static void set_value(uint64_t id, uint64_t v)
{
	for (size_t i = 0; i < ARRAY_SIZE(regs); i++)
		if (regs[i].id == id)
			memcpy(regs[i].value, &v, sizeof(v));
}

static uint64_t get_value(uint64_t id)
{
	uint64_t v = 0;

	for (size_t i = 0; i < ARRAY_SIZE(regs); i++)
		if (regs[i].id == id)
			memcpy(&v, regs[i].value, sizeof(v));
	return v;
}

static uint64_t host_count(void)
{
	uint64_t v;

	__asm__ volatile("isb; mrs %0, cntvct_el0" : "=r"(v)::"memory");
	return v;
}

static int reg_list(void *opaque, void *arg)
{
	struct kvm_reg_list *l = arg;
	uint64_t room = l->n;

	l->n = ARRAY_SIZE(regs);
	if (room < l->n)
		return -E2BIG;
	for (size_t i = 0; i < ARRAY_SIZE(regs); i++)
		l->reg[i] = regs[i].id;
	return 0;
}

static size_t reg_find(uint64_t id)
{
	for (size_t i = 0; i < ARRAY_SIZE(regs); i++)
		if (regs[i].id == id)
			return i;
	check(false, "register 0x%llx", (unsigned long long)id);
	return 0;
}

static int reg_get(void *opaque, void *arg)
{
	const struct kvm_one_reg *reg = arg;

	memcpy((void *)(uintptr_t)reg->addr, regs[reg_find(reg->id)].value, KVM_REG_SIZE(reg->id));
	return 0;
}

static int reg_set(void *opaque, void *arg)
{
	const struct kvm_one_reg *reg = arg;
	size_t i = reg_find(reg->id);

	set_log[nr_set++ % ARRAY_SIZE(set_log)] = reg->id;
	if (regs[i].no_set)
		return -EPERM;
	if (regs[i].counts && fixed_offset)
		return 0;
	memcpy(regs[i].value, (void *)(uintptr_t)reg->addr, KVM_REG_SIZE(reg->id));
	return 0;
}

static int set_offset(void *opaque, void *arg)
{
	memcpy(&offset_set, arg, sizeof(offset_set));
	return 0;
}

static void script(void)
{
	nr_set = 0;
	offset_set = (struct kvm_arm_counter_offset){0};
	fixed_offset = false;
	set_value(KVM_REG_ARM_PTIMER_CNT, 1ull << 60); /* far from the virtual one */
	scripted_kvm_init(&kvm);
	scripted_cap(&kvm, KVM_CAP_MP_STATE, 1);
	scripted_cap(&kvm, KVM_CAP_VCPU_EVENTS, 1);
	scripted_answer(&kvm, KVM_RUN, -EINTR, NULL, 0);
	scripted_answer(&kvm, KVM_IRQ_LINE, -ENXIO, NULL, 0);
	scripted_call(&kvm, KVM_ARM_SET_COUNTER_OFFSET, set_offset);
	scripted_answer(&kvm, KVM_GET_MP_STATE, 0, filler, sizeof(struct kvm_mp_state));
	scripted_answer(&kvm, KVM_SET_MP_STATE, 0, NULL, 0);
	scripted_answer(&kvm, KVM_GET_VCPU_EVENTS, 0, filler, sizeof(struct kvm_vcpu_events));
	scripted_answer(&kvm, KVM_SET_VCPU_EVENTS, 0, NULL, 0);
	scripted_call(&kvm, KVM_GET_REG_LIST, reg_list);
	scripted_call(&kvm, KVM_GET_ONE_REG, reg_get);
	scripted_call(&kvm, KVM_SET_ONE_REG, reg_set);
}

static int save(struct snapd_state_writer *w, struct err *e)
{
	int r;

	check(state_writer_init(w) == 0, "memory");
	r = arch_aarch64.host_save(&vm, w, e);
	if (!r)
		r = arch_aarch64.vm_save(&vm, w, e);
	if (!r)
		r = arch_aarch64.vcpu_save(&vm, 5, &run, 0, w, e);
	return r;
}

static int load(struct snapd_state_writer *w, struct err *e)
{
	struct snapd_state_reader reader;
	const void *blob;
	size_t len;
	int r;

	check(state_writer_finish(w, &blob, &len) == 0, "finish");
	check(state_reader_init(&reader, blob, len, e) == 0, "%s", e->text);
	r = arch_aarch64.host_check(&vm, NULL, &reader, e);
	if (!r)
		r = arch_aarch64.vm_load(&vm, &reader, e);
	if (!r)
		r = arch_aarch64.vcpu_load(&vm, 5, &run, 0, &reader, e);
	return r;
}

static void expect_refused(int r, int want, const struct err *e, const char *word)
{
	check(r == want, "%d instead of %d: %s", r, want, e->text);
	check(strstr(e->text, word), "no word of %s: %s", word, e->text);
}

static void test_round_trip(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	script();
	check(save(&w, &e) == 0, "%s", e.text);
	for (size_t i = 0; i < ARRAY_SIZE(regs); i++)
		if (!regs[i].no_set)
			memset(regs[i].value, 0xff, REG_BYTES);
	check(load(&w, &e) == 0, "%s", e.text);
	for (size_t i = 0; i < ARRAY_SIZE(regs); i++)
		check(regs[i].id == KVM_REG_ARM_PTIMER_CNT ||
			      (regs[i].value[0] == i + 1 && regs[i].value[1] != 1),
		      "register %zu", i);
	check(get_value(KVM_REG_ARM_PTIMER_CNT) == 1ull << 60, "the physical count");
	state_writer_deinit(&w);
}

static size_t set_at(uint64_t id)
{
	for (size_t i = 0; i < nr_set; i++)
		if (set_log[i] == id)
			return i;
	check(false, "register 0x%llx was set", (unsigned long long)id);
	return 0;
}

/* R2, R3, R4: what KVM lists first is not what has to be loaded first. */
static void test_order(void)
{
	static const uint64_t first[] = {KVM_REG_ARM_FW_REG(0), REG_ID_AA64PFR1_EL1,
					 KVM_REG_ARM64_SVE_VLS};
	static const uint64_t last[] = {KVM_REG_ARM_TIMER_CNT, KVM_REG_ARM_PTIMER_CNT};
	struct snapd_state_writer w;
	struct err e = {0};

	script();
	check(save(&w, &e) == 0, "%s", e.text);
	kvm.nr_log = 0;
	check(load(&w, &e) == 0, "%s", e.text);
	check(nr_set == ARRAY_SIZE(regs), "each register once");
	for (size_t i = 0; i < ARRAY_SIZE(first); i++)
		check(set_at(first[i]) < ARRAY_SIZE(first), "0x%llx is among the first",
		      (unsigned long long)first[i]);
	for (size_t i = 0; i < ARRAY_SIZE(last); i++)
		check(set_at(last[i]) >= nr_set - ARRAY_SIZE(last), "counts are the last");
	check(scripted_at(&kvm, KVM_SET_VCPU_EVENTS, 0) >
			      scripted_at(&kvm, KVM_SET_ONE_REG, nr_set - 1) &&
		      scripted_at(&kvm, KVM_SET_MP_STATE, 0) >
			      scripted_at(&kvm, KVM_SET_VCPU_EVENTS, 0),
	      "registers, events, power state");
	state_writer_deinit(&w);
}

/* One offset for both counters: set anew, and the counts are left alone. */
static void test_counter_offset(void)
{
	struct snapd_state_writer w;
	struct err e = {0};
	uint64_t before, after;

	script();
	set_value(KVM_REG_ARM_TIMER_CNT, 1000000);
	set_value(KVM_REG_ARM_PTIMER_CNT, 1000100);
	check(save(&w, &e) == 0, "%s", e.text);
	expect_refused(load(&w, &e), -ENOTSUP, &e, "KVM_ARM_SET_COUNTER_OFFSET");
	err_clear(&e);
	scripted_cap(&kvm, KVM_CAP_COUNTER_OFFSET, 1);
	nr_set = 0;
	before = host_count();
	check(load(&w, &e) == 0, "%s", e.text);
	after = host_count();
	check(offset_set.counter_offset + 1000000 >= before &&
		      offset_set.counter_offset + 1000000 <= after,
	      "the guest's count goes on where it was");
	check(nr_set == ARRAY_SIZE(regs) - 2, "KVM would ignore the counts");
	set_value(KVM_REG_ARM_TIMER_CNT, 6);
	state_writer_deinit(&w);
}

/* The VMM has fixed the offset, the snapshot's had not: KVM says nothing, we do. */
static void test_count_ignored(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	script();
	check(save(&w, &e) == 0, "%s", e.text);
	set_value(KVM_REG_ARM_TIMER_CNT, 1ull << 61);
	fixed_offset = true;
	expect_refused(load(&w, &e), -ENOTSUP, &e, "fixed the counters");
	set_value(KVM_REG_ARM_TIMER_CNT, 6);
	state_writer_deinit(&w);
}

/* Before Linux 6.4 the physical count cannot be set, and need not be. */
static void test_physical_count_refused(void)
{
	struct snapd_state_writer w;
	struct err e = {0};
	size_t i = reg_find(KVM_REG_ARM_PTIMER_CNT);

	script();
	check(save(&w, &e) == 0, "%s", e.text);
	set_value(KVM_REG_ARM_PTIMER_CNT, 1ull << 59);
	regs[i].no_set = true;
	check(load(&w, &e) == 0 && !e.code, "%s", e.text);
	regs[i].no_set = false;
	state_writer_deinit(&w);
}

static void test_refused_guests(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	script();
	set_value(REG_ID_AA64PFR1_EL1, 2u << 8);
	expect_refused(save(&w, &e), -ENOTSUP, &e, "MTE");
	set_value(REG_ID_AA64PFR1_EL1, 10);
	state_writer_deinit(&w);
	err_clear(&e);
	script();
	scripted_answer(&kvm, KVM_GET_REG_LIST, -EPERM, NULL, 0);
	expect_refused(save(&w, &e), -EPERM, &e, "FINALIZE");
	state_writer_deinit(&w);
}

static void test_refused_register(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	script();
	check(save(&w, &e) == 0, "%s", e.text);
	regs[4].value[0] = 99;
	expect_refused(load(&w, &e), -ENOTSUP, &e, "refuses register");
	regs[4].value[0] = 5;
	state_writer_deinit(&w);
}

static void test_vgic(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	script();
	check(save(&w, &e) == 0, "%s", e.text);
	scripted_answer(&kvm, KVM_IRQ_LINE, -EINVAL, NULL, 0);
	expect_refused(load(&w, &e), -ENOTSUP, &e, "snapd_vm_device");
	state_writer_deinit(&w);
	err_clear(&e);
	expect_refused(save(&w, &e), -ENOTSUP, &e, "snapd_vm_device");
	state_writer_deinit(&w);
}

static void test_bad_registers(void)
{
	static const struct {
		uint64_t words[3];
		size_t len_bytes;
		uint16_t version;
		int want;
	} bad[] = {
		{{0}, 4, 1, -EUCLEAN},					    /* half an id */
		{{KVM_REG_ARM64 | KVM_REG_SIZE_U128}, 16, 1, -EUCLEAN},	    /* half a value */
		{{KVM_REG_ARM64 | 0x00f0000000000000ull}, 24, 1, -EUCLEAN}, /* 32 KiB long */
		{{0}, 16, 2, -ENOTSUP},
	};

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		struct snapd_state_writer w;
		struct err e = {0};

		script();
		check(state_writer_init(&w) == 0, "memory");
		check(arch_aarch64.host_save(&vm, &w, &e) == 0, "%s", e.text);
		state_put(&w, "arm64.regs", 0, bad[i].version, bad[i].words, bad[i].len_bytes);
		expect_refused(load(&w, &e), bad[i].want, &e, "arm64.regs");
		state_writer_deinit(&w);
	}
}

int main(void)
{
	test_round_trip();
	test_order();
	test_counter_offset();
	test_count_ignored();
	test_physical_count_refused();
	test_refused_guests();
	test_refused_register();
	test_vgic();
	test_bad_registers();
	return 0;
}
