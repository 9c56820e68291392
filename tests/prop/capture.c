/* SPDX-License-Identifier: MIT */
/*
 * Goal: no snapshot ever misses a write or shows a torn page; rollback and restore
 * bring back exactly what was; the sets stay true across reconnects, restarts of
 * the service, failures and interrupted rollbacks.
 *
 * Method: writers change RAM all the time and mark pages after the write; at each
 * PAUSE the fake agent keeps a copy of RAM, which is the truth for that snapshot.
 * A random run of snapshots, rollbacks, reconnects, service restarts, and failures
 * put into every request; after each step the store is compared with the truth,
 * byte by byte, and after a rollback RAM with the truth of its snapshot.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "snapd/vm/vm.h"
#include "tests/lib/check.h"
#include "tests/lib/fake_agent.h"
#include "tests/lib/rand.h"
#include "tests/lib/service.h"

#define PAGES0	  3000
#define PAGES1	  700
#define MAX_SNAPS 400

struct taken {
	uint64_t id, state;
	uint8_t *bytes[FA_BLOCKS];
};

static struct service service;
static struct fake_agent agent;
static struct taken taken[MAX_SNAPS];
static size_t nr_taken;

static void small_early(struct daemon_config *c)
{
	c->early_min_frames = 100;
}

static void keep(struct taken *t, uint64_t id, uint64_t state)
{
	t->id = id;
	t->state = state;
	for (int b = 0; b < FA_BLOCKS; b++) {
		size_t bytes = agent.block_pages[b] * FA_PAGE;

		t->bytes[b] = malloc(bytes);
		memcpy(t->bytes[b], agent.truth[b], bytes);
	}
}

static void reattach(void)
{
	fa_disconnect(&agent);
	check(service_attach(&service, &agent), "reattach: %s", agent.last_error.text);
}

static void step_snapshot(void)
{
	struct err e = {};
	uint64_t id;

	agent.state_value++;
	check(!service_snapshot(&service, &agent, NULL, &id, &e), "%s", e.text);
	service_compare(&service, &agent, id, agent.truth);
	keep(&taken[nr_taken++], id, agent.state_value);
}

/* Writers are stopped, so that what RAM is after the rollback can be seen. */
static void step_rollback(struct rand *r, bool quiet)
{
	struct taken *t = &taken[rand_below(r, nr_taken)];
	struct err e = {};

	if (quiet)
		fa_stop_writers(&agent);
	check(!service_rollback(&service, &agent, t->id, &e), "%s", e.text);
	check(agent.state_value == t->state, "state of the snapshot");
	if (!quiet)
		return;
	for (int b = 0; b < FA_BLOCKS; b++)
		check(!memcmp(agent.ram[b], t->bytes[b], agent.block_pages[b] * FA_PAGE),
		      "block %d is as in snapshot %llu", b, (unsigned long long)t->id);
	fa_start_writers(&agent, 2, rand_next(r));
}

static void step_failure(struct rand *r)
{
	static const int at[] = {SNAPD_MSG_SYNC, SNAPD_MSG_PAUSE, SNAPD_MSG_RESUME, SNAPD_MSG_LOAD,
				 SNAPD_MSG_REWRITE};
	bool rollback = rand_below(r, 2), die = rand_below(r, 2);
	int type = at[rand_below(r, rollback && die ? 5 : rollback ? 2 : 3)];
	struct err e = {};
	uint64_t id;
	int err;

	*(die ? &agent.die_at : &agent.fail_at) = type;
	if (rollback)
		err = service_rollback(&service, &agent, taken[rand_below(r, nr_taken)].id, &e);
	else
		err = service_snapshot(&service, &agent, NULL, &id, &e);
	/* SYNC is not always asked for. */
	if (agent.die_at || agent.fail_at) {
		agent.die_at = agent.fail_at = 0;
		return;
	}
	check(err < 0 && e.text[0], "the job failed and says why");
	if (die || type == SNAPD_MSG_RESUME)
		reattach();
	service_await(&service, &agent, VM_READY);
}

static void step(struct rand *r)
{
	switch (rand_below(r, 12)) {
	case 0:
		reattach();
		break;
	case 1:
		service_restart(&service);
		fa_disconnect(&agent);
		check(service_attach(&service, &agent), "%s", agent.last_error.text);
		break;
	case 2:
	case 3:
		step_rollback(r, true);
		break;
	case 4:
		step_rollback(r, false);
		break;
	case 5:
	case 6:
		step_failure(r);
		break;
	default:
		step_snapshot();
	}
}

static void check_all(void)
{
	for (size_t i = 0; i < nr_taken; i++)
		service_compare(&service, &agent, taken[i].id, taken[i].bytes);
}

/* A new VM from a snapshot: RAM and state are the snapshot's, the sets empty. */
static void restore_one(struct rand *r)
{
	struct taken *t = &taken[rand_below(r, nr_taken)];
	struct fake_agent copy;
	struct err e = {};
	uint64_t id;

	fa_init(&copy, "restored", PAGES0, PAGES1);
	fa_write(&copy, 0, 5, 3);
	snprintf(copy.restore, sizeof(copy.restore), "%llu", (unsigned long long)t->id);
	copy.restore_pending = true;
	/* A file that cannot be written to at an offset is filled through its mapping. */
	check(!fcntl(copy.ram_fd[1], F_SETFL, O_APPEND), "O_APPEND");
	check(service_attach(&service, &copy), "%s", copy.last_error.text);
	for (int b = 0; b < FA_BLOCKS; b++)
		check(!memcmp(copy.ram[b], t->bytes[b], copy.block_pages[b] * FA_PAGE),
		      "restored block %d", b);
	check(copy.state_value == t->state, "restored state");
	fa_write(&copy, 0, 7, 10);
	check(!service_snapshot(&service, &copy, NULL, &id, &e), "%s", e.text);
	check(service_result("pages") == 1, "only the page written since is new: %lld",
	      (long long)service_result("pages"));
	service_compare(&service, &copy, id, copy.truth);
	fa_deinit(&copy);
}

int main(void)
{
	struct rand r = rand_of(rand_seed());
	int steps = getenv("SNAPD_STEPS") ? atoi(getenv("SNAPD_STEPS")) : 60;

	service_start(&service, small_early);
	fa_init(&agent, "guest", PAGES0, PAGES1);
	agent.hot_pages = 300;
	agent.write_pause_us = 50;
	check(service_attach(&service, &agent), "%s", agent.last_error.text);
	fa_start_writers(&agent, 2, rand_next(&r));
	step_snapshot();
	for (int i = 0; i < steps && nr_taken < MAX_SNAPS; i++)
		step(&r);
	fa_stop_writers(&agent);
	check_all();
	restore_one(&r);
	printf("%zu snapshots, %llu rollbacks equal what was\n", nr_taken,
	       (unsigned long long)agent.nr_loads);
	for (size_t i = 0; i < nr_taken; i++)
		for (int b = 0; b < FA_BLOCKS; b++)
			free(taken[i].bytes[b]);
	fa_deinit(&agent);
	service_stop(&service);
	return 0;
}
