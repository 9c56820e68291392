/* SPDX-License-Identifier: MIT */
/*
 * backends: the memory backends on a command line are made ones that can be shared, or refused with
 * the reason.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>

#include "adapters/qemu/cmdline_priv.h"
#include "adapters/qemu/props.h"
#include "snapd/util/cleanup.h"

#include <linux/magic.h>

#ifndef HUGETLBFS_MAGIC
#define HUGETLBFS_MAGIC 0x958458f6
#endif

static bool on_hugetlbfs(const char *path)
{
	struct statfs fs;

	return !statfs(path, &fs) && fs.f_type == HUGETLBFS_MAGIC;
}

/* Of an existing file, or where QEMU would make one.  What does not exist is QEMU's to refuse. */
static bool on_tmpfs(const char *path)
{
	_cleanup_free_ char *dir = must(strdup(path));
	char *slash = strrchr(dir, '/');
	struct statfs fs;

	if (statfs(path, &fs)) {
		if (slash)
			*slash = '\0';
		if (statfs(slash ? *dir ? dir : "/" : ".", &fs))
			return true;
	}
	return fs.f_type == TMPFS_MAGIC;
}

static void set_prop(struct option *o, const char *key, const char *value)
{
	const char *text = o->changed ? o->changed : o->given;
	char *changed = NULL;

	json_object_set_new(o->props, key, json_string(value));
	if (*text == '{') {
		json_t *json = must(json_loads(text, 0, NULL));

		json_object_set_new(json, key,
				    !strcmp(value, "on") ? json_true() : json_string(value));
		changed = json_dumps(json, JSON_COMPACT);
		json_decref(json);
	} else if (asprintf(&changed, "%s,%s=%s", text, key, value) < 0) {
		abort();
	}
	free(o->changed);
	o->changed = must(changed);
}

/* memory-backend-ram is anonymous memory, which no other process can see. */
static void ram_to_memfd(struct parsed *p, struct option *o)
{
	static const char from[] = "memory-backend-ram";
	const char *at = strstr(o->given, from);
	char *changed;

	if (asprintf(&changed, "%.*smemory-backend-memfd%s", (int)(at - o->given), o->given,
		     at + strlen(from)) < 0)
		abort();
	o->changed = changed;
	json_object_set_new(o->props, "qom-type", json_string("memory-backend-memfd"));
	parsed_note(p, "memory %s becomes a memfd: private memory cannot be shared",
		    props_get(o->props, "id"));
}

static int fix_backend(struct parsed *p, struct option *o, struct err *e)
{
	const char *type = props_get(o->props, "qom-type"), *id = props_get(o->props, "id");
	const char *path = props_get(o->props, "mem-path");

	if (!begins(type, "memory-backend-"))
		return 0;
	if (props_on(o->props, "hugetlb") || on_hugetlbfs(path))
		return err_set(e, EINVAL, "memory %s is of huge pages, which is not supported", id);
	if (props_on(o->props, "pmem"))
		return err_set(e, EINVAL, "memory %s is persistent memory, not guest RAM", id);
	if (!strcmp(type, "memory-backend-file") && !props_on(o->props, "share"))
		return err_set(e, EINVAL,
			       "memory %s maps %s private: add share=on, or use "
			       "memory-backend-memfd",
			       id, path);
	if (!strcmp(type, "memory-backend-file") && !on_tmpfs(path))
		return err_set(
			e, EINVAL,
			"memory %s is a file on a disk, %s, which is not supported: use a file in "
			"/dev/shm, or memory-backend-memfd",
			id, path);
	if (!strcmp(type, "memory-backend-ram"))
		ram_to_memfd(p, o);
	if (!props_on(o->props, "share"))
		set_prop(o, "share", "on");
	return 0;
}

int backends_fix(struct parsed *p, struct err *e)
{
	int rc = 0;

	for (size_t i = 0; !rc && i < p->n; i++)
		if (option_is(&p->o[i], "object") && !p->o[i].gone)
			rc = fix_backend(p, &p->o[i], e);
	return rc;
}
