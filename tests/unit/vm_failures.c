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

static uint64_t nr_timelines(void)
{
	struct store_stats s;

	check(!store_get_stats(service.d.store, &s, NULL), "figures");
	return s.timelines;
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

struct death {
	int type;
	bool after;   /* the request is done; else it was not seen */
	bool mute;    /* and its answer is lost */
	bool touched; /* the VM comes back half rewritten, or rolled back */
};

/* The connection ends at each step of a rollback; the VM comes back as it has to. */
static void die_in_rollback(struct fake_agent *a, uint64_t id, const uint8_t *first,
			    const struct death *d)
{
	static uint64_t round;
	struct err e = {};
	bool done;

	a->state_value = 2;
	for (uint64_t p = 0; p < 100; p++)
		fa_write(a, 0, p * 3, ++round * 1000 + p);
	snapshot(a);
	fa_write(a, 0, 299, 77);
	*(d->mute ? &a->die_mute_at : d->after ? &a->die_after : &a->die_at) = d->type;
	done = !service_rollback(&service, a, id, &e);
	check(!done || (d->after && !d->mute && d->type != SNAPD_MSG_PAUSE), "rollback fails");
	reattach(a);
	if (!d->touched) {
		check(a->state_value == 2, "not touched");
		check(!service_rollback(&service, a, id, &e), "%s", e.text);
	}
	check(a->state_value == 1 && !memcmp(a->ram[0], first, 300 * FA_PAGE),
	      "rolled back after losing the connection at %d", d->type);
	check(!a->paused, "and runs");
	fa_write(a, 0, 12, 5);
	snapshot(a);
}

static void test_rollback_dies(uint16_t minor, bool unchecked, const struct death *deaths,
			       size_t nr)
{
	uint8_t *first = malloc(300 * FA_PAGE);
	struct fake_agent a;
	uint64_t id;

	fa_init(&a, "rolling", 300, 0);
	a.hello.minor = minor;
	a.state_value = 1;
	service.unchecked = unchecked;
	check(service_attach(&service, &a), "attach");
	id = snapshot(&a);
	memcpy(first, a.truth[0], 300 * FA_PAGE);
	for (size_t i = 0; i < nr; i++) {
		die_in_rollback(&a, id, first, &deaths[i]);
		/* Who ran before the service heard of it has it all stored once more. */
		check((deaths[i].mute && unchecked) || service_result("pages") <= 120,
		      "the sets were not all: %lld", (long long)service_result("pages"));
	}
	check(minor == 2 || a.nr_rewrites > nr - 2, "older agents are told by REWRITE");
	service.unchecked = false;
	free(first);
	fa_deinit(&a);
}

static void test_rollbacks_die(void)
{
	static const struct death old[] = {
		{SNAPD_MSG_SYNC, 0, 0, 0},    {SNAPD_MSG_PAUSE, 0, 0, 0},
		{SNAPD_MSG_PAUSE, 1, 0, 0},   {SNAPD_MSG_REWRITE, 0, 0, 0},
		{SNAPD_MSG_REWRITE, 1, 0, 1}, {SNAPD_MSG_LOAD, 0, 0, 1},
		{SNAPD_MSG_LOAD, 1, 1, 1},    {SNAPD_MSG_RESUME, 0, 0, 1},
	};
	static const struct death checked[] = {
		{SNAPD_MSG_SYNC, 0, 0, 0}, {SNAPD_MSG_PAUSE, 0, 0, 0}, {SNAPD_MSG_PAUSE, 1, 0, 1},
		{SNAPD_MSG_LOAD, 0, 0, 1}, {SNAPD_MSG_LOAD, 1, 1, 1},  {SNAPD_MSG_RESUME, 0, 0, 1},
	};
	static const struct death running_on[] = {
		{SNAPD_MSG_PAUSE, 0, 0, 0}, {SNAPD_MSG_PAUSE, 1, 0, 1}, {SNAPD_MSG_LOAD, 0, 0, 1},
		{SNAPD_MSG_LOAD, 1, 0, 1},  {SNAPD_MSG_LOAD, 1, 1, 1},
	};

	test_rollback_dies(0, false, old, ARRAY_SIZE(old));
	test_rollback_dies(2, false, checked, ARRAY_SIZE(checked));
	test_rollback_dies(2, true, running_on, ARRAY_SIZE(running_on));
}

/* What fails in the pause before RAM is written lets the VM go on as it was; and pages
 * that all become dirty late are written as well. */
static void test_untouched(uint16_t minor)
{
	struct fake_agent a;
	struct err e = {};
	uint64_t id;

	fa_init(&a, "untouched", 300, 64);
	a.hello.minor = minor;
	check(service_attach(&service, &a), "attach");
	id = snapshot(&a);
	fa_write(&a, 0, 3, 9);
	a.dirty_all_at_pause = true;
	check(!service_rollback(&service, &a, id, &e), "%s", e.text);
	check(service_result("late") >= 300, "all were late");
	a.dirty_all_at_pause = false;
	fa_write(&a, 0, 3, 9);
	a.state_value = 7;
	a.gone_at = SNAPD_MSG_PAUSE;
	check(service_rollback(&service, &a, id, &e) == -EAGAIN, "memory went: %s", e.text);
	check(a.state_value == 7 && !a.paused && !a.rewriting, "as it was");
	check(*(uint64_t *)(a.ram[0] + 3 * FA_PAGE), "as it was");
	check(a.nr_untouched == (minor == 2), "the agent was told so");
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

/* CHECK refused: nothing was touched, the VM has not stood. */
static void test_check_refused(void)
{
	struct fake_agent a;
	struct err e = {};
	int pauses, loads;
	uint64_t id;

	fa_init(&a, "choosy", 100, 0);
	check(service_attach(&service, &a), "attach");
	id = snapshot(&a);
	fa_write(&a, 0, 3, 9);
	pauses = a.nr_pauses;
	loads = a.nr_loads;
	a.fail_at = SNAPD_MSG_CHECK;
	check(service_rollback(&service, &a, id, &e) == -EIO, "refused: %s", e.text);
	check(a.nr_pauses == pauses && a.nr_loads == loads, "the VM stood");
	snapshot(&a);
	fa_deinit(&a);
}

/* A VM to be restored that says READY with one vCPU; the snapshot has two. */
static void attach_few(struct fake_agent *a, const char *name, uint64_t id)
{
	int fd;

	fa_init(a, name, 100, 0);
	a->nr_vcpus = a->hello.nr_vcpus = 1;
	a->restore_pending = true;
	snprintf(a->restore, sizeof(a->restore), "%llu", (unsigned long long)id);
	fd = fa_connect(a);
	check(!vm_accept(&service.d, fd) && fa_attach(a), "attach");
}

/* vCPUs that are attached one by one are waited for, and not for ever. */
static void test_few_vcpus(void)
{
	struct snapd_msg_ready ready = {.h = {.len = sizeof(ready), .type = SNAPD_MSG_READY},
					.nr_vcpus = 2};
	struct fake_agent a, late, never;
	uint64_t id;

	fa_init(&a, "both", 100, 0);
	check(service_attach(&service, &a), "attach");
	id = snapshot(&a);

	attach_few(&late, "late", id);
	usleep(50000);
	check(!late.nr_loads && !late.ended, "it waits");
	fa_send(&late, &ready, sizeof(ready), -1);
	service_await(&service, &late, VM_READY);
	check(late.nr_loads == 1 && !memcmp(late.ram[0], a.truth[0], 100 * FA_PAGE), "restored");

	service.d.config.vcpus_wait_ms = 100;
	attach_few(&never, "never", id);
	for (int i = 0; i < 500 && !never.ended; i++)
		usleep(10000);
	check(never.ended == 2 && !never.nr_loads, "refused");
	check(strstr(never.last_error.text, "has 2 vCPUs, never has 1"), "%s",
	      never.last_error.text);
	service.d.config.vcpus_wait_ms = 5000;
	fa_deinit(&never);
	fa_deinit(&late);
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

/* What fails leaves no timeline without epochs behind. */
static void test_timelines(void)
{
	uint64_t before = nr_timelines(), id;
	struct fake_agent a;
	struct err e = {};

	fa_init(&a, "forking", 300, 0);
	check(service_attach(&service, &a), "attach");
	a.fail_at = SNAPD_MSG_PAUSE;
	check(service_snapshot(&service, &a, NULL, &id, &e) < 0, "the first snapshot fails");
	check(nr_timelines() == before, "its timeline is gone");
	id = snapshot(&a);
	check(nr_timelines() == before + 1, "one timeline");
	a.fail_at = SNAPD_MSG_PAUSE;
	check(service_rollback(&service, &a, id, &e) < 0, "the rollback fails");
	check(nr_timelines() == before + 1, "its fork is gone");
	a.fail_at = SNAPD_MSG_LOAD;
	check(service_rollback(&service, &a, id, &e) < 0, "the rollback fails half way");
	check(nr_timelines() == before + 1, "its fork is gone");
	check(!service_rollback(&service, &a, id, NULL), "rolled back");
	check(nr_timelines() == before + 2, "its fork is there");
	fa_deinit(&a);
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
	test_rollbacks_die();
	test_untouched(0);
	test_untouched(2);
	test_load_refused();
	test_check_refused();
	test_few_vcpus();
	test_shrinking_memory();
	test_staging_too_small();
	test_names();
	test_lying_base();
	test_timelines();
	service_stop(&service);
	puts("failures cost the job, and nothing else");
	return 0;
}
