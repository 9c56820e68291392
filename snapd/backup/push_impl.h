/* SPDX-License-Identifier: MIT */
/*
 * push_impl: what the parts of push share: push.c (batches, the snapshot), push_known.c (what
 * the repository has), push_places.c (in which pack a page is), push_layers.c (maps).  One
 * thread, that of the job.
 */
#pragma once

#include "snapd/backup/push.h"
#include "snapd/backup/upload.h"
#include "snapd/daemon/contents.h"
#include "snapd/daemon/job.h"

#define PACK_TARGET (8u << 20) /* a pack is sent when it has so much */
#define MAP_TARGET  (8u << 20) /* and a map */

enum { PACK_RELIED = 1, PACK_OURS = 2 };

struct pack_info {
	uint8_t flags;
	int64_t sent_ms;
};

struct push {
	struct job *job;
	struct repo *r;
	struct store *store;
	struct push_result *ret;
	struct contents c;	     /* the snapshot */
	struct repo_list list;	     /* of the repository */
	const struct manifest *base; /* in `list`; NULL: none */
	struct pagemap *base_map;    /* owned; local */
	uint64_t *changed;	     /* owned; frames, with a base */
	size_t nr_changed, at_changed;
	struct contents_walk walk; /* without one */
	struct packset marked;
	/* where pages are */
	struct packset packs;
	struct pack_info *infos; /* owned; by number */
	uint32_t cap_infos;
	struct cache_view *view;
	struct pack_builder *pack; /* being filled; the uploader's */
	uint32_t pack_number;
	struct uploader *up;
	struct layer_writer layer;
	struct pagemap *whole; /* owned; of refs: the layers become one; else NULL */
	struct manifest m;
	struct bk_layer new_layer;
	struct bk_name *maps; /* owned: put by us */
	uint32_t nr_maps;
	struct bk_name state;
	uint64_t blob_bytes;
	/* one batch */
	struct store_reader *reader;
	uint32_t batch_max;
	uint8_t *pages, *scratch; /* owned */
	struct page_read *reqs;	  /* owned */
	uint64_t *gfns;		  /* owned */
	loc_t *locs;		  /* owned */
	uint32_t *at;		  /* owned; of the frame's page in `pages` */
	struct bk_name *names;	  /* owned; of `pages` */
	const void **todo;	  /* owned */
	uint32_t nr_todo;
};

int push_cancelled(const struct push *p, struct err *e);

/* ---- push_known.c ---- */

/* The base, and what changed since. */
int push_find_changes(struct push *p, struct err *e);
int push_settle_intents(struct push *p, struct err *e);
int push_learn_all(struct push *p, struct err *e);

/* ---- push_places.c ---- */

int push_reopen_view(struct push *p, struct err *e);
int push_send_pack(struct push *p, struct err *e);
int push_place_page(struct push *p, uint32_t i, uint32_t *pack, uint32_t *entry, struct err *e);

/* ---- push_layers.c ---- */

int push_begin_layers(struct push *p, struct err *e);
int push_note_frame(struct push *p, uint64_t gfn, enum layer_kind kind, uint32_t pack,
		    uint32_t entry, struct err *e);
int push_end_map(struct push *p, struct err *e);
int push_end_layers(struct push *p, struct err *e);
