/* SPDX-License-Identifier: MIT */
/*
 * Goal: what goes wrong in the middle of a snapshot or rollback costs that job, and
 * nothing else: no dirty frame is lost, other VMs go on, the reason is said; and a
 * VM that comes back is taken where it stood.
 *
 * Method: a fake agent fails, or dies, or truncates its memory at each request in
 * turn; then it (or a new one) goes on, and its next snapshot has to be exact and to
 * contain what was dirty before.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/vm/priv.h"
#include "tests/lib/check.h"
#include "tests/lib/fake_agent.h"
#include "tests/lib/service.h"

static struct service service;

static uint64_t snapshot(struct fake_agent *a)
{
	struct err e = {};
	uint64_t id;

	check(!service_snapshot(&service, a, NULL, &id, &e), "%s", e.text);
	service_compare(&service, a, id, a->truth);
	return id;
}

static void reattach(struct fake_agent *a)
{
	fa_disconnect(a);
	check(service_attach(&service, a), "%s", a->last_error.text);
}

/* Nothing that was dirty before a failure is forgotten after it. */
static void test_requests(void)
{
	static const int types[] = {SNAPD_MSG_SYNC, SNAPD_MSG_PAUSE, SNAPD_MSG_RESUME};
	struct fake_agent a, other;
	struct err e = {};
	uint64_t id;

	fa_init(&a, "failing", 300, 50);
	fa_init(&other, "other", 64, 0);
	check(service_attach(&service, &a) && service_attach(&service, &other), "attach");
	snapshot(&a);
	for (size_t i = 0; i < 2 * ARRAY_SIZE(types); i++) {
		bool die = i % 2;

		for (uint64_t p = 0; p < 90; p++)
			fa_write(&a, 0, (i * 17 + p * 3) % 300, i * 1000 + p);
		*(die ? &a.die_at : &a.fail_at) = types[i / 2];
		err_clear(&e);
		check(service_snapshot(&service, &a, NULL, &id, &e) < 0 && e.text[0],
		      "a snapshot with request %d failing fails", types[i / 2]);
		snapshot(&other);
		if (die || types[i / 2] == SNAPD_MSG_RESUME)
			reattach(&a);
		snapshot(&a);
		check(service_result("pages") >= 90, "all 90 pages are in the next: %lld",
		      (long long)service_result("pages"));
	}
	fa_deinit(&a);
	fa_deinit(&other);
}

/* The connection ends at each request of a rollback; the VM comes back as it has to. */
static void test_rollback_dies(void)
{
	static const int types[] = {SNAPD_MSG_SYNC, SNAPD_MSG_PAUSE, SNAPD_MSG_REWRITE,
				    SNAPD_MSG_LOAD, SNAPD_MSG_RESUME};
	struct fake_agent a;
	uint8_t *first[FA_BLOCKS] = {};
	struct err e = {};
	uint64_t id;

	fa_init(&a, "rolling", 300, 0);
	a.state_value = 1;
	check(service_attach(&service, &a), "attach");
	id = snapshot(&a);
	first[0] = malloc(300 * FA_PAGE);
	memcpy(first[0], a.truth[0], 300 * FA_PAGE);
	for (size_t i = 0; i < ARRAY_SIZE(types); i++) {
		a.state_value = 2;
		for (uint64_t p = 0; p < 100; p++)
			fa_write(&a, 0, p * 3, i * 1000 + p);
		snapshot(&a);
		fa_write(&a, 0, 299, 77);
		a.die_at = types[i];
		err_clear(&e);
		check(service_rollback(&service, &a, id, &e) < 0, "rollback fails");
		reattach(&a);
		/* Who dies at REWRITE has not seen it. */
		if (i < 3) {
			check(a.state_value == 2, "not touched");
			check(!service_rollback(&service, &a, id, &e), "%s", e.text);
		}
		check(a.state_value == 1 && !memcmp(a.ram[0], first[0], 300 * FA_PAGE),
		      "rolled back after losing the connection at %d", types[i]);
		fa_write(&a, 0, 12, 5);
		snapshot(&a);
		check(service_result("pages") <= 120, "the sets were not all: %lld",
		      (long long)service_result("pages"));
	}
	free(first[0]);
	fa_deinit(&a);
}

/* LOAD refused: the VM stays paused, only another rollback is taken, and cures it. */
static void test_load_refused(void)
{
	struct fake_agent a;
	struct err e = {};
	uint64_t id, other;

	fa_init(&a, "refusing", 100, 0);
	check(service_attach(&service, &a), "attach");
	id = snapshot(&a);
	fa_write(&a, 0, 3, 9);
	a.fail_at = SNAPD_MSG_LOAD;
	check(service_rollback(&service, &a, id, &e) == -EIO, "refused: %s", e.text);
	check(service_snapshot(&service, &a, NULL, &other, &e) == -EBUSY, "no snapshot of it");
	err_clear(&e);
	check(!service_rollback(&service, &a, id, &e), "%s", e.text);
	check(!memcmp(a.ram[0], a.truth[0], 16), "RAM");
	fa_write(&a, 0, 4, 11);
	snapshot(&a);
	fa_deinit(&a);
}

static void test_shrinking_memory(void)
{
	static const int types[] = {SNAPD_MSG_SYNC, SNAPD_MSG_PAUSE};
	struct fake_agent a;
	struct err e = {};
	uint64_t id;

	for (size_t i = 0; i < ARRAY_SIZE(types); i++) {
		/* Few dirty frames are copied in the pause only. */
		fa_init(&a, "shrinking", i ? 60 : 300, 0);
		check(service_attach(&service, &a), "attach");
		fa_write(&a, 0, 1, 10);
		a.shrink_at = types[i];
		/* The fake agent's own look at its memory comes after the service's. */
		a.no_truth = true;
		err_clear(&e);
		check(service_snapshot(&service, &a, NULL, &id, &e) == -EFAULT, "SIGBUS: %s",
		      e.text);
		fa_deinit(&a);
	}
}

static void test_staging_too_small(void)
{
	struct fake_agent a;
	struct err e = {};
	uint64_t id;

	/* All frames come back dirty at PAUSE, and 4 MiB do not hold them. */
	fa_init(&a, "busy", 3000, 0);
	check(service_attach(&service, &a), "attach");
	a.dirty_all_at_pause = true;
	check(service_snapshot(&service, &a, NULL, &id, &e) == -ENOBUFS, "%s", e.text);
	check(strstr(e.text, "staging_max"), "says what to raise: %s", e.text);
	a.dirty_all_at_pause = false;
	snapshot(&a);
	/* A rollback of more than fits reads on while it is paused. */
	id = snapshot(&a);
	for (uint64_t p = 0; p < 3000; p++)
		fa_write(&a, 0, p, p * 8 + 5);
	check(!service_rollback(&service, &a, id, &e), "%s", e.text);
	fa_deinit(&a);
}

/* Same instance: where it stood.  Another of that name: refused while this one is
 * there, and everything dirty after. */
static void test_names(void)
{
	struct fake_agent a, twin;

	fa_init(&a, "named", 200, 0);
	check(service_attach(&service, &a), "attach");
	snapshot(&a);
	fa_write(&a, 0, 7, 123);
	reattach(&a);
	snapshot(&a);
	check(service_result("pages") == 1, "only what was dirty: %lld",
	      (long long)service_result("pages"));
	fa_write(&a, 0, 8, 123);
	service_restart(&service);
	reattach(&a);
	snapshot(&a);
	check(service_result("pages") == 1, "also after a restart of the service");

	fa_init(&twin, "named", 200, 0);
	check(!service_attach(&service, &twin), "a second VM of that name is refused");
	check(twin.last_error.code == EEXIST, "with EEXIST: %s", twin.last_error.text);
	fa_disconnect(&a);
	fa_disconnect(&twin);
	check(service_attach(&service, &twin), "its place is free: %s", twin.last_error.text);
	snapshot(&twin);
	check(service_result("pages") == 200, "of which all is new");
	fa_deinit(&a);
	fa_deinit(&twin);
}

/* A base that the store does not have, or has for somebody else, is not believed. */
static void test_lying_base(void)
{
	struct fake_agent a, b;

	fa_init(&a, "honest", 100, 0);
	fa_init(&b, "lying", 100, 0);
	check(service_attach(&service, &a), "attach");
	snapshot(&a);
	memcpy(b.shm->store, a.shm->store, sizeof(b.shm->store));
	b.shm->base = a.shm->base;
	check(service_attach(&service, &b), "attach");
	check(!b.welcome.head.timeline, "another VM's point is not its own");
	snapshot(&b);
	check(service_result("pages") == 100, "all of it is dirty");
	fa_disconnect(&b);
	b.shm->base.epoch += 100;
	check(service_attach(&service, &b), "attach");
	check(!b.welcome.head.timeline, "nor is a point of the future");
	fa_disconnect(&b);
	/* Nor may it rewrite itself into somebody's snapshot that does not exist. */
	b.rewriting = true;
	b.rewrite_to = (struct snapd_point){999, 1};
	check(service_attach(&service, &b), "attach");
	fa_deinit(&a);
	fa_deinit(&b);
}

static void small(struct daemon_config *c)
{
	c->early_min_frames = 64;
	c->staging_max_bytes = 4 << 20;
}

int main(void)
{
	service_start(&service, small);
	log_set_level(LOG_LVL_ERR);
	test_requests();
	test_rollback_dies();
	test_load_refused();
	test_shrinking_memory();
	test_staging_too_small();
	test_names();
	test_lying_base();
	service_stop(&service);
	puts("failures cost the job, and nothing else");
	return 0;
}
