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
#include "snapd/arch/arch.h"

#include <linux/kvm.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "snapd/arch/x86_64.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"

#define RECORD_VERSION	   1
#define IRQCHIPS	   3 /* master PIC, slave PIC, IOAPIC */
#define LEGACY_XSAVE_BYTES 4096
#define MSRS_PER_CALL	   128 /* the kernel takes fewer than 256 */
#define FIXED_BYTES_MAX	   1024

#define MSR_IA32_TSC	       0x10
#define MSR_IA32_TSC_DEADLINE  0x6e0
#define MSR_KVM_WALL_CLOCK     0x11
#define MSR_KVM_WALL_CLOCK_NEW 0x4b564d00

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
static_assert(sizeof(struct kvm_nested_state) == 128, "record x86.nested");
static_assert(sizeof(struct kvm_msr_entry) == 16, "record x86.msrs");

/* Where a step works: the VM, or one vCPU. */
struct target {
	const struct arch_vm *vm;
	int fd;		     /* of the VM or of the vCPU */
	struct kvm_run *run; /* NULL for the VM */
	uint32_t instance;   /* vCPU index */
	char who[16];	     /* "VM" or "vCPU 3", for reasons */
};

struct step {
	const char *record;
	const char *what; /* as in KVM_GET_<what> */
	unsigned long get, set;
	uint32_t cap;	     /* offered if this capability is > 0; 0: always tried */
	uint32_t unless_cap; /* a newer call replaces it */
	size_t len_bytes;    /* fixed length; 0: has functions of its own */
	bool may_lack;	     /* a VM may be built without: ENXIO, EINVAL mean so */
	bool required;	     /* no vCPU without it, here or in a snapshot */
	int (*save)(const struct target *t, const struct step *s, struct snapd_state_writer *w,
		    struct err *e);
	int (*load)(const struct target *t, const struct step *s,
		    const struct snapd_state_reader *r, struct err *e);
};

static bool step_offered(const struct target *t, const struct step *s)
{
	if (s->unless_cap && arch_cap(t->vm, s->unless_cap) > 0)
		return false;
	return !s->cap || arch_cap(t->vm, s->cap) > 0;
}

/* Does this failure of a GET say that there is nothing to get? */
static bool is_lacking(const struct step *s, int r)
{
	return (r == -ENOTTY && !s->required) || (s->may_lack && (r == -ENXIO || r == -EINVAL));
}

static int put(const struct target *t, const struct step *s, uint32_t instance, const void *data,
	       size_t len_bytes, struct snapd_state_writer *w, struct err *e)
{
	int r = state_put(w, s->record, instance, RECORD_VERSION, data, len_bytes);

	return r ? err_errno(e, -r, "%s: recording %s", t->who, s->record) : 0;
}

static int get_failed(const struct target *t, const struct step *s, int r, struct err *e)
{
	return err_errno(e, -r, "%s: KVM_GET_%s", t->who, s->what);
}

static int set_failed(const struct target *t, const struct step *s, int r, struct err *e)
{
	return err_errno(e, -r, "%s: KVM_SET_%s", t->who, s->what);
}

static int bad_length(const struct target *t, const struct step *s, size_t len_bytes, struct err *e)
{
	return err_set(e, E_CORRUPT, "%s: record %s has a wrong length of %zu bytes", t->who,
		       s->record, len_bytes);
}

/* 1 and *data, *len_bytes when the record is there and its version known; 0: none. */
static int find(const struct target *t, const struct step *s, uint32_t instance,
		const struct snapd_state_reader *r, const void **data, size_t *len_bytes,
		struct err *e)
{
	uint16_t version;

	if (state_get(r, s->record, instance, &version, data, len_bytes))
		return 0;
	if (version != RECORD_VERSION)
		return err_set(e, ENOTSUP, "%s: record %s has version %u, this program knows %u",
			       t->who, s->record, version, RECORD_VERSION);
	return 1;
}

/* The snapshot says nothing of this device: then this VM must not have it. */
static int check_lacking(const struct target *t, const struct step *s, void *scratch, struct err *e)
{
	int r;

	if (s->required)
		return err_set(e, E_CORRUPT, "%s: the snapshot has no record %s for it", t->who,
			       s->record);
	if (!s->may_lack)
		return 0;
	r = arch_ioctl(t->vm, t->fd, s->get, scratch);
	if (r >= 0)
		return err_set(e, ENOTSUP,
			       "%s: it has an in-kernel %s, the snapshot was taken of a VM without",
			       t->who, s->what);
	return is_lacking(s, r) ? 0 : get_failed(t, s, r, e);
}

static int fixed_save(const struct target *t, const struct step *s, struct snapd_state_writer *w,
		      struct err *e)
{
	_Alignas(8) uint8_t buf[FIXED_BYTES_MAX] = {0};
	int r = arch_ioctl(t->vm, t->fd, s->get, buf);

	if (r < 0)
		return is_lacking(s, r) ? 0 : get_failed(t, s, r, e);
	return put(t, s, t->instance, buf, s->len_bytes, w, e);
}

static int fixed_load(const struct target *t, const struct step *s,
		      const struct snapd_state_reader *reader, struct err *e)
{
	_Alignas(8) uint8_t buf[FIXED_BYTES_MAX] = {0};
	const void *data;
	size_t len;
	int r = find(t, s, t->instance, reader, &data, &len, e);

	if (r < 0)
		return r;
	if (r == 0)
		return check_lacking(t, s, buf, e);
	if (len != s->len_bytes)
		return bad_length(t, s, len, e);
	memcpy(buf, data, len);
	r = arch_ioctl(t->vm, t->fd, s->set, buf);
	return r < 0 ? set_failed(t, s, r, e) : 0;
}

/* The three chips of the in-kernel interrupt controller; instance = chip. */
static int irqchip_save(const struct target *t, const struct step *s, struct snapd_state_writer *w,
			struct err *e)
{
	for (uint32_t i = 0; i < IRQCHIPS; i++) {
		struct kvm_irqchip chip = {.chip_id = i};
		int r = arch_ioctl(t->vm, t->fd, s->get, &chip);

		if (r < 0)
			return i == 0 && is_lacking(s, r) ? 0 : get_failed(t, s, r, e);
		r = put(t, s, i, &chip, sizeof(chip), w, e);
		if (r)
			return r;
	}
	return 0;
}

static int irqchip_load(const struct target *t, const struct step *s,
			const struct snapd_state_reader *reader, struct err *e)
{
	for (uint32_t i = 0; i < IRQCHIPS; i++) {
		struct kvm_irqchip chip = {.chip_id = i};
		const void *data;
		size_t len;
		int r = find(t, s, i, reader, &data, &len, e);

		if (r < 0)
			return r;
		if (r == 0 && i == 0)
			return check_lacking(t, s, &chip, e);
		if (r == 0)
			return err_set(e, E_CORRUPT, "VM: record %s: chip %u is missing", s->record,
				       i);
		if (len != sizeof(chip))
			return bad_length(t, s, len, e);
		memcpy(&chip, data, sizeof(chip));
		chip.chip_id = i;
		r = arch_ioctl(t->vm, t->fd, s->set, &chip);
		if (r < 0)
			return set_failed(t, s, r, e);
	}
	return 0;
}

/* With flags the kernel would move the clock on by the time passed since; a guest
 * that is rolled back sees the clock of the snapshot. */
static int clock_load(const struct target *t, const struct step *s,
		      const struct snapd_state_reader *reader, struct err *e)
{
	struct kvm_clock_data clock = {0}, saved;
	const void *data;
	size_t len;
	int r = find(t, s, t->instance, reader, &data, &len, e);

	if (r <= 0)
		return r;
	if (len != sizeof(saved))
		return bad_length(t, s, len, e);
	memcpy(&saved, data, sizeof(saved));
	clock.clock = saved.clock;
	r = arch_ioctl(t->vm, t->fd, s->set, &clock);
	return r < 0 ? set_failed(t, s, r, e) : 0;
}

/* A vCPU's CPUID, as KVM holds it now.  *ret is the caller's to free. */
static int cpuid_get(const struct target *t, const struct step *s, struct kvm_cpuid2 **ret,
		     struct err *e)
{
	struct kvm_cpuid2 *c =
		calloc(1, sizeof(*c) + X86_CPUID_MAX * sizeof(struct kvm_cpuid_entry2));
	int r;

	if (!c) {
		err_errno(e, ENOMEM, "%s: CPUID", t->who);
		return -ENOMEM;
	}
	c->nent = X86_CPUID_MAX;
	r = arch_ioctl(t->vm, t->fd, s->get, c);
	if (r < 0) {
		free(c);
		return r;
	}
	*ret = c;
	return 0;
}

static int cpuid_save(const struct target *t, const struct step *s, struct snapd_state_writer *w,
		      struct err *e)
{
	struct x86_cpuid_entry out[X86_CPUID_MAX];
	_cleanup_free_ struct kvm_cpuid2 *c = NULL;
	int r = cpuid_get(t, s, &c, e);

	if (r < 0)
		return is_lacking(s, r) ? 0 : get_failed(t, s, r, e);
	if (c->nent == 0)
		return 0;
	for (uint32_t i = 0; i < c->nent; i++)
		out[i] = x86_cpuid_pack(&c->entries[i]);
	return put(t, s, t->instance, out, c->nent * sizeof(out[0]), w, e);
}

static bool cpuid_equal(const struct kvm_cpuid2 *a, const struct kvm_cpuid2 *b)
{
	if (a->nent != b->nent)
		return false;
	for (uint32_t i = 0; i < a->nent; i++) {
		struct x86_cpuid_entry x = x86_cpuid_pack(&a->entries[i]);
		struct x86_cpuid_entry y = x86_cpuid_pack(&b->entries[i]);

		x86_cpuid_clear_runtime(&x);
		x86_cpuid_clear_runtime(&y);
		if (memcmp(&x, &y, sizeof(x)) != 0)
			return false;
	}
	return true;
}

static int cpuid_load(const struct target *t, const struct step *s,
		      const struct snapd_state_reader *reader, struct err *e)
{
	_cleanup_free_ struct kvm_cpuid2 *now = NULL, *want = NULL;
	const struct x86_cpuid_entry *in;
	const void *data;
	size_t len;
	int r = find(t, s, t->instance, reader, &data, &len, e);

	if (r <= 0)
		return r;
	if (len % sizeof(*in) || len / sizeof(*in) > X86_CPUID_MAX)
		return bad_length(t, s, len, e);
	r = cpuid_get(t, s, &now, e);
	if (r < 0)
		return get_failed(t, s, r, e);
	want = calloc(1, sizeof(*want) + X86_CPUID_MAX * sizeof(want->entries[0]));
	if (!want)
		return err_errno(e, ENOMEM, "%s: CPUID", t->who);
	in = data;
	want->nent = len / sizeof(*in);
	for (uint32_t i = 0; i < want->nent; i++)
		x86_cpuid_unpack(&in[i], &want->entries[i]);
	if (cpuid_equal(now, want))
		return 0;
	r = arch_ioctl(t->vm, t->fd, s->set, want);
	if (r == -EINVAL)
		return err_set(e, ENOTSUP,
			       "%s: KVM_SET_CPUID2 refused: the vCPU has run with another CPUID, "
			       "or this host cannot give the snapshot's",
			       t->who);
	return r < 0 ? set_failed(t, s, r, e) : 0;
}

static int tsc_khz_save(const struct target *t, const struct step *s, struct snapd_state_writer *w,
			struct err *e)
{
	int r = arch_ioctl(t->vm, t->fd, s->get, NULL);
	uint32_t khz = r;

	if (r < 0)
		return is_lacking(s, r) ? 0 : get_failed(t, s, r, e);
	return khz ? put(t, s, t->instance, &khz, sizeof(khz), w, e) : 0;
}

/* A host that cannot scale the TSC runs the guest all the same, its clock a
 * little off; that is the VM owner's to judge, so it only warns. */
static int tsc_khz_load(const struct target *t, const struct step *s,
			const struct snapd_state_reader *reader, struct err *e)
{
	const void *data;
	uint32_t khz;
	size_t len;
	int r = find(t, s, t->instance, reader, &data, &len, e);

	if (r <= 0)
		return r;
	if (len != sizeof(khz))
		return bad_length(t, s, len, e);
	memcpy(&khz, data, sizeof(khz));
	r = arch_ioctl(t->vm, t->fd, s->get, NULL);
	if (r == (int)khz)
		return 0;
	if (arch_ioctl_value(t->vm, t->fd, s->set, khz) < 0)
		log_warn("%s: TSC runs at %d kHz here, the snapshot's at %u, and cannot be scaled",
			 t->who, r, khz);
	return 0;
}

static size_t xsave_bytes(const struct arch_vm *vm)
{
	size_t n = arch_cap(vm, KVM_CAP_XSAVE2);

	return MAX(n, (size_t)LEGACY_XSAVE_BYTES);
}

/* KVM_GET_XSAVE copies 4096 bytes and fails where the vCPU has more. */
static int xsave_save(const struct target *t, const struct step *s, struct snapd_state_writer *w,
		      struct err *e)
{
	size_t len = xsave_bytes(t->vm);
	unsigned long get = arch_cap(t->vm, KVM_CAP_XSAVE2) > 0 ? KVM_GET_XSAVE2 : KVM_GET_XSAVE;
	_cleanup_free_ void *buf = calloc(1, len);
	int r;

	if (!buf)
		return err_errno(e, ENOMEM, "%s: XSAVE area", t->who);
	r = arch_ioctl(t->vm, t->fd, get, buf);
	if (r < 0)
		return is_lacking(s, r) ? 0 : get_failed(t, s, r, e);
	return put(t, s, t->instance, buf, len, w, e);
}

/* KVM_SET_XSAVE reads as much as this vCPU's area holds, so a shorter record is
 * extended with zeroes: components that it did not have are in their reset state. */
static int xsave_load(const struct target *t, const struct step *s,
		      const struct snapd_state_reader *reader, struct err *e)
{
	size_t room = xsave_bytes(t->vm), len;
	_cleanup_free_ void *buf = NULL;
	const void *data;
	int r = find(t, s, t->instance, reader, &data, &len, e);

	if (r <= 0)
		return r;
	if (len < LEGACY_XSAVE_BYTES)
		return bad_length(t, s, len, e);
	if (len > room)
		return err_set(e, ENOTSUP, "%s: XSAVE area of %zu bytes, this host has %zu", t->who,
			       len, room);
	buf = calloc(1, room);
	if (!buf)
		return err_errno(e, ENOMEM, "%s: XSAVE area", t->who);
	memcpy(buf, data, len);
	r = arch_ioctl(t->vm, t->fd, s->set, buf);
	return r < 0 ? set_failed(t, s, r, e) : 0;
}

/* Which MSRs this KVM would have saved.  *ret is the caller's to free. */
static int msr_list(const struct target *t, struct kvm_msr_list **ret, struct err *e)
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
static int msrs_call(const struct target *t, unsigned long request, struct kvm_msr_entry *msrs,
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

static int msrs_save(const struct target *t, const struct step *s, struct snapd_state_writer *w,
		     struct err *e)
{
	_cleanup_free_ struct kvm_msr_entry *msrs = NULL;
	_cleanup_free_ struct kvm_msr_list *list = NULL;
	_cleanup_free_ bool *refused = NULL;
	uint32_t nr = 0;
	int r = msr_list(t, &list, e);

	if (r < 0)
		return is_lacking(s, r) ? 0 : r;
	msrs = calloc(list->nmsrs + 1, sizeof(*msrs));
	refused = calloc(list->nmsrs + 1, sizeof(*refused));
	if (!msrs || !refused)
		return err_errno(e, ENOMEM, "%s: MSRs", t->who);
	for (uint32_t i = 0; i < list->nmsrs; i++)
		msrs[i].index = list->indices[i];
	r = msrs_call(t, s->get, msrs, list->nmsrs, refused);
	if (r < 0)
		return is_lacking(s, r) ? 0 : get_failed(t, s, r, e);
	for (uint32_t i = 0; i < list->nmsrs; i++)
		if (!refused[i])
			msrs[nr++] = msrs[i];
	return put(t, s, t->instance, msrs, nr * sizeof(*msrs), w, e);
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
static int msr_refused(const struct target *t, const struct kvm_msr_entry *want, struct err *e)
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

static int msrs_load(const struct target *t, const struct step *s,
		     const struct snapd_state_reader *reader, struct err *e)
{
	_cleanup_free_ struct kvm_msr_entry *msrs = NULL;
	_cleanup_free_ bool *refused = NULL;
	const void *data;
	uint32_t nr;
	size_t len;
	int r = find(t, s, t->instance, reader, &data, &len, e);

	if (r <= 0)
		return r;
	if (len % sizeof(*msrs) || len / sizeof(*msrs) > X86_MSRS_MAX)
		return bad_length(t, s, len, e);
	nr = len / sizeof(*msrs);
	msrs = calloc(nr + 1, sizeof(*msrs));
	refused = calloc(nr + 1, sizeof(*refused));
	if (!msrs || !refused)
		return err_errno(e, ENOMEM, "%s: MSRs", t->who);
	nr = msrs_in_order(data, nr, msrs);
	r = msrs_call(t, s->set, msrs, nr, refused);
	if (r < 0)
		return set_failed(t, s, r, e);
	for (uint32_t i = 0; i < nr && r == 0; i++)
		if (refused[i])
			r = msr_refused(t, &msrs[i], e);
	return r;
}

static int nested_save(const struct target *t, const struct step *s, struct snapd_state_writer *w,
		       struct err *e)
{
	size_t room = arch_cap(t->vm, s->cap);
	_cleanup_free_ struct kvm_nested_state *state = NULL;
	int r;

	if (room < sizeof(*state))
		return 0;
	state = calloc(1, room);
	if (!state)
		return err_errno(e, ENOMEM, "%s: nested state", t->who);
	state->size = room;
	r = arch_ioctl(t->vm, t->fd, s->get, state);
	if (r < 0)
		return is_lacking(s, r) ? 0 : get_failed(t, s, r, e);
	return put(t, s, t->instance, state, state->size, w, e);
}

static int nested_load(const struct target *t, const struct step *s,
		       const struct snapd_state_reader *reader, struct err *e)
{
	_cleanup_free_ struct kvm_nested_state *state = NULL;
	const void *data;
	size_t len;
	int r = find(t, s, t->instance, reader, &data, &len, e);

	if (r <= 0)
		return r;
	if (len < sizeof(*state))
		return bad_length(t, s, len, e);
	state = malloc(len);
	if (!state)
		return err_errno(e, ENOMEM, "%s: nested state", t->who);
	memcpy(state, data, len);
	if (state->size != len)
		return bad_length(t, s, len, e);
	r = arch_ioctl(t->vm, t->fd, s->set, state);
	return r < 0 ? set_failed(t, s, r, e) : 0;
}

/* Without an in-kernel LAPIC each KVM_RUN takes CR8 from the run page: what stands
 * there would undo what was just loaded. */
static int sregs_load(const struct target *t, const struct step *s,
		      const struct snapd_state_reader *reader, struct err *e)
{
	static_assert(offsetof(struct kvm_sregs, cr8) == offsetof(struct kvm_sregs2, cr8),
		      "one place for both");
	const void *data;
	uint64_t cr8;
	size_t len;
	int r = fixed_load(t, s, reader, e);

	if (r < 0 || find(t, s, t->instance, reader, &data, &len, e) <= 0)
		return r;
	memcpy(&cr8, (const uint8_t *)data + offsetof(struct kvm_sregs, cr8), sizeof(cr8));
	t->run->cr8 = cr8;
	return 0;
}

static const struct step vm_steps[] = {
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
	 .save = fixed_save,
	 .load = fixed_load},
	{.record = "x86.clock",
	 .what = "CLOCK",
	 .get = KVM_GET_CLOCK,
	 .set = KVM_SET_CLOCK,
	 .cap = KVM_CAP_ADJUST_CLOCK,
	 .len_bytes = sizeof(struct kvm_clock_data),
	 .save = fixed_save,
	 .load = clock_load},
};

static const struct step vcpu_steps[] = {
	{.record = X86_RECORD_CPUID,
	 .what = "CPUID2",
	 .get = KVM_GET_CPUID2,
	 .set = KVM_SET_CPUID2,
	 .save = cpuid_save,
	 .load = cpuid_load},
	{.record = X86_RECORD_TSC_KHZ,
	 .what = "TSC_KHZ",
	 .get = KVM_GET_TSC_KHZ,
	 .set = KVM_SET_TSC_KHZ,
	 .cap = KVM_CAP_GET_TSC_KHZ,
	 .save = tsc_khz_save,
	 .load = tsc_khz_load},
	{.record = "x86.mp_state",
	 .what = "MP_STATE",
	 .get = KVM_GET_MP_STATE,
	 .set = KVM_SET_MP_STATE,
	 .cap = KVM_CAP_MP_STATE,
	 .len_bytes = sizeof(struct kvm_mp_state),
	 .save = fixed_save,
	 .load = fixed_load},
	{.record = "x86.regs",
	 .what = "REGS",
	 .get = KVM_GET_REGS,
	 .set = KVM_SET_REGS,
	 .len_bytes = sizeof(struct kvm_regs),
	 .required = true,
	 .save = fixed_save,
	 .load = fixed_load},
	{.record = "x86.sregs2",
	 .what = "SREGS2",
	 .get = KVM_GET_SREGS2,
	 .set = KVM_SET_SREGS2,
	 .cap = KVM_CAP_SREGS2,
	 .len_bytes = sizeof(struct kvm_sregs2),
	 .save = fixed_save,
	 .load = sregs_load},
	{.record = "x86.sregs",
	 .what = "SREGS",
	 .get = KVM_GET_SREGS,
	 .set = KVM_SET_SREGS,
	 .unless_cap = KVM_CAP_SREGS2,
	 .len_bytes = sizeof(struct kvm_sregs),
	 .save = fixed_save,
	 .load = sregs_load},
	{.record = "x86.xcrs",
	 .what = "XCRS",
	 .get = KVM_GET_XCRS,
	 .set = KVM_SET_XCRS,
	 .cap = KVM_CAP_XCRS,
	 .len_bytes = sizeof(struct kvm_xcrs),
	 .save = fixed_save,
	 .load = fixed_load},
	{.record = X86_RECORD_XSAVE,
	 .what = "XSAVE",
	 .set = KVM_SET_XSAVE,
	 .cap = KVM_CAP_XSAVE,
	 .save = xsave_save,
	 .load = xsave_load},
	{.record = "x86.fpu",
	 .what = "FPU",
	 .get = KVM_GET_FPU,
	 .set = KVM_SET_FPU,
	 .unless_cap = KVM_CAP_XSAVE,
	 .len_bytes = sizeof(struct kvm_fpu),
	 .save = fixed_save,
	 .load = fixed_load},
	{.record = "x86.debugregs",
	 .what = "DEBUGREGS",
	 .get = KVM_GET_DEBUGREGS,
	 .set = KVM_SET_DEBUGREGS,
	 .cap = KVM_CAP_DEBUGREGS,
	 .len_bytes = sizeof(struct kvm_debugregs),
	 .save = fixed_save,
	 .load = fixed_load},
	{.record = "x86.lapic",
	 .what = "LAPIC",
	 .get = KVM_GET_LAPIC,
	 .set = KVM_SET_LAPIC,
	 .len_bytes = sizeof(struct kvm_lapic_state),
	 .may_lack = true,
	 .save = fixed_save,
	 .load = fixed_load},
	{.record = "x86.msrs",
	 .what = "MSRS",
	 .get = KVM_GET_MSRS,
	 .set = KVM_SET_MSRS,
	 .save = msrs_save,
	 .load = msrs_load},
	{.record = "x86.nested",
	 .what = "NESTED_STATE",
	 .get = KVM_GET_NESTED_STATE,
	 .set = KVM_SET_NESTED_STATE,
	 .cap = KVM_CAP_NESTED_STATE,
	 .save = nested_save,
	 .load = nested_load},
	{.record = "x86.events",
	 .what = "VCPU_EVENTS",
	 .get = KVM_GET_VCPU_EVENTS,
	 .set = KVM_SET_VCPU_EVENTS,
	 .cap = KVM_CAP_VCPU_EVENTS,
	 .len_bytes = sizeof(struct kvm_vcpu_events),
	 .save = fixed_save,
	 .load = fixed_load},
};

static int steps_save(const struct target *t, const struct step *steps, size_t nr,
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

static int steps_load(const struct target *t, const struct step *steps, size_t nr,
		      const struct snapd_state_reader *reader, struct err *e)
{
	for (size_t i = 0; i < nr; i++) {
		int r = steps[i].load(t, &steps[i], reader, e);

		if (r)
			return r;
	}
	return 0;
}

static void vcpu_target(struct target *t, const struct arch_vm *vm, int fd, struct kvm_run *run,
			uint32_t index)
{
	*t = (struct target){.vm = vm, .fd = fd, .run = run, .instance = index};
	snprintf(t->who, sizeof(t->who), "vCPU %u", index);
}

static int x86_vcpu_save(const struct arch_vm *vm, int vcpu_fd, struct kvm_run *run, uint32_t index,
			 struct snapd_state_writer *w, struct err *e)
{
	struct target t;
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
	struct target t;
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
	struct target t = {.vm = vm, .fd = vm->vm_fd, .who = "VM"};

	return steps_save(&t, vm_steps, ARRAY_SIZE(vm_steps), w, e);
}

static int x86_vm_load(const struct arch_vm *vm, const struct snapd_state_reader *reader,
		       struct err *e)
{
	struct target t = {.vm = vm, .fd = vm->vm_fd, .who = "VM"};

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
