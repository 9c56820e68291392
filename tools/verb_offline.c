/* SPDX-License-Identifier: MIT */
/*
 * verb_offline: what is done to a store without its service: the index made again, the
 * key changed.  Both lock the store; beside a running service they are refused.
 */
#include <errno.h>
#include <string.h>

#include "snapd/store/check.h"
#include "snapd/store/rebuild.h"
#include "snapd/util/cleanup.h"
#include "tools/out.h"
#include "tools/snapctl.h"

static int exit_code(int r)
{
	switch (-r) {
	case EBUSY:
		return EXIT_CONFLICT;
	case ENOENT:
		return EXIT_NOT_FOUND;
	case E_CORRUPT:
		return EXIT_CORRUPT;
	default:
		return EXIT_FAILED;
	}
}

static int need_store(const struct args *a)
{
	if (!opt(a, "store"))
		return fail(EXIT_USAGE,
			    "store %s works on a directory whose snapd does not run: "
			    "--store DIR",
			    a->pos[0]);
	return 0;
}

struct report {
	bool json;
	json_t *lines; /* owned */
	uint64_t nr_lines, nr_losses;
};

static void on_line(void *opaque, const char *line)
{
	struct report *rep = opaque;

	rep->nr_lines++;
	if (rep->json)
		json_array_append_new(rep->lines, json_string(line));
	else
		puts(line);
}

static void on_damage(void *opaque, const struct store_damage *d)
{
	on_line(opaque, d->text);
}

static void on_loss(void *opaque, const struct store_loss *l)
{
	struct report *rep = opaque;
	char line[160];

	rep->nr_losses++;
	if (l->whole)
		snprintf(line, sizeof(line), "lost: %s@%llu: its map or its state can't be read",
			 l->vm_name, (unsigned long long)l->snapshot);
	else
		snprintf(line, sizeof(line), "lost: %s@%llu: %llu pages, the first at 0x%llx",
			 l->vm_name, (unsigned long long)l->snapshot,
			 (unsigned long long)l->nr_pages,
			 (unsigned long long)l->ranges[0][0] * l->page_size);
	on_line(opaque, line);
}

/* What the new index leads to: is it there? */
static int look_at_store(const struct args *a, struct report *rep, struct err *e)
{
	struct store_config config = {
		.dir = opt(a, "store"), .key_file = opt(a, "encryption-key"), .read_only = true};
	struct store_check_config c = {.read_data = opt(a, "read-data") != NULL,
				       .damage = on_damage,
				       .loss = on_loss,
				       .opaque = rep};
	struct store_check_result result;
	struct store *s;
	int r = store_open(&config, &s, e);

	if (r)
		return r;
	r = store_check(s, &c, &result, e);
	store_close(s);
	return r;
}

/* Snapshots that are not what they were. */
static uint64_t touched(const struct rebuild_result *r, const struct report *rep)
{
	return r->lost_snapshots + rep->nr_losses;
}

static int print_rebuilt(const struct report *rep, const struct rebuild_result *r)
{
	_cleanup_(cleanup_json) json_t *o = NULL;

	if (!rep->json) {
		printf("%llu segments, %llu batches: %llu VMs, %llu epochs, %llu snapshots\n",
		       (unsigned long long)r->segments, (unsigned long long)r->batches,
		       (unsigned long long)r->vms, (unsigned long long)r->epochs,
		       (unsigned long long)r->snapshots);
		return 0;
	}
	o = json_pack("{sI sI sI sI sI sI sI sI sb sO}", "segments", (json_int_t)r->segments,
		      "batches", (json_int_t)r->batches, "vms", (json_int_t)r->vms, "timelines",
		      (json_int_t)r->timelines, "epochs", (json_int_t)r->epochs, "snapshots",
		      (json_int_t)r->snapshots, "lost_snapshots", (json_int_t)touched(r, rep),
		      "damages", (json_int_t)r->damages, "journalled", r->journalled, "lines",
		      rep->lines);
	return print_json(o);
}

int store_rebuild(const struct args *a)
{
	struct report rep = {.json = a->json, .lines = json_array()};
	struct rebuild_config c = {.dir = opt(a, "store"),
				   .key_file = opt(a, "encryption-key"),
				   .tell = on_line,
				   .opaque = &rep};
	struct rebuild_result result;
	struct err e = {0};
	int rc = need_store(a), r;

	r = rc ? 0 : store_rebuild_index(&c, &result, &e);
	if (!rc && !r)
		r = look_at_store(a, &rep, &e);
	if (r)
		rc = fail(exit_code(r), "%s", e.text);
	if (!rc)
		rc = print_rebuilt(&rep, &result);
	if (!rc && (result.damages || result.lost_snapshots || rep.nr_losses))
		rc = fail(EXIT_CORRUPT, "%llu damages, %llu snapshots touched",
			  (unsigned long long)result.damages,
			  (unsigned long long)touched(&result, &rep));
	json_decref(rep.lines);
	return rc;
}

int store_change_key(const struct args *a)
{
	const char *key = opt(a, "encryption-key"), *new_key = opt(a, "new-key");
	struct err e = {0};
	int rc = need_store(a), r;

	if (!rc && (!key || !new_key))
		rc = fail(EXIT_USAGE, "store rekey needs --encryption-key, the key up to now, and "
				      "--new-key");
	if (rc)
		return rc;
	r = store_rekey(opt(a, "store"), key, new_key, &e);
	return r ? fail(exit_code(r), "%s", e.text) : EXIT_DONE;
}
