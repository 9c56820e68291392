/* SPDX-License-Identifier: MIT */
/*
 * verb_backup: backup repositories: push, pull, list, verify, forget, prune, status; and
 * push --stdout, pull --stdin, which write and read the stream that import takes: one
 * snapshot, whole, for pipes.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "snapd/transfer/transfer.h"
#include "snapd/util/cleanup.h"
#include "tools/client.h"
#include "tools/human.h"
#include "tools/image.h"
#include "tools/out.h"
#include "tools/snapctl.h"

#define NAME_SHOWN 12

static json_t *new_body(const struct args *a)
{
	return json_pack("{ss*}", "repository", opt(a, "repository"));
}

/* Names after the sub-verb. */
static json_t *names(const struct args *a)
{
	json_t *list = json_array();

	for (int i = 1; i < a->nr_pos; i++)
		json_array_append_new(list, json_string(a->pos[i]));
	return list;
}

static const char *short_name(char buf[NAME_SHOWN + 1], json_t *o, const char *key)
{
	snprintf(buf, NAME_SHOWN + 1, "%s", get_text(o, key));
	return buf;
}

/* ---- push ---- */

static int write_all(void *opaque, const void *data, size_t len)
{
	const char *p = data;

	while (len) {
		ssize_t n = write(STDOUT_FILENO, p, len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return fail(EXIT_FAILED, "cannot write to the standard output: %s",
				    strerror(errno));
		p += n;
		len -= (size_t)n;
	}
	return 0;
}

static int send_head(json_t *state)
{
	json_t *snap = json_object_get(state, "snapshot");
	struct snapd_state_writer blob;
	_cleanup_free_ char *header = NULL;
	const void *bytes;
	size_t len;
	int rc;

	if (state_writer_init(&blob))
		return fail(EXIT_FAILED, "out of memory");
	rc = image_blob(state, "the service's answer", &blob, &bytes, &len);
	if (!rc)
		rc = image_header(state, "the service's answer", get_text(snap, "vm"),
				  *get_text(snap, "name") ? get_text(snap, "name") : NULL,
				  get_text(snap, "note"), get_text(snap, "tags"), len, &header);
	if (!rc)
		rc = write_all(NULL, header, strlen(header));
	if (!rc)
		rc = write_all(NULL, bytes, len);
	state_writer_deinit(&blob);
	return rc;
}

static int push_stdout(const struct args *a)
{
	struct download d = {.write = write_all, .what = "push"};
	_cleanup_(cleanup_json) json_t *state = NULL;
	char id[24];
	int rc;

	if (a->nr_pos != 2)
		return fail(EXIT_USAGE, "push --stdout: one snapshot");
	if (isatty(STDOUT_FILENO))
		return fail(EXIT_USAGE, "push --stdout: not to a terminal");
	rc = call(a, "GET", NULL, &state, "/v1/snapshots/%s/state", a->pos[1], NULL);
	if (!rc)
		rc = send_head(state);
	/* By id: "VM" alone may mean another snapshot a moment later. */
	text_u64(id, sizeof(id), get_u64(json_object_get(state, "snapshot"), "id"));
	return rc ? rc : download(a, &d, "/v1/snapshots/%s/memory", id);
}

static int push(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *r = NULL;
	json_t *body, *p;
	size_t i;
	int rc;

	if (opt(a, "stdout"))
		return push_stdout(a);
	body = new_body(a);
	json_object_set_new(body, "snapshots", names(a));
	rc = run_job(a, "POST", body, &r, "/v1/backup/push", NULL, NULL);
	if (rc || a->json)
		return rc ? rc : print_json(r);
	json_array_foreach(json_object_get(r, "pushed"), i, p)
	{
		char name[NAME_SHOWN + 1], sent[24];

		printf("%llu is %s%s", (unsigned long long)get_u64(p, "snapshot"),
		       short_name(name, p, "name"),
		       json_is_true(json_object_get(p, "already")) ? ", there already\n" : "");
		if (!json_is_true(json_object_get(p, "already")))
			printf(": %s sent, %llu pages of %llu%s\n",
			       human_bytes(sent, sizeof(sent), get_u64(p, "bytes_sent")),
			       (unsigned long long)get_u64(p, "pages_sent"),
			       (unsigned long long)get_u64(p, "pages_read"),
			       json_is_null(json_object_get(p, "base")) ? "" : " that changed");
	}
	return EXIT_DONE;
}

/* ---- pull ---- */

static long read_some(void *opaque, void *buf, size_t len)
{
	for (;;) {
		ssize_t n = read(STDIN_FILENO, buf, len);

		if (n >= 0)
			return n;
		if (errno != EINTR)
			return -fail(EXIT_FAILED, "cannot read the standard input: %s",
				     strerror(errno));
	}
}

static int pull_stdin(const struct args *a)
{
	struct upload u = {.read = read_some, .what = "pull", .type = XFER_IMPORT_TYPE};
	_cleanup_(cleanup_json) json_t *answer = NULL;
	json_t *r;
	int rc;

	if (a->nr_pos != 1 || opt(a, "name"))
		return fail(EXIT_USAGE, "pull --stdin: the stream says what it is");
	rc = upload(a, &u, "/v1/import", &answer);
	r = json_object_get(json_object_get(answer, "job"), "result");
	if (rc || a->json)
		return rc ? rc : print_json(r);
	printf("%s@%llu\n", get_text(r, "vm"), (unsigned long long)get_u64(r, "snapshot"));
	return EXIT_DONE;
}

static int pull(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *r = NULL;
	char bytes[24];
	json_t *body;
	int rc;

	if (opt(a, "stdin"))
		return pull_stdin(a);
	if (a->nr_pos != 2)
		return fail(EXIT_USAGE, "usage: snapctl backup pull SNAPSHOT");
	body = new_body(a);
	json_object_set_new(body, "snapshot", json_string(a->pos[1]));
	if (opt(a, "name"))
		json_object_set_new(body, "vm", json_string(opt(a, "name")));
	rc = run_job(a, "POST", body, &r, "/v1/backup/pull", NULL, NULL);
	if (rc || a->json)
		return rc ? rc : print_json(r);
	printf("%s@%llu", get_text(r, "vm"), (unsigned long long)get_u64(r, "snapshot"));
	if (json_is_true(json_object_get(r, "already")))
		puts(" is here already");
	else
		printf(": %s received, %llu pages\n",
		       human_bytes(bytes, sizeof(bytes), get_u64(r, "bytes_received")),
		       (unsigned long long)get_u64(r, "pages_fetched"));
	return EXIT_DONE;
}

/* ---- list ---- */

static void print_snapshots(json_t *list)
{
	static const char *const heads[] = {"SNAPSHOT", "VM",	"NAME", "TAKEN",
					    "MEMORY",	"SENT", "HOST", "HERE"};
	static const bool right[] = {false, false, false, false, true, true, false, true};
	struct table *t = table_new(heads, right, ARRAY_SIZE(heads));
	json_t *s;
	size_t i;

	json_array_foreach(list, i, s)
	{
		char name[NAME_SHOWN + 1], when[32], memory[24], sent[24], here[24] = "";

		if (get_u64(s, "local"))
			text_u64(here, sizeof(here), get_u64(s, "local"));
		table_row(t, (const char *const[]){
				     short_name(name, s, "name"), get_text(s, "vm"),
				     get_text(s, "snapshot_name"),
				     human_time(when, sizeof(when), get_u64(s, "taken_ns")),
				     human_bytes(memory, sizeof(memory), get_u64(s, "bytes")),
				     human_bytes(sent, sizeof(sent), get_u64(s, "bytes_sent")),
				     get_text(s, "host"), here});
	}
	table_print(t);
}

static int list(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *r = NULL;
	json_t *body = new_body(a), *bad;
	size_t i;
	int rc;

	if (a->nr_pos > 1)
		json_object_set_new(body, "vm", json_string(a->pos[1]));
	rc = run_job(a, "POST", body, &r, "/v1/backup/list", NULL, NULL);
	if (rc)
		return rc;
	if (a->json)
		print_json(r);
	else
		print_snapshots(json_object_get(r, "snapshots"));
	json_array_foreach(json_object_get(r, "damaged"), i, bad)
		fail(EXIT_CORRUPT, "%s", get_text(bad, "text"));
	return json_array_size(json_object_get(r, "damaged")) ? EXIT_CORRUPT : EXIT_DONE;
}

/* ---- verify ---- */

static int percent_of(const struct args *a, json_t *body)
{
	const char *percent = opt(a, "read-data");
	unsigned long n = 100;
	char *end;

	if (percent && *percent) {
		n = strtoul(percent, &end, 10);
		if (*end == '%')
			end++;
		if (*percent < '0' || *percent > '9' || *end || !n || n > 100)
			return fail(EXIT_USAGE, "--read-data=%s: 1 to 100 percent", percent);
	}
	if (percent)
		json_object_set_new(body, "percent", json_integer((json_int_t)n));
	return 0;
}

static void print_damage(json_t *d)
{
	json_t *s;
	size_t i;

	printf("%s: %s: %s; snapshots:", get_text(d, "kind"), get_text(d, "object"),
	       get_text(d, "text"));
	json_array_foreach(json_object_get(d, "snapshots"), i, s)
		printf(" %s", json_string_value(s));
	putchar('\n');
}

static int verify(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *r = NULL, *body = new_body(a);
	size_t nr, i;
	char bytes[24];
	json_t *d;
	int rc = percent_of(a, body);

	if (!rc)
		rc = run_job(a, "POST", json_incref(body), &r, "/v1/backup/verify", NULL, NULL);
	if (rc)
		return rc;
	nr = json_array_size(json_object_get(r, "damages"));
	if (a->json) {
		print_json(r);
		return nr ? EXIT_CORRUPT : EXIT_DONE;
	}
	json_array_foreach(json_object_get(r, "damages"), i, d) print_damage(d);
	printf("%llu snapshots, %llu packs, %llu blobs; %s read\n",
	       (unsigned long long)get_u64(r, "snapshots"), (unsigned long long)get_u64(r, "packs"),
	       (unsigned long long)get_u64(r, "blobs"),
	       human_bytes(bytes, sizeof(bytes), get_u64(r, "bytes_read")));
	if (nr)
		return fail(EXIT_CORRUPT, "%zu objects are damaged", nr);
	puts("whole");
	return EXIT_DONE;
}

/* ---- forget, prune ---- */

static void print_prune(json_t *r)
{
	char bytes[24];

	printf("%llu packs and %llu blobs deleted (%s), %llu marked, %llu waiting; grace time %s\n",
	       (unsigned long long)get_u64(r, "packs_deleted"),
	       (unsigned long long)get_u64(r, "blobs_deleted"),
	       human_bytes(bytes, sizeof(bytes), get_u64(r, "bytes_deleted")),
	       (unsigned long long)get_u64(r, "marked"), (unsigned long long)get_u64(r, "waiting"),
	       human_seconds(bytes, sizeof(bytes), (double)get_u64(r, "grace_s")));
}

static void print_forgotten(json_t *r)
{
	static const char *const heads[] = {"SNAPSHOT", "VM", "NAME", "TAKEN", "", "BECAUSE"};
	static const bool right[] = {false, false, false, false, false, false};
	struct table *t = table_new(heads, right, ARRAY_SIZE(heads));
	bool dry = json_is_true(json_object_get(r, "dry_run"));
	json_t *s;
	size_t i;

	json_array_foreach(json_object_get(r, "snapshots"), i, s)
	{
		char name[NAME_SHOWN + 1], when[32];

		table_row(t, (const char *const[]){short_name(name, s, "name"), get_text(s, "vm"),
						   get_text(s, "snapshot_name"),
						   human_time(when, sizeof(when),
							      get_u64(s, "taken_ns")),
						   json_is_true(json_object_get(s, "keep")) ? "keep"
						   : dry ? "would forget"
							 : "forgotten",
						   get_text(s, "why")});
	}
	table_print(t);
	if (json_object_get(r, "prune"))
		print_prune(json_object_get(r, "prune"));
}

static int forget(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *r = NULL;
	json_t *body = new_body(a), *keep = json_object();
	int rc;

	keep_rules(a, keep);
	if (a->nr_pos > 1)
		json_object_set_new(body, "snapshots", names(a));
	if (json_object_size(keep) || a->nr_pos < 2)
		json_object_set(body, "keep", keep);
	json_decref(keep);
	if (opt(a, "vm"))
		json_object_set_new(body, "vm", json_string(opt(a, "vm")));
	json_object_set_new(body, "dry_run", json_boolean(opt(a, "dry-run") != NULL));
	json_object_set_new(body, "prune", json_boolean(opt(a, "prune") != NULL));
	rc = run_job(a, "POST", body, &r, "/v1/backup/forget", NULL, NULL);
	if (rc || a->json)
		return rc ? rc : print_json(r);
	print_forgotten(r);
	return EXIT_DONE;
}

static int prune(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *r = NULL;
	json_t *body = new_body(a);
	int rc;

	json_object_set_new(body, "dry_run", json_boolean(opt(a, "dry-run") != NULL));
	rc = run_job(a, "POST", body, &r, "/v1/backup/prune", NULL, NULL);
	if (rc || a->json)
		return rc ? rc : print_json(r);
	print_prune(r);
	return EXIT_DONE;
}

/* ---- status ---- */

static int status(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *r = NULL;
	int rc = run_job(a, "POST", new_body(a), &r, "/v1/backup/status", NULL, NULL);
	const char *room;
	json_t *v;

	if (rc || a->json)
		return rc ? rc : print_json(r);
	printf("repository %s\nid         %s\nencrypted  %s\ngrace      %llu s\n",
	       get_text(r, "repository"), get_text(r, "id"),
	       json_is_true(json_object_get(r, "encrypted")) ? "yes" : "no",
	       (unsigned long long)get_u64(r, "grace_s"));
	json_object_foreach(json_object_get(r, "rooms"), room, v)
	{
		char bytes[24];

		printf("%-10s %8llu objects %12s\n", room,
		       (unsigned long long)get_u64(v, "objects"),
		       human_bytes(bytes, sizeof(bytes), get_u64(v, "bytes")));
	}
	return EXIT_DONE;
}

int verb_backup(const struct args *a)
{
	static const struct {
		const char *name;
		int (*fn)(const struct args *a);
		int min_pos, max_pos;
		const char *usage;
	} subs[] = {
		{"push", push, 2, 999, " SNAP..."},
		{"pull", pull, 1, 2, " SNAPSHOT"},
		{"list", list, 1, 2, " [VM]"},
		{"verify", verify, 1, 1, ""},
		{"forget", forget, 1, 999, " SNAPSHOT... | --keep-..."},
		{"prune", prune, 1, 1, ""},
		{"status", status, 1, 1, ""},
	};

	for (size_t i = 0; i < ARRAY_SIZE(subs); i++) {
		if (strcmp(a->pos[0], subs[i].name) != 0)
			continue;
		if (a->nr_pos < subs[i].min_pos || a->nr_pos > subs[i].max_pos)
			return fail(EXIT_USAGE, "usage: snapctl backup %s%s", subs[i].name,
				    subs[i].usage);
		return subs[i].fn(a);
	}
	return fail(EXIT_USAGE,
		    "backup: want push, pull, list, verify, forget, prune or status, not '%s'",
		    a->pos[0]);
}
