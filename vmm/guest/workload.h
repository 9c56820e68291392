/* SPDX-License-Identifier: MIT */
/*
 * workload: what a vCPU of snapvm's guest does, one write to one page a step.
 * Compiled twice: into the freestanding guest program that KVM runs natively, and
 * into host code for the simulated CPU.  The includer gives
 *
 *   WL_CPU               parameter that names the CPU (may be unused)
 *   WL_LOAD(gpa)         a u64 of guest memory
 *   WL_STORE(gpa, value) likewise
 *
 * Invariants
 *   W1  page i of the data pages belongs to vCPU i mod nr_vcpus: no two write one page.
 *   W2  everything that outlives a step lies in guest RAM, and a step depends only on
 *       what it loads: the simulated CPU can leave and replay a step anywhere.
 *   W3  unless plain: at each step's start every page's counter is table[page]; so a page or a
 *       part of the table that a snapshot, rollback or restore loses is noticed when
 *       the page is visited next.
 */
#pragma once

#include "guest.h"

#define WL_PARAM(field)	    WL_LOAD(GUEST_PARAMS_GPA + offsetof(struct guest_params, field))
#define WL_SHARED(field)    (GUEST_SHARED_GPA + offsetof(struct guest_shared, field))
#define WL_CTL(vcpu, field) (guest_ctl_gpa(vcpu) + offsetof(struct guest_ctl, field))
#define WL_BELL(bell, vcpu) WL_STORE(GUEST_MMIO_GPA + (bell), vcpu)

struct wl_page {
	uint64_t index; /* among all data pages, main block first */
	uint64_t gpa;
	uint64_t vcpu;
	uint64_t counter; /* of the write about to be done */
};

static inline void wl_fail(WL_CPU, uint64_t vcpu, enum guest_error error, uint64_t gpa,
			   uint64_t expected, uint64_t found)
{
	WL_STORE(WL_CTL(vcpu, error), error);
	WL_STORE(WL_CTL(vcpu, error_gpa), gpa);
	WL_STORE(WL_CTL(vcpu, error_expected), expected);
	WL_STORE(WL_CTL(vcpu, error_found), found);
	WL_BELL(GUEST_BELL_ERROR, vcpu);
}

/* Answer hot-unplug requests: every vCPU agrees, then vCPU 0 rings.  May this vCPU
 * use the DIMM in this step? */
static inline int wl_dimm_usable(WL_CPU, uint64_t vcpu, uint64_t nr_vcpus)
{
	uint64_t want = WL_LOAD(WL_SHARED(dimm_want));
	uint64_t on, i;

	if (WL_LOAD(WL_CTL(vcpu, dimm_seen)) != want)
		WL_STORE(WL_CTL(vcpu, dimm_seen), want);
	on = WL_LOAD(WL_SHARED(dimm_on));
	if (vcpu == 0 && on != want) {
		for (i = 0; i < nr_vcpus; i++)
			if (WL_LOAD(WL_CTL(i, dimm_seen)) != want)
				return 0;
		if (!want)
			WL_STORE(WL_SHARED(dimm_on), 0);
		WL_BELL(want ? GUEST_BELL_PLUG : GUEST_BELL_EJECT, vcpu);
		return 0;
	}
	return want && on;
}

/* Which of this vCPU's pages comes next, of `nr`. */
static inline uint64_t wl_choose(WL_CPU, uint64_t vcpu, uint64_t workload, uint64_t rng,
				 uint64_t nr)
{
	uint64_t hot, cursor;

	if (workload == GUEST_MIX)
		workload = rng >> 63 ? GUEST_HOTCOLD : rng >> 62 ? GUEST_SEQUENTIAL : GUEST_RANDOM;
	if (workload == GUEST_SEQUENTIAL) {
		cursor = WL_LOAD(WL_CTL(vcpu, cursor));
		if (cursor >= nr) {
			cursor = 0;
			WL_STORE(WL_CTL(vcpu, pass), WL_LOAD(WL_CTL(vcpu, pass)) + 1);
		}
		WL_STORE(WL_CTL(vcpu, cursor), cursor + 1);
		return cursor;
	}
	if (workload == GUEST_HOTCOLD && (rng >> 40) % 100 < WL_PARAM(hot_percent)) {
		hot = WL_PARAM(hot_pages);
		if (hot > nr)
			hot = nr;
		/* Spread over all of the memory, as hot pages are. */
		return (rng & 0xffffffff) % hot * (nr / hot);
	}
	return (rng & 0xffffffff) % nr;
}

static inline uint64_t wl_page_gpa(WL_CPU, uint64_t index, uint64_t main_pages)
{
	uint64_t area_pages, area;

	if (index >= main_pages)
		return WL_PARAM(dimm_gpa) + (index - main_pages) * GUEST_PAGE;
	area_pages = WL_PARAM(area_pages);
	area = index / area_pages;
	return WL_LOAD(WL_SHARED(area_gpa) + area * 8) + (index - area * area_pages) * GUEST_PAGE;
}

/* Is the page what the table says?  0 after a failure was reported. */
static inline int wl_verify(WL_CPU, const struct wl_page *page, uint64_t last)
{
	uint64_t gpa = page->gpa, found;

	found = WL_LOAD(gpa + GUEST_WORD_COUNTER * 8);
	if (found != last) {
		wl_fail(WL_CPU_ARG page->vcpu, last ? GUEST_ERR_COUNTER : GUEST_ERR_FRESH, gpa,
			last, found);
		return 0;
	}
	if (!last)
		return 1;
	found = WL_LOAD(gpa + GUEST_WORD_MAGIC * 8);
	if (found != GUEST_PAGE_MAGIC) {
		wl_fail(WL_CPU_ARG page->vcpu, GUEST_ERR_MAGIC, gpa, GUEST_PAGE_MAGIC, found);
		return 0;
	}
	found = WL_LOAD(gpa + GUEST_WORD_INDEX * 8);
	if (found != page->index) {
		wl_fail(WL_CPU_ARG page->vcpu, GUEST_ERR_INDEX, gpa, page->index, found);
		return 0;
	}
	found = WL_LOAD(gpa + GUEST_WORD_CHECKSUM * 8);
	if (found != guest_checksum(page->index, WL_LOAD(gpa + GUEST_WORD_VCPU * 8), last)) {
		wl_fail(WL_CPU_ARG page->vcpu, GUEST_ERR_CHECKSUM, gpa,
			guest_checksum(page->index, page->vcpu, last), found);
		return 0;
	}
	found = WL_LOAD(gpa + guest_payload_word(last) * 8);
	if (found != guest_mix(last ^ page->index)) {
		wl_fail(WL_CPU_ARG page->vcpu, GUEST_ERR_PAYLOAD, gpa,
			guest_mix(last ^ page->index), found);
		return 0;
	}
	WL_STORE(WL_CTL(page->vcpu, verified), WL_LOAD(WL_CTL(page->vcpu, verified)) + 1);
	return 1;
}

static inline void wl_stamp(WL_CPU, const struct wl_page *page)
{
	uint64_t table = GUEST_TABLE_GPA + page->index * 8;
	uint64_t last = WL_LOAD(table);

	if (!wl_verify(WL_CPU_ARG page, last))
		return;
	WL_STORE(page->gpa + guest_payload_word(page->counter) * 8,
		 guest_mix(page->counter ^ page->index));
	if (!last) {
		WL_STORE(page->gpa + GUEST_WORD_MAGIC * 8, GUEST_PAGE_MAGIC);
		WL_STORE(page->gpa + GUEST_WORD_INDEX * 8, page->index);
		WL_STORE(page->gpa + GUEST_WORD_VCPU * 8, page->vcpu);
	}
	WL_STORE(page->gpa + GUEST_WORD_COUNTER * 8, page->counter);
	WL_STORE(page->gpa + GUEST_WORD_CHECKSUM * 8,
		 guest_checksum(page->index, page->vcpu, page->counter));
	WL_STORE(table, page->counter);
}

/* The device writes a page first and its table entry after it; so the page is never
 * older than the table, and at most one write newer. */
static inline void wl_check_device(WL_CPU, uint64_t vcpu, uint64_t rng, uint64_t nr_pages)
{
	uint64_t index = rng % nr_pages;
	uint64_t table = WL_PARAM(device_table_gpa) + index * 8;
	uint64_t gpa = WL_PARAM(device_gpa) + index * GUEST_PAGE;
	uint64_t before = WL_LOAD(table);
	uint64_t seq = WL_LOAD(gpa + GUEST_DEV_SEQ * 8);
	uint64_t counter = WL_LOAD(gpa + GUEST_DEV_COUNTER * 8);
	uint64_t found = WL_LOAD(gpa + GUEST_DEV_INDEX * 8);
	uint64_t sum = WL_LOAD(gpa + GUEST_DEV_CHECKSUM * 8);
	uint64_t seq_after = WL_LOAD(gpa + GUEST_DEV_SEQ * 8);
	uint64_t after = WL_LOAD(table);

	if (seq & 1 || seq != seq_after)
		return; /* the device is at it */
	if (counter < before || counter > after + 1)
		wl_fail(WL_CPU_ARG vcpu, GUEST_ERR_DEVICE, gpa, before, counter);
	else if (counter && (found != index || sum != guest_checksum(index, ~0ull, counter)))
		wl_fail(WL_CPU_ARG vcpu, GUEST_ERR_DEVICE, gpa,
			guest_checksum(index, ~0ull, counter), sum);
	else
		WL_STORE(WL_CTL(vcpu, device_ok), WL_LOAD(WL_CTL(vcpu, device_ok)) + 1);
}

static inline void workload_step(WL_CPU, uint64_t vcpu)
{
	uint64_t nr_vcpus = WL_PARAM(nr_vcpus), main_pages = WL_PARAM(main_pages);
	uint64_t workload = WL_PARAM(workload), max_writes = WL_PARAM(max_writes);
	uint64_t rng = guest_rng_next(WL_LOAD(WL_CTL(vcpu, rng)));
	uint64_t total = main_pages, dimm_pages = WL_PARAM(dimm_pages), device_pages;
	struct wl_page page = {.vcpu = vcpu, .counter = WL_LOAD(WL_CTL(vcpu, counter)) + 1};

	if (vcpu == 0 && WL_LOAD(WL_SHARED(call)))
		WL_BELL(GUEST_BELL_CALL, vcpu);
	if (max_writes && page.counter > max_writes) {
		WL_BELL(GUEST_BELL_DONE, vcpu);
		return;
	}
	if (dimm_pages && wl_dimm_usable(WL_CPU_ARG vcpu, nr_vcpus))
		total += dimm_pages;

	page.index = wl_choose(WL_CPU_ARG vcpu, workload, guest_mix(rng),
			       (total - vcpu - 1) / nr_vcpus + 1) *
			     nr_vcpus +
		     vcpu;
	page.gpa = wl_page_gpa(WL_CPU_ARG page.index, main_pages);
	if (WL_PARAM(plain))
		WL_STORE(page.gpa + guest_payload_word(page.counter) * 8, page.counter);
	else
		wl_stamp(WL_CPU_ARG & page);

	device_pages = WL_PARAM(device_pages);
	if (device_pages && page.counter % 64 == 0)
		wl_check_device(WL_CPU_ARG vcpu, guest_mix(rng + 1), device_pages);
	WL_STORE(WL_CTL(vcpu, rng), rng);
	WL_STORE(WL_CTL(vcpu, counter), page.counter);
}
