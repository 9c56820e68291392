/* SPDX-License-Identifier: MIT */
/*
 * Goal: a write that nobody was told of is found by a self-check, told with its
 * place, and healed, whatever the page was before and however the service came to
 * know what it should be; and nothing else is ever told.
 *
 * Method: an agent writes some pages without marking them.  A snapshot without the
 * check has them wrong (so the test sees a loss at all), one with the check is
 * byte for byte what memory was.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "snapd/vm/priv.h"
#include "tests/lib/check.h"
#include "tests/lib/fake_agent.h"
#include "tests/lib/rand.h"
#include "tests/lib/service.h"

#define PAGES0 2000u
#define PAGES1 300u

static struct service service;
static struct fake_agent agent;

static int64_t found(const char *key)
{
	return json_integer_value(
		json_object_get(json_object_get(service_json(), "self_check"), key));
}

static const json_t *found_page(size_t i)
{
	return json_array_get(
		json_object_get(json_object_get(service_json(), "self_check"), "pages"), i);
}

static int64_t page_says(size_t i, const char *key)
{
	return json_integer_value(json_object_get(found_page(i), key));
}

static uint64_t plain(void)
{
	struct err e = {};
	uint64_t id;

	check(!service_snapshot(&service, &agent, NULL, &id, &e), "%s", e.text);
	return id;
}

static uint64_t checked(int64_t missed)
{
	struct err e = {};
	uint64_t id;

	check(!service_snapshot_checked(&service, &agent, &id, &e), "%s", e.text);
	check(found("missed") == missed, "%lld missed, not %lld", (long long)found("missed"),
	      (long long)missed);
	service_compare(&service, &agent, id, agent.truth);
	return id;
}

/* Zero, written, unique, shared; in both blocks; value % 8 == 0 makes a zero page. */
static void write_some(uint64_t seed)
{
	for (uint64_t p = 0; p < PAGES0; p += 3)
		fa_write(&agent, 0, p, seed * 8 + p);
	for (uint64_t p = 0; p < PAGES1; p += 2)
		fa_write(&agent, 1, p, seed * 16 + p);
}

static void test_nothing_missed(void)
{
	write_some(1);
	checked(0); /* early copies are compared, too */
	check(found("checked") == PAGES0 + PAGES1, "all compared: %lld",
	      (long long)found("checked"));
	for (uint64_t p = 0; p < 40; p++)
		fa_write(&agent, 0, p, p);
	checked(0);
	check(found("checked") == PAGES0 + PAGES1 - 40, "but for what is dirty: %lld",
	      (long long)found("checked"));
	write_some(2);
	checked(0);
	check(!service_self_check(&service, &agent, NULL), "as a job of its own");
	check(found("missed") == 0 && found("checked") == PAGES0 + PAGES1, "all compared");
}

/* Each kind of page into each other kind. */
static void test_missed(void)
{
	static const struct {
		int block;
		uint64_t page, value;
	} lost[] = {
		{0, 0, 11}, /* data → other data */
		{0, 1, 13}, /* never written → data */
		{0, 6, 16}, /* data → zeros */
		{0, PAGES0 - 1, 9}, {1, 0, 27}, {1, PAGES1 - 1, 29},
	};
	struct store_snapshot snap;
	struct err e = {};
	uint64_t id;

	plain();
	for (size_t i = 0; i < ARRAY_SIZE(lost); i++)
		fa_write_unmarked(&agent, lost[i].block, lost[i].page, lost[i].value);
	plain();
	check(service_result("pages") == 0, "the loss is not seen without the check");
	id = checked(ARRAY_SIZE(lost));
	check(!store_snapshot_get(service.d.store, id, &snap, &e), "%s", e.text);
	for (size_t i = 0; i < ARRAY_SIZE(lost); i++) {
		size_t k = 0;
		int64_t gpa = (int64_t)(FA_GPA(&agent, lost[i].block) + lost[i].page * FA_PAGE);

		while (found_page(k) && page_says(k, "gpa") != gpa)
			k++;
		check(found_page(k), "GPA 0x%llx is told", (long long)gpa);
		check(page_says(k, "slot") == 7 + lost[i].block &&
			      page_says(k, "generation") == 100 + lost[i].block,
		      "slot and generation");
		check(page_says(k, "epoch") == (int64_t)snap.point.epoch, "epoch");
	}
	checked(0); /* healed */
}

static void test_metric(void)
{
	struct vm *vm = vm_find(&service.d, agent.hello.name, getuid());
	json_t *o = vm_describe(vm);
	int64_t missed = json_integer_value(json_object_get(o, "missed_pages"));

	check(missed == 6, "%lld pages missed in all", (long long)missed);
	check(json_integer_value(json_object_get(o, "self_checks")) > 0, "checks");
	json_decref(o);
	vm_unref(vm);
}

/* Early copies have to be what memory is at the pause, too. */
static void test_missed_after_early_copy(void)
{
	for (uint64_t p = 0; p < 500; p++)
		fa_write(&agent, 0, p, 1000 + p * 8 + 3);
	agent.lose_at = SNAPD_MSG_PAUSE; /* a page of block 0, written and not marked */
	checked(1);
	checked(0);
}

/* Identities unknown: after a restart of the service, and after a rollback. */
static void test_unknown_identities(void)
{
	struct err e = {};
	uint64_t id = plain();

	fa_disconnect(&agent);
	service_restart(&service);
	check(service_attach(&service, &agent), "attach");
	fa_write_unmarked(&agent, 0, 77, 123);
	checked(1);
	fa_write(&agent, 0, 78, 124);
	check(!service_rollback(&service, &agent, id, &e), "%s", e.text);
	fa_write_unmarked(&agent, 0, 90, 125);
	fa_write_unmarked(&agent, 1, 3, 126);
	checked(2);
}

/* The epoch that found them is lost: they are dirty then, and in the next one. */
static void test_failed_epoch(void)
{
	struct err e = {};
	uint64_t id;

	fa_write_unmarked(&agent, 0, 5, 555);
	fa_write_unmarked(&agent, 1, 5, 555);
	agent.fail_at = SNAPD_MSG_RESUME;
	check(service_snapshot_checked(&service, &agent, &id, &e), "fails");
	fa_disconnect(&agent);
	check(service_attach(&service, &agent), "attach");
	id = plain();
	service_compare(&service, &agent, id, agent.truth);
}

/* Holes of the file stay holes. */
static void test_holes(void)
{
	struct stat before, after;

	check(!fallocate(agent.ram_fd[0], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			 1200 * FA_PAGE, 400 * FA_PAGE) &&
		      !fstat(agent.ram_fd[0], &before),
	      "punch");
	agent.no_truth = true; /* its own look would fill them */
	check(!service_self_check(&service, &agent, NULL), "check");
	agent.no_truth = false;
	check(found("missed") > 100, "an unreported discard is a loss: %lld",
	      (long long)found("missed"));
	/* What was missed was copied, and with that allocated; what was zero before was not. */
	check(!fstat(agent.ram_fd[0], &after), "stat");
	check(after.st_blocks - before.st_blocks <= found("missed") * (FA_PAGE / 512),
	      "zero pages stay holes");
	checked(0);
}

/* More than the time allows: the next check goes on, and all is seen in the end. */
static void test_bounded(void)
{
	int64_t missed = 0;
	int rounds = 0;

	service.d.config.self_check_max_ms = 0;
	fa_write_unmarked(&agent, 1, 100, 31);
	check(!service_self_check(&service, &agent, NULL), "check");
	check(found("checked") == 0 && found("missed") == 0, "no time");
	check(json_is_false(
		      json_object_get(json_object_get(service_json(), "self_check"), "complete")),
	      "and says so");
	service.d.config.self_check_max_ms = 5000;
	for (; !missed && rounds < 3; rounds++) {
		check(!service_self_check(&service, &agent, NULL), "check");
		missed += found("missed");
	}
	check(missed == 1, "seen in the end");
}

int main(void)
{
	service_start(&service, NULL);
	service.d.config.early_min_frames = 64;
	fa_init(&agent, "checked", PAGES0, PAGES1);
	check(service_attach(&service, &agent), "attach");
	test_nothing_missed();
	test_missed();
	test_metric();
	test_missed_after_early_copy();
	test_unknown_identities();
	test_failed_epoch();
	test_holes();
	test_bounded();
	fa_deinit(&agent);
	service_stop(&service);
	return 0;
}
