/* SPDX-License-Identifier: MIT */
/*
 * aarch64 state against a scripted KVM: registers of every size come back, one
 * that KVM refuses must hold its value already, an in-kernel GIC is refused, and
 * no record is taken whose version or length lies.
 */
#include <errno.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <string.h>

#include "snapd/arch/arch.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/scripted_kvm.h"

#define REG_BYTES 256

static struct scripted_kvm kvm;
static struct kvm_run run;
static const struct arch_vm vm = {.kvm = &kvm.ops, .kvm_fd = 3, .vm_fd = 4};
static uint8_t filler[64];

static struct {
	uint64_t id;
	uint8_t value[REG_BYTES];
	bool no_set;
} regs[] = {
	{KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | 0, {1}},
	{KVM_REG_ARM64 | KVM_REG_SIZE_U32 | KVM_REG_ARM_CORE | 212, {2}},
	{KVM_REG_ARM64 | KVM_REG_SIZE_U128 | KVM_REG_ARM_CORE | 84, {3}},
	{KVM_REG_ARM64 | KVM_REG_SIZE_U2048 | KVM_REG_ARM64_SVE, {4}},
	{KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG | 7, {5}, .no_set = true},
};

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

	if (regs[i].no_set)
		return -EPERM;
	memcpy(regs[i].value, (void *)(uintptr_t)reg->addr, KVM_REG_SIZE(reg->id));
	return 0;
}

static void script(void)
{
	scripted_kvm_init(&kvm);
	scripted_cap(&kvm, KVM_CAP_MP_STATE, 1);
	scripted_cap(&kvm, KVM_CAP_VCPU_EVENTS, 1);
	scripted_answer(&kvm, KVM_RUN, -EINTR, NULL, 0);
	scripted_answer(&kvm, KVM_IRQ_LINE, -ENXIO, NULL, 0);
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
	r = arch_aarch64.host_check(&vm, &reader, e);
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
		check(regs[i].value[0] == i + 1 && regs[i].value[1] != 1, "register %zu", i);
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
	expect_refused(load(&w, &e), -ENOTSUP, &e, "vGIC");
	state_writer_deinit(&w);
	err_clear(&e);
	expect_refused(save(&w, &e), -ENOTSUP, &e, "vGIC");
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
	test_refused_register();
	test_vgic();
	test_bad_registers();
	return 0;
}
