/* SPDX-License-Identifier: MIT */
/* A snapshot of a repository into the local store; see pull.h. */
#include "snapd/backup/pull.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/backup/fetch.h"
#include "snapd/core/contents.h"
#include "snapd/core/daemon.h"
#include "snapd/util/cleanup.h"
#include "snapd/vm/vm.h"

#define RUN_PAGES_MAX (BK_RUN_BYTES / 4096)
#define ZERO_BATCH    1024u

struct pull;

/* Pages of a run on their way to the epoch; a fetching thread's own. */
struct feeder {
	struct pull *p;
	struct epoch_page pages[RUN_PAGES_MAX]; /* a page that is wanted more often comes again */
	uint32_t nr;
};

struct pull {
	struct job *job;
	struct repo *r;
	struct store *store;
	const struct manifest *m;
	struct pull_result *ret;
	const char *vm;
	struct store_snapshot base; /* local; id 0: none */
	uint32_t first_layer;	    /* to be fetched */
	/* the snapshot */
	void *state; /* owned */
	struct snapd_state_reader reader;
	struct contents c; /* only pieces: for the walk */
	struct packset packs;
	struct pagemap *refs;	 /* owned */
	struct fetch_page *want; /* owned */
	size_t nr_want;
	/* the store */
	uint64_t timeline;
	struct pagemap *live; /* owned */
	struct epoch *epoch;
	pthread_mutex_t epoch_lock; /* epoch_put() is one thread's at a time */
	struct feeder feeders[FETCH_THREADS];
};

static void pull_deinit(struct pull *p)
{
	epoch_abort(p->epoch);
	if (p->timeline && !p->ret->snapshot)
		store_timeline_drop(p->store, p->timeline, NULL);
	if (p->base.id)
		store_unpin(p->store, p->base.point);
	if (p->live)
		pagemap_destroy(p->live);
	if (p->refs)
		pagemap_destroy(p->refs);
	packset_deinit(&p->packs);
	pthread_mutex_destroy(&p->epoch_lock);
	free(p->state);
	free(p->want);
}

static bool pull_stop(void *arg)
{
	struct pull *p = arg;

	return atomic_load(&p->job->cancel);
}

/* ---- what is here already ---- */

static uint64_t local_of(const struct pull *p, const struct manifest *m, struct store_snapshot *ret)
{
	uint64_t id = memcmp(m->m.store, store_uuid(p->store), 16)
			      ? cache_local(p->r->cache, &m->name)
			      : m->m.snapshot;

	return id && !store_snapshot_get(p->store, id, ret, NULL) ? id : 0;
}

/* Are a's layers the first of m's? */
static bool is_below(const struct manifest *a, const struct manifest *m)
{
	return a->m.nr_layers < m->m.nr_layers && a->m.nr_maps < m->m.nr_maps &&
	       a->m.page_size == m->m.page_size &&
	       !memcmp(a->maps, m->maps, a->m.nr_maps * sizeof(*a->maps)) &&
	       !memcmp(a->layers, m->layers, a->m.nr_layers * sizeof(*a->layers));
}

/* The snapshot in the store, of the same VM, that has the most layers in common. */
static void find_base(struct pull *p, const struct repo_list *list, const uint8_t vm[16])
{
	for (size_t i = 0; i < list->nr; i++) {
		const struct manifest *a = &list->all[i];
		struct store_snapshot s;

		if (!is_below(a, p->m) || a->m.nr_layers <= p->first_layer || !local_of(p, a, &s) ||
		    memcmp(s.vm, vm, 16) != 0)
			continue;
		p->base = s;
		p->first_layer = a->m.nr_layers;
	}
	if (p->base.id && store_pin(p->store, p->base.point, NULL)) {
		p->base = (struct store_snapshot){0};
		p->first_layer = 0;
	}
}

/* ---- the snapshot ---- */

static int load_state(struct pull *p, struct err *e)
{
	char key[REPO_KEY_BYTES];
	struct bk_name name;
	struct err why = {0};
	uint8_t *bytes;
	size_t len;
	int rc;

	memcpy(name.b, p->m->m.state, sizeof(name.b));
	rc = repo_get_blob(p->r, REPO_BLOBS, BK_STATE, &name, &bytes, &len, e);
	if (rc)
		return rc;
	p->state = bytes;
	if (len != p->m->m.state_bytes)
		rc = err_set(&why, E_CORRUPT, "the manifest says %llu bytes of state",
			     (unsigned long long)p->m->m.state_bytes);
	if (!rc)
		rc = state_reader_init(&p->reader, p->state, len, &why);
	if (!rc)
		rc = contents_pieces(&p->reader, &p->c.pieces, &p->c.nr_pieces, &p->c.nr_pages,
				     &why);
	return rc ? err_set(e, -rc, "%s: %s", repo_key(REPO_BLOBS, &name, key), why.text) : 0;
}

static int frames_gone(void *arg, uint64_t gfn, uint64_t nr, struct err *e)
{
	struct pull *p = arg;

	return p->base.id ? epoch_gone(p->epoch, gfn, nr, e) : 0;
}

/* Every page of the pieces is known, here or there; those to be fetched are listed. */
static int plan(struct pull *p, struct err *e)
{
	struct contents_walk w = {.c = &p->c};
	uint64_t nr = pagemap_nr_pages(p->refs);

	p->want = calloc(nr + 1, sizeof(*p->want));
	if (!p->want)
		return err_errno(e, ENOMEM, "pull");
	for (; w.piece < p->c.nr_pieces; w.piece++, w.page = 0) {
		const struct state_piece *piece = &p->c.pieces[w.piece];

		for (; w.page < piece->nr_pages; w.page++) {
			uint64_t gfn = piece->home_gfn + w.page;
			loc_t ref = pagemap_get(p->refs, gfn);

			if (loc_kind(ref) == LOC_PAGE)
				p->want[p->nr_want++] = (struct fetch_page){.ref = ref, .gfn = gfn};
			else if (!ref && !(p->base.id && pagemap_get(p->live, gfn)))
				return err_set(e, E_CORRUPT,
					       "no map of the snapshot has the page at 0x%llx",
					       (unsigned long long)gfn * p->m->m.page_size);
		}
	}
	return 0;
}

/* ---- the store ---- */

/* A VM that is attached has a timeline, a page size and a command line of its own. */
static int check_not_attached(struct pull *p, uint32_t uid, struct err *e)
{
	char owned[SNAPD_NAME_MAX + 16];
	struct vm *vm;

	snprintf(owned, sizeof(owned), "%u/%s", uid, p->vm);
	vm = vm_find(p->job->daemon, owned, 0);
	if (!vm)
		return 0;
	vm_unref(vm);
	return err_set(e, EBUSY, "a VM named %s is attached: pull under another --name", p->vm);
}

static int open_vm(struct pull *p, const struct repo_list *list, struct err *e)
{
	/* Root brings back what belongs to others. */
	uint32_t uid = p->job->uid ? p->job->uid : p->m->m.uid;
	struct store_vm vm = {.uid = uid, .page_size = p->m->m.page_size};
	int rc = check_not_attached(p, uid, e);

	snprintf(vm.name, sizeof(vm.name), "%s", p->vm);
	snprintf(vm.arch, sizeof(vm.arch), "%s", p->m->m.arch);
	vm.cmdline = p->m->cmdline; /* borrowed */
	vm.cmdline_len = p->m->m.cmdline_bytes;
	if (!rc)
		rc = store_vm_register(p->store, &vm, e);
	if (rc)
		return rc;
	find_base(p, list, vm.id);
	rc = store_timeline_create(p->store, vm.id, p->base.point, &p->timeline, e);
	if (!rc && p->base.id)
		rc = store_map_load(p->store, p->base.point, true, &p->live, e);
	else if (!rc && (rc = pagemap_create(true, &p->live)))
		err_errno(e, -rc, "pull");
	return rc ? rc
		  : epoch_begin(p->store, vm.id, p->timeline, p->m->m.page_size, p->live, &p->epoch,
				e);
}

static int flush(void *arg, struct err *e)
{
	struct feeder *f = arg;
	int rc;

	pthread_mutex_lock(&f->p->epoch_lock);
	rc = f->nr ? epoch_put(f->p->epoch, f->pages, f->nr, e) : 0;
	pthread_mutex_unlock(&f->p->epoch_lock);
	atomic_fetch_add(&f->p->job->done, (uint64_t)f->nr * f->p->m->m.page_size);
	f->nr = 0;
	return rc;
}

static int on_page(void *arg, uint64_t gfn, const uint8_t *bytes, struct err *e)
{
	struct feeder *f = arg;

	f->pages[f->nr++] = (struct epoch_page){.gfn = gfn,
						.bytes = bytes,
						.id = pageid_of(store_secret(f->p->store), bytes,
								f->p->m->m.page_size)};
	return f->nr == RUN_PAGES_MAX ? flush(f, e) : 0;
}

static void *feeder_of(void *arg, int i)
{
	struct pull *p = arg;

	p->feeders[i].p = p;
	return &p->feeders[i];
}

static int fetch_pages(struct pull *p, struct err *e)
{
	struct fetch f = {.r = p->r,
			  .packs = &p->packs,
			  .pages = p->want,
			  .nr = p->nr_want,
			  .page_size = p->m->m.page_size,
			  .fn = on_page,
			  .flush = flush,
			  .worker = feeder_of,
			  .arg = p,
			  .stop = pull_stop};
	int rc;

	atomic_store(&p->job->total, (uint64_t)p->nr_want * f.page_size);
	atomic_store(&p->job->phase, "fetching");
	rc = fetch_run(&f, e);
	p->ret->bytes_received = atomic_load(&f.bytes);
	p->ret->pages_fetched = p->nr_want;
	return rc;
}

static int put_zeroes(struct pull *p, struct err *e)
{
	_cleanup_free_ struct epoch_page *batch = calloc(ZERO_BATCH, sizeof(*batch));
	_cleanup_free_ uint8_t *zero = aligned_alloc(4096, p->m->m.page_size);
	struct pagemap_iter it;
	uint32_t nr = 0;
	uint64_t gfn;
	loc_t ref;
	int rc = 0;

	if (!batch || !zero || pagemap_iter_init(&it, p->refs))
		return err_errno(e, ENOMEM, "pull");
	memset(zero, 0, p->m->m.page_size);
	while (!rc && pagemap_iter_next(&it, &gfn, &ref)) {
		if (loc_kind(ref) != LOC_ZERO)
			continue;
		batch[nr++] = (struct epoch_page){.gfn = gfn, .bytes = zero};
		if (nr == ZERO_BATCH) {
			rc = epoch_put(p->epoch, batch, nr, e);
			nr = 0;
		}
	}
	pagemap_iter_deinit(&it);
	return !rc && nr ? epoch_put(p->epoch, batch, nr, e) : rc;
}

static int commit(struct pull *p, struct err *e)
{
	const struct bk_manifest *m = &p->m->m;
	struct snapshot_meta meta = {.name = *m->name ? m->name : NULL,
				     .note = m->note,
				     .tags = m->tags,
				     .pinned = m->flags & BK_SNAPSHOT_PINNED,
				     .post_mortem = contents_postmortem(&p->reader),
				     .pause_ns = m->pause_ns,
				     .taken_ns = m->taken_ns};
	struct snapd_point point;
	struct epoch_stats stats;
	int rc;

	atomic_store(&p->job->phase, "committing");
	if (atomic_load(&p->job->cancel))
		return err_set(e, ECANCELED, "the pull was cancelled");
	rc = epoch_commit(p->epoch, p->state, m->state_bytes, &meta, &point, &p->ret->snapshot,
			  &stats, e);
	if (rc)
		return rc;
	p->epoch = NULL;
	p->ret->pages = p->c.nr_pages;
	p->ret->base = p->base.id;
	/* Without it the next pull fetches more than it must. */
	cache_set_local(p->r->cache, &p->m->name, p->ret->snapshot, NULL);
	return 0;
}

static int pull_all(struct pull *p, const struct repo_list *list, struct err *e)
{
	int rc;

	p->job->unit = "bytes";
	atomic_store(&p->job->phase, "reading maps");
	rc = load_state(p, e);
	if (!rc)
		rc = open_vm(p, list, e);
	if (!rc && (rc = pagemap_create(false, &p->refs)))
		err_errno(e, -rc, "pull");
	if (!rc)
		rc = memory_load(p->r, p->m, p->first_layer, &p->packs, p->refs, frames_gone, p, e);
	if (!rc)
		rc = plan(p, e);
	if (!rc)
		rc = fetch_pages(p, e);
	if (!rc)
		rc = put_zeroes(p, e);
	return rc ? rc : commit(p, e);
}

int pull_snapshot(struct job *job, struct repo *r, const struct repo_list *list,
		  const struct manifest *m, const char *vm, struct pull_result *ret, struct err *e)
{
	struct pull p = {.job = job,
			 .r = r,
			 .store = job->daemon->store,
			 .m = m,
			 .ret = ret,
			 .vm = vm ? vm : m->m.vm};
	struct store_snapshot there;
	struct err why = {0};
	int rc;

	*ret = (struct pull_result){0};
	if (!vm && local_of(&p, m, &there)) {
		ret->already = true;
		ret->snapshot = there.id;
		return 0;
	}
	pthread_mutex_init(&p.epoch_lock, NULL);
	rc = pull_all(&p, list, &why);
	pull_deinit(&p);
	return rc ? err_set(e, -rc, "snapshot %s of %s: %s", *m->m.name ? m->m.name : "", m->m.vm,
			    why.code ? why.text : strerror(-rc))
		  : 0;
}
