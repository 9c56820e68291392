/* SPDX-License-Identifier: MIT */
/*
 * aarch64: what KVM knows of a vCPU, as "arm64.*" records and back.  In: an
 * arch_vm and vCPU descriptors; out: records (docs/format.md has their bytes).
 *
 * KVM lists a vCPU's registers itself (KVM_GET_REG_LIST): core, system, timer,
 * floating point or SVE, firmware.  Each goes into the record with its id, whose
 * size field says how long the value is, so a loader needs no table.  On load a
 * register that KVM refuses is right all the same if it holds that value already
 * (ID registers of a vCPU that ran, the SVE vector lengths after finalizing); any
 * other refusal is this host's "no": ID registers are how features are compared here.
 *
 * Order of loading (Documentation/virt/kvm/api.rst):
 *   R1  interrupt controllers (aarch64_vgic.c) and the VM's counter, then vCPUs;
 *   R2  firmware registers, SVE vector lengths and ID registers before the others,
 *       whose existence and meaning depend on them;
 *   R3  the timers' counts last, so that the guest's time stands still the longest;
 *   R4  pending SErrors and the power state after the registers.
 *
 * Time.  The guest's counters go on where they stood.  Where the VMM has fixed one
 * offset for the VM (KVM_ARM_SET_COUNTER_OFFSET, Linux 6.4) KVM ignores writes of the
 * counts without a word, so that offset is set anew.  Which of the two it was shows in
 * the snapshot: only with one offset for both are virtual and physical count equal.
 * A count that does not take is noticed (check_count()).
 *
 * The VMM has made the vCPUs as it did before the snapshot (KVM_ARM_VCPU_INIT,
 * KVM_ARM_VCPU_FINALIZE), as it has the VM and its interrupt controllers.
 *
 * Refused: guests with memory tags (MTE), which are memory that no page holds.
 */
#include "snapd/arch/aarch64.h"

#include <stdbool.h>
#include <string.h>

#include "snapd/arch/host.h"
#include "snapd/util/cleanup.h"

#define RECORD_VERSION	 1
#define REG_BYTES_MAX	 2048 /* the largest size that a register's id can express */
#define REGS_MAX	 65536
/* KVM_DIRTY_LOG_PAGE_OFFSET of arm64; its uapi headers before 6.2 say 0, no ring. */
#define RING_PAGE_OFFSET 64

static_assert(sizeof(struct kvm_vcpu_events) == 64, "record arm64.events");
static_assert(sizeof(struct kvm_mp_state) == 4, "record arm64.mp_state");

/* One register in "arm64.regs": this, then KVM_REG_SIZE(id) bytes, padded to 8. */
struct reg_entry {
	uint64_t id;
};

static const uint32_t host_caps[] = {
	KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
	KVM_CAP_VCPU_EVENTS,	KVM_CAP_ARM_VM_IPA_SIZE,
	KVM_CAP_ARM_SVE,	KVM_CAP_IMMEDIATE_EXIT,
};

static int arm_host_save(const struct arch_vm *vm, struct snapd_state_writer *w, struct err *e)
{
	return host_machine_save(vm, host_caps, ARRAY_SIZE(host_caps), w, e);
}

static int arm_host_check(const struct arch_vm *vm, const struct snapd_state_reader *here,
			  const struct snapd_state_reader *r, struct err *e)
{
	return host_machine_check(r, e);
}

static size_t value_bytes(uint64_t id)
{
	return KVM_REG_SIZE(id);
}

static size_t entry_bytes(uint64_t id)
{
	return sizeof(struct reg_entry) + ALIGN_UP(value_bytes(id), 8);
}

int arm_reg_call(const struct arch_vm *vm, int vcpu_fd, unsigned long request, uint64_t id,
		 void *value)
{
	struct kvm_one_reg reg = {.id = id, .addr = (uintptr_t)value};

	return arch_ioctl(vm, vcpu_fd, request, &reg);
}

/* *ret is the caller's to free. */
static int reg_list(const struct arch_vm *vm, int vcpu_fd, uint32_t index,
		    struct kvm_reg_list **ret, struct err *e)
{
	struct kvm_reg_list probe = {0}, *list;
	int r = arch_ioctl(vm, vcpu_fd, KVM_GET_REG_LIST, &probe);

	if (r == -EPERM)
		return err_set(e, EPERM,
			       "vCPU %u: SVE is not finalized: KVM_ARM_VCPU_FINALIZE comes first",
			       index);
	if (r < 0 && r != -E2BIG)
		return err_errno(e, -r, "vCPU %u: KVM_GET_REG_LIST", index);
	if (probe.n > REGS_MAX)
		return err_set(e, EOVERFLOW, "vCPU %u: KVM lists %llu registers", index,
			       (unsigned long long)probe.n);
	list = calloc(1, sizeof(*list) + probe.n * sizeof(list->reg[0]));
	if (!list)
		return err_errno(e, ENOMEM, "vCPU %u: register list", index);
	list->n = probe.n;
	r = arch_ioctl(vm, vcpu_fd, KVM_GET_REG_LIST, list);
	if (r < 0) {
		free(list);
		return err_errno(e, -r, "vCPU %u: KVM_GET_REG_LIST", index);
	}
	*ret = list;
	return 0;
}

static size_t regs_bytes(const struct kvm_reg_list *list)
{
	size_t n = 0;

	for (uint64_t i = 0; i < list->n; i++)
		n += entry_bytes(list->reg[i]);
	return n;
}

/* Memory tags would be lost. */
static int refuse_mte(uint64_t id, const uint8_t *value, uint32_t index, struct err *e)
{
	uint64_t pfr1;

	if (id != REG_ID_AA64PFR1_EL1)
		return 0;
	memcpy(&pfr1, value, sizeof(pfr1));
	if ((pfr1 >> 8 & 0xf) < 2)
		return 0;
	return err_set(e, ENOTSUP, "vCPU %u: the guest has memory tags (MTE), which are not saved",
		       index);
}

static int regs_save(const struct arch_vm *vm, int vcpu_fd, uint32_t index,
		     struct snapd_state_writer *w, struct err *e)
{
	_cleanup_free_ struct kvm_reg_list *list = NULL;
	_cleanup_free_ uint8_t *buf = NULL;
	size_t len, at = 0;
	int r = reg_list(vm, vcpu_fd, index, &list, e);

	if (r)
		return r;
	len = regs_bytes(list);
	buf = calloc(1, len + 1);
	if (!buf)
		return err_errno(e, ENOMEM, "vCPU %u: registers", index);
	for (uint64_t i = 0; i < list->n; i++) {
		uint64_t id = list->reg[i];

		memcpy(buf + at, &id, sizeof(id));
		r = arm_reg_call(vm, vcpu_fd, KVM_GET_ONE_REG, id, buf + at + sizeof(id));
		if (r < 0)
			return err_errno(e, -r, "vCPU %u: KVM_GET_ONE_REG 0x%llx", index,
					 (unsigned long long)id);
		r = refuse_mte(id, buf + at + sizeof(id), index, e);
		if (r)
			return r;
		at += entry_bytes(id);
	}
	r = state_put(w, "arm64.regs", index, RECORD_VERSION, buf, len);
	return r ? err_errno(e, -r, "vCPU %u: recording arm64.regs", index) : 0;
}

static int reg_load(const struct arch_vm *vm, int vcpu_fd, uint32_t index, uint64_t id,
		    const uint8_t *saved, struct err *e)
{
	_Alignas(8) uint8_t value[REG_BYTES_MAX] = {0}, now[REG_BYTES_MAX] = {0};
	int r;

	memcpy(value, saved, value_bytes(id));
	r = arm_reg_call(vm, vcpu_fd, KVM_SET_ONE_REG, id, value);
	if (r >= 0)
		return 0;
	if (arm_reg_call(vm, vcpu_fd, KVM_GET_ONE_REG, id, now) >= 0 &&
	    memcmp(now, value, value_bytes(id)) == 0)
		return 0;
	return err_set(e, ENOTSUP, "vCPU %u: this host refuses register 0x%llx of the snapshot: %s",
		       index, (unsigned long long)id, strerror(-r));
}

/* 1 and *data, *len_bytes when there is such a record of a known version; 0: none. */
static int find(const struct snapd_state_reader *reader, const char *name, uint32_t index,
		const void **data, size_t *len_bytes, struct err *e)
{
	uint16_t version;

	if (state_get(reader, name, index, &version, data, len_bytes))
		return 0;
	if (version != RECORD_VERSION)
		return err_set(e, ENOTSUP,
			       "vCPU %u: record %s has version %u, this program knows %u", index,
			       name, version, RECORD_VERSION);
	return 1;
}

/* ---- walking a record of registers ---- */

struct regs {
	const uint8_t *p;
	size_t len;
};

/* The next register: 1 with its id and value, 0 at the end, or -E_CORRUPT. */
static int regs_next(struct regs *it, uint64_t *id, const uint8_t **value)
{
	if (!it->len)
		return 0;
	if (it->len < sizeof(*id))
		return -E_CORRUPT;
	memcpy(id, it->p, sizeof(*id));
	if (value_bytes(*id) > REG_BYTES_MAX || entry_bytes(*id) > it->len)
		return -E_CORRUPT;
	*value = it->p + sizeof(*id);
	it->p += entry_bytes(*id);
	it->len -= entry_bytes(*id);
	return 1;
}

static int regs_find(const struct snapd_state_reader *reader, uint32_t index, struct regs *ret,
		     struct err *e)
{
	const void *data;
	size_t len;
	int r = find(reader, "arm64.regs", index, &data, &len, e);

	if (r == 0)
		return err_set(e, E_CORRUPT, "vCPU %u: the snapshot has no registers for it",
			       index);
	if (r > 0)
		*ret = (struct regs){data, len};
	return r < 0 ? r : 0;
}

/* A 64-bit register of the record; false: not there. */
static bool regs_get(struct regs it, uint64_t id, uint64_t *ret)
{
	const uint8_t *value;
	uint64_t at;

	while (regs_next(&it, &at, &value) > 0)
		if (at == id) {
			memcpy(ret, value, sizeof(*ret));
			return true;
		}
	return false;
}

/* ---- the guest's time ---- */

#define COUNT_NEAR_HZ_SHIFT 4  /* counts within 1/16 s are the same one, read twice */
#define COUNT_AGE_MAX_S	    60 /* of a count that was just written */

static uint64_t host_count(void)
{
	uint64_t v;

	__asm__ volatile("isb; mrs %0, cntvct_el0" : "=r"(v)::"memory");
	return v;
}

static uint64_t host_frequency(void)
{
	uint64_t v;

	__asm__("mrs %0, cntfrq_el0" : "=r"(v));
	return v;
}

/* Had the VM one offset for both counters?  *count: what they were. */
static bool one_offset(struct regs regs, uint64_t *count)
{
	uint64_t physical;

	if (!regs_get(regs, KVM_REG_ARM_TIMER_CNT, count) ||
	    !regs_get(regs, KVM_REG_ARM_PTIMER_CNT, &physical))
		return false;
	return (physical > *count ? physical - *count : *count - physical) < host_frequency() >>
	       COUNT_NEAR_HZ_SHIFT;
}

static int offset_load(const struct arch_vm *vm, const struct snapd_state_reader *reader,
		       struct err *e)
{
	struct kvm_arm_counter_offset off = {0};
	struct regs regs;
	uint64_t count;
	int r = regs_find(reader, 0, &regs, e);

	if (r || !one_offset(regs, &count))
		return r;
	if (arch_cap(vm, KVM_CAP_COUNTER_OFFSET) <= 0)
		return err_set(e, ENOTSUP,
			       "the snapshot's VM had one offset for its counters "
			       "(KVM_ARM_SET_COUNTER_OFFSET), which this host lacks");
	off.counter_offset = host_count() - count;
	r = arch_ioctl(vm, vm->vm_fd, KVM_ARM_SET_COUNTER_OFFSET, &off);
	return r < 0 ? err_errno(e, -r, "KVM_ARM_SET_COUNTER_OFFSET") : 0;
}

/* Does the virtual count go on from there? */
static int check_count(const struct arch_vm *vm, int vcpu_fd, uint32_t index, uint64_t count,
		       struct err *e)
{
	uint64_t now = 0;
	int r = arm_reg_call(vm, vcpu_fd, KVM_GET_ONE_REG, KVM_REG_ARM_TIMER_CNT, &now);

	if (r < 0)
		return err_errno(e, -r, "vCPU %u: the virtual count", index);
	if (now - count < host_frequency() * COUNT_AGE_MAX_S)
		return 0;
	return err_set(e, ENOTSUP,
		       "vCPU %u: its virtual count stays %llu instead of %llu: this VMM has fixed "
		       "the counters' offset, the snapshot's had not",
		       index, (unsigned long long)now, (unsigned long long)count);
}

/* ---- registers in ---- */

enum reg_rank { RANK_FIRST, RANK_PLAIN, RANK_COUNT, NR_RANKS };

static bool is_id_register(uint64_t id)
{
	/* op0 3, op1 0, CRn 0 */
	return (id & KVM_REG_ARM_COPROC_MASK) == KVM_REG_ARM64_SYSREG &&
	       (id & (KVM_REG_ARM64_SYSREG_OP0_MASK | KVM_REG_ARM64_SYSREG_OP1_MASK |
		      KVM_REG_ARM64_SYSREG_CRN_MASK)) == 3ull << KVM_REG_ARM64_SYSREG_OP0_SHIFT;
}

/* R2, R3 */
static enum reg_rank reg_rank(uint64_t id)
{
	uint64_t kind = id & KVM_REG_ARM_COPROC_MASK;

	if (kind == KVM_REG_ARM_FW || kind == KVM_REG_ARM_FW_FEAT_BMAP ||
	    id == KVM_REG_ARM64_SVE_VLS || is_id_register(id))
		return RANK_FIRST;
	if (id == KVM_REG_ARM_TIMER_CNT || id == KVM_REG_ARM_PTIMER_CNT)
		return RANK_COUNT;
	return RANK_PLAIN;
}

/* Registers of one rank; of the physical count, whatever KVM (before 6.4) says. */
static int rank_load(const struct arch_vm *vm, int vcpu_fd, uint32_t index, struct regs it,
		     enum reg_rank rank, struct err *e)
{
	const uint8_t *value;
	uint64_t id;
	int r;

	while ((r = regs_next(&it, &id, &value)) > 0) {
		if (reg_rank(id) != rank)
			continue;
		r = reg_load(vm, vcpu_fd, index, id, value, e);
		if (r && id == KVM_REG_ARM_PTIMER_CNT)
			err_clear(e);
		else if (r)
			return r;
	}
	return r < 0 ? err_set(e, E_CORRUPT, "vCPU %u: record arm64.regs is cut off", index) : 0;
}

static int regs_load(const struct arch_vm *vm, int vcpu_fd, uint32_t index,
		     const struct snapd_state_reader *reader, struct err *e)
{
	struct regs regs;
	uint64_t count;
	int r = regs_find(reader, index, &regs, e);

	if (!r)
		r = rank_load(vm, vcpu_fd, index, regs, RANK_FIRST, e);
	if (!r)
		r = rank_load(vm, vcpu_fd, index, regs, RANK_PLAIN, e);
	if (r || one_offset(regs, &count))
		return r;
	r = rank_load(vm, vcpu_fd, index, regs, RANK_COUNT, e);
	if (!r && regs_get(regs, KVM_REG_ARM_TIMER_CNT, &count))
		r = check_count(vm, vcpu_fd, index, count, e);
	return r;
}

static int fixed_save(const struct arch_vm *vm, int vcpu_fd, uint32_t index, const char *name,
		      unsigned long get, size_t len_bytes, struct snapd_state_writer *w,
		      struct err *e)
{
	_Alignas(8) uint8_t buf[64] = {0};
	int r;

	assert(len_bytes <= sizeof(buf));
	r = arch_ioctl(vm, vcpu_fd, get, buf);
	if (r < 0)
		return err_errno(e, -r, "vCPU %u: getting %s", index, name);
	r = state_put(w, name, index, RECORD_VERSION, buf, len_bytes);
	return r ? err_errno(e, -r, "vCPU %u: recording %s", index, name) : 0;
}

static int fixed_load(const struct arch_vm *vm, int vcpu_fd, uint32_t index, const char *name,
		      unsigned long set, size_t len_bytes, const struct snapd_state_reader *reader,
		      struct err *e)
{
	_Alignas(8) uint8_t buf[64] = {0};
	const void *data;
	size_t len;
	int r = find(reader, name, index, &data, &len, e);

	if (r <= 0)
		return r;
	if (len != len_bytes || len > sizeof(buf))
		return err_set(e, E_CORRUPT, "vCPU %u: record %s has a wrong length of %zu bytes",
			       index, name, len);
	memcpy(buf, data, len);
	r = arch_ioctl(vm, vcpu_fd, set, buf);
	return r < 0 ? err_errno(e, -r, "vCPU %u: setting %s", index, name) : 0;
}

/* ---- the VM ---- */

static int arm_vm_save(const struct arch_vm *vm, struct snapd_state_writer *w, struct err *e)
{
	return vgic_save(vm, w, e);
}

static int arm_vm_load(const struct arch_vm *vm, const struct snapd_state_reader *r, struct err *e)
{
	int ret = vgic_load(vm, r, e);

	return ret ? ret : offset_load(vm, r, e);
}

/* ---- vCPUs ---- */

static int arm_vcpu_save(const struct arch_vm *vm, int vcpu_fd, struct kvm_run *run, uint32_t index,
			 struct snapd_state_writer *w, struct err *e)
{
	int r = arch_complete_pending(vm, vcpu_fd, run, index, e);

	if (!r && arch_cap(vm, KVM_CAP_MP_STATE) > 0)
		r = fixed_save(vm, vcpu_fd, index, "arm64.mp_state", KVM_GET_MP_STATE,
			       sizeof(struct kvm_mp_state), w, e);
	if (!r)
		r = regs_save(vm, vcpu_fd, index, w, e);
	if (!r && arch_cap(vm, KVM_CAP_VCPU_EVENTS) > 0)
		r = fixed_save(vm, vcpu_fd, index, "arm64.events", KVM_GET_VCPU_EVENTS,
			       sizeof(struct kvm_vcpu_events), w, e);
	return r;
}

static int arm_vcpu_load(const struct arch_vm *vm, int vcpu_fd, struct kvm_run *run, uint32_t index,
			 const struct snapd_state_reader *reader, struct err *e)
{
	int r = arch_discard_pending(vm, vcpu_fd, run, index, e);

	if (!r)
		r = regs_load(vm, vcpu_fd, index, reader, e);
	if (!r) /* R4 */
		r = fixed_load(vm, vcpu_fd, index, "arm64.events", KVM_SET_VCPU_EVENTS,
			       sizeof(struct kvm_vcpu_events), reader, e);
	if (!r)
		r = fixed_load(vm, vcpu_fd, index, "arm64.mp_state", KVM_SET_MP_STATE,
			       sizeof(struct kvm_mp_state), reader, e);
	return r;
}

/* Registers one by one: the counters of the timers run on. */
static bool same_regs(const uint8_t *a, const uint8_t *b, size_t len)
{
	size_t at = 0;
	uint64_t id;

	while (at + sizeof(id) <= len) {
		memcpy(&id, a + at, sizeof(id));
		if (entry_bytes(id) > len - at || memcmp(a + at, b + at, sizeof(id)))
			return false;
		if (id != KVM_REG_ARM_TIMER_CNT && id != KVM_REG_ARM_PTIMER_CNT &&
		    memcmp(a + at, b + at, entry_bytes(id)))
			return false;
		at += entry_bytes(id);
	}
	return at == len;
}

static bool arm_same(const char *name, const void *a, const void *b, size_t len)
{
	return strcmp(name, "arm64.regs") ? !memcmp(a, b, len) : same_regs(a, b, len);
}

/* Stage 2 is walked beside the guest's own tables; this code saves no nested state. */
static bool arm_shadows(const struct arch_vm *vm, const struct snapd_state_reader *r)
{
	return false;
}

static const uint32_t devices[] = {KVM_DEV_TYPE_ARM_VGIC_V3, KVM_DEV_TYPE_ARM_VGIC_ITS};

const struct arch_ops arch_aarch64 = {
	.name = "aarch64",
	.address_spaces = 1,
	.ring_page_offset = RING_PAGE_OFFSET,
	.devices = devices,
	.nr_devices = ARRAY_SIZE(devices),
	.host_save = arm_host_save,
	.host_check = arm_host_check,
	.vm_save = arm_vm_save,
	.vm_load = arm_vm_load,
	.vcpu_save = arm_vcpu_save,
	.vcpu_load = arm_vcpu_load,
	.shadows = arm_shadows,
	.same = arm_same,
};
