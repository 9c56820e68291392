/* SPDX-License-Identifier: MIT */
/*
 * bench series: a guest's memory and its epochs (image.h) into our store, restic, borg
 * and a chain of qcow2 overlays; all of them with every version, one after the other,
 * each version durable before the next is made.  Time, bytes stored, and the
 * last version back.
 *
 * restic and borg scan the whole image for what changed; our store and the overlays are
 * handed the list of dirty pages, since to have it is the point of harvesting.  Ours is
 * measured from epoch_begin() to the durable commit, with copy, hash, proof by bytes
 * of every duplicate, and compression (on all cores); twice more, with zstd and without
 * compression.  borg a second time with fixed chunks of 4 KiB.  Overlays have clusters
 * of 4 KiB; qemu-io writes the pages, from files made before the clock starts.
 *
 * Back: ours and restic's last version to memory (restic: dump to /dev/null, and borg
 * extract likewise).  Ours is compared with the image, byte by byte.
 *
 * SNAPD_BENCH_EPOCHS (4): how many epochs; 50 are the series that the goals are about, and
 * take 15 to 25 minutes with all peers (scripts/bench --full).  With fewer, times and bytes
 * are drawn out to 50.
 * SNAPD_BENCH_PEERS ("restic borg borg-4k qcow2"): which of them.
 * SNAPD_BENCH_GATE: a command that is run before each step, outside the clock: to wait
 * for others who measure on the same machine.
 * SNAPD_BENCH_DIR names a directory on the disk to measure; 20 GiB must be free, and
 * 60 GiB for 50 epochs.
 */
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench/bench.h"
#include "bench/image.h"
#include "bench/store_run.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/pool.h"

#define NR_PAGES   262144u
#define SEED	   1
#define EPOCHS_MAX 1000u
#define WHOLE	   50 /* epochs of the series that the goals are about */

struct version {
	const uint8_t *ram;
	uint32_t number;       /* 0: everything is new */
	const uint32_t *pages; /* changed since the one before */
	uint32_t nr;
};

struct subject {
	const char *name;
	const char *program; /* NULL: ours */
	const char *option;  /* compression; borg's chunks */
	void (*init)(struct subject *s);
	double (*add)(struct subject *s, const struct version *v);
	double (*back)(struct subject *s, const uint8_t *ram); /* may be NULL */
	bool here;
	struct store_run run; /* ours */
	double seconds, base_seconds, back_seconds;
	uint64_t bytes, base_bytes;
};

static const char *dir;
static struct pool *pool;

/* ---- commands ---- */

/* Seconds; ends the program when the command fails. */
static double command(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static double command(const char *fmt, ...)
{
	char text[16384];
	uint64_t start;
	va_list ap;
	int n;

	va_start(ap, fmt);
	n = vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	if (n < 0 || (size_t)n >= sizeof(text))
		bench_die("a command is too long");
	start = bench_now_ns();
	if (system(text))
		bench_die("failed: %s", text);
	return (double)(bench_now_ns() - start) / 1e9;
}

static bool has_program(const char *name)
{
	char text[256];

	snprintf(text, sizeof(text), "command -v %s >/dev/null", name);
	return !system(text);
}

static uint64_t tree_bytes;

static int add_bytes(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	tree_bytes += type == FTW_F ? (uint64_t)st->st_blocks * 512 : 0;
	return 0;
}

static uint64_t bytes_below(const char *name)
{
	char path[4128];

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	tree_bytes = 0;
	nftw(path, add_bytes, 16, FTW_PHYS);
	return tree_bytes;
}

/* ---- ours ---- */

static void ours_init(struct subject *s)
{
	char path[4128];

	snprintf(path, sizeof(path), "%s/%s", dir, s->name);
	store_run_init(&s->run,
		       &(struct store_config){.dir = path, .compression = s->option, .pool = pool});
}

static double ours_add(struct subject *s, const struct version *v)
{
	struct epoch_stats stats;
	struct store_stats space;
	struct err e = {0};
	double seconds = run_epoch(&s->run, v->ram, v->pages, v->nr, &stats);

	run_check(store_get_stats(s->run.store, &space, &e), &e);
	s->bytes = space.bytes_used + space.bytes_index;
	return seconds;
}

static double ours_back(struct subject *s, const uint8_t *ram)
{
	/* The memory is there before the clock starts: /dev/null needs none either. */
	uint8_t *to = mmap(NULL, (size_t)NR_PAGES * IMAGE_PAGE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	struct store_timeline tl;
	struct err e = {0};
	double seconds;

	if (to == MAP_FAILED)
		bench_die("no memory");
	run_check(store_timeline_get(s->run.store, s->run.timeline, &tl, &e), &e);
	seconds = run_restore(&s->run, (struct snapd_point){tl.id, tl.head}, to, NR_PAGES);
	if (memcmp(to, ram, (size_t)NR_PAGES * IMAGE_PAGE))
		bench_die("%s: other bytes came back", s->name);
	munmap(to, (size_t)NR_PAGES * IMAGE_PAGE);
	store_run_deinit(&s->run);
	return seconds;
}

/* ---- restic ---- */

static void restic_init(struct subject *s)
{
	char cache[4128];

	snprintf(cache, sizeof(cache), "%s/restic-cache", dir);
	setenv("RESTIC_PASSWORD", "x", 1);
	setenv("RESTIC_CACHE_DIR", cache, 1);
	command("restic -q -r %s/restic init >/dev/null", dir);
}

static double restic_add(struct subject *s, const struct version *v)
{
	double seconds = command("restic -q -r %s/restic backup %s/image >/dev/null", dir, dir);

	s->bytes = bytes_below("restic");
	return seconds;
}

static double restic_back(struct subject *s, const uint8_t *ram)
{
	return command("restic -q -r %s/restic dump latest %s/image >/dev/null", dir, dir);
}

/* ---- borg ---- */

static void borg_init(struct subject *s)
{
	setenv("BORG_BASE_DIR", dir, 1);
	setenv("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes", 1);
	command("borg init -e none %s/%s", dir, s->name);
}

static double borg_add(struct subject *s, const struct version *v)
{
	double seconds = command("borg create %s %s/%s::v%u %s/image", s->option, dir, s->name,
				 v->number, dir);

	s->bytes = bytes_below(s->name);
	return seconds;
}

static double borg_back(struct subject *s, const uint8_t *ram)
{
	return command("cd %s && borg extract --stdout %s/%s::$(borg list --short --last 1 %s/%s) "
		       ">/dev/null",
		       dir, dir, s->name, dir, s->name);
}

/* ---- qcow2 overlays ---- */

static void qcow2_init(struct subject *s)
{
	command("mkdir %s/qcow2 %s/qcow2-pages", dir, dir);
}

/* A file of each page, and the commands that write them. */
static void qcow2_pages(const struct version *v)
{
	char path[4160];
	FILE *script;

	snprintf(path, sizeof(path), "%s/qcow2-pages/script", dir);
	script = fopen(path, "we");
	for (uint32_t i = 0; script && i < v->nr; i++) {
		uint64_t at = (uint64_t)v->pages[i] * IMAGE_PAGE;
		FILE *f;

		snprintf(path, sizeof(path), "%s/qcow2-pages/%u", dir, i);
		f = fopen(path, "we");
		if (!f || fwrite(v->ram + at, IMAGE_PAGE, 1, f) != 1 || fclose(f))
			bench_die("%s: %s", path, strerror(errno));
		fprintf(script, "write -q -s %s %llu %u\n", path, (unsigned long long)at,
			IMAGE_PAGE);
	}
	if (!script || fprintf(script, "flush\nquit\n") < 0 || fclose(script))
		bench_die("%s: %s", path, strerror(errno));
}

static double qcow2_add(struct subject *s, const struct version *v)
{
	double seconds;

	if (!v->number) {
		seconds = command("qemu-img convert -f raw -O qcow2 -o cluster_size=4096 %s/image "
				  "%s/qcow2/0 >/dev/null && sync %s/qcow2/0",
				  dir, dir, dir);
	} else {
		qcow2_pages(v);
		seconds = command("qemu-img create -q -f qcow2 -o cluster_size=4096 -F qcow2 "
				  "-b %s/qcow2/%u %s/qcow2/%u && qemu-io -f qcow2 %s/qcow2/%u "
				  "<%s/qcow2-pages/script >/dev/null && sync %s/qcow2/%u",
				  dir, v->number - 1, dir, v->number, dir, v->number, dir, dir,
				  v->number);
	}
	s->bytes = bytes_below("qcow2");
	return seconds;
}

/* ---- all of them ---- */

enum { OURS, OURS_ZSTD, OURS_NONE, RESTIC, BORG, BORG_4K, QCOW2, NR_SUBJECTS };

static struct subject subjects[NR_SUBJECTS] = {
	[OURS] = {"ours", NULL, "lz4", ours_init, ours_add, ours_back},
	[OURS_ZSTD] = {"ours-zstd", NULL, "zstd", ours_init, ours_add, ours_back},
	[OURS_NONE] = {"ours-none", NULL, "none", ours_init, ours_add, ours_back},
	[RESTIC] = {"restic", "restic", NULL, restic_init, restic_add, restic_back},
	[BORG] = {"borg", "borg", "", borg_init, borg_add, borg_back},
	[BORG_4K] = {"borg-4k", "borg", "--chunker-params fixed,4096", borg_init, borg_add,
		     borg_back},
	[QCOW2] = {"qcow2", "qemu-io", NULL, qcow2_init, qcow2_add, NULL},
};

static bool is_wanted(const char *name)
{
	const char *env = getenv("SNAPD_BENCH_PEERS");
	char list[256], want[64];

	if (!env)
		return true;
	snprintf(list, sizeof(list), " %s ", env);
	snprintf(want, sizeof(want), " %s ", name);
	return strstr(list, want);
}

static void wait_at_gate(void)
{
	const char *gate = getenv("SNAPD_BENCH_GATE");

	if (gate && system(gate))
		bench_die("failed: %s", gate);
}

static void add_version(const struct version *v)
{
	printf("  version %u:", v->number);
	for (int i = 0; i < NR_SUBJECTS; i++) {
		struct subject *s = &subjects[i];
		double seconds;

		if (!s->here)
			continue;
		wait_at_gate();
		seconds = s->add(s, v);
		s->seconds += seconds;
		printf(" %s %.3f s", s->name, seconds);
		fflush(stdout);
		if (v->number)
			continue;
		s->base_seconds = seconds;
		s->base_bytes = s->bytes;
	}
	printf("\n");
}

static uint8_t *map_image(void)
{
	size_t len = (size_t)NR_PAGES * IMAGE_PAGE;
	_cleanup_fd_ int fd = -1;
	char path[4128];
	uint8_t *ram;

	snprintf(path, sizeof(path), "%s/image", dir);
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, (off_t)len))
		bench_die("%s: %s", path, strerror(errno));
	ram = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (ram == MAP_FAILED)
		bench_die("%s: %s", path, strerror(errno));
	image_base(ram, NR_PAGES, SEED);
	return ram;
}

static void run_series(uint8_t *ram, uint32_t nr_epochs)
{
	struct version v = {.ram = ram, .nr = NR_PAGES};

	add_version(&v);
	for (uint32_t i = 1; i <= nr_epochs; i++) {
		uint32_t *pages = image_epoch(ram, NR_PAGES, SEED, i, &v.nr);

		msync(ram, (size_t)NR_PAGES * IMAGE_PAGE, MS_SYNC);
		v.number = i;
		v.pages = pages;
		add_version(&v);
		free(pages);
	}
	sync(); /* what the peers left to be written is not the restores' load */
	for (int i = 0; i < NR_SUBJECTS; i++) {
		struct subject *s = &subjects[i];

		if (!s->here || !s->back)
			continue;
		wait_at_gate();
		s->back_seconds = s->back(s, ram);
	}
}

static void report(uint32_t nr_epochs)
{
	if (nr_epochs != WHOLE)
		bench_note("ratios of time and bytes are for %d epochs, each like the %u measured",
			   WHOLE, nr_epochs);
	bench_note("version 0 and %u epochs of 1 %%; restic and borg scan the image, ours and "
		   "qcow2 are handed the dirty pages",
		   nr_epochs);
	for (int i = 0; i < NR_SUBJECTS; i++) {
		const struct subject *s = &subjects[i];
		double each = (s->seconds - s->base_seconds) / nr_epochs;

		if (!s->here)
			bench_note("%-10s NOT MEASURED: %s", s->name,
				   is_wanted(s->name) ? "not installed" : "not asked for");
		else
			bench_note("%-10s %8.2f s in all, %7.2f ms an epoch, %7.1f MB, back %.2f s",
				   s->name, s->seconds, 1e3 * each, (double)s->bytes / 1e6,
				   s->back_seconds);
	}
}

static void ratio(const char *what, const struct subject *peer, double value, enum bench_goal goal,
		  double bound)
{
	char name[64];

	snprintf(name, sizeof(name), "series %s", what);
	if (peer->here)
		bench_ratio(name, value, goal, bound);
}

/* Version 0 and WHOLE epochs, from those that were measured. */
static double time_of(const struct subject *s, uint32_t nr_epochs)
{
	return s->base_seconds + (s->seconds - s->base_seconds) / nr_epochs * WHOLE;
}

static double bytes_of(const struct subject *s, uint32_t nr_epochs)
{
	return (double)s->base_bytes +
	       ((double)s->bytes - (double)s->base_bytes) / nr_epochs * WHOLE;
}

static void judge(uint32_t nr_epochs)
{
	const struct subject *ours = &subjects[OURS];
	double best = 0;

	for (int i = RESTIC; i < NR_SUBJECTS; i++)
		if (subjects[i].here && (!best || bytes_of(&subjects[i], nr_epochs) < best))
			best = bytes_of(&subjects[i], nr_epochs);
#define TIMES(peer) (time_of(&subjects[peer], nr_epochs) / time_of(ours, nr_epochs))
	ratio("time, restic", &subjects[RESTIC], TIMES(RESTIC), BENCH_AT_LEAST, 60);
	ratio("time, borg", &subjects[BORG], TIMES(BORG), BENCH_AT_LEAST, 60);
	ratio("time, borg 4k", &subjects[BORG_4K], TIMES(BORG_4K), BENCH_AT_LEAST, 60);
	ratio("time, qcow2", &subjects[QCOW2], TIMES(QCOW2), BENCH_AT_LEAST, 10);
#undef TIMES
	if (!best)
		return;
	bench_ratio("series bytes, lz4", bytes_of(ours, nr_epochs) / best, BENCH_AT_MOST, 0.65);
	bench_ratio("series bytes, zstd", bytes_of(&subjects[OURS_ZSTD], nr_epochs) / best,
		    BENCH_AT_MOST, 0.55);
	ratio("back, restic", &subjects[RESTIC], subjects[RESTIC].back_seconds / ours->back_seconds,
	      BENCH_AT_LEAST, 5);
}

int main(void)
{
	const char *env = getenv("SNAPD_BENCH_EPOCHS");
	uint32_t nr_epochs = env ? (uint32_t)strtoul(env, NULL, 10) : 4;
	uint8_t *ram;

	if (!nr_epochs || nr_epochs > EPOCHS_MAX)
		bench_die("SNAPD_BENCH_EPOCHS: 1 to %u", EPOCHS_MAX);
	if (pool_create(0, &pool))
		bench_die("no memory");
	dir = run_dir("series");
	for (int i = 0; i < NR_SUBJECTS; i++) {
		struct subject *s = &subjects[i];

		s->here = !s->program || (is_wanted(s->name) && has_program(s->program));
		if (s->here)
			s->init(s);
	}
	ram = map_image();
	run_series(ram, nr_epochs);
	bench_note("fingerprint of the last version %016llx",
		   (unsigned long long)image_fingerprint(ram, NR_PAGES));
	report(nr_epochs);
	judge(nr_epochs);
	pool_destroy(pool);
	return 0;
}
