/* SPDX-License-Identifier: MIT */
/* Things of the store as JSON objects, and rules out of them; see json.h. */
#include "snapd/core/json.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void hex_id(const uint8_t id[16], char ret[33])
{
	for (int i = 0; i < 16; i++)
		sprintf(ret + 2 * i, "%02x", id[i]);
}

static json_t *point_json(struct snapd_point p)
{
	return json_pack("{sI sI}", "timeline", (json_int_t)p.timeline, "epoch",
			 (json_int_t)p.epoch);
}

static json_t *stats_json(const struct store_snapshot *s)
{
	return json_pack("{sI sI sI sI sI sI sI}", "pages_in", (json_int_t)s->stats.pages_in,
			 "zero", (json_int_t)s->stats.zero, "unchanged",
			 (json_int_t)s->stats.unchanged, "duplicate",
			 (json_int_t)s->stats.duplicate, "stored", (json_int_t)s->stats.stored,
			 "collisions", (json_int_t)s->stats.collisions, "bytes_written",
			 (json_int_t)s->stats.bytes_written);
}

char *json_text(json_t *o, size_t flags)
{
	size_t len = json_dumpb(o, NULL, 0, flags);
	char *text = len ? malloc(len + 1) : NULL;

	/* All of the room is there, so nothing has to grow. */
	if (text && json_dumpb(o, text, len, flags) != len) {
		free(text);
		return NULL;
	}
	if (text)
		text[len] = '\0';
	return text;
}

json_t *snapshot_json(const struct store_snapshot *s)
{
	char vm_id[33];

	hex_id(s->vm, vm_id);
	return json_pack("{sI ss ss sI sI so so sI sI sI sI sI so ss ss ss sb sb}", "id",
			 (json_int_t)s->id, "vm", s->vm_name, "vm_id", vm_id, "uid",
			 (json_int_t)s->uid, "page_size", (json_int_t)s->page_size, "point",
			 point_json(s->point), "parent_point", point_json(s->parent), "parent",
			 (json_int_t)s->parent_snapshot, "taken_ns", (json_int_t)s->taken_ns,
			 "pause_ns", (json_int_t)s->pause_ns, "state_bytes",
			 (json_int_t)s->state_bytes, "changed_pages", (json_int_t)s->nr_changed,
			 "stats", stats_json(s), "name", s->name, "note", s->note, "tags", s->tags,
			 "pinned", s->pinned, "post_mortem", s->post_mortem);
}

json_t *snapshot_vm_json(struct store *store, const struct store_snapshot *s)
{
	struct store_vm vm = {0};
	json_t *argv = json_array(), *o = NULL;

	if (!store_vm_get(store, s->vm, &vm, NULL)) {
		size_t at = 0;

		while (at < vm.cmdline_len) {
			size_t n = strnlen(vm.cmdline + at, vm.cmdline_len - at);

			/* Not UTF-8: jansson refuses it, and the argument is lost; say
			 * so by giving none at all. */
			if (json_array_append_new(argv, json_stringn(vm.cmdline + at, n))) {
				json_array_clear(argv);
				break;
			}
			at += n + 1;
		}
		o = json_pack("{ss ss sI sO}", "name", vm.name, "arch", vm.arch, "page_size",
			      (json_int_t)vm.page_size, "cmdline", argv);
	}
	store_vm_deinit(&vm);
	json_decref(argv);
	return o;
}

int keep_from_json(json_t *keep, struct keep_rules *ret, struct err *e)
{
	const char *key;
	json_t *v;

	*ret = (struct keep_rules){0};
	json_object_foreach(keep, key, v)
	{
		char number[24];
		int rc;

		snprintf(number, sizeof(number), "%lld", (long long)json_integer_value(v));
		if (!json_is_string(v) && !json_is_integer(v))
			return err_set(e, EINVAL, "keep %.40s: neither a text nor a number", key);
		rc = keep_set(ret, key, json_is_integer(v) ? number : json_string_value(v), e);
		if (rc)
			return rc;
	}
	/* Nothing to keep is more likely a slip than a wish. */
	if (!keep_has_rules(ret))
		return err_set(e, EINVAL,
			       "no rule says what to keep: want at least one, such as last or grid "
			       "(--keep-last N, --keep-grid STEPS)");
	return 0;
}
