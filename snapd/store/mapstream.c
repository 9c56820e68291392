/* SPDX-License-Identifier: MIT */
/* Maps as sequences of runs; see mapstream.h. */
#include "snapd/store/mapstream.h"

#include <stdio.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/store/internal.h"
#include "snapd/store/overlay.h"

#define PARTS_MAX  (1u << 20)
#define RUN_BYTES  28u /* longest encoding of a run */
#define WINDOW_MIN (2 * RUN_BYTES)

/* A manifest or checkpoint: a window of its bytes. */
struct source {
	struct mapstream *m;
	struct snapd_point point;
	struct rec_blob blob;
	enum batch_type type;
	struct batch_ref *parts; /* owned; first to last */
	uint32_t at_part;
	uint64_t at_byte; /* of that part's payload */
	uint64_t left;	  /* bytes of the blob that are not in the window yet */
	uint8_t *window;  /* owned */
	size_t window_bytes;
	struct manifest_reader reader; /* of the window */
	XXH3_state_t *hash;	       /* owned */
};

struct mapstream {
	struct store *s;
	struct source *sources; /* owned; newest first */
	uint32_t nr, cap;
	struct snapd_point *pins; /* owned */
	uint32_t nr_pins;
	bool since;
	uint8_t *part; /* owned; room for one */
	struct overlay overlay;
};

/* ---- one source ---- */

static int of_source(const struct source *x, int rc, const struct err *why, struct err *e)
{
	return err_set(e, -rc, "%s of epoch %llu of timeline %llu: %s",
		       x->type == BATCH_CHECKPOINT ? "checkpoint" : "manifest",
		       (unsigned long long)x->point.epoch, (unsigned long long)x->point.timeline,
		       why->code ? why->text : strerror(-rc));
}

/* Where its parts are: each names the one before. */
static int find_parts(struct source *x, struct err *e)
{
	struct batch_ref at = x->blob.last;
	uint64_t payload;
	int rc = 0;

	if (!x->blob.parts || x->blob.parts > PARTS_MAX)
		return err_set(e, E_CORRUPT, "%u parts", x->blob.parts);
	x->parts = calloc(x->blob.parts, sizeof(*x->parts));
	if (!x->parts)
		return err_errno(e, ENOMEM, "map");
	for (uint32_t i = x->blob.parts; !rc && i-- > 0;) {
		x->parts[i] = at;
		if (i)
			rc = store_blob_part(x->m->s, &at, &payload, e);
	}
	return rc;
}

static int begin_hash(struct source *x, struct err *e)
{
	const struct store *s = x->m->s;

	x->hash = XXH3_createState();
	if (!x->hash)
		return err_errno(e, ENOMEM, "map");
	if (s->seal)
		XXH3_64bits_reset_withSecret(x->hash, s->secret.b, sizeof(s->secret.b));
	else
		XXH3_64bits_reset(x->hash);
	return 0;
}

static int begin_source(struct source *x, size_t window_bytes, struct err *e)
{
	int rc;

	x->left = x->blob.bytes;
	if (!x->left)
		return 0;
	x->window_bytes = MIN(window_bytes, x->left + RUN_BYTES);
	x->window = malloc(x->window_bytes);
	if (!x->window)
		return err_errno(e, ENOMEM, "map");
	manifest_reader_init(&x->reader, x->window, 0);
	rc = find_parts(x, e);
	return rc ? rc : begin_hash(x, e);
}

static void end_source(struct source *x)
{
	free(x->parts);
	free(x->window);
	XXH3_freeState(x->hash);
}

/* Move the window on: what the reader has not read, and what follows. */
static int fill_window(struct source *x, struct err *e)
{
	size_t kept = (size_t)(x->reader.end - x->reader.p);
	const uint8_t *payload;
	uint64_t bytes, n;
	int rc;

	if (x->at_part == x->blob.parts)
		return err_set(e, E_CORRUPT, "parts are missing");
	rc = store_blob_read_part(x->m->s, x->parts[x->at_part], x->type, x->at_part, x->m->part,
				  &payload, &bytes, e);
	if (rc)
		return rc;
	if (x->at_byte >= bytes || bytes - x->at_byte > x->left)
		return err_set(e, E_CORRUPT, "a part of another length");
	memmove(x->window, x->reader.p, kept);
	n = MIN(bytes - x->at_byte, x->window_bytes - kept);
	memcpy(x->window + kept, payload + x->at_byte, n);
	XXH3_64bits_update(x->hash, x->window + kept, n);
	x->left -= n;
	x->at_byte += n;
	if (x->at_byte == bytes) {
		x->at_part++;
		x->at_byte = 0;
	}
	x->reader.p = x->window;
	x->reader.end = x->window + kept + n;
	if (!x->left && XXH3_64bits_digest(x->hash) != x->blob.hash)
		return err_set(e, E_CORRUPT, "wrong checksum");
	return 0;
}

static int next_of_source(void *arg, struct manifest_run *ret, struct err *e)
{
	struct source *x = arg;
	struct err why = {0};
	int rc = 0;

	while (!rc && x->left && (size_t)(x->reader.end - x->reader.p) < RUN_BYTES)
		rc = fill_window(x, &why);
	if (!rc && x->blob.bytes)
		rc = manifest_next(&x->reader, ret, &why);
	return rc < 0 ? of_source(x, rc, &why, e) : rc;
}

/* ---- the way ---- */

static bool same_point(struct snapd_point a, struct snapd_point b)
{
	return a.timeline == b.timeline && a.epoch == b.epoch;
}

/* As store_epoch_record(). */
static int get_record(struct store *s, struct snapd_point *at, struct rec_epoch *ret, struct err *e)
{
	struct ix_txn t;
	int rc = index_begin(s->index, &t, e);

	if (rc)
		return rc;
	rc = store_epoch_record(&t, at, ret, e);
	index_end(&t);
	return rc;
}

static int add_source(struct mapstream *m, struct snapd_point at, const struct rec_epoch *rec,
		      struct err *e)
{
	bool whole = !m->since && !rec->chain_epochs && rec->checkpoint.bytes;

	if (m->nr == m->cap) {
		uint32_t cap = m->cap ? 2 * m->cap : 16;
		struct source *sources = realloc(m->sources, cap * sizeof(*sources));

		if (!sources)
			return err_errno(e, ENOMEM, "map");
		m->sources = sources;
		m->cap = cap;
	}
	m->sources[m->nr++] = (struct source){.m = m,
					      .point = at,
					      .type = whole ? BATCH_CHECKPOINT : BATCH_MANIFEST,
					      .blob = whole ? rec->checkpoint : rec->manifest};
	return 0;
}

/* Keeps it, back to its checkpoint. */
static int pin_point(struct mapstream *m, struct snapd_point at, struct err *e)
{
	struct snapd_point *pins = realloc(m->pins, (m->nr_pins + 1) * sizeof(*pins));
	int rc;

	if (!pins)
		return err_errno(e, ENOMEM, "map");
	m->pins = pins;
	rc = store_pin(m->s, at, e);
	if (!rc)
		m->pins[m->nr_pins++] = at;
	return rc;
}

static int find_whole(struct mapstream *m, struct snapd_point at, struct err *e)
{
	for (;;) {
		struct rec_epoch rec;
		int rc = get_record(m->s, &at, &rec, e);

		if (!rc)
			rc = add_source(m, at, &rec, e);
		if (rc || !rec.chain_epochs)
			return MIN(rc, 0);
		at = rec.parent;
	}
}

/* Where a timeline forks from; {0, 0}: nowhere, or it is gone. */
static int fork_of(struct store *s, uint64_t timeline, struct snapd_point *ret, struct err *e)
{
	struct ix_key k = ix_key_u64(timeline);
	struct rec_timeline tl;
	struct ix_txn t;
	int rc = index_begin(s->index, &t, e);

	if (rc)
		return rc;
	rc = index_get(&t, IX_TIMELINES, &k, &tl, sizeof(tl), NULL, NULL, e);
	index_end(&t);
	*ret = rc ? (struct snapd_point){0} : tl.parent;
	if (!rc && ret->timeline >= timeline)
		return err_set(e, E_CORRUPT, "timeline %llu forks from a later one",
			       (unsigned long long)timeline);
	return rc == -ENOENT ? 0 : rc;
}

/* From an epoch, without it, back to its parent: the stretches of timelines that lie there.
 * There is more in them than the parent where manifests were merged (merge.c). */
static int each_stretch(struct store *s, struct snapd_point at, struct snapd_point parent,
			mapstream_stretch_fn fn, void *arg, struct err *e)
{
	uint64_t to = at.epoch - 1;

	while (at.timeline > parent.timeline) {
		int rc = to ? fn(arg, at.timeline, 1, to) : 0;

		if (!rc)
			rc = fork_of(s, at.timeline, &at, e);
		if (rc)
			return rc;
		to = at.epoch;
	}
	if (!parent.timeline)
		return 0;
	if (at.timeline != parent.timeline || to < parent.epoch)
		to = parent.epoch;
	return fn(arg, parent.timeline, parent.epoch, to);
}

static int has_point(void *arg, uint64_t timeline, uint64_t from, uint64_t to)
{
	const struct snapd_point *at = arg;

	return at->timeline == timeline && at->epoch >= from && at->epoch <= to;
}

static int find_since(struct mapstream *m, struct snapd_point at, struct snapd_point base,
		      struct err *e)
{
	while (!same_point(at, base)) {
		struct rec_epoch rec;
		int rc = at.timeline ? get_record(m->s, &at, &rec, e) : 1;

		if (rc == 1)
			return err_set(e, ENOENT, "epoch %llu of timeline %llu is no ancestor",
				       (unsigned long long)base.epoch,
				       (unsigned long long)base.timeline);
		if (rc || same_point(at, base))
			return rc;
		rc = add_source(m, at, &rec, e);
		if (!rc)
			rc = each_stretch(m->s, at, rec.parent, has_point, &base, e);
		if (rc)
			return MIN(rc, 0);
		at = rec.parent;
		if (!rec.chain_epochs && at.timeline)
			rc = pin_point(m, at, e);
		if (rc)
			return rc;
	}
	return 0;
}

int mapstream_ancestors(struct store *s, struct snapd_point at, mapstream_stretch_fn fn, void *arg,
			struct err *e)
{
	struct rec_epoch rec;
	int rc;

	while (at.timeline && !(rc = get_record(s, &at, &rec, e))) {
		rc = each_stretch(s, at, rec.parent, fn, arg, e);
		if (rc)
			return rc;
		at = rec.parent;
	}
	if (!at.timeline)
		return 0;
	if (rc == -ENOENT)
		err_clear(e);
	return rc == -ENOENT ? 0 : MIN(rc, 0);
}

/* ---- open ---- */

static int begin(struct mapstream *m, size_t memory_bytes, struct err *e)
{
	size_t window_bytes = MAX(memory_bytes / (m->nr + 1), (size_t)WINDOW_MIN);
	_cleanup_free_ void **layers = calloc(m->nr + 1, sizeof(*layers));
	int rc = 0;

	m->part = aligned_alloc(FMT_BLOCK, BATCH_BYTES_MAX);
	if (!layers || !m->part)
		return err_errno(e, ENOMEM, "map");
	for (uint32_t i = 0; !rc && i < m->nr; i++) {
		struct err why = {0};

		layers[i] = &m->sources[i];
		rc = begin_source(&m->sources[i], window_bytes, &why);
		if (rc)
			of_source(&m->sources[i], rc, &why, e);
	}
	return rc ? rc : overlay_init(&m->overlay, next_of_source, layers, m->nr, e);
}

int mapstream_open(struct store *s, struct snapd_point at, const struct snapd_point *base,
		   size_t memory_bytes, struct mapstream **ret, struct err *e)
{
	struct mapstream *m = calloc(1, sizeof(*m));
	int rc;

	if (!m)
		return err_errno(e, ENOMEM, "map");
	m->s = s;
	m->since = base;
	rc = base ? find_since(m, at, *base, e) : find_whole(m, at, e);
	if (!rc)
		rc = begin(m, memory_bytes, e);
	if (rc)
		mapstream_close(m);
	else
		*ret = m;
	return rc;
}

void mapstream_close(struct mapstream *m)
{
	if (!m)
		return;
	overlay_deinit(&m->overlay);
	for (uint32_t i = 0; i < m->nr; i++)
		end_source(&m->sources[i]);
	for (uint32_t i = 0; i < m->nr_pins; i++)
		store_unpin(m->s, m->pins[i]);
	free(m->sources);
	free(m->pins);
	free(m->part);
	free(m);
}

int mapstream_next(struct mapstream *m, struct manifest_run *ret, struct err *e)
{
	int rc;

	do
		rc = overlay_next(&m->overlay, ret, e);
	while (rc == 1 && !m->since && ret->loc == MANIFEST_GONE);
	return rc;
}
