/* SPDX-License-Identifier: MIT */
/* A local snapshot into a repository; see push.h. */
#include "snapd/backup/push.h"

#include <errno.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "snapd/backup/memory.h"
#include "snapd/backup/upload.h"
#include "snapd/daemon/contents.h"
#include "snapd/daemon/daemon.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/util/pool.h"

#define BATCH_BYTES    PACK_ADD_BYTES
#define PACK_TARGET    (8u << 20) /* a pack is sent when it has so much */
#define MAP_TARGET     (8u << 20) /* and a map */
#define CHAIN_MAX      32u	  /* layers of a snapshot */
#define TRIES	       3
#define PARALLEL_NAMES 64
#define TABLE_READ     (320u << 10) /* header and table of most packs */

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

static void push_deinit(struct push *p)
{
	cache_view_close(p->view);
	uploader_destroy(p->up);
	store_reader_destroy(p->reader);
	contents_deinit(&p->c);
	repo_list_deinit(&p->list);
	if (p->base_map)
		pagemap_destroy(p->base_map);
	if (p->whole)
		pagemap_destroy(p->whole);
	packset_deinit(&p->marked);
	packset_deinit(&p->packs);
	layer_writer_deinit(&p->layer);
	manifest_deinit(&p->m);
	free(p->changed);
	free(p->infos);
	free(p->maps);
	free(p->pages);
	free(p->scratch);
	free(p->reqs);
	free(p->gfns);
	free(p->locs);
	free(p->at);
	free(p->names);
	free(p->todo);
}

static int cancelled(const struct push *p, struct err *e)
{
	return atomic_load(&p->job->cancel) ? err_set(e, ECANCELED, "the push was cancelled") : 0;
}

/* ---- 1: what is there ---- */

/* The local snapshot that a manifest is of: taken here, or pulled; 0: none. */
static uint64_t local_of(struct store *s, struct repo *r, const struct manifest *m)
{
	if (!memcmp(m->m.store, store_uuid(s), 16))
		return m->m.snapshot;
	return cache_local(r->cache, &m->name);
}

const struct manifest *push_find(const struct repo_list *list, struct store *s, struct repo *r,
				 uint64_t snapshot)
{
	for (size_t i = 0; i < list->nr; i++)
		if (local_of(s, r, &list->all[i]) == snapshot)
			return &list->all[i];
	return NULL;
}

/* The nearest ancestor that is in the repository; else the newest snapshot of the VM. */
static const struct manifest *choose_base(struct push *p, struct store_snapshot *local)
{
	const struct manifest *best = NULL;
	uint64_t id = p->c.snap.parent_snapshot;
	struct store_snapshot s;

	for (int depth = 0; id && depth < 10000 && !store_snapshot_get(p->store, id, &s, NULL);
	     depth++, id = s.parent_snapshot) {
		best = push_find(&p->list, p->store, p->r, id);
		if (best && s.page_size == p->c.snap.page_size) {
			*local = s;
			return best;
		}
	}
	best = NULL;
	for (size_t i = 0; i < p->list.nr; i++) {
		id = local_of(p->store, p->r, &p->list.all[i]);
		if (!id || store_snapshot_get(p->store, id, &s, NULL) ||
		    memcmp(s.vm, p->c.snap.vm, 16) != 0 || s.page_size != p->c.snap.page_size)
			continue;
		best = &p->list.all[i];
		*local = s;
	}
	return best;
}

static int find_changes(struct push *p, struct err *e)
{
	struct store_snapshot local;
	const struct manifest *base = choose_base(p, &local);
	int rc;

	p->walk = contents_walk(&p->c);
	/* It may be deleted at any time: then there is no base. */
	if (!base || store_pin(p->store, local.point, NULL))
		return 0;
	rc = store_map_load(p->store, local.point, false, &p->base_map, NULL);
	store_unpin(p->store, local.point);
	if (rc)
		return 0;
	rc = pagemap_diff(p->base_map, p->c.map, &p->changed, &p->nr_changed);
	if (rc)
		return err_errno(e, -rc, "push");
	p->base = base;
	return 0;
}

struct unsure {
	struct packset names;
};

static int add_unsure(void *arg, const struct bk_name *name, enum cache_pack state)
{
	struct unsure *u = arg;
	uint32_t n;

	return state == CACHE_INTENDED ? packset_add(&u->names, name, &n) : 0;
}

/* Packs that a push which was killed may or may not have sent. */
static int settle_intents(struct push *p, struct err *e)
{
	struct unsure u = {0};
	char key[REPO_KEY_BYTES];
	int rc = cache_each_pack(p->r->cache, add_unsure, &u, e);

	for (uint32_t i = 0; !rc && i < u.names.nr; i++) {
		const struct bk_name *name = &u.names.names[i];
		struct objstore_info info;

		rc = objstore_head(p->r->os, repo_key(REPO_PACKS, name, key), &info, NULL);
		if (!rc || rc == -ENOENT)
			rc = cache_set_pack(p->r->cache, name, rc ? CACHE_NONE : CACHE_SENT, e);
		else
			err_errno(e, -rc, "%s", key);
	}
	packset_deinit(&u.names);
	return rc;
}

/* The pages of a pack that somebody else sent. */
static int learn_pack(struct push *p, const struct bk_name *name, uint8_t *buf, struct err *e)
{
	size_t len, want = 0;
	char key[REPO_KEY_BYTES];
	struct pack_head h;
	int rc = objstore_get(p->r->os, repo_key(REPO_PACKS, name, key), 0, buf, TABLE_READ, &len,
			      e);

	if (rc == -ENOENT) {
		err_clear(e);
		return 0;
	}
	if (rc)
		return rc;
	rc = pack_head_bytes(&p->r->keys, buf, len, &want, NULL);
	if (!rc && want > len)
		rc = objstore_get(p->r->os, key, 0, buf, want, &len, NULL);
	if (!rc)
		rc = pack_head_decode(&p->r->keys, name, buf, len, &h, NULL);
	if (rc) { /* verify tells; nothing will refer to it */
		log_warn("backup: %s is damaged and not used", key);
		return 0;
	}
	rc = cache_put_pack(p->r->cache, name, CACHE_SENT, h.names, h.header.nr_pages, e);
	pack_head_deinit(&h);
	return rc;
}

struct forgetting {
	const struct packset *there;
	struct packset gone;
};

static int add_gone(void *arg, const struct bk_name *name, enum cache_pack state)
{
	struct forgetting *f = arg;
	uint32_t n;

	return packset_find(f->there, name) < 0 ? packset_add(&f->gone, name, &n) : 0;
}

/* Without a base most of the memory may be in the bucket already, from other VMs and hosts. */
static int learn_all(struct push *p, struct err *e)
{
	_cleanup_free_ uint8_t *buf =
		malloc(sizeof(struct bk_header) + BK_TAG_BYTES +
		       BK_PACK_PAGES * (sizeof(struct bk_run) + BK_NAME_BYTES));
	_cleanup_(packset_deinit) struct packset there = {0};
	struct forgetting f = {.there = &there};
	int rc = buf ? repo_names(p->r, REPO_PACKS, &there, e) : err_errno(e, ENOMEM, "push");

	if (!rc)
		rc = cache_each_pack(p->r->cache, add_gone, &f, e);
	for (uint32_t i = 0; !rc && i < f.gone.nr; i++)
		rc = cache_set_pack(p->r->cache, &f.gone.names[i], CACHE_NONE, e);
	packset_deinit(&f.gone);
	for (uint32_t i = 0; !rc && i < there.nr; i++) {
		rc = cancelled(p, e);
		if (!rc && cache_pack_state(p->r->cache, &there.names[i]) == CACHE_NONE)
			rc = learn_pack(p, &there.names[i], buf, e);
	}
	return rc;
}

/* ---- where pages are ---- */

static struct pack_info *info_of(struct push *p, uint32_t number)
{
	uint32_t cap = p->cap_infos ? p->cap_infos : 256;
	struct pack_info *infos;

	if (number >= p->cap_infos) {
		while (cap <= number)
			cap *= 2;
		infos = realloc(p->infos, cap * sizeof(*infos));
		if (!infos)
			return NULL;
		memset(infos + p->cap_infos, 0, (cap - p->cap_infos) * sizeof(*infos));
		p->infos = infos;
		p->cap_infos = cap;
	}
	return &p->infos[number];
}

static int reopen_view(struct push *p, struct err *e)
{
	cache_view_close(p->view);
	p->view = NULL;
	return cache_view_open(p->r->cache, &p->view, e);
}

/* Its name follows when it is full: until then a random one stands for it. */
static int begin_pack(struct push *p, struct err *e)
{
	struct bk_name unnamed;
	struct pack_info *info;

	p->pack = uploader_take(p->up);
	if (!p->pack)
		return uploader_finish(p->up, e);
	pack_begin(p->pack, p->c.snap.page_size);
	p->pack->scratch = p->scratch;
	randombytes_buf(unnamed.b, sizeof(unnamed.b));
	if (packset_add(&p->packs, &unnamed, &p->pack_number) ||
	    !(info = info_of(p, p->pack_number)))
		return err_errno(e, ENOMEM, "push");
	info->flags = PACK_RELIED | PACK_OURS;
	return 0;
}

static int send_pack(struct push *p, struct err *e)
{
	int rc;

	if (!p->pack || !p->pack->header.nr_pages)
		return 0;
	rc = pack_finish(p->pack);
	if (rc)
		return err_errno(e, -rc, "push");
	packset_rename(&p->packs, p->pack_number, &p->pack->name);
	rc = uploader_send(p->up, p->pack, e);
	if (rc)
		return rc;
	p->infos[p->pack_number].sent_ms = p->r->now_ms(p->r->now_arg);
	p->ret->packs_sent++;
	p->pack = NULL;
	return reopen_view(p, e);
}

/* In a pack of the repository, or of this push? */
static int find_known(struct push *p, const struct bk_name *name, uint32_t *pack, uint32_t *entry,
		      struct err *e)
{
	struct cache_place place;
	struct pack_info *info;

	if (!cache_find(p->view, name, &place) || packset_find(&p->marked, &place.pack) >= 0)
		return 0;
	if (packset_add(&p->packs, &place.pack, pack) || !(info = info_of(p, *pack)))
		return err_errno(e, ENOMEM, "push");
	if (place.state != CACHE_SENT && !(info->flags & PACK_OURS))
		return 0;
	info->flags |= PACK_RELIED;
	*entry = place.entry;
	return 1;
}

/* The place of a page: 0, with what it takes to be sent noted. */
static int place_page(struct push *p, uint32_t i, uint32_t *pack, uint32_t *entry, struct err *e)
{
	const struct bk_name *name = &p->names[i];
	int32_t mine = p->pack ? pack_find(p->pack, name) : -1;
	int rc = mine < 0 ? find_known(p, name, pack, entry, e) : 0;

	if (rc < 0)
		return rc;
	if (rc || mine >= 0)
		p->ret->pages_known++;
	if (rc)
		return 0;
	if (!p->pack) {
		rc = begin_pack(p, e);
		if (rc)
			return rc;
	}
	*pack = p->pack_number;
	if (mine < 0) {
		mine = (int32_t)pack_reserve(p->pack, name);
		p->todo[p->nr_todo++] = p->pages + (size_t)i * p->c.snap.page_size;
		p->ret->pages_sent++;
	}
	*entry = (uint32_t)mine;
	return 0;
}

/* ---- maps ---- */

static int end_map(struct push *p, struct err *e)
{
	struct bk_name *maps = realloc(p->maps, (p->nr_maps + 1) * sizeof(*maps));
	_cleanup_free_ uint8_t *payload = NULL;
	uint64_t frames;
	size_t len;
	int rc;

	if (!maps)
		return err_errno(e, ENOMEM, "push");
	p->maps = maps;
	rc = send_pack(p, e); /* the map has its name */
	if (rc)
		return rc;
	rc = layer_finish(&p->layer, &payload, &len, &frames);
	if (rc)
		return err_errno(e, -rc, "push");
	rc = repo_put_blob(p->r, REPO_BLOBS, BK_MAP, payload, len, &maps[p->nr_maps],
			   &p->blob_bytes, e);
	if (rc)
		return rc;
	p->nr_maps++;
	p->new_layer.nr_maps++;
	p->new_layer.nr_frames += frames;
	return 0;
}

static int note_frame(struct push *p, uint64_t gfn, enum layer_kind kind, uint32_t pack,
		      uint32_t entry, struct err *e)
{
	loc_t ref = kind == LAYER_PAGES	 ? ref_make(pack, entry)
		    : kind == LAYER_ZERO ? LOC_ZERO_PAGE
					 : 0;
	int rc = p->whole ? pagemap_set(p->whole, gfn, ref, 0)
			  : layer_put(&p->layer, gfn, kind, pack, entry);

	return rc ? err_errno(e, -rc, "push") : 0;
}

/* All layers as one: in place of a chain that got long. */
static int write_whole(struct push *p, struct err *e)
{
	struct pagemap_iter it;
	uint64_t gfn;
	loc_t ref;
	int rc = send_pack(p, e);

	if (rc)
		return rc;
	if (pagemap_iter_init(&it, p->whole))
		return err_errno(e, ENOMEM, "push");
	while (!rc && pagemap_iter_next(&it, &gfn, &ref)) {
		bool page = loc_kind(ref) == LOC_PAGE;

		rc = layer_put(&p->layer, gfn, page ? LAYER_PAGES : LAYER_ZERO, ref_pack(ref),
			       ref_entry(ref));
		if (rc)
			err_errno(e, -rc, "push");
		if (!rc && layer_bytes(&p->layer) >= MAP_TARGET)
			rc = end_map(p, e);
	}
	pagemap_iter_deinit(&it);
	return rc;
}

static bool chain_is_long(const struct push *p)
{
	return p->base->m.nr_layers >= CHAIN_MAX ||
	       (manifest_frames(p->base, 1) + p->nr_changed) * 2 > p->c.nr_pages;
}

static int begin_layers(struct push *p, struct err *e)
{
	int rc = 0;

	layer_writer_init(&p->layer, &p->packs);
	if (!p->base)
		return 0;
	if (chain_is_long(p)) {
		rc = pagemap_create(false, &p->whole);
		return rc ? err_errno(e, -rc, "push")
			  : memory_load(p->r, p->base, 0, &p->packs, p->whole, NULL, NULL, e);
	}
	p->m.m.nr_layers = p->base->m.nr_layers;
	memcpy(p->m.layers, p->base->layers, sizeof(p->m.layers));
	for (uint32_t i = 0; !rc && i < p->base->m.nr_maps; i++)
		rc = manifest_add_map(&p->m, &p->base->maps[i]);
	return rc ? err_errno(e, -rc, "push") : 0;
}

static int end_layers(struct push *p, struct err *e)
{
	int rc = p->whole ? write_whole(p, e) : 0;

	/* An empty map is one, too: each layer has some. */
	if (!rc && (!p->nr_maps || p->layer.nr_frames))
		rc = end_map(p, e);
	if (rc)
		return rc;
	p->m.layers[p->m.m.nr_layers++] = p->new_layer;
	for (uint32_t i = 0; !rc && i < p->nr_maps; i++)
		rc = manifest_add_map(&p->m, &p->maps[i]);
	return rc ? err_errno(e, -rc, "push") : 0;
}

/* ---- 2: batches ---- */

/* 1, 0 at the end. */
static int next_frame(struct push *p, uint64_t *gfn, loc_t *loc, struct err *e)
{
	if (!p->base)
		return contents_next(&p->walk, gfn, loc, e);
	if (p->at_changed == p->nr_changed)
		return 0;
	*gfn = p->changed[p->at_changed++];
	*loc = pagemap_get(p->c.map, *gfn);
	return 1;
}

static int name_pages(void *arg, uint64_t first, uint64_t n)
{
	struct push *p = arg;
	uint32_t size = p->c.snap.page_size;

	for (uint64_t i = first; i < first + n; i++)
		keys_page_name(&p->r->keys, p->pages + i * size, size, &p->names[i]);
	return 0;
}

/* Frames of a batch; *nr_reqs of them have pages.  How many, 0 at the end. */
static int gather(struct push *p, uint32_t *nr_reqs, struct err *e)
{
	uint32_t nr = 0;
	int rc;

	*nr_reqs = 0;
	while (nr < p->batch_max) {
		rc = next_frame(p, &p->gfns[nr], &p->locs[nr], e);
		if (rc <= 0)
			return rc < 0 ? rc : (int)nr;
		if (loc_kind(p->locs[nr]) == LOC_PAGE) {
			p->at[nr] = *nr_reqs;
			p->reqs[*nr_reqs] = (struct page_read){
				.gfn = p->gfns[nr],
				.loc = p->locs[nr],
				.dst = p->pages + (size_t)*nr_reqs * p->c.snap.page_size};
			++*nr_reqs;
		}
		nr++;
	}
	return (int)nr;
}

static int place_batch(struct push *p, uint32_t nr, struct err *e)
{
	int rc = 0;

	for (uint32_t i = 0; !rc && i < nr; i++) {
		enum layer_kind kind = LAYER_GONE;
		uint32_t pack = 0, entry = 0;

		if (loc_kind(p->locs[i]) == LOC_PAGE) {
			kind = LAYER_PAGES;
			rc = place_page(p, p->at[i], &pack, &entry, e);
		} else if (loc_kind(p->locs[i]) == LOC_ZERO) {
			kind = LAYER_ZERO;
			p->ret->pages_zero++;
		}
		if (!rc)
			rc = note_frame(p, p->gfns[i], kind, pack, entry, e);
	}
	return rc;
}

static int push_batch(struct push *p, uint32_t nr, uint32_t nr_reqs, struct err *e)
{
	int rc = store_read_pages(p->reader, p->reqs, nr_reqs, e);

	if (!rc)
		rc = pool_ranges(p->job->daemon->pool, nr_reqs, PARALLEL_NAMES, name_pages, p);
	if (!rc && p->pack && !pack_has_room(p->pack, nr_reqs))
		rc = send_pack(p, e);
	if (rc)
		return rc;
	p->nr_todo = 0;
	rc = place_batch(p, nr, e);
	if (rc)
		return rc;
	if (p->nr_todo)
		pack_add(p->pack, p->job->daemon->pool, p->todo);
	p->ret->pages_read += nr_reqs;
	atomic_fetch_add(&p->job->done, (uint64_t)nr * p->c.snap.page_size);
	if (p->pack && p->pack->data_bytes >= PACK_TARGET)
		rc = send_pack(p, e);
	if (!rc && layer_bytes(&p->layer) >= MAP_TARGET)
		rc = end_map(p, e);
	return rc;
}

static int push_pages(struct push *p, struct err *e)
{
	uint32_t nr_reqs;
	int nr, rc = 0;

	while (!rc && (nr = gather(p, &nr_reqs, e)) != 0) {
		rc = nr < 0 ? nr : cancelled(p, e);
		if (!rc)
			rc = push_batch(p, (uint32_t)nr, nr_reqs, e);
	}
	return rc;
}

/* ---- 4: the snapshot ---- */

static int describe(struct push *p, struct err *e)
{
	struct bk_manifest *m = &p->m.m;
	const struct store_snapshot *s = &p->c.snap;
	struct store_vm vm;
	struct timespec now;
	int rc = store_vm_get(p->store, s->vm, &vm, e);

	if (rc)
		return rc;
	clock_gettime(CLOCK_REALTIME, &now);
	memcpy(m->store, store_uuid(p->store), sizeof(m->store));
	m->snapshot = s->id;
	m->timeline = s->point.timeline;
	m->epoch = s->point.epoch;
	m->taken_ns = s->taken_ns;
	m->pause_ns = s->pause_ns;
	m->pushed_ns = (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
	m->state_bytes = p->c.state_len;
	memcpy(m->state, p->state.b, sizeof(m->state));
	m->nr_pages = p->c.nr_pages;
	m->page_size = s->page_size;
	m->flags = (s->pinned ? BK_SNAPSHOT_PINNED : 0) |
		   (s->post_mortem ? BK_SNAPSHOT_POSTMORTEM : 0);
	m->uid = s->uid;
	snprintf(m->vm, sizeof(m->vm), "%s", s->vm_name);
	snprintf(m->arch, sizeof(m->arch), "%s", vm.arch);
	gethostname(m->host, sizeof(m->host) - 1);
	snprintf(m->name, sizeof(m->name), "%s", s->name);
	snprintf(m->note, sizeof(m->note), "%s", s->note);
	snprintf(m->tags, sizeof(m->tags), "%s", s->tags);
	m->cmdline_bytes = (uint32_t)vm.cmdline_len;
	p->m.cmdline = steal_ptr(&vm.cmdline);
	store_vm_deinit(&vm);
	return 0;
}

static int list_relied(struct push *p, struct repo_relied **ret, size_t *nr, struct err *e)
{
	struct repo_relied *all = calloc((size_t)p->packs.nr + p->nr_maps + 1, sizeof(*all));
	int64_t now_ms = p->r->now_ms(p->r->now_arg);

	if (!all)
		return err_errno(e, ENOMEM, "push");
	*nr = 0;
	for (uint32_t i = 0; i < MIN(p->packs.nr, p->cap_infos); i++)
		if (p->infos[i].flags & PACK_RELIED)
			all[(*nr)++] = (struct repo_relied){.name = p->packs.names[i],
							    .is_pack = true,
							    .sent = p->infos[i].flags & PACK_OURS,
							    .sent_ms = p->infos[i].sent_ms};
	for (uint32_t i = 0; i < p->nr_maps; i++)
		all[(*nr)++] =
			(struct repo_relied){.name = p->maps[i], .sent = true, .sent_ms = now_ms};
	all[(*nr)++] = (struct repo_relied){.name = p->state, .sent = true, .sent_ms = now_ms};
	*ret = all;
	return 0;
}

static int commit(struct push *p, struct err *e)
{
	_cleanup_free_ struct repo_relied *relied = NULL;
	bool base_lost = false;
	size_t nr;
	int rc = list_relied(p, &relied, &nr, e);

	if (rc)
		return rc;
	p->ret->bytes_sent = p->m.m.bytes_sent = uploader_bytes(p->up) + p->blob_bytes;
	rc = repo_commit(p->r, &p->m, p->base ? &p->base->name : NULL, &base_lost, relied, nr, e);
	for (size_t i = 0; rc == -ESTALE && i < nr; i++)
		if (relied[i].lost && relied[i].is_pack)
			cache_set_pack(p->r->cache, &relied[i].name, CACHE_NONE, NULL);
	p->ret->name = p->m.name;
	return rc;
}

static int finish(struct push *p, struct err *e)
{
	int rc;

	atomic_store(&p->job->phase, "finishing");
	rc = send_pack(p, e);
	if (!rc)
		rc = end_layers(p, e);
	if (!rc)
		rc = repo_put_blob(p->r, REPO_BLOBS, BK_STATE, p->c.state, p->c.state_len,
				   &p->state, &p->blob_bytes, e);
	if (!rc)
		rc = describe(p, e);
	if (!rc)
		rc = uploader_finish(p->up, e);
	if (!rc)
		rc = cancelled(p, e);
	return rc ? rc : commit(p, e);
}

/* ---- all of it ---- */

static int allocate(struct push *p, struct err *e)
{
	uint32_t size = p->c.snap.page_size;
	int rc;

	p->batch_max = BATCH_BYTES / size;
	p->pages = aligned_alloc(4096, BATCH_BYTES);
	p->scratch = malloc(PACK_SCRATCH_BYTES);
	p->reqs = calloc(p->batch_max, sizeof(*p->reqs));
	p->gfns = calloc(p->batch_max, sizeof(*p->gfns));
	p->locs = calloc(p->batch_max, sizeof(*p->locs));
	p->at = calloc(p->batch_max, sizeof(*p->at));
	p->names = calloc(p->batch_max, sizeof(*p->names));
	p->todo = calloc(p->batch_max, sizeof(*p->todo));
	if (!p->pages || !p->scratch || !p->reqs || !p->gfns || !p->locs || !p->at || !p->names ||
	    !p->todo)
		return err_errno(e, ENOMEM, "push");
	rc = store_reader_create(p->store, size, &p->reader, e);
	return rc ? rc : uploader_create(p->r, &p->up, e);
}

/* 1: it is there already. */
static int prepare(struct push *p, uint64_t snapshot, struct err *e)
{
	const struct manifest *there;
	int rc = contents_open(p->store, snapshot, true, &p->c, e);

	if (!rc)
		rc = repo_list(p->r, &p->list, e);
	if (rc)
		return rc;
	there = push_find(&p->list, p->store, p->r, snapshot);
	if (there) {
		p->ret->name = there->name;
		p->ret->already = true;
		return 1;
	}
	rc = find_changes(p, e);
	if (!rc)
		rc = settle_intents(p, e);
	if (!rc)
		rc = repo_marked(p->r, &p->marked, e);
	if (!rc && !p->base)
		rc = learn_all(p, e);
	return rc;
}

static int push_once(struct push *p, uint64_t snapshot, struct err *e)
{
	int rc;

	atomic_store(&p->job->phase, "looking");
	rc = prepare(p, snapshot, e);
	if (rc)
		return MIN(rc, 0);
	p->ret->has_base = p->base;
	if (p->base)
		p->ret->base = p->base->name;
	atomic_store(&p->job->done, 0);
	atomic_store(&p->job->total,
		     (p->base ? p->nr_changed : p->c.nr_pages) * p->c.snap.page_size);
	atomic_store(&p->job->phase, "sending");
	rc = allocate(p, e);
	if (!rc)
		rc = begin_layers(p, e);
	if (!rc)
		rc = reopen_view(p, e);
	if (!rc)
		rc = push_pages(p, e);
	return rc ? rc : finish(p, e);
}

int push_snapshot(struct job *job, struct repo *r, uint64_t snapshot, struct push_result *ret,
		  struct err *e)
{
	int rc = -ESTALE;

	for (int i = 0; rc == -ESTALE && i < TRIES; i++) {
		_cleanup_(push_deinit) struct push p = {
			.job = job, .r = r, .store = job->daemon->store, .ret = ret};

		err_clear(e);
		*ret = (struct push_result){0};
		rc = push_once(&p, snapshot, e);
	}
	return rc;
}
