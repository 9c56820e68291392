/* SPDX-License-Identifier: MIT */
/* verbs_policy: policy list, show, set, run, pause, resume, rm. */
#include <string.h>
#include <time.h>

#include "snapd/util/cleanup.h"
#include "tools/client.h"
#include "tools/human.h"
#include "tools/out.h"
#include "tools/snapctl.h"

static const char *when_text(char *buf, size_t size, json_t *seconds)
{
	if (!json_integer_value(seconds))
		return "-";
	return human_time(buf, size, (uint64_t)json_integer_value(seconds) * 1000000000);
}

static const char *often(json_t *settings)
{
	static const char *const keys[] = {"every", "schedule", "recovery_point"};

	for (size_t i = 0; i < ARRAY_SIZE(keys); i++)
		if (*get_text(settings, keys[i]))
			return get_text(settings, keys[i]);
	return "";
}

static int policy_list(const struct args *a)
{
	static const char *const heads[] = {"POLICY", "WHEN",	  "VMS", "ATTACHED",
					    "RUNS",   "FAILURES", ""};
	static const bool right[] = {false, false, false, true, true, true, false};
	_cleanup_(cleanup_json) json_t *o = NULL;
	int rc = call(a, "GET", NULL, &o, "/v1/policies", NULL, NULL);
	struct table *t;
	json_t *p, *l;
	size_t i, k;

	if (rc || a->json)
		return rc ? rc : print_json(o);
	t = table_new(heads, right, ARRAY_SIZE(heads));
	json_array_foreach(json_object_get(o, "policies"), i, p)
	{
		json_t *settings = json_object_get(p, "settings");
		uint64_t attached = 0, runs = 0, failures = 0;
		char n[3][24];

		json_array_foreach(json_object_get(p, "lines"), k, l)
		{
			attached += json_is_true(json_object_get(l, "attached"));
			runs += get_u64(l, "runs");
			failures += get_u64(l, "failures");
		}
		table_row(t, (const char *const[]){
				     get_text(p, "name"), often(settings),
				     *get_text(settings, "vms") ? get_text(settings, "vms") : "*",
				     text_u64(n[0], sizeof(n[0]), attached),
				     text_u64(n[1], sizeof(n[1]), runs),
				     text_u64(n[2], sizeof(n[2]), failures),
				     json_is_true(json_object_get(p, "paused")) ? "paused" : ""});
	}
	table_print(t);
	return EXIT_DONE;
}

static void print_lines(json_t *lines)
{
	static const char *const heads[] = {"VM", "STATE", "LAST", "NEXT", "SNAPSHOT", "PAUSE", ""};
	static const bool right[] = {false, false, false, false, true, true, false};
	struct table *t = table_new(heads, right, ARRAY_SIZE(heads));
	json_t *l;
	size_t i;

	json_array_foreach(lines, i, l)
	{
		char last[32], next[32], snapshot[24], pause[24];

		table_row(t, (const char *const[]){
				     get_text(l, "vm"),
				     json_is_true(json_object_get(l, "attached"))
					     ? get_text(l, "state")
					     : "not there",
				     when_text(last, sizeof(last), json_object_get(l, "last_s")),
				     when_text(next, sizeof(next), json_object_get(l, "next_s")),
				     text_u64(snapshot, sizeof(snapshot), get_u64(l, "snapshot")),
				     human_seconds(pause, sizeof(pause),
						   (double)get_u64(l, "pause_ns") / 1e9),
				     get_text(l, "said")});
	}
	table_print(t);
}

/* What continuous epochs cost each guest. */
static void print_costs(json_t *lines)
{
	char span[24], exposed[24];
	json_t *l;
	size_t i;

	json_array_foreach(lines, i, l)
	{
		json_t *c = json_object_get(l, "cost");
		double seconds = (double)get_u64(c, "window_ns") / 1e9;

		if (!json_is_object(c))
			continue;
		printf("%s: %llu epochs in %s, the guest stood still for %.2f%% of the time, "
		       "%.0f pages/s stored; the newest point became at most %s old\n",
		       get_text(l, "vm"), (unsigned long long)get_u64(c, "epochs"),
		       human_seconds(span, sizeof(span), seconds),
		       json_number_value(json_object_get(c, "paused_share")) * 100,
		       (double)get_u64(c, "pages_stored") / seconds,
		       human_seconds(exposed, sizeof(exposed),
				     (double)get_u64(c, "exposed_ns") / 1e9));
	}
}

static int policy_show(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *o = NULL;
	int rc = call(a, "GET", NULL, &o, "/v1/policies/%s", a->pos[1], NULL);
	json_t *p = json_object_get(o, "policy"), *value;
	const char *key;

	if (rc || a->json)
		return rc ? rc : print_json(o);
	json_object_foreach(json_object_get(p, "settings"), key, value)
		printf("%-18s %s\n", key, json_string_value(value));
	putchar('\n');
	print_lines(json_object_get(p, "lines"));
	print_costs(json_object_get(p, "lines"));
	return EXIT_DONE;
}

/* Its settings as they are; an empty object when there is no such policy yet. */
static int settings_now(const struct args *a, json_t **settings)
{
	_cleanup_(cleanup_json) json_t *o = NULL;
	int rc = call(a, "GET", NULL, &o, "/v1/policies", NULL, NULL);
	json_t *p;
	size_t i;

	if (rc)
		return rc;
	*settings = json_object();
	json_array_foreach(json_object_get(o, "policies"), i, p)
	{
		if (strcmp(get_text(p, "name"), a->pos[1]) != 0)
			continue;
		json_object_update(*settings, json_object_get(p, "settings"));
	}
	return 0;
}

/* "KEY=VALUE" sets, "KEY=" takes away. */
static int apply(json_t *settings, const char *word)
{
	const char *value = strchr(word, '=');
	char key[64];

	if (!value || value == word || (size_t)(value - word) >= sizeof(key))
		return fail(EXIT_USAGE, "policy set: '%s' is not KEY=VALUE", word);
	snprintf(key, sizeof(key), "%.*s", (int)(value - word), word);
	if (value[1])
		json_object_set_new(settings, key, json_string(value + 1));
	else
		json_object_del(settings, key);
	return 0;
}

static int policy_set_verb(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *o = NULL, *settings = NULL;
	int rc = settings_now(a, &settings);

	for (int i = 2; !rc && i < a->nr_pos; i++)
		rc = apply(settings, a->pos[i]);
	if (!rc)
		rc = call(a, "PUT", json_pack("{sO}", "settings", settings), &o, "/v1/policies/%s",
			  a->pos[1], NULL);
	return rc || !a->json ? rc : print_json(o);
}

static int change_paused(const struct args *a, bool paused)
{
	_cleanup_(cleanup_json) json_t *o = NULL;
	int rc = call(a, "PATCH", json_pack("{sb}", "paused", paused), &o, "/v1/policies/%s",
		      a->pos[1], NULL);

	return rc || !a->json ? rc : print_json(o);
}

static int policy_pause(const struct args *a)
{
	return change_paused(a, true);
}

static int policy_resume(const struct args *a)
{
	return change_paused(a, false);
}

static int policy_run(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *o = NULL;
	json_t *body = a->nr_pos > 2 ? json_pack("{ss}", "vm", a->pos[2]) : json_object();
	int rc = call(a, "POST", body, &o, "/v1/policies/%s/run", a->pos[1], NULL);

	if (rc || a->json)
		return rc ? rc : print_json(o);
	printf("%llu VMs: snapctl policy show %s tells how it goes\n",
	       (unsigned long long)get_u64(o, "lines"), a->pos[1]);
	return EXIT_DONE;
}

static int policy_rm(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *o = NULL;
	int rc = call(a, "DELETE", NULL, &o, "/v1/policies/%s", a->pos[1], NULL);

	return rc || !a->json ? rc : print_json(o);
}

int verb_policy(const struct args *a)
{
	static const struct {
		const char *name;
		int (*fn)(const struct args *a);
		int min_pos, max_pos;
		const char *usage;
	} verbs[] = {
		{"list", policy_list, 1, 1, ""},
		{"show", policy_show, 2, 2, " NAME"},
		{"set", policy_set_verb, 3, 99, " NAME KEY=VALUE..."},
		{"run", policy_run, 2, 3, " NAME [VM]"},
		{"pause", policy_pause, 2, 2, " NAME"},
		{"resume", policy_resume, 2, 2, " NAME"},
		{"rm", policy_rm, 2, 2, " NAME"},
	};

	for (size_t i = 0; i < ARRAY_SIZE(verbs); i++) {
		if (strcmp(a->pos[0], verbs[i].name) != 0)
			continue;
		if (a->nr_pos < verbs[i].min_pos || a->nr_pos > verbs[i].max_pos)
			return fail(EXIT_USAGE, "usage: snapctl policy %s%s", verbs[i].name,
				    verbs[i].usage);
		return verbs[i].fn(a);
	}
	return fail(EXIT_USAGE, "policy: want list, show, set, run, pause, resume or rm, not '%s'",
		    a->pos[0]);
}
