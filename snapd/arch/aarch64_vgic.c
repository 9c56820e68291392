/* SPDX-License-Identifier: MIT */
/*
 * aarch64_vgic: GICv3 and its ITSes, as "arm64.vgic" and "arm64.its" records and
 * back.  In: the descriptors that the VMM handed over; out: records (docs/
 * format-state.md).
 *
 * A record is an array of {group, attribute, value}: KVM's own names of the
 * registers (Documentation/virt/kvm/devices/arm-vgic-v3.rst, arm-vgic-its.rst).
 * Both sides make the same *plan*, the list of registers in the order of loading,
 * from what the VM has (vCPUs' affinities, number of interrupts, priority bits);
 * a record whose names differ from this VM's plan is of another GIC, and refused.
 *
 * Order of loading; what breaks otherwise:
 *   V1  ITSes are reset first: RESTORE_TABLES adds to what there is.
 *   V2  Then LPIs are disabled (GICR_CTLR := 0): PROPBASER and PENDBASER take no
 *       write while they are enabled; and GICR_CTLR comes back after both.
 *   V3  GICD_IIDR before any other register: it selects their meaning.
 *   V4  A set-register is preceded by its clear-register, all ones: what was
 *       enabled or active and is not in the snapshot has to end.  ISPENDR needs none:
 *       from user space a write of it sets and clears.
 *   V5  Configuration before line levels and pending states, which depend on it.
 *   V6  Redistributors before ITSes; of an ITS GITS_CBASER before GITS_CREADR, which
 *       it zeroes; GITS_IIDR before the tables, whose layout it selects; the tables
 *       before GITS_CTLR, which starts it.
 * Saving: pending tables and ITS tables go to guest memory, then registers are read.
 */
#include <stdlib.h>
#include <string.h>

#include "snapd/arch/aarch64.h"
#include "snapd/util/cleanup.h"

#define RECORD_VERSION 1
#define IRQS_MAX       1024u
#define PLAN_MAX       16384u
#define SGI_BASE       0x10000u /* of a redistributor's second frame */

/* GICD_*, GICR_*: offsets of the architecture. */
#define GICD_CTLR      0x0000u
#define GICD_IIDR      0x0008u
#define GICD_STATUSR   0x0010u
#define GIC_IGROUPR    0x0080u
#define GIC_ISENABLER  0x0100u
#define GIC_ISPENDR    0x0200u
#define GIC_ISACTIVER  0x0300u
#define GIC_CLEAR      0x0080u /* from a set-register to its clear-register */
#define GIC_IPRIORITYR 0x0400u
#define GIC_ICFGR      0x0c00u
#define GICD_IROUTER   0x6000u
#define GICR_CTLR      0x0000u
#define GICR_STATUSR   0x0010u
#define GICR_WAKER     0x0014u
#define GICR_PROPBASER 0x0070u
#define GICR_PENDBASER 0x0078u
#define GITS_CTLR      0x0000u
#define GITS_IIDR      0x0004u
#define GITS_CBASER    0x0080u
#define GITS_CWRITER   0x0088u
#define GITS_CREADR    0x0090u
#define GITS_BASER     0x0100u
#define GITS_NR_BASERS 8u

#define ICC(op1, crn, crm, op2) \
	((uint64_t)(3u << 14 | (op1) << 11 | (crn) << 7 | (crm) << 3 | (op2)))
#define ICC_CTLR_EL1   ICC(0u, 12u, 12u, 4u)
#define ICC_PRIBITS(v) (((v) >> 8 & 7) + 1)

struct vgic_entry {
	uint64_t attr;
	uint32_t group;
	uint32_t reserved;
	uint64_t value;
};
static_assert(sizeof(struct vgic_entry) == 24, "disk format");

struct plan {
	struct vgic_entry *e; /* owned; `reserved` is a flag here */
	size_t nr;
	bool full; /* of memory, or beyond PLAN_MAX */
};
#define CLEAR_FIRST 1u

struct gic {
	const struct arch_vm *vm;
	int fd;		  /* of the GICv3 */
	uint32_t nr_irqs; /* SGIs, PPIs and SPIs */
	uint64_t *mpidr;  /* by vCPU, as attributes have it: bits 63..32; owned */
};

/* ---- attributes ---- */

static int attr_call(const struct arch_vm *vm, int fd, unsigned long request, uint32_t group,
		     uint64_t attr, void *value)
{
	struct kvm_device_attr a = {.group = group, .attr = attr, .addr = (uintptr_t)value};

	return arch_ioctl(vm, fd, request, &a);
}

static bool is_64bit(uint32_t group)
{
	return group == KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS || group == KVM_DEV_ARM_VGIC_GRP_ITS_REGS;
}

static int attr_get(const struct arch_vm *vm, int fd, uint32_t group, uint64_t attr, uint64_t *ret)
{
	uint64_t v64 = 0;
	uint32_t v32 = 0;
	int r = attr_call(vm, fd, KVM_GET_DEVICE_ATTR, group, attr,
			  is_64bit(group) ? (void *)&v64 : (void *)&v32);

	*ret = is_64bit(group) ? v64 : v32;
	return r;
}

static int attr_set(const struct arch_vm *vm, int fd, uint32_t group, uint64_t attr, uint64_t value)
{
	uint32_t v32 = (uint32_t)value;

	return attr_call(vm, fd, KVM_SET_DEVICE_ATTR, group, attr,
			 is_64bit(group) ? (void *)&value : (void *)&v32);
}

static int control(const struct arch_vm *vm, int fd, uint64_t what, const char *name, struct err *e)
{
	int r = attr_call(vm, fd, KVM_SET_DEVICE_ATTR, KVM_DEV_ARM_VGIC_GRP_CTRL, what, NULL);

	return r < 0 ? err_errno(e, -r, "interrupt controller: %s", name) : 0;
}

/* ---- plans ---- */

static void plan_deinit(struct plan *p)
{
	free(p->e);
}

static void add(struct plan *p, uint32_t group, uint64_t attr, uint32_t flags)
{
	struct vgic_entry *e;

	if (p->full)
		return;
	if (!(p->nr & (p->nr - 1))) { /* full exactly when the count is a power of two */
		e = p->nr < PLAN_MAX ? reallocarray(p->e, p->nr ? p->nr * 2 : 1, sizeof(*e)) : NULL;
		p->full = !e;
		if (!e)
			return;
		p->e = e;
	}
	p->e[p->nr++] = (struct vgic_entry){.group = group, .attr = attr, .reserved = flags};
}

/* Registers of 32 interrupts: `group` and `base` say whose.  V4, V5. */
static void add_bank(struct plan *p, uint32_t group, uint64_t base, uint32_t first, uint64_t level)
{
	uint64_t bit = base + first / 8;

	add(p, group, bit + GIC_IGROUPR, 0);
	for (uint32_t i = 0; i < 2; i++)
		add(p, group, base + GIC_ICFGR + first / 4 + i * 4, 0);
	for (uint32_t i = 0; i < 8; i++)
		add(p, group, base + GIC_IPRIORITYR + first + i * 4, 0);
	add(p, group, bit + GIC_ISENABLER, CLEAR_FIRST);
	add(p, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, level, 0);
	add(p, group, bit + GIC_ISPENDR, 0);
	add(p, group, bit + GIC_ISACTIVER, CLEAR_FIRST);
}

static uint64_t level_attr(uint64_t mpidr, uint32_t first)
{
	return mpidr |
	       (uint64_t)VGIC_LEVEL_INFO_LINE_LEVEL << KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT |
	       first;
}

static void add_redistributor(struct plan *p, uint64_t mpidr)
{
	static const uint16_t frame[] = {GICR_PROPBASER,     GICR_PROPBASER + 4, GICR_PENDBASER,
					 GICR_PENDBASER + 4, GICR_CTLR,		 GICR_STATUSR,
					 GICR_WAKER};

	for (size_t i = 0; i < ARRAY_SIZE(frame); i++)
		add(p, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, mpidr | frame[i], 0);
	add_bank(p, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, mpidr | SGI_BASE, 0, level_attr(mpidr, 0));
}

static void add_distributor(struct plan *p, const struct gic *g)
{
	const uint32_t group = KVM_DEV_ARM_VGIC_GRP_DIST_REGS;

	for (uint32_t irq = 32; irq < g->nr_irqs; irq += 32) {
		for (uint32_t i = irq; i < irq + 32 && i < g->nr_irqs; i++) {
			add(p, group, GICD_IROUTER + 8ull * i, 0);
			add(p, group, GICD_IROUTER + 8ull * i + 4, 0);
		}
		add_bank(p, group, 0, irq, level_attr(g->mpidr[0], irq));
	}
}

/* How many active-priority registers there are follows from the priority bits. */
static int add_cpu_interface(struct plan *p, const struct gic *g, uint64_t mpidr)
{
	static const uint64_t regs[] = {
		ICC(0u, 12u, 12u, 5u),			      /* SRE: before the others */
		ICC_CTLR_EL1,	       ICC(0u, 12u, 12u, 6u), /* IGRPEN0 */
		ICC(0u, 12u, 12u, 7u),			      /* IGRPEN1 */
		ICC(0u, 4u, 6u, 0u),			      /* PMR */
		ICC(0u, 12u, 8u, 3u),			      /* BPR0 */
		ICC(0u, 12u, 12u, 3u),			      /* BPR1 */
	};
	const uint32_t group = KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS;
	uint64_t ctlr;
	int r = attr_get(g->vm, g->fd, group, mpidr | ICC_CTLR_EL1, &ctlr);

	if (r < 0)
		return r;
	for (size_t i = 0; i < ARRAY_SIZE(regs); i++)
		add(p, group, mpidr | regs[i], 0);
	for (uint32_t n = 0; n < 1u << (ICC_PRIBITS(ctlr) > 5 ? ICC_PRIBITS(ctlr) - 5 : 0); n++) {
		add(p, group, mpidr | ICC(0u, 12u, 8u, 4u + n), 0); /* AP0Rn */
		add(p, group, mpidr | ICC(0u, 12u, 9u, n), 0);	    /* AP1Rn */
	}
	return 0;
}

static int plan_gic(const struct gic *g, struct plan *p, struct err *e)
{
	int r = 0;

	*p = (struct plan){0};
	add(p, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_IIDR, 0); /* V3 */
	add(p, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_CTLR, 0);
	add(p, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_STATUSR, 0);
	for (uint32_t i = 0; i < g->vm->nr_vcpus; i++)
		add_redistributor(p, g->mpidr[i]);
	add_distributor(p, g);
	for (uint32_t i = 0; i < g->vm->nr_vcpus && r >= 0; i++)
		r = add_cpu_interface(p, g, g->mpidr[i]);
	if (r < 0)
		return err_errno(e, -r, "interrupt controller: priority bits");
	return p->full ? err_set(e, ENOMEM, "interrupt controller: too many registers") : 0;
}

/* Without GITS_CTLR, which comes after the tables. */
static int plan_its(struct plan *p, struct err *e)
{
	static const uint16_t regs[] = {GITS_IIDR, GITS_CBASER, GITS_CREADR, GITS_CWRITER};
	const uint32_t group = KVM_DEV_ARM_VGIC_GRP_ITS_REGS;

	*p = (struct plan){0};
	for (size_t i = 0; i < ARRAY_SIZE(regs); i++)
		add(p, group, regs[i], 0);
	for (uint32_t i = 0; i < GITS_NR_BASERS; i++)
		add(p, group, GITS_BASER + 8 * i, 0);
	add(p, group, GITS_CTLR, 0);
	return p->full ? err_set(e, ENOMEM, "ITS: no memory") : 0;
}

/* ---- save ---- */

static int save_plan(const struct arch_vm *vm, int fd, const struct plan *p, const char *name,
		     uint32_t instance, struct snapd_state_writer *w, struct err *e)
{
	int r = 0;

	for (size_t i = 0; i < p->nr && r >= 0; i++) {
		r = attr_get(vm, fd, p->e[i].group, p->e[i].attr, &p->e[i].value);
		if (r < 0)
			return err_errno(e, -r, "%s: reading group %u register 0x%llx", name,
					 p->e[i].group, (unsigned long long)p->e[i].attr);
		p->e[i].reserved = 0;
	}
	r = state_put(w, name, instance, RECORD_VERSION, p->e, p->nr * sizeof(*p->e));
	return r < 0 ? err_errno(e, -r, "recording %s", name) : 0;
}

/* Where the guest has LPIs, their pending bits go to its memory. */
static int save_pending(const struct gic *g, struct err *e)
{
	if (attr_call(g->vm, g->fd, KVM_HAS_DEVICE_ATTR, KVM_DEV_ARM_VGIC_GRP_CTRL,
		      KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, NULL) < 0)
		return 0;
	return control(g->vm, g->fd, KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, "saving pending tables",
		       e);
}

static int save_gic(const struct gic *g, struct snapd_state_writer *w, struct err *e)
{
	_cleanup_(plan_deinit) struct plan p = {0};
	int r = save_pending(g, e);

	if (!r)
		r = plan_gic(g, &p, e);
	return r ? r : save_plan(g->vm, g->fd, &p, "arm64.vgic", 0, w, e);
}

static int save_its(const struct arch_vm *vm, int fd, uint32_t instance,
		    struct snapd_state_writer *w, struct err *e)
{
	_cleanup_(plan_deinit) struct plan p = {0};
	int r = control(vm, fd, KVM_DEV_ARM_ITS_SAVE_TABLES, "saving ITS tables", e);

	if (!r)
		r = plan_its(&p, e);
	return r ? r : save_plan(vm, fd, &p, "arm64.its", instance, w, e);
}

/* ---- load ---- */

/* The record's entries, which have exactly the plan's names. */
static int find_entries(const struct snapd_state_reader *reader, const char *name,
			uint32_t instance, const struct plan *p, const struct vgic_entry **ret,
			struct err *e)
{
	const struct vgic_entry *have;
	const void *data;
	uint16_t version;
	size_t len;

	if (state_get(reader, name, instance, &version, &data, &len))
		return err_set(e, ENOTSUP, "the snapshot has no %s %u, this VM does", name,
			       instance);
	if (version != RECORD_VERSION)
		return err_set(e, ENOTSUP, "record %s has version %u, this program knows %u", name,
			       version, RECORD_VERSION);
	have = data;
	for (size_t i = 0; i < p->nr; i++)
		if (len != p->nr * sizeof(*have) || have[i].group != p->e[i].group ||
		    have[i].attr != p->e[i].attr)
			return err_set(e, ENOTSUP,
				       "record %s %u is of another interrupt controller: vCPUs, "
				       "number of interrupts or priority bits differ",
				       name, instance);
	*ret = have;
	return 0;
}

/* One that KVM refuses is right all the same if it holds the value already. */
static int load_one(const struct arch_vm *vm, int fd, const struct vgic_entry *want,
		    const char *name, struct err *e)
{
	uint64_t now;
	int r = attr_set(vm, fd, want->group, want->attr, want->value);

	if (r >= 0 || (attr_get(vm, fd, want->group, want->attr, &now) >= 0 && now == want->value))
		return 0;
	return err_set(e, ENOTSUP, "%s: this host refuses group %u register 0x%llx := 0x%llx: %s",
		       name, want->group, (unsigned long long)want->attr,
		       (unsigned long long)want->value, strerror(-r));
}

static int load_plan(const struct arch_vm *vm, int fd, const struct plan *p,
		     const struct vgic_entry *have, const char *name, struct err *e)
{
	int r = 0;

	for (size_t i = 0; i < p->nr && r >= 0; i++) {
		if (p->e[i].reserved & CLEAR_FIRST)
			r = attr_set(vm, fd, have[i].group, have[i].attr + GIC_CLEAR, UINT32_MAX);
		if (r < 0)
			return err_errno(e, -r, "%s: clearing register 0x%llx", name,
					 (unsigned long long)have[i].attr);
		r = load_one(vm, fd, &have[i], name, e);
	}
	return r;
}

static int disable_lpis(const struct gic *g, struct err *e)
{
	int r = 0;

	for (uint32_t i = 0; i < g->vm->nr_vcpus && r >= 0; i++)
		r = attr_set(g->vm, g->fd, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
			     g->mpidr[i] | GICR_CTLR, 0);
	return r < 0 ? err_errno(e, -r, "interrupt controller: disabling LPIs") : 0;
}

static int load_gic(const struct gic *g, const struct snapd_state_reader *reader, struct err *e)
{
	_cleanup_(plan_deinit) struct plan p = {0};
	const struct vgic_entry *have;
	int r = plan_gic(g, &p, e);

	if (!r)
		r = find_entries(reader, "arm64.vgic", 0, &p, &have, e);
	if (!r)
		r = disable_lpis(g, e); /* V2 */
	return r ? r : load_plan(g->vm, g->fd, &p, have, "arm64.vgic", e);
}

static int load_its(const struct arch_vm *vm, int fd, uint32_t instance,
		    const struct snapd_state_reader *reader, struct err *e)
{
	_cleanup_(plan_deinit) struct plan p = {0};
	const struct vgic_entry *have;
	int r = plan_its(&p, e);

	if (!r)
		r = find_entries(reader, "arm64.its", instance, &p, &have, e);
	if (r)
		return r;
	p.nr--; /* V6: GITS_CTLR is the last */
	r = load_plan(vm, fd, &p, have, "arm64.its", e);
	if (!r)
		r = control(vm, fd, KVM_DEV_ARM_ITS_RESTORE_TABLES, "restoring ITS tables", e);
	return r ? r : load_one(vm, fd, &have[p.nr], "arm64.its", e);
}

/* ---- all of it ---- */

/*
 * Raise SPI 0: no such interrupt exists (SPIs begin at 32), so nothing happens;
 * but without an in-kernel GIC the answer is ENXIO, with one EINVAL
 * (arch/arm64/kvm/arm.c, kvm_vm_ioctl_irq_line()).
 */
static bool gic_in_kernel(const struct arch_vm *vm)
{
	struct kvm_irq_level irq = {
		.irq = KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT,
		.level = 1,
	};

	return arch_ioctl(vm, vm->vm_fd, KVM_IRQ_LINE, &irq) == -EINVAL;
}

static int find_gic(const struct arch_vm *vm)
{
	for (uint32_t i = 0; i < vm->nr_devices; i++)
		if (vm->devices[i].type == KVM_DEV_TYPE_ARM_VGIC_V3)
			return vm->devices[i].fd;
	return -1;
}

/* MPIDR_EL1's affinities, where attributes of the vCPU have them. */
static uint64_t attr_mpidr(uint64_t mpidr)
{
	return ((mpidr >> 32 & 0xff) << 24 | (mpidr & 0xffffff)) << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT;
}

static void gic_deinit(struct gic *g)
{
	free(g->mpidr);
}

static int gic_init(struct gic *g, const struct arch_vm *vm, int fd, struct err *e)
{
	uint64_t v = 0;
	int r;

	*g = (struct gic){.vm = vm, .fd = fd, .mpidr = calloc(vm->nr_vcpus + 1, sizeof(uint64_t))};
	if (!g->mpidr)
		return err_set(e, ENOMEM, "interrupt controller: no memory");
	for (uint32_t i = 0; i < vm->nr_vcpus; i++) {
		r = arm_reg_call(vm, vm->vcpu_fds[i], KVM_GET_ONE_REG, REG_MPIDR_EL1, &v);
		if (r < 0)
			return err_errno(e, -r, "vCPU %u: MPIDR_EL1", i);
		g->mpidr[i] = attr_mpidr(v);
	}
	r = attr_get(vm, fd, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &v);
	if (r < 0)
		return err_errno(e, -r, "interrupt controller: number of interrupts");
	if (v < 32 || v > IRQS_MAX)
		return err_set(e, EINVAL, "interrupt controller with %llu interrupts",
			       (unsigned long long)v);
	g->nr_irqs = (uint32_t)v;
	return 0;
}

/* 1: there is a GIC, in *g; 0: none. */
static int gic_find(struct gic *g, const struct arch_vm *vm, struct err *e)
{
	int fd = find_gic(vm), r;

	if (fd < 0 && !gic_in_kernel(vm))
		return 0;
	if (fd < 0)
		return err_set(e, ENOTSUP,
			       "this VM has an in-kernel interrupt controller: the VMM has to hand "
			       "its descriptor over with snapd_vm_device()");
	if (!vm->nr_vcpus)
		return 0;
	r = gic_init(g, vm, fd, e);
	return r < 0 ? r : 1;
}

int vgic_save(const struct arch_vm *vm, struct snapd_state_writer *w, struct err *e)
{
	_cleanup_(gic_deinit) struct gic g = {0};
	uint32_t instance = 0;
	int r = gic_find(&g, vm, e);

	if (r <= 0)
		return r;
	r = save_gic(&g, w, e);
	for (uint32_t i = 0; i < vm->nr_devices && !r; i++)
		if (vm->devices[i].type == KVM_DEV_TYPE_ARM_VGIC_ITS)
			r = save_its(vm, vm->devices[i].fd, instance++, w, e);
	return r;
}

static int reset_itses(const struct arch_vm *vm, struct err *e)
{
	int r = 0;

	for (uint32_t i = 0; i < vm->nr_devices && !r; i++)
		if (vm->devices[i].type == KVM_DEV_TYPE_ARM_VGIC_ITS)
			r = control(vm, vm->devices[i].fd, KVM_DEV_ARM_ITS_CTRL_RESET,
				    "resetting an ITS", e);
	return r;
}

static int check_none(const struct snapd_state_reader *reader, struct err *e)
{
	const void *data;
	uint16_t version;
	size_t len;

	if (!state_get(reader, "arm64.vgic", 0, &version, &data, &len))
		return err_set(
			e, ENOTSUP,
			"the snapshot has an interrupt controller, this VM none in the kernel");
	return 0;
}

int vgic_load(const struct arch_vm *vm, const struct snapd_state_reader *r, struct err *e)
{
	_cleanup_(gic_deinit) struct gic g = {0};
	uint32_t instance = 0;
	int ret = gic_find(&g, vm, e);

	if (ret <= 0)
		return ret ? ret : check_none(r, e);
	ret = reset_itses(vm, e); /* V1 */
	if (!ret)
		ret = load_gic(&g, r, e);
	for (uint32_t i = 0; i < vm->nr_devices && !ret; i++)
		if (vm->devices[i].type == KVM_DEV_TYPE_ARM_VGIC_ITS)
			ret = load_its(vm, vm->devices[i].fd, instance++, r, e);
	return ret;
}
