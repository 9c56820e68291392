/* SPDX-License-Identifier: MIT */
/*
 * x86_64_host: what this host is ("host.*" records) and whether it can run the
 * guest of a snapshot.  In: KVM_GET_SUPPORTED_CPUID here and there and the saved
 * vCPU's CPUID; out: 0, or a refusal that names the first feature missing.
 * Agent's thread.
 *
 * A guest found its CPU's features at boot and has patched itself for them, so
 * each feature that a saved vCPU's CPUID shows must be one that KVM here can
 * give.  Where KVM cannot hide the CPU from its guests (without VMX or SVM, CPUID
 * is not intercepted), a vCPU shows features that KVM there never offered; those
 * the CPU itself must have here.  Bits that KVM sets itself, or that a VMM may show without KVM
 * offering them (topology, "there is a hypervisor"), are not compared.  Another TSC frequency
 * without scaling only warns: guests with kvmclock do not mind.
 */
#include "snapd/arch/x86_64.h"

#include <cpuid.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "snapd/arch/host.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"

#define RECORD_VERSION	  1
#define RECORD_HOST_CPUID "host.x86.cpuid"
#define BIT32(n)	  (1u << (n))

enum reg { EAX, EBX, ECX, EDX };
static const char *const reg_names[] = {"EAX", "EBX", "ECX", "EDX"};

/* Who the CPU is: "host.x86.cpu" version 1, for people. */
struct x86_host_cpu {
	char vendor[12];
	uint32_t family, model, stepping;
	uint32_t tsc_khz;    /* 0: unknown */
	uint32_t tsc_scaled; /* 1: KVM can scale it */
	char brand[48];
};
static_assert(sizeof(struct x86_host_cpu) == 80, "disk format");

/* Leaves whose bits are features, and those among them that do not count. */
static const struct {
	uint32_t function, index;
	enum reg reg;
	uint32_t ignore;
} feature_words[] = {
	/* MONITOR, TSC_DEADLINE, OSXSAVE, HYPERVISOR: KVM's own or the VMM's choice */
	{0x1, 0, ECX, BIT32(3) | BIT32(24) | BIT32(27) | BIT32(31)},
	{0x1, 0, EDX, BIT32(9) | BIT32(28)}, /* APIC follows APIC_BASE; HTT: topology */
	{0x7, 0, EBX, 0},
	{0x7, 0, ECX, BIT32(4)}, /* OSPKE follows CR4 */
	{0x7, 0, EDX, 0},
	{0x7, 1, EAX, 0},
	{0x7, 1, EDX, 0},
	{0x7, 2, EDX, 0},
	{0xd, 0, EAX, 0},
	{0xd, 0, EDX, 0},
	{0xd, 1, EAX, 0},
	{0x80000001, 0, ECX, BIT32(1) | BIT32(22)}, /* CMP_LEGACY, TOPOEXT: topology */
	{0x80000001, 0, EDX, BIT32(9)},		    /* APIC again, on AMD */
	{0x80000008, 0, EBX, 0},
	{0x8000000a, 0, EDX, 0},
	{0x80000021, 0, EAX, 0},
	{0x40000001, 0, EAX, 0}, /* paravirtual features of KVM */
};

static const struct {
	uint32_t function, index;
	enum reg reg;
	uint8_t bit;
	const char *name;
} feature_names[] = {
	{0x1, 0, ECX, 0, "SSE3"},
	{0x1, 0, ECX, 1, "PCLMULQDQ"},
	{0x1, 0, ECX, 5, "VMX"},
	{0x1, 0, ECX, 9, "SSSE3"},
	{0x1, 0, ECX, 12, "FMA"},
	{0x1, 0, ECX, 13, "CX16"},
	{0x1, 0, ECX, 17, "PCID"},
	{0x1, 0, ECX, 19, "SSE4.1"},
	{0x1, 0, ECX, 20, "SSE4.2"},
	{0x1, 0, ECX, 21, "x2APIC"},
	{0x1, 0, ECX, 22, "MOVBE"},
	{0x1, 0, ECX, 23, "POPCNT"},
	{0x1, 0, ECX, 25, "AES"},
	{0x1, 0, ECX, 26, "XSAVE"},
	{0x1, 0, ECX, 28, "AVX"},
	{0x1, 0, ECX, 29, "F16C"},
	{0x1, 0, ECX, 30, "RDRAND"},
	{0x1, 0, EDX, 25, "SSE"},
	{0x1, 0, EDX, 26, "SSE2"},
	{0x7, 0, EBX, 0, "FSGSBASE"},
	{0x7, 0, EBX, 3, "BMI1"},
	{0x7, 0, EBX, 4, "HLE"},
	{0x7, 0, EBX, 5, "AVX2"},
	{0x7, 0, EBX, 7, "SMEP"},
	{0x7, 0, EBX, 8, "BMI2"},
	{0x7, 0, EBX, 9, "ERMS"},
	{0x7, 0, EBX, 10, "INVPCID"},
	{0x7, 0, EBX, 11, "RTM"},
	{0x7, 0, EBX, 16, "AVX512F"},
	{0x7, 0, EBX, 17, "AVX512DQ"},
	{0x7, 0, EBX, 18, "RDSEED"},
	{0x7, 0, EBX, 19, "ADX"},
	{0x7, 0, EBX, 20, "SMAP"},
	{0x7, 0, EBX, 21, "AVX512_IFMA"},
	{0x7, 0, EBX, 23, "CLFLUSHOPT"},
	{0x7, 0, EBX, 24, "CLWB"},
	{0x7, 0, EBX, 28, "AVX512CD"},
	{0x7, 0, EBX, 29, "SHA-NI"},
	{0x7, 0, EBX, 30, "AVX512BW"},
	{0x7, 0, EBX, 31, "AVX512VL"},
	{0x7, 0, ECX, 1, "AVX512_VBMI"},
	{0x7, 0, ECX, 2, "UMIP"},
	{0x7, 0, ECX, 3, "PKU"},
	{0x7, 0, ECX, 6, "AVX512_VBMI2"},
	{0x7, 0, ECX, 7, "SHSTK"},
	{0x7, 0, ECX, 8, "GFNI"},
	{0x7, 0, ECX, 9, "VAES"},
	{0x7, 0, ECX, 10, "VPCLMULQDQ"},
	{0x7, 0, ECX, 11, "AVX512_VNNI"},
	{0x7, 0, ECX, 12, "AVX512_BITALG"},
	{0x7, 0, ECX, 14, "AVX512_VPOPCNTDQ"},
	{0x7, 0, ECX, 16, "LA57"},
	{0x7, 0, ECX, 22, "RDPID"},
	{0x7, 0, EDX, 4, "FSRM"},
	{0x7, 0, EDX, 20, "IBT"},
	{0x7, 0, EDX, 22, "AMX-BF16"},
	{0x7, 0, EDX, 23, "AVX512_FP16"},
	{0x7, 0, EDX, 24, "AMX-TILE"},
	{0x7, 0, EDX, 25, "AMX-INT8"},
	{0x7, 0, EDX, 26, "IBRS/IBPB"},
	{0x7, 0, EDX, 27, "STIBP"},
	{0x7, 0, EDX, 31, "SSBD"},
	{0x7, 1, EAX, 4, "AVX-VNNI"},
	{0x7, 1, EAX, 5, "AVX512_BF16"},
	{0xd, 1, EAX, 0, "XSAVEOPT"},
	{0xd, 1, EAX, 1, "XSAVEC"},
	{0xd, 1, EAX, 3, "XSAVES"},
	{0x80000001, 0, ECX, 2, "SVM"},
	{0x80000001, 0, ECX, 5, "LZCNT"},
	{0x80000001, 0, ECX, 6, "SSE4A"},
	{0x80000001, 0, ECX, 8, "PREFETCHW"},
	{0x80000001, 0, EDX, 11, "SYSCALL"},
	{0x80000001, 0, EDX, 20, "NX"},
	{0x80000001, 0, EDX, 26, "1 GiB pages"},
	{0x80000001, 0, EDX, 27, "RDTSCP"},
	{0x80000001, 0, EDX, 29, "long mode"},
	{0x40000001, 0, EAX, 3, "kvmclock"},
	{0x40000001, 0, EAX, 4, "KVM async page fault"},
	{0x40000001, 0, EAX, 5, "KVM steal time"},
	{0x40000001, 0, EAX, 14, "KVM async page fault interrupt"},
};

/* KVM capabilities that saving, loading and harvesting depend on. */
static const uint32_t host_caps[] = {
	KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_XSAVE2,
	KVM_CAP_SREGS2,		KVM_CAP_NESTED_STATE,		KVM_CAP_ADJUST_CLOCK,
	KVM_CAP_TSC_CONTROL,	KVM_CAP_DISABLE_QUIRKS2,	KVM_CAP_MULTI_ADDRESS_SPACE,
	KVM_CAP_IMMEDIATE_EXIT,
};

void x86_cpuid_clear_runtime(struct x86_cpuid_entry *p)
{
	if (p->function == 0x1) {
		p->ecx &= ~(BIT32(27) | BIT32(3)); /* OSXSAVE, MONITOR */
		p->edx &= ~BIT32(9);		   /* APIC */
	} else if (p->function == 0x7 && p->index == 0) {
		p->ecx &= ~BIT32(4); /* OSPKE */
	} else if (p->function == 0xd && p->index <= 1) {
		p->ebx = 0; /* size of the area for what XCR0 and XSS enable now */
	}
}

static uint32_t entry_reg(const struct x86_cpuid_entry *p, enum reg reg)
{
	const uint32_t regs[] = {p->eax, p->ebx, p->ecx, p->edx};

	return regs[reg];
}

static const struct x86_cpuid_entry *entry_find(const struct x86_cpuid_entry *entries, size_t nr,
						uint32_t function, uint32_t index)
{
	for (size_t i = 0; i < nr; i++) {
		bool indexed = entries[i].flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

		if (entries[i].function == function && (!indexed || entries[i].index == index))
			return &entries[i];
	}
	return NULL;
}

/* What KVM here can show a guest: fills entries[X86_CPUID_MAX].  A simulated KVM
 * may not know the call; then there is nothing to compare, and *nr is 0. */
static int supported_cpuid(const struct arch_vm *vm, struct x86_cpuid_entry *entries, size_t *nr,
			   struct err *e)
{
	_cleanup_free_ struct kvm_cpuid2 *c =
		calloc(1, sizeof(*c) + X86_CPUID_MAX * sizeof(c->entries[0]));
	int r;

	if (!c)
		return err_errno(e, ENOMEM, "CPUID");
	c->nent = X86_CPUID_MAX;
	r = arch_ioctl(vm, vm->kvm_fd, KVM_GET_SUPPORTED_CPUID, c);
	if (r == -ENOTTY)
		c->nent = 0;
	else if (r < 0)
		return err_errno(e, -r, "KVM_GET_SUPPORTED_CPUID");
	for (uint32_t i = 0; i < c->nent; i++)
		entries[i] = x86_cpuid_pack(&c->entries[i]);
	*nr = c->nent;
	return 0;
}

static void cpu_signature(struct x86_host_cpu *cpu, uint32_t eax)
{
	cpu->stepping = eax & 0xf;
	cpu->model = (eax >> 4) & 0xf;
	cpu->family = (eax >> 8) & 0xf;
	if (cpu->family == 0x6 || cpu->family == 0xf)
		cpu->model |= ((eax >> 16) & 0xf) << 4;
	if (cpu->family == 0xf)
		cpu->family += (eax >> 20) & 0xff;
}

/* A VM without a vCPU has no TSC to ask; the VM's default is the host's. */
static uint32_t host_tsc_khz(const struct arch_vm *vm)
{
	int r = arch_ioctl(vm, vm->vm_fd, KVM_GET_TSC_KHZ, NULL);

	return r > 0 ? r : 0;
}

static bool can_scale_tsc(const struct arch_vm *vm)
{
	return arch_cap(vm, KVM_CAP_TSC_CONTROL) > 0;
}

static void describe_cpu(const struct arch_vm *vm, struct x86_host_cpu *cpu)
{
	uint32_t a, b, c, d;

	*cpu = (struct x86_host_cpu){
		.tsc_khz = host_tsc_khz(vm),
		.tsc_scaled = can_scale_tsc(vm),
	};
	if (__get_cpuid(0, &a, &b, &c, &d)) {
		memcpy(cpu->vendor, &b, 4);
		memcpy(cpu->vendor + 4, &d, 4);
		memcpy(cpu->vendor + 8, &c, 4);
	}
	if (__get_cpuid(1, &a, &b, &c, &d))
		cpu_signature(cpu, a);
	for (uint32_t i = 0; i < 3; i++) {
		uint32_t part[4];

		if (__get_cpuid(0x80000002 + i, &part[0], &part[1], &part[2], &part[3]))
			memcpy(cpu->brand + i * sizeof(part), part, sizeof(part));
	}
}

int x86_host_save(const struct arch_vm *vm, struct snapd_state_writer *w, struct err *e)
{
	struct x86_cpuid_entry entries[X86_CPUID_MAX];
	struct x86_host_cpu cpu;
	size_t nr = 0;
	int r = host_machine_save(vm, host_caps, ARRAY_SIZE(host_caps), w, e);

	if (r)
		return r;
	r = supported_cpuid(vm, entries, &nr, e);
	if (r)
		return r;
	describe_cpu(vm, &cpu);
	r = state_put(w, "host.x86.cpu", 0, RECORD_VERSION, &cpu, sizeof(cpu));
	if (!r)
		r = state_put(w, RECORD_HOST_CPUID, 0, RECORD_VERSION, entries,
			      nr * sizeof(entries[0]));
	return r ? err_errno(e, -r, "recording the host") : 0;
}

static const char *feature_name(size_t word, int bit, char *buf, size_t size)
{
	uint32_t function = feature_words[word].function, index = feature_words[word].index;
	enum reg reg = feature_words[word].reg;

	for (size_t i = 0; i < ARRAY_SIZE(feature_names); i++)
		if (feature_names[i].function == function && feature_names[i].index == index &&
		    feature_names[i].reg == reg && feature_names[i].bit == bit)
			return feature_names[i].name;
	if (function == 0xd && index == 0)
		snprintf(buf, size, "XSAVE component %d", bit + (reg == EDX ? 32 : 0));
	else
		snprintf(buf, size, "unnamed feature");
	return buf;
}

/* A CPUID with how many entries of it are known. */
struct cpuid {
	const struct x86_cpuid_entry *entries;
	size_t nr;
};

static uint32_t cpuid_word(const struct cpuid *c, size_t word)
{
	const struct x86_cpuid_entry *p = entry_find(
		c->entries, c->nr, feature_words[word].function, feature_words[word].index);

	return p ? entry_reg(p, feature_words[word].reg) : 0;
}

static uint32_t hardware_word(size_t word)
{
	uint32_t regs[4] = {0};

	__get_cpuid_count(feature_words[word].function, feature_words[word].index, &regs[EAX],
			  &regs[EBX], &regs[ECX], &regs[EDX]);
	return regs[feature_words[word].reg];
}

static int check_word(const struct cpuid *guest, const struct cpuid *here,
		      const struct cpuid *there, size_t word, uint32_t vcpu, struct err *e)
{
	uint32_t lack, never_offered;
	char buf[32];
	int bit;

	lack = cpuid_word(guest, word) & ~feature_words[word].ignore & ~cpuid_word(here, word);
	never_offered = there->nr ? lack & ~cpuid_word(there, word) : 0;
	if (never_offered)
		lack &= ~(never_offered & hardware_word(word));
	if (!lack)
		return 0;
	bit = __builtin_ctz(lack);
	return err_set(e, ENOTSUP,
		       "vCPU %u uses %s (CPUID 0x%x.%u %s bit %d), which this host cannot give",
		       vcpu, feature_name(word, bit, buf, sizeof(buf)),
		       feature_words[word].function, feature_words[word].index,
		       reg_names[feature_words[word].reg], bit);
}

/* The CPUID in a record's payload. */
static int cpuid_of(const char *name, uint16_t version, const void *data, size_t len_bytes,
		    struct cpuid *ret, struct err *e)
{
	*ret = (struct cpuid){.entries = data, .nr = len_bytes / sizeof(*ret->entries)};
	if (version != RECORD_VERSION)
		return err_set(e, ENOTSUP, "record %s has version %u, this program knows %u", name,
			       version, RECORD_VERSION);
	if (len_bytes % sizeof(*ret->entries) || ret->nr > X86_CPUID_MAX)
		return err_set(e, E_CORRUPT, "record %s has a wrong length of %zu bytes", name,
			       len_bytes);
	return 0;
}

static int check_cpuid(const struct state_record *rec, const struct cpuid *here,
		       const struct cpuid *there, struct err *e)
{
	struct cpuid guest;
	int r = cpuid_of(rec->name, rec->version, rec + 1, rec->len_bytes, &guest, e);

	for (size_t i = 0; !r && i < ARRAY_SIZE(feature_words); i++)
		r = check_word(&guest, here, there, i, rec->instance, e);
	return r;
}

static int check_xsave(const struct arch_vm *vm, const struct state_record *rec, struct err *e)
{
	int cap = arch_cap(vm, KVM_CAP_XSAVE2);
	uint64_t room = MAX(cap, (int)sizeof(struct kvm_xsave));

	if (rec->len_bytes <= room)
		return 0;
	return err_set(e, ENOTSUP, "vCPU %u has an XSAVE area of %llu bytes, this host has %llu",
		       rec->instance, (unsigned long long)rec->len_bytes, (unsigned long long)room);
}

static void warn_tsc(const struct arch_vm *vm, const struct state_record *rec)
{
	uint32_t here = host_tsc_khz(vm), saved;

	if (rec->len_bytes != sizeof(saved) || can_scale_tsc(vm))
		return;
	memcpy(&saved, rec + 1, sizeof(saved));
	if (here && saved != here)
		log_warn("vCPU %u: its TSC ran at %u kHz, here it will at %u", rec->instance, saved,
			 here);
}

/* What KVM offered where the snapshot was taken; empty if it does not say. */
static int origin_cpuid(const struct snapd_state_reader *reader, struct cpuid *ret, struct err *e)
{
	const void *data;
	uint16_t version;
	size_t len;

	*ret = (struct cpuid){0};
	if (state_get(reader, RECORD_HOST_CPUID, 0, &version, &data, &len))
		return 0;
	return cpuid_of(RECORD_HOST_CPUID, version, data, len, ret, e);
}

/* What KVM can show a guest, as host_save() wrote it down; KVM itself without. */
static int cpuid_here(const struct arch_vm *vm, const struct snapd_state_reader *here,
		      struct x86_cpuid_entry *entries, struct cpuid *ret, struct err *e)
{
	if (here && !origin_cpuid(here, ret, e) && ret->nr)
		return 0;
	*ret = (struct cpuid){.entries = entries};
	return supported_cpuid(vm, entries, &ret->nr, e);
}

static int check_records(const struct arch_vm *vm, const struct snapd_state_reader *here_said,
			 const struct snapd_state_reader *reader, struct err *e)
{
	struct x86_cpuid_entry entries[X86_CPUID_MAX];
	const struct state_record *rec = NULL;
	struct cpuid here, there;
	int r = cpuid_here(vm, here_said, entries, &here, e);

	if (!r)
		r = origin_cpuid(reader, &there, e);
	while (!r && (rec = state_next(reader, rec))) {
		if (here.nr && strcmp(rec->name, X86_RECORD_CPUID) == 0)
			r = check_cpuid(rec, &here, &there, e);
		else if (strcmp(rec->name, X86_RECORD_XSAVE) == 0)
			r = check_xsave(vm, rec, e);
		else if (strcmp(rec->name, X86_RECORD_TSC_KHZ) == 0)
			warn_tsc(vm, rec);
	}
	return r;
}

/* KVM may offer more since `here` was written, where the VMM has asked for a feature
 * of AMX's kind: so only KVM itself refuses. */
int x86_host_check(const struct arch_vm *vm, const struct snapd_state_reader *here,
		   const struct snapd_state_reader *reader, struct err *e)
{
	int r = host_machine_check(reader, e);

	if (r)
		return r;
	if (here && check_records(vm, here, reader, e) == 0)
		return 0;
	err_clear(e);
	return check_records(vm, NULL, reader, e);
}

/* ---- shadow paging ---- */

static bool parameter_on(const char *path)
{
	_cleanup_fd_ int fd = open(path, O_RDONLY | O_CLOEXEC);
	char c;

	return fd >= 0 && read(fd, &c, 1) == 1 && (c == 'Y' || c == '1');
}

/* VMX or SVM shown to the guest: its own guests' tables are shadowed. */
static bool may_nest(const struct snapd_state_reader *r)
{
	const struct x86_cpuid_entry *vmx, *svm;
	struct cpuid c;
	const void *data;
	uint16_t version;
	size_t len;

	if (state_get(r, X86_RECORD_CPUID, 0, &version, &data, &len) ||
	    cpuid_of(X86_RECORD_CPUID, version, data, len, &c, NULL))
		return true;
	vmx = entry_find(c.entries, c.nr, 0x1, 0);
	svm = entry_find(c.entries, c.nr, 0x80000001, 0);
	return (vmx && vmx->ecx & BIT32(5)) || (svm && svm->ecx & BIT32(2));
}

/* What the module says; a KVM of another make, or one in a sandbox without sysfs, is
 * taken to shadow: the cure costs time, its absence corrupts guests. */
bool x86_shadows(const struct arch_vm *vm, const struct snapd_state_reader *r)
{
	return !(parameter_on("/sys/module/kvm_intel/parameters/ept") ||
		 parameter_on("/sys/module/kvm_amd/parameters/npt")) ||
	       (r && may_nest(r));
}
