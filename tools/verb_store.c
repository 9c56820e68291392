/* SPDX-License-Identifier: MIT */
/* verb_store: the store as a whole: figures, space, check. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "tools/client.h"
#include "tools/human.h"
#include "tools/out.h"
#include "tools/progress.h"
#include "tools/snapctl.h"

#define NS_PER_S 1000000000ull

/* --rate, where it was given. */
static int rate_body(const struct args *a, json_t *body)
{
	const char *rate = opt(a, "rate");
	uint64_t n;

	if (!rate)
		return 0;
	if (parse_bytes(rate, &n))
		return fail(EXIT_USAGE, "--rate %s: bytes a second, such as 20M", rate);
	json_object_set_new(body, "rate", json_integer((json_int_t)n));
	return 0;
}

/* ---- figures ---- */

static void print_owners(json_t *r)
{
	static const char *const heads[] = {"SNAPSHOT", "MEMORY", "UNIQUE"};
	static const bool right[] = {true, true, true};
	struct table *t = table_new(heads, right, ARRAY_SIZE(heads));
	json_t *s;
	size_t i;

	json_array_foreach(json_object_get(r, "snapshots"), i, s)
	{
		char id[24], logical[24], unique[24];

		table_row(t, (const char *const[]){text_u64(id, sizeof(id), get_u64(s, "id")),
						   human_bytes(logical, sizeof(logical),
							       get_u64(s, "bytes_logical")),
						   human_bytes(unique, sizeof(unique),
							       get_u64(s, "bytes_unique"))});
	}
	table_print(t);
}

static int store_account(const struct args *a)
{
	static const char *const rows[][2] = {{"bytes_unique", "of one snapshot only"},
					      {"bytes_shared", "shared"},
					      {"bytes_live", "of running VMs only"},
					      {"bytes_dead", "dead"},
					      {"bytes_headers", "headers, manifests, states"}};
	_cleanup_(cleanup_json) json_t *r = NULL;
	char text[24];
	int rc = run_job(a, "POST", NULL, &r, "/v1/store/account", NULL, NULL);

	if (rc || a->json)
		return rc ? rc : print_json(r);
	for (size_t i = 0; i < ARRAY_SIZE(rows); i++)
		printf("%-28s %10s\n", rows[i][1],
		       human_bytes(text, sizeof(text), get_u64(r, rows[i][0])));
	print_owners(r);
	return EXIT_DONE;
}

static void print_scrubbed(uint64_t ended_s, uint64_t damages)
{
	char when[32];

	if (ended_s)
		printf("%-20s %10s\n", "scrubbed",
		       human_time(when, sizeof(when), ended_s * NS_PER_S));
	if (damages)
		printf("%-20s %10llu: snapctl store scrub names them\n", "  damages",
		       (unsigned long long)damages);
}

static int store_stats(const struct args *a)
{
	static const struct {
		const char *key, *label;
		bool bytes;
	} rows[] = {
		{"snapshots", "snapshots", false},
		{"vms", "VMs", false},
		{"timelines", "timelines", false},
		{"epochs", "epochs", false},
		{"segments", "segments", false},
		{"segments_free", "  of them free", false},
		{"bytes_on_disk", "on disk", true},
		{"bytes_used", "  used", true},
		{"bytes_index", "  index", true},
		{"bytes_limit", "limit", true},
		{"bytes_soft_limit", "soft limit", true},
		{"bytes_logical", "memory in snapshots", true},
		{"pages_stored", "pages stored", false},
		{"dedup_entries", "known for dedup", false},
	};
	_cleanup_(cleanup_json) json_t *o = NULL;
	char text[24];
	int rc;

	if (opt(a, "exact"))
		return store_account(a);
	rc = call(a, "GET", NULL, &o, "/v1/store/stats", NULL, NULL);
	if (rc || a->json)
		return rc ? rc : print_json(o);
	for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
		uint64_t v = get_u64(o, rows[i].key);

		if (v || !strstr(rows[i].key, "limit"))
			printf("%-20s %10s\n", rows[i].label,
			       human_amount(text, sizeof(text), v, rows[i].bytes));
	}
	if (json_is_true(json_object_get(o, "over_soft_limit")))
		puts("over the soft limit: policies leave out every second point");
	print_scrubbed(get_u64(o, "scrub_ended_s"), get_u64(o, "scrub_damages"));
	return EXIT_DONE;
}

static int store_gc(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *r = NULL;
	char text[24];
	json_t *body = json_object();
	int rc = rate_body(a, body);

	if (rc) {
		json_decref(body);
		return rc;
	}
	rc = run_job(a, "POST", body, &r, "/v1/store/gc", NULL, NULL);
	if (rc || a->json)
		return rc ? rc : print_json(r);
	printf("%s given back\n", human_bytes(text, sizeof(text), get_u64(r, "bytes_freed")));
	return EXIT_DONE;
}

/* ---- check ---- */

static int check_body(const struct args *a, json_t *body)
{
	const char *percent = opt(a, "read-data");
	uint64_t n;
	char *end;

	json_object_set_new(body, "read_data", json_boolean(percent != NULL));
	if (percent && *percent) {
		n = strtoul(percent, &end, 10);
		if (*end == '%')
			end++;
		if (*percent < '0' || *percent > '9' || *end || !n || n > 100)
			return fail(EXIT_USAGE, "--read-data=%s: 1 to 100 percent", percent);
		json_object_set_new(body, "percent", json_integer((json_int_t)n));
	}
	return rate_body(a, body);
}

static void print_loss(json_t *l)
{
	json_t *range;
	size_t i;

	printf("lost: %s@%llu: ", get_text(l, "vm"), (unsigned long long)get_u64(l, "snapshot"));
	if (json_is_true(json_object_get(l, "whole"))) {
		puts("its map or its state can't be read");
		return;
	}
	printf("%llu pages:", (unsigned long long)get_u64(l, "pages"));
	json_array_foreach(json_object_get(l, "ranges"), i, range)
	{
		uint64_t gpa = (uint64_t)json_integer_value(json_array_get(range, 0));
		uint64_t len = (uint64_t)json_integer_value(json_array_get(range, 1));

		printf(" 0x%llx+0x%llx", (unsigned long long)gpa, (unsigned long long)len);
	}
	putchar('\n');
}

static int print_check(const struct args *a, json_t *r)
{
	bool whole = json_is_true(json_object_get(r, "whole"));
	char bytes[24];
	json_t *line;
	size_t i;

	if (a->json) {
		print_json(r);
		return whole ? EXIT_DONE : EXIT_CORRUPT;
	}
	json_array_foreach(json_object_get(r, "damages"), i, line)
		printf("%s: %s\n", get_text(line, "kind"), get_text(line, "text"));
	json_array_foreach(json_object_get(r, "losses"), i, line) print_loss(line);
	printf("%llu records, %llu segments, %llu batches, %llu blobs, %llu pages; %s read\n",
	       (unsigned long long)get_u64(r, "records"),
	       (unsigned long long)get_u64(r, "segments"),
	       (unsigned long long)get_u64(r, "batches"), (unsigned long long)get_u64(r, "blobs"),
	       (unsigned long long)get_u64(r, "pages_read"),
	       human_bytes(bytes, sizeof(bytes), get_u64(r, "bytes_read")));
	if (get_u64(r, "scrub_damages"))
		printf("the last scrub found %llu damages: snapctl store scrub names them\n",
		       (unsigned long long)get_u64(r, "scrub_damages"));
	if (!whole)
		return fail(EXIT_CORRUPT, "%llu damages, %llu snapshots touched",
			    (unsigned long long)get_u64(r, "nr_damages"),
			    (unsigned long long)get_u64(r, "nr_losses"));
	puts("whole");
	return EXIT_DONE;
}

static int store_check(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *r = NULL, *body = json_object();
	int rc = check_body(a, body);

	if (!rc)
		rc = run_job(a, "POST", json_incref(body), &r, "/v1/store/check", NULL, NULL);
	return rc ? rc : print_check(a, r);
}

static int store_repair(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *r = NULL;
	json_t *body = json_pack("{sb}", "dry_run", opt(a, "dry-run") != NULL), *l;
	size_t i;
	int rc = run_job(a, "POST", body, &r, "/v1/store/repair", NULL, NULL);

	if (rc || a->json)
		return rc ? rc : print_json(r);
	json_array_foreach(json_object_get(r, "damages"), i, l)
		printf("%s: %s\n", get_text(l, "kind"), get_text(l, "text"));
	json_array_foreach(json_object_get(r, "losses"), i, l) print_loss(l);
	if (opt(a, "dry-run"))
		printf("%llu snapshots would be dropped\n",
		       (unsigned long long)get_u64(r, "nr_losses"));
	else
		printf("%llu snapshots dropped\n", (unsigned long long)get_u64(r, "dropped"));
	return EXIT_DONE;
}

/* ---- scrub ---- */

static int scrub_ask(const struct args *a, json_t **ret)
{
	static const char *const actions[] = {"now", "pause", "resume", "cancel"};
	const char *action = NULL;
	int nr = opt(a, "status") != NULL;

	for (size_t i = 0; i < ARRAY_SIZE(actions); i++) {
		if (!opt(a, actions[i]))
			continue;
		action = actions[i];
		nr++;
	}
	if (nr > 1)
		return fail(EXIT_USAGE, "store scrub: one of --status, --now, --pause, --resume "
					"and --cancel");
	if (!action)
		return call(a, "GET", NULL, ret, "/v1/store/scrub", NULL, NULL);
	return call(a, "POST", json_pack("{ss}", "action", action), ret, "/v1/store/scrub", NULL,
		    NULL);
}

/* Ctrl-C ends the waiting, not the scrub. */
static int scrub_wait(const struct args *a, json_t **o)
{
	int rc = 0;

	while (!rc && !strcmp(get_text(*o, "state"), "running")) {
		progress_show(a, "scrub", get_u64(*o, "done"), get_u64(*o, "total"), true);
		usleep(100000);
		json_decref(*o);
		*o = NULL;
		rc = call(a, "GET", NULL, o, "/v1/store/scrub", NULL, NULL);
	}
	progress_clear();
	return rc;
}

/* Returns how many damages it found. */
static uint64_t print_pass(const char *what, json_t *pass)
{
	char when[32], bytes[24];
	uint64_t ended_s = get_u64(pass, "ended_s");
	json_t *line;
	size_t i;

	if (!json_is_object(pass))
		return 0;
	printf("%s: began %s", what,
	       human_time(when, sizeof(when), get_u64(pass, "began_s") * NS_PER_S));
	if (ended_s)
		printf(", ended %s", human_time(when, sizeof(when), ended_s * NS_PER_S));
	printf(", %s read, %llu damages\n",
	       human_bytes(bytes, sizeof(bytes), get_u64(pass, "bytes")),
	       (unsigned long long)get_u64(pass, "nr_damages"));
	json_array_foreach(json_object_get(pass, "damages"), i, line)
		printf("%s: %s\n", get_text(line, "kind"), get_text(line, "text"));
	return get_u64(pass, "nr_damages");
}

static int print_scrub(json_t *o)
{
	uint64_t next_s = get_u64(o, "next_s"), damages;
	char when[32];

	printf("%s", get_text(o, "state"));
	if (!strcmp(get_text(o, "state"), "idle") && next_s)
		printf(", the next begins %s", human_time(when, sizeof(when), next_s * NS_PER_S));
	putchar('\n');
	if (*get_text(o, "said"))
		printf("trouble: %s\n", get_text(o, "said"));
	damages = print_pass("this one", json_object_get(o, "pass"));
	damages += print_pass("the last", json_object_get(o, "last"));
	if (!damages)
		return EXIT_DONE;
	return fail(EXIT_CORRUPT,
		    "%llu damages; snapctl store check --read-data tells what they cost",
		    (unsigned long long)damages);
}

static int store_scrub(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *o = NULL;
	int rc = scrub_ask(a, &o);

	if (!rc && opt(a, "wait"))
		rc = scrub_wait(a, &o);
	if (rc || !a->json)
		return rc ? rc : print_scrub(o);
	print_json(o);
	return get_u64(json_object_get(o, "pass"), "nr_damages") ||
			       get_u64(json_object_get(o, "last"), "nr_damages")
		       ? EXIT_CORRUPT
		       : EXIT_DONE;
}

/* ---- which ---- */

int verb_store(const struct args *a)
{
	static const struct {
		const char *name;
		int (*fn)(const struct args *a);
	} subs[] = {{"stats", store_stats},	{"gc", store_gc},
		    {"check", store_check},	{"repair", store_repair},
		    {"scrub", store_scrub},	{"rebuild-index", store_rebuild},
		    {"rekey", store_change_key}};

	for (size_t i = 0; i < ARRAY_SIZE(subs); i++)
		if (!strcmp(a->pos[0], subs[i].name))
			return subs[i].fn(a);
	return fail(EXIT_USAGE, "unknown: store %s: %s", a->pos[0], a->verb->usage);
}
