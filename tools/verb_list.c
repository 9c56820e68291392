/* SPDX-License-Identifier: MIT */
/*
 * verb_list: snapshots as a table, or as a tree on a terminal.
 *
 * In the tree, snapshots that follow each other stand below each other; where a
 * rollback or a restore forked, the older branches stand indented under the fork
 * and the newest goes on in line.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "tools/client.h"
#include "tools/human.h"
#include "tools/out.h"
#include "tools/snapctl.h"

struct node {
	json_t *snap; /* borrowed */
	uint64_t id;
	struct node *child, *sibling; /* ascending by id */
};

struct forest {
	struct node *nodes; /* owned; ascending by id */
	size_t nr;
};

static bool is_pinned(json_t *s)
{
	return json_is_true(json_object_get(s, "pinned"));
}

static void print_table(json_t *list)
{
	static const char *const heads[] = {"ID",    "VM",     "NAME", "TAKEN", "CHANGED",
					    "PAUSE", "PARENT", "PIN",  "TAGS"};
	static const bool right[] = {true, false, false, false, true, true, true, false, false};
	struct table *t = table_new(heads, right, ARRAY_SIZE(heads));
	json_t *s;
	size_t i;

	json_array_foreach(list, i, s)
	{
		char id[24], when[32], changed[24], pause[24], parent[24] = "-";

		if (get_u64(s, "parent"))
			text_u64(parent, sizeof(parent), get_u64(s, "parent"));
		table_row(t, (const char *const[]){
				     text_u64(id, sizeof(id), get_u64(s, "id")), get_text(s, "vm"),
				     get_text(s, "name"),
				     human_time(when, sizeof(when), get_u64(s, "taken_ns")),
				     human_bytes(changed, sizeof(changed),
						 get_u64(s, "changed_pages") *
							 get_u64(s, "page_size")),
				     json_is_true(json_object_get(s, "post_mortem"))
					     ? "post-mortem"
					     : human_seconds(pause, sizeof(pause),
							     (double)get_u64(s, "pause_ns") / 1e9),
				     parent, is_pinned(s) ? "*" : "", get_text(s, "tags")});
	}
	table_print(t);
}

/* ---- tree ---- */

static int by_id(const void *a, const void *b)
{
	const struct node *x = a, *y = b;

	return x->id < y->id ? -1 : x->id > y->id;
}

static struct node *find(struct forest *f, uint64_t id)
{
	struct node key = {.id = id};

	return bsearch(&key, f->nodes, f->nr, sizeof(key), by_id);
}

static void plant(struct forest *f, json_t *list)
{
	json_t *s;
	size_t i;

	f->nr = json_array_size(list);
	f->nodes = calloc(f->nr + 1, sizeof(*f->nodes));
	if (!f->nodes)
		abort();
	json_array_foreach(list, i, s)
		f->nodes[i] = (struct node){.snap = s, .id = get_u64(s, "id")};
	qsort(f->nodes, f->nr, sizeof(*f->nodes), by_id);
	for (i = f->nr; i--;) {
		struct node *n = &f->nodes[i], *p = find(f, get_u64(n->snap, "parent"));

		if (p && p < n) {
			n->sibling = p->child;
			p->child = n;
		}
	}
}

static bool is_root(struct forest *f, const struct node *n)
{
	const struct node *p = find(f, get_u64(n->snap, "parent"));

	return !p || p >= n;
}

/* A restored VM's snapshots hang below the one that it started from: with its name. */
static void print_node(const struct node *n, const char *vm, const char *prefix, const char *mark)
{
	bool other = strcmp(vm, get_text(n->snap, "vm")) != 0;
	char when[32], changed[24];
	json_t *s = n->snap;

	printf("%s%s%s%s%llu%s%s  %s  %s%s%s%s%s%s%s\n", prefix, mark,
	       other ? get_text(s, "vm") : "", other ? "@" : "", (unsigned long long)n->id,
	       *get_text(s, "name") ? " " : "", get_text(s, "name"),
	       human_time(when, sizeof(when), get_u64(s, "taken_ns")),
	       human_bytes(changed, sizeof(changed),
			   get_u64(s, "changed_pages") * get_u64(s, "page_size")),
	       is_pinned(s) ? "  pinned" : "", *get_text(s, "tags") ? "  [" : "",
	       get_text(s, "tags"), *get_text(s, "tags") ? "]" : "",
	       *get_text(s, "note") ? "  " : "", get_text(s, "note"));
}

/* The line from `n` on.  Depth is that of forks, not of snapshots: the recursion is
 * over branches. */
static void print_line(const struct node *n, const char *vm, const char *prefix)
{
	char *deeper;

	if (asprintf(&deeper, "%s│  ", prefix) < 0)
		abort();
	while (n) {
		const struct node *c = n->child;

		print_node(n, vm, prefix, c ? "├─ " : "└─ ");
		for (; c && c->sibling; c = c->sibling)
			print_line(c, vm, deeper);
		n = c;
	}
	free(deeper);
}

static void print_tree(json_t *list)
{
	struct forest f;

	plant(&f, list);
	for (size_t i = 0; i < f.nr; i++)
		if (is_root(&f, &f.nodes[i])) {
			const char *vm = get_text(f.nodes[i].snap, "vm");

			printf("%s\n", vm);
			print_line(&f.nodes[i], vm, "");
		}
	free(f.nodes);
}

/* Without snapshots: is there such a VM at all? */
static int is_vm(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *o = NULL;
	int rc = call(a, "GET", NULL, &o, "/v1/vms/%s", a->pos[0], NULL);

	if (!rc)
		print_table(NULL);
	return rc;
}

int verb_list(const struct args *a)
{
	_cleanup_(cleanup_json) json_t *o = NULL;
	bool tree = opt(a, "tree") || (isatty(STDOUT_FILENO) && !opt(a, "flat"));
	json_t *list;
	int rc;

	if (opt(a, "tree") && opt(a, "flat"))
		return fail(EXIT_USAGE, "--tree and --flat: one or the other");
	rc = call(a, "GET", NULL, &o, a->nr_pos ? "/v1/snapshots?vm=%s" : "/v1/snapshots",
		  a->nr_pos ? a->pos[0] : NULL, NULL);
	if (rc || a->json)
		return rc ? rc : print_json(o);
	list = json_object_get(o, "snapshots");
	if (a->nr_pos && !json_array_size(list))
		return is_vm(a);
	if (tree)
		print_tree(list);
	else
		print_table(list);
	return EXIT_DONE;
}
