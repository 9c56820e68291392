/* SPDX-License-Identifier: MIT */
/*
 * bench memory: what the index costs on disk, and the service in memory.
 *
 * Index: a guest of 256 MiB, 200 epochs of 2600 pages at random, all of them new:
 * bytes of the LMDB file, manifests, checkpoints and epoch records, for each page version
 * that is stored.  The identity of each page, 32 bytes in its batch's header, is not
 * index: it stands beside.
 *
 * Service: a store of 100 VMs of 1 GiB, 11 snapshots each, more than 1 TiB logical: real
 * batches, manifests, checkpoints and records; one VM's pages are stored, the others'
 * are duplicates of runs of them, and 1 % changes for each snapshot.  The service is
 * started on it; its peak of resident memory until it answers the API, and has listed all
 * snapshots, and the limit of the table of duplicates, as if it were full, are the figure.
 * Proofs by bytes are off while the store is made.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench/bench.h"
#include "bench/store_run.h"
#include "snapd/util/cleanup.h"

#define VMS	  100u
#define SNAPSHOTS 10u
#define VM_PAGES  262144u /* 1 GiB */
#define BASE	  32768u  /* pages with contents of their own */
#define RUN_LEN	  64u
#define CHANGED	  (VM_PAGES / 100)
#define GOAL_RSS  ((uint64_t)512 << 20)
#define TABLE_MAX ((uint64_t)256 << 20) /* default of dedup_memory */
#define GOAL_IX	  40.0

/* ---- bytes on disk ---- */

#define GUEST_PAGES 65536u
#define EPOCHS	    200u
#define DIRTY	    2600u

static void measure_index(const char *path)
{
	uint8_t *ram = bench_guest_ram((size_t)GUEST_PAGES * RUN_PAGE, 3);
	struct epoch_stats stats;
	struct store_stats space;
	struct store_run s;
	uint64_t seed = 1, payload, identity, index;
	struct err e = {0};

	store_run_init(&s, &(struct store_config){.dir = path, .compression = "none"});
	run_epoch(&s, ram, NULL, GUEST_PAGES, &stats);
	for (uint32_t i = 0; i < EPOCHS; i++)
		run_scattered(&s, ram, DIRTY, GUEST_PAGES, &seed);
	run_check(store_get_stats(s.store, &space, &e), &e);
	payload = space.pages_stored * RUN_PAGE;
	identity = space.pages_stored * 8192 / 252;
	index = space.bytes_used + space.bytes_index - payload - identity;
	bench_note("%llu page versions: %.1f bytes of index each, %.1f of them LMDB; identities "
		   "%.1f",
		   (unsigned long long)space.pages_stored,
		   (double)index / (double)space.pages_stored,
		   (double)space.bytes_index / (double)space.pages_stored, 8192.0 / 252);
	bench_ratio("memory, index", (double)index / (double)space.pages_stored / GOAL_IX,
		    BENCH_AT_MOST, 1);
	store_run_deinit(&s);
	bench_guest_free(ram, (size_t)GUEST_PAGES * RUN_PAGE);
}

/* ---- the service ---- */

struct contents {
	uint8_t *bytes;	    /* BASE pages */
	struct pageid *ids; /* theirs */
};

static void put_run(struct epoch *ep, const struct contents *c, uint32_t gfn, uint32_t from,
		    uint32_t nr)
{
	struct epoch_page pages[RUN_LEN];
	struct err e = {0};

	for (uint32_t i = 0; i < nr; i++) {
		uint32_t k = (from + i) % BASE;

		pages[i] = (struct epoch_page){gfn + i, c->bytes + (size_t)k * RUN_PAGE, c->ids[k]};
	}
	run_check(epoch_put(ep, pages, nr, &e), &e);
}

static void first_snapshot(struct store_run *s, const struct contents *c, uint64_t *seed)
{
	struct epoch *ep = run_begin(s);

	for (uint32_t gfn = 0; gfn < VM_PAGES; gfn += RUN_LEN)
		put_run(ep, c, gfn, (uint32_t)(bench_rand(seed) % BASE), RUN_LEN);
	run_commit(ep, NULL);
}

static void next_snapshot(struct store_run *s, const struct contents *c, uint64_t *seed)
{
	uint32_t *pages = bench_scattered(CHANGED, VM_PAGES, *seed);
	struct epoch *ep = run_begin(s);

	for (uint32_t i = 0; i < CHANGED; i++)
		put_run(ep, c, pages[i], (uint32_t)(bench_rand(seed) % BASE), 1);
	run_commit(ep, NULL);
	free(pages);
}

static void make_vm(struct store_run *s, const struct contents *c, uint32_t n)
{
	uint64_t seed = n;
	char name[16];

	snprintf(name, sizeof(name), "vm-%u", n);
	store_run_add_vm(s, name);
	first_snapshot(s, c, &seed);
	for (uint32_t i = 0; i < SNAPSHOTS; i++)
		next_snapshot(s, c, &seed);
}

static void make_store(const char *path)
{
	struct contents c = {.bytes = bench_guest_ram((size_t)BASE * RUN_PAGE, 3),
			     .ids = calloc(BASE, sizeof(struct pageid))};
	struct store_stats stats;
	struct store_run s;
	struct err e = {0};

	store_run_init(&s, &(struct store_config){.dir = path,
						  .compression = "none",
						  .no_prove = true,
						  .dedup_pages_per_read = 1});
	for (uint32_t i = 0; c.ids && i < BASE; i++)
		c.ids[i] =
			pageid_of(store_secret(s.store), c.bytes + (size_t)i * RUN_PAGE, RUN_PAGE);
	if (!c.ids)
		bench_die("no memory");
	for (uint32_t i = 0; i < VMS; i++)
		make_vm(&s, &c, i);
	run_check(store_get_stats(s.store, &stats, &e), &e);
	bench_note("%llu VMs, %llu snapshots, %.2f TiB logical, %.2f GiB on disk",
		   (unsigned long long)stats.vms - 1, (unsigned long long)stats.snapshots,
		   (double)stats.bytes_logical / (double)(1ull << 40),
		   (double)stats.bytes_used / (double)(1ull << 30));
	pagemap_destroy(s.live);
	store_close(s.store);
	free(s.staging);
	free(s.dir);
	free(c.ids);
	bench_guest_free(c.bytes, (size_t)BASE * RUN_PAGE);
}

/* A field of /proc/PID/status, bytes. */
static uint64_t status_of(pid_t pid, const char *field)
{
	unsigned long long kib = 0;
	char path[64], line[256];
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
	f = fopen(path, "re");
	while (f && fgets(line, sizeof(line), f))
		if (!strncmp(line, field, strlen(field)))
			kib = strtoull(line + strlen(field), NULL, 10);
	if (f)
		fclose(f);
	return (uint64_t)kib << 10;
}

static pid_t start_service(const char *dir, const char *store)
{
	char api[4160], agent[4160];
	pid_t pid = fork();

	snprintf(api, sizeof(api), "%s/api", dir);
	snprintf(agent, sizeof(agent), "%s/agent", dir);
	if (!pid) {
		execl(SNAPD_PATH, "snapd", "--store", store, "--socket", api, "--agent-socket",
		      agent, "--log-level", "err", NULL);
		_exit(127);
	}
	if (pid < 0)
		bench_die("fork: %s", strerror(errno));
	return pid;
}

static void measure_service(const char *dir, const char *store)
{
	uint64_t start = bench_now_ns(), peak;
	char command[8448];
	pid_t pid = start_service(dir, store);
	int status;

	snprintf(command, sizeof(command),
		 SNAPCTL_PATH " --socket '%s/api' list --json >'%s/list' 2>/dev/null", dir, dir);
	while (system(command)) {
		if (waitpid(pid, &status, WNOHANG))
			bench_die("the service ended");
		if (bench_now_ns() - start > 60ull * 1000000000u)
			bench_die("the service does not answer");
		usleep(20000);
	}
	bench_note("service: %.1f s until all snapshots were listed; resident %.0f MiB, at most "
		   "%.0f MiB",
		   (double)(bench_now_ns() - start) / 1e9,
		   (double)status_of(pid, "VmRSS:") / (1 << 20),
		   (double)status_of(pid, "VmHWM:") / (1 << 20));
	/* The pages stored are few here; with many the table would reach its limit. */
	peak = status_of(pid, "VmHWM:") + TABLE_MAX;
	bench_note("with a full table of duplicates %.0f MiB", (double)peak / (1 << 20));
	kill(pid, SIGTERM);
	waitpid(pid, &status, 0);
	bench_ratio("memory, service", (double)peak / (double)GOAL_RSS, BENCH_AT_MOST, 1);
}

int main(void)
{
	const char *dir = run_dir("memory");
	char path[4128];

	snprintf(path, sizeof(path), "%s/index", dir);
	measure_index(path);
	snprintf(path, sizeof(path), "%s/store", dir);
	make_store(path);
	measure_service(dir, path);
	return 0;
}
