/* SPDX-License-Identifier: MIT */
/*
 * verb_restore: becomes the VMM of a snapshot: the command line that it was taken under, or
 * one that is given, with what its agent needs to know in the environment.
 *
 * QEMU's command line comes out of the snapshot's state (record dev.qemu.info), where it is as
 * long as it was, and goes to snapd-qemu, which makes it one that waits for device state.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "snapd/util/shell.h"
#include "tools/client.h"
#include "tools/human.h"
#include "tools/out.h"
#include "tools/snapctl.h"

#define QEMU_INFO "dev.qemu.info" /* adapters/qemu/info.h */

/* Texts are borrowed, from JSON, the environment or constants. */
struct command {
	char **argv; /* owned; NULL-terminated */
	size_t n;
};

static void add(struct command *c, const char *text)
{
	c->argv = realloc(c->argv, (c->n + 2) * sizeof(*c->argv));
	if (!c->argv)
		abort();
	c->argv[c->n++] = (char *)text;
	c->argv[c->n] = NULL;
}

static void cleanup_command(struct command *c)
{
	free(c->argv);
}

static void add_all(struct command *c, const json_t *list)
{
	json_t *arg;
	size_t i;

	json_array_foreach(list, i, arg) add(c, json_string_value(arg));
}

/* ---- QEMU ---- */

/* What the snapshot's QEMU was; borrowed; NULL: it is of another VMM. */
static json_t *qemu_info(json_t *state)
{
	json_t *list = json_object_get(state, "records"), *rec, *info = NULL;
	size_t i;

	json_array_foreach(list, i, rec)
	{
		if (!strcmp(get_text(rec, "name"), QEMU_INFO))
			info = json_object_get(rec, "decoded");
	}
	return info;
}

/* Its command line; borrowed; NULL: there is none. */
static const json_t *qemu_argv(const json_t *info)
{
	json_t *argv = json_object_get(info, "argv"), *arg;
	size_t i;

	json_array_foreach(argv, i, arg)
	{
		if (!json_is_string(arg))
			return NULL;
	}
	return json_array_size(argv) ? argv : NULL;
}

static bool is_replaced(const char *file, const char *list)
{
	size_t len = strlen(file);

	for (const char *at = list; at; at = strchr(at, ',')) {
		at += *at == ',';
		if (!strncmp(at, file, len) && at[len] == '=')
			return true;
	}
	return false;
}

/* The guest goes on with memory of then: what it finds on a disk has to be of then, too. */
static void tell_disks(const json_t *info, const char *replaced)
{
	json_t *disks = json_object_get(info, "disks"), *disk;
	size_t i;

	json_array_foreach(disks, i, disk)
	{
		const char *file = get_text(disk, "file");

		if (!is_replaced(file, replaced))
			fprintf(stderr,
				"snapctl: %s is used as it is now (--disk %s=COPY for another)\n",
				file, file);
	}
}

/* "OLD=NEW,OLD=NEW" as one option each; cuts `list` up. */
static void add_each(struct command *c, const char *option, char *list)
{
	char *word;

	while (list && (word = strsep(&list, ","))) {
		add(c, option);
		add(c, word);
	}
}

static void qemu_command(const struct args *a, const json_t *argv, char *disks, char *macs,
			 struct command *c)
{
	const char *launcher = getenv("SNAPD_QEMU");

	add(c, launcher && *launcher ? launcher : "snapd-qemu");
	add(c, "--recorded");
	if (opt(a, "force"))
		add(c, "--force");
	add_each(c, "--disk", disks);
	add_each(c, "--mac", macs);
	add(c, "--");
	add_all(c, argv);
}

/* ---- running it ---- */

static int print_command(char **argv)
{
	static const char *const env[] = {"SNAPD_RESTORE", "SNAPD_VM_NAME", "SNAPD_AGENT_SOCKET"};

	assert(argv);
	shell_print_command(stdout, env, ARRAY_SIZE(env), argv);
	return EXIT_DONE;
}

/* The agent of the new VMM reads these. */
static int set_environment(const struct args *a, json_t *snapshot, const char *name)
{
	_cleanup_(cleanup_json) json_t *version = NULL;
	const char *agent = getenv("SNAPD_AGENT_SOCKET");
	char id[24];
	int rc;

	if (!agent || !*agent) {
		rc = call(a, "GET", NULL, &version, "/v1/version", NULL, NULL);
		if (rc)
			return rc;
		agent = get_text(version, "agent_socket");
	}
	text_u64(id, sizeof(id), get_u64(snapshot, "id"));
	if (setenv("SNAPD_RESTORE", id, 1) || setenv("SNAPD_VM_NAME", name, 1) ||
	    setenv("SNAPD_AGENT_SOCKET", agent, 1))
		return fail(EXIT_FAILED, "cannot set the environment: %s", strerror(errno));
	return 0;
}

static int only_for_qemu(const struct args *a)
{
	static const char *const names[] = {"disk", "mac", "force"};

	for (size_t i = 0; i < ARRAY_SIZE(names); i++)
		if (opt(a, names[i]))
			return fail(EXIT_USAGE,
				    "--%s is for a snapshot of QEMU, with its own command line",
				    names[i]);
	return 0;
}

/* The command given, or the one recorded.  `vm`, `state` and `lists` have to outlive it. */
static int make_command(const struct args *a, json_t *vm, json_t *state, char *disks, char *macs,
			struct command *c)
{
	const json_t *info = qemu_info(state), *qemu = qemu_argv(info);
	int rc;

	if (qemu && !(a->rest && *a->rest)) {
		tell_disks(info, opt(a, "disk"));
		qemu_command(a, qemu, disks, macs, c);
		return 0;
	}
	rc = only_for_qemu(a);
	if (rc)
		return rc;
	if (a->rest && *a->rest)
		for (char **arg = a->rest; *arg; arg++)
			add(c, *arg);
	else
		add_all(c, json_object_get(vm, "cmdline"));
	return c->n ? 0
		    : fail(EXIT_FAILED, "%s has no command line recorded: give one after --",
			   a->pos[0]);
}

static int become(const struct args *a, json_t *vm, char **argv)
{
	assert(argv); /* command() made it */
	if (a->json)
		return print_json(vm);
	if (opt(a, "print"))
		return print_command(argv);
	fflush(stdout);
	execvp(argv[0], argv);
	return fail(EXIT_FAILED, "cannot run %s: %s (give a command after --)", argv[0],
		    strerror(errno));
}

static char *copy_of(const char *text)
{
	return text ? strdup(text) : NULL;
}

int verb_restore(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *o = NULL, *state = NULL;
	_cleanup_(cleanup_command) struct command c = {0};
	_cleanup_free_ char *disks = copy_of(opt(a, "disk")), *macs = copy_of(opt(a, "mac"));
	const char *name = opt(a, "name");
	json_t *vm;
	int rc;

	if (!name)
		return fail(EXIT_USAGE, "restore needs --name NEW, a name for the new VM");
	rc = call(a, "GET", NULL, &o, "/v1/snapshots/%s", a->pos[0], NULL);
	if (!rc)
		rc = set_environment(a, json_object_get(o, "snapshot"), name);
	if (!rc)
		rc = call(a, "GET", NULL, &state, "/v1/snapshots/%s/state?payload=0", a->pos[0],
			  NULL);
	vm = json_object_get(o, "vm");
	if (!rc)
		rc = make_command(a, vm, state, disks, macs, &c);
	return rc ? rc : become(a, vm, c.argv);
}
