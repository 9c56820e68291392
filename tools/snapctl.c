/* SPDX-License-Identifier: MIT */
/*
 * snapctl: the verbs as a table, the command line, --help.  What is in the table is
 * what --help, the manual page and the shell completions list; a test compares them.
 */
#include "tools/snapctl.h"

#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "include/snapd/protocol.h"
#include "snapd/util/cleanup.h"

static const struct opt global_opts[] = {
	{"socket", "PATH", "of the service (else $SNAPD_SOCKET, " SNAPD_API_SOCKET_DEFAULT ")"},
	{"json", NULL, "print the service's answer as JSON"},
	{"no-progress", NULL, "no progress bar, even on a terminal"},
	{"help", NULL, "this text, or with a verb, the verb's"},
};

static const struct verb verbs[] = {
	{"vms",
	 "",
	 "list the attached VMs",
	 verb_vms,
	 0,
	 0,
	 {{"tag", "TAG", "only those that have this tag"}},
	 .brief = "the attached VMs"},
	{"tag",
	 "VM",
	 "show and change the tags of a VM, by which policies choose",
	 verb_tag,
	 1,
	 1,
	 {{"set", "TAGS", "these in place of those that were set; '' takes all away"},
	  {"add", "TAGS", "these besides; separated by commas"},
	  {"remove", "TAGS", "these go"}},
	 false,
	 "Tags that the service's file of tags gives the VM (snapd.conf(5), vm_tags) stay.",
	 .brief = "tags of a VM, for policies"},
	{"snapshot",
	 "VM",
	 "take a snapshot of a running VM",
	 verb_snapshot,
	 1,
	 1,
	 {{"name", "NAME", "a name, unique for the VM"},
	  {"note", "TEXT", "a note"},
	  {"tag", "TAGS", "tags, separated by commas"},
	  {"pin", NULL, "pin it: neither deleted nor pruned"},
	  {"compression", "HOW", "none, lz4, zstd[:LEVEL]: of the pages that it stores"},
	  {"self-check", NULL, "compare all other memory with the store, too"}},
	 .brief = "take one of a running VM"},
	{"self-check",
	 "VM",
	 "compare all memory with what the store would restore",
	 verb_self_check,
	 1,
	 1,
	 {{NULL}},
	 false,
	 "Pauses the VM for one pass over its memory. A page that was written and never\n"
	 "reported is told, and stored anew. Exit code 5 when there was one: snapshots\n"
	 "taken since the last check may have it wrong.",
	 .brief = "compare memory with store"},
	{"list",
	 "[VM]",
	 "list snapshots; on a terminal as a tree",
	 verb_list,
	 0,
	 1,
	 {{"tree", NULL, "a tree, even when it is not a terminal"},
	  {"flat", NULL, "a table, even on a terminal"}},
	 .brief = "snapshots, as a tree"},
	{"show",
	 "SNAP",
	 "tell all about a snapshot",
	 verb_show,
	 1,
	 1,
	 {{"space", NULL, "and what deleting it would free (root only)"}},
	 .brief = "all about a snapshot"},
	{"diff",
	 "A B",
	 "which memory differs between two snapshots",
	 verb_diff,
	 2,
	 2,
	 {{"all", NULL, "every range, not only the first 20"}},
	 .brief = "what differs between two"},
	{"rollback",
	 "VM SNAP",
	 "bring a running VM back to a snapshot, in place",
	 verb_rollback,
	 2,
	 2,
	 {{"check", NULL, "compare memory and state before the VM runs on"},
	  {"other-vm", NULL, "also to a snapshot of another VM"}},
	 .brief = "bring a VM back, in place"},
	{"restore",
	 "SNAP [-- CMD...]",
	 "start a new VMM from a snapshot",
	 verb_restore,
	 1,
	 1,
	 {{"name", "NEW", "name of the new VM (needed)"},
	  {"print", NULL, "print the command, do not run it"},
	  {"disk", "OLD=NEW,..", "QEMU: other disk images in place of those recorded"},
	  {"mac", "OLD=NEW,..", "QEMU: likewise, addresses of network cards"},
	  {"force", NULL, "QEMU: also another version, machine type or CPU"}},
	 true,
	 "Runs CMD, or else the command line that the snapshot's VMM had, in place of\n"
	 "snapctl, with SNAPD_RESTORE, SNAPD_VM_NAME and SNAPD_AGENT_SOCKET set; QEMU's\n"
	 "under snapd-qemu(1).  It runs on the disks as they are now.",
	 .brief = "a new VMM from a snapshot"},
	{"export",
	 "SNAP FILE",
	 "write memory (sparse, raw) to FILE, state to FILE.json",
	 verb_export,
	 2,
	 2,
	 {{"force", NULL, "replace FILE and FILE.json"}},
	 .brief = "memory and state to files"},
	{"import",
	 "FILE",
	 "read what export wrote into a new snapshot",
	 verb_import,
	 1,
	 1,
	 {{"name", "VM", "VM to put it under (else the recorded one's, -imported)"},
	  {"snapshot-name", "NAME", "name of the new snapshot"},
	  {"note", "TEXT", "its note (else the recorded one)"},
	  {"tag", "TAGS", "its tags (else the recorded ones)"}},
	 .brief = "what export wrote, back"},
	{"set",
	 "SNAP",
	 "change a snapshot's name, note, tags, pin",
	 verb_set,
	 1,
	 1,
	 {{"name", "NAME", "rename it; '' takes its name away"},
	  {"note", "TEXT", "its note"},
	  {"tag", "TAGS", "its tags, separated by commas"},
	  {"add-tag", "TAGS", "tags besides those that it has"},
	  {"remove-tag", "TAGS", "tags that go"},
	  {"pin", NULL, "neither deleted nor pruned from now on"},
	  {"unpin", NULL, "may be deleted again"}},
	 .brief = "rename, note, tag, pin"},
	{"delete",
	 "SNAP...",
	 "forget snapshots (ID or VM@NAME), or a VM",
	 verb_delete,
	 0,
	 INT_MAX,
	 {{"vm", "VM", "a VM that is not attached, with all its snapshots"}},
	 .brief = "forget snapshots, or a VM"},
	{"prune",
	 "[VM]",
	 "delete the snapshots that no rule keeps",
	 verb_prune,
	 0,
	 1,
	 {{"keep-last", "N", "the newest N of each VM"},
	  {"keep-hourly", "N", "the newest of each of the last N hours that have one"},
	  {"keep-daily", "N", "the same by days,"},
	  {"keep-weekly", "N", "weeks,"},
	  {"keep-monthly", "N", "months,"},
	  {"keep-yearly", "N", "years"},
	  {"keep-within", "TIME", "all not older, seen from the newest: 1y6M2w3d12h"},
	  {"keep-tag", "TAGS", "all with one of these tags"},
	  {"keep-grid", "STEPS", "the oldest of each span: 24x1h,14x1d,6x30d"},
	  {"unbacked", NULL, "also what its policy has not backed up yet"},
	  {"dry-run", NULL, "only tell, for each snapshot, what would happen and why"}},
	 false,
	 "What any rule keeps stays, and what is pinned. Space comes back with store gc.",
	 .brief = "delete what no rule keeps"},
	{"verify",
	 "SNAP",
	 "read and check every page of a snapshot",
	 verb_verify,
	 1,
	 1,
	 {{"digest", NULL, "and SHA-256 of its memory, to compare with the VMM's"}},
	 .brief = "read and check every page"},
	{"policy",
	 "list|show|set|run|pause|resume|rm [NAME] [KEY=VALUE...|VM]",
	 "periodic snapshots and what stays of them",
	 verb_policy,
	 1,
	 INT_MAX,
	 {{"self-check", "N", "set: compare all memory with every N-th; 0: never"},
	  {"wait", NULL, "run: until it is done; exit code 1 if a VM's went wrong"}},
	 false,
	 "set makes or changes a policy: every=5m, schedule='Mon..Fri 02:30' or\n"
	 "recovery_point=1s, vms='web*', keep_grid='24x1h, 14x1d' and more, see\n"
	 "snapd-policy(5); KEY= takes a setting away.",
	 .brief = "periodic snapshots"},
	{"store",
	 "stats|gc|check|scrub|repair|rebuild-index|rekey",
	 "figures of the store; give back what is free; check it",
	 verb_store,
	 1,
	 1,
	 {{"read-data", "[=PERCENT]", "check: every byte of every page, or of a share of them"},
	  {"dry-run", NULL, "repair: only tell what it would drop"},
	  {"exact", NULL, "stats: whose the bytes are, page by page"},
	  {"rate", "BYTES", "check, gc: at most so many a second (K, M, G)"},
	  {"status", NULL, "scrub: where it stands, and what it found (the default)"},
	  {"now", NULL, "scrub: begin, or go on with one that is paused"},
	  {"pause", NULL, "scrub: none reads until --resume"},
	  {"resume", NULL, "scrub: take that back"},
	  {"cancel", NULL, "scrub: drop the one under way"},
	  {"wait", NULL, "scrub: until it has come to its end"},
	  {"store", "DIR", "rebuild-index, rekey: the store, without its snapd"},
	  {"encryption-key", "FILE", "rebuild-index, rekey: its key"},
	  {"new-key", "FILE", "rekey: its key from now on"}},
	 false,
	 "Exit code 5: check or scrub found damage. rebuild-index needs segments alone.",
	 .brief = "figures, gc, check, repair"},
	{"backup",
	 "push|pull|list|verify|forget|prune|status [SNAP...]",
	 "snapshots in a bucket or a directory",
	 verb_backup,
	 1,
	 INT_MAX,
	 {{"repository", "URL", "s3://BUCKET/PREFIX or file:///PATH"},
	  {"stdout", NULL, "push: one snapshot, whole, to the standard output"},
	  {"stdin", NULL, "pull: what push --stdout wrote"},
	  {"name", "VM", "pull: VM to put it under (else its own)"},
	  {"read-data", "[=PERCENT]", "verify: every byte, or a share"},
	  {"keep-last", "RULE", NULL},
	  {"keep-hourly", "RULE", NULL},
	  {"keep-daily", "RULE", NULL},
	  {"keep-weekly", "RULE", NULL},
	  {"keep-monthly", "RULE", NULL},
	  {"keep-yearly", "RULE", NULL},
	  {"keep-within", "RULE", NULL},
	  {"keep-tag", "RULE", NULL},
	  {"keep-grid", "RULE", NULL},
	  {"vm", "VM", "forget: only snapshots of this VM"},
	  {"prune", NULL, "forget: and prune"},
	  {"dry-run", NULL, "forget, prune: only tell"}},
	 false,
	 "SNAP is a local snapshot for push; else the first digits of one in the\n"
	 "repository, VM@NAME, or VM for its newest. forget takes prune's --keep rules.\n"
	 "Root only. Exit code 5 when verify finds damage.",
	 .brief = "in a bucket or a directory"},
	{"top",
	 "",
	 "live: what VMs write, what is captured, what it costs",
	 verb_top,
	 0,
	 0,
	 {{"once", NULL, "one frame, and end; so does --json"},
	  {"delay", "SECONDS", "between samples (default 1)"},
	  {"sort", "KEY", "name state dirty behind age pause still epochs full"}},
	 false,
	 "DIRTY/S what the guest writes, BEHIND what is not captured, AGE of the newest\n"
	 "point in the store, PAUSE the last one, STILL the share of time that the guest\n"
	 "stood still, EPO/S epochs a second, FUL/S exits because a dirty ring was full.",
	 .brief = "live figures"},
	{"doctor", "", "can this host run snapd, and what mends it", verb_doctor, 0, 0,
	 .brief = "can this host run snapd?"},
	{"jobs", "", "list jobs", verb_jobs, 0, 0, .brief = "what runs, and what ran"},
	{"cancel", "JOB", "cancel a job", verb_cancel, 1, 1, .brief = "stop a job"},
	{"version", "", "versions of snapctl and of the service", verb_version, 0, 0,
	 .brief = "of snapctl and service"},
};

static struct {
	char *buf; /* NULL: stderr */
	size_t size;
} fail_to;

void fail_into(char *buf, size_t size)
{
	fail_to.buf = buf;
	fail_to.size = size;
}

int fail(int code, const char *fmt, ...)
{
	va_list ap;

	if (fail_to.buf) {
		va_start(ap, fmt);
		vsnprintf(fail_to.buf, fail_to.size, fmt, ap);
		va_end(ap);
		return code;
	}
	fputs("snapctl: ", stderr);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	return code;
}

const char *opt(const struct args *a, const char *name)
{
	for (int i = 0; i < OPTS_MAX && a->verb->opts[i].name; i++)
		if (!strcmp(a->verb->opts[i].name, name))
			return a->values[i];
	return NULL;
}

/* ---- help ---- */

static void print_opts(const struct opt *opts, size_t nr)
{
	char left[40];

	for (size_t i = 0; i < nr && opts[i].name; i++) {
		const char *arg = opts[i].arg ? opts[i].arg : "";

		if (!opts[i].help)
			continue;

		snprintf(left, sizeof(left), "--%s%s%s", opts[i].name,
			 *arg && *arg != '[' ? " " : "", arg);
		printf("  %-21s %s\n", left, opts[i].help);
	}
}

/* Two columns, each read downwards: all verbs on one screen. */
static int help(void)
{
	size_t rows = DIV_ROUND_UP(ARRAY_SIZE(verbs), 2);

	puts("usage: snapctl [OPTIONS] VERB ...        snapctl VERB --help tells of each");
	for (size_t i = 0; i < rows; i++) {
		const struct verb *v = &verbs[i];

		printf("  %-11s%-27s", v->name, v->brief);
		v += rows;
		if (v < verbs + ARRAY_SIZE(verbs))
			printf("  %-11s%s", v->name, v->brief);
		putchar('\n');
	}
	puts("SNAP is ID, VM@ID, VM@NAME, or VM for its newest.\n");
	print_opts(global_opts, ARRAY_SIZE(global_opts));
	return EXIT_DONE;
}

static int help_verb(const struct verb *v)
{
	printf("usage: snapctl %s%s%s\n\n  %s\n\n", v->name, *v->usage ? " " : "", v->usage,
	       v->summary);
	if (v->opts[0].name) {
		print_opts(v->opts, OPTS_MAX);
		puts("");
	}
	print_opts(global_opts, ARRAY_SIZE(global_opts));
	if (v->more)
		printf("\n%s\n", v->more);
	return EXIT_DONE;
}

/* ---- command line ---- */

struct parser {
	struct args a;
	char **argv;
	int at; /* next argument */
	bool help;
};

static const struct opt *find_opt(const struct opt *opts, size_t nr, const char *name, size_t len)
{
	for (size_t i = 0; i < nr && opts[i].name; i++)
		if (strlen(opts[i].name) == len && !memcmp(opts[i].name, name, len))
			return &opts[i];
	return NULL;
}

static void set_global(struct parser *p, const char *name, const char *value)
{
	if (!strcmp(name, "socket"))
		p->a.socket = value;
	else if (!strcmp(name, "json"))
		p->a.json = true;
	else if (!strcmp(name, "no-progress"))
		p->a.no_progress = true;
	else
		p->help = true;
}

/* argv[at] is an option: --NAME, --NAME=VALUE, --NAME VALUE. */
static int parse_opt(struct parser *p)
{
	const char *text = p->argv[p->at++], *name = text + 2, *eq = strchr(name, '=');
	size_t len = eq ? (size_t)(eq - name) : strlen(name);
	const struct verb *v = p->a.verb;
	const struct opt *global, *o;
	const char *value = "";

	global = find_opt(global_opts, ARRAY_SIZE(global_opts), name, len);
	o = global ? global : v ? find_opt(v->opts, OPTS_MAX, name, len) : NULL;
	if (text[1] != '-' || !o)
		return fail(EXIT_USAGE, "unknown option %s: see snapctl%s%s --help", text,
			    v ? " " : "", v ? v->name : "");
	if (!o->arg && eq)
		return fail(EXIT_USAGE, "--%s takes no value", o->name);
	if (o->arg && o->arg[0] == '[')
		value = eq ? eq + 1 : "";
	else if (o->arg)
		value = eq ? eq + 1 : p->argv[p->at] ? p->argv[p->at++] : NULL;
	if (!value)
		return fail(EXIT_USAGE, "--%s needs a value: %s", o->name, o->arg);
	if (global)
		set_global(p, o->name, value);
	else
		p->a.values[o - v->opts] = value;
	return 0;
}

static int parse_word(struct parser *p)
{
	const char *word = p->argv[p->at];

	if (p->a.verb) {
		p->a.pos[p->a.nr_pos++] = p->argv[p->at++];
		return 0;
	}
	for (size_t i = 0; i < ARRAY_SIZE(verbs); i++)
		if (!strcmp(verbs[i].name, word))
			p->a.verb = &verbs[i];
	if (!p->a.verb)
		return fail(EXIT_USAGE, "unknown verb %s: see snapctl --help", word);
	p->at++;
	return 0;
}

static int parse(struct parser *p)
{
	int rc = 0;

	while (!rc && p->argv[p->at]) {
		const char *word = p->argv[p->at];

		if (!strcmp(word, "--")) {
			p->a.rest = &p->argv[p->at + 1];
			break;
		}
		rc = *word == '-' && word[1] ? parse_opt(p) : parse_word(p);
	}
	return rc;
}

static int check(const struct parser *p)
{
	const struct verb *v = p->a.verb;

	if (p->a.nr_pos < v->min_pos || p->a.nr_pos > v->max_pos || (p->a.rest && !v->takes_rest))
		return fail(EXIT_USAGE, "usage: snapctl %s%s%s", v->name, *v->usage ? " " : "",
			    v->usage);
	return 0;
}

int main(int argc, char **argv)
{
	struct parser p = {.argv = argv, .at = 1};
	int rc;

	p.a.pos = calloc((size_t)argc + 1, sizeof(*p.a.pos));
	if (!p.a.pos)
		return fail(EXIT_FAILED, "out of memory");
	p.a.socket = getenv("SNAPD_SOCKET");
	rc = parse(&p);
	if (!p.a.socket || !*p.a.socket)
		p.a.socket = SNAPD_API_SOCKET_DEFAULT;
	if (!rc && p.help)
		rc = p.a.verb ? help_verb(p.a.verb) : help();
	else if (!rc && !p.a.verb)
		rc = fail(EXIT_USAGE, "no verb: see snapctl --help");
	else if (!rc && !(rc = check(&p)))
		rc = p.a.verb->fn(&p.a);
	free(p.a.pos);
	/* A full disk behind stdout must not look like success. */
	if ((fflush(stdout) || ferror(stdout)) && !rc)
		rc = fail(EXIT_FAILED, "cannot write to the standard output");
	return rc;
}
