/* SPDX-License-Identifier: MIT */
/*
 * Memory that a VMM gives back to the host is zero pages in the next snapshot, and the
 * snapshot does not allocate it again; a page that only was said to be given back, or was
 * written since, keeps its bytes.  Rollbacks go over all of it.
 *
 * Method: scattered single pages are discarded, or said to be, with the hint set as an
 * agent does; what the store should have is kept apart, since reading a hole through a
 * mapping fills it.  Once with everything copied in the pause, once copied early.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "tests/lib/check.h"
#include "tests/lib/fake_agent.h"
#include "tests/lib/service.h"

#define PAGES 600u

static struct service service;
static struct fake_agent agent;
static uint8_t first[PAGES * FA_PAGE], second[PAGES * FA_PAGE], third[PAGES * FA_PAGE];

static void all_late(struct daemon_config *c)
{
	c->early_min_frames = 100000;
}

static void all_early(struct daemon_config *c)
{
	c->early_min_frames = 1;
}

static uint64_t snapshot(uint8_t *is)
{
	uint8_t *bytes[FA_BLOCKS] = {is};
	struct err e = {};
	uint64_t id;

	check(!service_snapshot(&service, &agent, NULL, &id, &e), "%s", e.text);
	service_compare(&service, &agent, id, bytes);
	return id;
}

static void discard(uint64_t page, bool really)
{
	gpaset_add(&agent.discarded, page);
	if (really)
		check(!fallocate(agent.ram_fd[0], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				 (off_t)(page * FA_PAGE), FA_PAGE),
		      "punch");
	gpaset_add(&agent.dirty, page);
}

static blkcnt_t allocated(void)
{
	struct stat st;

	check(!fstat(agent.ram_fd[0], &st), "fstat");
	return st.st_blocks;
}

static void roll_back(uint64_t id, const uint8_t *is)
{
	struct err e = {};

	check(!service_rollback(&service, &agent, id, &e), "%s", e.text);
	check(!memcmp(agent.ram[0], is, sizeof(first)), "memory is not the snapshot's");
}

static void run(void (*config)(struct daemon_config *c))
{
	uint64_t ids[3];
	blkcnt_t before;

	service_start(&service, config);
	fa_init(&agent, "ballooned", PAGES, 0);
	agent.no_truth = true;
	for (uint64_t i = 0; i < PAGES; i++)
		fa_write(&agent, 0, i, i * 8 + 1);
	check(service_attach(&service, &agent), "attach: %s", agent.last_error.text);
	memcpy(first, agent.ram[0], sizeof(first));
	ids[0] = snapshot(first);

	memcpy(second, first, sizeof(first));
	for (uint64_t i = 0; i < PAGES; i += 3) {
		discard(i, true);
		memset(second + i * FA_PAGE, 0, FA_PAGE);
		discard(i + 1, false);
	}
	before = allocated();
	ids[1] = snapshot(second);
	check(allocated() == before, "the snapshot has allocated %lld blocks",
	      (long long)(allocated() - before));

	/* Some pages are taken into use again. */
	memcpy(third, second, sizeof(second));
	for (uint64_t i = 0; i < PAGES; i += 6) {
		fa_write(&agent, 0, i, i * 8 + 5);
		memcpy(third + i * FA_PAGE, agent.ram[0] + i * FA_PAGE, FA_PAGE);
	}
	ids[2] = snapshot(third);
	roll_back(ids[0], first);
	roll_back(ids[1], second);
	roll_back(ids[2], third);
	fa_disconnect(&agent);
	fa_deinit(&agent);
	service_stop(&service);
}

int main(void)
{
	run(all_late);
	run(all_early);
	printf("ok\n");
	return 0;
}
