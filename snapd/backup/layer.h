/* SPDX-License-Identifier: MIT */
/*
 * layer: which page of which pack is at each frame: what maps hold.  Pure.
 *
 * A snapshot's memory is the layers of its manifest, one over the other; the first is whole,
 * the others say what changed.  A layer is one or more maps, ascending; a map's payload is
 *
 *   struct bk_map, nr_packs names, then runs of frames, ascending by home GFN and apart:
 *     gap           frames between the end of the run before (0 at first) and this one
 *     len << 2 | kind, len >= 1
 *       0  pages that go on: the same pack, entries from the one after the last page's on
 *       1  zero pages
 *       2  pages; then: pack (index into the names), entry of the first
 *       3  gone: no memory any more
 *   all numbers unsigned LEB128.
 *
 * In memory packs have numbers of their own, those of a packset.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "snapd/backup/layout.h"
#include "snapd/util/err.h"

/* Names of packs, each once; numbers count up from 0. */
struct packset {
	struct bk_name *names; /* owned */
	uint32_t nr, cap;
	uint32_t *slots; /* owned; number + 1 */
	uint32_t nr_slots;
};
void packset_deinit(struct packset *s);
int packset_add(struct packset *s, const struct bk_name *name, uint32_t *ret); /* -ENOMEM, -E2BIG */
/* -1: it is not there. */
int64_t packset_find(const struct packset *s, const struct bk_name *name);
/* Another name for a number: of a pack whose name was not known yet. */
void packset_rename(struct packset *s, uint32_t number, const struct bk_name *name);
#define PACKSET_MAX (1u << 28)

enum layer_kind { LAYER_PAGES_ON = 0, LAYER_ZERO = 1, LAYER_PAGES = 2, LAYER_GONE = 3 };

struct layer_run {
	uint64_t gfn, nr;
	enum layer_kind kind; /* never PAGES_ON */
	uint32_t pack, entry; /* of the first page */
};

struct layer_writer {
	const struct packset *packs; /* borrowed; may grow meanwhile */
	uint32_t *used;		     /* owned; packs of this map, by their index in it */
	uint32_t nr_used, cap_used;
	uint32_t *index; /* owned; of a pack in `used`, + 1 */
	uint32_t cap_index;
	uint8_t *runs; /* owned */
	size_t len, cap;
	struct layer_run open; /* not written yet; nr 0: none */
	uint64_t next_gfn;     /* of the last written run */
	uint32_t last_pack, last_entry;
	bool has_last;
	uint64_t nr_frames;
};
void layer_writer_init(struct layer_writer *w, const struct packset *packs);
void layer_writer_deinit(struct layer_writer *w);
/* Runs ascend.  -ENOMEM. */
int layer_put(struct layer_writer *w, const struct layer_run *run);
/* About how long the payload is by now. */
size_t layer_bytes(const struct layer_writer *w);
/* The payload, malloc()ed; the writer is as after init.  -ENOMEM. */
int layer_finish(struct layer_writer *w, uint8_t **ret, size_t *ret_len, uint64_t *nr_frames);

/* The runs of a map one by one. */
struct layer_reader {
	const uint8_t *p, *begin, *end; /* borrowed: the payload */
	uint32_t *numbers;		/* owned: of the packs */
	uint32_t nr_packs;
	uint64_t nr_frames, claimed;
	struct layer_run run;
	uint64_t next_gfn, next_entry;
	bool has_last;
};
/* Packs join `packs`.  -EUCLEAN, -ENOMEM. */
int layer_reader_init(struct layer_reader *r, const uint8_t *payload, size_t len,
		      struct packset *packs, struct err *e);
void layer_reader_deinit(struct layer_reader *r); /* accepts one that is zeroed */
/* 1, 0 at the end, -EUCLEAN; runs of kind PAGES_ON come as PAGES. */
int layer_next(struct layer_reader *r, struct layer_run *ret, struct err *e);

typedef int (*layer_fn)(void *arg, const struct layer_run *run, struct err *e);
/* All of them.  What fn returns. */
int layer_decode(const uint8_t *payload, size_t len, struct packset *packs, layer_fn fn, void *arg,
		 struct err *e);
