/* SPDX-License-Identifier: MIT */
/*
 * Goal: tags of both sources add up, each once; what was set is there after a restart; what is
 * not right is refused as a whole, and leaves what was there.
 */
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "snapd/core/tags.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"

static char dir[] = "vm-tags.XXXXXX", file[64], set_file[64];
static struct err e;

static void put(const char *path, const char *text)
{
	FILE *f = fopen(path, "w");

	check(f && fputs(text, f) >= 0 && !fclose(f), "%s", path);
}

static void is(struct vm_tags *t, const char *vm, uint32_t uid, const char *want)
{
	char got[VM_TAGS_MAX];

	vm_tags_of(t, vm, uid, got);
	check(!strcmp(got, want), "%u/%s has '%s', not '%s'", uid, vm, got, want);
}

static struct vm_tags *open_tags(void)
{
	struct vm_tags *t = NULL;

	check(!vm_tags_open(file, dir, &t, &e), "%s", e.text);
	return t;
}

static void refused(struct vm_tags *t, const char *text, const char *why)
{
	put(file, text);
	err_clear(&e);
	check(vm_tags_reload(t, &e) == -EINVAL && strstr(e.text, why), "'%s': %s", text, e.text);
}

static void patterns(struct vm_tags *t)
{
	is(t, "web1", 0, "");
	put(file, "[tags]\n; a comment\nweb* = production, eu\n1000/web1 = own\n*1 = eu,one\n");
	check(!vm_tags_reload(t, &e), "%s", e.text);
	is(t, "web1", 0, "production,eu,one");
	is(t, "web1", 1000, "production,eu,own,one");
	is(t, "db", 1000, "");
	refused(t, "[tags]\nweb* = a b?c\n", "line 2: tag 'b?c'");
	refused(t, "[tugs]\nweb* = a\n", "section [tugs]");
	refused(t, "web*\n", "line 1");
	is(t, "web1", 0, "production,eu,one");
	unlink(file);
	check(!vm_tags_reload(t, &e), "%s", e.text);
	is(t, "web1", 0, "");
}

static void changes(struct vm_tags *t)
{
	char longest[300];

	check(!vm_tags_change(t, "db", 7, NULL, "a,b, a", NULL, &e), "%s", e.text);
	is(t, "db", 7, "a,b");
	is(t, "db", 8, "");
	check(!vm_tags_change(t, "db", 7, NULL, "c", "a", &e), "%s", e.text);
	is(t, "db", 7, "b,c");
	check(vm_tags_change(t, "db", 7, "x;y", NULL, NULL, &e) == -EINVAL, "a bad tag was taken");
	memset(longest, 'x', sizeof(longest));
	longest[sizeof(longest) - 1] = '\0';
	check(vm_tags_change(t, "db", 7, NULL, longest, NULL, &e) == -EINVAL,
	      "too long, and taken");
	is(t, "db", 7, "b,c");
	check(!vm_tags_change(t, "db", 8, "d", NULL, NULL, &e), "%s", e.text);
	/* The file cannot be written: nothing changes. */
	chmod(dir, 0500);
	if (access(dir, W_OK)) {
		check(vm_tags_change(t, "db", 8, "e", NULL, NULL, &e) < 0, "not durable");
		is(t, "db", 8, "d");
	}
	chmod(dir, 0700);
}

int main(void)
{
	struct vm_tags *t;

	check(mkdtemp(dir), "mkdtemp");
	snprintf(file, sizeof(file), "%s/vm-tags.conf", dir);
	snprintf(set_file, sizeof(set_file), "%s/vm-tags.json", dir);
	t = open_tags();
	is(NULL, "db", 7, "");
	patterns(t);
	changes(t);
	vm_tags_close(t);
	t = open_tags();
	is(t, "db", 7, "b,c");
	check(!vm_tags_change(t, "db", 7, "", NULL, NULL, &e), "%s", e.text);
	vm_tags_close(t);
	t = open_tags();
	is(t, "db", 7, "");
	is(t, "db", 8, "d");
	vm_tags_close(t);
	err_clear(&e);
	put(set_file, "{\"8/db\": 1}");
	check(vm_tags_open(file, dir, &t, &e) == -EINVAL && strstr(e.text, "8/db"), "%s", e.text);
	put(set_file, "{\"8/db\": ");
	check(vm_tags_open(file, dir, &t, &e) == -EINVAL, "half a file was taken");
	unlink(set_file);
	rmdir(dir);
	printf("tags add up, last, and are refused as a whole\n");
	return 0;
}
