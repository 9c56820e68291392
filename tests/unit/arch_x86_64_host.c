/* SPDX-License-Identifier: MIT */
/*
 * x86_64 state on another host: CPUID, MSRs and the TSC that it cannot give are refused or
 * tolerated as they have to be, and a host is checked before anything is loaded.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "snapd/arch/x86_64.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/x86_kvm.h"

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
	x86_kvm_init();
	test_cpuid();
	test_msrs();
	test_tsc_khz();
	test_host_features();
	test_host_machine();
	x86_kvm_deinit();
	return 0;
}
