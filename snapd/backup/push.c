/* SPDX-License-Identifier: MIT */
/* A local snapshot into a repository; see push.h. */
#include "snapd/backup/push.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "snapd/backup/push_impl.h"
#include "snapd/core/daemon.h"
#include "snapd/store/overlay.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/pool.h"

#define BATCH_BYTES    PACK_ADD_BYTES
#define TRIES	       3
#define PARALLEL_NAMES 64

static void push_deinit(struct push *p)
{
	cache_view_close(p->view);
	uploader_destroy(p->up);
	store_reader_destroy(p->reader);
	push_close_frames(p);
	contents_deinit(&p->c);
	repo_list_deinit(&p->list);
	memory_stream_close(p->whole);
	packset_deinit(&p->marked);
	packset_deinit(&p->packs);
	layer_writer_deinit(&p->layer);
	manifest_deinit(&p->m);
	free(p->infos);
	free(p->maps);
	free(p->pages);
	free(p->scratch);
	free(p->reqs);
	free(p->items);
	free(p->names);
	free(p->todo);
}

int push_cancelled(const struct push *p, struct err *e)
{
	return atomic_load(&p->job->cancel) ? err_set(e, ECANCELED, "the push was cancelled") : 0;
}

/* ---- progress ---- */

/*
 * In bytes of memory: what was looked at and is there.  Of the packs that are not there yet it is
 * the part that has left this host; after a repeated request too much, until the pack has arrived.
 */
static void report(void *arg)
{
	struct push *p = arg;
	struct upload_state up;
	struct objstore_counters c;
	uint64_t sent, left = p->pack ? p->pack->header.nr_pages : 0;

	uploader_state(p->up, &up);
	objstore_counters(p->r->os, &c);
	sent = c.bytes_sent - p->sent_before;
	sent -= MIN(sent, up.arrived_bytes);
	sent = MIN(sent, up.pending_bytes);
	if (up.pending_bytes)
		left += (uint64_t)((double)up.pending_pages * (double)(up.pending_bytes - sent) /
				   (double)up.pending_bytes);
	left = MIN(left, p->nr_noted);
	atomic_store(&p->job->done, (p->nr_noted - left) * p->c.snap.page_size);
}

/* ---- 2: batches ---- */

static int name_pages(void *arg, uint64_t first, uint64_t n)
{
	struct push *p = arg;
	uint32_t size = p->c.snap.page_size;

	for (uint64_t i = first; i < first + n; i++)
		keys_page_name(&p->r->keys, p->pages + i * size, size, &p->names[i]);
	return 0;
}

/* The next item; what is left of its run comes next.  1, 0 at the end. */
static int next_item(struct push *p, struct push_item *ret, loc_t *loc, struct err *e)
{
	struct manifest_run *run = &p->run;
	int rc = run->len ? 1 : push_next_frames(p, run, e);
	bool page;

	if (rc <= 0)
		return rc;
	*loc = run->loc;
	page = loc_kind(*loc) == LOC_PAGE;
	*ret = (struct push_item){.run = {.gfn = run->gfn, .nr = page ? 1 : run->len}};
	ret->run.kind = page ? LAYER_PAGES : *loc == LOC_ZERO_PAGE ? LAYER_ZERO : LAYER_GONE;
	*run = run_from(*run, run->gfn + ret->run.nr);
	return 1;
}

/* Items of a batch; *nr_reqs of them have pages.  How many, 0 at the end. */
static int gather(struct push *p, uint32_t *nr_reqs, struct err *e)
{
	uint32_t nr = 0;
	loc_t loc;
	int rc;

	*nr_reqs = 0;
	while (nr < p->batch_max) {
		struct push_item *x = &p->items[nr];

		rc = next_item(p, x, &loc, e);
		if (rc <= 0)
			return rc < 0 ? rc : (int)nr;
		if (x->run.kind == LAYER_PAGES) {
			x->page = *nr_reqs;
			p->reqs[*nr_reqs] = (struct page_read){
				.gfn = x->run.gfn,
				.loc = loc,
				.dst = p->pages + (size_t)*nr_reqs * p->c.snap.page_size};
			++*nr_reqs;
		}
		nr++;
	}
	return (int)nr;
}

/* Every page gets its place; those that have to be sent, theirs in the pack. */
static int place_batch(struct push *p, uint32_t nr, struct err *e)
{
	int rc = 0;

	p->nr_todo = 0;
	for (uint32_t i = 0; !rc && i < nr; i++) {
		struct push_item *x = &p->items[i];

		if (x->run.kind == LAYER_PAGES)
			rc = push_place_page(p, x->page, &x->run.pack, &x->run.entry, e);
		else if (x->run.kind == LAYER_ZERO)
			p->ret->pages_zero += x->run.nr;
	}
	if (!rc && p->nr_todo)
		pack_add(p->pack, p->job->daemon->pool, p->todo);
	return rc;
}

static int note_batch(struct push *p, uint32_t nr, struct err *e)
{
	int rc = 0;

	for (uint32_t i = 0; !rc && i < nr; i++) {
		p->nr_noted += p->items[i].run.nr;
		rc = push_note_run(p, &p->items[i].run, e);
	}
	report(p);
	return rc;
}

static int push_batch(struct push *p, uint32_t nr, uint32_t nr_reqs, struct err *e)
{
	int rc = store_read_pages(p->reader, p->reqs, nr_reqs, e);

	if (!rc)
		rc = pool_ranges(p->job->daemon->pool, nr_reqs, PARALLEL_NAMES, name_pages, p);
	if (!rc && p->pack && !pack_has_room(p->pack, nr_reqs))
		rc = push_send_pack(p, e);
	if (!rc)
		rc = place_batch(p, nr, e);
	if (!rc)
		rc = note_batch(p, nr, e);
	p->ret->pages_read += nr_reqs;
	if (!rc && p->pack && p->pack->data_bytes >= PACK_TARGET)
		rc = push_send_pack(p, e);
	return rc;
}

static int push_pages(struct push *p, struct err *e)
{
	uint32_t nr_reqs;
	int nr, rc = 0;

	while (!rc && (nr = gather(p, &nr_reqs, e)) != 0) {
		rc = nr < 0 ? nr : push_cancelled(p, e);
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
	struct upload_state up;
	bool base_lost = false;
	size_t nr;
	int rc = list_relied(p, &relied, &nr, e);

	if (rc)
		return rc;
	uploader_state(p->up, &up);
	p->ret->bytes_sent = p->m.m.bytes_sent = up.arrived_bytes + p->blob_bytes;
	rc = repo_commit(p->r, &p->m, p->base ? &p->base->name : NULL, &base_lost, relied, nr, e);
	for (size_t i = 0; rc == -ESTALE && i < nr; i++)
		if (relied[i].lost && relied[i].is_pack)
			cache_set_pack(p->r->cache, &relied[i].name, CACHE_NONE, NULL);
	p->ret->name = p->m.name;
	if (!rc) /* so that it can be a base when it is deleted here (push_known.c) */
		cache_set_local(p->r->cache, &p->m.name, p->c.snap.id, NULL);
	return rc;
}

static int finish(struct push *p, struct err *e)
{
	int rc = push_send_pack(p, e);

	if (!rc)
		rc = push_end_layers(p, e);
	if (!rc)
		rc = repo_put_blob(p->r, REPO_BLOBS, BK_STATE, p->c.state, p->c.state_len,
				   &p->state, &p->blob_bytes, e);
	if (!rc)
		rc = describe(p, e);
	if (!rc)
		rc = uploader_finish(p->up, e);
	if (!rc)
		rc = push_cancelled(p, e);
	if (rc)
		return rc;
	report(p);
	atomic_store(&p->job->phase, "finishing");
	return commit(p, e);
}

/* ---- all of it ---- */

static int allocate(struct push *p, struct err *e)
{
	uint32_t size = p->c.snap.page_size;
	struct objstore_counters before;
	int rc;

	p->batch_max = BATCH_BYTES / size;
	p->pages = aligned_alloc(4096, BATCH_BYTES);
	p->scratch = malloc(PACK_SCRATCH_BYTES);
	p->reqs = calloc(p->batch_max, sizeof(*p->reqs));
	p->items = calloc(p->batch_max, sizeof(*p->items));
	p->names = calloc(p->batch_max, sizeof(*p->names));
	p->todo = calloc(p->batch_max, sizeof(*p->todo));
	if (!p->pages || !p->scratch || !p->reqs || !p->items || !p->names || !p->todo)
		return err_errno(e, ENOMEM, "push");
	rc = store_reader_create(p->store, size, &p->reader, e);
	objstore_counters(p->r->os, &before);
	p->sent_before = before.bytes_sent;
	return rc ? rc : uploader_create(p->r, report, p, &p->up, e);
}

/* 1: it is there already. */
static int prepare(struct push *p, uint64_t snapshot, struct err *e)
{
	const struct manifest *there;
	int rc = contents_open(p->store, snapshot, false, &p->c, e);

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
	rc = push_open_frames(p, e);
	if (!rc)
		rc = push_settle_intents(p, e);
	if (!rc)
		rc = repo_marked(p->r, &p->marked, e);
	if (!rc && !p->base)
		rc = push_learn_all(p, e);
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
	atomic_store(&p->job->total, p->nr_frames * p->c.snap.page_size);
	atomic_store(&p->job->phase, "sending");
	rc = allocate(p, e);
	if (!rc)
		rc = push_begin_layers(p, e);
	if (!rc)
		rc = push_reopen_view(p, e);
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
