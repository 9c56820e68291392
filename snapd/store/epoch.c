/* SPDX-License-Identifier: MIT */
/*
 * One epoch: pages in, each to one of
 *
 *   zero        all bytes are 0
 *   unchanged   the bytes are those that the map has for this frame
 *   duplicate   the bytes are those of a page stored before, in the VM's domain (the
 *               store's setting: the VM, its owner, or everyone)
 *   stored      appended to a segment
 *
 * A fingerprint or a batch header only proposes; memcmp() with the stored bytes
 * decides (I8), from memory when the page was written lately, else from disk.
 * Pages that need the disk wait in the prover and are resolved together (intake.c).
 *
 *   E1 `changes` holds what differs from `live`; `live` is not touched before the
 *      commit.  Frames in `gone` are not part of the VM unless `changes` has them.
 *   E2 A duplicate refers to a committed page only after seg_ref() said that its
 *      segment stays, or to a page of this epoch.  Pages enter the store's table of
 *      duplicates when they are stored; until their epoch is committed seg_ref()
 *      refuses them to everyone else, and an abort takes them out.
 *   E3 A frame is in the prover at most once; when it comes again, the prover is
 *      resolved first.
 *   E4 After an error of a put or commit only epoch_abort() is left, except that a
 *      commit refused for its name (-EEXIST, -EINVAL) may be tried again.
 *
 *   E5 For each DEDUP_PAGES_PER_READ pages that an epoch adds to the map, and
 *      DEDUP_READS_FREE more, its duplicates make a restore read one more extent, no
 *      more: others are stored again (prover_limit()).
 *
 * Threads: one at a time.  Memory: 24 bytes a changed page, up to twice, and the
 * bounded buffers of writer, prover and reader.
 */
#include "snapd/store/internal.h"

#include <string.h>

#include "snapd/store/manifest.h"
#include "snapd/util/log.h"

/* ---- begin and end ---- */

static int load_parent(struct epoch *ep, uint64_t timeline, struct err *e)
{
	struct ix_key k = ix_key_u64(timeline), vk = ix_key_id(ep->vm);
	struct rec_timeline tl;
	struct rec_vm vm;
	struct ix_txn t;
	int r;

	r = index_begin(ep->s->index, &t, e);
	if (r)
		return r;
	r = index_get(&t, IX_TIMELINES, &k, &tl, sizeof(tl), NULL, NULL, e);
	if (!r)
		r = index_get(&t, IX_VMS, &vk, &vm, sizeof(vm), NULL, NULL, e);
	if (r == -ENOENT || (!r && memcmp(tl.vm, ep->vm, sizeof(tl.vm)) != 0))
		r = err_set(e, ENOENT, "this VM has no timeline %llu",
			    (unsigned long long)timeline);
	if (!r) {
		ep->domain = store_dedup_domain(ep->s, ep->vm, vm.uid);
		ep->parent = (struct snapd_point){timeline, tl.last};
		ep->point = (struct snapd_point){timeline, tl.last + 1};
		r = store_epoch_record(&t, &ep->parent, &ep->parent_rec, e);
	}
	index_end(&t);
	return r;
}

/* Known to gc from here on. */
static int epoch_register(struct epoch *ep, uint64_t timeline, struct err *e)
{
	scoped_lock(&ep->s->roots_lock);
	int r = load_parent(ep, timeline, e);

	if (r < 0)
		return r;
	if (r > 0)
		ep->parent = (struct snapd_point){0};
	else if (ep->parent_rec.page_size != ep->page_size)
		return err_set(e, EINVAL, "the VM's pages had %u bytes, now %u",
			       ep->parent_rec.page_size, ep->page_size);
	if (gc_note_root(ep->s, ep->parent))
		return err_errno(e, ENOMEM, "epoch");
	ep->next = ep->s->epochs;
	ep->s->epochs = ep;
	return 0;
}

static void epoch_unregister(struct epoch *ep)
{
	scoped_lock(&ep->s->roots_lock);
	struct epoch **at = &ep->s->epochs;

	while (*at && *at != ep)
		at = &(*at)->next;
	if (*at)
		*at = ep->next;
}

int epoch_begin(struct store *s, const uint8_t vm[16], uint64_t timeline, uint32_t page_size,
		struct pagemap *live, struct epoch **ret, struct err *e)
{
	struct epoch *ep;
	int r;

	if (s->read_only)
		return err_set(e, EROFS, "store %s is open read-only", s->dir);
	if (page_size != 4096 && page_size != 16384 && page_size != 65536)
		return err_set(e, EINVAL, "page size %u is not supported", page_size);
	ep = calloc(1, sizeof(*ep));
	if (!ep)
		return err_errno(e, ENOMEM, "epoch");
	ep->s = s;
	ep->live = live;
	ep->page_size = page_size;
	ep->page_shift = (uint32_t)__builtin_ctz(page_size);
	memcpy(ep->vm, vm, sizeof(ep->vm));
	r = epoch_register(ep, timeline, e);
	if (!r && scratch_get(s, page_size, &ep->scratch))
		r = err_errno(e, ENOMEM, "epoch");
	if (!r)
		r = append_init(&ep->append, s, vm, ep->point, ep->page_shift, e);
	if (r) {
		epoch_abort(ep);
		return r;
	}
	*ret = ep;
	return 0;
}

int epoch_compress(struct epoch *ep, const char *how, struct err *e)
{
	struct codec_policy policy;
	int r = codec_parse(how, &policy, e);

	if (!r)
		r = features_need(ep->s, policy, e);
	return r ? r : append_compress(&ep->append, policy, e);
}

static bool keep_others(void *opaque, loc_t loc)
{
	const struct epoch *ep = opaque;

	return !append_owns(&ep->append, loc);
}

static void epoch_destroy(struct epoch *ep, bool forget)
{
	/* While the segments are ours: the blocks are written again by the next epoch. */
	if (forget && ep->append.nr_segs)
		dedup_filter(&ep->s->dedup, keep_others, ep);
	store_reader_put(ep->s, ep->reader, forget);
	if (ep->append.s)
		append_deinit(&ep->append);
	epoch_unregister(ep);
	scratch_put(ep->s, ep->scratch);
	free(ep->gone);
	free(ep->refs.bits);
	free(ep);
}

void epoch_abort(struct epoch *ep)
{
	/* The reader may know headers of blocks that will be written again. */
	if (ep)
		epoch_destroy(ep, true);
}

void epoch_finish(struct epoch *ep)
{
	epoch_destroy(ep, false);
}

/* ---- memory that went ---- */

int epoch_gone(struct epoch *ep, uint64_t gfn, uint64_t n, struct err *e)
{
	int r;

	if (!n)
		return 0;
	if (gfn >= MANIFEST_GFN_MAX || n > MANIFEST_GFN_MAX - gfn)
		return err_set(e, EINVAL, "frames %#llx + %#llx are out of range",
			       (unsigned long long)gfn, (unsigned long long)n);
	r = epoch_settle(ep, e);
	if (!r && changes_clear(&ep->scratch->changes, gfn, gfn + n))
		r = err_errno(e, ENOMEM, "epoch");
	if (!r && ep->nr_gone == ep->cap_gone) {
		size_t cap = ep->cap_gone ? ep->cap_gone * 2 : 8;
		struct gone_range *gone = realloc(ep->gone, cap * sizeof(*gone));

		if (!gone) {
			r = err_errno(e, ENOMEM, "epoch");
		} else {
			ep->gone = gone;
			ep->cap_gone = cap;
		}
	}
	if (!r)
		ep->gone[ep->nr_gone++] = (struct gone_range){gfn, gfn + n};
	ep->failed = r;
	return r;
}
