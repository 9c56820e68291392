/* SPDX-License-Identifier: MIT */
/* Tags of VMs: see tags.h. */
#include "snapd/core/tags.h"

#include <errno.h>
#include <fnmatch.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jansson.h>

#include "include/snapd/protocol.h"
#include "snapd/core/json.h"
#include "snapd/policy/keep.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/inifile.h"
#include "snapd/util/savefile.h"

#define SET_MAX	     256 /* bytes of one line of tags, with the NUL */
#define PATTERNS_MAX 4096
#define SET_FILE     "vm-tags.json"

struct pattern {
	char *glob; /* owned */
	char tags[SET_MAX];
};

struct patterns {
	struct pattern *list; /* owned */
	size_t nr;
};

struct vm_tags {
	char *file, *store_dir; /* owned */
	pthread_mutex_t lock;
	/* lock */
	struct patterns patterns;
	json_t *set; /* "UID/NAME": tags; owned */
};

/* ---- lists of tags ---- */

static bool is_tag(const char *s, size_t len)
{
	static const char allowed[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
				      "0123456789._:/-";

	for (size_t i = 0; i < len; i++)
		if (!strchr(allowed, s[i]))
			return false;
	return len;
}

/* Add to `list`, of `size` bytes, what it has not and `without` (may be NULL) has not. */
static int add_tags(char *list, size_t size, const char *tags, const char *without, struct err *e)
{
	char one[SET_MAX];

	for (const char *s = tags + strspn(tags, ", "); *s; s += strspn(s, ", ")) {
		size_t len = strcspn(s, ", "), used = strlen(list);

		if (!is_tag(s, len) || len >= sizeof(one))
			return err_set(e, EINVAL,
				       "tag '%.*s': want letters, digits, '.', '_', ':', '/', '-'",
				       (int)MIN(len, (size_t)40), s);
		snprintf(one, sizeof(one), "%.*s", (int)len, s);
		s += len;
		if (keep_has_tag(list, one) || (without && keep_has_tag(without, one)))
			continue;
		if (used + 1 + len >= size)
			return err_set(e, EINVAL, "tags: more than %zu bytes", size - 1);
		snprintf(list + used, size - used, "%s%s", used ? "," : "", one);
	}
	return 0;
}

/* ---- the people's file ---- */

static void patterns_deinit(struct patterns *p)
{
	for (size_t i = 0; i < p->nr; i++)
		free(p->list[i].glob);
	free(p->list);
	*p = (struct patterns){0};
}

static int add_pattern(struct patterns *p, const char *glob, const char *tags, struct err *e)
{
	struct pattern *list = NULL, one = {0};
	int rc = add_tags(one.tags, sizeof(one.tags), tags, NULL, e);

	if (!rc && p->nr == PATTERNS_MAX)
		rc = err_set(e, EINVAL, "more than %d lines of tags", PATTERNS_MAX);
	if (rc)
		return rc;
	one.glob = strdup(glob);
	if (one.glob)
		list = realloc(p->list, (p->nr + 1) * sizeof(*list));
	if (!list) {
		free(one.glob);
		return err_errno(e, ENOMEM, "tags");
	}
	p->list = list;
	list[p->nr++] = one;
	return 0;
}

static int on_line(void *arg, const char *section, const char *key, const char *value,
		   struct err *e)
{
	if (*section && strcmp(section, "tags") != 0)
		return err_set(e, EINVAL, "unknown section [%.40s]", section);
	return add_pattern(arg, key, value, e);
}

int vm_tags_reload(struct vm_tags *t, struct err *e)
{
	struct patterns new = {0}, old;
	struct err why = {0};
	int rc = inifile_read(t->file, on_line, &new, &why);

	if (rc && rc != -ENOENT) {
		patterns_deinit(&new);
		return err_set(e, -rc, "%s", why.text);
	}
	pthread_mutex_lock(&t->lock);
	old = t->patterns;
	t->patterns = new;
	pthread_mutex_unlock(&t->lock);
	patterns_deinit(&old);
	return 0;
}

/* ---- what was set ---- */

static int load_set(struct vm_tags *t, struct err *e)
{
	char path[PATH_MAX], checked[SET_MAX] = "";
	json_error_t why;
	const char *key;
	json_t *value;

	if (snprintf(path, sizeof(path), "%s/" SET_FILE, t->store_dir) >= (int)sizeof(path))
		return err_errno(e, ENAMETOOLONG, "%s", t->store_dir);
	if (access(path, F_OK) && errno == ENOENT) {
		t->set = json_object();
		return t->set ? 0 : err_errno(e, ENOMEM, "tags");
	}
	t->set = json_load_file(path, JSON_REJECT_DUPLICATES, &why);
	if (!json_is_object(t->set))
		return err_set(e, EINVAL, "%s line %d: %s", path, t->set ? 1 : why.line,
			       t->set ? "not an object" : why.text);
	json_object_foreach(t->set, key, value)
	{
		checked[0] = '\0';
		if (!json_is_string(value) ||
		    add_tags(checked, sizeof(checked), json_string_value(value), NULL, e))
			return err_set(e, EINVAL, "%s: \"%.60s\" has no list of tags", path, key);
	}
	return 0;
}

/* The file as a whole, or as it was. */
static int save_set(struct vm_tags *t, json_t *set, struct err *e)
{
	_cleanup_free_ char *text = json_text(set, JSON_INDENT(1) | JSON_SORT_KEYS);

	return text ? savefile(t->store_dir, SET_FILE, text, e) : err_errno(e, ENOMEM, "tags");
}

static void full_name(char name[SNAPD_NAME_MAX + 16], const char *vm, uint32_t uid)
{
	snprintf(name, SNAPD_NAME_MAX + 16, "%u/%.*s", uid, SNAPD_NAME_MAX, vm);
}

/* Under the lock. */
static const char *set_of(const struct vm_tags *t, const char *full)
{
	const char *tags = json_string_value(json_object_get(t->set, full));

	return tags ? tags : "";
}

static int change(struct vm_tags *t, const char *full, const char *tags, struct err *e)
{
	json_t *set = json_copy(t->set);
	int rc;

	if (!set || (*tags ? json_object_set_new(set, full, json_string(tags)) : 0)) {
		json_decref(set);
		return err_errno(e, ENOMEM, "tags");
	}
	if (!*tags)
		json_object_del(set, full);
	rc = save_set(t, set, e);
	if (!rc) {
		json_decref(t->set);
		t->set = json_incref(set);
	}
	json_decref(set);
	return rc;
}

int vm_tags_change(struct vm_tags *t, const char *vm, uint32_t uid, const char *tags,
		   const char *add, const char *remove, struct err *e)
{
	char full[SNAPD_NAME_MAX + 16], new[SET_MAX] = "", unwanted[SET_MAX] = "";
	int rc = 0;

	full_name(full, vm, uid);
	if (remove)
		rc = add_tags(unwanted, sizeof(unwanted), remove, NULL, e);
	pthread_mutex_lock(&t->lock);
	if (!rc)
		rc = add_tags(new, sizeof(new), tags ? tags : set_of(t, full), unwanted, e);
	if (!rc && add)
		rc = add_tags(new, sizeof(new), add, unwanted, e);
	if (!rc && strcmp(new, set_of(t, full)) != 0)
		rc = change(t, full, new, e);
	pthread_mutex_unlock(&t->lock);
	return rc;
}

/* ---- asking ---- */

void vm_tags_set_ones(struct vm_tags *t, const char *vm, uint32_t uid, char ret[VM_TAGS_MAX])
{
	char full[SNAPD_NAME_MAX + 16];

	*ret = '\0';
	if (!t)
		return;
	full_name(full, vm, uid);
	pthread_mutex_lock(&t->lock);
	snprintf(ret, VM_TAGS_MAX, "%s", set_of(t, full));
	pthread_mutex_unlock(&t->lock);
}

void vm_tags_of(struct vm_tags *t, const char *vm, uint32_t uid, char ret[VM_TAGS_MAX])
{
	char full[SNAPD_NAME_MAX + 16];

	vm_tags_set_ones(t, vm, uid, ret);
	if (!t)
		return;
	full_name(full, vm, uid);
	pthread_mutex_lock(&t->lock);
	for (size_t i = 0; i < t->patterns.nr; i++) {
		const struct pattern *p = &t->patterns.list[i];

		/* What does not fit any more is left out. */
		if (!fnmatch(p->glob, strchr(p->glob, '/') ? full : vm, 0))
			add_tags(ret, VM_TAGS_MAX, p->tags, NULL, NULL);
	}
	pthread_mutex_unlock(&t->lock);
}

/* ---- life ---- */

int vm_tags_open(const char *file, const char *store_dir, struct vm_tags **ret, struct err *e)
{
	struct vm_tags *t = calloc(1, sizeof(*t));
	int rc = 0;

	if (!t)
		return err_errno(e, ENOMEM, "tags");
	pthread_mutex_init(&t->lock, NULL);
	t->file = strdup(file);
	t->store_dir = strdup(store_dir);
	if (!t->file || !t->store_dir)
		rc = err_errno(e, ENOMEM, "tags");
	if (!rc)
		rc = vm_tags_reload(t, e);
	if (!rc)
		rc = load_set(t, e);
	if (rc) {
		vm_tags_close(t);
		return rc;
	}
	*ret = t;
	return 0;
}

void vm_tags_close(struct vm_tags *t)
{
	if (!t)
		return;
	patterns_deinit(&t->patterns);
	json_decref(t->set);
	pthread_mutex_destroy(&t->lock);
	free(t->file);
	free(t->store_dir);
	free(t);
}
