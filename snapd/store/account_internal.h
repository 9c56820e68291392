/* SPDX-License-Identifier: MIT */
/* account: what account.c (the walk, the pages), account_forest.c (epochs as trees) and
 * account_owners.c (who needs a loc) share. */
#pragma once

#include "snapd/store/account.h"
#include "snapd/store/internal.h"

#define NOBODY	UINT32_MAX
#define SEVERAL (UINT32_MAX - 1)
#define NO_NODE UINT32_MAX

struct node {
	struct snapd_point at;
	struct rec_blob manifest; /* or the checkpoint, of the first of a tree */
	uint32_t child, sibling;  /* nodes; ends with NO_NODE */
	uint32_t nr_below;	  /* itself and all under it */
	uint32_t snapshot;	  /* owner number; NOBODY: none */
	bool head;		  /* of a running VM */
	bool whole;		  /* `manifest` is a checkpoint */
	bool first;		  /* of a tree */
};

struct undo {
	uint64_t gfn;
	loc_t loc;
};

struct frame {
	uint32_t node, next_child;
	size_t undo_mark;
	bool undo; /* what it changes is taken back */
};

struct owner_table {
	loc_t *locs; /* owned; 0: free */
	uint32_t *owners;
	size_t nr_slots, nr;
};

struct account {
	struct store *s;
	const struct account_config *c;
	struct store_account *ret;
	struct node *nodes; /* owned; ascending */
	uint32_t nr_nodes, cap_nodes;
	uint32_t *roots; /* owned; owners in the order met */
	size_t nr_roots;
	struct pagemap *map; /* owned; fp: stamp + 1 */
	struct undo *undo;   /* owned */
	size_t nr_undo, cap_undo;
	struct frame *stack; /* owned */
	size_t nr_stack, cap_stack;
	struct owner_table table;
	uint32_t seg_from, seg_end; /* of this walk */
	uint64_t steps, total;
};

int account_no_memory(struct err *e); /* -ENOMEM */

/* ---- account_forest.c ---- */

/* From the index: a->nodes, a->ret->snapshots; a->roots has room for all. */
int account_load_forest(struct account *a, struct err *e);

/* ---- account_owners.c ---- */

int owner_table_init(struct owner_table *t, size_t max); /* -ENOMEM */
uint32_t owner_table_get(const struct owner_table *t, loc_t loc);
int owner_table_add(struct owner_table *t, loc_t loc, uint32_t owner); /* -EUCLEAN: too many */
