/* SPDX-License-Identifier: MIT */
/*
 * Every way a page gets dirty, in random order, against its content.
 *
 * Two programs.  One has a VM on the simulated KVM, with two address spaces and backup bitmaps,
 * and one thread does everything, so that a seed replays a run exactly (checked by a hash
 * over all that was reported).  The other has the kernel's KVM, with each way of dirty
 * tracking, and vCPUs that write while everything else goes on.  Steps: memslots come and go in
 * both address spaces, as aliases, at other GPAs, under reused ids; a DIMM is unplugged for good,
 * or another file takes its GPA; vCPUs write through either address space, into holes, or until
 * rings are full; KVM writes without a vCPU; the VMM writes, and marks by GPA or by
 * file; a device logs as vhost does; memory is discarded, or said to be; consumers come
 * and go; the service reconnects, copies early, takes epochs, rolls back.
 *
 * Oracle: what the service and each consumer copied because a set told so, by store
 * key, equals memory; no page has two keys and no key two pages; what is gone has no
 * bits.  How much was reported in vain is counted.
 *
 *   hazards [EPOCHS]               a campaign, and a short one twice: the same twice
 *   hazards_kvm BACKEND [EPOCHS]   a campaign; BACKEND as in tests/lib/agent_vm.h
 *   hazards_kvm BACKEND EPOCHS expect-miss      an agent that lacks a guard has to be noticed
 *   hazards_ablated                each guard taken away in turn has to be noticed
 */
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/prop/hazards.h"

#ifdef SNAPD_ABLATIONS
enum ablation snapd_ablation;
#endif

static const struct {
	void (*fn)(struct campaign *c);
	uint32_t weight;
} ops[] = {
	{op_slot_add, 30}, {op_slot_delete, 18}, {op_smram, 4},	    {op_dimm, 10},
	{op_vcpus, 30},	   {op_no_vcpu, 15},	 {op_mark, 15},	    {op_device, 20},
	{op_discard, 12},  {op_early, 8},	 {op_epoch, 30},    {op_rollback, 3},
	{op_reconnect, 1}, {op_consumer, 6},	 {op_cut_reset, 6},
};

static void step(struct campaign *c)
{
	uint32_t total = 0, i;
	uint64_t at;

	for (i = 0; i < ARRAY_SIZE(ops); i++)
		total += ops[i].weight;
	at = below(c, total);
	for (i = 0; at >= ops[i].weight; i++)
		at -= ops[i].weight;
	trace(c, i);
	ops[i].fn(c);
}

static void campaign_open(struct campaign *c, uint64_t seed, const char *backend)
{
	memset(c, 0, sizeof(*c));
	c->r = rand_of(seed);
	c->saved_state = -1;
	for (enum mem_id i = 0; i < NR_MEMS; i++)
		c->mem[i].fd = -1;
	hazard_host.create(c, backend);
	mem_create(c, MAIN, MAIN_PAGES);
	if (hazard_host.spaces > 1)
		mem_create(c, SMRAM, SMRAM_PAGES);
	for (uint32_t i = 0; i < hazard_host.spaces; i++)
		slot_add(c, LOW_SLOT, i, 0, LOW, 0, c->mem[LOW].pages);
	if (below(c, 2)) /* one piece for all, or one a slot */
		slot_add(c, 0, any_space(c), MAIN_GPA, MAIN, 0, MAIN_PAGES);
	check(!snapd_devlog_create(c->agent, GPA_END, &c->log, &c->log_mem), "%s",
	      snapd_vm_error(NULL));
	fake_open_on(c->listen_fd, &c->s);
	live_update(&c->live, &c->s);
}

static void campaign_close(struct campaign *c)
{
	struct snapd_vm_stats st;

	for (uint32_t i = 0; i < VCPUS; i++)
		hazard_host.join(c, i);
	snapd_vm_get_stats(c->agent, &st);
	check(!st.unresolved, "%llu unresolved", (unsigned long long)st.unresolved);
	snapd_devlog_destroy(c->log);
	fake_close(&c->s);
	hazard_host.destroy(c);
	live_deinit(&c->live);
	image_deinit(&c->kept);
	image_deinit(&c->saved);
	for (uint32_t i = 0; i < CONSUMERS; i++)
		image_deinit(&c->consumers[i].im);
	for (enum mem_id i = 0; i < NR_MEMS; i++)
		mem_destroy(&c->mem[i]);
	forget_saved(c);
}

/* The hash. */
static uint64_t run(uint64_t seed, uint64_t epochs, bool quiet, const char *backend)
{
	static struct campaign c;

	campaign_open(&c, seed, backend);
	while (c.epochs < epochs)
		step(&c);
	if (!quiet) {
		bool has_rings = !backend || !strncmp(backend, "ring", 4);
		struct snapd_vm_stats st;

		snapd_vm_get_stats(c.agent, &st);
		printf("%llu epochs, %llu rollbacks, %llu reconnects, %llu slot changes, %llu "
		       "discards, %llu consumer checks, %llu rings full\n",
		       (unsigned long long)c.epochs, (unsigned long long)c.rollbacks,
		       (unsigned long long)c.reconnects, (unsigned long long)st.slot_changes,
		       (unsigned long long)c.discards, (unsigned long long)c.checks,
		       (unsigned long long)st.ring_full);
		printf("missed 0; reported %llu, changed %llu: over-reported by %.3f\n",
		       (unsigned long long)c.reported, (unsigned long long)c.changed,
		       (double)c.reported / (double)MAX(c.changed, 1ull));
		check(epochs < 1000 || ((st.ring_full || !has_rings) && c.rollbacks &&
					c.reconnects && c.checks),
		      "the campaign did not get everywhere");
	}
	campaign_close(&c);
	return c.hash;
}

/* Does a run of its own notice that something is missing? */
static bool is_noticed(uint64_t seed, uint64_t epochs, const char *backend)
{
	int status;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (!pid) {
		run(seed, epochs, true, backend);
		printf("not noticed\n");
		exit(0);
	}
	check(pid > 0 && waitpid(pid, &status, 0) == pid, "fork");
	return WIFEXITED(status) && WEXITSTATUS(status) == EXIT_MISSED;
}

#ifdef SNAPD_ABLATIONS
static int ablate(uint64_t seed)
{
	/* LOG_NOT_EXCHANGED needs threads: tests/unit/devlog.c. */
	static const enum ablation which[] = {
		ABLATION_AS_ID_IGNORED,		ABLATION_ID_REUSED_AT_ONCE,
		ABLATION_ALIAS_IS_ANOTHER_PAGE, ABLATION_GONE_KEEPS_BITS,
		ABLATION_BACKUP_BEFORE_STATE,	ABLATION_BACKUP_GOES_WITH_SLOT,
		ABLATION_LOG_BEFORE_QUIESCE,	ABLATION_LOG_AFTER_SLOT_CHANGE,
		ABLATION_CONSUMERS_SHARE,	ABLATION_NEWCOMER_CLEAN,
		ABLATION_DISCARD_UNTOLD,	ABLATION_SUSPECTS_FORGOTTEN,
	};
	int unseen = 0;

	for (size_t i = 0; i < ARRAY_SIZE(which); i++) {
		printf("guard %d away: ", which[i]);
		snapd_ablation = which[i];
		unseen += !is_noticed(seed, 30000, NULL);
	}
	return unseen ? 1 : 0;
}
#endif

int main(int argc, char **argv)
{
	const char *backend = hazard_host.backends && argc > 1 ? argv[1] : hazard_host.backends;
	int at = hazard_host.backends ? 2 : 1;
	uint64_t seed = rand_seed(), epochs = argc > at ? strtoull(argv[at], NULL, 0) : 3000;
	uint64_t first;

#ifdef SNAPD_ABLATIONS
	return ablate(seed);
#endif
	if (argc > at + 1)
		return !is_noticed(seed, epochs, backend);
	if (hazard_host.replays) {
		first = run(seed ^ 1, 100, true, backend);
		check(run(seed ^ 1, 100, true, backend) == first, "a seed does not replay a run");
	}
	run(seed, epochs, false, backend);
	printf("ok\n");
	return 0;
}
