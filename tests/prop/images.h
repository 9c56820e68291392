/* SPDX-License-Identifier: MIT */
/*
 * images: what a service or a consumer made of guest memory from dirty sets alone, by
 * store key (home GFN), and whether that equals the memory.
 *
 * Pieces are taken from what the agent told; two of them never share a key or a page of
 * a file, or the test ends.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "tests/lib/fake_service.h"

#define IMAGE_PARTS 64u

/* Memory as the service sees it: its own mapping of the piece. */
struct live_piece {
	struct snapd_piece p;
	ino_t ino;
	uint8_t *map; /* owned */
	bool told;    /* on this connection */
};

struct live_pieces {
	struct live_piece p[IMAGE_PARTS];
	uint32_t nr;
	uint32_t seen, seen_gone; /* of the service's lists */
};

struct image_part {
	uint64_t home_gfn, nr;
	uint8_t *bytes; /* owned */
};

struct image {
	struct image_part part[IMAGE_PARTS];
	uint32_t nr;
};

/* The exit status of a run that lost something. */
#define EXIT_MISSED 3
void missed(const char *fmt, ...) __attribute__((format(printf, 1, 2), noreturn));

/* Take in what was told since; true: a piece has ended. */
bool live_update(struct live_pieces *l, struct fake_service *s);
void live_reconnected(struct live_pieces *l); /* before the new connection's pieces */
bool live_settle(struct live_pieces *l);      /* after them; true: some are gone */
void live_deinit(struct live_pieces *l);
/* The page with that key, or NULL; by frame: likewise, and its key. */
uint8_t *live_page(const struct live_pieces *l, uint64_t gfn);
const struct live_piece *live_by_frame(const struct live_pieces *l, uint64_t frame);

/* One part for each live piece, new ones empty. */
void image_fit(struct image *im, const struct live_pieces *l);
/* Copy one page; true: it had changed. */
bool image_copy(struct image *im, uint64_t gfn, const uint8_t *from);
void image_check(const struct image *im, const struct live_pieces *l, const char *whose);
void image_clone(struct image *to, const struct image *from);
bool image_has(const struct image *im, uint64_t gfn, uint64_t nr);
/* Memory := image. */
void image_write(const struct image *im, const struct live_pieces *l);
void image_deinit(struct image *im);
