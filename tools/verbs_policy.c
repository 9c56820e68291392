/* SPDX-License-Identifier: MIT */
/* verbs_policy: policy list, show, set, run, pause, resume, rm. */
#include <string.h>
#include <time.h>

#include "snapd/util/cleanup.h"
#include "tools/client.h"
#include "tools/human.h"
#include "tools/out.h"
#include "tools/progress.h"
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
	static const char *const heads[] = {"VM",    "STATE", "LAST",	  "NEXT",    "SNAPSHOT",
					    "PAUSE", "RUNS",  "FAILURES", "SKIPPED", ""};
	static const bool right[] = {false, false, false, false, true,
				     true,  true,  true,  true,	 false};
	struct table *t = table_new(heads, right, ARRAY_SIZE(heads));
	json_t *l;
	size_t i;

	json_array_foreach(lines, i, l)
	{
		char last[32], next[32], snapshot[24] = "-", pause[24] = "-", n[3][24];

		if (get_u64(l, "snapshot"))
			text_u64(snapshot, sizeof(snapshot), get_u64(l, "snapshot"));
		if (get_u64(l, "pause_ns"))
			human_seconds(pause, sizeof(pause), (double)get_u64(l, "pause_ns") / 1e9);
		table_row(t,
			  (const char *const[]){
				  get_text(l, "vm"),
				  json_is_true(json_object_get(l, "attached"))
					  ? get_text(l, "state")
					  : "not there",
				  when_text(last, sizeof(last), json_object_get(l, "last_s")),
				  when_text(next, sizeof(next), json_object_get(l, "next_s")),
				  snapshot, pause, text_u64(n[0], sizeof(n[0]), get_u64(l, "runs")),
				  text_u64(n[1], sizeof(n[1]), get_u64(l, "failures")),
				  text_u64(n[2], sizeof(n[2]), get_u64(l, "skipped")),
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
		printf("%s: %llu epochs in %s, the guest stood still for %.2f%% of the time "
		       "and lost %.2f%% in all, %.0f pages/s stored; the newest point became at "
		       "most %s old\n",
		       get_text(l, "vm"), (unsigned long long)get_u64(c, "epochs"),
		       human_seconds(span, sizeof(span), seconds),
		       json_number_value(json_object_get(c, "paused_share")) * 100,
		       json_number_value(json_object_get(c, "lost_share")) * 100,
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

/* --self-check N; 0 takes it away.  The service says what else N may not be. */
static int apply_self_check(json_t *settings, const char *n)
{
	char word[64];

	if (!n)
		return 0;
	if (!*n || strlen(n) > 20)
		return fail(EXIT_USAGE, "policy set: --self-check '%s' is no number of snapshots",
			    n);
	snprintf(word, sizeof(word), "self_check_every=%s", strcmp(n, "0") != 0 ? n : "");
	return apply(settings, word);
}

static int policy_set_verb(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *o = NULL, *settings = NULL;
	int rc = 0;

	if (a->nr_pos == 2 && !opt(a, "self-check"))
		return fail(EXIT_USAGE, "policy set: nothing to set; KEY=VALUE, or --self-check N");
	rc = settings_now(a, &settings);
	if (!rc)
		rc = apply_self_check(settings, opt(a, "self-check"));
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

/* ---- run ---- */

static bool same_line(json_t *x, json_t *y)
{
	return !strcmp(get_text(x, "vm"), get_text(y, "vm")) &&
	       get_u64(x, "uid") == get_u64(y, "uid");
}

/* The same line in a list of lines; NULL: it is not there. */
static json_t *line_of(json_t *lines, json_t *line)
{
	json_t *l;
	size_t i;

	json_array_foreach(lines, i, l) if (same_line(l, line)) return l;
	return NULL;
}

/* `before`: the lines when it was asked for. */
static bool was_asked(const struct args *a, json_t *line, json_t *before)
{
	if (a->nr_pos > 2 && strcmp(get_text(line, "vm"), a->pos[2]) != 0)
		return false;
	return json_is_true(json_object_get(line_of(before, line), "attached"));
}

static bool has_ended(json_t *line, json_t *before)
{
	json_t *was = line_of(before, line);

	return !json_is_true(json_object_get(line, "attached")) ||
	       get_u64(json_object_get(line, "asked"), "ended") >
		       get_u64(json_object_get(was, "asked"), "ended");
}

/* One VM's outcome. */
static int tell_run(const struct args *a, json_t *line)
{
	json_t *asked = json_object_get(line, "asked");
	char pause[24];

	if (!json_is_true(json_object_get(line, "attached")))
		return fail(EXIT_FAILED, "%s: its VMM has ended", get_text(line, "vm"));
	if (*get_text(asked, "said"))
		return fail(EXIT_FAILED, "%s: %s", get_text(line, "vm"), get_text(asked, "said"));
	if (!a->json)
		printf("%s: snapshot %llu, paused for %s\n", get_text(line, "vm"),
		       (unsigned long long)get_u64(asked, "snapshot"),
		       human_seconds(pause, sizeof(pause),
				     (double)get_u64(asked, "pause_ns") / 1e9));
	return EXIT_DONE;
}

/* Until all that was asked for has ended; *ret: the policy then. */
static int wait_for_runs(const struct args *a, json_t *before, json_t **ret)
{
	for (;;) {
		uint64_t asked = 0, ended = 0;
		json_t *l;
		size_t i;
		int rc = call(a, "GET", NULL, ret, "/v1/policies/%s", a->pos[1], NULL);

		if (rc)
			return rc;
		json_array_foreach(json_object_get(json_object_get(*ret, "policy"), "lines"), i, l)
		{
			if (!was_asked(a, l, before))
				continue;
			asked++;
			ended += has_ended(l, before);
		}
		progress_show(a, "VMs", ended, asked, false);
		if (ended == asked)
			break;
		json_decref(*ret);
		*ret = NULL;
		nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
	}
	progress_clear();
	return 0;
}

static int run_and_wait(const struct args *a, json_t *body_stolen)
{
	_cleanup_(cleanup_json) json_t *was = NULL, *o = NULL, *now = NULL;
	json_t *before, *l;
	size_t i;
	int rc = call(a, "GET", NULL, &was, "/v1/policies/%s", a->pos[1], NULL), worst = EXIT_DONE;

	if (rc) {
		json_decref(body_stolen);
		return rc;
	}
	before = json_object_get(json_object_get(was, "policy"), "lines");
	rc = call(a, "POST", body_stolen, &o, "/v1/policies/%s/run", a->pos[1], NULL);
	if (!rc)
		rc = wait_for_runs(a, before, &now);
	if (rc)
		return rc;
	if (a->json)
		print_json(now);
	json_array_foreach(json_object_get(json_object_get(now, "policy"), "lines"), i, l)
	{
		if (!was_asked(a, l, before))
			continue;
		rc = tell_run(a, l);
		worst = rc ? rc : worst;
	}
	return worst;
}

static int policy_run(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *o = NULL;
	json_t *body = a->nr_pos > 2 ? json_pack("{ss}", "vm", a->pos[2]) : json_object();
	uint64_t nr;
	int rc;

	if (opt(a, "wait"))
		return run_and_wait(a, body);
	rc = call(a, "POST", body, &o, "/v1/policies/%s/run", a->pos[1], NULL);
	if (rc || a->json)
		return rc ? rc : print_json(o);
	nr = get_u64(o, "lines");
	printf("%llu VM%s: snapctl policy show %s tells how it goes\n", (unsigned long long)nr,
	       nr == 1 ? "" : "s", a->pos[1]);
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
		{"set", policy_set_verb, 2, 99, " NAME [--self-check N] KEY=VALUE..."},
		{"run", policy_run, 2, 3, " NAME [VM]"},
		{"pause", policy_pause, 2, 2, " NAME"},
		{"resume", policy_resume, 2, 2, " NAME"},
		{"rm", policy_rm, 2, 2, " NAME"},
	};

	if (opt(a, "wait") && strcmp(a->pos[0], "run") != 0)
		return fail(EXIT_USAGE, "--wait is for policy run");
	if (opt(a, "self-check") && strcmp(a->pos[0], "set") != 0)
		return fail(EXIT_USAGE, "--self-check is for policy set");
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
