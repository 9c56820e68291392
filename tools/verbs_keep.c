/* SPDX-License-Identifier: MIT */
/* verbs_keep: what is said of snapshots, and which go: set, delete, prune. */
#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"
#include "tools/client.h"
#include "tools/human.h"
#include "tools/out.h"
#include "tools/snapctl.h"

/* ---- set ---- */

static bool in_list(const char *list, const char *word, size_t len)
{
	while (*list) {
		size_t n = strcspn(list, ",");

		if (n == len && !memcmp(list, word, len))
			return true;
		list += n + (list[n] == ',');
	}
	return false;
}

/* Words of `from` that are not in `drop` and not in *tags yet, onto *tags. */
static void add_words(char **tags, const char *from, const char *drop)
{
	while (*from) {
		size_t n = strcspn(from, ",");
		char *more;

		if (n && !in_list(drop, from, n) && !in_list(*tags, from, n)) {
			if (asprintf(&more, "%s%s%.*s", *tags, **tags ? "," : "", (int)n, from) < 0)
				abort();
			free(*tags);
			*tags = more;
		}
		from += n + (from[n] == ',');
	}
}

/* --add-tag and --remove-tag change what the snapshot has. */
static int edit_tags(const struct args *a, json_t *body)
{
	const char *add = opt(a, "add-tag"), *drop = opt(a, "remove-tag");
	_cleanup_(cleanup_json) json_t *o = NULL;
	_cleanup_free_ char *tags = strdup("");
	int rc;

	if (!tags)
		abort();
	if (!add && !drop)
		return 0;
	if (opt(a, "tag"))
		return fail(EXIT_USAGE, "--tag replaces all tags: without --add-tag, --remove-tag");
	rc = call(a, "GET", NULL, &o, "/v1/snapshots/%s", a->pos[0], NULL);
	if (rc)
		return rc;
	add_words(&tags, get_text(json_object_get(o, "snapshot"), "tags"), drop ? drop : "");
	add_words(&tags, add ? add : "", "");
	json_object_set_new(body, "tags", json_string(tags));
	return 0;
}

static int set_body(const struct args *a, json_t *body)
{
	static const char *const texts[][2] = {{"name", "name"}, {"note", "note"}, {"tag", "tags"}};
	int rc;

	for (size_t i = 0; i < ARRAY_SIZE(texts); i++)
		if (opt(a, texts[i][0]))
			json_object_set_new(body, texts[i][1], json_string(opt(a, texts[i][0])));
	if (opt(a, "pin") && opt(a, "unpin"))
		return fail(EXIT_USAGE, "--pin and --unpin: one or the other");
	if (opt(a, "pin") || opt(a, "unpin"))
		json_object_set_new(body, "pinned", json_boolean(opt(a, "pin") != NULL));
	rc = edit_tags(a, body);
	if (rc)
		return rc;
	return json_object_size(body) ? 0
				      : fail(EXIT_USAGE, "nothing to set: see snapctl set --help");
}

int verb_set(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *body = json_object(), *r = NULL;
	json_t *s;
	int rc = set_body(a, body);

	if (!rc)
		rc = run_job(a, "PATCH", json_incref(body), &r, "/v1/snapshots/%s", a->pos[0],
			     NULL);
	if (rc || a->json)
		return rc ? rc : print_json(r);
	s = json_object_get(r, "snapshot");
	printf("%s@%llu:%s%s%s%s%s%s%s\n", get_text(s, "vm"), (unsigned long long)get_u64(s, "id"),
	       *get_text(s, "name") ? " " : "", get_text(s, "name"),
	       json_is_true(json_object_get(s, "pinned")) ? " pinned" : "",
	       *get_text(s, "tags") ? " tags " : "", get_text(s, "tags"),
	       *get_text(s, "note") ? " note " : "", get_text(s, "note"));
	return EXIT_DONE;
}

/* ---- delete ---- */

static int delete_vm(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *r = NULL;
	int rc = run_job(a, "DELETE", NULL, &r, "/v1/vms/%s", opt(a, "vm"), NULL);

	if (rc || a->json)
		return rc ? rc : print_json(r);
	printf("VM %s is removed, with %llu snapshots\n", get_text(r, "vm"),
	       (unsigned long long)get_u64(r, "snapshots"));
	return EXIT_DONE;
}

static int delete_one(const struct args *a, const char *sel, json_t *all)
{
	json_t *r = NULL;
	int rc = run_job(a, "DELETE", NULL, &r, "/v1/snapshots/%s", sel, NULL);

	if (rc)
		return rc;
	if (!a->json)
		printf("snapshot %llu is deleted\n", (unsigned long long)get_u64(r, "snapshot"));
	json_array_append_new(all, r);
	return EXIT_DONE;
}

int verb_delete(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *all = json_array();
	int rc = 0;

	if (!a->nr_pos == !opt(a, "vm"))
		return fail(EXIT_USAGE, "name snapshots, or a VM with --vm");
	if (opt(a, "vm"))
		return delete_vm(a);
	/* "VM" means its newest everywhere else: too easy a slip here. */
	for (int i = 0; i < a->nr_pos; i++)
		if (!strchr(a->pos[i], '@') && strspn(a->pos[i], "0123456789") != strlen(a->pos[i]))
			return fail(EXIT_USAGE,
				    "to delete, name one snapshot: ID or VM@NAME, not %s",
				    a->pos[i]);
	for (int i = 0; !rc && i < a->nr_pos; i++)
		rc = delete_one(a, a->pos[i], all);
	if (rc || !a->json)
		return rc;
	return print_json(a->nr_pos == 1 ? json_array_get(all, 0) : all);
}

/* ---- prune ---- */

void keep_rules(const struct args *a, json_t *keep)
{
	static const char *const rules[][2] = {
		{"keep-last", "last"},	   {"keep-hourly", "hourly"},	{"keep-daily", "daily"},
		{"keep-weekly", "weekly"}, {"keep-monthly", "monthly"}, {"keep-yearly", "yearly"},
		{"keep-within", "within"}, {"keep-tag", "tags"},	{"keep-grid", "grid"},
	};

	for (size_t i = 0; i < ARRAY_SIZE(rules); i++)
		if (opt(a, rules[i][0]))
			json_object_set_new(keep, rules[i][1], json_string(opt(a, rules[i][0])));
}

static void print_lines(json_t *r)
{
	static const char *const heads[] = {"ID", "VM", "NAME", "TAKEN", "", "BECAUSE"};
	static const bool right[] = {true, false, false, false, false, false};
	struct table *t = table_new(heads, right, ARRAY_SIZE(heads));
	bool dry = json_is_true(json_object_get(r, "dry_run"));
	json_t *s;
	size_t i;

	json_array_foreach(json_object_get(r, "snapshots"), i, s)
	{
		char id[24], when[32];
		bool keep = json_is_true(json_object_get(s, "keep"));

		table_row(t, (const char *const[]){text_u64(id, sizeof(id), get_u64(s, "id")),
						   get_text(s, "vm"), get_text(s, "name"),
						   human_time(when, sizeof(when),
							      get_u64(s, "taken_ns")),
						   keep	 ? "keep"
						   : dry ? "would delete"
							 : "deleted",
						   get_text(s, "why")});
	}
	table_print(t);
}

int verb_prune(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *r = NULL;
	json_t *keep = json_object();
	json_t *body = json_pack("{so sb}", "keep", keep, "dry_run", opt(a, "dry-run") != NULL);
	int rc;

	keep_rules(a, keep);
	json_object_set_new(body, "unbacked", json_boolean(opt(a, "unbacked") != NULL));
	if (a->nr_pos)
		json_object_set_new(body, "vm", json_string(a->pos[0]));
	rc = run_job(a, "POST", body, &r, "/v1/prune", NULL, NULL);
	if (rc || a->json)
		return rc ? rc : print_json(r);
	print_lines(r);
	return EXIT_DONE;
}
