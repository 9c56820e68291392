/* SPDX-License-Identifier: MIT */
/*
 * snapd-qemu: starts QEMU under the adapter: completes the command line (cmdline.h), makes the
 * monitor's socket pair, sets the environment (env.h), and becomes QEMU.
 */
#include <assert.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "adapters/qemu/cmdline.h"
#include "adapters/qemu/env.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/shell.h"

#define EXIT_USAGE 2
#define LIBRARY	   "libsnapd-qemu.so"
#define LIST_MAX   32

static const char usage_text[] =
	"usage: snapd-qemu [OPTIONS] -- QEMU [ARGUMENTS...]\n"
	"  starts QEMU so that snapd can snapshot it\n"
	"\n"
	"  --vm NAME             name of the VM (else $SNAPD_VM_NAME, else that of -name)\n"
	"  --socket PATH         snapd's socket for agents (else $SNAPD_AGENT_SOCKET)\n"
	"  --restore SNAP        become this snapshot in place of booting (else $SNAPD_RESTORE)\n"
	"  --recorded            the command line is that of a QEMU that was: descriptors that it\n"
	"                        names are gone\n"
	"  --force               --restore: also from another QEMU version, machine or CPU\n"
	"  --disk OLD=NEW        use NEW where the command line has the disk image OLD\n"
	"  --mac OLD=NEW         likewise for a network card's address\n"
	"  --print               show the command, do not run it\n"
	"  --version, --help\n";

struct options {
	struct cmdline_request req;
	struct replacement disks[LIST_MAX], macs[LIST_MAX];
	const char *vm, *socket, *restore;
	bool force, print;
};

static int fail(int code, const char *text)
{
	fprintf(stderr, "snapd-qemu: %s\n", text);
	return code;
}

static int add_replacement(struct replacement *list, size_t *nr, char *text)
{
	char *eq = strchr(text, '=');

	if (!eq || eq == text || !eq[1] || *nr == LIST_MAX)
		return fail(EXIT_USAGE, "--disk and --mac take OLD=NEW, at most 32 times each");
	*eq = '\0';
	list[(*nr)++] = (struct replacement){.from = text, .to = eq + 1};
	return 0;
}

/* 0: go on; else exit with *status. */
static int parse(int argc, char **argv, struct options *o, int *status)
{
	static const struct option longs[] = {
		{"vm", required_argument, NULL, 'v'},
		{"socket", required_argument, NULL, 's'},
		{"restore", required_argument, NULL, 'r'},
		{"force", no_argument, NULL, 'f'},
		{"recorded", no_argument, NULL, 'R'},
		{"disk", required_argument, NULL, 'd'},
		{"mac", required_argument, NULL, 'm'},
		{"print", no_argument, NULL, 'p'},
		{"version", no_argument, NULL, 'V'},
		{"help", no_argument, NULL, 'h'},
		{NULL},
	};
	int c;

	*status = EXIT_USAGE;
	while ((c = getopt_long(argc, argv, "+h", longs, NULL)) != -1) {
		int rc = 0;

		switch (c) {
		case 'v':
			o->vm = optarg;
			break;
		case 's':
			o->socket = optarg;
			break;
		case 'r':
			o->restore = optarg;
			break;
		case 'f':
			o->force = true;
			break;
		case 'R':
			o->req.recorded = true;
			break;
		case 'd':
			rc = add_replacement(o->disks, &o->req.nr_disks, optarg);
			break;
		case 'm':
			rc = add_replacement(o->macs, &o->req.nr_macs, optarg);
			break;
		case 'p':
			o->print = true;
			break;
		case 'V':
			puts("snapd-qemu " SNAPD_VERSION);
			*status = 0;
			return 1;
		case 'h':
			fputs(usage_text, stdout);
			*status = 0;
			return 1;
		default:
			return 1;
		}
		if (rc)
			return 1;
	}
	if (argv[optind])
		return 0;
	fail(0, "no QEMU given: see --help");
	return 1;
}

/* ---- the environment ---- */

static void set(const char *name, const char *value)
{
	if (value && setenv(name, value, 1))
		abort();
}

static const char *non_empty(const char *name)
{
	const char *value = getenv(name);

	return value && *value ? value : NULL;
}

/* Installed, or beside this program in a build directory. */
static char *find_library(void)
{
	const char *given = non_empty("SNAPD_QEMU_LIBRARY");
	char self[4096], *path = NULL, *slash;
	ssize_t n;

	if (given)
		return strdup(given);
	n = readlink("/proc/self/exe", self, sizeof(self) - 1);
	if (n > 0) {
		self[n] = '\0';
		slash = strrchr(self, '/');
		if (asprintf(&path, "%.*s/" LIBRARY, (int)(slash - self), self) < 0)
			abort();
		if (!access(path, R_OK))
			return path;
		free(path);
	}
	return strdup(SNAPD_QEMU_LIBDIR "/" LIBRARY);
}

static int set_preload(void)
{
	_cleanup_free_ char *library = find_library(), *all = NULL;
	const char *old = non_empty("LD_PRELOAD");

	if (!library || access(library, R_OK)) {
		fprintf(stderr, "snapd-qemu: %s: %s\n", library ? library : LIBRARY,
			strerror(errno));
		return -1;
	}
	if (asprintf(&all, "%s%s%s", library, old ? ":" : "", old ? old : "") < 0)
		abort();
	set("LD_PRELOAD", all);
	return 0;
}

/* Both ends go to QEMU: see env.h. */
static int make_monitor(int pair[2])
{
	char fd[32];

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) {
		perror("snapd-qemu: monitor");
		return -1;
	}
	snprintf(fd, sizeof(fd), "fd:%d", pair[1]);
	set(SNAPD_QEMU_ENV_QMP, fd);
	return 0;
}

static void set_environment(const struct options *o, const struct cmdline *c)
{
	const char *name = o->vm ? o->vm : non_empty("SNAPD_VM_NAME");

	set("SNAPD_VM_NAME", name ? name : c->guest);
	set("SNAPD_AGENT_SOCKET", o->socket);
	set("SNAPD_RESTORE", o->restore);
	if (o->force)
		set(SNAPD_QEMU_ENV_ANY, "1");
}

/* ---- running ---- */

static int print_command(const struct cmdline *c)
{
	static const char *const env[] = {"LD_PRELOAD", "SNAPD_VM_NAME", "SNAPD_AGENT_SOCKET",
					  "SNAPD_RESTORE", SNAPD_QEMU_ENV_ANY};

	shell_print_command(stdout, env, ARRAY_SIZE(env), c->argv.v);
	return 0;
}

static int become(char *const *argv)
{
	execvp(argv[0], argv);
	fprintf(stderr, "snapd-qemu: %s: %s\n", argv[0], strerror(errno));
	return 127;
}

int main(int argc, char **argv)
{
	struct options o = {.req.monitor_fd = -1};
	struct cmdline c;
	struct err e = {0};
	int pair[2], status, rc;

	o.req.disks = o.disks;
	o.req.macs = o.macs;
	if (parse(argc, argv, &o, &status))
		return status;
	if (!o.restore)
		o.restore = non_empty("SNAPD_RESTORE");
	o.req.restore = o.restore != NULL;
	if (make_monitor(pair))
		return 1;
	o.req.monitor_fd = pair[0];
	rc = cmdline_complete(&o.req, &argv[optind], &c, &e);
	if (rc == CMDLINE_PASS) {
		unsetenv(SNAPD_QEMU_ENV_QMP);
		close(pair[0]);
		close(pair[1]);
		return become(&argv[optind]);
	}
	if (rc)
		return fail(EXIT_USAGE, e.text);
	for (size_t i = 0; i < c.notes.n; i++)
		fail(0, c.notes.v[i]);
	set_environment(&o, &c);
	if (set_preload())
		return 1;
	return o.print ? print_command(&c) : become(c.argv.v);
}
