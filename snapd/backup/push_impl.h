/* SPDX-License-Identifier: MIT */
/*
 * push_impl: what the parts of push share: push.c (batches, the snapshot), push_known.c (what
 * the repository has), push_frames.c (which frames), push_places.c (in which pack a page is),
 * push_layers.c (maps).  One thread, that of the job.
 */
#pragma once

#include "snapd/backup/push.h"
#include "snapd/backup/upload.h"
#include "snapd/backup/memory.h"
#include "snapd/core/contents.h"
#include "snapd/core/job.h"
#include "snapd/store/mapstream.h"

#define PACK_TARGET (8u << 20) /* a pack is sent when it has so much */
#define MAP_TARGET  (1u << 20) /* and a map: when layers become one, each has one in memory */

enum { PACK_RELIED = 1, PACK_OURS = 2 };

struct pack_info {
	uint8_t flags;
	int64_t sent_ms;
};

/* Which frames are looked at: all, what the epochs since the base changed, or what two maps have
 * otherwise. */
struct push_frames {
	struct mapstream *now, *base;	   /* owned; base: where both are compared */
	struct manifest_run run, base_run; /* of each, not used up */
	size_t piece;			   /* without a base: of the snapshot's, the one at hand, */
	uint64_t page;			   /* and in it */
	struct snapd_point base_point;
	bool compare; /* base_point is pinned */
};

/* A snapshot of the repository that a layer can be over, and where it is, or was, in the store. */
struct push_base {
	struct snapd_point point;	 /* first: find_point() */
	const struct manifest *manifest; /* NULL: none */
};

/* A page of a batch, or a run without any. */
struct push_item {
	struct layer_run run; /* pack and entry by push_place_page() */
	uint32_t page;	      /* in `pages`, where there is one */
};

struct push {
	struct job *job;
	struct repo *r;
	struct store *store;
	struct push_result *ret;
	struct contents c;	     /* the snapshot */
	struct repo_list list;	     /* of the repository */
	const struct manifest *base; /* in `list`; NULL: none */
	struct push_frames frames;
	uint64_t nr_frames;   /* that they are in all */
	uint64_t nr_noted;    /* of them; */
	uint64_t sent_before; /* and what the connection had sent when they began: for progress */
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
	struct memory_stream *whole;   /* owned; the base's, which joins this layer; else NULL */
	struct manifest_run whole_run; /* of it, not written yet */
	struct manifest m;
	struct bk_layer new_layer;
	struct bk_name *maps; /* owned: put by us */
	uint32_t nr_maps;
	struct bk_name state;
	uint64_t blob_bytes;
	struct manifest_run run; /* of the frames, not in a batch yet */
	/* one batch */
	struct store_reader *reader;
	uint32_t batch_max;
	uint8_t *pages, *scratch; /* owned */
	struct page_read *reqs;	  /* owned */
	struct push_item *items;  /* owned */
	struct bk_name *names;	  /* owned; of `pages` */
	const void **todo;	  /* owned */
	uint32_t nr_todo;
};

int push_cancelled(const struct push *p, struct err *e);

/* ---- push_known.c ---- */

/* *ret: the nearest ancestor that is in the repository; its snapshot may be gone here. */
int push_find_ancestor(struct push *p, struct push_base *ret, struct err *e);
/* *ret: another snapshot of the VM that is in both. */
void push_find_relative(struct push *p, struct push_base *ret);
int push_settle_intents(struct push *p, struct err *e);
int push_learn_all(struct push *p, struct err *e);

/* ---- push_frames.c ---- */

/* Finds the base, too: p->base, p->nr_frames. */
int push_open_frames(struct push *p, struct err *e);
/* 1: a run of pages, zero pages, or GONE; 0 at the end. */
int push_next_frames(struct push *p, struct manifest_run *ret, struct err *e);
void push_close_frames(struct push *p);

/* ---- push_places.c ---- */

int push_reopen_view(struct push *p, struct err *e);
int push_send_pack(struct push *p, struct err *e);
int push_place_page(struct push *p, uint32_t i, uint32_t *pack, uint32_t *entry, struct err *e);

/* ---- push_layers.c ---- */

int push_begin_layers(struct push *p, struct err *e);
/* Runs ascend.  All pages of the pack being filled have their bytes. */
int push_note_run(struct push *p, const struct layer_run *run, struct err *e);
int push_end_layers(struct push *p, struct err *e);
