/* SPDX-License-Identifier: MIT */
/*
 * Goal: GICv3 and ITS state goes to KVM in the order that it wants, all of it comes
 * back, and a record of another GIC is refused before anything is touched.
 *
 * Method: a scripted KVM with an attribute space of its own that logs every access;
 * the log of a load is held against a table of expectations.  It behaves as KVM where
 * order matters: PROPBASER and PENDBASER take no write while LPIs are enabled,
 * set-registers only set, GITS_CBASER zeroes GITS_CREADR, RESTORE_TABLES fails
 * when the ITS was not reset or runs.
 */
#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "snapd/arch/aarch64.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/scripted_kvm.h"

#define MPIDR	 0x80000001ull
#define MPIDR_1	 0x8100000203ull /* affinities 0x81, 0, 2, 3 */
#define ATTR(m)	 ((((m) >> 32 & 0xff) << 24 | ((m)&0xffffff)) << 32)
#define REGS_MAX 1024
#define LOG_MAX	 4096
#define RD_CTLR	 0x0000u
#define RD_PROP	 0x0070u
#define RD_PEND	 0x0078u
#define SGI(off) (0x10000u + (off))

enum op { READ, WRITE };
struct access {
	enum op op;
	uint32_t group;
	uint64_t attr, value;
};

static struct scripted_kvm kvm;
static const int vcpu_fds[] = {5, 6};
static const struct arch_device devices[] = {{KVM_DEV_TYPE_ARM_VGIC_ITS, 8},
					     {KVM_DEV_TYPE_ARM_VGIC_V3, 7}};
static struct arch_vm vm = {.kvm = &kvm.ops,
			    .kvm_fd = 3,
			    .vm_fd = 4,
			    .vcpu_fds = vcpu_fds,
			    .nr_vcpus = 2,
			    .devices = devices,
			    .nr_devices = 2};
static struct reg {
	uint32_t group;
	uint64_t attr, value;
} regs[REGS_MAX];
static size_t nr_regs;
static struct access log_[LOG_MAX];
static size_t nr_log;
static uint32_t nr_irqs;
static uint64_t pri_bits;
static bool its_clean, refuse_iidr;
static int vcpu_asked;

static struct reg *reg_of(uint32_t group, uint64_t attr)
{
	for (size_t i = 0; i < nr_regs; i++)
		if (regs[i].group == group && regs[i].attr == attr)
			return &regs[i];
	check(nr_regs < REGS_MAX, "too many registers");
	/* Something of its own in each register. */
	regs[nr_regs] = (struct reg){group, attr, (nr_regs + 1) * 0x01010101u};
	return &regs[nr_regs++];
}

static void note(enum op op, uint32_t group, uint64_t attr, uint64_t value)
{
	check(nr_log < LOG_MAX, "too many accesses");
	log_[nr_log++] = (struct access){op, group, attr, value};
}

static bool is_64bit(uint32_t group)
{
	return group == KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS || group == KVM_DEV_ARM_VGIC_GRP_ITS_REGS;
}

static int get_attr(void *opaque, void *arg)
{
	const struct kvm_device_attr *a = arg;
	uint64_t v;

	if (a->group == KVM_DEV_ARM_VGIC_GRP_NR_IRQS) {
		memcpy((void *)(uintptr_t)a->addr, &nr_irqs, 4);
		return 0;
	}
	v = reg_of(a->group, a->attr)->value;
	/* ICC_CTLR_EL1 says how many priority bits there are. */
	if (a->group == KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS && (a->attr & 0xffff) == 0xc664)
		v = (pri_bits - 1) << 8;
	memcpy((void *)(uintptr_t)a->addr, &v, is_64bit(a->group) ? 8 : 4);
	note(READ, a->group, a->attr, v);
	return 0;
}

static int control(uint64_t what)
{
	if (what == KVM_DEV_ARM_ITS_CTRL_RESET) {
		its_clean = true;
		reg_of(KVM_DEV_ARM_VGIC_GRP_ITS_REGS, 0)->value = 0;
	}
	if (what == KVM_DEV_ARM_ITS_RESTORE_TABLES)
		return its_clean && !reg_of(KVM_DEV_ARM_VGIC_GRP_ITS_REGS, 0)->value ? 0 : -EINVAL;
	return 0;
}

/* 0x100 sets, 0x180 clears what 0x100 shows; the same of 0x300. */
static bool set_or_clear(uint32_t group, uint64_t attr, uint64_t v)
{
	uint64_t off = attr & 0xffff;

	if (group != KVM_DEV_ARM_VGIC_GRP_DIST_REGS && group != KVM_DEV_ARM_VGIC_GRP_REDIST_REGS)
		return false;
	if ((off & ~0x7full) == 0x100 || (off & ~0x7full) == 0x300)
		reg_of(group, attr)->value |= v;
	else if ((off & ~0x7full) == 0x180 || (off & ~0x7full) == 0x380)
		reg_of(group, attr - 0x80)->value &= ~v;
	else
		return false;
	return true;
}

static int set_attr(void *opaque, void *arg)
{
	const struct kvm_device_attr *a = arg;
	uint64_t v = 0, rd = a->attr & ~0xffffffffull;

	if (a->group == KVM_DEV_ARM_VGIC_GRP_CTRL) {
		note(WRITE, a->group, a->attr, 0);
		return control(a->attr);
	}
	memcpy(&v, (void *)(uintptr_t)a->addr, is_64bit(a->group) ? 8 : 4);
	note(WRITE, a->group, a->attr, v);
	if (refuse_iidr && a->group == KVM_DEV_ARM_VGIC_GRP_DIST_REGS && a->attr == 8)
		return -EINVAL;
	if (a->group == KVM_DEV_ARM_VGIC_GRP_REDIST_REGS && (a->attr & 0xffffffff) >= RD_PROP &&
	    (a->attr & 0xffffffff) < RD_PEND + 8 && reg_of(a->group, rd | RD_CTLR)->value)
		return 0; /* LPIs are enabled: not taken */
	if (set_or_clear(a->group, a->attr, v))
		return 0;
	reg_of(a->group, a->attr)->value = v;
	if (a->group == KVM_DEV_ARM_VGIC_GRP_ITS_REGS && a->attr == 0x80)
		reg_of(a->group, 0x90)->value = 0;
	return 0;
}

static int get_one_reg(void *opaque, void *arg)
{
	const struct kvm_one_reg *reg = arg;
	uint64_t v = vcpu_asked++ % 2 ? MPIDR_1 : MPIDR;

	check(reg->id == REG_MPIDR_EL1, "register 0x%llx", (unsigned long long)reg->id);
	memcpy((void *)(uintptr_t)reg->addr, &v, sizeof(v));
	return 0;
}

static void script(void)
{
	scripted_kvm_init(&kvm);
	scripted_answer(&kvm, KVM_IRQ_LINE, -EINVAL, NULL, 0);
	scripted_answer(&kvm, KVM_HAS_DEVICE_ATTR, 0, NULL, 0);
	scripted_call(&kvm, KVM_GET_DEVICE_ATTR, get_attr);
	scripted_call(&kvm, KVM_SET_DEVICE_ATTR, set_attr);
	scripted_call(&kvm, KVM_GET_ONE_REG, get_one_reg);
	nr_regs = nr_log = 0;
	nr_irqs = 64;
	pri_bits = 5;
	vm.nr_vcpus = 2;
	vm.nr_devices = 2;
	its_clean = refuse_iidr = false;
	vcpu_asked = 0;
}

static int save(struct snapd_state_writer *w, struct err *e)
{
	check(state_writer_init(w) == 0, "memory");
	nr_log = 0;
	return vgic_save(&vm, w, e);
}

static int load(struct snapd_state_writer *w, struct err *e)
{
	struct snapd_state_reader reader;
	const void *blob;
	size_t len;

	check(state_writer_finish(w, &blob, &len) == 0, "finish");
	check(state_reader_init(&reader, blob, len, e) == 0, "%s", e->text);
	nr_log = kvm.nr_log = 0;
	return vgic_load(&vm, &reader, e);
}

static size_t nth(enum op op, uint32_t group, uint64_t attr, int n)
{
	for (size_t i = 0; i < nr_log; i++)
		if (log_[i].op == op && log_[i].group == group && log_[i].attr == attr && !n--)
			return i;
	check(false, "group %u register 0x%llx was %s", group, (unsigned long long)attr,
	      op == READ ? "read" : "written");
	return 0;
}

static size_t last(uint32_t group, uint64_t attr)
{
	size_t at = nth(WRITE, group, attr, 0);

	for (size_t i = at; i < nr_log; i++)
		if (log_[i].op == WRITE && log_[i].group == group && log_[i].attr == attr)
			at = i;
	return at;
}

#define CTRL   KVM_DEV_ARM_VGIC_GRP_CTRL
#define DIST   KVM_DEV_ARM_VGIC_GRP_DIST_REGS
#define REDIST KVM_DEV_ARM_VGIC_GRP_REDIST_REGS
#define ITS    KVM_DEV_ARM_VGIC_GRP_ITS_REGS
#define LEVEL  KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO
#define CPU    KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS

/* A load's order: each line before the next, both of the same block. */
static const struct expectation {
	int block;
	uint32_t group;
	uint64_t attr;
	int n; /* the n-th write of it; -1: the last */
} expectations[] = {
	{1, CTRL, KVM_DEV_ARM_ITS_CTRL_RESET, 0},
	{1, REDIST, ATTR(MPIDR) | RD_CTLR, 0}, /* := 0 */
	{1, REDIST, ATTR(MPIDR_1) | RD_CTLR, 0},
	{1, DIST, 0x8, 0}, /* GICD_IIDR */
	{1, DIST, 0x0, 0},
	{1, REDIST, ATTR(MPIDR) | RD_PROP, 0},
	{1, REDIST, ATTR(MPIDR) | (RD_PROP + 4), 0},
	{1, REDIST, ATTR(MPIDR) | RD_PEND, 0},
	{1, REDIST, ATTR(MPIDR) | (RD_PEND + 4), 0},
	{1, REDIST, ATTR(MPIDR) | RD_CTLR, 1},
	{2, REDIST, ATTR(MPIDR_1) | (RD_PEND + 4), 0},
	{2, REDIST, ATTR(MPIDR_1) | RD_CTLR, 1},
	/* A bank of interrupts: configuration, then states; clear, then set. */
	{3, REDIST, ATTR(MPIDR) | SGI(0x080), 0},
	{3, REDIST, ATTR(MPIDR) | SGI(0xc04), 0},
	{3, REDIST, ATTR(MPIDR) | SGI(0x41c), 0},
	{3, REDIST, ATTR(MPIDR) | SGI(0x180), 0},
	{3, REDIST, ATTR(MPIDR) | SGI(0x100), 0},
	{3, LEVEL, ATTR(MPIDR), 0},
	{3, REDIST, ATTR(MPIDR) | SGI(0x200), 0},
	{3, REDIST, ATTR(MPIDR) | SGI(0x380), 0},
	{3, REDIST, ATTR(MPIDR) | SGI(0x300), 0},
	{4, DIST, 0x6000 + 8 * 63 + 4, 0},
	{4, DIST, 0xc0c, 0},
	{4, DIST, 0x184, 0},
	{4, DIST, 0x104, 0},
	{4, LEVEL, ATTR(MPIDR) | 32, 0},
	{4, DIST, 0x204, 0},
	{4, DIST, 0x384, 0},
	{4, DIST, 0x304, 0},
	/* SRE first of a CPU interface */
	{5, CPU, ATTR(MPIDR) | 0xc665, 0},
	{5, CPU, ATTR(MPIDR) | 0xc664, 0},
	{5, CPU, ATTR(MPIDR) | 0xc230, 0},
	/* The ITS after all of the GIC, its control register at the end. */
	{6, REDIST, ATTR(MPIDR_1) | SGI(0x300), -1},
	{6, ITS, 0x04, 0},
	{6, ITS, 0x80, 0},
	{6, ITS, 0x90, 0},
	{6, ITS, 0x88, 0},
	{6, ITS, 0x138, 0},
	{6, CTRL, KVM_DEV_ARM_ITS_RESTORE_TABLES, 0},
	{6, ITS, 0x00, 0},
};

static void check_expectations(void)
{
	size_t before = 0;

	for (size_t i = 0; i < ARRAY_SIZE(expectations); i++) {
		const struct expectation *x = &expectations[i];
		size_t at = x->n < 0 ? last(x->group, x->attr)
				     : nth(WRITE, x->group, x->attr, x->n);

		check(!i || x->block != x[-1].block || at > before,
		      "line %zu of the table: group %u register 0x%llx comes too early", i,
		      x->group, (unsigned long long)x->attr);
		before = at;
	}
	check(log_[nth(WRITE, REDIST, ATTR(MPIDR) | RD_CTLR, 0)].value == 0, "LPIs are disabled");
	check(log_[nth(WRITE, REDIST, ATTR(MPIDR) | SGI(0x180), 0)].value == UINT32_MAX,
	      "all are disabled first");
	check(nth(WRITE, ITS, 0x00, 0) == nr_log - 1, "nothing after GITS_CTLR");
}

static void scramble(void)
{
	for (size_t i = 0; i < nr_regs; i++)
		regs[i].value ^= 0xffffffff;
}

static void test_round_trip(void)
{
	struct snapd_state_writer w;
	struct reg want[REGS_MAX];
	struct err e = {0};
	size_t n;

	script();
	check(save(&w, &e) == 0, "%s", e.text);
	check(nth(WRITE, CTRL, KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, 0) <
			      nth(READ, REDIST, ATTR(MPIDR) | RD_CTLR, 0) &&
		      nth(WRITE, CTRL, KVM_DEV_ARM_ITS_SAVE_TABLES, 0) < nth(READ, ITS, 0x80, 0),
	      "tables go to memory first");
	n = nr_regs;
	memcpy(want, regs, sizeof(want));
	scramble();
	check(load(&w, &e) == 0, "%s", e.text);
	check_expectations();
	for (size_t i = 0; i < n; i++)
		check(regs[i].value == want[i].value || (want[i].attr & 0xffff) == 0xc664,
		      "group %u register 0x%llx is 0x%llx, was 0x%llx", want[i].group,
		      (unsigned long long)want[i].attr, (unsigned long long)regs[i].value,
		      (unsigned long long)want[i].value);
	state_writer_deinit(&w);
}

/* Active-priority registers follow the priority bits. */
static void test_priority_bits(void)
{
	static const struct {
		uint64_t bits;
		size_t registers;
	} cases[] = {{5, 1}, {6, 2}, {7, 4}};

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		struct snapd_state_writer w;
		struct err e = {0};
		size_t seen = 0;

		script();
		pri_bits = cases[i].bits;
		check(save(&w, &e) == 0, "%s", e.text);
		for (size_t k = 0; k < nr_log; k++) /* AP1Rn: 3, 0, 12, 9, n */
			seen += log_[k].group == CPU &&
				(log_[k].attr & ~3ull) == (ATTR(MPIDR) | 0xc648);
		check(seen == cases[i].registers, "%zu registers for %llu bits", seen,
		      (unsigned long long)cases[i].bits);
		state_writer_deinit(&w);
	}
}

static void expect_untouched(int r, const struct err *e, const char *word)
{
	check(r == -ENOTSUP && strstr(e->text, word), "%d, no word of %s: %s", r, word, e->text);
	for (size_t i = 0; i < nr_log; i++)
		check(log_[i].op == READ || log_[i].group == CTRL, "nothing was written");
}

static void test_other_gic(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	script();
	check(save(&w, &e) == 0, "%s", e.text);
	nr_irqs = 96;
	expect_untouched(load(&w, &e), &e, "another interrupt controller");
	nr_irqs = 64;
	vm.nr_vcpus = 1;
	err_clear(&e);
	expect_untouched(load(&w, &e), &e, "another interrupt controller");
	vm.nr_vcpus = 2;
	vcpu_asked = 1; /* as many vCPUs, in another order */
	err_clear(&e);
	expect_untouched(load(&w, &e), &e, "another interrupt controller");
	vcpu_asked = 0;
	pri_bits = 7;
	err_clear(&e);
	expect_untouched(load(&w, &e), &e, "another interrupt controller");
	vm.nr_devices = 0;
	err_clear(&e);
	expect_untouched(load(&w, &e), &e, "snapd_vm_device");
	scripted_answer(&kvm, KVM_IRQ_LINE, -ENXIO, NULL, 0);
	err_clear(&e);
	expect_untouched(load(&w, &e), &e, "none in the kernel");
	state_writer_deinit(&w);
}

static void test_refused_register(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	script();
	check(save(&w, &e) == 0, "%s", e.text);
	refuse_iidr = true; /* and it is what the snapshot has */
	check(load(&w, &e) == 0, "%s", e.text);
	reg_of(DIST, 8)->value++;
	check(load(&w, &e) == -ENOTSUP && strstr(e.text, "refuses"), "%s", e.text);
	state_writer_deinit(&w);
}

static void test_no_gic(void)
{
	struct snapd_state_writer w;
	struct err e = {0};

	script();
	vm.nr_devices = 0;
	scripted_answer(&kvm, KVM_IRQ_LINE, -ENXIO, NULL, 0);
	check(save(&w, &e) == 0 && !nr_log, "nothing to save");
	check(load(&w, &e) == 0 && !nr_log, "nothing to load");
	state_writer_deinit(&w);
}

int main(void)
{
	test_round_trip();
	test_priority_bits();
	test_other_gic();
	test_refused_register();
	test_no_gic();
	return 0;
}
