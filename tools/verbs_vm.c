/* SPDX-License-Identifier: MIT */
/* verbs_vm: vms, snapshot, self-check, rollback. */
#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"
#include "tools/client.h"
#include "tools/human.h"
#include "tools/out.h"
#include "tools/snapctl.h"

/* "QEMU 7.2.22 pc-q35-7.2", and what stands in the way. */
static void print_blocks(json_t *vm)
{
	json_t *ram = json_object_get(json_object_get(vm, "vmm"), "ram"), *block;
	char bytes[24];
	size_t i;

	if (!json_array_size(ram))
		return;
	printf("%s: memory blocks", get_text(vm, "name"));
	json_array_foreach(ram, i, block)
		printf("%s %s %s", i ? "," : "", get_text(block, "id"),
		       human_bytes(bytes, sizeof(bytes), get_u64(block, "bytes")));
	putchar('\n');
}

static void print_vmm(json_t *vm)
{
	json_t *vmm = json_object_get(vm, "vmm");
	const char *refusal = json_string_value(json_object_get(vm, "refusal"));

	if (json_is_object(vmm))
		printf("%s: %s %s, machine %s\n", get_text(vm, "name"), get_text(vmm, "name"),
		       get_text(vmm, "version"), get_text(vmm, "machine"));
	print_blocks(vm);
	if (refusal)
		printf("%s: cannot be snapshotted: %s\n", get_text(vm, "name"), refusal);
}

int verb_vms(const struct args *a)
{
	static const char *const heads[] = {"VM",    "STATE", "RAM",	       "VCPUS", "PID",
					    "DIRTY", "BY",    "LAST SNAPSHOT", "TAGS"};
	static const bool right[] = {false, false, true, true, true, true, false, true, false};
	_cleanup_(cleanup_json) json_t *o = NULL;
	const char *tag = opt(a, "tag");
	json_t *vm;
	size_t i;
	int rc = call(a, "GET", NULL, &o, tag ? "/v1/vms?tag=%s" : "/v1/vms", tag, NULL);

	if (rc || a->json)
		return rc ? rc : print_json(o);
	struct table *t = table_new(heads, right, ARRAY_SIZE(heads));

	json_array_foreach(json_object_get(o, "vms"), i, vm)
	{
		uint64_t page_size = get_u64(vm, "page_size");
		char ram[24], vcpus[24], pid[24], dirty[24], head[24] = "-";

		if (get_u64(vm, "head_snapshot"))
			text_u64(head, sizeof(head), get_u64(vm, "head_snapshot"));
		table_row(t, (const char *const[]){
				     get_text(vm, "name"), get_text(vm, "state"),
				     human_bytes(ram, sizeof(ram), get_u64(vm, "ram_bytes")),
				     text_u64(vcpus, sizeof(vcpus), get_u64(vm, "vcpus")),
				     text_u64(pid, sizeof(pid), get_u64(vm, "pid")),
				     human_bytes(dirty, sizeof(dirty),
						 get_u64(vm, "dirty_frames") * page_size),
				     get_text(vm, "dirty_backend"), head, get_text(vm, "tags")});
	}
	table_print(t);
	json_array_foreach(json_object_get(o, "vms"), i, vm) print_vmm(vm);
	return EXIT_DONE;
}

static void set_text(json_t *o, const char *key, const char *value)
{
	if (value)
		json_object_set_new(o, key, json_string(value));
}

int verb_tag(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *o = NULL;
	json_t *body = json_object();
	int rc;

	set_text(body, "tags", opt(a, "set"));
	set_text(body, "add", opt(a, "add"));
	set_text(body, "remove", opt(a, "remove"));
	if (json_object_size(body)) {
		rc = call(a, "PATCH", body, &o, "/v1/vms/%s/tags", a->pos[0], NULL);
	} else {
		json_decref(body);
		rc = call(a, "GET", NULL, &o, "/v1/vms/%s/tags", a->pos[0], NULL);
	}
	if (rc || a->json)
		return rc ? rc : print_json(o);
	puts(get_text(o, "tags"));
	return EXIT_DONE;
}

static void print_missed(json_t *check)
{
	json_t *pages = json_object_get(check, "pages"), *p;
	size_t i;

	json_array_foreach(pages, i, p)
	{
		printf("  GPA 0x%012llx  ", (unsigned long long)get_u64(p, "gpa"));
		if (json_is_true(json_object_get(p, "mapped")))
			printf("slot %llu, address space %llu, generation %llu",
			       (unsigned long long)get_u64(p, "slot"),
			       (unsigned long long)get_u64(p, "as_id"),
			       (unsigned long long)get_u64(p, "generation"));
		else
			printf("not mapped");
		printf("; before epoch %llu, sound at %llu\n",
		       (unsigned long long)get_u64(p, "epoch"),
		       (unsigned long long)get_u64(p, "sound_at"));
	}
	if (i < get_u64(check, "missed"))
		printf("  and %llu more\n", (unsigned long long)get_u64(check, "missed") - i);
}

/* What the check of a snapshot or an epoch found. */
static int check_outcome(const struct args *a, json_t *result)
{
	json_t *check = json_object_get(result, "self_check");
	uint64_t missed = get_u64(check, "missed");
	char time[24];

	if (!check)
		return EXIT_DONE;
	if (!a->json)
		printf("%s: %llu of %llu pages compared in %s%s: %llu missed\n", a->pos[0],
		       (unsigned long long)get_u64(check, "checked"),
		       (unsigned long long)get_u64(check, "total"),
		       human_seconds(time, sizeof(time), (double)get_u64(check, "ns") / 1e9),
		       json_is_true(json_object_get(check, "complete"))
			       ? ""
			       : " (time was up: the next check goes on)",
		       (unsigned long long)missed);
	if (!a->json)
		print_missed(check);
	return missed ? fail(EXIT_CORRUPT,
			     "%llu pages of %s had changed unreported; they are stored now, but "
			     "earlier snapshots may have them wrong",
			     (unsigned long long)missed, a->pos[0])
		      : EXIT_DONE;
}

int verb_self_check(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *result = NULL;
	int rc = run_job(a, "POST", NULL, &result, "/v1/vms/%s/self-check", a->pos[0], NULL);

	if (rc)
		return rc;
	if (a->json)
		print_json(result);
	return check_outcome(a, result);
}

int verb_snapshot(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *result = NULL;
	char changed[24], pause[24];
	json_t *body = json_object(), *s;
	int rc;

	set_text(body, "name", opt(a, "name"));
	set_text(body, "note", opt(a, "note"));
	set_text(body, "tags", opt(a, "tag"));
	set_text(body, "compression", opt(a, "compression"));
	if (opt(a, "self-check"))
		json_object_set_new(body, "self_check", json_true());
	if (opt(a, "pin"))
		json_object_set_new(body, "pinned", json_true());
	rc = run_job(a, "POST", body, &result, "/v1/vms/%s/snapshots", a->pos[0], NULL);
	if (rc)
		return rc;
	if (a->json) {
		print_json(result);
		return check_outcome(a, result);
	}
	s = json_object_get(result, "snapshot");
	printf("%s@%llu%s%s: %s changed, paused for %s\n", get_text(s, "vm"),
	       (unsigned long long)get_u64(s, "id"), *get_text(s, "name") ? " " : "",
	       get_text(s, "name"),
	       human_bytes(changed, sizeof(changed),
			   get_u64(s, "changed_pages") * get_u64(s, "page_size")),
	       human_seconds(pause, sizeof(pause), (double)get_u64(s, "pause_ns") / 1e9));
	return check_outcome(a, result);
}

/* Where its VMM tells of some: what a rollback left alone. */
static void print_disks(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *vm = NULL;
	json_t *disks, *disk;
	size_t i;

	if (call(a, "GET", NULL, &vm, "/v1/vms/%s", a->pos[0], NULL))
		return;
	disks = json_object_get(json_object_get(json_object_get(vm, "vm"), "vmm"), "disks");
	json_array_foreach(disks, i, disk)
		printf("%s: not rolled back: %s\n", a->pos[0], get_text(disk, "file"));
}

int verb_rollback(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *result = NULL;
	json_t *body = json_pack("{ss}", "snapshot", a->pos[1]);
	int rc;

	if (!body)
		return fail(EXIT_USAGE, "%s: not a selector", a->pos[1]);
	if (opt(a, "check"))
		json_object_set_new(body, "check", json_true());
	if (opt(a, "other-vm"))
		json_object_set_new(body, "other_vm", json_true());
	rc = run_job(a, "POST", body, &result, "/v1/vms/%s/rollback", a->pos[0], NULL);
	if (rc || a->json)
		return rc ? rc : print_json(result);
	printf("%s is at %s again: %llu pages written%s\n", a->pos[0], a->pos[1],
	       (unsigned long long)get_u64(result, "pages"),
	       json_is_true(json_object_get(result, "checked")) ? "; memory and state compared"
								: "");
	print_disks(a);
	return EXIT_DONE;
}
