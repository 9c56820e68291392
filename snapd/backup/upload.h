/* SPDX-License-Identifier: MIT */
/*
 * upload: packs on their way to the bucket: a few threads, and a few packs in memory, which
 * bounds a push's memory whatever it pushes.  A pack is noted in the cache as INTENDED before
 * it is queued, and as SENT by the thread that sent it.
 *
 *   FREE ──take──► FILLING ──send──► QUEUED ──► SENDING ──► FREE
 *
 * One thread takes and sends; after the first failure take() gives no more.
 */
#pragma once

#include "snapd/backup/pack.h"
#include "snapd/backup/repo.h"

#define UPLOAD_THREADS 3
#define UPLOAD_SLOTS   (UPLOAD_THREADS + 1)

struct uploader;

/* What there is to wait for. */
struct upload_state {
	uint64_t pending_pages, pending_bytes; /* given to send(), and not there yet */
	uint64_t arrived_bytes;
};

/* `report` is called by take() and finish() from time to time while they wait. */
int uploader_create(struct repo *r, void (*report)(void *arg), void *arg, struct uploader **ret,
		    struct err *e);
/* Ends what is under way first; queued packs are dropped.  Accepts NULL. */
void uploader_destroy(struct uploader *u);
/* Waits for a free one; NULL: an upload failed, see finish(). */
struct pack_builder *uploader_take(struct uploader *u);
/* pack_finish() was called.  -errno of the cache: the pack is the caller's still. */
int uploader_send(struct uploader *u, struct pack_builder *b, struct err *e);
/* Wait until all have arrived; the first failure. */
int uploader_finish(struct uploader *u, struct err *e);
void uploader_state(struct uploader *u, struct upload_state *ret);
