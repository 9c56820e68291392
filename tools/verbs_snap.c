/* SPDX-License-Identifier: MIT */
/* verbs_snap: show, diff, verify. */
#include <string.h>

#include "snapd/util/cleanup.h"
#include "tools/client.h"
#include "tools/human.h"
#include "tools/out.h"
#include "tools/snapctl.h"

#define DIFF_SHOWN 20

static void print_row(const char *label, const char *text)
{
	if (*text)
		printf("%-10s %s\n", label, text);
}

static void print_bytes(const char *label, uint64_t bytes)
{
	char text[24];

	print_row(label, human_bytes(text, sizeof(text), bytes));
}

static void show_snapshot(json_t *s, json_t *state)
{
	uint64_t page_size = get_u64(s, "page_size");
	json_t *stats = json_object_get(s, "stats"), *point = json_object_get(s, "point");
	char text[128];

	snprintf(text, sizeof(text), "%s@%llu", get_text(s, "vm"),
		 (unsigned long long)get_u64(s, "id"));
	print_row("snapshot", text);
	print_row("name", get_text(s, "name"));
	print_row("note", get_text(s, "note"));
	print_row("tags", get_text(s, "tags"));
	print_row("pinned", json_is_true(json_object_get(s, "pinned")) ? "yes" : "");
	print_row("taken", human_time(text, sizeof(text), get_u64(s, "taken_ns")));
	if (json_is_true(json_object_get(s, "post_mortem")))
		print_row("kind", "post-mortem: memory at its VMM's death, no vCPU state");
	else
		print_row("paused",
			  human_seconds(text, sizeof(text), (double)get_u64(s, "pause_ns") / 1e9));
	if (get_u64(s, "parent"))
		print_row("parent", text_u64(text, sizeof(text), get_u64(s, "parent")));
	snprintf(text, sizeof(text), "timeline %llu, epoch %llu",
		 (unsigned long long)get_u64(point, "timeline"),
		 (unsigned long long)get_u64(point, "epoch"));
	print_row("point", text);
	print_bytes("memory", get_u64(state, "ram_bytes"));
	print_bytes("changed", get_u64(s, "changed_pages") * page_size);
	print_bytes("stored", get_u64(stats, "stored") * page_size);
	print_bytes("state", get_u64(s, "state_bytes"));
}

static void show_vmm(json_t *vm)
{
	json_t *arg;
	size_t i;

	print_row("arch", get_text(vm, "arch"));
	if (!json_array_size(json_object_get(vm, "cmdline")))
		return;
	printf("%-10s", "command");
	json_array_foreach(json_object_get(vm, "cmdline"), i, arg)
		printf(" %s", json_string_value(arg));
	putchar('\n');
}

/* How many records there are like the i-th, from it on, and their bytes; 0: it was counted with
 * one before. */
static uint64_t records_like(json_t *records, size_t i, uint64_t *bytes)
{
	json_t *first = json_array_get(records, i), *rec;
	uint64_t nr = 0;

	*bytes = 0;
	for (size_t k = 0; k < json_array_size(records); k++) {
		rec = json_array_get(records, k);
		if (strcmp(get_text(rec, "name"), get_text(first, "name")) != 0 ||
		    get_u64(rec, "version") != get_u64(first, "version"))
			continue;
		if (k < i)
			return 0;
		nr++;
		*bytes += get_u64(rec, "bytes");
	}
	return nr;
}

/* Those of all vCPUs in one line; --json has each. */
static void show_records(json_t *state)
{
	json_t *records = json_object_get(state, "records"), *rec;
	size_t i;

	puts("\nrecords of its state:");
	json_array_foreach(records, i, rec)
	{
		char size[24], times[24] = "";
		uint64_t bytes, nr = records_like(records, i, &bytes);

		if (!nr)
			continue;
		if (nr > 1)
			snprintf(times, sizeof(times), "%llu x", (unsigned long long)nr);
		printf("  %6s %-18s version %llu  %8s\n", times, get_text(rec, "name"),
		       (unsigned long long)get_u64(rec, "version"),
		       human_bytes(size, sizeof(size), bytes));
	}
}

/* What deleting it would free. */
static int show_space(const struct args *a, uint64_t id)
{
	_cleanup_(cleanup_json) json_t *r = NULL;
	json_t *s;
	size_t i;
	int rc = run_job(a, "POST", NULL, &r, "/v1/store/account", NULL, NULL);

	json_array_foreach(json_object_get(r, "snapshots"), i, s) if (get_u64(s, "id") == id)
		print_bytes("unique", get_u64(s, "bytes_unique"));
	return rc;
}

int verb_show(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *state = NULL;
	json_t *vm;
	int rc = call(a, "GET", NULL, &state, "/v1/snapshots/%s/state?payload=0", a->pos[0], NULL);

	if (rc || a->json)
		return rc ? rc : print_json(state);
	vm = json_object_get(state, "vm");
	show_snapshot(json_object_get(state, "snapshot"), state);
	rc = opt(a, "space") ? show_space(a, get_u64(json_object_get(state, "snapshot"), "id")) : 0;
	if (rc)
		return rc;
	show_vmm(vm);
	show_records(state);
	return EXIT_DONE;
}

int verb_diff(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *r = NULL;
	char bytes[24];
	json_t *range;
	size_t i;
	int rc = run_job(a, "GET", NULL, &r, "/v1/snapshots/%s/diff?with=%s", a->pos[0], a->pos[1]);

	if (rc || a->json)
		return rc ? rc : print_json(r);
	printf("%llu pages (%s) in %llu ranges differ\n", (unsigned long long)get_u64(r, "pages"),
	       human_bytes(bytes, sizeof(bytes), get_u64(r, "bytes")),
	       (unsigned long long)get_u64(r, "nr_ranges"));
	json_array_foreach(json_object_get(r, "ranges"), i, range)
	{
		if (i == DIFF_SHOWN && !opt(a, "all"))
			break;
		printf("  0x%012llx  %s\n",
		       (unsigned long long)json_integer_value(json_array_get(range, 0)),
		       human_bytes(bytes, sizeof(bytes),
				   (uint64_t)json_integer_value(json_array_get(range, 1))));
	}
	if (i < get_u64(r, "nr_ranges"))
		printf("  and %llu more%s\n", (unsigned long long)get_u64(r, "nr_ranges") - i,
		       opt(a, "all") ? "" : " (--all)");
	return EXIT_DONE;
}

int verb_verify(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *r = NULL;
	json_t *body = json_pack("{sb}", "digest", opt(a, "digest") != NULL);
	char bytes[24];
	int rc = run_job(a, "POST", body, &r, "/v1/snapshots/%s/verify", a->pos[0], NULL);

	if (rc || a->json)
		return rc ? rc : print_json(r);
	printf("%s: whole: %llu pages (%s), %llu of them zero\n", a->pos[0],
	       (unsigned long long)get_u64(r, "pages"),
	       human_bytes(bytes, sizeof(bytes), get_u64(r, "bytes")),
	       (unsigned long long)get_u64(r, "zero"));
	if (opt(a, "digest"))
		printf("SHA-256 %s: %s\n", get_text(r, "digest"),
		       json_is_true(json_object_get(r, "digest_matches"))
			       ? "equal to the VMM's"
			       : "the VMM recorded none to compare with");
	return EXIT_DONE;
}
