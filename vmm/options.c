/* SPDX-License-Identifier: MIT */
/* options: argv → struct options; every value is checked here and nowhere else. */
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "vmm/options.h"

const char *const punch_names[PUNCH_NR_PATTERNS] = {"hole", "resize", "newid",	      "merge",
						    "move", "alias",  "otherbacking", "remove"};
const char *const tracking_names[TRACK_NR] = {
	"auto", "ring", "log", "log-initially-set", "log-get-clears", "pagemap"};
const char *const workload_names[GUEST_NR_WORKLOADS] = {"sequential", "random", "hotcold", "mix"};
const char *const backing_names[RAM_NR_BACKINGS] = {"memfd", "shm", "hugetlb"};

static const char help_text[] =
	"usage: snapvm [OPTION]...\n"
	"Run a test guest whose memory snapd can snapshot.\n"
	"\n"
	"guest    --mem SIZE        main memory, e.g. 64M, 4G (default 64M)\n"
	"         --dimm SIZE       memory that --punch-pattern remove unplugs (default 0)\n"
	"         --backing B       memfd, shm, hugetlb: the file behind memory (default memfd)\n"
	"         --vcpus N         1..64 (default 2)\n"
	"         --workload W      sequential, random, hotcold, mix (default mix)\n"
	"         --hot N           hot pages, of all vCPUs together (default 1000)\n"
	"         --hot-percent P   of the writes that go to them (default 90)\n"
	"         --plain           bare writes: nothing is stamped, nothing verified\n"
	"         --rate N          writes per second and vCPU (default: no limit)\n"
	"         --writes N        end after N writes per vCPU\n"
	"         --seed N          of all random choices (default: from the system)\n"
	"memslots --punch RATE      changes per second\n"
	"         --punch-pattern P[,P]...  hole resize newid merge move alias otherbacking "
	"remove\n"
	"                           mix: the first six; all (default hole)\n"
	"         --punch-mode M    running or paused vCPUs (default running)\n"
	"device   --device RATE     a device writes RATE pages per second\n"
	"         --vhost RATE      likewise, a back end that logs what it writes\n"
	"         --disk RATE       pages read with O_DIRECT, as a disk's back end does\n"
	"         --balloon RATE    pages given back to the host and taken again\n"
	"kvm      --accel A         kvm or sim (default kvm)\n"
	"         --dirty B         auto, ring, log, log-initially-set, log-get-clears,\n"
	"                           pagemap: how written pages are found (default auto)\n"
	"         --track-host      find what the device writes, rather than mark it\n"
	"         --ring N          dirty ring entries per vCPU (default: the most there are)\n"
	"         --harvest-us N    slowest harvest interval (default: the agent's)\n"
	"         --mirror N        every N ms, copy what is dirty; at times compare it all\n"
	"         --smm N           with --accel sim: every Nth step sees address space 1\n"
	"         --lockstep        with --accel sim: nothing moves but on request, and one at a\n"
	"                           time; each line on stdin says how many moves (see lockstep.c)\n"
	"         --epoch-ms N      look at dirty pages every N ms, as a display would\n"
	"         --no-log          no dirty logging at all, for comparing speed\n"
	"snapd    --name NAME       of the VM (default vm-PID)\n"
	"         --socket PATH     of the service (default $SNAPD_AGENT_SOCKET)\n"
	"         --require-service fail when it is not there\n"
	"         --restore SNAP    start from a snapshot\n"
	"         --digest          leave a SHA-256 of all RAM in each snapshot\n"
	"other    --duration SEC    end after that time (default: at SIGTERM or SIGINT)\n"
	"         --status FILE     rewrite FILE with the state as JSON, 5 times a second\n"
	"         --run-dir DIR     DIR/NAME.pid, and --status DIR/NAME.json\n"
	"         --json, --quiet   form of the last line on stdout\n"
	"         --help, --version\n"
	"\n"
	"Exit status: 0 the guest found its memory right; 1 it did not, or the VM failed;\n"
	"2 usage; 77 no KVM on this host.\n";

enum option_id {
	OPT_MEM = 256,
	OPT_DIMM,
	OPT_BACKING,
	OPT_VCPUS,
	OPT_WORKLOAD,
	OPT_HOT,
	OPT_HOT_PERCENT,
	OPT_RATE,
	OPT_WRITES,
	OPT_SEED,
	OPT_PUNCH,
	OPT_PUNCH_PATTERN,
	OPT_PUNCH_MODE,
	OPT_DEVICE,
	OPT_ACCEL,
	OPT_DIRTY,
	OPT_TRACK_HOST,
	OPT_RING,
	OPT_HARVEST,
	OPT_EPOCH,
	OPT_VHOST,
	OPT_DISK,
	OPT_BALLOON,
	OPT_MIRROR,
	OPT_SMM,
	OPT_LOCKSTEP,
	OPT_PLAIN,
	OPT_NO_LOG,
	OPT_NAME,
	OPT_SOCKET,
	OPT_REQUIRE,
	OPT_RESTORE,
	OPT_DIGEST,
	OPT_DURATION,
	OPT_STATUS,
	OPT_RUN_DIR,
	OPT_JSON,
	OPT_QUIET,
	OPT_HELP,
	OPT_VERSION,
};

static const struct option long_options[] = {
	{"mem", required_argument, NULL, OPT_MEM},
	{"dimm", required_argument, NULL, OPT_DIMM},
	{"backing", required_argument, NULL, OPT_BACKING},
	{"vcpus", required_argument, NULL, OPT_VCPUS},
	{"workload", required_argument, NULL, OPT_WORKLOAD},
	{"hot", required_argument, NULL, OPT_HOT},
	{"hot-percent", required_argument, NULL, OPT_HOT_PERCENT},
	{"rate", required_argument, NULL, OPT_RATE},
	{"writes", required_argument, NULL, OPT_WRITES},
	{"seed", required_argument, NULL, OPT_SEED},
	{"punch", required_argument, NULL, OPT_PUNCH},
	{"punch-pattern", required_argument, NULL, OPT_PUNCH_PATTERN},
	{"punch-mode", required_argument, NULL, OPT_PUNCH_MODE},
	{"device", required_argument, NULL, OPT_DEVICE},
	{"accel", required_argument, NULL, OPT_ACCEL},
	{"dirty", required_argument, NULL, OPT_DIRTY},
	{"track-host", no_argument, NULL, OPT_TRACK_HOST},
	{"ring", required_argument, NULL, OPT_RING},
	{"harvest-us", required_argument, NULL, OPT_HARVEST},
	{"vhost", required_argument, NULL, OPT_VHOST},
	{"disk", required_argument, NULL, OPT_DISK},
	{"balloon", required_argument, NULL, OPT_BALLOON},
	{"mirror", required_argument, NULL, OPT_MIRROR},
	{"smm", required_argument, NULL, OPT_SMM},
	{"lockstep", no_argument, NULL, OPT_LOCKSTEP},
	{"epoch-ms", required_argument, NULL, OPT_EPOCH},
	{"plain", no_argument, NULL, OPT_PLAIN},
	{"no-log", no_argument, NULL, OPT_NO_LOG},
	{"name", required_argument, NULL, OPT_NAME},
	{"socket", required_argument, NULL, OPT_SOCKET},
	{"require-service", no_argument, NULL, OPT_REQUIRE},
	{"restore", required_argument, NULL, OPT_RESTORE},
	{"digest", no_argument, NULL, OPT_DIGEST},
	{"duration", required_argument, NULL, OPT_DURATION},
	{"status", required_argument, NULL, OPT_STATUS},
	{"run-dir", required_argument, NULL, OPT_RUN_DIR},
	{"json", no_argument, NULL, OPT_JSON},
	{"quiet", no_argument, NULL, OPT_QUIET},
	{"help", no_argument, NULL, OPT_HELP},
	{"version", no_argument, NULL, OPT_VERSION},
	{0},
};

static int bad(const char *option, const char *value, const char *want)
{
	fprintf(stderr, "snapvm: --%s %s: want %s\n", option, value, want);
	return -EINVAL;
}

static int parse_u64(const char *option, const char *s, uint64_t min, uint64_t max, uint64_t *ret)
{
	char want[64], *end;
	unsigned long long v;

	errno = 0;
	v = strtoull(s, &end, 0);
	if (errno || end == s || *end || *s == '-' || v < min || v > max) {
		snprintf(want, sizeof(want), "a number from %llu to %llu", (unsigned long long)min,
			 (unsigned long long)max);
		return bad(option, s, want);
	}
	*ret = v;
	return 0;
}

static int parse_u32(const char *option, const char *s, uint32_t min, uint32_t max, uint32_t *ret)
{
	uint64_t v;
	int rc = parse_u64(option, s, min, max, &v);

	if (rc == 0)
		*ret = (uint32_t)v;
	return rc;
}

/* Sizes are whole multiples of 2 MiB, so that they fit any page size of a file. */
static int parse_size(const char *option, const char *s, uint64_t min, uint64_t *ret)
{
	const uint64_t unit = 2ull << 20, max = 60 * GUEST_GIB;
	static const char suffixes[] = "KMG";
	const char *suffix;
	unsigned long long v;
	char *end;
	int shift = 0;

	errno = 0;
	v = strtoull(s, &end, 0);
	suffix = *end ? strchr(suffixes, *end & ~0x20) : NULL;
	if (suffix) {
		shift = 10 * (int)(suffix - suffixes + 1);
		end++;
	}
	if (errno || end == s || *end || *s == '-' || v > max >> shift || v << shift < min ||
	    (v << shift) % unit)
		return bad(option, s, "a multiple of 2M, at most 60G");
	*ret = v << shift;
	return 0;
}

static int parse_double(const char *option, const char *s, double max, double *ret)
{
	char *end;
	double v;

	errno = 0;
	v = strtod(s, &end);
	if (errno || end == s || *end || !isfinite(v) || v < 0 || v > max)
		return bad(option, s, "a number that is not negative, nor absurdly large");
	*ret = v;
	return 0;
}

static int parse_name(const char *const *names, int nr, const char *s, size_t len)
{
	int i;

	for (i = 0; i < nr; i++)
		if (strlen(names[i]) == len && !strncmp(names[i], s, len))
			return i;
	return -1;
}

static int parse_patterns(const char *s, uint32_t *ret)
{
	uint32_t mask = 0;
	const char *p = s;
	size_t len;
	int i;

	do {
		len = strcspn(p, ",");
		i = parse_name(punch_names, PUNCH_NR_PATTERNS, p, len);
		if (i >= 0)
			mask |= 1u << i;
		else if (len == 3 && !strncmp(p, "mix", 3))
			mask |= (1u << PUNCH_OTHERBACKING) - 1;
		else if (len == 3 && !strncmp(p, "all", 3))
			mask |= (1u << PUNCH_NR_PATTERNS) - 1;
		else
			return bad("punch-pattern", s,
				   "hole, resize, newid, merge, move, alias, otherbacking, remove, "
				   "mix or "
				   "all");
		p += len;
	} while (*p++);
	*ret = mask;
	return 0;
}

static int parse_tracking(const char *s, enum tracking *ret)
{
	int i = parse_name(tracking_names, TRACK_NR, s, strlen(s));

	if (i < 0)
		return bad("dirty", s,
			   "auto, ring, log, log-initially-set, log-get-clears or pagemap");
	*ret = (enum tracking)i;
	return 0;
}

static int parse_choice(const char *option, const char *s, const char *a, const char *b, bool *ret)
{
	char want[32];

	if (strcmp(s, a) != 0 && strcmp(s, b) != 0) {
		snprintf(want, sizeof(want), "%s or %s", a, b);
		return bad(option, s, want);
	}
	*ret = strcmp(s, b) == 0;
	return 0;
}

static int parse_guest_option(struct options *opt, int c)
{
	int w;

	switch (c) {
	case OPT_MEM:
		return parse_size("mem", optarg, 2 << 20, &opt->mem_bytes);
	case OPT_DIMM:
		return parse_size("dimm", optarg, 0, &opt->dimm_bytes);
	case OPT_BACKING:
		w = parse_name(backing_names, RAM_NR_BACKINGS, optarg, strlen(optarg));
		if (w < 0)
			return bad("backing", optarg, "memfd, shm or hugetlb");
		opt->backing = (enum ram_backing)w;
		return 0;
	case OPT_VCPUS:
		return parse_u32("vcpus", optarg, 1, GUEST_MAX_VCPUS, &opt->nr_vcpus);
	case OPT_WORKLOAD:
		w = parse_name(workload_names, GUEST_NR_WORKLOADS, optarg, strlen(optarg));
		if (w < 0)
			return bad("workload", optarg, "sequential, random, hotcold or mix");
		opt->workload = (enum guest_workload)w;
		return 0;
	case OPT_HOT:
		return parse_u64("hot", optarg, 1, 1ull << 24, &opt->hot_pages);
	case OPT_HOT_PERCENT:
		return parse_u32("hot-percent", optarg, 0, 100, &opt->hot_percent);
	case OPT_RATE:
		return parse_u64("rate", optarg, 0, 1000000000, &opt->rate);
	case OPT_WRITES:
		return parse_u64("writes", optarg, 0, UINT64_MAX, &opt->max_writes);
	case OPT_SEED:
		return parse_u64("seed", optarg, 0, UINT64_MAX, &opt->seed);
	default:
		return 1;
	}
}

static int parse_vmm_option(struct options *opt, int c)
{
	switch (c) {
	case OPT_PUNCH:
		return parse_double("punch", optarg, 1e6, &opt->punch_rate);
	case OPT_PUNCH_PATTERN:
		return parse_patterns(optarg, &opt->punch_patterns);
	case OPT_PUNCH_MODE:
		return parse_choice("punch-mode", optarg, "running", "paused", &opt->punch_paused);
	case OPT_DEVICE:
		return parse_double("device", optarg, 1e6, &opt->device_rate);
	case OPT_ACCEL:
		return parse_choice("accel", optarg, "kvm", "sim", &opt->sim);
	case OPT_DIRTY:
		return parse_tracking(optarg, &opt->tracking);
	case OPT_RING:
		return parse_u32("ring", optarg, 256, 65536, &opt->ring_entries);
	case OPT_HARVEST:
		return parse_u32("harvest-us", optarg, 1, 60000000, &opt->harvest_us);
	case OPT_VHOST:
		return parse_double("vhost", optarg, 1e6, &opt->vhost_rate);
	case OPT_DISK:
		return parse_double("disk", optarg, 1e6, &opt->disk_rate);
	case OPT_BALLOON:
		return parse_double("balloon", optarg, 1e6, &opt->balloon_rate);
	case OPT_MIRROR:
		return parse_u32("mirror", optarg, 0, 3600000, &opt->mirror_ms);
	case OPT_SMM:
		return parse_u32("smm", optarg, 0, 1000000, &opt->smm);
	case OPT_EPOCH:
		return parse_u32("epoch-ms", optarg, 0, 3600000, &opt->epoch_ms);
	case OPT_DURATION:
		return parse_double("duration", optarg, 1e9, &opt->duration_s);
	default:
		return 1;
	}
}

static int parse_plain_option(struct options *opt, int c)
{
	switch (c) {
	case OPT_PLAIN:
		opt->plain = true;
		return 0;
	case OPT_TRACK_HOST:
		opt->track_host = true;
		return 0;
	case OPT_NO_LOG:
		opt->no_log = true;
		return 0;
	case OPT_LOCKSTEP:
		opt->lockstep = true;
		return 0;
	case OPT_NAME:
		opt->name = optarg;
		return 0;
	case OPT_SOCKET:
		opt->socket = optarg;
		return 0;
	case OPT_REQUIRE:
		opt->require_service = true;
		return 0;
	case OPT_RESTORE:
		opt->restore = optarg;
		return 0;
	case OPT_DIGEST:
		opt->digest = true;
		return 0;
	case OPT_STATUS:
		opt->status = optarg;
		return 0;
	case OPT_RUN_DIR:
		opt->run_dir = optarg;
		return 0;
	case OPT_JSON:
		opt->json = true;
		return 0;
	case OPT_QUIET:
		opt->quiet = true;
		return 0;
	default:
		fprintf(stderr, "Try 'snapvm --help'.\n");
		return -EINVAL;
	}
}

static int options_check(struct options *opt)
{
	if (opt->mem_bytes + opt->dimm_bytes > 60 * GUEST_GIB) {
		fprintf(stderr, "snapvm: --mem and --dimm: more than 60G together\n");
		return -EINVAL;
	}
	if (opt->punch_patterns & 1u << PUNCH_REMOVE && !opt->dimm_bytes) {
		fprintf(stderr, "snapvm: --punch-pattern remove needs --dimm SIZE\n");
		return -EINVAL;
	}
	if (opt->sim && opt->tracking > TRACK_RING) {
		fprintf(stderr, "snapvm: --dirty %s: the simulated KVM has rings only\n",
			tracking_names[opt->tracking]);
		return -EINVAL;
	}
	if (opt->smm &&
	    (!opt->sim || opt->dimm_bytes || opt->punch_patterns & 1u << PUNCH_OTHERBACKING)) {
		fprintf(stderr,
			"snapvm: --smm needs --accel sim, without --dimm and otherbacking\n");
		return -EINVAL;
	}
	if (opt->lockstep && (!opt->sim || opt->rate || opt->max_writes)) {
		fprintf(stderr, "snapvm: --lockstep needs --accel sim, without --rate, --writes\n");
		return -EINVAL;
	}
	if (opt->balloon_rate > 0 && opt->backing == RAM_HUGETLB) {
		fprintf(stderr, "snapvm: --balloon: a page of hugetlbfs is not one to give back\n");
		return -EINVAL;
	}
	if (opt->ring_entries & (opt->ring_entries - 1)) {
		fprintf(stderr, "snapvm: --ring %u: want a power of two\n", opt->ring_entries);
		return -EINVAL;
	}
	return 0;
}

/* `snapctl restore` runs a recorded command line again: what it gives in the
 * environment then goes before the options. */
static void options_of_restore(struct options *opt)
{
	if (!getenv("SNAPD_RESTORE"))
		return;
	opt->restore = NULL;
	if (getenv("SNAPD_VM_NAME"))
		opt->name = getenv("SNAPD_VM_NAME");
	if (getenv("SNAPD_AGENT_SOCKET"))
		opt->socket = NULL;
}

int options_parse(struct options *opt, int argc, char **argv)
{
	int c, rc;

	*opt = (struct options){.mem_bytes = 64 << 20,
				.nr_vcpus = 2,
				.workload = GUEST_MIX,
				.hot_pages = 1000,
				.hot_percent = 90,
				.punch_patterns = 1u << PUNCH_HOLE};
	if (getrandom(&opt->seed, sizeof(opt->seed), 0) != sizeof(opt->seed))
		opt->seed = 1;
	opt->seed &= 0xffffffff; /* short enough to be typed again */
	while ((c = getopt_long(argc, argv, "", long_options, NULL)) != -1) {
		if (c == OPT_HELP || c == OPT_VERSION) {
			fputs(c == OPT_HELP ? help_text : "snapvm " SNAPD_VERSION "\n", stdout);
			return 1;
		}
		rc = parse_guest_option(opt, c);
		if (rc == 1)
			rc = parse_vmm_option(opt, c);
		if (rc == 1)
			rc = parse_plain_option(opt, c);
		if (rc < 0)
			return rc;
	}
	if (optind < argc) {
		fprintf(stderr, "snapvm: what is '%s'?\n", argv[optind]);
		return -EINVAL;
	}
	options_of_restore(opt);
	return options_check(opt);
}
